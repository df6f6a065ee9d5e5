"""What stands before the routes: keys, rates, hosts and origins, bounds on bodies, headers, logs, metrics."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.requests import Request

from dmd2.runtime.errors import UserError
from dmd2.service.http import guard
from dmd2.service.http.app import create_app
from dmd2.service.http.guard import MOST_CALLERS, Rates, Rules, read_keys
from dmd2.service.http.refusal import Refusal
from tests.service.http.fake import FakeService, client_of, fake_app, until

GENERATIONS = "/v1/images/generations"
KEYS = ("first-key-0123456789", "second-key-0123456789")
BODY = {"prompt": "an owl"}
JSON = {"content-type": "application/json"}


@pytest.fixture
def keys(tmp_path: Path) -> tuple[bytes, ...]:
    path = tmp_path / "keys.txt"
    path.write_text(f"# of the office\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    return read_keys(path)


def answers(rules: Rules, *requests: tuple[str, str, dict[str, Any]], service: Any = None) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with client_of(fake_app(service, rules)) as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(run())


def bearer(key: str) -> dict[str, Any]:
    return {"json": BODY, "headers": {"Authorization": f"Bearer {key}"}}


def basic(text: str) -> dict[str, Any]:
    return {"json": BODY, "headers": {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}}


def test_only_who_brings_a_key_gets_in(keys: tuple[bytes, ...]) -> None:
    service = FakeService()
    rules = Rules(keys)
    good = [bearer(KEYS[0]), bearer(KEYS[1]), basic(KEYS[0]), basic(f"user:{KEYS[1]}")]
    bad = [
        {"json": BODY},
        bearer(""),
        bearer(KEYS[0][:-1]),
        bearer(KEYS[0] + "x"),
        bearer(KEYS[0].upper()),
        basic("user:x"),
    ]
    bad += [
        {"json": BODY, "headers": {"Authorization": text}} for text in ("Basic %%%", "Bearer", KEYS[0], "Basic w7w=")
    ]
    found = answers(rules, *[("POST", GENERATIONS, more) for more in [*good, *bad]], service=service)
    assert [answer.status_code for answer in found] == [200] * len(good) + [401] * len(bad)
    assert len(service.asked) == len(good)
    assert found[-1].headers["www-authenticate"] == "Bearer"
    assert found[-1].json()["error"]["code"] == "invalid_api_key"


def test_every_route_but_the_open_ones_wants_a_key(keys: tuple[bytes, ...]) -> None:
    app = fake_app(rules=Rules(keys))
    routes = [(method, path) for path, methods in app.openapi()["paths"].items() for method in methods]

    async def run() -> dict[str, int]:
        async with client_of(app) as client:
            return {
                path: (await client.request(method.upper(), path, json={})).status_code for method, path in routes
            }

    statuses = asyncio.run(run())
    assert {path for path, status in statuses.items() if status != 401} == {"/healthz", "/readyz", "/files/{name}"}
    assert statuses["/metrics"] == 401


@pytest.mark.parametrize("wanted", [False, True])
def test_the_document_says_how_requests_are_refused_and_where_a_key_is_needed(
    wanted: bool, keys: tuple[bytes, ...]
) -> None:
    document = fake_app(rules=Rules(keys if wanted else ())).openapi()
    security = [{"key": []}] if wanted else [{"key": []}, {}]
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"] and {"403", "421", "503"} <= operation["responses"].keys()
            is_open = path in ("/healthz", "/readyz", "/files/{name}")
            assert operation["security"] == ([] if is_open else security)
            assert ("401" in operation["responses"]) != is_open
    assert "ValidationError" not in json.dumps(document)


def test_keys_are_compared_in_constant_time(keys: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is given, each key's digest is compared, whole, by what compares in constant time."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    for given_key in (KEYS[0], KEYS[1], "x", "é" * 1000):
        compared.clear()
        guard.matching([given_key], keys)
        assert [b for _, b in compared] == list(keys) and {len(a) for a, _ in compared} == {32}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=200))
def test_any_key_comes_as_it_is_by_each_of_the_ways(key: str) -> None:
    coded = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
    assert re.fullmatch(r"[\w.-]+", f"key64.{coded}", re.ASCII)  # what browsers let stand in a subprotocol
    basic = base64.b64encode(f"user:{key}".encode()).decode()
    for name, value in (
        ("authorization", f"Bearer {key}"),
        ("authorization", f"Basic {basic}"),
        ("sec-websocket-protocol", f"dmd2, key64.{coded}"),
        ("sec-websocket-protocol", f"key64.{coded},dmd2"),
    ):
        assert key in guard.presented(Headers({name: value}))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(max_codepoint=255), max_size=100))
def test_whatever_stands_there_for_a_key_is_read_without_an_error(text: str) -> None:
    for name, value in (
        ("authorization", text),
        ("authorization", f"Bearer {text}"),
        ("authorization", f"Basic {text}"),
        ("sec-websocket-protocol", f"dmd2, key64.{text}"),
        ("sec-websocket-protocol", f"{text}," * 100),
    ):
        found = guard.presented(Headers(raw=[(name.encode(), value.encode("latin-1"))]))
        assert len(found) <= 8 and guard.matching(found, (b"\0" * 32,)) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no key"),
        ("# only this\n", "holds no key"),
        ("short", "at least 16"),
        ("two words 0123456789", "at least 16"),
    ],
)
def test_a_file_of_bad_keys_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_keys(path)
    assert content.strip() == "" or content.strip() not in str(error.value)


def test_a_key_may_ask_so_often_and_others_do_not_pay_for_it(keys: tuple[bytes, ...]) -> None:
    rules = Rules(keys, per_minute=3)
    found = answers(rules, *[("POST", GENERATIONS, bearer(KEYS[0]))] * 5, ("POST", GENERATIONS, bearer(KEYS[1])))
    assert [answer.status_code for answer in found] == [200, 200, 200, 429, 429, 200]
    assert 1 <= int(found[3].headers["retry-after"]) <= 20
    assert found[3].json()["error"]["type"] == "rate_limit_error"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 120), st.lists(st.floats(0, 90), min_size=1, max_size=80))
def test_rates_hold_over_any_minute_and_who_waits_as_told_passes(per_minute: int, pauses: list[float]) -> None:
    now = [0.0]
    rates = Rates(per_minute, lambda: now[0])
    passed: list[float] = []
    for pause in pauses:
        now[0] += pause
        try:
            rates.check("a")
        except Refusal as refusal:
            now[0] += int(dict(refusal.headers or {})["Retry-After"])
            rates.check("a")
        passed.append(now[0])
    # A full bucket and what flows into it meanwhile.
    assert all(sum(start <= at < start + 60 for at in passed) <= 2 * per_minute for start in passed)


def test_rates_of_strangers_are_not_remembered_for_ever() -> None:
    rates = Rates(1, lambda: 0.0)
    for number in range(MOST_CALLERS + 50):
        rates.check(str(number))
    assert len(rates._left) == MOST_CALLERS
    with pytest.raises(Refusal):
        rates.check(str(MOST_CALLERS + 49))


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "[::2]", "[", "localhost.evil.example", ""])
def test_a_loopback_server_answers_to_no_other_name(host: str) -> None:
    """Else a web page could reach it by a name of its own that it lets point here."""
    (refused,) = answers(Rules(), ("POST", GENERATIONS, {"json": BODY, "headers": {"Host": host}}))
    assert refused.status_code == 421
    (public,) = answers(Rules(loopback=False), ("POST", GENERATIONS, {"json": BODY, "headers": {"Host": host}}))
    assert public.status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_a_loopback_server_answers_to_its_own_names(host: str) -> None:
    (served,) = answers(Rules(), ("POST", GENERATIONS, {"json": BODY, "headers": {"Host": host}}))
    assert served.status_code == 200


def test_other_pages_may_not_call_unless_they_are_named() -> None:
    rules = Rules(origins=("https://good.example",))
    headers = [
        {"Origin": origin}
        for origin in ("https://good.example", "http://localhost", "https://evil.example", "null", "[")
    ]
    found = answers(rules, *[("POST", GENERATIONS, {"json": BODY, "headers": each}) for each in headers])
    assert [answer.status_code for answer in found] == [200, 200, 403, 403, 403]
    assert found[0].headers["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-origin" not in found[2].headers
    (closed,) = answers(Rules(), ("POST", GENERATIONS, {"json": BODY, "headers": headers[0]}))
    assert closed.status_code == 403 and "access-control-allow-origin" not in closed.headers
    exposed = found[0].headers["access-control-expose-headers"].lower().split(", ")
    assert {"server-timing", "retry-after", "x-request-id", "x-should-retry", "x-queue-position"} == set(exposed)
    preflight = headers[0] | {"Access-Control-Request-Method": "POST"}
    preflight |= {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os,x-stainless-timeout"}
    with_cors, without = (
        answers(each, ("OPTIONS", GENERATIONS, {"headers": preflight}))[0] for each in (rules, Rules())
    )
    assert with_cors.status_code == 200 and without.status_code in (403, 405)
    assert "x-stainless-timeout" in with_cors.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in with_cors.headers


def test_bodies_are_bounded_whether_or_not_they_say_their_length() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    rules = Rules(body=5000)
    long, json_type = b" " * 5001, {"content-type": "application/json"}
    found = answers(
        rules,
        ("POST", GENERATIONS, {"content": long, "headers": json_type}),
        ("POST", GENERATIONS, {"content": chunks(), "headers": json_type}),
        ("POST", GENERATIONS, {"content": b"{}", "headers": json_type | {"content-length": "-1"}}),
        ("POST", "/v1/images/edits", {"data": {"prompt": "x"}, "files": {"image": b"x" * 5001}}),
        ("POST", GENERATIONS, {"content": json.dumps(BODY).ljust(5000).encode(), "headers": json_type}),
    )
    assert [answer.status_code for answer in found] == [413, 413, 413, 413, 200]
    assert {answer.json()["error"]["code"] for answer in found[:4]} == {"too_large"}


def test_only_a_request_with_images_may_be_large() -> None:
    """What a megabyte of JSON becomes in memory is bound enough for one that has no image."""
    large = {"content": b"[" + b"0," * 600_000 + b"0]", "headers": {"content-type": "application/json"}}
    form = {"data": {"prompt": "x"}, "files": {"image": b"x" * 2_000_000}}
    paths = (GENERATIONS, "/sdapi/v1/txt2img", "/sdapi/v1/options", "/nowhere")
    image = base64.b64encode(b"x" * 2_000_000).decode()
    with_image = {"json": {"prompt": "x", "init_images": [f"data:image/png;base64,{image}"]}}
    found = answers(
        Rules(),
        *[("POST", path, large) for path in paths],
        ("POST", "/v1/images/edits", form),
        ("POST", "/sdapi/v1/img2img", with_image),
    )
    assert [answer.status_code for answer in found] == [413] * 4 + [200] * 2


@pytest.mark.parametrize("value", ["{}", "[", '{"a":', '"a"', "0"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_large_request_of_many_values_is_refused_before_it_is_parsed(
    value: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []

    async def parse(request: Request) -> Any:
        parsed.append(len(await request.body()))
        return {}

    monkeypatch.setattr(Request, "json", parse)
    comma = "" if value[-1] in "[:" else ","
    found = answers(
        Rules(),
        *[
            ("POST", "/sdapi/v1/img2img", {"content": text.encode(encoding), "headers": JSON})
            for text in ((value + comma) * 11_000 + " " * 1_000_000, (value + comma) * 11_000, " " * 1_000_001)
        ],
    )
    assert found[0].status_code == 413 and "10000 values" in found[0].json()["detail"]
    assert len(parsed) == 2  # a small one, and a large one of one value


def test_all_bodies_together_are_bounded_and_forgotten_after_the_answer() -> None:
    async def run() -> None:
        service = FakeService(held=True)
        app = fake_app(service, Rules(body=1000, bodies=1500))
        padded = {"content": json.dumps(BODY).ljust(900).encode(), "headers": {"content-type": "application/json"}}
        async with client_of(app) as client:
            first = asyncio.create_task(client.post(GENERATIONS, **padded))
            while not service.asked:
                await asyncio.sleep(0.001)
            second = await client.post(GENERATIONS, **padded)
            assert second.status_code == 503 and int(second.headers["retry-after"]) >= 1
            service.open.set()
            assert (await first).status_code == 200
            for _ in range(3):
                assert (await client.post(GENERATIONS, **padded)).status_code == 200

    asyncio.run(run())


def test_who_asks_of_a_busy_server_is_told_when_to_return_and_its_health_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "REQUESTS", 2)

    async def run() -> None:
        service = FakeService(held=True)
        async with client_of(fake_app(service)) as client:
            first = [asyncio.create_task(client.post(GENERATIONS, json=BODY)) for _ in range(2)]
            await until(lambda: len(service.asked) == 2)
            refused = await client.get("/v1/models")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "busy"
            assert int(refused.headers["retry-after"]) >= 1
            assert [(await client.get(path)).status_code for path in ("/healthz", "/readyz")] == [200, 200]
            service.open.set()
            assert [(await task).status_code for task in first] == [200, 200]
            assert 'dmd2_rejections_total{reason="busy"} 1.0' in (await client.get("/metrics")).text

    asyncio.run(run())


@pytest.mark.parametrize("stops", [False, True])
def test_a_body_that_comes_too_slowly_is_given_up(stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it stops, or goes on byte by byte."""
    monkeypatch.setattr(guard, "READ", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" "
            await (asyncio.Event().wait() if stops else asyncio.sleep(0.01))

    (answer,) = answers(Rules(), ("POST", GENERATIONS, {"content": slow(), "headers": JSON}))
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "too_slow"


def test_a_large_body_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "READ", 0.05)
    monkeypatch.setattr(guard, "SLOWEST", 1)

    async def large() -> AsyncIterator[bytes]:
        yield json.dumps(BODY).ljust(5000).encode()
        await asyncio.sleep(0.1)
        yield b" "

    (answer,) = answers(Rules(), ("POST", GENERATIONS, {"content": large(), "headers": JSON}))
    assert answer.status_code == 200


def test_every_answer_carries_the_strict_headers(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "page.js").write_text("1")

    async def run() -> list[httpx.Response]:
        app = create_app({"fake": FakeService}, page=tmp_path)
        async with client_of(app) as client:
            paths = ["/", "/page.js", "/healthz", "/v1/models", "/nowhere", "/metrics", "/openapi.json"]
            return [await client.get(path) for path in paths]

    found = asyncio.run(run())
    assert [answer.status_code for answer in found] == [200, 200, 200, 200, 404, 200, 200]
    for answer in found:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert "script-src 'self'" in found[0].headers["content-security-policy"]
    assert "script-src" not in found[3].headers["content-security-policy"]


def test_an_error_that_nobody_foresaw_is_answered_logged_and_counted_as_any_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rules = Rules(origins=("https://good.example",))

    async def run() -> tuple[httpx.Response, httpx.Response]:
        app = fake_app(rules=rules)

        @app.get("/broken")
        async def broken() -> None:
            raise KeyError("what only the log may say")

        async with client_of(app) as client:
            headers = {"Origin": "https://good.example"}
            return await client.get("/broken", headers=headers), await client.get("/metrics")

    with caplog.at_level(logging.INFO):
        failed, metrics = asyncio.run(run())
    error = failed.json()["error"]
    assert (failed.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert "what only the log" not in failed.text and "what only the log" in caplog.text
    assert failed.headers["x-content-type-options"] == "nosniff" and "content-security-policy" in failed.headers
    assert failed.headers["access-control-allow-origin"] == "https://good.example"
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "dmd2.access"]
    assert (lines[0]["status"], lines[0]["request"]) == (500, failed.headers["x-request-id"])
    assert lines[0]["code"] == "internal_error"
    assert 'dmd2_errors_total{code="internal_error"} 1.0' in metrics.text
    assert 'dmd2_requests_total{route="/broken",status="500"} 1.0' in metrics.text


def test_the_page_needs_no_key_but_what_it_calls_does(tmp_path: Path, keys: tuple[bytes, ...]) -> None:
    page = tmp_path / "page"
    page.mkdir()
    (page / "index.html").write_text("<!doctype html>")

    async def run() -> list[int]:
        async with client_of(create_app({"fake": FakeService}, Rules(keys), page=page)) as client:
            paths = ["/", "/index.html", "/v1/models", "/../keys.txt", "/%2e%2e/keys.txt"]
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(run()) == [200, 200, 401, 401, 401]


def test_a_path_that_is_none_is_said_to_be_none_whatever_the_method() -> None:
    """With the real page, whose files have no other method."""

    async def run() -> dict[str, int]:
        async with client_of(create_app({"fake": FakeService})) as client:
            paths = ["/v1/images/variations", "/sdapi/v1/png-info", "/", "/style.css", GENERATIONS]
            answers = {path: await client.put(path) for path in paths}
            assert [answer.headers.get("allow") for answer in answers.values()][3:] == ["GET, HEAD", "POST"]
            found = {path: answer.status_code for path, answer in answers.items()}
            return found | {f"GET {path}": (await client.get(path)).status_code for path in ("/style.css", "/style")}

    assert list(asyncio.run(run()).values()) == [404, 404, 405, 405, 405, 200, 404]


@pytest.mark.parametrize("prompts", [False, True])
def test_the_access_log_is_json_and_holds_prompts_only_if_asked(
    caplog: pytest.LogCaptureFixture, keys: tuple[bytes, ...], prompts: bool
) -> None:
    rules = Rules(keys, log_prompts=prompts)
    secret = "a secret\nprompt"
    with caplog.at_level(logging.INFO, "dmd2.access"):
        more = bearer(KEYS[0]) | {"json": {"prompt": secret, "n": 2, "seed": 7}}
        answers(rules, ("POST", f"{GENERATIONS}?prompt=hidden", more), ("GET", "/nowhere%0A", {}))
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "dmd2.access"]
    assert [line["status"] for line in lines] == [200, 401]
    first = lines[0]
    assert (first["path"], first["method"], first["model"], first["n"], first["seed"]) == (
        GENERATIONS,
        "POST",
        "fake",
        2,
        7,
    )
    assert first["caller"].startswith("key-") and first["seconds"] >= 0 and first["position"] == 0
    said = caplog.text
    assert (first.get("prompt") == "a secret prompt") == prompts and ("secret" in said) == prompts
    assert "hidden" not in said and all(key not in said for key in KEYS)


def test_metrics_tell_of_everything() -> None:
    def fail(request: Any) -> Exception | None:
        return RuntimeError("broken") if request.prompt == "broken" else None

    requests = [
        ("POST", GENERATIONS, {"json": BODY | {"n": 3}}),
        ("POST", GENERATIONS, {"json": {"prompt": "broken"}}),
    ]
    requests += [("POST", GENERATIONS, {"json": {}}), ("GET", "/nowhere/secret", {}), ("GET", "/metrics", {})]
    found = answers(Rules(), *requests, service=FakeService(error=fail))
    text = found[-1].text
    for line in (
        'dmd2_images_total{model="fake"} 3.0',
        'dmd2_batch_size_count{model="fake"} 3.0',
        'dmd2_stage_seconds_count{model="fake",stage="denoise"} 3.0',
        'dmd2_errors_total{code="generation_failed"} 1.0',
        'dmd2_requests_total{route="/v1/images/generations",status="200"} 1.0',
        'dmd2_requests_total{route="/v1/images/generations",status="400"} 1.0',
        'dmd2_requests_total{route="other",status="404"} 1.0',
        'dmd2_queue_depth{model="fake"} 0.0',
        'dmd2_running_images{model="fake"} 0.0',
        'dmd2_compile_failures{model="fake"} 0.0',
        'dmd2_unprepared_calls{model="fake"} 0.0',
    ):
        assert line in text.splitlines(), text
    (memory,) = (line for line in text.splitlines() if line.startswith("dmd2_device_memory_bytes{"))
    assert 'device="cpu"' in memory and float(memory.split()[-1]) > 1e6
    assert "secret" not in text
