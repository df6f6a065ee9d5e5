"""OpenAI's images API on a service without networks: fields, shapes, refusals, the queue, clients that go."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

from dmd2.service.http import guard
from dmd2.service.http.app import create_app
from dmd2.service.http.guard import Rules
from dmd2.service.http.openai import Kept
from tests.service.http.fake import FakeService, client_of, fake_app, until

GENERATIONS = "/v1/images/generations"


def ask(body: dict[str, Any], service: FakeService | None = None, **more: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client_of(fake_app(service)) as client:
            return await client.post(GENERATIONS, json=body, **more)

    return asyncio.run(once())


def opened(data: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def test_every_field_reaches_the_service() -> None:
    service = FakeService()
    body = {
        "prompt": "an owl",
        "model": "fake",
        "n": 7,
        "size": "32x48",
        "quality": "low",
        "background": "opaque",
        "moderation": "low",
        "output_format": "jpeg",
        "output_compression": 60,
        "response_format": "b64_json",
        "user": "me",
        "style": "vivid",
        "seed": 5,
        "negative_prompt": "cat",
        "guidance_scale": 2.5,
        "loras": [{"path": "owner/name", "scale": 0.5}, {"path": "https://example.org/a.safetensors"}],
    }
    answer = ask(body, service)
    assert answer.status_code == 200, answer.text
    (asked,) = service.asked
    assert (asked.width, asked.height, asked.num_outputs, asked.seed) == (32, 48, 7, 5)
    assert (asked.num_inference_steps, asked.output_format, asked.output_quality) == (1, "jpg", 60)
    assert asked.lora_weights == "owner/name:0.5 https://example.org/a.safetensors:1"
    said = answer.json()
    assert [image["seed"] for image in said["data"]] == list(range(5, 12))
    assert all(opened(image).size == (32, 48) and opened(image).format == "JPEG" for image in said["data"])
    told = (said["size"], said["quality"], said["output_format"], said["background"], said["model"])
    assert told == ("32x48", "low", "jpeg", "opaque", "fake")
    cells = 7 * (32 // 4) * (48 // 4)
    details = {"text_tokens": 2, "image_tokens": 0}
    assert said["usage"] == {
        "input_tokens": 2,
        "output_tokens": cells,
        "total_tokens": 2 + cells,
        "input_tokens_details": details,
    }
    assert answer.headers["x-queue-position"] == "0"
    stages = dict(each.split(";dur=") for each in answer.headers["server-timing"].split(", "))
    assert stages.keys() == {"queue", "text", "denoise", "decode", "safety", "encode"}
    assert float(stages["denoise"]) == 10  # of the slowest image, not of all


def test_defaults_are_the_weights_own() -> None:
    service = FakeService()
    said = ask({"prompt": "an owl", "size": "auto", "n": None, "seed": None}, service).json()
    (asked,) = service.asked
    assert (asked.width, asked.num_inference_steps, asked.output_format) == (None, None, "png")
    assert (said["size"], said["quality"], len(said["data"])) == ("64x64", "high", 1)
    assert said["data"][0]["seed"] == asked.seed


@pytest.mark.parametrize("stream", [False, True])
def test_every_seed_that_is_told_may_be_asked_for(stream: bool) -> None:
    answer = ask({"prompt": "an owl", "seed": 2**32 - 1, "n": 2, "stream": stream})
    assert f'"seed":{2**32 - 1}' in answer.text.replace(" ", "") and '"seed":0' in answer.text.replace(" ", "")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "  "}, "prompt", "invalid_value"),
        ({"prompt": "x" * 5001}, "prompt", "invalid_value"),
        ({"prompt": 3}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"size": "63x64"}, "size", "invalid_value"),
        ({"size": "12x64"}, "size", "invalid_value"),
        ({"size": "3000x64"}, "size", "invalid_value"),
        ({"size": "2048x2048"}, "size", "invalid_value"),
        ({"size": "huge"}, "size", "invalid_value"),
        ({"prompt": " "}, "prompt", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**32}, "seed", "invalid_value"),
        ({"num_inference_steps": 2}, "num_inference_steps", "invalid_value"),
        ({"num_inference_steps": True}, "num_inference_steps", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"guidance_scale": 21}, "guidance_scale", "invalid_value"),
        ({"loras": [{"path": "a b"}]}, "loras.0.path", "invalid_value"),
        ({"loras": [{"path": "a", "scale": 9}]}, "loras.0.scale", "invalid_value"),
        ({"loras": [{"path": "a"}] * 6}, "loras", "invalid_value"),
        ({"seeed": 1}, "seeed", "unknown_parameter"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
def test_what_is_wrong_is_named_in_openais_shape(change: dict[str, Any], param: str, code: str) -> None:
    service = FakeService()
    answer = ask({"prompt": "an owl"} | change, service)
    assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert not any(sign in error["message"] for sign in ("\\", "[^", "^("))  # words, and no regular expression
    assert len(error["message"]) <= 500 and "\n" not in error["message"]
    assert service.asked == []


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'{"prompt": ' + b"9" * 10_000 + b"}", b"\xff", b"null"])
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    async def once() -> httpx.Response:
        async with client_of(fake_app()) as client:
            return await client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})

    answer = asyncio.run(once())
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("model", ["dall-e-3", "gpt-image-1", None, ""])
def test_a_client_that_knows_openais_models_alone_gets_the_first(model: str | None) -> None:
    first, second = FakeService(), FakeService()

    async def once() -> httpx.Response:
        async with client_of(create_app({"first": lambda: first, "second": lambda: second})) as client:
            return await client.post(GENERATIONS, json={"prompt": "an owl", "model": model})

    said = asyncio.run(once()).json()
    assert said["model"] == "first" and len(first.asked) == 1
    assert ("url" in said["data"][0]) == (model == "dall-e-3")  # as OpenAI's own models do


def test_the_model_chooses_the_weights_and_all_are_listed() -> None:
    emoji, numbers = FakeService(), FakeService((1,), classes=("cat", "dog"))

    async def both() -> tuple[httpx.Response, httpx.Response]:
        async with client_of(create_app({"emoji": lambda: emoji, "numbers": lambda: numbers})) as client:
            await client.post(GENERATIONS, json={"prompt": "cat", "model": "numbers"})
            return await client.get("/v1/models"), await client.get("/readyz")

    listed, ready = asyncio.run(both())
    assert len(numbers.asked) == 1 and not emoji.asked
    first, second = listed.json()["data"]
    assert (first["id"], first["object"], first["steps"], first["takes_prompts"]) == ("emoji", "model", [1, 4], True)
    assert (second["id"], second["classes"], second["takes_prompts"]) == ("numbers", ["cat", "dog"], False)
    assert ready.json()["status"] == "ready" and set(ready.json()["models"]) == {"emoji", "numbers"}
    assert emoji.closed and numbers.closed


def test_urls_lead_to_the_images_for_a_stated_time_and_within_a_bound() -> None:
    now = [0.0]
    kept = Kept(60.0, 2000, clock=lambda: now[0])

    async def run() -> None:
        async with client_of(fake_app(kept=kept)) as client:
            body = {"prompt": "an owl", "response_format": "url", "n": 2, "output_format": "webp"}
            said = (await client.post(GENERATIONS, json=body)).json()
            urls = [data["url"] for data in said["data"]]
            for url in urls:
                image = await client.get(url)
                assert image.status_code == 200 and image.headers["content-type"] == "image/webp"
                assert Image.open(io.BytesIO(image.content)).format == "WEBP"
                assert image.headers["cross-origin-resource-policy"] == "cross-origin"  # other pages may show it
                head = await client.head(url)
                assert head.status_code == 200 and head.headers["content-length"] == str(len(image.content))
            now[0] = 60.0
            gone = await client.get(urls[0])
            assert gone.status_code == 404 and "60 s" in gone.json()["error"]["message"]
            assert kept.bytes == 0
            for _ in range(30):
                await client.post(GENERATIONS, json=body)
            assert 0 < kept.bytes <= 2000

    asyncio.run(run())


@pytest.mark.parametrize("public", ["https://example.org", "https://example.org:8443/images/"])
def test_urls_begin_with_what_clients_reach(public: str) -> None:
    async def run() -> None:
        async with client_of(fake_app(public_url=public)) as client:
            said = (await client.post(GENERATIONS, json={"prompt": "an owl", "response_format": "url"})).json()
            start, _, name = said["data"][0]["url"].rpartition("/files/")
            assert start == public.rstrip("/") and (await client.get(f"/files/{name}")).status_code == 200

    asyncio.run(run())


def test_what_the_safety_checker_withholds_is_left_out_or_refused() -> None:
    said = ask({"prompt": "an owl", "n": 3, "seed": 0}, FakeService(withheld=(1,))).json()
    assert [image["seed"] for image in said["data"]] == [0, 2]
    answer = ask({"prompt": "an owl", "seed": 1}, FakeService(withheld=(1,)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "moderation_blocked")


@pytest.mark.parametrize("path", [GENERATIONS, "/sdapi/v1/txt2img"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_gets_nothing_for_safety_is_counted(path: str, stream: bool) -> None:
    async def run() -> str:
        async with client_of(fake_app(FakeService(withheld=(1,)))) as client:
            for seed in (0, 1):
                await client.post(path, json={"prompt": "an owl", "seed": seed, "stream": stream})
            return (await client.get("/metrics")).text

    assert 'dmd2_errors_total{code="moderation_blocked"} 1.0' in asyncio.run(run()).splitlines()


def test_a_failed_generation_is_one_line_of_json() -> None:
    def fail(_: object) -> Exception:
        return RuntimeError("out of\nmemory " + "x" * 1_000_000)

    answer = ask({"prompt": "an owl"}, FakeService(error=fail))
    error = answer.json()["error"]
    assert answer.status_code == 500 and error["type"] == "server_error" and error["code"] == "generation_failed"
    assert not any(sign in error["message"] for sign in ("\\", "[^", "^("))  # words, and no regular expression
    assert len(error["message"]) <= 500 and "\n" not in error["message"]


def test_the_queue_is_bounded_and_says_when_to_return() -> None:
    async def run() -> None:
        service = FakeService(held=True)
        app = fake_app(service, waiting=2)
        async with client_of(app) as client:
            admission = app.state.models.served["fake"].admission
            body = {"prompt": "an owl", "n": 4}  # as many as two batches
            tasks = [asyncio.create_task(client.post(GENERATIONS, json=body)) for _ in range(3)]
            await until(lambda: admission.waiting == 2)
            refused = await client.post(GENERATIONS, json=body)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            service.open.set()
            answers = await asyncio.gather(*tasks)
            assert [answer.status_code for answer in answers] == [200] * 3
            assert sorted(answer.headers["x-queue-position"] for answer in answers) == ["0", "1", "2"]
            assert admission.waiting == admission.running == 0
            assert b'dmd2_rejections_total{reason="queue_full"} 1.0' in (await client.get("/metrics")).content

    asyncio.run(run())


@pytest.mark.parametrize("path", [GENERATIONS, "/sdapi/v1/txt2img"])
def test_who_was_refused_is_known_by_key_and_request(path: str) -> None:
    """At the time told: the same request finds a place where the queue is full, another's does not."""

    async def run() -> None:
        service, keys = FakeService(held=True), ("a" * 20, "b" * 20)
        rules = Rules(keys=tuple(hashlib.sha256(key.encode()).digest() for key in keys))
        app = fake_app(service, rules, waiting=2)
        async with client_of(app) as client:
            admission, now = app.state.models.served["fake"].admission, 0.0
            admission._clock = lambda: now

            def ask(prompt: str, key: str) -> asyncio.Task[httpx.Response]:
                headers = {"authorization": f"Bearer {key}"}
                return asyncio.create_task(client.post(path, json={"prompt": prompt}, headers=headers))

            taken = [ask(f"{i}", keys[0]) for i in range(4 + 2)]
            await until(lambda: admission.waiting == 2)
            refused = await ask("an owl", keys[0])
            assert refused.status_code == 429
            now += int(refused.headers["retry-after"])
            assert (await ask("an owl", keys[1])).status_code == 429
            assert (await ask("a cat", keys[0])).status_code == 429
            taken.append(ask("an owl", keys[0]))
            await until(lambda: admission.waiting == 3)
            service.open.set()
            assert {(await task).status_code for task in taken} == {200}

    asyncio.run(run())


def test_bulk_waits_behind_who_comes_later() -> None:
    async def run() -> None:
        service = FakeService(held=True)
        app = fake_app(service)
        async with client_of(app) as client:
            admission = app.state.models.served["fake"].admission
            tasks = []
            for waiting, priority in enumerate(["interactive", "bulk", "interactive"]):
                body = {"prompt": f"{priority} {waiting}", "n": 4, "priority": priority}
                tasks.append(asyncio.create_task(client.post(GENERATIONS, json=body)))
                await until(lambda waiting=waiting: admission.waiting == waiting and admission.running)
            service.open.set()
            await asyncio.gather(*tasks)
            assert [request.prompt[-1] for request in service.asked] == ["0", "2", "1"]

    asyncio.run(run())


@pytest.mark.parametrize("waits", [False, True])
def test_who_runs_out_of_time_is_told_and_leaves_nothing_behind(waits: bool) -> None:
    async def run() -> None:
        service = FakeService(held=True)
        app = fake_app(service)
        async with client_of(app) as client:
            admission = app.state.models.served["fake"].admission
            body = {"prompt": "an owl", "n": 4}
            first = asyncio.create_task(client.post(GENERATIONS, json=body))
            await until(lambda: service.asked)
            if not waits:
                first.cancel()
                await until(lambda: service.cancelled)
            late = await client.post(GENERATIONS, json=body, headers={"X-Request-Timeout": "0.05"})
            assert late.status_code == 408 and late.json()["error"]["code"] == "timeout"
            assert (admission.waiting, admission.running) == (0, 4 if waits else 0)
            service.open.set()
            await asyncio.gather(first, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "3601", "soon"])
def test_a_time_that_is_none_is_refused(timeout: str) -> None:
    answer = ask({"prompt": "an owl"}, headers={"X-Request-Timeout": timeout})
    assert answer.status_code == 400 and "x-request-timeout" in answer.json()["error"]["param"].lower()


async def raw(app: Any, body: bytes, hang_up: asyncio.Event, takes: int = 1000) -> list[Any]:
    """A request as uvicorn makes it, whose client hangs up once `hang_up` is set; what the application sent.

    Args:
        takes: messages that the client reads; then it stays connected and takes nothing more.
    """
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if len(sent) == takes:
            await asyncio.Event().wait()
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": GENERATIONS,
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_hangs_up_is_cancelled_wherever_it_is(stream: bool, waits: bool) -> None:
    async def run() -> None:
        service = FakeService(held=True)
        app = fake_app(service)
        async with client_of(app) as client:
            admission = app.state.models.served["fake"].admission
            body = {"prompt": "an owl", "n": 4, "stream": stream}
            other = None
            if waits:
                other = asyncio.create_task(client.post(GENERATIONS, json=body | {"prompt": "a cat"}))
                await until(lambda: service.asked)
            hang_up = asyncio.Event()
            task = asyncio.create_task(raw(app, json.dumps(body).encode(), hang_up))
            await until(lambda: admission.waiting if waits else service.asked)
            hang_up.set()
            await task
            assert (admission.waiting, admission.running) == (0, 4 if waits else 0)
            assert len(service.cancelled) == (0 if waits else 1)
            assert b"dmd2_cancelled_total 1.0" in (await client.get("/metrics")).content
            service.open.set()
            if other is not None:
                assert (await other).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize("takes", [0, 1, 2, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_takes_nothing_of_its_answer_gives_up_its_place(
    stream: bool, takes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "WRITE", 0.05)

    async def run() -> None:
        app = fake_app()
        async with client_of(app) as client:
            admission = app.state.models.served["fake"].admission
            body = {"prompt": "an owl", "n": 4, "stream": stream}
            sent = await raw(app, json.dumps(body).encode(), asyncio.Event(), takes)
            assert len(sent) == (takes if stream else min(takes, 2))
            assert (admission.waiting, admission.running) == (0, 0)
            assert (await client.post(GENERATIONS, json=body)).status_code == 200

    asyncio.run(run())


def test_a_stream_is_not_kept_back_by_a_proxy() -> None:
    assert ask({"prompt": "an owl", "stream": True}).headers["x-accel-buffering"] == "no"


def test_a_drained_server_finishes_and_takes_no_more() -> None:
    async def run() -> None:
        service = FakeService(held=True)
        app = fake_app(service)
        async with client_of(app) as client:
            tasks = [
                asyncio.create_task(client.post(GENERATIONS, json={"prompt": "an owl", "n": 4})) for _ in range(3)
            ]
            await until(lambda: app.state.models.served["fake"].admission.waiting == 2)
            app.state.models.drain()
            refused = await client.post(GENERATIONS, json={"prompt": "an owl"})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            service.open.set()
            assert [(await task).status_code for task in tasks] == [200] * 3

    asyncio.run(run())


def test_before_the_weights_are_loaded_it_lives_but_is_not_ready() -> None:
    import threading

    load = threading.Event()

    def loader() -> FakeService:
        load.wait()
        return FakeService()

    async def run() -> None:
        app = create_app({"fake": loader})
        async with client_of(app, unready=True) as client:
            assert (await client.get("/healthz")).status_code == 200
            ready = await client.get("/readyz")
            assert ready.status_code == 503 and ready.json()["status"] == "loading"
            early = await client.post(GENERATIONS, json={"prompt": "an owl"})
            assert early.status_code == 503 and early.json()["error"]["code"] == "loading"
            assert int(early.headers["retry-after"]) >= 1
            assert b'dmd2_rejections_total{reason="loading"} 1.0' in (await client.get("/metrics")).content
            load.set()
            await until(lambda: app.state.models.ready)
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize("compiler", [None, SimpleNamespace(failures=0, unprepared=0)])
def test_ready_says_whether_networks_are_compiled_at_all(compiler: Any) -> None:
    async def run() -> None:
        service = FakeService()
        service.engine.model.placement.compiler = compiler
        async with client_of(fake_app(service)) as client:
            (found,) = (await client.get("/readyz")).json()["models"].values()
            assert found["warm"] and not found["compile_failures"] and found["compiled"] == (compiler is not None)

    asyncio.run(run())


def test_a_device_that_is_gone_is_a_503_and_not_ready() -> None:
    async def run() -> None:
        service = FakeService()
        async with client_of(fake_app(service)) as client:
            service.alive = False
            lost = await client.post(GENERATIONS, json={"prompt": "an owl"})
            assert lost.status_code == 503 and lost.json()["error"]["code"] == "device_lost"
            assert (await client.get("/readyz")).status_code == (await client.get("/healthz")).status_code == 503
            assert (await client.get("/readyz")).json()["status"] == "device_lost"

    asyncio.run(run())
