"""The service: the right image for everyone, clear errors, nothing left behind."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import json
import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dmd2.inference.batcher import Busy, Stopped
from dmd2.inference.conditioning import ImageConditioning
from dmd2.inference.engine import Engine
from dmd2.inference.inputs import fitted, fitted_mask
from dmd2.inference.request import ImageRequest, aspect_size
from dmd2.models.adapters.lora import Factors
from dmd2.runtime.errors import UserError
from dmd2.service.images import SLOTS, WAITING, ImageService, OutputImage
from dmd2.weights.guard import Guard
from dmd2.weights.manifest import MANIFEST
from tests.models.adapters.test_lora import ATTENTION, kohya_style
from tests.tiny_sdxl import (
    difference,
    photograph,
)

PATIENCE = 120.0  # seconds, for what takes few on any machine
OWL = ImageRequest(prompt="an owl", seed=5, output_format="png")


@pytest.fixture(scope="module")
def service(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageService]:
    service = ImageService(weights, "cpu", safety=tmp_path_factory.mktemp("none") / "safety", environ={})
    yield service
    service.close()


def replace(request: ImageRequest, **changes: Any) -> ImageRequest:
    return ImageRequest(**(dict(request) | changes))


async def collect(service: ImageService, request: ImageRequest) -> list[OutputImage]:
    return [image async for image in service.generate(request)]


def generate(service: ImageService, request: ImageRequest) -> list[OutputImage]:
    return asyncio.run(collect(service, request))


def opened(image: OutputImage) -> Image.Image:
    assert image.path is not None
    return Image.open(io.BytesIO(image.path.read_bytes()))


def pixels(image: OutputImage) -> Tensor:
    return torch.from_numpy(numpy.array(opened(image))).permute(2, 0, 1)


def test_images_are_the_engines_own(service: ImageService, weights: Path) -> None:
    images = generate(service, replace(OWL, num_outputs=3, width=64, height=32))
    assert [shown.seed for shown in images] == [5, 6, 7]
    expected = Engine(weights, "cpu").generate(["an owl"] * 3, [5, 6, 7], "4", (64, 32))
    for shown, image in zip(images, expected, strict=True):
        assert difference(pixels(shown), image) <= 1
        assert set(shown.seconds) == {"queue", "text", "denoise", "decode", "safety", "encode"}
        assert shown.seconds["denoise"] > 0
    info = opened(images[1]).info
    assert (info["prompt"], info["seed"], info["steps"]) == ("an owl", "6", "4")
    assert info["weights_sha256"] == service.engine.sha256("4")


@pytest.mark.parametrize(("form", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_each_output_format_is_written_with_its_suffix(service: ImageService, form: Any, kind: str) -> None:
    (image,) = generate(service, replace(OWL, output_format=form, num_inference_steps=1))
    assert image.path is not None and image.path.suffix == f".{form}"
    assert opened(image).format == kind


def test_many_clients_at_once_get_their_own_images(service: ImageService) -> None:
    """Other prompts, seeds, sizes and step counts at the same time, as often as they come."""
    requests = [
        ImageRequest(prompt=prompt, width=width, seed=seed, num_inference_steps=steps, output_format="png")
        for prompt in ("an owl", "a red apple " * 30, "a blue book")
        for width in (64, 32)
        for steps in (1, 4)
        for seed in (0, 1, 1000)
    ]

    async def together() -> list[list[OutputImage]]:
        return await asyncio.gather(*(collect(service, request) for request in requests))

    found = asyncio.run(together())
    for request, (image,) in zip(requests, found, strict=True):
        (alone,) = generate(service, request)
        assert difference(pixels(alone), pixels(image)) <= 2
        assert alone.batch_size == 1
        assert image.seed == request.seed
    assert max(image.batch_size for (image,) in found) > 1


def test_the_text_encoder_is_given_the_prompt_as_it_was_asked_for(
    service: ImageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    encode = service.engine.model.encode_text.__call__
    kind = type(service.engine.model.encode_text)
    monkeypatch.setattr(kind, "__call__", lambda self, prompts, size: given.extend(prompts) or encode(prompts, size))
    asked = "  An OWL, 8k?\n(best: quality) " + "x " * 100
    generate(service, replace(OWL, prompt=asked))
    assert given == [asked]


def test_every_seed_of_a_request_may_be_asked_for_by_itself(service: ImageService) -> None:
    found = generate(service, replace(OWL, seed=2**32 - 1, num_outputs=2, num_inference_steps=1))
    assert [image.seed for image in found] == [2**32 - 1, 0]


def test_a_seed_is_drawn_where_none_is_given(service: ImageService) -> None:
    request = replace(OWL, seed=None, num_inference_steps=1)
    seeds = {generate(service, request)[0].seed for _ in range(5)}
    assert len(seeds) == 5 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n"}, "prompt: empty; expected some words"),
        ({"prompt": "x" * 5_000_001}, "prompt: expected at most 5000 characters"),
        ({"prompt": "\U0001f9ff" * 5000}, r"prompt: \d+ tokens .of 5000 characters.; expected at most 1500"),
        ({"control": "c" * 9_000, "control_image": b""}, "control: expected at most 100 characters"),
        ({"lora_weights": "l" * 9_000}, "lora_weights: expected at most 2000 characters"),
        (
            {"lora_weights": "a/b/" + "l" * 9_000 + ".bin"},
            "lora_weights: expected at most 2000 characters",
        ),
        ({"num_inference_steps": 2}, "num_inference_steps 2: expected 1 or 4"),
        ({"width": 66}, "width: 66 .size 66x64.; expected a multiple of 4 pixels"),
        ({"height": 63}, "height: 63 .size 64x63.; expected a multiple of 4 pixels"),
        ({"width": 2048, "height": 516}, "width, height: 2048x516; expected at most 1048576 pixels"),
        ({"aspect_ratio": "1:1", "width": 64}, "aspect_ratio: given beside width or height"),
    ],
)
def test_wrong_requests_name_the_input(service: ImageService, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        generate(service, replace(OWL, **change))
    assert len(str(error.value)) <= 500


@pytest.mark.parametrize("value", ["-1", "1e3", "much", "1000000"])
def test_a_wrong_text_cache_is_named(weights: Path, tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=f"DMD2_TEXT_CACHE={value}: expected megabytes, from 0 to 999999"):
        ImageService(weights, "cpu", safety=tmp_path / "none", environ={"DMD2_TEXT_CACHE": value})


def test_the_device_is_the_callers_else_the_variables(weights: Path, tmp_path: Path) -> None:
    environ = {"DMD2_DEVICE": " tpu "}
    with pytest.raises(UserError, match="device tpu: expected auto, cpu or cuda"):
        ImageService(weights, safety=tmp_path / "none", environ=environ)
    service = ImageService(weights, "cpu", safety=tmp_path / "none", environ=environ)
    assert service.engine.model.device == torch.device("cpu")
    service.close()


def test_aspect_ratios_of_both_families() -> None:
    assert aspect_size("16:9", (1024, 1024), 64) == (1344, 768)  # SDXL was trained on these three
    assert aspect_size("9:21", (1024, 1024), 64) == (640, 1536)
    assert aspect_size("4:3", (1024, 1024), 64) == (1152, 896)
    assert aspect_size("1:1", (64, 64), 16) == (64, 64)
    assert aspect_size("16:9", (64, 64), 16) == (80, 48)


@given(st.integers(1, 21), st.integers(1, 21), st.sampled_from([(64, 16), (512, 64), (1024, 64)]))
def test_aspect_ratios_keep_about_the_area_and_turn_with_their_sides(w: int, h: int, model: tuple[int, int]) -> None:
    side, unit = model
    width, height = aspect_size(f"{w}:{h}", (side, side), unit)
    assert width % unit == height % unit == 0 and min(width, height) >= unit
    assert (height, width) == aspect_size(f"{h}:{w}", (side, side), unit)
    assert abs(width - side * (w / h) ** 0.5) <= unit and abs(height - side * (h / w) ** 0.5) <= unit


def test_an_aspect_ratio_chooses_the_size(service: ImageService) -> None:
    (image,) = generate(service, replace(OWL, aspect_ratio="16:9", num_inference_steps=1))
    assert pixels(image).shape == (3, 48, 80)


def test_a_cancelled_request_leaves_the_queue_and_the_next_one_works(service: ImageService) -> None:
    async def main() -> None:
        first = asyncio.create_task(collect(service, replace(OWL, num_outputs=4)))
        await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert len(await collect(service, OWL)) == 1

    asyncio.run(main())


def test_a_client_that_takes_one_of_four_images_leaves_nothing_running(service: ImageService) -> None:
    async def main() -> int:
        drawn = service.generate(replace(OWL, num_outputs=4))
        async for _ in drawn:
            break
        await drawn.aclose()
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1
    assert not service._batcher._waiting


def test_an_error_of_the_engine_is_one_requests_and_the_next_one_works(
    service: ImageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = service.engine.generate_timed, []

    def out_of_memory(prompts: list[str], *rest: Any) -> Any:
        calls.append(len(prompts))
        if len(prompts) > 1 or "heavy" in prompts[0]:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return real(prompts, *rest)

    monkeypatch.setattr(service.engine, "generate_timed", out_of_memory)
    images = generate(service, replace(OWL, num_outputs=4))
    assert [image.seed for image in images] == [5, 6, 7, 8]
    assert max(calls) > 1
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        generate(service, replace(OWL, prompt="heavy"))
    assert len(generate(service, OWL)) == 1


def test_a_flagged_image_is_withheld_and_the_others_are_not(
    service: ImageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    flagged = generate(service, replace(OWL, seed=6))[0]
    unsafe = pixels(flagged)

    def checker(images: Tensor) -> list[bool]:
        return [difference(image, unsafe) <= 2 for image in images]

    monkeypatch.setattr(service, "_safety", checker)
    request = replace(OWL, num_outputs=3)
    assert [shown.path is None for shown in generate(service, request)] == [False, True, False]
    # A caller may switch it off only where the operator allows it.
    asking = replace(request, disable_safety_checker=True)
    assert [shown.path is None for shown in generate(service, asking)] == [False, True, False]
    monkeypatch.setattr(service, "_unsafe_allowed", True)
    assert [shown.path is None for shown in generate(service, asking)] == [False, False, False]
    assert [shown.path is None for shown in generate(service, request)] == [False, True, False]


def test_start_up_says_which_weights_and_under_which_licence(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {"DMD2_WEIGHTS": str(weights), "DMD2_MAX_BATCH": "3"}
    with caplog.at_level(logging.INFO):
        service = ImageService(None, "cpu", safety=tmp_path / "safety", environ=environ)
    licence = json.loads((weights / MANIFEST).read_text())["licence"]
    assert caplog.messages[0] == f"weights: {weights} (dmd2-emoji), licence: {licence}"
    assert any("images are not checked" in message for message in caplog.messages)
    generate(service, replace(OWL, num_outputs=4))
    service.close()
    assert not service.alive
    with pytest.raises(Stopped, match="closed"):
        generate(service, OWL)


@pytest.mark.parametrize("value", ["0", "many", "129", "-1"])
def test_a_wrong_batch_limit_is_named(weights: Path, tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=f"DMD2_MAX_BATCH={value}: expected a number from 1 to 128"):
        ImageService(weights, "cpu", safety=tmp_path / "none", environ={"DMD2_MAX_BATCH": value})


def test_a_full_queue_is_said_and_what_was_queued_of_the_request_is_dropped(service: ImageService) -> None:
    async def main() -> list[Any]:
        requests = [replace(OWL, num_outputs=4, seed=i) for i in range(WAITING // 4 + 20)]
        tasks = [asyncio.create_task(collect(service, request)) for request in requests]
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(main())
    busy = [answer for answer in answers if isinstance(answer, Busy)]
    assert busy and "waiting already; try again later" in str(busy[0])
    served = [answer for answer in answers if not isinstance(answer, Busy)]
    assert all(len(images) == 4 for images in served) and len(served) >= WAITING // 4
    assert len(generate(service, OWL)) == 1


def test_a_tampered_folder_fails_at_once_by_the_name_of_the_file(weights: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    broken = copy / "unet_1step" / "diffusion_pytorch_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"unet_1step/diffusion_pytorch_model.safetensors: sha256 is"):
        ImageService(copy, "cpu", safety=tmp_path / "none", environ={})


# Images from images


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def extended(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageService]:
    """With two LoRAs and a ControlNet in the folder of weights."""
    folder = Path(shutil.copytree(weights, tmp_path_factory.mktemp("extended") / "weights"))
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / "lora").mkdir()
    for seed, name in enumerate(("style", "other")):
        save_file(kohya_style(unet, "lora_unet", ATTENTION, seed), folder / "lora" / f"{name}.safetensors")
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16))
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    net.save_pretrained(folder / "control" / "canny")
    service = ImageService(folder, "cpu", safety=folder / "safety", environ={})
    yield service
    service.close()


def test_an_image_to_begin_with_is_the_engines_own_in_both_step_counts(service: ImageService) -> None:
    given = photograph()
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 64))
    for steps in (1, 4):
        for strength, drawn_over in ((0.5, None), (1.0, mask), (0.75, mask)):
            request = ImageRequest(
                prompt="an owl",
                seed=5,
                num_outputs=2,
                num_inference_steps=steps,
                output_format="png",
                image=png(given),
                mask=None if drawn_over is None else png(drawn_over),
                prompt_strength=strength,
            )
            edit = ImageConditioning(
                image=fitted(given, (64, 64)),
                mask=None if drawn_over is None else fitted_mask(drawn_over, (64, 64)),
                strength=strength,
            )
            expected = service.engine.generate(["an owl"] * 2, [5, 6], str(steps), (64, 64), edit)
            for shown, image in zip(generate(service, request), expected, strict=True):
                assert difference(pixels(shown), image) <= 2
                info = opened(shown).info
                assert float(info["prompt_strength"]) == strength and len(info["image_sha256"]) == 64


def test_everyone_gets_the_image_of_his_own_image_and_loras(extended: ImageService) -> None:
    """Asked for at the same time, twice each."""
    requests = [OWL, replace(OWL, num_inference_steps=1)]
    half = Image.new("L", (64, 64))  # what is not painted anew tells an untrained network's images apart
    half.paste(255, (0, 0, 64, 32))
    for i in range(4):
        change: dict[str, Any] = {"image": png(photograph(i)), "mask": png(half), "prompt_strength": 0.5}
        requests.append(replace(OWL, **change))
        change |= {"image": png(photograph(i + 4)), "control_image": png(photograph(i))}
        requests.append(replace(OWL, **change))
    for lora in ("style:2", "other:2", "style:-2", "style other:-2"):
        requests.append(replace(OWL, lora_weights=lora))
        requests.append(replace(OWL, lora_weights=lora, image=png(photograph())))

    async def together() -> list[list[OutputImage]]:
        return await asyncio.gather(*(collect(extended, request) for request in requests * 2))

    found = [pixels(shown) for (shown,) in asyncio.run(together())]
    for i, request in enumerate(requests):
        (alone,) = generate(extended, request)
        for image in (found[i], found[i + len(requests)]):
            assert difference(pixels(alone), image) <= 2
    for i, one in enumerate(found[: len(requests)]):
        for other in found[i + 1 : len(requests)]:
            assert difference(one, other) > 2
    assert opened(generate(extended, requests[-2])[0]).info["loras"] == "style:1 other:-2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": b"hello"}, "image: no image; expected PNG, JPEG, WEBP"),
        ({"image": Path("/nowhere/x.png")}, "image: cannot be read .No such file or directory."),
        ({"mask": png(Image.new("L", (64, 64)))}, "mask: given without an image"),
        ({"image": png(photograph()), "prompt_strength": 0.0}, "prompt_strength 0.0: expected greater"),
        ({"control": "canny"}, "control: given without a control_image"),
        ({"control": "depth", "control_image": png(photograph())}, "control: depth; expected one of canny"),
        ({"lora_weights": "nothing"}, "LoRA nothing: expected an https URL, .* weights' own: "),
        ({"lora_weights": "../weights/lora/style"}, "LoRA ../weights/lora/style: expected an https URL"),
        ({"lora_weights": "style:9"}, "LoRA style: scale 9.0; expected -4 to 4"),
        ({"lora_weights": "http://127.0.0.1/x"}, "LoRA: 127.0.0.1: refused"),
    ],
)
def test_what_is_wrong_with_what_is_given(extended: ImageService, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(extended, replace(OWL, **change))


def test_the_service_has_as_many_slots_as_cog_lets_in() -> None:
    predictor = (Path(__file__).parents[2] / "predict.py").read_text(encoding="utf-8")
    assert f"@concurrent(max={SLOTS})" in predictor  # which Cog wants to be a literal


def test_slow_loras_hold_nobody_up_and_end_with_their_clients(
    extended: ImageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each names a server that says nothing for an hour; images are read and drawn meanwhile."""
    guard = Guard(1000, 3600, allowed=(ipaddress.ip_network("127.0.0.0/8"),))
    monkeypatch.setattr(extended.loras, "guard", guard)
    silent = socket.create_server(("127.0.0.1", 0), backlog=64)
    silent.settimeout(PATIENCE)
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"

    async def main() -> list[socket.socket]:
        slow = [
            asyncio.create_task(collect(extended, replace(OWL, lora_weights=f"{url}/{i}"))) for i in range(SLOTS - 1)
        ]
        connections = [(await asyncio.to_thread(silent.accept))[0] for _ in slow]  # none waits for another
        for change in ({"image": png(photograph())}, {"lora_weights": "style"}):
            request = replace(OWL, num_inference_steps=1, **change)
            assert len(await asyncio.wait_for(collect(extended, request), PATIENCE)) == 1
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return connections

    for connection in asyncio.run(main()):
        with connection:
            connection.settimeout(PATIENCE)
            while connection.recv(1000):  # up to the end: it hangs up
                pass
    silent.close()
    assert not extended._downloading and extended.alive


def test_a_lora_for_another_model_fails_alone_and_the_next_request_works(extended: ImageService) -> None:
    pair = {"lora_unet_x.lora_down.weight": torch.zeros(4, 8), "lora_unet_x.lora_up.weight": torch.zeros(8, 4)}
    save_file(pair, extended.loras.folder / "lora" / "foreign.safetensors")
    (before,) = generate(extended, OWL)
    with pytest.raises(UserError, match="LoRA foreign: made for another model: this one's unet has no layer x"):
        generate(extended, replace(OWL, lora_weights="style foreign"))
    (after,) = generate(extended, OWL)
    assert torch.equal(pixels(before), pixels(after))


def test_an_out_of_memory_while_a_lora_is_put_in_leaves_the_next_request_intact(
    extended: ImageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = generate(extended, OWL)
    change, calls = Factors.change, []

    def fails(self: Factors, weight: Tensor, scale: float) -> Tensor:
        calls.append(weight)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return change(self, weight, scale)

    with monkeypatch.context() as patch:
        patch.setattr(Factors, "change", fails)
        with pytest.raises(torch.OutOfMemoryError):
            generate(extended, replace(OWL, lora_weights="other:0.3"))
    (after,) = generate(extended, OWL)
    assert torch.equal(pixels(before), pixels(after))
    assert len(generate(extended, replace(OWL, lora_weights="other:0.3"))) == 1


def test_the_small_vae_by_variable(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vae: big; expected auto, kl or tiny"):
        ImageService(weights, "cpu", safety=tmp_path / "none", environ={"DMD2_VAE": "big"})


# Previews, sizes


def test_previews_come_before_their_images_and_change_nothing(service: ImageService) -> None:
    asked = replace(OWL, num_outputs=2)
    plain = generate(service, asked)
    found = generate(service, replace(asked, previews=True))
    assert [(image.seed, image.step) for image in found] == [
        *((seed, step) for step in (1, 2, 3) for seed in (5, 6)),
        (5, None),
        (6, None),
    ]
    for image, expected in zip(found[-2:], plain, strict=True):
        assert torch.equal(pixels(image), pixels(expected))
    distances = [float((pixels(p).float() - pixels(plain[0]).float()).abs().mean()) for p in found[:6:2]]
    assert distances[0] > distances[2] > 0  # on their way to the image
    assert opened(found[0]).info["preview_of_step"] == "1" and "preview_of_step" not in opened(found[-1]).info
    assert found[0].path is not None and found[0].path.name.startswith("5-preview-1-")
    one = generate(service, replace(asked, previews=True, num_inference_steps=1))
    assert [image.step for image in one] == [None, None]  # nothing comes before the only step


def test_who_asks_for_no_previews_gets_none_of_his_neighbours(service: ImageService) -> None:
    requests = [replace(OWL, seed=i, previews=i % 2 == 0) for i in range(8)]

    async def together() -> list[list[OutputImage]]:
        return await asyncio.gather(*(collect(service, request) for request in requests))

    for request, found in zip(requests, asyncio.run(together()), strict=True):
        assert {image.seed for image in found} == {request.seed}
        assert [image.step for image in found] == ([1, 2, 3, None] if request.previews else [None])


def test_previews_of_a_withheld_image_are_withheld(service: ImageService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_safety", lambda images: [i % 2 == 0 for i in range(len(images))])
    found = generate(service, replace(OWL, num_outputs=2, previews=True))
    assert [(image.seed, image.step, image.path is None) for image in found] == [
        (6, 1, False),
        (6, 2, False),
        (6, 3, False),
        (5, None, True),
        (6, None, False),
    ]


def test_an_error_after_a_preview_reaches_the_client(service: ImageService, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Engine.generate_timed

    def breaks(self: Engine, *args: Any, **named: Any) -> Any:
        drawn(self, *args, **named)
        raise RuntimeError("the lamp went out")

    monkeypatch.setattr(Engine, "generate_timed", breaks)
    with pytest.raises(RuntimeError, match="the lamp went out"):
        generate(service, replace(OWL, previews=True))
    monkeypatch.undo()
    assert len(generate(service, OWL)) == 1


def test_sizes_are_prepared_during_setup(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[Any] = []
    monkeypatch.setattr(Engine, "warm_up", lambda self, modes, sizes, *_: warmed.extend([modes, sizes]))
    ImageService(weights, "cpu", safety=tmp_path / "none", environ={"DMD2_SIZES": " 64x32, 64x64,32x64,"}).close()
    assert warmed == [("1", "4"), [(64, 64), (64, 32), (32, 64)]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("16:9", "DMD2_SIZES 16:9: expected WIDTHxHEIGHT"),
        ("64x64,-1x4", "DMD2_SIZES -1x4: expected WIDTHxHEIGHT"),
        ("64x63", "DMD2_SIZES: height: 63 .size 64x63.; expected a multiple of 4"),
    ],
)
def test_wrong_sizes_are_named(weights: Path, tmp_path: Path, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageService(weights, "cpu", safety=tmp_path / "none", environ={"DMD2_SIZES": value})
