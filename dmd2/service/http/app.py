"""The application: every route, behind the guard."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from dmd2 import __version__
from dmd2.service.http import a1111, live, openai
from dmd2.service.http.guard import OPEN, Guard, Rules
from dmd2.service.http.metrics import Metrics
from dmd2.service.http.models import Models
from dmd2.service.http.openai import Kept
from dmd2.service.http.refusal import Refusal, answer

PAGE = Path(__file__).parent / "page"

logger = logging.getLogger(__name__)


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Warm(BaseModel):
    """Of one model."""

    loaded: bool
    warm: bool
    """no later request is the first of its kind"""
    compiled: bool
    """whether networks are compiled or captured at all: on a GPU where all of them fit, unless DMD2_COMPILE is off"""
    compile_failures: int
    """shapes that run uncompiled because the compiler failed"""


class Ready(BaseModel):
    """Whether requests should come here."""

    status: Literal["ready", "loading", "stopping", "device_lost"]
    models: dict[str, Warm]


class Application(FastAPI):
    """FastAPI, whose document says what is answered here: a wrong request is a 400, and a key is a bearer."""

    keys = False
    """whether one is needed"""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            security: list[dict[str, list[str]]] = [{"key": []}] if self.keys else [{"key": []}, {}]
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    operation["security"] = [] if path.startswith(OPEN) else security
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            self.openapi_schema = document
        return self.openapi_schema


def create_app(
    loaders: Mapping[str, Callable[[], Any]],
    rules: Rules | None = None,
    *,
    waiting: int = 64,
    kept: Kept | None = None,
    public_url: str | None = None,
    page: Path = PAGE,
    failed: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """The application; `app.state.models` are its models, which are loaded once it is started.

    Args:
        loaders: name of a model → what loads its `ImageService`.
        waiting: requests in the queue of each model.
        public_url: what URLs of images begin with, where a proxy stands before this; None: as the request came.
        page: folder of static files for `/`.
        failed: is told what a loader raised.
    """
    rules, metrics, kept = rules or Rules(), Metrics(), kept or Kept()
    models = Models(loaders, waiting, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(models.load())

        def loaded(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and failed is not None:
                failed(error)

        loading.add_done_callback(loaded)
        yield
        models.drain()
        await asyncio.wait({loading})
        await models.close()

    app = Application(title="dmd2", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.keys = bool(rules.keys)
    app.state.models, app.state.metrics = models, metrics

    def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: openai.ERRORS[status] for status in (403, 421, *statuses)}

    @app.get("/healthz", responses=refused(503))
    async def healthz() -> Alive:
        if not models.alive:
            raise Refusal(503, "device_lost", "the device is gone: the server must be restarted", retry_after=30)
        return Alive()

    @app.get("/readyz", responses={**refused(), 503: {"model": Ready, "description": "Not now."}})
    async def readyz(response: Response) -> Ready:
        response.status_code = 200 if models.ready else 503
        waits: Literal["loading", "stopping"] = "stopping" if models.draining else "loading"
        return Ready(
            status="ready" if models.ready else waits if models.alive else "device_lost",
            models={name: Warm(**warm) for name, warm in models.warm().items()},
        )

    @app.get(
        "/metrics", responses={200: {"content": {"text/plain": {}}}, **refused(401, 503)}, response_class=Response
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.head("/files/{name}", include_in_schema=False)
    @app.get(
        "/files/{name}",
        name="kept",
        responses={200: {"content": {"image/*": {}}}, **refused(404, 503)},
        response_class=Response,
    )
    async def file(name: str) -> Response:
        found = kept.get(name)
        if found is None:
            raise Refusal(404, "not_found", f"no such file, or it is older than {kept.seconds:.0f} s")
        return Response(found[0], media_type=found[1])

    app.include_router(openai.router(models, kept, public_url))
    app.include_router(a1111.router(models))
    app.include_router(live.router(models))
    pages = frozenset[str]()
    if (page / "index.html").is_file():
        pages = frozenset({"/", *(f"/{path.relative_to(page).as_posix()}" for path in page.rglob("*"))})
        # Not mounted at "/", which would say of every other path that only its method is wrong.
        static = StaticFiles(directory=page, html=True)
        app.router.routes.extend(Route(path, static, include_in_schema=False) for path in sorted(pages))
    for kind in (RequestValidationError, HTTPException):  # the guard answers to any other
        app.add_exception_handler(kind, answer)
    app.add_middleware(Guard, rules=rules, metrics=metrics, pages=pages)
    if rules.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(rules.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client has a dozen of its own; no cookie is of any use here
            expose_headers=["Retry-After", "Server-Timing", "X-Queue-Position", "X-Request-Id", "X-Should-Retry"],
        )
    return app
