"""Data sets of pictures in EDM's layout: a zip or a folder of square images, with their classes in `dataset.json`."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.errors import UserError
from dmd2.image_file import ImageFile, Role

LABELS_FILE = "dataset.json"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
IN_MEMORY_BYTES = 6 * 2**30  # larger sets (ImageNet-64: 15 GB) are decoded anew, batch by batch

_BROKEN = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError)


@dataclass(frozen=True)
class _Files:
    names: list[str]
    """of the images, sorted; relative to the root, with /"""
    read: Callable[[str], bytes]
    labels: bytes | None
    """content of `dataset.json`"""


class ImageSet:
    """Square RGB pictures of one size and, if there are any, their classes.

    Args:
        path: zip or folder. `dataset.json` in it is `{"labels": [["00000/img00000000.png", 6], …]}`, or null.
        resolution: what the side of every picture must be, in pixels; None for whatever the first one's is.
        classes: how many the model knows; more than 0 makes labels 0 … classes − 1 compulsory.
        fit: bring pictures of other sizes to `resolution`: their central square, resized by Lanczos' filter.
        in_memory: decode all pictures at once, and keep them if they are not too many.

    Raises:
        UserError: the file is unreadable, holds no images, or they are not what is asked for.
    """

    def __init__(
        self,
        path: Path,
        resolution: int | None = None,
        classes: int = 0,
        *,
        fit: bool = False,
        in_memory: bool = True,
    ) -> None:
        self.path, self.fit = path, fit
        self._files = _folder(path) if path.is_dir() else _zip(path)
        if not self._files.names:
            raise UserError(f"{path}: holds no images; expected {', '.join(sorted(SUFFIXES))} files")
        self.resolution = resolution or self._decode(self._files.names[0], None).shape[1]
        self.labels = self._labels(classes)
        """int64 (N,), or None where there are none"""
        self._memory: Tensor | None = None
        if in_memory and len(self) * 3 * self.resolution**2 <= IN_MEMORY_BYTES:
            self._memory = torch.stack([self._decode(name, self.resolution) for name in self._files.names])
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._files.names)

    @property
    def names(self) -> list[str]:
        """Of the files, in the order of the rows; relative to `path`."""
        return self._files.names

    def images(self, rows: Tensor) -> Tensor:
        """Those at int64 (B,) `rows`: uint8 (B, 3, R, R)."""
        if self._memory is not None:
            return self._memory[rows]
        return torch.stack([self._decode(self._files.names[i], self.resolution) for i in rows.tolist()])

    def one_hot(self, rows: Tensor, classes: int) -> Tensor:
        """The classes of those at int64 (B,) `rows`: fp32 (B, classes)."""
        if self.labels is None or not classes:
            return torch.zeros(len(rows), classes)
        return torch.nn.functional.one_hot(self.labels[rows], classes).float()

    def batch(self, size: int, seed: int, step: int) -> Tensor:
        """The rows (size,) of the step's batch: a pure function of (seed, step). Each epoch has its own order."""
        places = torch.arange(step * size, (step + 1) * size)
        epochs = places // len(self)
        rows = [self._shuffled(seed, int(e))[places[epochs == e] % len(self)] for e in epochs.unique()]
        return torch.cat(rows)

    def _shuffled(self, seed: int, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self._order = (seed, epoch), torch.randperm(len(self), generator=generator)
        return self._order[1]

    def _decode(self, name: str, resolution: int | None) -> Tensor:
        try:
            data = self._files.read(name)
        except _BROKEN as error:
            raise UserError(f"{self.path}: {name}: unreadable ({_reason(error)})") from error
        image = ImageFile.read(data, f"{self.path}: {name}", Role.TRAINING, FORMATS)
        pixels = np.array(image.decode((resolution, resolution) if self.fit and resolution else None))
        height, width, _ = pixels.shape
        if height != width or resolution not in (None, width):
            side = f"{resolution}x{resolution}" if resolution else "square"
            raise UserError(f"{self.path}: {name} is {width}x{height} pixels; expected {side}")
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _labels(self, classes: int) -> Tensor | None:
        where = f"{self.path}: {LABELS_FILE}"
        try:
            content: Any = json.loads(self._files.labels or b"{}")
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        entries = content.get("labels") if isinstance(content, dict) else None
        if entries is None:
            if classes:
                what = "missing" if self._files.labels is None else "holds no labels"
                raise UserError(f"{where}: {what}; a model of {classes} classes needs the class of every image")
            return None
        try:
            by_name = {str(name): int(label) for name, label in entries}
        except (TypeError, ValueError):
            raise UserError(f'{where}: labels: expected [["NAME", CLASS], …]') from None
        for name in self._files.names:
            if name not in by_name:
                raise UserError(f"{where}: no label for {name}")
            if classes and not 0 <= by_name[name] < classes:
                raise UserError(f"{where}: {name} is of class {by_name[name]}; expected 0 to {classes - 1}")
        return torch.tensor([by_name[name] for name in self._files.names])


def _zip(path: Path) -> _Files:
    if not path.is_file():
        raise UserError(f"--data {path}: no such file or folder; expected a zip or a folder of images")
    try:
        archive = zipfile.ZipFile(path)
        names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in SUFFIXES)
        labels = archive.read(LABELS_FILE) if LABELS_FILE in archive.namelist() else None
    except _BROKEN as error:
        raise UserError(f"{path}: not a whole zip file ({_reason(error)})") from error
    return _Files(names, archive.read, labels)


def _folder(path: Path) -> _Files:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    labels = path / LABELS_FILE
    return _Files(
        [p.relative_to(path).as_posix() for p in files],
        lambda name: (path / name).read_bytes(),
        labels.read_bytes() if labels.is_file() else None,
    )


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
