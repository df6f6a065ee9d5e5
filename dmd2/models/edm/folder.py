"""Folders of EDM weights: `dmd2.json`, `config.json` and `model.safetensors`, written whole, read with checks."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmd2.models.edm.layers import STYLES, resample_filter
from dmd2.models.edm.network import Edm, EdmConfig, EdmNetwork, channels_last
from dmd2.runtime.errors import UserError, first_error
from dmd2.runtime.files import atomic_text, only_shapes
from dmd2.runtime.loading import unfilled
from dmd2.runtime.tensors import save_tensors
from dmd2.weights.folders import whole_folder
from dmd2.weights.manifest import Manifest, Student, Teacher, read_manifest, verify, write_manifest

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def expect_new(folder: Path) -> None:
    """Raises UserError if there is anything at `folder`, but for an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; expected a new or empty folder to write to")


def save_edm(
    folder: Path,
    network: EdmNetwork,
    *,
    name: str,
    licence: str,
    recipe: Mapping[str, Any],
    class_names: Sequence[str] = (),
    card: str | None = None,
    teacher: Teacher | None = None,
) -> None:
    """Writes a new `folder`: the network's `config.json`, its weights in their own dtype, and `dmd2.json`.

    The manifest has a student if the network's `config.sigmas` names its levels, and else a `teacher`, sampled as
    Karras et al. 2022 do unless given. The folder appears whole or not at all. `recipe` goes into the safetensors
    metadata. With a model `card`, by which it is a run's export, it may take the place of the same run's export
    before.

    Raises:
        UserError: `folder` is a file, or (without a card) a folder that is not empty; a weight is not finite.
    """
    if card is None or not folder.is_dir():
        expect_new(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    metadata = {"format": "pt", "recipe": json.dumps(recipe)}
    with whole_folder(folder) as new:
        if card is not None:
            atomic_text(new / "README.md", card)
        atomic_text(new / CONFIG_FILE, network.config.model_dump_json(indent=2) + "\n")
        save_tensors(tensors, new / WEIGHTS_FILE, metadata)
        config, sigmas = network.config, list(network.config.sigmas)
        teacher = teacher or Teacher(subfolder=".", steps=heun_steps(config), guidance_scale=1.0)
        manifest = Manifest(
            name=name,
            family="edm",
            native_size=(config.resolution, config.resolution),
            licence=licence,
            class_names=list(class_names),
            students={len(sigmas): Student(subfolder=".", sigmas=sigmas)} if sigmas else {},
            teacher=None if sigmas else teacher,
        )
        write_manifest(new, manifest)


def heun_steps(config: EdmConfig) -> int:
    """Of Heun's method, as Karras et al. 2022 sample: 18 (35 calls) for 32×32, 40 (79 calls) for the 64×64 sets."""
    return 18 if config.resolution <= 32 else 40


def load_edm(folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Edm:
    """The network in a folder that `save_edm` wrote, frozen, without dropout: distillation uses none.

    Args:
        folder: holds `dmd2.json`, `config.json` and `model.safetensors`.
        device: where to.
        dtype: of convolutions and norms, and what they run in. To train in bf16, load fp32, which keeps the
            parameters fp32, and set `network.dtype` to bf16.

    Raises:
        UserError: a file is missing, damaged or not what it should be.
    """
    manifest = read_manifest(folder)
    if manifest.family != "edm":
        raise UserError(f"{folder}: weights of the family {manifest.family!r}; expected 'edm'")
    if only_shapes():
        with torch.device("meta"):
            network = EdmNetwork(read_edm_config(folder).model_copy(update={"dropout": 0.0}))
        unfilled(network, torch.device(device), torch.float32).cast(dtype)
        return Edm(channels_last(network))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; these weights are incomplete")
    verify(folder, manifest)
    config = read_edm_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: not safetensors, or damaged ({error})") from error
    network = network_of(config.model_copy(update={"dropout": 0.0}), tensors, folder / WEIGHTS_FILE)
    network.to(device, torch.float32)
    network.cast(dtype)
    return Edm(channels_last(network).requires_grad_(False).eval())


def read_edm_config(folder: Path) -> EdmConfig:
    """What `save_edm` wrote. Raises UserError if there is none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing; expected a folder of EDM weights")
    try:
        return EdmConfig.model_validate_json(path.read_bytes().removeprefix(BOM_UTF8))
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}") from None


def network_of(config: EdmConfig, tensors: Mapping[str, Tensor], source: Path) -> EdmNetwork:
    """The network of `config` with `tensors`, which must be its parameters and buffers, all and only, by name.

    Raises:
        UserError: naming `source` and the first tensor that lacks, is too many or does not fit.
    """
    with torch.device("meta"):
        network = EdmNetwork(config)
    expected = network.state_dict()
    what = f"{config.architecture} network of {config.resolution}x{config.resolution} pixels"
    for name in expected:
        if name not in tensors:
            raise UserError(f"{source}: lacks the tensor {name} of the {what}")
    for name, value in tensors.items():
        if name not in expected:
            raise UserError(f"{source}: holds the tensor {name[:200]!r}, which the {what} does not have")
        if value.shape != expected[name].shape or not value.is_floating_point():
            raise UserError(
                f"{source}: the tensor {name} is {value.dtype} {tuple(value.shape)}; "
                f"the {what} needs floats {tuple(expected[name].shape)}"
            )
        taps = STYLES[config.architecture].taps
        if name.endswith(".resample_filter") and not torch.allclose(value.float(), resample_filter(taps)):
            raise UserError(f"{source}: the tensor {name} is not the filter {taps} of the {what}")
    network.load_state_dict(dict(tensors), assign=True)
    return network
