"""Folders of weights that are SDXL or SD 1.5 in everything but what they have learned: full size, no download."""

from __future__ import annotations

import json
import math
import os
import shutil
import tomllib
import zlib
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from dmd2.models.stable_diffusion.configs import TIMESTEPS
from dmd2.models.stable_diffusion.folder import UNET_FILE, save_pipeline_configs
from dmd2.weights.manifest import DEFAULT, Manifest, Student, Teacher, write_manifest

PARAMETERS = {"sdxl": 2_567_463_684, "sd15": 859_520_964}
"""of the UNets"""


def write_full_size(folder: Path, students: tuple[int, ...] = (1, 4), tiny: bool = False) -> None:
    """Makes `folder`, SDXL with two students of the same weights. Takes 7 GB of disk, and 6 of memory on the way.

    Args:
        tiny: with a tiny VAE beside its own.
    """
    configs = _configs("sdxl")
    _write_parts(folder, "sdxl", configs, numbers=True)
    if tiny:
        _write(diffusers.AutoencoderTiny(), folder / "vae_tiny", UNET_FILE)
    names = {1: "unet_1step", 4: "unet"}
    first = folder / names[students[0]]
    _write(_unet("sdxl", configs), first, UNET_FILE)
    for steps in students[1:]:
        shutil.copytree(first, folder / names[steps], copy_function=os.link)
    save_pipeline_configs(folder, "epsilon")
    listed = {n: Student(subfolder=names[n], timesteps=TIMESTEPS[n]) for n in students}
    write_manifest(
        folder, Manifest(name="random", native_size=(1024, 1024), licence="random numbers", students=listed)
    )


def write_teacher(folder: Path, family: str = "sdxl", *, numbers: bool = True, side: int = 0) -> None:
    """Makes `folder`, a teacher to train from, with a tiny VAE beside its own.

    Args:
        family: "sdxl" or "sd15".
        numbers: False: configurations alone, which `dmd2 train --dry-run --cards` reads.
        side: of its images in pixels; as it was trained unless given.
    """
    configs = _configs(family)
    _write_parts(folder, family, configs, numbers)
    _write(diffusers.AutoencoderTiny(), folder / "vae_tiny", UNET_FILE, numbers)
    _write(_unet(family, configs), folder / "unet_teacher", UNET_FILE, numbers)
    save_pipeline_configs(folder, "epsilon", family=family)
    side = side or 8 * configs["unet"]["sample_size"]
    teacher = Teacher(steps=50, guidance_scale=7.5)
    about = {"name": f"{family}, random", "family": family, "licence": "random numbers", "teacher": teacher}
    write_manifest(folder, Manifest(native_size=(side, side), **about))


def _configs(family: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(f"{family}.toml").read_text())


def _unet(family: str, configs: dict[str, Any]) -> nn.Module:
    with init_empty_weights():
        unet: nn.Module = diffusers.UNet2DConditionModel(**configs["unet"])
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[family]
    return unet


def _write_parts(folder: Path, family: str, configs: dict[str, Any], numbers: bool) -> None:
    """Tokenizers, text encoders and VAE."""
    folder.mkdir(parents=True)
    for suffix in ("", "_2") if family == "sdxl" else ("",):
        target = folder / f"tokenizer{suffix}"
        shutil.copytree(DEFAULT / "tokenizer", target)
        settings = json.loads((target / "tokenizer_config.json").read_text())
        (target / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
        tokenizer = transformers.CLIPTokenizer.from_pretrained(target)
        marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
        kind = transformers.CLIPTextModelWithProjection if suffix else transformers.CLIPTextModel
        with init_empty_weights():
            encoder = kind(transformers.CLIPTextConfig(**configs[f"text_encoder{suffix}"], **marks))
        _write(encoder, folder / f"text_encoder{suffix}", "model.safetensors", numbers)
    with init_empty_weights():
        vae = diffusers.AutoencoderKL(**configs["vae"])
    _write(vae, folder / "vae", UNET_FILE, numbers)


def _write(network: nn.Module, folder: Path, filename: str, numbers: bool = True) -> None:
    folder.mkdir()
    if isinstance(network, transformers.PreTrainedModel):
        network.config.save_pretrained(folder)
    else:
        network.save_config(folder)
    if not numbers:
        return
    # The same million numbers over and over: generating 2.6 billion would take minutes.
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).half()
    tensors = {name: _random(name, value.shape, drawn) for name, value in network.state_dict().items()}
    save_file(tensors, folder / filename)


def _random(name: str, shape: torch.Size, numbers: Tensor) -> Tensor:
    """Of a size that keeps activations finite: normalisations do nothing, each product keeps the variance."""
    if len(shape) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.float16)
    count = shape.numel()
    # No two tensors are equal: what keeps equal ones once, as OpenVINO does, would look better than it is.
    numbers = numbers.roll(zlib.crc32(name.encode()) % len(numbers))
    drawn = numbers.repeat(-(-count // len(numbers)))[:count].reshape(shape)
    return drawn.mul_(1 / math.sqrt(count / shape[0]))
