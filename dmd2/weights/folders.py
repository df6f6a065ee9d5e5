"""Writes folders atomically: they appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a new, empty folder; when the block ends well, it takes the place of `folder`, whatever is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        yield new
        swap(new, folder, Path(temporary) / "old")


def swap(new: Path, folder: Path, old: Path) -> None:
    """`folder` becomes `new`; if that fails, it is what it was. Its old content ends up at `new` or `old`."""
    if not folder.exists():
        new.rename(folder)
        return
    if _exchange(new, folder):
        return
    # Killed between these two, the process leaves the old weights at `old` and nothing at `folder`.
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Two names swap what they stand for, in one step of the kernel. False where that cannot be (all but Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28 and newer
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    if renameat2 is None:
        return False
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
