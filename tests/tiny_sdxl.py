"""SDXL's structure in small: what diffusers' own pipelines and this project are both given, in parity tests.

Random weights, float32, images of 64×64 pixels, eight to a latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from diffusers import AutoencoderKL, LCMScheduler, T2IAdapter, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from dmd2.diffusion.noise import seeded_noise
from dmd2.emoji.architecture import build_unet
from dmd2.weights.manifest import Manifest, Student, write_manifest

SIDE = 64
SIZE = (SIDE, SIDE)
PROMPTS = ["a red apple on a blue background", "an owl"]
SEEDS = [1, 2]
STUDENTS = {4: [999, 749, 499, 249], 1: [399]}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def frozen(module: Any) -> Any:
    return module.eval().requires_grad_(False)


def build_sdxl_unet(seed: int = 0) -> Any:
    """With SDXL's key names: two layers a block, of which the two lower ones attend."""
    torch.manual_seed(seed)
    return frozen(UNet2DConditionModel.from_config(build_unet((32, 32, 64)).config, layers_per_block=2))


def build_vae(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return frozen(
        AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.13025,
            force_upcast=False,
        )
    )


def build_adapter() -> Any:
    """A T2I-Adapter for the UNet of `build_sdxl_unet`."""
    torch.manual_seed(7)
    settings: dict[str, Any] = {"num_res_blocks": 1, "downscale_factor": 16, "adapter_type": "full_adapter_xl"}
    return frozen(T2IAdapter(channels=[32, 32, 64, 64], **settings))


def pixels(images: Any) -> Tensor:
    """diffusers' "np" images as uint8 (B, 3, H, W)."""
    return torch.from_numpy((images * 255).round().astype(numpy.uint8)).permute(0, 3, 1, 2)


def difference(a: Tensor, b: Tensor) -> int:
    """The largest difference of two uint8 images."""
    return int((a.int() - b.int()).abs().max())


def pipeline(kind: Any, text_models: tuple[Any, Any, Any], unet: Any, vae: Any, **others: Any) -> Any:
    """One of diffusers' SDXL pipelines, with the few-step students' scheduler."""
    tokenizer, first, second = text_models
    made = kind(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=LCMScheduler(**SCHEDULE),
        **others,
    )
    made.set_progress_bar_config(disable=True)
    return made


def noise(steps: int, seeds: Sequence[int] = SEEDS) -> list[Tensor]:
    """What an engine draws for these seeds, one tensor (B, 4, 8, 8) a step."""
    return list(seeded_noise(list(seeds), (steps, 4, SIDE // 8, SIDE // 8)).unbind(1))


@contextmanager
def noise_for_diffusers(drawn: Sequence[Tensor], *modules: Any) -> Iterator[None]:
    """Lets diffusers' `modules` draw `drawn`, in turn; it must draw all of it. Its VAE encodes to the mean."""
    left = list(drawn)
    with mock.patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()):
        patches = [mock.patch.object(m, "randn_tensor", lambda *_, **__: left.pop(0)) for m in modules]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
    assert not left


def photograph(seed: int = 5, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A smooth random image: one that survives a VAE about as well as a photograph does."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (4, 4, 3), generator=generator).byte().numpy()
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save_sdxl(folder: Path, text_models: tuple[Any, Any, Any], vae: Any, **students: Any) -> Path:
    """A folder of weights with the students "four" and "one", as `scripts/download-weights` lays it out."""
    from diffusers import StableDiffusionXLPipeline

    pipeline(StableDiffusionXLPipeline, text_models, students["four"], vae).save_pretrained(folder)
    students["one"].save_pretrained(folder / "unet_1step")
    listed = {
        4: Student(subfolder="unet", timesteps=STUDENTS[4]),
        1: Student(subfolder="unet_1step", timesteps=STUDENTS[1]),
    }
    write_manifest(folder, Manifest(name="tiny", native_size=(SIDE, SIDE), licence="none", students=listed))
    return folder
