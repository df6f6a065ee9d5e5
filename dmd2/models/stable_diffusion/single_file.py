"""SDXL checkpoints in one file, as CivitAI and ComfyUI have them: their networks, renamed for diffusers' layout.

The names are those of Stability's generative-models (`model.diffusion_model.*`, `conditioner.embedders.*`,
`first_stage_model.*`); diffusers' own functions translate them. Such a file holds neither configurations nor
tokenizers: they come from any folder of SDXL in diffusers' layout, its weights are not needed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmd2.models.stable_diffusion.configs import Schedule, network_class, read_unet_config, read_vae_config
from dmd2.runtime.errors import InvalidInput, UserError, shown
from dmd2.runtime.files import atomic_text, read_object
from dmd2.runtime.loading import build_network, expect_floats, fit
from dmd2.runtime.tensors import save_tensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": CLIP, "text_encoder_2": OPEN_CLIP}
"""by the networks' subfolders"""
TOKENIZERS = ("tokenizer", "tokenizer_2")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MARKS = ("v_pred", "ztsnr", "scaled_fp8")
"""keys that say something of the others"""
OTHERS = {
    "edm_mean": "Playground 2.5",
    "edm_vpred.sigma_max": "CosXL",
    "cond_stage_model.": "Stable Diffusion 1 or 2",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "FLUX",
    "double_blocks.": "FLUX",
    "conditioner.embedders.0.model.": "SDXL's refiner",
}

logger = logging.getLogger(__name__)


class SingleFile:
    """The content of such a file, on the CPU and mapped, not read. `networks` has diffusers' names.

    Args:
        base: folder of SDXL in diffusers' layout: for configurations and tokenizers.
        vae: folder of another VAE; the file's own is not used then, and need not be there.

    Raises:
        UserError: no safetensors, another model, something is missing or does not fit the configurations.
    """

    def __init__(self, path: Path, base: Path, vae: Path | None = None) -> None:
        self.path, self.base = path, base
        check_base(base)
        tensors, metadata = _read(path)
        _check_kind(path, tensors)
        self.schedule = _schedule(tensors, metadata)
        tensors = _unscaled(tensors)
        ignored = [key for key in tensors if not key.startswith(tuple(PREFIXES.values())) and key not in MARKS]
        if ignored:
            logger.info("%s: ignored: %s (%d in all)", path, shown(", ".join(ignored[:3])), len(ignored))
        self.configs = {name: read_config(base, name) for name in PREFIXES if name != "vae" or vae is None}
        first = tensors.get(f"{UNET}input_blocks.0.0.weight")
        if first is not None and first.ndim == 4:  # of an inpainting UNet, too, whatever the base is
            self.configs["unet"]["in_channels"] = first.shape[1]
        if "vae" in self.configs:
            if not any(key.startswith(VAE) for key in tensors):
                raise UserError(f"{path}: holds no VAE ({VAE}*); expected the folder of another (vae)")
            # SDXL's own overflows in fp16, and nothing in the file says whether this is another one.
            self.configs["vae"]["force_upcast"] = True
        self.networks = {name: self._network(name, tensors) for name in self.configs}

    def _network(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from diffusers.loaders import single_file_utils as theirs

        config, prefix = self.configs[name], PREFIXES[name]
        own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
        kind = network_class(name, self.base / name)
        network = build_network(kind, self.base / name / "config.json", config)
        try:
            match name:
                case "unet":
                    renamed = theirs.convert_ldm_unet_checkpoint(own, config)
                case "vae":
                    renamed = theirs.convert_ldm_vae_checkpoint(own, config)
                case "text_encoder":
                    renamed = {key.removeprefix(CLIP): value for key, value in own.items()}
                case _:
                    renamed = theirs.convert_open_clip_checkpoint(network, _open_clip(own), prefix=OPEN_CLIP)
        except (KeyError, AttributeError, IndexError, TypeError) as error:  # of what is missing, or of another shape
            raise UserError(f"{self.path}: {prefix}*: not SDXL's {name}: {shown(error)}") from error
        renamed.pop("logit_scale", None)  # of CLIP's training
        where = Path(f"{self.path}: {prefix}*")
        keys = fit(network, where, {key: value.shape for key, value in renamed.items()})
        expect_floats(network, where, {key: renamed[old].is_floating_point() for key, old in keys.items()})
        return {key: renamed[old].contiguous() for key, old in keys.items()}

    def write_configs(self, folder: Path) -> None:
        """Into `folder`, with the tokenizers."""
        for name, config in self.configs.items():
            (folder / name).mkdir(parents=True)
            atomic_text(folder / name / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name in TOKENIZERS:
            shutil.copytree(self.base / name, folder / name)

    def write_weights(self, folder: Path, files: Mapping[str, str]) -> None:
        """Into `folder`; `files` names each network's."""
        for name, tensors in self.networks.items():
            try:
                save_tensors(tensors, folder / name / files[name], {"format": "pt"})
            except UserError as error:  # says of which checkpoint, not where it is for a moment
                raise UserError(str(error).replace(f"{folder}/", f"{self.path}: ")) from None


def check_base(base: Path) -> None:
    """Raises UserError unless a folder has what a checkpoint in one file lacks."""
    needed = [*(f"{name}/config.json" for name in PREFIXES), *TOKENIZERS]
    missing = [name for name in needed if not (base / name).exists()]
    if missing:
        raise InvalidInput(
            "base",
            f"lacks {', '.join(missing[:3])}; expected a folder of SDXL in diffusers' layout, such as "
            "weights/sdxl: a checkpoint in one file has neither configurations nor tokenizers",
            base,
        )


def read_config(base: Path, name: str) -> dict[str, Any]:
    if name == "unet":
        return read_unet_config(base / name)
    if name == "vae":
        config = read_vae_config(base / name)
        if config["_class_name"] != "AutoencoderKL":
            raise UserError(
                f"{base / name}: {config['_class_name']}; expected SDXL's AutoencoderKL, or the folder of one (vae)"
            )
        return config
    return read_object(base / name / "config.json")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({shown(error)}); no other format is read") from None


def _check_kind(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for mark, kind in OTHERS.items():
        if any(key.startswith(mark) for key in tensors):
            raise UserError(f"{path}: is {kind}, as {mark}* tells; expected SDXL")
    for prefix in (UNET, CLIP, OPEN_CLIP):
        if not any(key.startswith(prefix) for key in tensors):
            some = shown(", ".join(sorted(tensors)[:2])) or "nothing"
            raise UserError(f"{path}: holds no {prefix}* (but {some}); expected a whole SDXL checkpoint in one file")


def _schedule(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Schedule:
    """As ComfyUI takes it from marks among the tensors, or Stability's "modelspec" metadata say."""
    v = "v_pred" in tensors or metadata.get("modelspec.prediction_type") == "v"
    return Schedule("v_prediction", zero_snr="ztsnr" in tensors) if v else Schedule()


def _unscaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """8-bit floats as fp16, which holds each of them; where a layer has a scale of its own, times that."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith((".scale_weight", ".scale_input")):
            continue
        if value.dtype in FP8:
            scale = tensors.get(f"{key.removesuffix('.weight')}.scale_weight")
            value = value.half() if scale is None else (value.float() * scale.float()).half()
        found[key] = value
    return found


def _open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projection under the name and in the order that it was published in: (in, out)."""
    linear = tensors.pop(f"{OPEN_CLIP}text_projection.weight", None)
    return tensors if linear is None else tensors | {f"{OPEN_CLIP}text_projection": linear.T}
