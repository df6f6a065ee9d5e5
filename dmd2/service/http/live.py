"""`/ws/generate`: a page that generates as one types. The newest request wins; what is stale is never generated.

A client sends texts, each a JSON object:

    {"id": 7, "prompt": "an owl", ...}      a request; `id` is any integer of the client's, fields as in `Live`
    {"cancel": true}                        nothing more is wanted: what waits and what is generated is dropped

and is sent, for each request exactly one of

    {"id": 7, "type": "image", "seed": 5, "width": 64, "height": 64, "model": "emoji", "steps": 1, "seconds": {...}}
        followed by one binary message, the file (webp, unless another `output_format` was asked for)
    {"id": 7, "type": "stale"}              a newer request took its place before it was begun, or it was cancelled
    {"id": 7, "type": "error", "error": {"message": ..., "type": ..., "param": ..., "code": ...}}

and before its image, if `previews` was asked for, for each step but the last

    {"id": 7, "type": "preview", "step": 1, ...}    followed by one binary message

`seconds` are those of each stage. One request of a connection is generated at a time, and finished even if a newer
one has come: somebody who types fast sees images meanwhile. A connection has one place in the model's queue, which a
newer request takes over; a full queue is an error with code `queue_full` and `retry_after` in seconds.

A page of another origin is refused. Where keys are needed, the page gives its own as a subprotocol beside "dmd2":
`new WebSocket(url, ["dmd2", "key64." + KEY])`, in base64url without padding, as not every letter of a key may stand
there. Each request counts for the key's rate.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmd2.inference.request import ImageRequest
from dmd2.runtime.errors import UserError
from dmd2.service.http.models import ClientGone, Models, request_of
from dmd2.service.http.openai import LoraChoice, lora_text
from dmd2.service.http.refusal import NOT_BLANK, Refusal

if TYPE_CHECKING:
    from dmd2.service.images import OutputImage


class Live(BaseModel):
    """A request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: int = Field(ge=0, le=2**53)
    prompt: str = Field(min_length=1, max_length=5000, pattern=NOT_BLANK)
    model: str | None = Field(None, max_length=200)
    num_inference_steps: int | None = Field(None, ge=1, le=100, description="By default the fewest that there are.")
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    width: int | None = Field(None, ge=16, le=2048)
    height: int | None = Field(None, ge=16, le=2048)
    loras: list[LoraChoice] = Field([], max_length=5)
    output_format: Literal["webp", "jpg", "png"] = "webp"
    previews: bool = False


class Cancel(BaseModel):
    """Nothing more is wanted."""

    model_config = ConfigDict(extra="forbid", strict=True)
    cancel: Literal[True]


class Line:
    """One connection: what its client wants now, and the one request that is generated."""

    def __init__(self, socket: WebSocket, models: Models) -> None:
        self._socket, self._models = socket, models
        self._newest: Live | None = None
        self._news = asyncio.Event()
        self._begun: Live | None = None
        """is generated, and not answered yet"""
        self._work: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()  # an image's two messages stay together

    async def run(self) -> None:
        """Until the client goes."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._generate())
                group.create_task(self._listen())
        except* (WebSocketDisconnect, ClientGone):
            pass  # as all of them end

    async def _listen(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            try:
                await self._take(message.get("text") or "")
            except Refusal as refusal:
                await self._refuse(None, refusal)

    async def _take(self, text: str) -> None:
        """Raises Refusal if it is no request."""
        try:
            wanted = (Cancel if '"cancel"' in text[:20] else Live).model_validate_json(text)
        except ValidationError as error:
            raise Refusal.invalid(error) from None
        if isinstance(wanted, Live):
            try:
                self._socket.state.rates.check(self._socket.state.caller)
            except Refusal as refusal:
                self._models.metrics.rejections.labels(refusal.code).inc()
                await self._refuse(wanted.id, refusal)
                return
        stale, self._newest = self._newest, wanted if isinstance(wanted, Live) else None
        if stale is not None:
            await self._send({"id": stale.id, "type": "stale"})
        if isinstance(wanted, Live):
            self._news.set()
        elif self._work is not None:
            self._work.cancel()
            await asyncio.wait({self._work})
            if self._begun is not None:
                stale, self._begun = self._begun, None
                await self._send({"id": stale.id, "type": "stale"})

    async def _generate(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._newest is not None:
                self._work = asyncio.create_task(self._next(self._newest))
                try:
                    await asyncio.wait({self._work})
                finally:
                    self._work.cancel()
                if not self._work.cancelled():
                    self._work.result()

    async def _next(self, first: Live) -> None:
        """Waits for a place, and generates what is newest by then."""
        try:
            served = self._models.find(first.model)
            run = served.offer(self._request(first, served.steps[0]))
        except (Refusal, UserError) as error:
            self._newest = None
            await self._refuse(first.id, Refusal.of(error))
            return
        try:
            await run.admitted.wait()
            live = self._newest
            if live is None or live.model != first.model:
                return  # cancelled, or another model's matter
            self._newest, self._begun = None, live

            async def take(image: OutputImage) -> None:
                if image.data is None:
                    return  # withheld, as is told of the whole request
                facts: dict[str, Any] = {"id": live.id, "type": "image", "seconds": image.seconds}
                if image.step is None:
                    self._begun = None
                else:
                    facts = {"id": live.id, "type": "preview", "step": image.step}
                facts |= {"seed": image.seed, "width": image.size[0], "height": image.size[1], "model": served.name}
                await self._send(facts | {"steps": run.request.num_inference_steps}, image.data)

            run.request = self._request(live, served.steps[0])
            await run.each(take)
        except (Refusal, UserError) as error:
            refused, self._begun = self._begun or first, None
            await self._refuse(refused.id, Refusal.of(error))
        finally:
            run.close()

    def _request(self, live: Live, fewest: int) -> ImageRequest:
        return request_of(
            live.num_inference_steps or fewest,
            prompt=live.prompt,
            width=live.width,
            height=live.height,
            seed=secrets.randbelow(2**32) if live.seed is None else live.seed,
            lora_weights=lora_text(live.loras),
            output_format=live.output_format,
            previews=live.previews,
        )

    async def _refuse(self, number: int | None, refusal: Refusal) -> None:
        error = refusal.error
        if refusal.headers and "Retry-After" in refusal.headers:
            error["retry_after"] = int(refusal.headers["Retry-After"])
        await self._send({"id": number, "type": "error", "error": error})

    async def _send(self, facts: dict[str, Any], data: bytes | None = None) -> None:
        async with self._sending:
            await self._socket.send_json(facts)
            if data is not None:
                await self._socket.send_bytes(data)


def router(models: Models) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.websocket("/ws/generate")
    async def generate(socket: WebSocket) -> None:
        offered = [text.strip() for text in socket.headers.get("sec-websocket-protocol", "").split(",")]
        await socket.accept("dmd2" if "dmd2" in offered else None)
        await Line(socket, models).run()

    return routes
