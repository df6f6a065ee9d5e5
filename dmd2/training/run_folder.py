"""The folder of a run: one process at a time, checked before the first step, without what killed ones left."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmd2.errors import UserError
from dmd2.terminal import say
from dmd2.training.checkpoints import Checkpoints

LOCK = ".lock"
EXPORTS = ("model", "fake_score", "classifier.safetensors")
"""what `Method.export` may write"""
STALE = re.compile(
    r"\.(checkpoint\.pt|recipe\.json|log\.jsonl|classifier\.safetensors|\d{7,}\.png)\.[0-9a-f]{8}\.tmp"
)
STALE_FOLDER = re.compile(r"\.(model|fake_score)\.[a-z0-9_]{8}")  # by tempfile: an export that was cut short


def check_out(out: Path, resume: bool) -> None:
    """What can be known of `out` before anything is loaded.

    Raises:
        UserError: there is nothing to resume; there is something, and `resume` is off; or it is no place for a run.
    """
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {out}: {folder} is a file; expected a folder")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {nearest} cannot be written to")
    there = Checkpoints(out).exist()
    if resume and not there:
        raise UserError(f"--out {out}: holds no checkpoint to --resume from; without --resume, a run begins there")
    if there and not resume:
        raise UserError(f"--out {out}: holds a run already; add --resume to continue it, or name another folder")
    for path in (out / name for name in EXPORTS):
        if path.exists() and path.is_dir() == bool(path.suffix):
            raise UserError(f"{path}: in the way of what the run is going to write there; move it")
        if not resume and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
            raise UserError(f"--out {out}: holds {path.name} already, of no run that is there; name another folder")


@contextmanager
def open_run(out: Path, resume: bool) -> Iterator[None]:
    """`out`, made if need be, checked, locked against other trainers, and freed of what killed ones left half done.

    Raises:
        UserError: see `check_out` and `locked`.
    """
    check_out(out, resume)
    with locked(out, f"--out {out}", STALE):
        check_out(out, resume)  # another trainer may have written there until now
        yield


@contextmanager
def locked(folder: Path, named: str, stale: re.Pattern[str]) -> Iterator[None]:
    """`folder`, made if need be, for this process alone; without the files called `stale`, which killed ones left.

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
