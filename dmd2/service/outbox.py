"""Files on their way to a client: unique names in a folder of this process, deleted within a minute.

Only what an `Outbox` itself made is ever deleted: files whose names it remembers, in a folder that it made, through a
descriptor of that folder. Whatever else lies there or beside it, whoever's it is and whatever it is called, stays. So
does what a killed process left: `dmd2 cog` clears it away with the server's whole temporary folder, which it made
itself (supervisor.py); elsewhere it is left to whoever cleans the system's temporary files.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

PREFIX = "dmd2-outbox-"
COG_FOLDERS = Path("/tmp/coglet/predictions")
"""where Cog 0.23 makes a folder for each prediction, and leaves it"""
COG_INNER = {"inputs", "outputs"}
"""folders in each of these"""
COG_SECONDS = 600.0  # no prediction takes so long
TRIES = 3  # of a folder that is lost again and again

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

logger = logging.getLogger(__name__)


class _Folder:
    """A new folder, mode 0700, in `root`, held open. Raises OSError."""

    def __init__(self, root: Path) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        except FileNotFoundError:  # a cleaner of temporary files took `root`, too
            root.mkdir(0o700)
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        self.descriptor = os.open(self.path, _FOLDER)
        self.due: dict[str, float] = {}
        """when to delete its files: names and clock"""

    def is_there(self) -> bool:
        """Whether its path still leads to it."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self.descriptor))
        except OSError:
            return False

    def delete(self, name: str) -> None:
        """Deletes a file that `due` names, wherever the folder has been moved to."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass  # somebody was faster: that is what was wanted
        except OSError as error:
            logger.warning("outbox: %s/%s stays: %s", self.path, name, error.strerror)
        del self.due[name]

    def close(self) -> None:
        """Deletes it, if it holds nothing that others put there."""
        if self.is_there():
            try:
                self.path.rmdir()
            except OSError as error:
                logger.warning("outbox: %s stays: %s", self.path, error.strerror)
        os.close(self.descriptor)


class Outbox:
    """A temporary folder whose files live for `keep_seconds`, at most `tick_seconds` longer.

    Cog reads an output file after the predictor has handed over its path, and never deletes it. Nor does it delete
    the empty folders that it makes for each prediction: those in `cog_folders` go after ten minutes.

    A folder that was lost (a cleaner of temporary files took it) is followed by another.

    Args:
        root: where to make the folder; None for the system's temporary folder.
        clock: seconds; for tests.

    Raises:
        OSError: no folder could be made.
    """

    def __init__(
        self,
        keep_seconds: float = 40.0,
        tick_seconds: float = 5.0,
        root: Path | None = None,
        cog_folders: Path = COG_FOLDERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root or Path(tempfile.gettempdir())
        self._keep, self._tick, self._cog_folders, self._clock = keep_seconds, tick_seconds, cog_folders, clock
        self._lock = threading.Lock()  # of the folders and their `due`
        self._folders = [_Folder(self._root)]  # the last one is written to; the others are lost, and hold files yet
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Path:
        """The one of now."""
        return self._folders[-1].path

    def write(self, data: bytes, name: str, suffix: str) -> Path:
        """A new file with `data`, whose name begins with `name` and nobody else ever gets. `suffix` has no dot.

        Raises:
            OSError: it could not be written. A client may see the message: it names no path; the log does.
        """
        file = f"{name}-{uuid.uuid4().hex}.{suffix}"
        try:
            for _ in range(TRIES):
                folder = self._take(file)
                try:
                    _write_new(file, data, folder.descriptor)
                except FileNotFoundError:
                    self._release(folder, file, -math.inf)  # the folder was removed in between
                    continue
                except BaseException:
                    self._release(folder, file, -math.inf)
                    raise
                there = folder.is_there()
                self._release(folder, file, self._clock() + self._keep if there else -math.inf)
                if there:
                    return folder.path / file
            raise FileNotFoundError(None, "its folder is removed again and again")
        except OSError as error:
            logger.error("outbox in %s: %s", self._root, error)
            raise OSError(f"the server could not store the image ({error.strerror})") from None

    def close(self) -> None:
        """Deletes everything that was written."""
        self._closed.set()
        self._thread.join()
        with self._lock:
            for folder in self._folders:
                for name in list(folder.due):
                    folder.delete(name)
                folder.close()
            self._folders = []

    def _take(self, file: str) -> _Folder:
        """The folder to write `file` to, which is remembered there; another one, if it was lost."""
        with self._lock:
            if self._closed.is_set():
                raise OSError(None, "it is shutting down")
            if not self._folders[-1].is_there():
                logger.warning("outbox: %s was removed; making another", self._folders[-1].path)
                self._folders.append(_Folder(self._root))
            folder = self._folders[-1]
            folder.due[file] = math.inf  # while it is written
            return folder

    def _release(self, folder: _Folder, file: str, due: float) -> None:
        with self._lock:
            if file in folder.due:  # else the outbox has been closed meanwhile
                folder.due[file] = due

    def _run(self) -> None:
        cog_due = time.monotonic()
        cogs: Iterator[bool] | None = None
        while not self._closed.wait(self._tick):
            try:
                self._delete_old()
                if cogs is None and time.monotonic() >= cog_due:
                    cogs, cog_due = _remove_cogs(self._cog_folders), time.monotonic() + self._keep
                until = time.monotonic() + self._tick / 2  # there may be thousands, and images must not wait for them
                while cogs is not None and time.monotonic() < until and not self._closed.is_set():
                    if not next(cogs, False):
                        cogs = None
            except Exception:  # whatever it is: the next files are to be deleted all the same
                logger.exception("outbox: sweeping")
                cogs = None

    def _delete_old(self) -> None:
        with self._lock:
            now = self._clock()
            for folder in list(self._folders):
                for name in [name for name, due in folder.due.items() if due < now]:
                    folder.delete(name)
                if not folder.due and folder is not self._folders[-1]:
                    self._folders.remove(folder)
                    folder.close()


def _write_new(name: str, data: bytes, folder: int) -> None:
    with os.fdopen(os.open(name, _NEW, 0o600, dir_fd=folder), "wb") as stream:
        stream.write(data)


def _remove_cogs(root: Path) -> Iterator[bool]:
    """Removes Cog's old and empty folders in `root`, one a step (true). Follows no links, touches no file."""
    with contextlib.ExitStack() as stack:
        try:
            outer = _open(stack, root.parent)
            parent = _open(stack, root.name, outer)
        except OSError:
            return  # there is none, it is a link, or somebody else's
        for name in _names(parent):
            yield True
            with contextlib.suppress(OSError), contextlib.ExitStack() as inner:  # not empty, so in use; or just gone
                folder = _open(inner, name, parent)
                found = _names(folder)
                if os.fstat(folder).st_mtime >= time.time() - COG_SECONDS or not COG_INNER.issuperset(found):
                    continue
                if not any(_names(_open(inner, each, folder)) for each in found):
                    for each in found:
                        os.rmdir(each, dir_fd=folder)
                    os.rmdir(name, dir_fd=parent)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _open(stack: contextlib.ExitStack, path: Path | str, folder: int | None = None) -> int:
    """A descriptor of this user's own folder, closed by `stack`. Raises OSError if it is a link or another's."""
    descriptor = os.open(path, _FOLDER, dir_fd=folder)
    stack.callback(os.close, descriptor)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise PermissionError(f"{path}: not this user's own")
    return descriptor
