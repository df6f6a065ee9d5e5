"""Image-to-image and inpainting, against diffusers' own pipelines with the same timesteps and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img as img2img_module
import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint as inpaint_module
import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image, ImageDraw
from torch import Tensor

from dmd2.diffusion.noise import add_noise, seeded_noise
from dmd2.diffusion.sampling import conditioned, inpaint, noised, sample_few_step, timesteps_for_strength
from dmd2.inference.inputs import fitted, fitted_mask
from dmd2.models.stable_diffusion.codec import LatentCodec
from dmd2.models.stable_diffusion.text import TextEncoder
from dmd2.models.stable_diffusion.unet import StableDiffusion
from tests.tiny_sdxl import (
    PROMPTS,
    SIDE,
    STUDENTS,
    build_sdxl_unet,
    build_vae,
    noise,
    noise_for_diffusers,
    photograph,
    pipeline,
)

Texts = tuple[Any, Any, Any]
SETTINGS = {"guidance_scale": 1.0, "width": SIDE, "height": SIDE, "output_type": "latent"}


@pytest.fixture(scope="module")
def unet() -> Any:
    return build_sdxl_unet()


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return LatentCodec(build_vae())


def student(unet: Any, text_models: Texts) -> tuple[StableDiffusion, Callable[[Tensor, Tensor], Tensor]]:
    tokenizer, first, second = text_models
    denoiser = StableDiffusion(unet)
    cond = TextEncoder([tokenizer, tokenizer], [first, second])(PROMPTS, (SIDE, SIDE))
    return denoiser, conditioned(denoiser, cond)


def check(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and float(theirs.std()) > 0.1  # there is something to compare
    assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize("steps", [4, 1])
@torch.no_grad()
def test_text_to_image_is_that_of_diffusers(unet: Any, codec: LatentCodec, text_models: Texts, steps: int) -> None:
    drawn = noise(steps)
    pipe = pipeline(StableDiffusionXLPipeline, text_models, unet, codec.vae)
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        theirs = pipe(PROMPTS, latents=drawn[0].clone(), timesteps=STUDENTS[steps], **SETTINGS).images
    denoiser, denoise = student(unet, text_models)
    sigmas = [float(denoiser.sigmas[t]) for t in STUDENTS[steps]]
    check(sample_few_step(denoise, denoiser.scale_initial_noise, drawn, sigmas), theirs)


@pytest.mark.parametrize(("steps", "strength", "left"), [(4, 0.6, 2), (4, 0.99, 3), (4, 0.25, 1), (1, 0.5, 1)])
@torch.no_grad()
def test_image_to_image_is_that_of_diffusers(
    unet: Any, codec: LatentCodec, text_models: Texts, steps: int, strength: float, left: int
) -> None:
    drawn, image = noise(left), photograph()
    pipe = pipeline(StableDiffusionXLImg2ImgPipeline, text_models, unet, codec.vae)
    # diffusers refuses strengths that leave a one-step student nothing; its own step is what is left here.
    asked = strength if steps == 4 else 1.0
    with noise_for_diffusers(drawn, img2img_module, scheduling_lcm):
        settings = SETTINGS | {"image": [image, image], "strength": asked}
        del settings["width"], settings["height"]
        theirs = pipe(PROMPTS, timesteps=STUDENTS[steps], **settings).images
    denoiser, denoise = student(unet, text_models)
    timesteps = timesteps_for_strength(STUDENTS[steps], strength)
    assert len(timesteps) == left
    latents = codec.encode(fitted(image, (SIDE, SIDE))[None]).expand(2, -1, -1, -1)
    sigmas = [float(denoiser.sigmas[t]) for t in timesteps]
    check(sample_few_step(denoise, noised(latents), drawn, sigmas), theirs)


def hole() -> Image.Image:
    """White where the image is painted anew: on the borders of latents, where all ways to shrink it agree."""
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((16, 8, 47, 39), fill=255)
    return mask


@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (4, 0.75), (1, 1.0)])
@torch.no_grad()
def test_inpainting_is_that_of_diffusers(
    unet: Any, codec: LatentCodec, text_models: Texts, steps: int, strength: float
) -> None:
    timesteps, image = timesteps_for_strength(STUDENTS[steps], strength), photograph()
    drawn = noise(len(timesteps))
    pipe = pipeline(StableDiffusionXLInpaintPipeline, text_models, unet, codec.vae)
    with noise_for_diffusers(drawn, inpaint_module, scheduling_lcm):
        settings = SETTINGS | {"image": image, "mask_image": hole(), "strength": strength}
        theirs = pipe(PROMPTS, timesteps=STUDENTS[steps], **settings).images
    denoiser, denoise = student(unet, text_models)
    latents = codec.encode(fitted(image, (SIDE, SIDE))[None]).expand(2, -1, -1, -1)
    mask = fitted_mask(hole(), (SIDE, SIDE))[::8, ::8][None, None]
    start = denoiser.scale_initial_noise if strength == 1 else lambda n, sigma: add_noise(latents, sigma, n)
    sigmas = [float(denoiser.sigmas[t]) for t in timesteps]
    ours = inpaint(denoise, start, latents, mask, drawn, sigmas)
    check(ours, theirs)
    known = ~mask.expand_as(ours)
    assert torch.equal(ours[known], latents[known])
    assert float((ours[~known] - latents[~known]).abs().max()) > 0.1


def test_the_steps_that_a_strength_leaves() -> None:
    four = STUDENTS[4]
    for strength, left in ((1.0, 4), (0.99, 3), (0.75, 3), (0.74, 2), (0.5, 2), (0.49, 1), (0.25, 1), (0.01, 1)):
        assert timesteps_for_strength(four, strength) == four[-left:]
        assert timesteps_for_strength([399], strength) == [399]
    for strength in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="more than 0, at most 1"):
            timesteps_for_strength(four, strength)


def test_image_to_image_begins_with_the_noised_image_and_forgets_it_step_by_step() -> None:
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return torch.full_like(x, 7.0)

    image = torch.full((2, 4, 8, 8), 3.0)
    drawn = list(seeded_noise([0, 1], (2, 4, 8, 8)).unbind(1))
    sample_few_step(denoise, noised(image), drawn, [2.0, 0.5])
    assert torch.equal(seen[0], image + 2 * drawn[0])
    assert torch.equal(seen[1], 7 + 0.5 * drawn[1])


def test_a_mask_of_everything_is_text_to_image_and_one_of_nothing_the_image() -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return (x / 2).tanh()

    image = torch.full((2, 4, 8, 8), 3.0)
    drawn = list(seeded_noise([0, 1], (2, 4, 8, 8)).unbind(1))
    everything, sigmas = torch.ones(1, 1, 8, 8, dtype=torch.bool), [2.0, 0.5]

    def start(n: Tensor, sigma: Tensor) -> Tensor:
        return 5 * n

    expected = sample_few_step(denoise, start, drawn, sigmas)
    assert torch.equal(inpaint(denoise, start, image, everything, drawn, sigmas), expected)
    assert torch.equal(inpaint(denoise, start, image, ~everything, drawn, sigmas), image)
