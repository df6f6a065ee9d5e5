"""A folder of weights that is SDXL in everything but what it has learned: full size, random, no download."""

from __future__ import annotations

import json
import math
import os
import shutil
import tomllib
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from dmd2.models.stable_diffusion.configs import TIMESTEPS
from dmd2.models.stable_diffusion.folder import UNET_FILE, save_pipeline_configs
from dmd2.weights.manifest import DEFAULT, Manifest, Student, write_manifest

CONFIGS = tomllib.loads(Path(__file__).with_name("sdxl.toml").read_text())
PARAMETERS = 2_567_463_684  # of SDXL's UNet


def write_full_size(folder: Path, students: tuple[int, ...] = (1, 4)) -> None:
    """Makes `folder`: both students have the same weights. Takes 7 GB of disk, and 6 of memory on the way."""
    folder.mkdir(parents=True)
    for suffix in ("", "_2"):
        target = folder / f"tokenizer{suffix}"
        shutil.copytree(DEFAULT / "tokenizer", target)
        settings = json.loads((target / "tokenizer_config.json").read_text())
        (target / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
        tokenizer = transformers.CLIPTokenizer.from_pretrained(target)
        marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
        kind = transformers.CLIPTextModelWithProjection if suffix else transformers.CLIPTextModel
        with init_empty_weights():
            encoder = kind(transformers.CLIPTextConfig(**CONFIGS[f"text_encoder{suffix}"], **marks))
        _write(encoder, folder / f"text_encoder{suffix}", "model.safetensors")
    with init_empty_weights():
        decoder = diffusers.AutoencoderKL(**CONFIGS["vae"])
        unet = diffusers.UNet2DConditionModel(**CONFIGS["unet"])
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS
    _write(decoder, folder / "vae", UNET_FILE)
    names = {1: "unet_1step", 4: "unet"}
    first = folder / names[students[0]]
    _write(unet, first, UNET_FILE)
    for steps in students[1:]:
        shutil.copytree(first, folder / names[steps], copy_function=os.link)
    save_pipeline_configs(folder, "epsilon")
    listed = {n: Student(subfolder=names[n], timesteps=TIMESTEPS[n]) for n in students}
    write_manifest(
        folder, Manifest(name="random", native_size=(1024, 1024), licence="random numbers", students=listed)
    )


def _write(network: nn.Module, folder: Path, filename: str) -> None:
    folder.mkdir()
    if isinstance(network, transformers.PreTrainedModel):
        network.config.save_pretrained(folder)
    else:
        network.save_config(folder)
    # The same million numbers over and over: generating 2.6 billion would take minutes.
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).half()
    tensors = {name: _random(name, value.shape, numbers) for name, value in network.state_dict().items()}
    save_file(tensors, folder / filename)


def _random(name: str, shape: torch.Size, numbers: Tensor) -> Tensor:
    """Of a size that keeps activations finite: normalisations do nothing, each product keeps the variance."""
    if len(shape) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.float16)
    count = shape.numel()
    drawn = numbers.repeat(-(-count // len(numbers)))[:count].reshape(shape)
    return drawn.mul_(1 / math.sqrt(count / shape[0]))
