"""Files on their way to a client: unique names in a folder of this process, deleted within a minute."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
from pathlib import Path

PREFIX = "dmd2-outbox-"


class Outbox:
    """A temporary folder whose files live for `keep_seconds`, at most `tick_seconds` longer.

    Cog reads an output file after the predictor has handed over its path, and never deletes it.
    """

    def __init__(self, keep_seconds: float = 40.0, tick_seconds: float = 5.0, root: Path | None = None) -> None:
        root = root or Path(tempfile.gettempdir())
        _sweep_dead_processes(root)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root))
        self._keep, self._tick = keep_seconds, tick_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sweep, name="outbox", daemon=True)
        self._thread.start()

    def write(self, data: bytes, suffix: str) -> Path:
        """A new file with `data`, whose name nobody else ever gets. `suffix` is without the dot."""
        path = self.folder / f"{uuid.uuid4().hex}.{suffix}"
        path.write_bytes(data)
        return path

    def close(self) -> None:
        """Deletes everything."""
        self._closed.set()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self) -> None:
        while not self._closed.wait(self._tick):
            oldest = time.time() - self._keep
            for path in self.folder.iterdir():
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _sweep_dead_processes(root: Path) -> None:
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
