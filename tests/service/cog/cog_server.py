"""The real Cog server on the loopback (and a CPU), for black-box tests, and a receiver of webhooks and uploads."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
START = 600.0
"""Seconds after which a server is no longer waited for. A good machine needs 8, a slow and busy one minutes."""

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found | None], what: str, seconds: float = 300.0) -> Found:
    """The first result of `condition` that is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.05)
    return found


class CogServer:
    """A server in processes of its own, started as the README says; its log and its temporary files are in `folder`.

    Args:
        options: for Cog's server. `dmd2 cog` takes none of them: with any, scripts/entrypoint is called instead.
        variables: of the server's environment, beside this process's own.
    """

    def __init__(self, folder: Path, options: tuple[str, ...] = (), **variables: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.temporary, self._log = folder / "temporary", folder / "log"
        self.temporary.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DMD2_", "COG_"))}
        own = {"TMPDIR": str(self.temporary), "PORT": str(self.port), "CUDA_VISIBLE_DEVICES": ""}
        command = [str(Path(sys.executable).with_name("dmd2")), "cog", "--port", str(self.port)]
        if options:
            command = [str(ROOT / "scripts" / "entrypoint"), "--host", "127.0.0.1", *options]
        environment = kept | own | variables
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def status(self) -> str | None:
        """What `/health-check` says; None if nobody answers."""
        try:
            return str(self.client.get("/health-check").json()["status"])
        except httpx.TransportError:
            return None

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            return self.status == "READY"

        wait_for(ready, f"READY of\n{self.log}", START)

    def worker(self) -> int | None:
        """Process id of the one that draws."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "_run_worker" in " ".join(process.cmdline()):
                    return process.pid
            except psutil.NoSuchProcess:
                continue  # it has just ended
        return None

    def outbox(self) -> list[Path]:
        """Image files that are there now."""
        return [path for folder in self.temporary.rglob("dmd2-outbox-*") for path in folder.iterdir()]

    def post(self, headers: dict[str, str] | None = None, **inputs: Any) -> httpx.Response:
        return self.client.post("/predictions", json={"input": inputs}, headers=headers)

    def put(self, name: str, headers: dict[str, str] | None = None, **inputs: Any) -> httpx.Response:
        return self.client.put(f"/predictions/{name}", json={"input": inputs}, headers=headers)

    def generate(self, **inputs: Any) -> Answer:
        """A request that must succeed."""
        return Answer.of(self.post(**inputs))

    def close(self) -> None:
        """Lets the processes end, then kills what is left of them."""
        self.client.close()
        family = [*children(self.process.pid), self.process.pid]
        for _ in range(2):  # a second signal interrupts predictions
            self.process.terminate()
            time.sleep(0.1)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            for pid in family:
                if psutil.pid_exists(pid):
                    psutil.Process(pid).kill()
            self.process.wait(60)


def children(pid: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).children(recursive=True)] if psutil.pid_exists(pid) else []


@dataclass(frozen=True)
class Answer:
    """A prediction that succeeded."""

    images: tuple[bytes, ...]
    metrics: dict[str, Any]
    logs: str
    id: str

    @classmethod
    def of(cls, response: httpx.Response) -> Answer:
        assert response.status_code == 200, response.text
        return cls.parse(response.json())

    @classmethod
    def parse(cls, prediction: dict[str, Any]) -> Answer:
        assert prediction["status"] == "succeeded", prediction
        images = tuple(unpacked(url) for url in prediction["output"])
        return cls(images, prediction["metrics"], prediction["logs"], prediction["id"])


def unpacked(url: str) -> bytes:
    """The content of a data URL."""
    head, _, data = url.partition(",")
    assert head.startswith("data:image/") and head.endswith(";base64"), head
    return base64.b64decode(data, validate=True)


def pixels(image: bytes) -> numpy.ndarray:
    """int16 (H, W, 3) of an image file."""
    return numpy.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(numpy.int16)


def difference(first: bytes | numpy.ndarray, second: bytes | numpy.ndarray) -> int:
    """The largest of all differences between the pixels of two images."""
    a, b = (pixels(image) if isinstance(image, bytes) else image for image in (first, second))
    assert a.shape == b.shape
    return int(numpy.abs(a - b).max())


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each server-sent event."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """An HTTP server that keeps the requests it gets. To PUT it answers `put_status`, to POST 200."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.put_status = 200
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self._keep(200)

            def do_PUT(self) -> None:
                self._keep(receiver.put_status)

            def _keep(self, status: int) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.requests.append(Received(self.command, self.path, headers, body))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
