"""The websocket: the newest request wins, each is answered once, nothing stale is generated."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.service.http import guard
from dmd2.service.http.app import create_app
from dmd2.service.http.guard import Rules, hashlib
from tests.service.http.fake import FakeService, client_of, fake_app, until


class Socket:
    """A client of the application's websocket, without a network."""

    def __init__(self, app: FastAPI, **headers: str) -> None:
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: list[Any] = []
        self.accepted: Any = None
        self.closed: Any = None
        self.takes = 1000
        """messages; then it takes nothing more, and stays connected"""
        raw = {"host": "localhost"} | {name.replace("_", "-"): value for name, value in headers.items()}
        scope = {
            "type": "websocket",
            "path": "/ws/generate",
            "query_string": b"",
            "root_path": "",
            "scheme": "ws",
            "headers": [(name.encode(), value.encode()) for name, value in raw.items()],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
            "subprotocols": [],
        }
        self._inbox.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Any) -> None:
        if message["type"] == "websocket.accept":
            self.accepted = message
        elif message["type"] == "websocket.close":
            self.closed = message
        else:
            if len(self.sent) == self.takes:
                await asyncio.Event().wait()
            self.sent.append(message)

    def say(self, **message: Any) -> None:
        self._inbox.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})

    def say_raw(self, **message: Any) -> None:
        self._inbox.put_nowait({"type": "websocket.receive", **message})

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(message["text"]) for message in self.sent if message.get("text") is not None]

    def final(self) -> dict[Any, str]:
        """Id → how it ended. Each must end once."""
        ends = [(answer["id"], answer["type"]) for answer in self.answers if answer["type"] != "preview"]
        assert len(dict(ends)) == len(ends), ends
        return dict(ends)

    async def end(self) -> None:
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": 1001})
        await self.task


def talk(
    talking: Callable[[Socket, FakeService, FastAPI], Any], service: FakeService | None = None, **more: Any
) -> None:
    async def run() -> None:
        made = service or FakeService()
        app = fake_app(made, **more)
        async with client_of(app):
            socket = Socket(app)
            await talking(socket, made, app)
            await socket.end()
            admission = app.state.models.served["fake"].admission
            assert (admission.waiting, admission.running) == (0, 0)

    asyncio.run(run())


def test_an_image_is_a_text_and_its_file() -> None:
    async def talking(socket: Socket, service: FakeService, _: FastAPI) -> None:
        socket.say(id=7, prompt="an owl", seed=5, width=32, num_inference_steps=4, previews=True, output_format="png")
        await until(lambda: socket.final() and "bytes" in socket.sent[-1])
        assert [answer["type"] for answer in socket.answers] == ["preview"] * 3 + ["image"]
        assert all(
            "text" in a and b["bytes"][:4] == b"\x89PNG"
            for a, b in zip(socket.sent[::2], socket.sent[1::2], strict=True)
        )
        image = socket.answers[-1]
        told = {name: image[name] for name in ("id", "seed", "width", "height", "model", "steps")}
        assert told == {"id": 7, "seed": 5, "width": 32, "height": 64, "model": "fake", "steps": 4}
        socket.say(id=8, prompt="an owl")
        await until(lambda: 8 in socket.final())
        assert service.asked[-1].num_inference_steps == 1  # what is fastest

    talk(talking)


def test_the_newest_wins_and_the_stale_are_never_generated() -> None:
    async def talking(socket: Socket, service: FakeService, _: FastAPI) -> None:
        socket.say(id=0, prompt="a")
        await until(lambda: service.asked)
        for number in range(1, 10):
            socket.say(id=number, prompt="a" * number)
        await until(lambda: len(socket.final()) == 8)
        service.open.set()
        await until(lambda: len(socket.final()) == 10)
        assert socket.final() == {0: "image", 9: "image"} | dict.fromkeys(range(1, 9), "stale")
        assert [len(request.prompt) for request in service.asked] == [1, 9]

    talk(talking, FakeService(held=True))


def test_who_waits_in_the_queue_asks_for_what_is_newest_by_then() -> None:
    async def talking(socket: Socket, service: FakeService, app: FastAPI) -> None:
        other, admission = Socket(app), app.state.models.served["fake"].admission
        for number in range(4):  # as many as are let in
            busy = Socket(app)
            busy.say(id=number, prompt="busy")
            await until(lambda number=number: len(service.asked) == number + 1)
        socket.say(id=1, prompt="first")
        await until(lambda: admission.waiting == 1)
        socket.say(id=2, prompt="second")
        await until(lambda: socket.final() == {1: "stale"})
        assert admission.waiting == 1
        service.open.set()
        await until(lambda: socket.final() == {1: "stale", 2: "image"})
        assert [request.prompt for request in service.asked] == ["busy"] * 4 + ["second"]
        await other.end()

    talk(talking, FakeService(held=True))


@pytest.mark.parametrize("waits", [False, True])
def test_a_cancelled_one_is_stale(waits: bool) -> None:
    async def talking(socket: Socket, service: FakeService, app: FastAPI) -> None:
        admission = app.state.models.served["fake"].admission
        if waits:
            admission.running = 4
        socket.say(id=1, prompt="a")
        await until(lambda: admission.waiting if waits else service.asked)
        socket.say(cancel=True)
        await until(lambda: socket.final() == {1: "stale"})
        assert len(service.cancelled) == (not waits) and admission.waiting == 0
        admission.running = 0
        service.open.set()
        socket.say(id=2, prompt="b")
        await until(lambda: socket.final() == {1: "stale", 2: "image"})

    talk(talking, FakeService(held=True))


def test_who_hangs_up_leaves_nothing_behind() -> None:
    async def talking(socket: Socket, service: FakeService, _: FastAPI) -> None:
        socket.say(id=1, prompt="a")
        await until(lambda: service.asked)
        socket.say(id=2, prompt="b")
        await socket.end()
        assert len(service.cancelled) == 1

    talk(talking, FakeService(held=True))


@pytest.mark.parametrize("takes", [0, 1])
def test_who_takes_nothing_gives_up_its_place(takes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def talking(socket: Socket, service: FakeService, app: FastAPI) -> None:
        monkeypatch.setattr(guard, "WRITE", 0.05)
        socket.takes = takes
        socket.say(id=1, prompt="a")
        await socket.task
        assert len(service.asked) == 1 and len(socket.sent) == takes

    talk(talking)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"text": "{"}, "invalid_value"),
        ({"text": "[" * 50_000}, "invalid_value"),
        ({"text": '{"id": 1}'}, "invalid_value"),
        ({"text": '{"id": 1, "prompt": " "}'}, "invalid_value"),
        ({"text": '{"id": "x", "prompt": "a"}'}, "invalid_value"),
        ({"text": '{"id": 1, "prompt": "a", "wat": 1}'}, "unknown_parameter"),
        ({"text": '{"cancel": false}'}, "invalid_value"),
        ({"text": '{"id": 1, "prompt": "a", "model": "other"}'}, "model_not_found"),
        ({"text": '{"id": 1, "prompt": "a", "width": 63}'}, "invalid_value"),
        ({"bytes": b"\x00"}, "invalid_value"),
    ],
)
def test_what_is_wrong_is_told_and_the_line_stays_open(message: Any, code: str) -> None:
    async def talking(socket: Socket, _: FakeService, __: FastAPI) -> None:
        socket.say_raw(**message)
        await until(lambda: socket.answers)
        (answer,) = socket.answers
        assert answer["type"] == "error" and answer["error"]["code"] == code
        assert set(answer["error"]) == {"message", "type", "param", "code"} and len(answer["error"]["message"]) <= 500
        socket.say(id=2, prompt="b")
        await until(lambda: 2 in socket.final())

    talk(talking)


def test_errors_of_the_device_and_the_queue_are_told() -> None:
    async def talking(socket: Socket, service: FakeService, app: FastAPI) -> None:
        socket.say(id=1, prompt="broken")
        await until(lambda: 1 in socket.final())
        assert socket.answers[0]["error"]["code"] == "generation_failed"
        app.state.models.served["fake"].admission.running = 4
        socket.say(id=2, prompt="b")
        await until(lambda: 2 in socket.final())
        assert socket.answers[1]["error"]["code"] == "queue_full" and socket.answers[1]["error"]["retry_after"] >= 1
        app.state.models.served["fake"].admission.running = 0

    talk(talking, FakeService(error=lambda _: RuntimeError("broken")), waiting=0)


def test_what_is_withheld_is_an_error() -> None:
    async def talking(socket: Socket, _: FakeService, app: FastAPI) -> None:
        socket.say(id=1, prompt="a", seed=1, num_inference_steps=4, previews=True)
        await until(lambda: 1 in socket.final())
        assert socket.answers[-1]["error"]["code"] == "moderation_blocked"
        assert b'dmd2_errors_total{code="moderation_blocked"} 1.0' in app.state.metrics.text()
        socket.say(id=2, prompt="a", seed=2)
        await until(lambda: socket.final() == {1: "error", 2: "image"})

    talk(talking, FakeService(withheld=(1,)))


def test_requests_count_for_the_rate() -> None:
    async def talking(socket: Socket, _: FakeService, app: FastAPI) -> None:
        for number in range(3):
            socket.say(id=number, prompt="a")
        await until(lambda: 2 in socket.final())
        (error,) = (answer["error"] for answer in socket.answers if answer["id"] == 2)
        assert error["code"] == "rate_limit_exceeded" and error["retry_after"] >= 1
        assert b'dmd2_rejections_total{reason="rate_limit_exceeded"} 1.0' in app.state.metrics.text()

    talk(talking, rules=Rules(per_minute=2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["ask", "other", "wrong", "cancel", "open", "shut", "turn"]), max_size=25))
def test_every_request_is_answered_once_whatever_comes(steps: list[str]) -> None:
    """Requests for two models, wrong ones and cancellations, while the device is now quick, now stuck."""

    async def run() -> None:
        service = FakeService(held=True)
        app = create_app({"one": lambda: service, "two": lambda: service})
        async with client_of(app):
            socket, asked = Socket(app), 0
            for step in steps:
                if step in ("ask", "other", "wrong"):
                    model = {"ask": "one", "other": "two", "wrong": "none"}[step]
                    socket.say(id=asked, prompt="a", model=model)
                    asked += 1
                elif step == "cancel":
                    socket.say(cancel=True)
                elif step == "open":
                    service.open.set()
                elif step == "shut":
                    service.open.clear()
                else:
                    for _ in range(5):
                        await asyncio.sleep(0)
            service.open.set()
            await until(lambda: len(socket.final()) == asked)
            for _ in range(20):
                await asyncio.sleep(0)
            assert set(socket.final()) == set(range(asked))
            await socket.end()
            assert all(
                served.admission.running == served.admission.waiting == 0
                for served in app.state.models.served.values()
            )

    asyncio.run(run())


def test_only_who_may_is_let_in() -> None:
    key = "a-key+of/enough=characters"
    coded = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
    rules = Rules((hashlib.sha256(key.encode()).digest(),), origins=("https://good.example",))

    async def run() -> None:
        app = fake_app(rules=rules)
        async with client_of(app):
            cases: list[tuple[dict[str, str], bool]] = [
                ({}, False),
                ({"authorization": f"Bearer {key}"}, True),
                ({"sec_websocket_protocol": f"dmd2, key64.{coded}"}, True),
                ({"sec_websocket_protocol": f"dmd2, key64.{coded[:-1]}"}, False),
                ({"sec_websocket_protocol": f"dmd2, key64.{key}"}, False),
                ({"authorization": f"Bearer {key}", "origin": "https://evil.example"}, False),
                ({"authorization": f"Bearer {key}", "origin": "https://good.example"}, True),
                ({"authorization": f"Bearer {key}", "origin": "http://localhost"}, True),
            ]
            for headers, let_in in cases:
                socket = Socket(app, **headers)
                await until(lambda socket=socket: socket.accepted or socket.closed)
                assert bool(socket.accepted) == let_in, headers
                if let_in and "sec_websocket_protocol" in headers:
                    assert socket.accepted["subprotocol"] == "dmd2"
                await socket.end()

    asyncio.run(run())
