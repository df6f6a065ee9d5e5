"""What stands before every route: keys, rates, bounds on bodies, hosts and origins, headers, the access log.

Plain ASGI: nothing here waits for an answer to be whole, so streams stay streams.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request

from dmd2.runtime.errors import UserError, shown
from dmd2.runtime.files import read_bounded
from dmd2.service.http.metrics import Metrics
from dmd2.service.http.models import ClientGone
from dmd2.service.http.refusal import Refusal, answer

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/healthz", "/readyz", "/openapi.json", "/files/")
"""what needs no key; so does the page, which asks for one. Names of files cannot be guessed"""
HEALTH = ("/healthz", "/readyz")
"""what is answered however many requests there are: who asks would end a busy server"""
METERED = ("/v1/images/", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")
"""what counts for a key's rate; the websocket counts its messages"""
JSON_IMAGES = ("/sdapi/v1/img2img",)
WITH_IMAGES = ("/v1/images/edits", *JSON_IMAGES)
TEXT_BODY = 1_000_000
"""bytes of a request without images: what JSON becomes in memory is many times as large"""
MOST_VALUES = 10_000
"""of JSON that is larger, about: images are few and long"""
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
REQUESTS = 1000
"""under way at one time, open websockets among them"""
READ, WRITE, SLOWEST = 30.0, 60.0, 100_000
"""seconds for a body, and for a client to take a part of its answer; both have one more for each SLOWEST bytes"""
MOST_CALLERS = 10_000
"""whose rates are remembered"""
LEAST_KEY = 16
"""characters"""
POLICY = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}

access = logging.getLogger("dmd2.access")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """What the operator chose."""

    keys: tuple[bytes, ...] = field(default=(), repr=False)
    """SHA-256 of each key that is let in; none: everybody is"""
    loopback: bool = True
    """listens on this machine only"""
    origins: tuple[str, ...] = ()
    """other web pages that may call"""
    per_minute: int = 0
    """requests of one key (without keys, of one address); 0: any number"""
    body: int = 64_000_000
    """bytes of one request with images; others have less"""
    bodies: int = 256_000_000
    """bytes of all requests that are read at one time"""
    log_prompts: bool = False


class Rates:
    """Lets each caller ask `per_minute` times a minute, that often at once after a pause.

    The callers seen last are remembered.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how often they may ask, as of when

    def check(self, caller: str) -> None:
        """Raises Refusal if the caller has asked too often."""
        if not self._most:
            return
        now, each = self._clock(), 60 / self._most
        left, then = self._left.pop(caller, (float(self._most), now))
        left = min(float(self._most), left + (now - then) / each)
        self._left[caller] = (left - (left >= 1), now)
        if len(self._left) > MOST_CALLERS:
            self._left.popitem(last=False)
        if left < 1:
            wait = max(1, math.ceil((1 - left) * each))
            raise Refusal(429, "rate_limit_exceeded", f"more than {self._most} requests a minute", retry_after=wait)


def read_keys(path: Path) -> tuple[bytes, ...]:
    """SHA-256 of the keys in a file, one a line; empty lines and those that begin with # are none.

    Raises:
        UserError: there are none, or one is too short to be secret.
    """
    text = read_bounded(path, 1_000_000, "api-key-file").decode("utf-8", "replace")
    keys = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise UserError(f"api-key-file {path}: holds no key; expected one a line")
    if any(len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UserError(f"api-key-file {path}: expected at least {LEAST_KEY} ASCII characters, without spaces")
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def matching(given: Iterable[str], keys: tuple[bytes, ...]) -> str | None:
    """The name, for logs, of the first key given that is one of `keys`. Takes as long whichever it is."""
    for key in given:
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        if sum(hmac.compare_digest(digest, known) for known in keys):
            return f"key-{digest.hex()[:8]}"
    return None


def presented(headers: Headers) -> list[str]:
    """The keys that a request brings: as a bearer, as the password of basic authentication, or, from a page's
    websocket, as a subprotocol `key64.KEY`, the key in base64url without padding."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    found = [value.strip()] if kind.lower() == "bearer" else []
    if kind.lower() == "basic":
        both = _decoded(value)
        found += [both, both.partition(":")[2]]
    protocols = [text.strip() for text in headers.get("sec-websocket-protocol", "").split(",", 8)[:8]]
    return found + [_decoded(text[6:], b"-_") for text in protocols if text.startswith("key64.")]


def _decoded(text: str, last: bytes = b"+/") -> str:
    """Of base64, padded or not, with these as its last two digits; "", which is no key, if it is none."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), last, validate=True).decode()
    except ValueError:
        return ""


def _host(url: str) -> tuple[str | None, str]:
    """Host without and with its port, of what may be no URL at all."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None, ""
    return parts.hostname, parts.netloc


class Guard:
    """The ASGI middleware."""

    def __init__(self, app: App, rules: Rules, metrics: Metrics, pages: frozenset[str]) -> None:
        self._app, self._rules, self._metrics, self._pages = app, rules, metrics, pages
        self.rates = Rates(rules.per_minute)
        self._held = 0  # bytes of bodies
        self._under_way = 0  # requests

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        began, websocket = time.perf_counter(), scope["type"] == "websocket"
        most = self._rules.body if scope["path"] in WITH_IMAGES else min(self._rules.body, TEXT_BODY)
        body = _Body(self, receive, most, scope["path"] in JSON_IMAGES)
        state = scope.setdefault("state", {})
        state |= {
            "id": uuid.uuid4().hex,
            "rates": self.rates,
            "caller": (scope.get("client") or ("?",))[0],
            "status": 0,
        }
        policy = PAGE_POLICY if scope["path"] in self._pages else POLICY
        self._under_way += 1

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in (
                    HEADERS | {"content-security-policy": policy, "x-request-id": state["id"]}
                ).items():
                    headers.setdefault(name, value)
                if self._rules.origins or scope["path"].startswith("/files/"):  # any page may show an image
                    headers["cross-origin-resource-policy"] = "cross-origin"
            elif message["type"] in ("websocket.accept", "websocket.close"):
                state["status"] = message.get("code", 101)
            size = len(message.get("body") or message.get("bytes") or b"")
            try:
                async with asyncio.timeout(WRITE + size / SLOWEST):
                    await send(message)
            except TimeoutError:
                raise ClientGone from None

        try:
            try:
                self._check(scope, most)
            except Refusal as refusal:
                if refusal.status_code in (429, 503):
                    self._metrics.rejections.labels(refusal.code).inc()
                if websocket:
                    await sending({"type": "websocket.close", "code": 1008, "reason": refusal.code})
                else:
                    await (await answer(Request(scope), refusal))(scope, receive, sending)
            else:
                await self._app(scope, receive if websocket else body.receive, sending)
        except ClientGone:
            pass  # who takes nothing of an answer is told nothing more
        except Exception as error:
            if websocket or state["status"]:
                raise
            logger.exception("%s %s", scope["method"], shown(scope["path"], 200))
            self._metrics.errors.labels("internal_error").inc()
            failure = Refusal(500, "internal_error", f"{type(error).__name__}; the server's log says more")
            await (await answer(Request(scope), failure))(scope, receive, sending)
        finally:
            self._under_way -= 1
            self._held -= body.held
            self._log(scope, time.perf_counter() - began)

    def _check(self, scope: MutableMapping[str, Any], most: int) -> None:
        """Raises Refusal unless the request may come in."""
        headers, rules, path = Headers(scope=scope), self._rules, scope["path"]
        if self._under_way > REQUESTS and path not in HEALTH:
            raise Refusal(503, "busy", f"more than {REQUESTS} requests at once", retry_after=2)
        host, origin = headers.get("host", ""), headers.get("origin")
        if rules.loopback and not rules.keys and _host(f"//{host}")[0] not in LOOPBACK:
            # Else any web page could reach this machine's server by a name of its own (DNS rebinding).
            raise Refusal(421, "unknown_host", f"Host {shown(host, 100)}: expected localhost, or a server with keys")
        if origin is not None and origin not in rules.origins and _host(origin)[1] != host:
            raise Refusal(403, "unknown_origin", f"Origin {shown(origin, 100)}: not among those that are allowed")
        if rules.keys and path not in self._pages and not path.startswith(OPEN):
            caller = matching(presented(headers), rules.keys)
            if caller is None:
                raise Refusal(401, "invalid_api_key", "expected a valid key as `Authorization: Bearer KEY`")
            scope["state"]["caller"] = caller
        if scope.get("method") == "POST" and path.startswith(METERED):
            self.rates.check(scope["state"]["caller"])
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > most:
            raise Refusal(413, "too_large", f"a body of {shown(length, 30)} bytes; expected at most {most}")

    def _log(self, scope: MutableMapping[str, Any], seconds: float) -> None:
        state, route = scope["state"], getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(state["status"])).inc()
        if scope["type"] == "http":
            self._metrics.seconds.labels(route).observe(seconds)
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "request": state["id"]}
        line |= {"caller": state["caller"], "method": scope.get("method", "WS"), "path": shown(scope["path"], 200)}
        line |= {"seconds": round(seconds, 4)}
        line |= {name: state[name] for name in ("status", "model", "n", "seed", "position", "code") if name in state}
        if self._rules.log_prompts and "prompt" in state:
            line["prompt"] = shown(state["prompt"], 5000)
        access.info("%s", json.dumps(line))

    def hold(self, size: int, body: _Body) -> None:
        """Counts bytes of a body. Raises Refusal if there are too many."""
        self._held += size
        body.held += size
        if body.held > body.most:
            raise Refusal(413, "too_large", f"the body has more than {body.most} bytes")
        if self._held > self._rules.bodies:
            self._metrics.rejections.labels("bodies").inc()
            raise Refusal(503, "busy", "too many large requests at once", retry_after=2)


class _Body:
    """Passes on the body of a request, counted and not for ever. `json`: it is parsed as such, however large."""

    def __init__(self, guard: Guard, receive: Receive, most: int, json: bool) -> None:
        self._guard, self._receive, self.most, self._json = guard, receive, most, json
        self.held, self._values, self._whole = 0, 0, False
        self._began: float | None = None

    async def receive(self) -> Message:
        self._began = self._began or asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(None if self._whole else self._began + READ + self.held / SLOWEST):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, "too_slow", f"the body came slower than {SLOWEST // 1000} kB/s") from None
        if message["type"] == "http.request":
            part = message.get("body", b"")
            self._guard.hold(len(part), self)
            if self._json:
                self._values += sum(map(part.count, (b",", b"[", b"{")))  # base64 has none of them
                if self.held > TEXT_BODY and self._values > MOST_VALUES:
                    raise Refusal(413, "too_large", f"more than {MOST_VALUES} values; expected text and images")
            self._whole = not message.get("more_body")
        return message
