"""Students of SD 1.5: one text encoder, nothing added to the timestep; against diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img as img2img_module
import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import pytest
import torch
from diffusers import (
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor

from dmd2.inference.conditioning import ImageConditioning
from dmd2.inference.engine import Engine
from dmd2.inference.inputs import fitted
from dmd2.models.adapters.lora import read_lora
from dmd2.runtime.errors import UserError
from dmd2.weights.manifest import Manifest, Student, Teacher, write_manifest
from tests.models.adapters.test_lora import ATTENTION, kohya_style
from tests.tiny_sdxl import (
    PROMPTS,
    SCHEDULE,
    SEEDS,
    SIDE,
    STUDENTS,
    build_vae,
    frozen,
    noise,
    noise_for_diffusers,
    photograph,
)

SIZE = (SIDE, SIDE)
LONG = "a red apple and a blue book " * 8


@pytest.fixture(scope="module")
def pipe(text_models: tuple[Any, Any, Any]) -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    tokenizer, first, _ = text_models
    vae = build_vae()
    vae.register_to_config(scaling_factor=0.18215)
    scheduler = LCMScheduler(steps_offset=1, **SCHEDULE)  # which it is for SD 1.5, and of no matter with `timesteps`
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        unet=frozen(unet),
        scheduler=scheduler,
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd15") / "sd15"
    pipe.save_pretrained(path)
    # SD 1.5's own scheduler says nothing of what its network predicts.
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"prediction_type": "epsilon",', ""))
    students = {steps: Student(subfolder="unet", timesteps=timesteps) for steps, timesteps in STUDENTS.items()}
    manifest = Manifest(name="tiny", family="sd15", native_size=SIZE, licence="none", students=students)
    teacher = Teacher(subfolder="unet", steps=3, guidance_scale=2.0)
    write_manifest(path, manifest.model_copy(update={"teacher": teacher}))
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder, "cpu")


def caught(engine: Engine, *arguments: Any, **settings: Any) -> Tensor:
    """The latents that the engine decodes."""
    seen: list[Tensor] = []
    decode = engine.model.codec.decode
    engine.model.codec.decode = lambda x: seen.append(x) or decode(x)  # type: ignore[assignment,func-returns-value]
    try:
        engine.generate(*arguments, **settings)
    finally:
        del engine.model.codec.decode
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("steps", [4, 1])
def test_images_are_those_of_diffusers(pipe: Any, engine: Engine, steps: int) -> None:
    drawn = noise(steps)
    settings: dict[str, Any] = {"guidance_scale": 1.0, "width": SIDE, "height": SIDE, "output_type": "latent"}
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        theirs = pipe(PROMPTS, latents=drawn[0].clone(), timesteps=STUDENTS[steps], **settings).images
    ours = caught(engine, PROMPTS, SEEDS, str(steps))
    assert float(theirs.std()) > 0.1 and float((ours - theirs).abs().max()) < 1e-4


def test_image_to_image_is_that_of_diffusers(pipe: Any, engine: Engine) -> None:
    drawn, given = noise(3), photograph()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with noise_for_diffusers(drawn, img2img_module, scheduling_lcm):
        settings: dict[str, Any] = {"image": [given, given], "strength": 0.75, "output_type": "latent"}
        theirs = other(PROMPTS, timesteps=STUDENTS[4], guidance_scale=1.0, **settings).images
    ours = caught(engine, PROMPTS, SEEDS, "4", edit=ImageConditioning(image=fitted(given, SIZE), strength=0.75))
    assert float((ours - theirs).abs().max()) < 1e-4


@torch.no_grad()
def test_guidance_leads_away_from_an_empty_prompt(pipe: Any, engine: Engine) -> None:
    """SDXL's networks have learned zeros instead."""
    drawn = noise(4)
    settings: dict[str, Any] = {"guidance_scale": 2.0, "width": SIDE, "height": SIDE, "output_type": "latent"}
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        theirs = pipe(PROMPTS, latents=drawn[0].clone(), timesteps=STUDENTS[4], **settings).images
    assert float((caught(engine, PROMPTS, SEEDS, "teacher-4") - theirs).abs().max()) < 1e-3
    assert engine.generate([LONG], [0], "teacher").shape == (1, 3, SIDE, SIDE)  # of several windows


def test_long_prompts_loras_and_other_sizes(engine: Engine, tmp_path: Path) -> None:
    plain = engine.generate([LONG + "owl"], [0], "4", (SIDE, 2 * SIDE))
    assert plain.shape == (1, 3, 2 * SIDE, SIDE)
    assert not torch.equal(plain, engine.generate([LONG + "heart"], [0], "4", (SIDE, 2 * SIDE)))
    state = kohya_style(engine.model.denoisers["unet"].unet, "lora_unet", ATTENTION, 0)
    state |= kohya_style(engine.model.encode_text.encoders[0], "lora_te_text_model", ("q_proj",), 1)
    save_file(state, tmp_path / "some.safetensors")
    some = read_lora(tmp_path / "some.safetensors")
    changed = engine.generate(["an owl"], [0], "4", SIZE, ImageConditioning(loras=((some, 1.0),)))
    assert not torch.equal(changed, engine.generate(["an owl"], [0], "4"))
    for_sdxl = {key.replace("lora_te_", "lora_te2_"): value for key, value in state.items()}
    save_file(for_sdxl, tmp_path / "sdxl.safetensors")
    with pytest.raises(UserError, match="made for another model: this one has no text_encoder_2"):
        other = read_lora(tmp_path / "sdxl.safetensors")
        engine.generate(["an owl"], [0], "4", SIZE, ImageConditioning(loras=((other, 1.0),)))
