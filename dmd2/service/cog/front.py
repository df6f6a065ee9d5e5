"""A proxy before Cog's server that adds what it lacks: a queue, bounds on what clients send, plain refusals.

Cog 0.23 has no queue and now and then refuses requests although slots are free; refuses explicit nulls; makes folders
by whatever path an id spells; ends at anybody's `POST /shutdown`; reads bodies of any size; posts to any webhook. So
it listens on the loopback, and this ASGI application is what the world reaches. It knows the few routes that there
are and writes each request anew from what it understood of it.

Webhooks may go to any http or https address, and Cog does not ask whether it is internal: fence the container off.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2
import uvicorn
from pydantic_core import to_json
from uvicorn.protocols.http.h11_impl import H11Protocol

from dmd2.runtime.errors import UserError
from dmd2.service.cog.bodies import ID, Refused, cut, spoken, understood
from dmd2.service.cog.gate import Full, Gate
from dmd2.service.cog.supervisor import listen

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

PREDICTION = re.compile(rf"/predictions/({ID})")
CANCEL = re.compile(rf"/predictions/({ID})/cancel")
# Cog's errors for a prediction that was cancelled just as it began
CANCELLED = re.compile(
    r"Prediction failed: (Failed to submit coroutine|Async prediction failed): Cancell?ationException"
)
# … and for one whose worker had died before it got it
NOT_BEGUN = re.compile(r"(?:Prediction failed: )?Failed to send request: ")
BUSY = re.compile(r"Prediction failed: (?:Async prediction failed: )?Busy: (.*)", re.DOTALL)
"""how Cog words the exception that dmd2.inference.batcher raises when its queue is full"""
MOST_REFUSAL = 1 << 16  # bytes of an answer that may be a refusal; images are larger
MOST_KNOWN = 1000  # ids of predictions whose end nobody waited for
LINGER = 5.0  # seconds for which what a refused client still sends is thrown away, so that it can read why
HEALTH = 2.0  # seconds that Cog has to answer a health check
IDLE = 30.0  # seconds that a connection may take to bring a request's head
KEPT, KEEP = 64, 5.0
"""connections to Cog's server that are kept between requests, at most, and seconds for which each is"""
READ, SLOWEST = 30.0, 100_000  # a body may take so many seconds, and one more for each so many bytes that came
SMALL = 1 << 16  # bytes of a request that is let in however many large ones are held
WRITE = 60.0  # seconds that a client may take no byte of its answer
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "proxy-connection"}
NOT_SENT_BACK = HOP_BY_HOP | {"date", "server"}
NOT_PASSED_ON = HOP_BY_HOP | {"host", "content-length", "content-type", "accept-encoding", "expect"}


@dataclass(frozen=True)
class Bounds:
    slots: int = 1
    """predictions that Cog's server makes at once"""
    waiting: int = 64
    """requests that wait for a slot, at most"""
    body: int = 64_000_000
    """bytes of one request"""
    bodies: int = 256_000_000
    """bytes of all requests that are held at once"""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Bounds:
        """Bounds from environment variables.

        Raises:
            UserError: one of them is no number, or out of range.
        """

        def number(name: str, default: int, least: int, most: int) -> int:
            text = environment.get(name) or str(default)
            if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
                raise UserError(f"{name}={text[:50]}: expected a number from {least} to {most}")
            return int(text)

        body = number("DMD2_BODY_MB", cls.body // 1_000_000, 1, 1000) * 1_000_000
        slots = number("COG_MAX_CONCURRENCY", cls.slots, 1, 10_000)
        return cls(slots, number("DMD2_QUEUE", cls.waiting, 0, 10_000), body, max(cls.bodies, 2 * body))


class Upstream(Protocol):
    """Address and state of Cog's server; see `dmd2.service.cog.supervisor.Supervisor`."""

    address: tuple[str, int] | None
    health: dict[str, Any]

    def note(self, address: tuple[str, int], health: dict[str, Any]) -> None: ...

    def stopping(self) -> bool: ...


class Stalled(Exception):
    """A client took nothing of its answer for too long."""


@dataclass(eq=False)
class Request:
    """A request for a prediction."""

    method: str
    path: str
    headers: dict[str, str]
    """lower-case names"""
    body: bytes = b""
    id: str | None = None
    task: asyncio.Task[None] | None = None
    queued: bool = False
    cancelled: bool = False
    """by another request, as long as it waited"""
    read: bool = False
    """to its end"""
    answered: bool = False


class Front:
    """The ASGI application. `transport`: instead of a connection to `upstream.address`, for tests."""

    def __init__(
        self, upstream: Upstream, bounds: Bounds, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self._upstream, self._bounds = upstream, bounds
        self.gate = Gate(bounds.slots, bounds.waiting)
        self._held = 0  # bytes of bodies
        self._requests: set[Request] = set()
        self._known: OrderedDict[str, None] = OrderedDict()
        # A connection is kept only after a whole answer: closing it before is how to cancel. A server closes all of
        # them when it ends, which httpx2 sees before it takes one; the next server has another port.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=KEPT, keepalive_expiry=KEEP)
        timeout = httpx2.Timeout(None, connect=5.0)
        self._client = httpx2.AsyncClient(transport=transport, limits=limits, timeout=timeout, trust_env=False)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']}: expected http")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # As it was sent: what only decodes to a known path is none.
        path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        request = Request(scope["method"], path, headers)
        request.read = not {"content-length", "transfer-encoding"} & headers.keys()
        try:
            await self._route(request, receive, send)
        except Refused as refusal:
            await refuse(refusal, send, None if request.read else receive)
        except Stalled:
            say(f"{request.method} {path}: nobody took the answer for {WRITE:.0f} s")

    async def _route(self, request: Request, receive: Receive, send: Send) -> None:
        method, path = request.method, request.path
        if path in ("/health-check", "/", "/openapi.json"):
            if method not in ("GET", "HEAD"):
                raise Refused(405, {"detail": f"{path}: expected GET"})
            if path == "/health-check":
                await answer(send, 200, to_json(await self._health()))
            else:
                await self._ask_short("GET", path, send)
        elif cancel := CANCEL.fullmatch(path):
            if method != "POST":
                raise Refused(405, {"detail": "to cancel: expected POST"})
            if self._cancel_queued(cancel[1]):
                await answer(send, 200, b"{}")
            else:
                await self._ask_short("POST", path, send)
        elif path == "/predictions" or path.startswith("/predictions/"):
            named = PREDICTION.fullmatch(path)
            if path != "/predictions" and not named:
                raise Refused.field(["path", "id"], f"expected {ID}")
            if method != ("PUT" if named else "POST"):
                raise Refused(405, {"detail": "expected POST /predictions or PUT /predictions/ID"})
            request.id = named[1] if named else None
            await self._predict(request, receive, send)
        else:
            raise Refused(404, {"detail": "Not Found"})

    async def _health(self) -> dict[str, Any]:
        """Cog's health or, while it is busy with large inputs, the health that the supervisor saw last."""
        upstream = self._upstream
        if upstream.stopping():
            return upstream.health | {"status": "DEFUNCT"}
        address = upstream.address
        if address is not None:
            try:
                response = await self._client.get(self._url("/health-check"), timeout=HEALTH)
                health = spoken(response.content)
            except httpx2.TimeoutException:
                return upstream.health
            except httpx2.TransportError:
                health = None
            if health is not None:
                upstream.note(address, health)
                return health
        return {"status": "STARTING"}  # also where a server that ended is started again

    # Predictions

    async def _predict(self, request: Request, receive: Receive, send: Send) -> None:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused.failed(415, "Content-Type: expected application/json")
        self._check_open()
        try:
            self.gate.check()
        except Full:
            raise self._full() from None
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._held + size > self._bounds.bodies:
                raise Refused.failed(503, "too many large requests at once", self.gate.retry_after())
            held += size
            self._held += size

        try:
            body = await self._read(request, receive, hold)
            if body is None:
                return
            small = len(body) <= SMALL
            request.body, own = understood(body) if small else await asyncio.to_thread(understood, body)
            request.id = request.id or own
            del body
            await self._while_connected(request, receive, send)
        finally:
            self._held -= held

    async def _read(self, request: Request, receive: Receive, hold: Callable[[int], None]) -> bytes | None:
        """Reads the whole body; None if its sender is gone."""
        most = self._bounds.body
        too_large = Refused.failed(413, f"the request is larger than {most // 1_000_000} MB")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(READ) as limit:
                until = limit.when() or 0.0
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > most:
                        raise too_large
                    limit.reschedule(until + size / SLOWEST)
                    if size > SMALL:
                        hold(len(chunk))
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        request.read = True
                        return b"".join(chunks)
        except TimeoutError:
            raise Refused.failed(408, f"the request came slower than {SLOWEST // 1000} kB/s") from None

    async def _while_connected(self, request: Request, receive: Receive, send: Send) -> None:
        """Answers; stops, and lets Cog cancel, when the client hangs up."""

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        request.task = asyncio.create_task(self._forward(request, send))
        gone = asyncio.create_task(until_gone())
        self._requests.add(request)
        try:
            await asyncio.wait({request.task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not request.task.done():
                request.task.cancel()
                await asyncio.wait({request.task})
            if request.cancelled:
                await answer(send, 200, to_json({"id": request.id, "status": "canceled"}))
            elif not request.task.cancelled():
                request.task.result()
        finally:
            self._requests.discard(request)
            request.task.cancel()
            gone.cancel()

    def _cancel_queued(self, name: str) -> bool:
        found = [request for request in self._requests if request.id == name and request.queued]
        for request in found:
            request.cancelled = True
            if request.task is not None:
                request.task.cancel()
        return bool(found)

    async def _forward(self, request: Request, send: Send) -> None:
        if request.method == "PUT" and self._is_known(request) and await self._ask(request, send, lambda: None):
            return  # Cog told how far the prediction is; that takes no slot
        request.queued = True
        try:
            number = await self.gate.enter()
        except Full:
            raise self._full() from None
        inside = True

        def leave() -> None:
            nonlocal inside
            if inside:
                inside = False
                self.gate.leave()

        try:
            while True:
                request.queued = False
                if await self._ask(request, send, leave):
                    return
                request.queued, inside = True, False
                await self.gate.again(number)
                inside = True
        finally:
            leave()

    async def _ask(self, request: Request, send: Send, leave: Callable[[], None]) -> bool:
        """Asks Cog and passes its answer on; False if it says it is full. Calls `leave` when the slot is free."""
        self._check_open()
        headers = {name: value for name, value in request.headers.items() if name not in NOT_PASSED_ON}
        headers["content-type"] = "application/json"
        try:
            async with self._client.stream(
                request.method, self._url(request.path), content=request.body, headers=headers
            ) as response:
                if response.status_code == 409:
                    await response.aread()  # so that the connection can be kept
                    return False
                if response.status_code == 202 and request.id:
                    self._known[request.id] = None
                    while len(self._known) > MOST_KNOWN:
                        self._known.popitem(last=False)
                streams = response.headers.get("content-type", "").startswith("text/event-stream")
                if not streams:
                    leave()
                await self._pass_on(request, response, send)
        except httpx2.TransportError as error:
            if not request.answered:
                raise self._away() from error
            say(f"{request.method} {request.path}: cut off ({error!r})")
        return True

    async def _pass_on(self, request: Request, response: httpx2.Response, send: Send) -> None:
        status, size = response.status_code, response.headers.get("content-length", "")
        kind = response.headers.get("content-type", "application/json")
        if status >= 400 or (size.isdecimal() and int(size) <= MOST_REFUSAL):
            content = await response.aread()
            said = spoken(content) if kind.startswith("application/json") else None
            error = str(said.get("error")) if said and said.get("status") == "failed" else ""
            if status == 503:
                raise Refused(503, said or self._away().content, self._away().retry_after)
            if busy := BUSY.match(error):
                raise Refused.failed(429, busy[1], self.gate.retry_after())
            if NOT_BEGUN.match(error):
                raise Refused.failed(503, "the worker is being replaced; ask again", 5)
            if said and CANCELLED.match(error):
                content = to_json(said | {"status": "canceled", "error": None})
            if said and status == 422:
                content = to_json(cut(said))
            request.answered = True
            await answer(send, status, content, kind)
            return
        headers = [
            (name.lower(), value)
            for name, value in response.headers.raw
            if name.decode().lower() not in NOT_SENT_BACK
        ]
        request.answered = True
        await give(send, {"type": "http.response.start", "status": status, "headers": headers})
        async for chunk in response.aiter_raw():
            await give(send, {"type": "http.response.body", "body": chunk, "more_body": True})
        await give(send, {"type": "http.response.body", "body": b""})

    async def _ask_short(self, method: str, path: str, send: Send) -> None:
        """Passes a short request on to Cog, and its answer back."""
        try:
            response = await self._client.request(method, self._url(path), timeout=10.0)
        except httpx2.TransportError as error:
            raise self._away() from error
        await answer(send, response.status_code, response.content, response.headers.get("content-type", "text/plain"))

    def _is_known(self, request: Request) -> bool:
        """Whether Cog may be working on the prediction already."""
        return request.id in self._known or any(
            other.id == request.id and other is not request and not other.queued for other in self._requests
        )

    def _url(self, path: str) -> str:
        if self._upstream.address is None:
            raise self._away()
        host, port = self._upstream.address
        return f"http://[{host}]:{port}{path}" if ":" in host else f"http://{host}:{port}{path}"

    def _check_open(self) -> None:
        stopping = self._upstream.stopping()
        if stopping or self._upstream.health.get("status") not in ("READY", "BUSY", "UNHEALTHY"):
            raise self._away()

    def _away(self) -> Refused:
        if self._upstream.stopping():
            return Refused.failed(503, "the server is being stopped", 10)
        return Refused.failed(503, "the server is being set up; see /health-check", 5)

    def _full(self) -> Refused:
        return Refused.failed(429, f"{self.gate.waiting} requests are waiting already", self.gate.retry_after())


async def give(send: Send, message: Message) -> None:
    """Sends a message to the client.

    Raises:
        Stalled: the client takes nothing.
    """
    try:
        await asyncio.wait_for(send(message), WRITE)
    except TimeoutError:
        raise Stalled from None


async def answer(
    send: Send, status: int, content: bytes, kind: str = "application/json", more: Headers | None = None
) -> None:
    """Sends a whole answer. With `more` headers its end is left to the caller."""
    headers = [(b"content-type", kind.encode("latin-1")), (b"content-length", str(len(content)).encode())]
    await give(send, {"type": "http.response.start", "status": status, "headers": [*headers, *(more or [])]})
    await give(send, {"type": "http.response.body", "body": content, "more_body": more is not None})


async def refuse(refusal: Refused, send: Send, receive: Receive | None) -> None:
    """Answers with a refusal. `receive`: a request not read to its end; its client may read only after that."""
    more: Headers = []
    if refusal.retry_after is not None:
        more.append((b"retry-after", str(refusal.retry_after).encode()))
    if receive is not None:
        more.append((b"connection", b"close"))
    await answer(send, refusal.status, to_json(refusal.content), more=more)
    if receive is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
    await give(send, {"type": "http.response.body", "body": b""})


class Connection(H11Protocol):
    """Closes a connection on which no request comes; uvicorn does so after an answer only, until the next byte."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def patience(self) -> float:
        """Seconds for which it may bring no request from now on."""
        return IDLE

    def _look_again(self) -> None:
        self._timer = self.loop.call_later(self.patience(), self._look, self.cycle, self._idle())

    def _look(self, cycle: object, was_idle: bool) -> None:
        if was_idle and self._idle() and self.cycle is cycle:
            self.transport.close()
        else:
            self._look_again()


@contextmanager
def serving(application: Front, host: str, port: int) -> Iterator[None]:
    """Serves in a thread of its own. At the end answers under way have ten seconds.

    Raises:
        UserError: it cannot listen there.
    """
    listener = listen(host, port)
    config = uvicorn.Config(
        application,
        http=Connection,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            if not server.should_exit:
                say("ended; so does the service")
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=run, name="front", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(20)


def say(message: str) -> None:
    """A line in the log, beside the server's own."""
    print(f"front: {message}", file=sys.stderr, flush=True)
