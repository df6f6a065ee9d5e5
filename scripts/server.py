"""The service with the embedded model in processes of its own: for bench-server and -doors, soak-server, load-api."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from environment import ROOT

from dmd2.service.cog.supervisor import free_port

PATIENCE = 600.0  # seconds until it is ready, at most


class Server:
    """`dmd2 cog`. Listens at `url`. Its temporary files are in `folder`/temporary."""

    words: tuple[str, ...] = ("cog",)

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        port = free_port("127.0.0.1")
        self.url, self.temporary, self._log = f"http://127.0.0.1:{port}", folder / "temporary", folder / "log"
        self.temporary.mkdir(exist_ok=True)
        with self._log.open("wb") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "dmd2.cli", *self.words, "--port", str(port), *options],
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(self.temporary)} | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health-check", timeout=60).json()["status"] in ("READY", "BUSY")
        except (httpx.TransportError, ValueError, KeyError):
            return False

    def wait_until_ready(self, without: int | None = None) -> None:
        """Also until the worker is another process than `without`."""
        began = time.monotonic()
        while not (self.ready() and (without is None or self.worker() not in (None, without))):
            if self.process.poll() is not None or time.monotonic() - began > PATIENCE:
                text = self._log.read_text(errors="replace")
                sys.exit(f"{Path(sys.argv[0]).name}: the service is not ready:\n{text[-5000:]}")
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def worker(self) -> int | None:
        """The process that owns the device."""
        for process in self.family():
            try:
                if "_run_worker" in " ".join(process.cmdline()):
                    return int(process.pid)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return None

    def state(self) -> dict[str, int]:
        """Memory, open files and threads of all its processes."""
        found = {"resident_mb": 0.0, "descriptors": 0, "threads": 0}
        for process in self.family():
            try:
                found["resident_mb"] += process.memory_info().rss / 1e6
                found["descriptors"] += process.num_fds()
                found["threads"] += process.num_threads()
            except psutil.NoSuchProcess:
                continue
        return {name: round(value) for name, value in found.items()}

    def files(self) -> list[Path]:
        """Its temporary files."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]


class ApiServer(Server):
    """`dmd2 serve`."""

    words = ("serve",)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=60).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def running(folder: Path, kind: type[Server] = Server, **environment: str) -> Iterator[Server]:
    """A server that is ready, until the end of the block."""
    server = kind(folder, **environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
