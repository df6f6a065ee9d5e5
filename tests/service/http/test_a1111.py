"""AUTOMATIC1111's API, asked in the shapes in which Open WebUI, SillyTavern and LibreChat ask."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from dmd2.service.http.app import create_app
from dmd2.service.http.guard import Rules
from tests.service.http.fake import FakeService, client_of, fake_app, until

OPEN_WEBUI = {
    "prompt": "an owl",
    "batch_size": 2,
    "width": 512,
    "height": 512,
    "steps": 50,
    "negative_prompt": "cat",
    "cfg_scale": 7.0,
    "sampler_name": "Euler a",
    "scheduler": "Karras",
}
SILLYTAVERN = {
    "prompt": "best quality, an owl <lora:style:0.8> <lora:other>",
    "negative_prompt": "lowres, bad anatomy",
    "sampler_name": "DDIM",
    "scheduler": "Automatic",
    "steps": 20,
    "cfg_scale": 7,
    "width": 64,
    "height": 96,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1.5,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
    "url": "http://localhost:8000",
    "auth": "",
}
LIBRECHAT = {
    "prompt": "an owl",
    "negative_prompt": "cat",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 1024,
    "height": 1024,
}
API = "/sdapi/v1"


def png(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def coded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ask(body: Any, service: FakeService | None = None, path: str = "txt2img") -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(fake_app(service)) as client:
            return await client.post(f"{API}/{path}", json=body)

    return asyncio.run(run())


def test_its_door_has_deadlines_positions_and_timings_as_the_other() -> None:
    async def run() -> None:
        service = FakeService()
        async with client_of(fake_app(service)) as client:
            made = await client.post(f"{API}/txt2img", json={"prompt": "an owl"})
            assert made.headers["x-queue-position"] == "0" and "denoise;dur=10.0" in made.headers["server-timing"]
            service.open.clear()
            late = await client.post(
                f"{API}/txt2img", json={"prompt": "an owl"}, headers={"X-Request-Timeout": "0.01"}
            )
            assert late.status_code == 408 and late.json()["error"] == "timeout"

    asyncio.run(run())


@pytest.mark.parametrize("body", [OPEN_WEBUI, SILLYTAVERN, LIBRECHAT], ids=["Open WebUI", "SillyTavern", "LibreChat"])
def test_a_clients_own_body_is_answered_in_the_shape_that_it_reads(body: dict[str, Any]) -> None:
    service = FakeService()
    answer = ask(body, service)
    assert answer.status_code == 200, answer.text
    said, info = answer.json(), json.loads(answer.json()["info"])
    assert len(said["images"]) == body.get("batch_size", 1)
    assert all(png(image).size == (body["width"], body["height"]) for image in said["images"])
    assert info["all_seeds"][0] == info["seed"] and len(info["infotexts"]) == len(said["images"])
    assert said["parameters"]["prompt"] == body["prompt"]
    (asked,) = service.asked
    assert asked.num_inference_steps == 4 and "lora" not in asked.prompt
    assert asked.lora_weights == ("style:0.8 other:1" if body is SILLYTAVERN else None)


def test_open_webui_chooses_a_model_as_it_does() -> None:
    """It sends back all options that it was told, with another checkpoint; and lists models by title and name."""

    async def run() -> None:
        services = {name: FakeService() for name in ("first", "second")}
        app = create_app({name: lambda service=service: service for name, service in services.items()})
        async with client_of(app, headers={"Authorization": "Basic dXNlcjpwYXNz"}) as client:
            models = (await client.get(f"{API}/sd-models")).json()
            assert [(model["title"], model["model_name"]) for model in models] == [("first",) * 2, ("second",) * 2]
            options = (await client.get(f"{API}/options")).json()
            assert options["sd_model_checkpoint"] == "first"
            chosen = await client.post(f"{API}/options", json=options | {"sd_model_checkpoint": "second"})
            assert chosen.status_code == 200
            assert (await client.get(f"{API}/options")).json()["sd_model_checkpoint"] == "second"
            await client.post(f"{API}/txt2img", json=OPEN_WEBUI)
            assert services["second"].asked and not services["first"].asked
            unknown = await client.post(f"{API}/options", json={"sd_model_checkpoint": "third"})
            assert unknown.status_code == 404 and "expected one of first, second" in unknown.json()["detail"]
            here = {"override_settings": {"sd_model_checkpoint": "first"}}
            await client.post(f"{API}/txt2img", json=OPEN_WEBUI | here)
            assert len(services["first"].asked) == 1

    asyncio.run(run())


def test_sillytavern_finds_all_that_it_looks_for() -> None:
    async def run() -> None:
        async with client_of(fake_app()) as client:
            for path in ("samplers", "schedulers", "upscalers", "latent-upscale-modes"):
                names = (await client.get(f"{API}/{path}")).json()
                assert isinstance(names, list) and all(isinstance(each["name"], str) for each in names)
            for path in ("sd-vae", "sd-modules"):  # it takes the first that answers: AUTOMATIC1111's, Forge's
                assert (await client.get(f"{API}/{path}")).json() == []
            assert "forge_preset" not in (await client.get(f"{API}/options")).json()
            await client.post(f"{API}/options", json={"sd_model_checkpoint": "fake"})
            progress = (await client.get(f"{API}/progress")).json()  # it waits until nothing is loaded any more
            assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0

    asyncio.run(run())


def test_open_webui_asks_without_a_key_by_an_empty_header_and_edits_through_openais_door() -> None:
    async def run() -> None:
        service = FakeService()
        async with client_of(fake_app(service), headers={"Authorization": ""}) as client:
            assert (await client.get(f"{API}/options")).status_code == 200
            assert (await client.post(f"{API}/txt2img", json=OPEN_WEBUI)).status_code == 200
            body = {
                "model": "gpt-image-1",
                "prompt": "an owl",
                "n": 1,
                "size": "64x64",
                "response_format": "b64_json",
            }
            made = await client.post("/v1/images/generations?api-version=2025-04-01", json=body)
            assert made.status_code == 200 and len(made.json()["data"]) == 1
            image = base64.b64decode(coded(Image.new("RGB", (64, 64), "red")))
            for name in ("image", "image[]"):  # of one image, and of a list of them
                fields = {"model": "", "prompt": "a cat", "n": "1", "size": "64x64", "response_format": "b64_json"}
                edited = await client.post(
                    "/v1/images/edits?api-version=2025-04-01",
                    data=fields,
                    files={name: ("a.png", image, "image/png")},
                )
                assert edited.status_code == 200, edited.text
                assert png(edited.json()["data"][0]["b64_json"]).size == (64, 64)
        assert [request.image for request in service.asked[2:]] == [image, image]

    asyncio.run(run())


def test_sillytavern_brings_a_password_and_interrupts_when_its_user_leaves() -> None:
    """It asks for the options before each image, and posts an interrupt as it closes the connection."""

    async def run() -> None:
        service = FakeService(held=True)
        key = "a-key-of-enough-characters"
        rules = Rules(keys=(hashlib.sha256(key.encode()).digest(),), loopback=False)
        basic = base64.b64encode(f"user:{key}".encode()).decode()
        async with client_of(fake_app(service, rules), headers={"Authorization": f"Basic {basic}"}) as client:
            assert (await client.get(f"{API}/options")).status_code == 200
            mine = asyncio.create_task(client.post(f"{API}/txt2img", json=SILLYTAVERN))
            await until(lambda: service.asked)
            assert (await client.post(f"{API}/interrupt")).json() == {}
            assert (await mine).json()["images"] == [] and len(service.cancelled) == 1
            stranger = await client.get(f"{API}/options", headers={"Authorization": "Basic Og=="})  # its empty one
            assert stranger.status_code == 401

    asyncio.run(run())


def test_progress_and_interrupt_are_the_callers_own() -> None:
    async def run() -> None:
        service = FakeService(held=True)
        app = fake_app(service)
        transport = httpx.ASGITransport(app, client=("10.0.0.2", 1))
        async with (
            client_of(app) as client,
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as other,
        ):
            mine = asyncio.create_task(client.post(f"{API}/txt2img", json=OPEN_WEBUI))
            await until(lambda: service.asked)
            assert (await client.get(f"{API}/progress")).json()["state"]["job_count"] == 1
            assert (await other.get(f"{API}/progress")).json()["state"]["job_count"] == 0
            assert (await other.post(f"{API}/interrupt")).status_code == 200
            assert not service.cancelled
            assert (await client.post(f"{API}/interrupt")).status_code == 200
            answer = await mine
            assert answer.status_code == 200 and answer.json()["images"] == []
            assert len(service.cancelled) == 1 and app.state.models.served["fake"].admission.running == 0
            assert (await client.get(f"{API}/progress")).json()["state"]["job_count"] == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "prompt", "loras"),
    [({}, "", None), ({"prompt": ""}, "", None), ({"prompt": " <lora:only> "}, "", "only:1")],
)
def test_no_words_are_a_prompt_too(body: dict[str, Any], prompt: str, loras: str | None) -> None:
    service = FakeService()
    answer = ask(body, service)
    assert answer.status_code == 200, answer.text
    assert [(request.prompt, request.lora_weights) for request in service.asked] == [(prompt, loras)]
    assert json.loads(answer.json()["info"])["prompt"] == ""


@pytest.mark.parametrize(
    "title",
    [
        "one.5",
        "one.5.safetensors",
        "one.5.safetensors [abcd1234]",
        "one.5 [0f]",
        "sd/one.5.ckpt",
        "C:\\sd\\one.5.ckpt",
    ],
)
def test_a_checkpoint_goes_by_its_title_too(title: str) -> None:
    async def run() -> None:
        services = {name: FakeService() for name in ("first", "one.5")}
        app = create_app({name: lambda service=service: service for name, service in services.items()})
        async with client_of(app) as client:
            body = {"prompt": "an owl", "override_settings": {"sd_model_checkpoint": title}}
            assert (await client.post(f"{API}/txt2img", json=body)).status_code == 200
            assert services["one.5"].asked and not services["first"].asked
            assert (await client.post(f"{API}/options", json={"sd_model_checkpoint": title})).status_code == 200
            assert (await client.get(f"{API}/options")).json()["sd_model_checkpoint"] == "one.5"

    asyncio.run(run())


def test_progress_moves_within_an_image_and_is_not_done_before_it_is() -> None:
    async def run() -> None:
        service = FakeService()
        async with client_of(fake_app(service)) as client:

            async def progress() -> Any:
                return (await client.get(f"{API}/progress")).json()

            async def under_way(n: int) -> asyncio.Task[httpx.Response]:
                begun = len(service.asked)
                job = asyncio.create_task(client.post(f"{API}/txt2img", json={"prompt": "an owl", "n_iter": n}))
                await until(lambda: len(service.asked) > begun)
                return job

            service.open.clear()
            first = await under_way(1)  # how long one takes is not known yet
            told = await progress()
            assert told["progress"] == 0.01 and told["state"]["sampling_step"] == 0
            await asyncio.sleep(0.05)  # more than a coarse clock's tick
            service.open.set()
            await first

            service.open.clear()
            second = await under_way(1)
            seen = [await progress()]
            async with asyncio.timeout(120):
                while seen[-1]["progress"] < 0.99:
                    await asyncio.sleep(0.001)
                    seen.append(await progress())
            assert sorted(each["progress"] for each in seen) == [each["progress"] for each in seen]
            assert seen[-1]["progress"] == 0.99 and seen[-1]["state"]["sampling_step"] == 3
            assert {each["state"]["sampling_steps"] for each in seen} == {4}
            service.open.set()
            await second
            assert (await progress())["progress"] == 0.0

    asyncio.run(run())


def test_base64_may_come_in_lines() -> None:
    service = FakeService()
    image = coded(Image.effect_noise((64, 64), 50))
    lines = "\r\n".join(image[at : at + 76] for at in range(0, len(image), 76)) + "\n"
    body = {"prompt": "a cat", "init_images": [lines], "mask": f"data:image/png;base64,{lines}"}
    answer = ask(body, service, "img2img")
    assert answer.status_code == 200, answer.text
    assert service.asked[0].image == service.asked[0].mask == base64.b64decode(image)


@pytest.mark.parametrize("invert", [0, 1])
def test_an_image_and_its_mask_reach_the_service(invert: int) -> None:
    service = FakeService()
    image, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 64, 16))
    body = {"prompt": "a cat", "init_images": [f"data:image/png;base64,{coded(image)}"], "mask": coded(mask)}
    body |= {"inpainting_mask_invert": invert, "denoising_strength": 0.5, "seed": 7, "inpainting_fill": 1}
    answer = ask(body, service, "img2img")
    assert answer.status_code == 200, answer.text
    (asked,) = service.asked
    assert asked.image == base64.b64decode(coded(image)) and asked.prompt_strength == 0.5 and asked.seed == 7
    assert isinstance(asked.mask, bytes)
    with Image.open(io.BytesIO(asked.mask)) as used:
        assert used.getpixel((0, 0)) == (0 if invert else 255) and used.getpixel((0, 63)) == (255 if invert else 0)
    assert "init_images" not in answer.json()["parameters"]


@pytest.mark.parametrize(("steps", "expected"), [(0, 1), (1, 1), (3, 1), (4, 4), (50, 4), (None, 4)])
def test_any_number_of_steps_becomes_a_students(steps: int | None, expected: int) -> None:
    service = FakeService()
    assert ask({"prompt": "an owl", "steps": steps}, service).status_code == 200
    assert service.asked[0].num_inference_steps == expected


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("txt2img", {"prompt": "a" * 5001}, "prompt"),
        ("txt2img", {"width": 8}, "width"),
        ("txt2img", {"width": 63}, "width"),
        ("txt2img", {"batch_size": 4, "n_iter": 3}, "batch_size"),
        ("txt2img", {"seed": -2}, "seed"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": ["x"] * 1000}}, "model"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "other.safetensors [0000000000]"}}, "model"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "[0000000000]"}}, "model"),
        ("img2img", {}, "init_images"),
        ("img2img", {"init_images": ["%%%"]}, "init_images"),
        ("img2img", {"init_images": ["é"]}, "init_images"),
        ("img2img", {"init_images": ["aGk="], "mask": "aGk=", "inpainting_mask_invert": 1}, "mask"),
    ],
)
def test_what_is_wrong_is_one_line_in_automatic1111s_shape(path: str, change: dict[str, Any], said: str) -> None:
    answer = ask({"prompt": "an owl"} | change, None, path)
    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    assert said in answer.json()["detail"] and len(answer.json()["detail"]) <= 500


def test_choices_of_strangers_are_not_remembered_for_ever() -> None:
    from dmd2.service.http.a1111 import MOST_CALLERS, _Callers

    callers = _Callers()
    for number in range(MOST_CALLERS + 10):
        callers.choose(str(number), "fake")
    assert callers.checkpoint("9") is None and callers.checkpoint("10") == "fake"
