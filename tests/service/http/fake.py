"""A service without networks, for tests of what stands before it: images at once, or when the test says so."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from dmd2.diffusion.sampling import timesteps_for_strength
from dmd2.inference.request import ImageRequest, resolve_request
from dmd2.runtime.errors import InvalidInput
from dmd2.service.cog.supervisor import listen
from dmd2.service.http.app import create_app
from dmd2.service.http.guard import Rules
from dmd2.service.images import OutputImage
from tests.service.cog.cog_server import wait_for

NATIVE = (64, 64)
PILLOWS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def check_size(size: tuple[int, int]) -> None:
    if any(side % 4 or side < 16 for side in size):
        raise InvalidInput("width, height", f"{size}; expected multiples of 4, at least 16")


class FakeService:
    """Answers as `ImageService` does, with plain colours.

    Args:
        held: images come only once `open` is set.
        error: raised instead of an image.
        withheld: seeds whose images a safety checker would withhold.
    """

    max_batch = 2

    def __init__(
        self,
        steps: tuple[int, ...] = (1, 4),
        held: bool = False,
        error: Callable[[ImageRequest], Exception | None] = lambda _: None,
        withheld: tuple[int, ...] = (),
        classes: tuple[str, ...] = (),
    ) -> None:
        self.asked: list[ImageRequest] = []
        self.cancelled: list[ImageRequest] = []
        self.alive, self.closed = True, False
        self.open = asyncio.Event()
        if not held:
            self.open.set()
        self._error, self._withheld = error, withheld
        manifest = SimpleNamespace(
            students=dict.fromkeys(steps), native_size=NATIVE, class_names=list(classes), name="fake"
        )
        encoder = SimpleNamespace(count_tokens=lambda prompt: len(prompt.split()), token_chunks=lambda prompt: 1)
        model = SimpleNamespace(
            encode_text=encoder,
            codec=SimpleNamespace(factor=4),
            takes_prompts=not classes,
            device=torch.device("cpu"),
            placement=SimpleNamespace(compiler=None),
            size_unit=4,
            check_size=check_size,
        )
        self.engine: Any = SimpleNamespace(
            manifest=manifest,
            model=model,
            sha256=lambda steps: "0" * 64,
        )
        self.loras = SimpleNamespace(folder=Path("/nonexistent"))

    async def generate(self, request: ImageRequest) -> AsyncGenerator[OutputImage, None]:
        self.asked.append(request)
        (size, steps, seed) = resolve_request(request, self.engine)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request)
            raise
        if (error := self._error(request)) is not None:
            raise error
        for each in ((seed + i) % 2**32 for i in range(request.num_outputs)):
            run = (
                steps if request.image is None else len(timesteps_for_strength(range(steps), request.prompt_strength))
            )
            shown = range(1, run) if request.previews else ()
            for step in shown:
                yield OutputImage(None, each, step=step, data=colour(request, each + step, size), size=size)
            data = None if each in self._withheld else colour(request, each, size)
            stages = {"queue": 0.001, "text": 0.001, "denoise": 0.01, "decode": 0.001, "safety": 0.0, "encode": 0.001}
            yield OutputImage(None, each, 1, stages, None, data, size)

    def close(self) -> None:
        self.closed = True


def colour(request: ImageRequest, seed: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", size, (seed % 256, seed // 256 % 256, len(request.prompt) % 256))
    image.save(file, PILLOWS[request.output_format])
    return file.getvalue()


@asynccontextmanager
async def client_of(app: FastAPI, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, whose models are loaded."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app):
        while not app.state.models.ready and not more.pop("unready", False):
            await asyncio.sleep(0.001)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=None, **more
        ) as client:
            yield client


def fake_app(service: FakeService | None = None, rules: Rules | None = None, **more: Any) -> FastAPI:
    service = service or FakeService()
    return create_app({"fake": lambda: service}, rules, **more)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Where the application answers, in a thread."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, loop="asyncio"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started and app.state.models.ready, "the application")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


async def until(true: Callable[[], object]) -> None:
    """Waits for something that other tasks bring about."""
    async with asyncio.timeout(120):
        while not true():
            await asyncio.sleep(0.001)
