"""Images with captions: a folder, a zip, or the tars of a WebDataset."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.data.images import BROKEN, FORMATS, SUFFIXES, Read, files_of, visible
from dmd2.data.prompts import COLUMNS, MOST_CHARACTERS
from dmd2.inference.image_input import MOST_BYTES, ImageFile, Role
from dmd2.runtime.errors import DataError, InvalidInput, first_line, shown
from dmd2.runtime.files import text_of

METADATA = "metadata.jsonl"
MOST_METADATA = 2 * 10**9
"""bytes of `metadata.jsonl`, at most"""
_BROKEN = (*BROKEN, tarfile.TarError)


@dataclass(frozen=True)
class _Item:
    name: str
    image: Read
    caption: Read | str


class CaptionedImages:
    """Images, in the order of their names, each with a caption.

    The caption of `a/b.jpg` is the text in `a/b.txt`, or in `a/b.json` under "prompt", "caption" or "text"; or
    `metadata.jsonl` beside or above the images has lines `{"file_name": "a/b.jpg", "text": …}`.

    Args:
        path: folder, zip, tar, or folder of tars (a WebDataset, not compressed).

    Raises:
        UserError: it cannot be read, holds no images, or one of them has no caption.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            groups = _open(path)
        except _BROKEN as error:
            raise DataError(f"cannot be read ({shown(first_line(error))})", path) from error
        self._items = [item for files in groups for item in self._pairs(files)]
        if not self._items:
            raise DataError(f"holds no images; expected {', '.join(sorted(SUFFIXES))} files", path)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def sha256(self) -> str:
        """Of the images' names, in order: what tells one set from another at once."""
        return hashlib.sha256(json.dumps([item.name for item in self._items]).encode()).hexdigest()

    def captions(self, rows: Iterable[int]) -> list[str]:
        return [self._caption(self._items[i]) for i in rows]

    def images(self, rows: Iterable[int], size: tuple[int, int]) -> Tensor:
        """uint8 (B, 3, H, W): scaled to cover `size` (width, height), what juts out cut off evenly."""
        return torch.stack([self._image(self._items[i], size) for i in rows])

    def _pairs(self, files: dict[str, Read]) -> list[_Item]:
        listed = self._listed(files)
        found = []
        for name in sorted(files):
            if PurePosixPath(name).suffix.lower() in SUFFIXES:
                stem = name[: -len(PurePosixPath(name).suffix)]
                beside = next((files[f"{stem}{end}"] for end in (".txt", ".json") if f"{stem}{end}" in files), None)
                caption = beside or listed.get(name)
                if caption is None:
                    told = f"{shown(name)} has no caption; expected {shown(stem)}.txt, .json or {METADATA}"
                    raise DataError(told, self.path)
                found.append(_Item(name, files[name], caption))
        return found

    def _listed(self, files: dict[str, Read]) -> dict[str, str]:
        """Names of images → captions, by every `metadata.jsonl`."""
        captions = {}
        for name in files:
            if PurePosixPath(name).name == METADATA:
                root = name[: -len(METADATA)]
                for number, line in enumerate(self._text(name, files[name], MOST_METADATA).split("\n"), 1):
                    if line.strip():
                        entry = self._json(f"{name}: line {number}", line)
                        captions[f"{root}{entry.get('file_name')}"] = self._of(entry, f"{name}: line {number}")
        return captions

    def _caption(self, item: _Item) -> str:
        if isinstance(item.caption, str):
            return item.caption
        text = self._text(item.name, item.caption, 4 * MOST_CHARACTERS).strip()
        if text.startswith("{"):
            return self._of(self._json(item.name, text), item.name)
        return self._bounded(text, item.name)

    def _of(self, entry: dict[str, Any], where: str) -> str:
        text = next((entry[column] for column in COLUMNS if column in entry), None)
        if not isinstance(text, str):
            raise DataError(f"{shown(where)}: no caption; expected a text as {', '.join(COLUMNS)}", self.path)
        return self._bounded(text.strip(), where)

    def _bounded(self, text: str, where: str) -> str:
        if len(text) > MOST_CHARACTERS:
            told = f"a caption of {len(text)} characters; expected {MOST_CHARACTERS} at most"
            raise DataError(f"{shown(where)}: {told}", self.path)
        return text

    def _json(self, where: str, text: str) -> dict[str, Any]:
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{shown(where)}: no JSON ({shown(str(error))})", self.path) from None
        if not isinstance(entry, dict):
            raise DataError(f"{shown(where)}: of type {type(entry).__name__}; expected an object", self.path)
        return entry

    def _text(self, name: str, read: Read, most: int) -> str:
        return text_of(self._bytes(name, read, most), self.path / shown(name))

    def _bytes(self, name: str, read: Read, most: int) -> bytes:
        try:
            data = read(most + 1)
        except _BROKEN as error:
            told = f"unreadable ({shown(first_line(error))})"
            raise DataError(f"{shown(name)}: {told}", self.path) from error
        if len(data) > most:
            raise DataError(f"{shown(name)}: larger than {most // 1000} kB; expected a smaller file", self.path)
        return data

    def _image(self, item: _Item, size: tuple[int, int]) -> Tensor:
        data = self._bytes(item.name, item.image, MOST_BYTES)
        image = ImageFile.read(data, f"{self.path}: {shown(item.name)}", Role.TRAINING, FORMATS)
        return torch.from_numpy(np.array(image.decode(size))).permute(2, 0, 1).contiguous()


def _open(path: Path) -> list[dict[str, Read]]:
    """Name → content of each archive, or of the one folder."""
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        return [_tar(tar, f"{tar.name}/") for tar in tars] if tars else [files_of(path)]
    if not path.is_file():
        raise InvalidInput("images", "no such file or folder; expected a folder, a zip or a WebDataset's tar", path)
    return [_tar(path, "") if path.suffix.lower() == ".tar" else files_of(path)]


def _tar(path: Path, prefix: str) -> dict[str, Read]:
    """A WebDataset's: a sample's key is its files' name up to the first dot after the last slash."""

    def reader(offset: int, size: int) -> Read:
        def read(most: int) -> bytes:
            with path.open("rb") as opened:  # each time: a set may be of thousands of tars
                opened.seek(offset)
                return opened.read(min(most, size))

        return read

    with tarfile.open(path, "r:") as archive:
        members = {member.name.removeprefix("./"): member for member in archive}
    return {
        f"{prefix}{name}": reader(member.offset_data, member.size)
        for name, member in members.items()
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and visible(name)
    }
