"""OpenAI's own Python client against the application: it generates, edits and streams."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import openai
import pytest
from PIL import Image

from dmd2.runtime.errors import InvalidInput
from dmd2.service.http.guard import Rules
from tests.service.http.fake import FakeService, client_of, fake_app


@asynccontextmanager
async def asking(
    service: FakeService, rules: Rules | None = None, max_retries: int = 0
) -> AsyncIterator[openai.AsyncOpenAI]:
    app = fake_app(service, rules)
    async with client_of(app):
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        async with openai.AsyncOpenAI(
            api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=max_retries
        ) as it:
            yield it


def image(mode: str = "RGB", form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (64, 48), "red").save(file, form)
    return file.getvalue()


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def test_it_generates() -> None:
    async def run() -> None:
        service = FakeService()
        async with asking(service) as client:
            made = await client.images.generate(
                prompt="an owl", model="fake", n=2, size="32x32", extra_body={"seed": 3, "num_inference_steps": 1}
            )
            assert made.data is not None and [opened(each.b64_json).size for each in made.data] == [(32, 32)] * 2
            assert made.usage is not None and made.usage.input_tokens == 2 and made.size == "32x32"
            assert (service.asked[0].seed, service.asked[0].num_inference_steps) == (3, 1)
            linked = await client.images.generate(prompt="an owl", response_format="url")
            assert linked.data is not None and str(linked.data[0].url).startswith("http://localhost/files/")
            listed = [model async for model in client.models.list()]
            assert [model.id for model in listed] == ["fake"] and await client.models.retrieve("fake") == listed[0]

    asyncio.run(run())


def test_its_errors_are_its_own() -> None:
    async def run() -> None:
        async with asking(FakeService()) as client:
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.images.generate(prompt="an owl", size="63x64")
            assert wrong.value.param == "size" and wrong.value.code == "invalid_value"
            with pytest.raises(openai.NotFoundError):
                await client.images.generate(prompt="an owl", model="other")
            with pytest.raises(openai.NotFoundError, match="expected one of fake"):
                await client.models.retrieve("other")
        async with asking(FakeService(), Rules((b"0" * 32,))) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.images.generate(prompt="an owl")

    asyncio.run(run())


def test_what_took_too_long_is_not_asked_for_again() -> None:
    async def run() -> None:
        service = FakeService(held=True)
        async with asking(service, max_retries=openai.DEFAULT_MAX_RETRIES) as client:
            with pytest.raises(openai.APIStatusError) as late:
                await client.images.generate(prompt="an owl", extra_headers={"X-Request-Timeout": "0.05"})
            assert late.value.status_code == 408 and late.value.code == "timeout"
            assert len(service.asked) <= 1  # none, if the time was over before it was begun

    asyncio.run(run())


def test_it_edits_an_image_with_and_without_a_mask() -> None:
    async def run() -> None:
        service = FakeService()
        async with asking(service) as client:
            made = await client.images.edit(
                image=("red.png", image()),
                mask=image("L"),
                prompt="a cat",
                n=3,
                size="64x48",
                output_format="webp",
                extra_body={"seed": 9, "num_inference_steps": 4, "loras": '[{"path": "owner/name"}]'},
            )
            assert made.data is not None and [opened(each.b64_json).format for each in made.data] == ["WEBP"] * 3
            assert made.usage is not None and made.usage.input_tokens_details.image_tokens == 16 * 12
            await client.images.edit(image=image(form="JPEG"), prompt="a cat", input_fidelity="high")
            await client.images.edit(image=[image()], prompt="a cat", extra_body={"prompt_strength": 0.3})
            await client.images.edit(image=image(), prompt="a cat")
        first, *others = service.asked
        assert (first.image, first.mask, first.num_outputs, first.seed) == (image(), image("L"), 3, 9)
        assert first.prompt_strength == 1 and first.lora_weights == "owner/name:1"
        assert [(each.prompt_strength, each.mask) for each in others] == [(0.5, None), (0.3, None), (0.75, None)]

    asyncio.run(run())


@pytest.mark.parametrize("partial_images", [0, 1, 2, 3])
@pytest.mark.parametrize("edits", [False, True])
def test_it_streams(partial_images: int, edits: bool) -> None:
    """The last of n previews is always a late one; each image is completed once, in order."""

    async def run() -> None:
        async with asking(FakeService()) as client:
            more: Any = {"prompt": "an owl", "n": 2, "stream": True, "partial_images": partial_images}
            if edits:
                stream = await client.images.edit(image=image(), **more, extra_body={"seed": 5})
            else:
                stream = await client.images.generate(**more, extra_body={"seed": 5})
            events = [event async for event in stream]
            kind = "image_edit" if edits else "image_generation"
            partial = [event for event in events if event.type == f"{kind}.partial_image"]
            completed = [event for event in events if event.type == f"{kind}.completed"]
            assert len(events) == len(partial) + len(completed)
            shown = min(partial_images, 2) if edits else partial_images  # three steps, as the strength is 0.75
            assert [event.partial_image_index for event in partial] == [*range(shown)] * 2
            assert [event.seed for event in completed] == [5, 6]
            assert all(opened(event.b64_json).size == (64, 64) for event in events)
            assert completed[0].usage.output_tokens == 256 and completed[0].size == "64x64"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("strength", "partial_images", "shown"),
    [(0.1, 1, 0), (0.25, 3, 0), (0.5, 1, 1), (0.5, 3, 1), (0.75, 1, 1), (0.75, 2, 2), (0.75, 3, 2), (1.0, 3, 3)],
)
def test_previews_of_an_edit_are_those_of_the_steps_that_it_takes(
    strength: float, partial_images: int, shown: int
) -> None:
    async def run() -> None:
        async with asking(FakeService()) as client:
            stream = await client.images.edit(
                image=image(),
                prompt="an owl",
                stream=True,
                partial_images=partial_images,
                extra_body={"prompt_strength": strength},
            )
            events: Any = [event async for event in stream]
            assert [event.partial_image_index for event in events[:-1]] == [*range(shown)]
            assert events[-1].type == "image_edit.completed"

    asyncio.run(run())


def test_what_is_withheld_of_a_stream_is_left_out_or_an_error() -> None:
    async def run() -> None:
        async with asking(FakeService(withheld=(1, 5))) as client:
            more: Any = {"prompt": "an owl", "stream": True}
            stream = await client.images.generate(**more, n=3, extra_body={"seed": 0})
            assert [event.seed async for event in stream] == [0, 2]
            stream = await client.images.generate(**more, extra_body={"seed": 5})
            with pytest.raises(openai.APIError, match="withheld") as blocked:
                [event async for event in stream]
            assert blocked.value.code == "moderation_blocked"

    asyncio.run(run())


def test_an_error_in_a_stream_reaches_its_caller() -> None:
    def fail(_: object) -> Exception:
        return InvalidInput("lora_weights", "no such file")

    async def run() -> None:
        async with asking(FakeService(error=fail)) as client:
            stream = await client.images.generate(prompt="an owl", stream=True)
            with pytest.raises(openai.APIError, match="no such file"):
                [event async for event in stream]

    asyncio.run(run())


def test_a_one_step_stream_has_nothing_to_preview() -> None:
    async def run() -> None:
        async with asking(FakeService()) as client:
            stream = await client.images.generate(prompt="an owl", stream=True, partial_images=3, quality="low")
            assert [event.type async for event in stream] == ["image_generation.completed"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({"prompt": "a"}, {}, None),
        ({"prompt": "a"}, {"mask": image("L")}, "image"),
        ({}, {"image": image()}, "prompt"),
        ({"prompt": "a", "n": "eleven"}, {"image": image()}, "n"),
        ({"prompt": "a", "loras": "["}, {"image": image()}, "loras"),
        ({"prompt": "a", "loras": "[" * 50_000}, {"image": image()}, "loras"),
        ({"prompt": "a", "prompt_strength": "nan"}, {"image": image()}, "prompt_strength"),
        ({"prompt": "a", "prompt_strength": "0"}, {"image": image()}, "prompt_strength"),
        ({"prompt": "a"}, {"image": image(), "other": image()}, "other"),
        ({"prompt": ["a", "b"]}, {"image": image()}, "prompt"),
        ({"prompt": "a", "image": "text"}, {"mask": image()}, "image"),
        ({"prompt": "a", "num_inference_steps": "2"}, {"image": image()}, "num_inference_steps"),
        ({"prompt": "a", "unknown": "1"}, {"image": image()}, "unknown"),
        ({f"f{i}": "1" for i in range(41)}, {"image": image()}, None),
        ({"prompt": "a" * 70_000}, {"image": image()}, None),
    ],
)
def test_a_form_that_is_wrong_is_refused_with_the_field(data: Any, files: Any, param: str | None) -> None:
    async def run() -> httpx.Response:
        async with client_of(fake_app()) as client:
            return await client.post("/v1/images/edits", data=data, files=files)

    answer = asyncio.run(run())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "multipart/form-data; boundary=x", ""])
def test_a_body_that_is_no_form_is_refused(kind: str) -> None:
    async def run() -> httpx.Response:
        async with client_of(fake_app()) as client:
            return await client.post("/v1/images/edits", content=b"--x\r\nnonsense", headers={"content-type": kind})

    answer = asyncio.run(run())
    assert answer.status_code == 400 and set(answer.json()) == {"error"}
