"""`dmd2 serve`: the application on a socket, from start to drained end."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from dmd2.models.locate import locate
from dmd2.runtime.errors import BriefFormatter, InvalidInput, UserError, one_line
from dmd2.service.cog.front import Connection
from dmd2.service.cog.supervisor import listen
from dmd2.service.http.app import create_app
from dmd2.service.http.guard import LOOPBACK, Rules
from dmd2.service.http.models import Models
from dmd2.service.http.openai import Kept

DRAIN = 300
"""seconds that requests under way have after SIGTERM"""
CONNECTIONS = 4000
"""at one time, those between two requests among them; one more is a 503 of uvicorn's. The guard refuses before"""
KEEP_ALIVE = 75
"""seconds between two requests of a connection; more than the 60 s after which many proxies close theirs"""
MESSAGE = 1 << 16
"""bytes of a websocket's message"""

logger = logging.getLogger(__name__)


class KeptAlive(Connection):
    """Waits longer for another request than for the first; a websocket, which nobody else need watch, for ever."""

    def patience(self) -> float:
        return super().patience() if self.cycle is None else KEEP_ALIVE

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._timer.cancel()
        super().handle_websocket_upgrade(event)


class Server(uvicorn.Server):
    """Lets nobody in any more once a signal has come, and ends once a device is gone."""

    models: Models
    lost = False
    """a device is gone, while nobody had asked for an end"""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.models.drain()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if not self.lost and not self.should_exit and not self.models.alive:
            self.lost = True
            logger.critical("the device is gone: ends, so that whatever supervises it starts it anew")
        return await super().on_tick(counter) or self.lost


def named(weights: Sequence[Path]) -> dict[str, Path]:
    """Folders, or tars of them, by their names; none given: the usual one.

    Raises:
        UserError: two have one name.
    """
    found: dict[str, Path] = {}
    for folder in weights or [locate(None, os.environ)]:
        name = folder.resolve().name.partition(".tar")[0]
        if name in found:
            raise InvalidInput("weights", f"two folders are called {name}; expected names that differ")
        found[name] = folder
    return found


def loaders(weights: Sequence[Path], device: str = "auto") -> dict[str, Callable[[], Any]]:
    """As `named`: what loads each of these weights, for one device, see `dmd2.inference.engine.Engine`."""
    turn = threading.Lock()  # the models share it

    def load(folder: Path) -> object:
        from dmd2.service.images import ImageService  # torch: /healthz answers while it is imported

        return ImageService(folder, device, files=False, turn=turn)

    return {name: partial(load, folder) for name, folder in named(weights).items()}


def serve(
    weights: Sequence[Path],
    host: str,
    port: int,
    rules: Rules,
    *,
    device: str = "auto",
    waiting: int = 64,
    keep_seconds: float = 3600.0,
    public_url: str | None = None,
) -> int:
    """Serves until a signal comes; the exit status: 0, or 1 if a device is gone, where starting anew helps.

    Args:
        waiting, public_url: see `create_app`.
        keep_seconds: for which images that are answered as URLs are kept.

    Raises:
        UserError: it cannot listen there, or weights cannot be loaded.
    """
    log()
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(
        loaders(weights, device),
        rules,
        waiting=waiting,
        kept=Kept(keep_seconds),
        public_url=public_url,
        failed=failed,
    )
    allow_files(CONNECTIONS + 1000)
    listener = listen(host, port)
    config = uvicorn.Config(
        app,
        http=KeptAlive,
        ws="websockets-sansio",
        ws_max_size=MESSAGE,
        ws_max_queue=4,
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=DRAIN,
    )
    server = Server(config)
    server.models = app.state.models
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them anew once it has ended
        signal.signal(number, lambda *_: None)
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, listener.getsockname()[1])
    server.run(sockets=[listener])
    if failures:
        error = failures[0]
        if isinstance(error, UserError):
            raise error
        raise UserError(f"the weights cannot be loaded: {type(error).__name__}: {one_line(error)}")
    return int(server.lost)


def allow_files(number: int) -> None:
    """This process may have `number` files and connections open, or as many as the system lets it ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return host in LOOPBACK


def log() -> None:
    """Everything to stderr, the access log as bare JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(BriefFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx2", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    access, plain = logging.getLogger("dmd2.access"), logging.StreamHandler(sys.stdout)
    plain.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(plain)
    access.propagate = False
