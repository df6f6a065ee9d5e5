"""Locks a folder for one process at a time, and removes what killed processes left there."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.terminal import say

LOCK = ".lock"

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""errors of file systems without locks"""

STALE_FOLDER = re.compile(r"\.(model|fake_score)\.[a-z0-9_]{8}|\.\d{7,}(\.old)?\.tmp")
"""an export that was cut short (named by tempfile), a checkpoint that was"""


@contextmanager
def locked(folder: Path, stale: re.Pattern[str]) -> Iterator[None]:
    """Locks `folder`, made if need be, for this process; removes the files called `stale`, which killed ones left.

    Raises:
        InvalidInput: of `out`: another process is at work there; nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InvalidInput("out", f"cannot be written to ({error.strerror})", folder) from error
    try:
        _lock(descriptor, folder)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            _tidy(folder, stale)
        except OSError as error:
            raise InvalidInput("out", f"cannot be written to ({error.strerror})", folder) from error
        yield
    finally:
        os.close(descriptor)  # and the lock with it, as it would be with the process


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        who = f"process {owner}" if owner.isdigit() else "another process"
        raise InvalidInput("out", f"{who} is at work there; wait for it, or name another folder", folder) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise InvalidInput("out", f"cannot be locked ({error.strerror})", folder) from error
        warn_of_no_locks(folder)


def warn_of_no_locks(folder: Path) -> None:
    say(f"{folder}: this file system knows no locks; start no second process there")


def _tidy(folder: Path, stale: re.Pattern[str]) -> None:
    """Removes what only a killed process can have left: the lock says that there is none now."""
    for place in (folder, folder / "samples", folder / "checkpoints"):
        for path in place.iterdir() if place.is_dir() else ():
            if stale.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()
            elif STALE_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
