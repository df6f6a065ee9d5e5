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

from dmd2.runtime.errors import UserError
from dmd2.runtime.terminal import say

LOCK = ".lock"

STALE_FOLDER = re.compile(r"\.(model|fake_score)\.[a-z0-9_]{8}")  # by tempfile: an export that was cut short


@contextmanager
def locked(folder: Path, named: str, stale: re.Pattern[str]) -> Iterator[None]:
    """Locks `folder`, made if need be, for this process; removes the files called `stale`, which killed ones left.

    Args:
        named: what to call it in messages.

    Raises:
        UserError: another process is at work there; nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{named}: cannot be written to ({error.strerror})") from error
    try:
        _lock(descriptor, named)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            _tidy(folder, stale)
        except OSError as error:
            raise UserError(f"{named}: cannot be written to ({error.strerror})") from error
        yield
    finally:
        os.close(descriptor)  # and the lock with it, as it would be with the process


def _lock(descriptor: int, named: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        who = f"process {owner}" if owner.isdigit() else "another process"
        raise UserError(f"{named}: {who} is at work there; wait for it, or name another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise UserError(f"{named}: cannot be locked ({error.strerror})") from error
        say(f"{named}: this file system knows no locks; start no second process there")


def _tidy(folder: Path, stale: re.Pattern[str]) -> None:
    """Removes what only a killed process can have left: the lock says that there is none now."""
    for place in (folder, folder / "samples"):
        for path in place.iterdir() if place.is_dir() else ():
            if stale.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()
            elif STALE_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
