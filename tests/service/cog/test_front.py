"""What strangers send is bounded, who comes too many waits in order, and Cog only gets what it can take."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Literal

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmd2.service.cog.front as front_module
from dmd2.runtime.errors import UserError
from dmd2.service.cog.front import Bounds, Front, serving
from dmd2.service.cog.supervisor import listen

JSON = {"content-type": "application/json"}
few = settings(max_examples=25, deadline=None, derandomize=True)


class Supervisor:
    """What the front asks of one."""

    def __init__(self) -> None:
        self.address: tuple[str, int] | None = ("127.0.0.1", 1)
        self.health: dict[str, Any] = {"status": "READY"}
        self.noted: list[dict[str, Any]] = []
        self.stops = False

    def note(self, address: tuple[str, int], health: dict[str, Any]) -> None:
        assert address == self.address
        self.noted.append(health)

    def stopping(self) -> bool:
        return self.stops


class Cog(httpx2.AsyncBaseTransport):
    """A server that keeps each request until the test lets it go; more than `slots` get a 409.

    Args:
        spurious: probability of a 409 although a slot is free.
    """

    def __init__(self, slots: int = 1, spurious: float = 0.0) -> None:
        self.slots, self.spurious, self.random = slots, spurious, random.Random(0)
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.running: dict[Any, asyncio.Event] = {}
        self.order: list[Any] = []
        self.cancelled: list[Any] = []
        self.answer: Callable[[httpx2.Request], httpx2.Response] | None = None
        self.hold = False

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        content = await request.aread()
        self.paths.append(request.url.path)
        if request.url.path == "/health-check" and self.answer is None:
            return httpx2.Response(200, json={"status": "BUSY"})
        body = json.loads(content) if content else {}
        self.bodies.append(body)
        if self.answer is not None:
            return self.answer(request)
        if len(self.running) >= self.slots or self.random.random() < self.spurious:
            return httpx2.Response(409, json={"error": "At capacity - all prediction slots busy"})
        name = body["input"].get("name")
        self.order.append(name)
        event = self.running[name] = asyncio.Event()
        try:
            if self.hold:
                await event.wait()
            else:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            del self.running[name]
        return httpx2.Response(200, json={"status": "succeeded", "output": [name]})


class World:
    """`cog`: in the place of a server; "sockets": the front asks `supervisor.address`."""

    def __init__(self, cog: Cog | Literal["sockets"] | None = None, **bounds: int) -> None:
        self.cog, self.supervisor = cog if isinstance(cog, Cog) else Cog(), Supervisor()
        self.front = Front(self.supervisor, Bounds(**bounds), None if cog == "sockets" else self.cog)
        self.client = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(self.front), base_url="http://front", timeout=None
        )

    async def predict(self, name: object = None, **more: Any) -> httpx2.Response:
        return await self.client.post("/predictions", json={"input": {"name": name}} | more)

    def start(self, name: object = None, **more: Any) -> asyncio.Task[httpx2.Response]:
        return asyncio.create_task(self.predict(name, **more))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


# What is passed on


def test_nulls_are_left_out_and_only_what_cog_knows_is_passed_on() -> None:
    async def test() -> None:
        world = World()
        sent = {"input": {"seed": None, "prompt": "ü", "deep": [None]}, "id": None, "webhook": None, "other": 1}
        body = b"\xef\xbb\xbf" + json.dumps(sent).encode()
        response = await world.client.post("/predictions", content=body, headers=JSON)
        assert response.status_code == 200, response.text
        assert world.cog.bodies == [{"input": {"prompt": "ü", "deep": [None]}}]

    run(test())


REFUSED: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/shutdown", {}, 404, "Not Found"),
    ("POST", "//shutdown", {}, 404, "Not Found"),
    ("POST", "/%73hutdown", {}, 404, "Not Found"),
    ("POST", "/predictions/../shutdown", {}, 422, "expected [A-Za-z0-9_-]{1,64}"),
    ("POST", "/trainings", {}, 404, "Not Found"),
    ("PUT", "/predictions/..%2f..%2fetc", {}, 422, "expected [A-Za-z0-9_-]{1,64}"),
    ("PUT", "/predictions/a%0a", {}, 422, "expected"),
    ("PUT", "/predictions/" + "a" * 65, {}, 422, "expected"),
    ("POST", "/predictions/../x/cancel", {}, 422, "expected"),
    ("PUT", "/predictions", {}, 405, "expected POST /predictions or PUT"),
    ("POST", "/health-check", {}, 405, "expected GET"),
    ("GET", "/predictions/a/cancel", None, 405, "expected POST"),
    ("POST", "/predictions", {"input": {}, "id": "../x"}, 422, '"id"'),
    ("POST", "/predictions", {"input": {}, "id": "x\n"}, 422, '"id"'),
    ("POST", "/predictions", {"input": {}, "id": "x" * 1_000_000}, 422, '"id"'),
    ("POST", "/predictions", {"input": {}, "id": 5}, 422, '"id"'),
    ("POST", "/predictions", {"input": "x" * 1_000_000}, 422, '"input"'),
    ("POST", "/predictions", [], 422, '"body"'),
    ("POST", "/predictions", {"input": {}, "webhook": "file:///etc/passwd"}, 422, "expected an http or https"),
    ("POST", "/predictions", {"input": {}, "webhook": "http://"}, 422, "expected an http or https"),
    ("POST", "/predictions", {"input": {}, "webhook": "http://[x"}, 422, '"webhook"'),
    ("POST", "/predictions", {"input": {}, "webhook": "http://x/" + "y" * 3000}, 422, '"webhook"'),
    ("POST", "/predictions", {"input": {}, "context": {"x": "y" * 9_000_000}}, 422, "at most 65536 bytes"),
    ("POST", "/predictions", {"input": {}, "webhook_events_filter": ["x" * 100_000]}, 422, "webhook_events"),
    ("POST", "/predictions", b'{"input": {"a": NaN}}', 400, "the body is no JSON"),
    ("POST", "/predictions", b"[" * 100_000, 400, "the body is no JSON"),
    ("POST", "/predictions", b'{"input": {"a": ' + b"9" * 10_000 + b"}}", 400, "the body is no JSON"),
    ("POST", "/predictions", b'"\\ud800"', 400, "the body is no JSON"),
    ("POST", "/predictions", b"\xff\xfe", 400, "the body is no JSON"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "said"), REFUSED)
def test_what_is_refused_in_a_few_words_and_never_reaches_cog(
    method: str, path: str, body: Any, status: int, said: str
) -> None:
    sent: list[dict[str, Any]] = []

    async def test() -> None:
        world = World()
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        await world.front(scope(method, path, len(content)), once(content), keep(sent))
        assert not world.cog.paths

    run(test())
    assert sent[0]["status"] == status
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    assert said in text and len(text) < 1000


def scope(method: str, path: str, length: int | None = None, **headers: str) -> dict[str, Any]:
    """Of a request with a JSON body, as uvicorn tells an application."""
    given = {"content-type": "application/json"} | headers
    given |= {} if length is None else {"content-length": str(length)}
    pairs = [(name.encode(), value.encode()) for name, value in given.items()]
    return {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": pairs}


def once(content: bytes) -> Callable[[], Coroutine[Any, Any, dict[str, Any]]]:
    """A client that sends this, and then waits."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": content}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive


def keep(sent: list[dict[str, Any]]) -> Callable[[Any], Coroutine[Any, Any, None]]:
    async def send(message: Any) -> None:
        sent.append(message)

    return send


def test_another_kind_of_body_is_refused() -> None:
    async def test() -> None:
        world = World()
        response = await world.client.post("/predictions", content=b"{}", headers={"content-type": "text/plain"})
        assert response.status_code == 415 and not world.cog.paths

    run(test())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["id", "input", "webhook", "webhook_events_filter", "context", "else"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(names, values, max_size=5), st.data())
def test_any_body_is_an_answer_and_cog_gets_what_it_understands(body: dict[str, Any], data: st.DataObject) -> None:
    content = bytearray(json.dumps(body).encode())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    async def test() -> None:
        world = World()
        response = await world.client.post("/predictions", content=bytes(content), headers=JSON)
        assert response.status_code in (200, 400, 422), response.text
        assert len(response.content) < 1000
        for got in world.cog.bodies:
            assert set(got) <= {"id", "input", "context", "webhook", "webhook_events_filter"}
            assert isinstance(got["input"], dict) and None not in got["input"].values()

    run(test())


# Bounds


def test_a_body_that_is_announced_too_large_is_refused_unread() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        assert sent[0]["status"] == 413 and b"larger than 1 MB" in sent[1]["body"]  # before anything was read
        return {"type": "http.disconnect"}

    async def test() -> None:
        await World(body=1_000_000).front(scope("POST", "/predictions", 10**12), receive, keep(sent))

    run(test())
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_body_that_grows_too_large_is_refused_where_it_does() -> None:
    sent: list[dict[str, Any]] = []
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        if sent:
            return {"type": "http.disconnect"}
        read += 1000
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def test() -> None:
        world = World(body=10_000)
        await world.front(scope("POST", "/predictions", **{"transfer-encoding": "chunked"}), receive, keep(sent))
        assert world.front._held == 0

    run(test())
    assert sent[0]["status"] == 413 and read == 11_000


def test_large_bodies_together_are_bounded_and_small_ones_always_find_room() -> None:
    async def test() -> None:
        world = World(Cog(slots=9), slots=9, body=1_000_000, bodies=250_000)
        world.cog.hold = True
        large = {"input": {"name": "large", "image": "x" * 200_000}}
        first = world.start(**large)
        await until(lambda: world.cog.running)
        refused = await world.predict(**large)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        world.cog.running["large"].set()
        world.cog.hold = False
        assert (await world.predict("small")).status_code == 200
        assert (await first).status_code == 200
        assert (await world.predict(**large)).status_code == 200

    run(test())


def test_a_body_that_trickles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "READ", 0.01)
    sent: list[dict[str, Any]] = []
    messages = 0

    async def receive() -> dict[str, Any]:
        nonlocal messages
        messages += 1
        if sent:
            return {"type": "http.disconnect"}
        await asyncio.sleep(0.005)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def test() -> None:
        await World().front(scope("POST", "/predictions", 1000), receive, keep(sent))

    run(test())
    assert sent[0]["status"] == 408 and b"slower than 100 kB/s" in sent[1]["body"]


def test_cogs_quotes_are_cut() -> None:
    async def test() -> None:
        world = World()
        detail = [
            {"loc": ["body", "input", "prompt"], "msg": "x" * 5_000_000 + " is too long", "type": "value_error"}
        ]
        world.cog.answer = lambda request: httpx2.Response(422, json={"detail": detail})
        response = await world.predict()
        assert response.status_code == 422
        heard = response.json()["detail"][0]
        assert heard["loc"] == detail[0]["loc"] and len(heard["msg"]) == 500
        assert heard["msg"].startswith("xxx") and heard["msg"].endswith("x is too long")

    run(test())


def test_health_is_answered_while_a_body_is_awaited_and_while_cog_is_silent() -> None:
    async def test() -> None:
        world = World()

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        waiting = asyncio.create_task(world.front(scope("POST", "/predictions", 1000), receive, keep([])))
        assert (await world.client.get("/health-check")).json() == {"status": "BUSY"}
        assert world.supervisor.noted == [{"status": "BUSY"}]

        def silent(request: httpx2.Request) -> httpx2.Response:
            raise httpx2.ReadTimeout("", request=request)

        world.cog.answer = silent
        assert (await world.client.get("/health-check")).json() == {"status": "READY"}  # heard by the supervisor

        def dead(request: httpx2.Request) -> httpx2.Response:
            raise httpx2.ConnectError("", request=request)

        world.cog.answer = dead
        assert (await world.client.get("/health-check")).json() == {"status": "STARTING"}
        world.supervisor.stops = True
        assert (await world.client.get("/health-check")).json() == {"status": "DEFUNCT"}
        waiting.cancel()

    run(test())


@pytest.mark.parametrize(
    ("variable", "value"),
    [("DMD2_QUEUE", "-1"), ("DMD2_BODY_MB", "0"), ("DMD2_BODY_MB", "1e3"), ("COG_MAX_CONCURRENCY", "x" * 1000)],
)
def test_a_wrong_bound_is_named(variable: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{variable}=.{{1,50}}: expected a number from "):
        Bounds.of({variable: value})
    assert Bounds.of({}) == Bounds()
    assert Bounds.of({"DMD2_QUEUE": "0", "DMD2_BODY_MB": "500", "COG_MAX_CONCURRENCY": "32"}) == Bounds(
        32, 0, 500_000_000, 1_000_000_000
    )


# Waiting


@few
@given(st.integers(1, 4), st.integers(1, 12), st.sampled_from([0.0, 0.3]))
def test_everybody_is_served_once_in_order_of_arrival(slots: int, clients: int, spurious: float) -> None:
    async def test() -> None:
        # The server has fewer slots than the front believes, as when others hold some of them.
        world = World(Cog(1 if spurious else slots, spurious), slots=slots, waiting=clients)
        answers = []
        for i in range(clients):
            answers.append(world.start(i))
            await asyncio.sleep(0)
        responses = await asyncio.gather(*answers)
        assert [response.json().get("output") for response in responses] == [[i] for i in range(clients)]
        assert sorted(world.cog.order) == list(range(clients))
        if slots == 1:
            assert world.cog.order == list(range(clients))
        assert (world.front.gate.inside, world.front.gate.waiting) == (0, 0)

    run(test())


def test_one_too_many_is_told_when_to_come_again() -> None:
    async def test() -> None:
        world = World(waiting=2)
        world.cog.hold = True
        first = world.start(0)
        await until(lambda: world.cog.running)
        others = [world.start(1), world.start(2)]
        await until(lambda: world.front.gate.waiting == 2)
        refused = await world.predict(3)
        assert refused.status_code == 429 and refused.json()["status"] == "failed"
        assert refused.json()["error"] == "2 requests are waiting already"
        assert 1 <= int(refused.headers["retry-after"]) <= 300
        for i, task in enumerate([first, *others]):
            await until(lambda i=i: i in world.cog.running)
            world.cog.running[i].set()
            assert (await task).status_code == 200
        assert len(world.cog.bodies) == 3

    run(test())


def test_who_hangs_up_leaves_the_queue_or_ends_the_prediction() -> None:
    async def test() -> None:
        world = World()
        world.cog.hold = True

        def client(name: str) -> tuple[asyncio.Event, asyncio.Task[None], list[dict[str, Any]]]:
            content, gone = json.dumps({"input": {"name": name}}).encode(), asyncio.Event()
            sent: list[dict[str, Any]] = []
            first = once(content)
            messages = 0

            async def receive() -> dict[str, Any]:
                nonlocal messages
                messages += 1
                if messages == 1:
                    return await first()
                await gone.wait()
                return {"type": "http.disconnect"}

            request = world.front(scope("POST", "/predictions", len(content)), receive, keep(sent))
            return gone, asyncio.create_task(request), sent

        gone, running, sent = client("running")
        await until(lambda: world.cog.running)
        gone_too, queued, _ = client("queued")
        await until(lambda: world.front.gate.waiting)
        last = world.start("last")
        await until(lambda: world.front.gate.waiting == 2)
        gone_too.set()
        await queued
        gone.set()
        await running
        assert world.cog.cancelled == ["running"] and not sent
        await until(lambda: "last" in world.cog.running)
        world.cog.running["last"].set()
        assert (await last).status_code == 200
        assert world.cog.order == ["running", "last"]
        assert (world.front.gate.inside, world.front._held) == (0, 0)

    run(test())


def test_who_waits_can_be_cancelled() -> None:
    async def test() -> None:
        world = World()
        world.cog.hold = True
        running = world.start("a")
        await until(lambda: world.cog.running)
        waiting = world.start("b", id="mine")
        await until(lambda: world.front.gate.waiting)
        assert (await world.client.post("/predictions/mine/cancel")).json() == {}
        assert (await waiting).json() == {"id": "mine", "status": "canceled"}
        world.cog.running["a"].set()
        assert (await running).status_code == 200
        assert world.cog.order == ["a"] and "/predictions/mine/cancel" not in world.cog.paths

    run(test())


def test_asking_again_for_a_prediction_under_way_takes_no_slot() -> None:
    async def test() -> None:
        world = World()
        world.cog.hold = True
        running = world.start("a")
        await until(lambda: world.cog.running)
        world.front._known["mine"] = None
        world.cog.answer = lambda request: httpx2.Response(202, json={"id": "mine", "status": "processing"})
        again = await world.client.put("/predictions/mine", json={"input": {}})
        assert (again.status_code, again.json()["status"]) == (202, "processing")
        world.cog.running["a"].set()
        assert (await running).status_code == 200

    run(test())


# Manners


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("status", ["STARTING", "SETUP_FAILED", "DEFUNCT"])
def test_during_setup_it_is_503_with_retry_after(accept: str, status: str) -> None:
    async def test() -> None:
        world = World()
        world.supervisor.health = {"status": status}
        response = await world.client.post("/predictions", json={"input": {}}, headers={"accept": accept})
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        assert not world.cog.paths

    run(test())


def fails(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ReadError("reset", request=request)


BUSY = {"status": "failed", "error": "Prediction failed: Async prediction failed: Busy: 128 images are waiting"}


DEAD = {
    "status": "failed",
    "error": "Failed to send request: Failed to send on slot socket: Broken pipe (os error 32)",
}


@pytest.mark.parametrize(
    ("answered", "status", "error"),
    [
        (lambda request: httpx2.Response(200, json=BUSY), 429, "128 images are waiting"),
        (lambda request: httpx2.Response(503, json={"error": "not yet", "status": "failed"}), 503, "not yet"),
        (fails, 503, "the server is being set up; see /health-check"),
        (lambda request: httpx2.Response(200, json=DEAD), 503, "the worker is being replaced; ask again"),
    ],
)
def test_what_is_only_for_now_says_when_to_come_again(
    answered: Callable[[httpx2.Request], httpx2.Response], status: int, error: str
) -> None:
    async def test() -> None:
        world = World()
        world.cog.answer = answered
        response = await world.predict()
        assert (response.status_code, response.json()) == (status, {"error": error, "status": "failed"})
        assert int(response.headers["retry-after"]) >= 1
        assert world.front.gate.inside == 0

    run(test())


@pytest.mark.parametrize("where", ["Failed to submit coroutine", "Async prediction failed"])
def test_what_was_cancelled_as_it_began_is_cancelled(where: str) -> None:
    """Cog 0.23 calls it failed; seen with real requests under load."""

    async def test() -> None:
        world = World()
        error = f"Prediction failed: {where}: CancelationException: "
        answer = {"id": "a", "status": "failed", "error": error, "output": None}
        world.cog.answer = lambda request: httpx2.Response(200, json=answer)
        response = await world.predict()
        assert (response.status_code, response.json()) == (200, answer | {"status": "canceled", "error": None})

    run(test())


def test_other_failures_are_predictions() -> None:
    async def test() -> None:
        world = World()
        failed = {"status": "failed", "error": "Prediction failed: lora_weights: Busy: no such file"}
        world.cog.answer = lambda request: httpx2.Response(200, json=failed)
        response = await world.predict()
        assert (response.status_code, response.json()) == (200, failed)

    run(test())


def test_events_are_passed_on_one_by_one() -> None:
    async def test() -> None:
        world = World()
        second = asyncio.Event()

        class Events(httpx2.AsyncByteStream):
            async def __aiter__(self) -> AsyncIterator[bytes]:
                yield b"event: output\n\n"
                await second.wait()
                yield b"event: completed\n\n"

        headers = {"content-type": "text/event-stream", "server": "cog", "connection": "close"}
        world.cog.answer = lambda request: httpx2.Response(200, headers=headers, stream=Events())
        sent: list[dict[str, Any]] = []
        request = world.front(scope("POST", "/predictions", 2), once(b"{}"), keep(sent))
        task = asyncio.create_task(request)
        await until(lambda: len(sent) == 2)
        assert sent[0]["headers"] == [(b"content-type", b"text/event-stream")]
        assert sent[1]["body"] == b"event: output\n\n" and world.front.gate.inside == 1
        second.set()
        await task
        assert [message["body"] for message in sent[2:]] == [b"event: completed\n\n", b""]
        assert world.front.gate.inside == 0

    run(test())


def test_who_takes_nothing_of_the_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "WRITE", 0.01)

    async def test() -> None:
        world = World()

        async def send(message: Any) -> None:
            await asyncio.Event().wait()

        await world.front(scope("POST", "/predictions", 2), once(b"{}"), send)
        assert (world.front.gate.inside, world.front._held) == (0, 0)

    run(test())


# Over a socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_what_is_small_is_sent_at_once() -> None:
    """asyncio sets TCP_NODELAY on connections of such sockets only; without it each answer takes 40 ms more."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_the_front_serves_over_a_real_socket() -> None:
    port = free_port()
    world = World(body=1_000_000)
    with serving(world.front, "127.0.0.1", port):
        with pytest.raises(UserError, match=rf"port {port} on 127\.0\.0\.1: cannot listen there \(.*in use\)"):
            serving(world.front, "127.0.0.1", port).__enter__()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/predictions", b" " * 30_000_000, JSON)  # sends it all before it looks up
        assert connection.getresponse().status == 413
        connection.close()
        connection.request("POST", "/predictions", b'{"input": {"name": "x"}}', JSON)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["output"]) == (200, ["x"])
        connection.request("HEAD", "/health-check")
        assert connection.getresponse().read() == b""
        connection.close()
    with socket.socket() as probe:  # the port is free again
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_a_connection_that_brings_no_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "IDLE", 0.05)
    port = free_port()
    with serving(World(Slow()).front, "127.0.0.1", port):
        for head in (b"", b"POST /predic", b"GET /health-check HTTP/1.1\r\nHost: x\r\n\r\nGET /"):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                client.sendall(head)
                while client.recv(1000):
                    pass
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/predictions", b'{"input": {"name": "slow"}}', JSON)
        assert connection.getresponse().status == 200  # however long it takes
        connection.close()


class Sockets:
    """A server of HTTP on the loopback that keeps connections open; `answers` is waited for before each answer."""

    def __init__(self) -> None:
        self.opened = self.requests = self.cut = 0
        self.answers = asyncio.Event()
        self.answers.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, port: int = 0) -> tuple[str, int]:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        return "127.0.0.1", int(self._server.sockets[0].getsockname()[1])

    async def end(self) -> None:
        """As the end of its process: nobody listens, and every connection is closed."""
        self._server.close()
        for writer in self._writers.copy():
            writer.close()
        await until(lambda: not self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        self._writers.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := (await reader.readuntil(b"\r\n\r\n")).lower():
                await reader.readexactly(int(re.findall(rb"content-length: (\d+)", head)[0]))
                self.requests += 1
                gone = asyncio.create_task(reader.read(1))
                answers = asyncio.create_task(self.answers.wait())
                await asyncio.wait({gone, answers}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    self.cut += 1
                    break
                gone.cancel()
                await asyncio.wait({gone})
                content = b'{"status": "succeeded"}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                writer.write(b"content-length: %d\r\n\r\n%s" % (len(content), content))
        writer.close()
        self._writers.discard(writer)


def test_a_connection_to_cog_is_used_again_and_none_of_a_server_that_ended() -> None:
    async def test() -> None:
        world, cog = World("sockets", slots=4), Sockets()
        world.supervisor.address = address = await cog.start()
        for name in range(20):
            assert (await world.predict(name)).status_code == 200
        assert cog.opened == 1
        for port in (0, address[1]):  # a server that takes the place of the one before, elsewhere and where one was
            answers = [world.start(name) for name in range(4)]
            assert {(await answer).status_code for answer in answers} == {200}
            await cog.end()
            cog.opened = 0
            world.supervisor.address = await cog.start(port)
            for name in range(20):
                assert (await world.predict(name)).status_code == 200
            assert cog.opened == 1
        await cog.end()
        assert (await world.predict()).status_code == 503
        await world.front._client.aclose()

    run(test())


def test_who_hangs_up_ends_the_prediction_on_a_kept_connection_too() -> None:
    async def test() -> None:
        world, cog = World("sockets"), Sockets()
        world.supervisor.address = await cog.start()
        assert (await world.predict()).status_code == 200
        cog.answers.clear()
        gone = world.start()
        await until(lambda: cog.requests == 2)
        gone.cancel()
        await until(lambda: cog.cut)
        cog.answers.set()
        assert (await world.predict()).status_code == 200  # on another
        assert (cog.opened, cog.requests, world.front.gate.inside) == (2, 3, 0)
        await cog.end()
        await world.front._client.aclose()

    run(test())


class Slow(Cog):
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(0.3)
        return await super().handle_async_request(request)
