"""Data sets of images in EDM's layout: a zip or a folder of square images, with their classes in `dataset.json`."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.data.shards import batch_rows
from dmd2.inference.image_input import MOST_BYTES, ImageFile, Role
from dmd2.runtime.errors import DataError, InvalidInput, first_line, shown

LABELS_FILE = "dataset.json"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MOST_LABELS = 500_000_000
"""bytes of `dataset.json`, at most; ImageNet's has 45 million"""
MOST_CLASSES = 2**31
IN_MEMORY_BYTES = 6 * 2**30  # larger sets (ImageNet-64: 15 GB) are decoded anew, batch by batch

BROKEN = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError)
"""RuntimeError: an encrypted entry, or (NotImplementedError) an unknown compression"""
Read = Callable[[int], bytes]
"""at most so many bytes of one file"""


def files_of(path: Path) -> dict[str, Read]:
    """Name, with /, → content of each file in a folder or a zip. Raises one of BROKEN.

    What Finder and Explorer leave among them (`__MACOSX`, `._name`, `.DS_Store`, `Thumbs.db`) is passed over, as is
    whatever else is hidden.
    """
    opened: dict[str, Callable[[], Any]]
    if path.is_dir():
        opened = {p.relative_to(path).as_posix(): partial(p.open, "rb") for p in path.rglob("*") if p.is_file()}
    else:
        archive = zipfile.ZipFile(path)
        entries = [entry for entry in archive.infolist() if not entry.filename.endswith(("/", "\\"))]
        opened = {_plain(entry.filename): partial(archive.open, entry) for entry in entries}
    return {name: partial(_read, opened[name]) for name in opened if visible(name)}


def _read(opened: Callable[[], Any], most: int) -> bytes:
    with opened() as file:
        data: bytes = file.read(most)
    return data


def visible(name: str) -> bool:
    """Whether a file is none of those that are passed over."""
    return not any(part == "__MACOSX" or part.startswith(".") for part in PurePosixPath(name).parts)


class ImageSet:
    """Square RGB images of one size and, if there are any, their classes.

    Args:
        path: zip or folder. `dataset.json` in it is `{"labels": [["00000/img00000000.png", 6], …]}`, or null.
        resolution: what the side of every image must be, in pixels; None for whatever the first one's is.
        classes: how many the model knows; more than 0 makes labels 0 … classes − 1 compulsory.
        fit: bring images of other sizes to `resolution`: their central square, resized by Lanczos' filter.
        in_memory: decode all images at once, and keep them if they are not too many.

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
        if not (path.is_dir() or path.is_file()):
            raise InvalidInput("data", "no such file or folder; expected a zip or a folder of images", path)
        try:
            files = files_of(path)
            self._images = {n: files[n] for n in sorted(files) if PurePosixPath(n).suffix.lower() in SUFFIXES}
            labels = _labels_file(files, self._images)
            content = None if labels is None else files[labels](MOST_LABELS + 1)
        except BROKEN as error:
            what = "cannot be read" if path.is_dir() else "not a whole zip file"
            raise DataError(f"{what} ({shown(first_line(error))})", path) from error
        self.names = list(self._images)
        """of the image files, relative to `path`, in the order of the rows"""
        if not self.names:
            raise DataError(f"holds no images; expected {', '.join(sorted(SUFFIXES))} files", path)
        self.resolution = resolution or self._decode(self.names[0], None).shape[1]
        self.labels = self._labels(content, labels or LABELS_FILE, classes)
        """int64 (N,), or None where there are none"""
        self._memory: Tensor | None = None
        if in_memory and len(self) * 3 * self.resolution**2 <= IN_MEMORY_BYTES:
            self._memory = torch.stack([self._decode(name, self.resolution) for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def images(self, rows: Tensor) -> Tensor:
        """The images at int64 (B,) `rows`: uint8 (B, 3, R, R)."""
        if self._memory is not None:
            return self._memory[rows]
        return torch.stack([self._decode(self.names[i], self.resolution) for i in rows.tolist()])

    def one_hot(self, rows: Tensor, classes: int) -> Tensor:
        """The classes, one-hot, of the images at int64 (B,) `rows`: fp32 (B, classes)."""
        if self.labels is None or not classes:
            return torch.zeros(len(rows), classes)
        return torch.nn.functional.one_hot(self.labels[rows], classes).float()

    def batch(self, size: int, seed: int, step: int) -> Tensor:
        """The rows (size,) of the step's batch: a pure function of (seed, step). Each epoch has its own order."""
        return batch_rows(len(self), size, seed, step)

    def _decode(self, name: str, resolution: int | None) -> Tensor:
        try:
            data = self._images[name](MOST_BYTES + 1)  # one byte more than is taken: then it is refused
        except BROKEN as error:
            raise DataError(f"{shown(name)}: unreadable ({shown(first_line(error))})", self.path) from error
        image = ImageFile.read(data, f"{self.path}: {shown(name)}", Role.TRAINING, FORMATS)
        pixels = np.array(image.decode((resolution, resolution) if self.fit and resolution else None))
        height, width, _ = pixels.shape
        if height != width or resolution not in (None, width):
            side = f"{resolution}x{resolution}" if resolution else "square"
            raise DataError(f"{shown(name)} is {width}x{height} pixels; expected {side}", self.path)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _labels(self, data: bytes | None, file: str, classes: int) -> Tensor | None:
        where = f"{self.path}: {file}"
        try:
            # Bytes: so it is UTF-8 with or without a byte-order mark, UTF-16 or UTF-32.
            content: Any = json.loads(data or b"{}")
        except RecursionError:
            raise DataError('nested too deeply; expected {"labels": [["NAME", CLASS], …]}', where) from None
        except ValueError as error:
            raise DataError(f"not JSON ({shown(error)})", where) from error
        entries = content.get("labels") if isinstance(content, dict) else None
        if entries is None:
            if classes:
                what = "missing" if data is None else "holds no labels"
                raise DataError(f"{what}; a model of {classes} classes needs the class of every image", where)
            return None
        try:
            by_name = {_plain(str(name)): label for name, label in entries}
        except (TypeError, ValueError):
            raise DataError('labels: expected [["NAME", CLASS], …]', where) from None
        root = PurePosixPath(file).parent
        labels = []
        for name in self.names:
            inner = PurePosixPath(name)
            key = inner.relative_to(root).as_posix() if inner.is_relative_to(root) else name
            if key not in by_name:
                raise DataError(f"no label for {shown(key)}", where)
            label, most = by_name[key], classes or MOST_CLASSES
            whole = isinstance(label, int | float) and not isinstance(label, bool) and label == label // 1
            if not whole or not 0 <= label < most:
                said = shown(json.dumps(label), 50)
                raise DataError(f"{shown(key)} is of class {said}; expected a whole number, 0 to {most - 1}", where)
            labels.append(int(label))
        return torch.tensor(labels)


def _plain(name: str) -> str:
    """A name as zips and label files should spell it: some programs of Windows write back slashes."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def _labels_file(files: Iterable[str], images: Iterable[str]) -> str | None:
    """Where the labels are. They may lie in a folder that holds everything; the names in them begin there."""
    found = [name for name in files if PurePosixPath(name).name == LABELS_FILE]
    nearest = min(found, key=lambda name: (name.count("/"), name), default=None)
    if nearest and all(PurePosixPath(name).is_relative_to(PurePosixPath(nearest).parent) for name in images):
        return nearest
    return None  # there are none, or those of a part
