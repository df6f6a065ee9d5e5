"""Image-to-image, inpainting, controls, LoRAs, previews and the small VAE through the whole engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img as img2img_module
import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLImg2ImgPipeline
from safetensors.torch import save_file
from torch import Tensor

import dmd2.models.stable_diffusion.model
from dmd2.diffusion.noise import add_noise
from dmd2.inference.conditioning import TEXT_TO_IMAGE, ImageConditioning
from dmd2.inference.engine import Engine
from dmd2.inference.inputs import InputImages, fitted
from dmd2.models.adapters.lora import Lora, read_lora
from dmd2.models.stable_diffusion.codec import LatentCodec, OneHead
from dmd2.models.stable_diffusion.folder import load_codec, load_vae, save_vae
from dmd2.runtime.compiled import Compiler
from dmd2.runtime.errors import UserError
from dmd2.runtime.offload import Offloader, Plan
from dmd2.runtime.placement import Placement
from dmd2.weights.manifest import Student, read_manifest, write_manifest
from tests.models.adapters.test_lora import ATTENTION, kohya_style, with_text
from tests.runtime.test_compiled import needs_8_bit_floats
from tests.tiny_sdxl import (
    PROMPTS,
    SEEDS,
    SIDE,
    SIZE,
    STUDENTS,
    build_adapter,
    build_sdxl_unet,
    build_vae,
    difference,
    frozen,
    noise,
    noise_for_diffusers,
    photograph,
    pipeline,
    pixels,
    save_sdxl,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_models: tuple[Any, Any, Any]) -> Path:
    """SDXL in small, with a T2I-Adapter and a small VAE. Not to be changed: copy it."""
    path = tmp_path_factory.mktemp("sdxl") / "sdxl"
    save_sdxl(path, text_models, build_vae(), four=build_sdxl_unet(0), one=build_sdxl_unet(3))
    build_adapter().save_pretrained(path / "control" / "canny")
    torch.manual_seed(8)
    channels: dict[str, Any] = {
        "encoder_block_out_channels": (16,) * 4,
        "decoder_block_out_channels": (16,) * 4,
        "num_encoder_blocks": (0, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 0),
    }
    save_vae(frozen(AutoencoderTiny(latent_channels=4, **channels)), path / "vae_tiny", {"name": "none"})
    write_manifest(path, read_manifest(path))
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder, "cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return fitted(photograph(), SIZE)


def lora(engine: Engine, folder: Path, state: dict[str, Tensor] | None = None) -> Lora:
    engine.generate(["an owl"], [0], "4")  # loads the network
    unet = engine.model.denoisers["unet"].unet
    path = folder / "some.safetensors"
    save_file(state or kohya_style(unet, "lora_unet", ATTENTION, 0), path)
    return read_lora(path)


@torch.no_grad()
@pytest.mark.parametrize("seeded", [True, False], ids=["batch", "alone"])
def test_an_edited_image_is_that_of_diffusers(
    engine: Engine, image: Tensor, text_models: tuple[Any, Any, Any], seeded: bool
) -> None:
    prompts, seeds = (PROMPTS, SEEDS) if seeded else (PROMPTS[:1], SEEDS[:1])
    drawn = noise(2, seeds)
    pipe = pipeline(StableDiffusionXLImg2ImgPipeline, text_models, build_sdxl_unet(0), build_vae())
    with noise_for_diffusers(drawn, img2img_module, scheduling_lcm):
        settings: dict[str, Any] = {"image": [photograph()] * len(prompts), "strength": 0.6, "guidance_scale": 1.0}
        theirs = pipe(prompts, timesteps=STUDENTS[4], output_type="np", **settings).images
    ours = engine.generate(prompts, seeds, "4", SIZE, ImageConditioning(image=image, strength=0.6))
    expected = pixels(theirs)
    assert expected.float().std() > 5
    assert difference(ours, expected) <= 2


def test_text_to_image_is_the_same_to_the_bit_whatever_was_drawn_before(
    engine: Engine, folder: Path, image: Tensor, text_models: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    before = engine.generate(PROMPTS, SEEDS, "4")
    assert torch.equal(engine.generate(PROMPTS, SEEDS, "4", SIZE, ImageConditioning()), before)
    some = lora(engine, tmp_path, with_text(engine.model.denoisers["unet"].unet, text_models, 5))
    for edit in (
        ImageConditioning(image=image, strength=0.5),
        ImageConditioning(loras=((some, 0.9),)),
        ImageConditioning(control=folder / "control" / "canny", control_image=image),
    ):
        assert difference(engine.generate(PROMPTS, SEEDS, "4", SIZE, edit), before) > 2
        assert torch.equal(engine.generate(PROMPTS, SEEDS, "4"), before)
    # A strength of 1 leaves nothing of the image.
    assert torch.equal(
        engine.generate(PROMPTS, SEEDS, "4", SIZE, ImageConditioning(image=image, strength=1.0)), before
    )


@pytest.mark.parametrize("mode", ["4", "1"])
def test_less_strength_stays_closer_to_the_image(engine: Engine, image: Tensor, mode: str) -> None:
    if mode == "1":
        half, most = (
            engine.generate(["an owl"], [0], mode, SIZE, ImageConditioning(image=image, strength=s))
            for s in (0.5, 0.99)
        )
        assert torch.equal(half, most)  # there is one step, and it is taken whole
        assert not torch.equal(half, engine.generate(["an owl"], [0], mode))
        return
    sigma = engine.model.denoisers["unet"].sigmas[249].reshape(1)  # type: ignore[union-attr]
    seen: list[Tensor] = []
    denoiser: Any = engine.model.denoisers["unet"]
    handle = denoiser.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    engine.generate(["an owl"], [0], mode, SIZE, ImageConditioning(image=image, strength=0.2))
    handle.remove()
    assert len(seen) == 1
    latents = engine.model.codec.encode(image[None])
    expected = add_noise(latents, sigma, noise(1, [0])[0]) / (1 + sigma**2).sqrt()
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_what_is_not_masked_keeps_its_pixels(engine: Engine, image: Tensor) -> None:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[13:37, 5:50] = True  # not on the borders of latents
    for mode in ("4", "1"):
        for strength in (1.0, 0.5):
            edit = ImageConditioning(image=image, mask=mask, strength=strength)
            (found,) = engine.generate(["an owl"], [0], mode, SIZE, edit)
            assert torch.equal(found[:, ~mask], image[:, ~mask])
            assert difference(found[:, mask], image[:, mask]) > 5
    (other,) = engine.generate(["an owl"], [1], "4", SIZE, ImageConditioning(image=image, mask=mask))
    assert torch.equal(other[:, ~mask], image[:, ~mask]) and difference(other, found) > 2


def test_a_mask_frees_every_latent_that_it_touches() -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[9, 3] = True
    edit = ImageConditioning(image=torch.zeros(3, 16, 16, dtype=torch.uint8), mask=mask)
    assert edit._cells(torch.zeros(1, 4, 2, 2)).tolist() == [[[[False, False], [True, False]]]]


def test_images_that_are_not_square(engine: Engine) -> None:
    for size in ((96, 64), (64, 128)):
        given = fitted(photograph(size=size), size)
        edit = ImageConditioning(image=given, mask=torch.ones(size[1], size[0], dtype=torch.bool), strength=0.5)
        assert engine.generate(["an owl"], [0], "4", size, edit).shape == (1, 3, size[1], size[0])
        with pytest.raises(ValueError, match=f"expected {SIDE}x{SIDE}"):
            engine.generate(["an owl"], [0], "4", SIZE, edit)


def test_loras_change_images_and_texts_and_may_be_swapped(
    engine: Engine, text_models: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    unet = lora(engine, tmp_path)
    text = lora(engine, tmp_path, with_text(engine.model.denoisers["unet"].unet, text_models, 5))

    def generate(*loras: tuple[Lora, float], mode: str = "4") -> Tensor:
        return engine.generate(["an owl"], [0], mode, SIZE, ImageConditioning(loras=loras))

    plain, first, second = generate(), generate((unet, 1.0)), generate((text, 1.0))
    for one, other in ((plain, first), (plain, second), (first, second), (first, generate((unet, 0.5)))):
        assert difference(one, other) > 1
    assert torch.equal(generate((unet, 1.0)), first) and torch.equal(generate((text, 1.0)), second)
    assert torch.equal(generate(), plain)
    one_step = generate(mode="1")  # another network, the same text encoders
    assert difference(generate((text, 1.0), mode="1"), one_step) > 1
    assert torch.equal(generate(mode="1"), one_step) and torch.equal(generate(), plain)


def test_a_lora_for_another_model_is_refused_and_leaves_no_trace(engine: Engine, tmp_path: Path) -> None:
    plain = engine.generate(["an owl"], [0], "4")
    good = lora(engine, tmp_path)
    for key, message in (("lora_unet_nothing", "unet has no layer nothing"), ("lora_te1_x", "text_encoder has no")):
        state = {f"{key}.lora_down.weight": torch.zeros(4, 8), f"{key}.lora_up.weight": torch.zeros(8, 4)}
        other = lora(engine, tmp_path, state)
        with pytest.raises(UserError, match=f"made for another model: this one's {message}"):
            engine.generate(["an owl"], [0], "4", SIZE, ImageConditioning(loras=((good, 1.0), (other, 1.0))))
        assert torch.equal(engine.generate(["an owl"], [0], "4"), plain)


def test_records_are_not_used_while_a_lora_is_there(folder: Path, tmp_path: Path) -> None:
    plain, recorded = Engine(folder, "cpu"), Engine(folder, "cpu", trace=True)
    recorded.warm_up(("4",), [SIZE])
    edit = ImageConditioning(loras=((lora(plain, tmp_path), 1.0),))
    for _ in range(2):
        for e in (edit, TEXT_TO_IMAGE):
            expected = plain.generate(["an owl"], [0], "4", SIZE, e)
            assert difference(recorded.generate(["an owl"], [0], "4", SIZE, e), expected) <= 2


def test_a_student_may_be_another_checkpoint_with_a_lora(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """As DMD2's four-step LoRA makes students of other SDXL checkpoints."""
    some = lora(engine, tmp_path)
    expected = engine.generate(["an owl"], [0], "4", SIZE, ImageConditioning(loras=((some, 0.8),)))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "lora").mkdir()
    shutil.copy(tmp_path / "some.safetensors", copy / "lora" / "dmd2.safetensors")
    manifest = read_manifest(copy)
    student = Student(subfolder="unet", timesteps=STUDENTS[4], lora="lora/dmd2.safetensors", lora_scale=0.8)
    write_manifest(copy, manifest.model_copy(update={"students": {4: student}}))
    other = Engine(copy, "cpu")
    assert difference(other.generate(["an owl"], [0], "4"), expected) <= 2
    assert (
        difference(other.generate(["an owl"], [0], "4", SIZE, ImageConditioning(loras=((some, 0.8),))), expected) > 1
    )  # both
    (copy / "lora" / "dmd2.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"dmd2\.safetensors: sha256 is"):
        Engine(copy, "cpu").generate(["an owl"], [0], "4")


def test_a_control_is_followed_in_each_image_of_a_batch(engine: Engine, folder: Path, image: Tensor) -> None:
    edit = ImageConditioning(control=folder / "control" / "canny", control_image=image)
    batch = engine.generate(PROMPTS, SEEDS, "4", SIZE, edit)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], SEEDS[i : i + 1], "4", SIZE, edit)
        assert difference(alone[0], batch[i]) <= 2
    fainter = ImageConditioning(control=edit.control, control_image=image, control_scale=0.2)
    assert difference(engine.generate(PROMPTS, SEEDS, "4", SIZE, fainter), batch) > 1
    assert not torch.equal(engine.generate(PROMPTS, SEEDS, "1", SIZE, edit), engine.generate(PROMPTS, SEEDS, "1"))


def test_previews_show_each_step_but_the_last(engine: Engine, folder: Path) -> None:
    shown: list[tuple[int, list[int], Tensor]] = []
    images, _ = engine.generate_timed(PROMPTS, SEEDS, "4", preview=lambda *told: shown.append(told))
    assert torch.equal(images, engine.generate(PROMPTS, SEEDS, "4"))
    assert [(step, rows) for step, rows, _ in shown] == [(1, [0, 1]), (2, [0, 1]), (3, [0, 1])]
    assert all(image.shape == (2, 3, SIDE, SIDE) and image.dtype == torch.uint8 for *_, image in shown)
    assert type(engine.model.preview_codec.vae).__name__ == "AutoencoderTiny"  # quick
    assert type(engine.model.codec.vae).__name__ == "AutoencoderKL"
    shown.clear()
    engine.generate_timed(["an owl"], [0], "1", preview=lambda *told: shown.append(told))
    assert not shown


def test_controls_are_part_of_the_plan_where_all_of_them_are_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[dict[str, int]] = []

    def place(parameters: dict[str, int], *_: Any, **__: Any) -> Placement:
        planned.append(parameters)
        return Placement()

    monkeypatch.setattr(dmd2.models.stable_diffusion.model, "place", place)
    for trace in (True, False):
        Engine(folder, "cpu", dtype=torch.float32, modes=("4",), trace=trace)
    served, alone = planned
    canny = sum(parameter.numel() for parameter in build_adapter().parameters())
    assert served == alone | {"control/canny": canny} and "unet" in alone


def test_a_vae_on_a_gpu_attends_by_products_compiled_or_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, gpu = torch.tensor, torch.device("cuda")
    monkeypatch.setattr(torch, "tensor", lambda values, **_: made(values))  # there may be none
    for device, expected in ((gpu, True), (torch.device("cpu"), False)):
        waiting = Placement(Plan("12gb", 1), Offloader(device, 1))  # on the host until it is called
        vae = load_codec(folder, "vae", device, torch.float32, waiting).vae
        assert {isinstance(found, OneHead) for found in vae.attn_processors.values()} == {expected}


def test_previews_are_prepared_like_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(torch.device("cpu"), backend="eager")
    placement = Placement(compiler=compiler)
    monkeypatch.setattr(dmd2.models.stable_diffusion.model, "place", lambda *args, **kwargs: placement)
    engine = Engine(folder, "cpu", dtype=torch.float32, modes=("4",), trace=True)
    engine.warm_up(("4",), [SIZE], 1, windows=1)
    with torch.compiler.set_stance("fail_on_recompile"):
        engine.generate_timed(["an owl"], [0], "4", preview=lambda *_: None)
    assert compiler.failures == compiler.unprepared == 0
    torch.compiler.reset()


def test_previews_have_the_small_vae_once_and_wait_like_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Engine(folder, "cpu", dtype=torch.float32, vae="tiny").model
    assert small.preview_codec is small.codec
    offloader = Offloader(torch.device("cpu"), 1)
    placement = Placement(Plan("8gb", 1), offloader)
    monkeypatch.setattr(dmd2.models.stable_diffusion.model, "place", lambda *args, **kwargs: placement)
    engine = Engine(folder, "cpu", dtype=torch.float32)
    there: list[list[str]] = []
    engine.generate_timed(["an owl"], [0], "4", preview=lambda *_: there.append(list(offloader.there)))
    assert there == [["vae_tiny"]] * 3 and list(offloader.there) == ["vae"]


def test_previews_say_whose_they_are_where_prompts_are_of_unequal_length(engine: Engine) -> None:
    prompts = ["an owl", "a red apple " * 50, "a blue book"]
    alone: dict[int, list[Tensor]] = {}
    for i, prompt in enumerate(prompts):
        engine.generate_timed(
            [prompt], [i], "4", preview=lambda _, __, image, i=i: alone.setdefault(i, []).append(image[0])
        )
    together: dict[int, list[Tensor]] = {}

    def note(step: int, rows: list[int], image: Tensor) -> None:
        for row, each in zip(rows, image, strict=True):
            together.setdefault(row, []).append(each)
            assert len(together[row]) == step

    engine.generate_timed(prompts, [0, 1, 2], "4", preview=note)
    assert sorted(together) == [0, 1, 2]
    for i in together:
        assert all(difference(a, b) <= 1 for a, b in zip(alone[i], together[i], strict=True))


def test_vae_tiny_decodes_with_taesdxl(folder: Path, engine: Engine, weights: Path, tmp_path: Path) -> None:
    tiny = Engine(folder, "cpu", vae="tiny")
    assert type(tiny.model.codec.vae).__name__ == "AutoencoderTiny"
    assert type(Engine(folder, "cpu", vae="auto").model.codec.vae).__name__ == "AutoencoderTiny"
    assert difference(tiny.generate(["an owl"], [0], "1"), engine.generate(["an owl"], [0], "1")) > 2
    Engine(weights, "cpu", vae="tiny")  # the embedded model's own VAE is small
    copy = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("vae_tiny", "unet*")))
    with pytest.raises(UserError, match="has no vae_tiny; get it by scripts/download-weights --vae kl,tiny"):
        Engine(copy, "cpu", vae="tiny")
    assert type(Engine(copy, "cpu", vae="auto").model.codec.vae).__name__ == "AutoencoderKL"
    with pytest.raises(UserError, match="vae: small; expected auto, kl or tiny"):
        Engine(folder, "cpu", vae="small")


def test_edits_that_do_not_go_together(engine: Engine, folder: Path, image: Tensor) -> None:
    mask = torch.ones(SIDE, SIDE, dtype=torch.bool)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mask": mask}, "mask: given without an image"),
        ({"strength": 0.5}, "prompt_strength: given without an image"),
        ({"image": image, "strength": 0.0}, r"prompt_strength: 0\.0; expected more than 0, at most 1"),
        ({"image": image, "strength": 1.1}, r"prompt_strength: 1\.1"),
        ({"image": image, "strength": float("nan")}, "prompt_strength: nan"),
        ({"control_image": image}, "control, control_image: expected both or neither"),
        ({"control": folder}, "control, control_image: expected both or neither"),
    ]
    for settings, message in wrong:
        with pytest.raises(UserError, match=message):
            ImageConditioning(**settings)


def test_a_teachers_own_sampler_takes_no_image(weights: Path) -> None:
    engine = Engine(weights, "cpu")
    edit = ImageConditioning(image=torch.zeros(3, 64, 64, dtype=torch.uint8), strength=0.5)
    with pytest.raises(UserError, match="steps teacher: takes no image and no control"):
        engine.generate(["an owl"], [0], "teacher", (64, 64), edit)
    assert engine.generate(["an owl"], [0], "teacher-4", (64, 64), edit).shape == (1, 3, 64, 64)


def test_the_embedded_model_takes_images_too(weights: Path) -> None:
    """A VAE that is small, and predicts v."""
    engine, given = Engine(weights, "cpu"), fitted(photograph(), (64, 64))
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32] = True
    for mode in ("1", "4"):
        edited = engine.generate(["an owl"], [0], mode, (64, 64), ImageConditioning(image=given, strength=0.5))
        assert difference(edited, engine.generate(["an owl"], [0], mode)) > 2
        (painted,) = engine.generate(["an owl"], [0], mode, (64, 64), ImageConditioning(image=given, mask=mask))
        assert torch.equal(painted[:, 32:], given[:, 32:])


# Images that cannot be


@pytest.mark.parametrize("where", ["unet", "vae"])
def test_an_image_that_is_not_finite_is_an_error_not_black(folder: Path, where: str) -> None:
    """fp16 overflows to infinity, and infinity becomes NaN."""
    engine = Engine(folder, "cpu", modes=("1",))
    expected = engine.generate(["an owl"], [0], "1")
    network: Any = engine.model.codec.vae.decoder if where == "vae" else engine.model.denoisers["unet_1step"].unet
    weight = network.conv_out.weight
    before = weight.clone()
    weight.fill_(float("inf"))
    with pytest.raises(ArithmeticError, match=r"the decoded image is not finite \(torch\.float32\)"):
        engine.generate(["an owl"], [0], "1")
    weight.copy_(before)
    assert torch.equal(engine.generate(["an owl"], [0], "1"), expected)


@pytest.mark.parametrize(
    ("upcast", "expected"), [(True, torch.float32), (False, torch.float16), (None, torch.float16)]
)
def test_a_vae_that_overflows_in_fp16_runs_in_fp32(
    tmp_path: Path, upcast: bool | None, expected: torch.dtype
) -> None:
    build_vae().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["force_upcast"]
    (tmp_path / "config.json").write_text(json.dumps(config | ({} if upcast is None else {"force_upcast": upcast})))
    loaded = load_vae(tmp_path, torch.device("cpu"), torch.float16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    codec = LatentCodec(loaded)
    assert codec.decode(codec.encode(images)).shape == images.shape
    assert load_vae(tmp_path, torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16


# What callers give


def test_keys_keep_apart_what_must_not_ride_together(image: Tensor) -> None:
    one, two = Lora("one", "1", {}), Lora("two", "2", {})
    assert TEXT_TO_IMAGE.key == ImageConditioning().key
    assert ImageConditioning(loras=((one, 1.0),)).key == ImageConditioning(loras=((Lora("same", "1", {}), 1.0),)).key
    edits = [
        TEXT_TO_IMAGE,
        ImageConditioning(loras=((one, 1.0),)),
        ImageConditioning(loras=((one, 0.5),)),
        ImageConditioning(loras=((two, 1.0),)),
        ImageConditioning(loras=((one, 1.0), (two, 1.0))),
        ImageConditioning(image=image),
        ImageConditioning(image=image),
    ]
    assert len({edit.key for edit in edits}) == len(edits)


def test_facts_tell_apart_what_was_given(image: Tensor) -> None:
    assert TEXT_TO_IMAGE.metadata == {}
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    edit = ImageConditioning(image=image, mask=mask, strength=0.5, loras=((Lora("one", "1", {}), 0.75),))
    assert edit.metadata["loras"] == "one:0.75" and edit.metadata["prompt_strength"] == 0.5
    assert set(edit.metadata) == {"loras", "prompt_strength", "image_sha256", "mask_sha256"}
    assert (
        ImageConditioning(image=image).metadata["image_sha256"]
        != ImageConditioning(image=image.flip(1)).metadata["image_sha256"]
    )
    control = ImageConditioning(control=Path("x/canny"), control_image=image, control_scale=0.5)
    assert control.metadata["control"] == "canny:0.5"


def test_sizes_follow_the_given_image_unless_one_is_asked_for() -> None:
    def size(image: tuple[int, int], asked: tuple[int, int] | None = None) -> tuple[int, int]:
        return InputImages(image=photograph(size=image)).size(asked, (1024, 1024), 64)

    assert size((4000, 3000)) == (1152, 896)
    assert size((100, 100)) == (1024, 1024)
    assert size((5000, 10)) == (2048, 512)
    assert size((10, 10), (512, 768)) == (512, 768)
    assert InputImages().size(None, (1024, 1024), 64) == (1024, 1024)


@needs_8_bit_floats
@torch.no_grad()
def test_8_bit_networks_take_images_and_loras_also_where_they_take_turns(
    engine: Engine, folder: Path, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA goes into the 16-bit weights on the host, and what is rounded of them anew is what is run."""
    some = lora(engine, tmp_path)
    offloader = Offloader(torch.device("cpu"), 1)  # room for one network
    monkeypatch.setenv("DMD2_COMPILE", "off")
    engines = []
    for placement in (Placement(go_fast=True), Placement(Plan("8gb", 1), offloader, go_fast=True)):
        monkeypatch.setattr("dmd2.models.stable_diffusion.model.place", lambda *_, found=placement, **__: found)
        engines.append(Engine(folder, "cpu", dtype=torch.float32, modes=("4",)))
    edits = {
        "text": ImageConditioning(),
        "image": ImageConditioning(image=image, strength=0.5),
        "LoRA": ImageConditioning(loras=((some, 9.0),)),
        "LoRA on an image": ImageConditioning(image=image, strength=0.5, loras=((some, 6.0),)),
        "text again": ImageConditioning(),
    }

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a.float() - b.float()).abs().mean())

    made: dict[str, Tensor] = {}
    for name, edit in edits.items():
        made[name], swapped = (each.generate(PROMPTS, SEEDS, "4", SIZE, edit) for each in engines)
        assert apart(swapped, made[name]) < 0.01, name  # a VAE that takes turns encodes one by one
        exact = engine.generate(PROMPTS, SEEDS, "4", SIZE, edit)
        assert 0 < apart(made[name], exact) < 1, name
    assert list(offloader.there) == ["vae"]
    assert torch.equal(made["text again"], made["text"])
    assert apart(made["LoRA"], made["text"]) > 1 and apart(made["LoRA on an image"], made["image"]) > 1
