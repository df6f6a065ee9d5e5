"""`dmd2 serve` itself: the command, real weights behind the real client, the same image at both doors, its end."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from uvicorn.server import ServerState
from websockets import ConnectionClosed, Subprotocol
from websockets.sync.client import connect

import dmd2.cli
from dmd2.runtime.errors import UserError
from dmd2.service.http import server as served
from dmd2.service.http.app import create_app
from dmd2.service.http.guard import Rules
from dmd2.service.images import ImageService
from dmd2.weights.manifest import read_manifest
from tests.service.cog.cog_server import wait_for
from tests.service.http.fake import FakeService, client_of, until
from tests.service.http.serve_process import ServeProcess
from tests.training.pixels import CONFIG, write_teacher

EMOJI = Path(__file__).resolve().parents[3] / "weights" / "emoji"


def pixels(data: bytes | str | None) -> np.ndarray:
    assert data is not None
    data = base64.b64decode(data) if isinstance(data, str) else data
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def waiting(server: ServeProcess) -> int:
    """Requests in its queue."""
    (line,) = (
        line for line in server.client.get("/metrics").text.splitlines() if line.startswith("dmd2_queue_depth{")
    )
    return int(float(line.split()[-1]))


def seeds_of(answer: Future[httpx.Response]) -> list[int]:
    """Of the images of an answer; none, if the request came too late to be taken."""
    try:
        response = answer.result()
    except httpx.TransportError:  # refused, or never read
        return []
    assert response.status_code in (200, 503), response.text
    return [image["seed"] for image in response.json().get("data", ())]


@pytest.mark.slow
def test_a_process_serves_openais_client_and_finishes_what_it_took(tmp_path: Path) -> None:
    server, lines = ServeProcess(tmp_path, "--weights", str(EMOJI)), ExitStack()
    width, height = read_manifest(EMOJI).native_size
    try:
        wait_for(lambda: server.log.count("listening on"), "its socket")
        server.wait_until_ready()
        with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
            made = client.images.generate(prompt="an owl", n=2, extra_body={"seed": 5})
            assert made.data is not None and made.usage is not None
            assert made.size == f"{width}x{height}"
            assert pixels(made.data[0].b64_json).shape == (height, width, 3)
            owl = base64.b64decode(str(made.data[0].b64_json))
            wordless = server.client.post("/sdapi/v1/txt2img", json={"seed": 5}).json()["images"][0]
            assert pixels(wordless).shape == (height, width, 3)
            mask = io.BytesIO()
            half = Image.new("L", (width, height))
            half.paste(255, (0, 0, width, height // 2))
            half.save(mask, "PNG")
            edited = client.images.edit(image=owl, mask=("mask.png", mask.getvalue()), prompt="a cat")
            assert edited.data is not None
            painted = pixels(edited.data[0].b64_json)
            changed = painted != pixels(owl)
            assert changed[: height // 2].any() and not changed[height // 2 :].any()
            stream: Any = client.images.generate(
                prompt="an owl", stream=True, partial_images=3, extra_body={"seed": 5}
            )
            events = list(stream)
            assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
            assert abs(pixels(events[-1].b64_json) - pixels(owl)).max() <= 2

        url = f"ws://127.0.0.1:{server.port}/ws/generate"
        line = lines.enter_context(connect(url, subprotocols=[Subprotocol("dmd2")]))
        line.send(
            json.dumps({"id": 1, "prompt": "an owl", "seed": 5, "num_inference_steps": 4, "output_format": "png"})
        )
        told = json.loads(line.recv())
        assert (told["id"], told["type"], told["model"]) == (1, "image", "emoji") and line.subprotocol == "dmd2"
        assert abs(pixels(bytes(line.recv())) - pixels(owl)).max() <= 2  # type: ignore[arg-type]
        line.send("x" * 100_000)  # more than a message may have
        with pytest.raises(ConnectionClosed):
            line.recv()
        lines.enter_context(connect(url))  # open until the end

        def ask(number: int) -> httpx.Response:
            body = {"prompt": "a red apple", "n": 10, "seed": number}
            return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)

        with ThreadPoolExecutor(4) as clients:
            answers = [clients.submit(ask, number) for number in range(4)]
            taken = wait_for(lambda: waiting(server), "a queue") + 1  # and the one that is generated
            server.client.close()
            server.process.send_signal(signal.SIGTERM)
            seeds = [seeds_of(answer) for answer in answers]
        done = [found for found in seeds if found]
        assert len(done) >= taken and all(found == list(range(found[0], found[0] + 10)) for found in done)
        assert server.process.wait(120) == 0
        assert "Traceback" not in server.log and "an owl" not in server.log
        access = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        statuses = [line["status"] for line in access if line.get("n") == 10]
        assert statuses.count(200) == len(done) and set(statuses) <= {200, 503}
        assert list(server.temporary.iterdir()) == []
    finally:
        lines.close()
        server.close()


def test_both_doors_give_the_same_image_for_the_same_seed(weights: Path, tmp_path: Path) -> None:
    import predict

    async def run() -> None:
        service = ImageService(weights, "cpu", safety=tmp_path / "none", environ={})
        predictor = predict.Predictor()
        predictor.service, predictor.record_metric = service, lambda *_: None
        defaults: dict[str, Any] = {
            "prompt_strength": 0.8,
            "lora_scale": 1.0,
            "control_scale": 0.8,
            "negative_prompt": "",
        }
        defaults |= {"width": None, "height": None, "aspect_ratio": None, "image": None, "mask": None}
        defaults |= {"lora_weights": None, "control_image": None, "control": None, "guidance_scale": 0}
        defaults |= {"output_quality": 80, "disable_safety_checker": False, "previews": False}
        given = {
            "prompt": "an owl",
            "num_outputs": 2,
            "seed": 11,
            "output_format": "png",
            "num_inference_steps": None,
        }
        files = await asyncio.to_thread(list, await predictor.run(**defaults, **given))
        first = [pixels(file.read_bytes()) for file in files]
        app = create_app({"tiny": lambda: ImageService(weights, "cpu", tmp_path / "none", {}, files=False)})
        async with client_of(app) as client:
            body = {"prompt": "an owl", "n": 2, "seed": 11}
            said = (await client.post("/v1/images/generations", json=body)).json()
        second = [pixels(image["b64_json"]) for image in said["data"]]
        for mine, other in zip(first, second, strict=True):
            assert mine.shape == other.shape and abs(mine - other).max() <= 2
        assert abs(first[0] - first[1]).max() > 2
        service.close()

    asyncio.run(run())


def test_weights_are_loaded_for_the_device_that_is_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (loader,) = served.loaders([weights], "tpu").values()
    with pytest.raises(UserError, match="device tpu: expected auto, cpu or cuda"):
        loader()
    given: list[Any] = []
    monkeypatch.setattr(served, "serve", lambda *_, device, **__: given.append(device) or 0)
    for arguments in ([], ["--device", "cuda:1"]):
        monkeypatch.setattr(sys, "argv", ["dmd2", "serve", *arguments])
        with pytest.raises(SystemExit):
            dmd2.cli.main()
    assert given == ["auto", "cuda:1"]


def test_real_weights_count_their_tokens_and_say_that_nothing_failed_to_compile(
    weights: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        app = create_app({"tiny": lambda: ImageService(weights, "cpu", tmp_path / "none", {}, files=False)})
        async with client_of(app) as client:
            said = (await client.post("/v1/images/generations", json={"prompt": "an owl", "size": "64x32"})).json()
            assert said["usage"]["input_tokens"] == 2 and said["usage"]["output_tokens"] == 16 * 8
            ready = (await client.get("/readyz")).json()
            assert ready["models"]["tiny"] == {"loaded": True, "warm": True, "compiled": False, "compile_failures": 0}
            models = (await client.get("/v1/models")).json()["data"]
            assert models[0]["size"] == "64x64" and models[0]["steps"] == [1, 4]

    asyncio.run(run())


def test_weights_of_classes_are_served_at_every_door_whatever_their_steps(tmp_path: Path) -> None:
    write_teacher(tmp_path / "two", CONFIG.model_copy(update={"sigmas": (80.0, 1.0)}))

    async def run() -> None:
        app = create_app({"two": lambda: ImageService(tmp_path / "two", "cpu", tmp_path / "none", {}, files=False)})
        async with client_of(app) as client:
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert (model["steps"], model["classes"], model["takes_prompts"]) == ([2], ["dark", "bright"], False)
            images = []
            for more in ({}, {"quality": "low"}, {"num_inference_steps": 2}):
                body = {"prompt": "a bright one", "seed": 3} | more
                said = (await client.post("/v1/images/generations", json=body)).json()
                assert said["usage"]["output_tokens"] == 64 and said["usage"]["input_tokens"] == 1
                images.append(pixels(said["data"][0]["b64_json"]))
            body = {"prompt": "1", "seed": 3, "steps": 20}
            images.append(pixels((await client.post("/sdapi/v1/txt2img", json=body)).json()["images"][0]))
            assert all(abs(image - images[0]).max() <= 2 for image in images)
            for body, param in (
                ({"prompt": "a cat"}, "prompt"),
                ({"prompt": "1", "num_inference_steps": 4}, "num_inference_steps"),
                ({"prompt": "1", "size": "64x64"}, "size"),
                ({"prompt": "1", "loras": [{"path": "a"}]}, None),
            ):
                refused = await client.post("/v1/images/generations", json=body)
                assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text

    asyncio.run(run())


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [(1024, 524_288, 5000), (1024, 4096, 4096), (1024, -1, 5000), (8000, -1, None), (-1, -1, None), (256, 256, None)],
)
def test_as_many_files_are_allowed_as_the_system_lets(
    soft: int, hard: int, after: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[Any] = []
    monkeypatch.setattr(served.resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(served.resource, "setrlimit", lambda _, limit: limits.append(limit))
    served.allow_files(5000)
    assert limits == ([] if after is None else [(after, hard)])


class Timers:
    """An event loop whose timers go off when the test says so."""

    def __init__(self) -> None:
        self.set: list[tuple[float, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.get_running_loop(), name)

    def call_later(self, delay: float, call: Any, *arguments: Any) -> Mock:
        handle = Mock()
        self.set.append((delay, handle, lambda: call(*arguments)))
        return handle


async def answering(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await asyncio.Event().wait()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def test_a_connection_waits_longer_between_requests_and_a_websocket_is_not_closed() -> None:
    async def run() -> None:
        config = uvicorn.Config(answering, ws="websockets-sansio", timeout_keep_alive=served.KEEP_ALIVE)
        config.load()

        def connect_to(timers: Timers, head: bytes) -> Mock:
            line = served.KeptAlive(config, ServerState(), {}, timers)  # type: ignore[arg-type]
            transport = Mock(get_extra_info=lambda _: None, is_closing=lambda: False)
            line.connection_made(transport)
            line.data_received(head)
            return transport

        head = b"GET / HTTP/1.1\r\nHost: x\r\n"
        timers = Timers()
        transport = connect_to(timers, head + b"\r\n")
        await until(lambda: len(timers.set) == 2)
        (first, _, look), (between, _, _) = timers.set
        assert (first, between) == (30, 75)
        look()
        assert not transport.close.called and timers.set[2][0] == 75
        timers.set[2][2]()
        assert transport.close.called

        timers = Timers()
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        transport = connect_to(timers, head + upgrade + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
        assert transport.set_protocol.called and timers.set[0][1].cancel.called

    asyncio.run(run())


# The command


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["dmd2", "serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        dmd2.cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err


def test_bad_options_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def line(*arguments: object) -> str:
        error = refused(monkeypatch, capsys, *arguments)
        assert error.startswith("dmd2: ") and error.count("\n") == 1
        return error

    assert "--host 0.0.0.0: anybody could ask; expected --api-key-file, or --insecure-public" in line(
        "--host", "0.0.0.0"
    )
    assert "--host ::: anybody" in line("--host", "::")
    assert "expected a folder with a dmd2.json" in line("--weights", tmp_path)
    assert "--cors *: expected an origin" in line("--cors", "*")
    for url in ("example.org", "ftp://example.org", "https://example.org/?a", "https://a b", "https://example.org//"):
        assert f"--public-url {url}: expected a URL such as https://example.org" in line("--public-url", url)
    assert "api-key-file: cannot be read (No such file" in line("--api-key-file", tmp_path / "none")
    assert "two folders are called emoji" in line("--weights", EMOJI, "--weights", EMOJI)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} on 127.0.0.1: cannot listen there" in line("--port", port, "--weights", EMOJI)


@pytest.mark.parametrize("options", [["--insecure-public"], ["--api-key-file"]])
def test_a_public_server_is_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "keys").write_text("a-key-of-enough-characters\n")
    called: list[Any] = []

    def serve(weights: object, host: str, port: int, rules: Rules, **_: object) -> int:
        called.append((host, rules))
        return 0

    monkeypatch.setattr(served, "serve", serve)
    more = [*options, str(tmp_path / "keys")] if "--api-key-file" in options else options
    monkeypatch.setattr(sys, "argv", ["dmd2", "serve", "--host", "0.0.0.0", *more])
    with pytest.raises(SystemExit) as end:
        dmd2.cli.main()
    ((host, rules),) = called
    assert end.value.code == 0 and host == "0.0.0.0" and not rules.loopback
    assert len(rules.keys) == ("--api-key-file" in options) and "a-key" not in repr(rules)


def test_weights_that_cannot_be_loaded_end_it_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "dmd2.json").write_text("{}")
    monkeypatch.setattr(served, "log", lambda: None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        error = refused(monkeypatch, capsys, "--port", port, "--weights", tmp_path)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert error.startswith("dmd2: ") and "dmd2.json" in error and error.count("\n") == 1


def test_a_device_that_is_gone_ends_the_process_after_its_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService()

    def app(*_: object, **more: Any) -> FastAPI:
        return create_app({"fake": lambda: service}, Rules(), failed=more["failed"])

    async def run() -> None:
        serving = asyncio.create_task(asyncio.to_thread(served.serve, [EMOJI], "127.0.0.1", port, Rules()))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            while True:
                try:
                    if (await client.get("/readyz")).status_code == 200:
                        break
                except httpx.TransportError:
                    assert not serving.done(), serving
            assert (await client.get("/healthz")).status_code == 200 and not serving.done()
            service.alive = False
            assert await asyncio.wait_for(serving, 120) == 1
            assert service.closed

    monkeypatch.setattr(served, "create_app", app)
    monkeypatch.setattr(served, "log", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # not the main thread
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asyncio.run(run())
