"""Files on their way to a client: unique names in a folder of this process, deleted within a minute."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

PREFIX = "dmd2-outbox-"
COG_FOLDERS = Path("/tmp/coglet/predictions")
"""where Cog 0.23 makes three folders for each prediction, and leaves them"""
COG_SECONDS = 600.0  # no prediction takes so long


class Outbox:
    """A temporary folder whose files live for `keep_seconds`, at most `tick_seconds` longer.

    Cog reads an output file after the predictor has handed over its path, and never deletes it. Nor does it delete
    the empty folders that it makes for each prediction: those in `cog_folders` go after ten minutes.
    """

    def __init__(
        self,
        keep_seconds: float = 40.0,
        tick_seconds: float = 5.0,
        root: Path | None = None,
        cog_folders: Path = COG_FOLDERS,
    ) -> None:
        self._root = root or Path(tempfile.gettempdir())
        self._keep, self._tick, self._cog_folders = keep_seconds, tick_seconds, cog_folders
        _remove_folders_of_dead_processes(self._root)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=self._root))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sweep, name="outbox", daemon=True)
        self._thread.start()

    def write(self, data: bytes, name: str, suffix: str) -> Path:
        """A new file with `data`, whose name begins with `name` and nobody else ever gets. `suffix` has no dot."""
        path = self.folder / f"{name}-{uuid.uuid4().hex}.{suffix}"
        path.write_bytes(data)
        return path

    def close(self) -> None:
        """Deletes everything."""
        self._closed.set()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _delete_if_old(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another one was faster, or it is theirs
            if path.stat().st_mtime < time.time() - self._keep:
                path.unlink()

    def _sweep(self) -> None:
        cog_due = time.monotonic()
        left: Iterator[Path] | None = None  # Cog's folders that have not been looked at yet
        while not self._closed.wait(self._tick):
            # Of every outbox: a process that was killed in a container may have had the id of this one.
            for folder in self._root.glob(f"{PREFIX}*"):
                with contextlib.suppress(FileNotFoundError, PermissionError):  # its owner has ended, or it is theirs
                    for path in folder.iterdir():
                        self._delete_if_old(path)
            if left is None and time.monotonic() >= cog_due:
                left, cog_due = self._cog_folders.glob("*"), time.monotonic() + self._keep
            until = time.monotonic() + self._tick / 2  # there may be thousands, and pictures must not wait for them
            while left is not None and time.monotonic() < until and not self._closed.is_set():
                cogs = next(left, None)
                if cogs is None:
                    left = None
                    break
                with contextlib.suppress(OSError):  # not empty, so in use; or it is theirs
                    if cogs.stat().st_mtime < time.time() - COG_SECONDS:
                        for inner in cogs.iterdir():
                            inner.rmdir()
                        cogs.rmdir()


def _remove_folders_of_dead_processes(root: Path) -> None:
    """A killed process leaves its folder behind: the next one clears it away."""
    for folder in root.glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).split("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)  # another user's stays


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
