"""LoRA (Hu et al. 2021): small files that change a network's weights, taken in and out without reloading it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.fileio import sha256_file

LARGEST_SCALE = 4.0

_KOHYA = re.compile(r"lora_(unet|te1?|te2)_(\w+)\.(?:lora_(down|up)\.weight|(alpha))")
_DIFFUSERS = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.([\w.]+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.default)?\.weight"
)
_DIFFUSERS_ALPHA = re.compile(r"(unet|text_encoder|text_encoder_2)\.([\w.]+)\.(alpha)")
_PARTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with three factors",
    ".diff": "a full difference",
    "oft_": "OFT",
}
Layer = tuple[str, str]
"""(unet, text_encoder or text_encoder_2; the layer's name with _ for each dot)"""


@dataclass
class Factors:
    """One layer's change: up · down · alpha / rank."""

    down: Tensor | None = None
    """(rank, in), for a convolution (rank, in, k, k)"""
    up: Tensor | None = None
    """(out, rank), for a convolution (out, rank, 1, 1)"""
    alpha: float | None = None
    """None: the rank"""

    def change(self, weight: Tensor) -> Tensor:
        """What to add to a weight of this shape, fp32 on its device (Hu et al. 2021, eq. 3)."""
        assert self.down is not None and self.up is not None
        down = self.down.to(weight.device, torch.float32).flatten(1)
        up = self.up.to(weight.device, torch.float32).flatten(1)
        rank = len(down)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return (scale * (up @ down)).reshape(weight.shape)

    def fits(self, weight: Tensor) -> bool:
        assert self.down is not None and self.up is not None
        down, up = self.down.flatten(1), self.up.flatten(1)
        inputs = weight[0].numel()
        return down.shape[1] == inputs and up.shape[0] == len(weight) and up.shape[1] == len(down)


@dataclass(frozen=True, eq=False)
class Lora:
    """A file's content, on the CPU."""

    name: str
    sha256: str
    layers: dict[Layer, Factors] = field(repr=False)

    @cached_property
    def changes_text(self) -> bool:
        return any(part != "unet" for part, _ in self.layers)


Loras = Sequence[tuple[Lora, float]]
"""with the scale of each"""


def read_lora(path: Path, name: str | None = None) -> Lora:
    """Reads a safetensors file in kohya's, LDM's (kohya's for SDXL), diffusers' or PEFT's naming.

    Args:
        name: what messages call it, the file's name by default.

    Raises:
        UserError: no safetensors, or not a plain LoRA.
    """
    name = name or path.name
    layers: dict[Layer, Factors] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                layer, what = _parse(name, key)
                factors = layers.setdefault(layer, Factors())
                setattr(factors, what, float(file.get_tensor(key)) if what == "alpha" else file.get_tensor(key))
    except (SafetensorError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"LoRA {name}: cannot be read as safetensors ({reason}); no other format is read") from error
    if not layers:
        raise UserError(f"LoRA {name}: holds nothing")
    for (part, what), factors in layers.items():
        if factors.down is None or factors.up is None or factors.down.ndim < 2 or factors.up.ndim < 2:
            raise UserError(f"LoRA {name}: {part} {what}: expected a pair of matrices, down and up")
    _read_alphas(name, metadata, layers)
    return Lora(name, sha256_file(path), layers)


def _parse(name: str, key: str) -> tuple[Layer, str]:
    """A tensor's name → the layer that it belongs to, and which of `Factors` it is."""
    key = re.sub(r"^base_model\.model\.", "unet.", key)  # PEFT saves a model's layers so
    for mark, kind in _OTHER_KINDS.items():
        if mark in key:
            raise UserError(f"LoRA {name}: {key}: is {kind}; expected plain LoRA")
    if match := _KOHYA.fullmatch(key):
        part, layer, which, alpha = match.groups()
        return (_PARTS.get(part, part), layer), which or alpha
    if match := _DIFFUSERS.fullmatch(key) or _DIFFUSERS_ALPHA.fullmatch(key):
        part, layer, which = match.groups()
        # diffusers' first way of naming them: attn1.processor.to_q_lora.down.weight
        layer = re.sub(r"\.to_out$", ".to_out.0", layer.replace(".processor.", "."))
        return (part, layer.replace(".", "_")), {"A": "down", "B": "up"}.get(which, which)
    raise UserError(f"LoRA {name}: {key}: is no name of a LoRA for Stable Diffusion")


def _read_alphas(name: str, metadata: Mapping[str, str], layers: Mapping[Layer, Factors]) -> None:
    """diffusers writes PEFT's settings, among them the alphas, into the file's metadata."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        for (part, layer), factors in layers.items():
            alpha = settings.get(f"{part}.lora_alpha")
            for pattern, special in (settings.get(f"{part}.alpha_pattern") or {}).items():
                if layer.endswith(pattern.replace(".", "_")):
                    alpha = special
            if factors.alpha is None and alpha is not None:
                factors.alpha = float(alpha)
            if settings.get(f"{part}.use_dora") or settings.get(f"{part}.use_rslora"):
                raise UserError(f"LoRA {name}: is DoRA or rank-stabilised; expected plain LoRA")
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"LoRA {name}: lora_adapter_metadata: cannot be read") from error


class Fused:
    """LoRAs added to the weights of some networks, in place.

    Each weight is made anew from a kept original: W + Σ scale · α/r · B·A, rounded once. So LoRAs may come and go
    as often as they like, and without any the weights are the original ones, to the bit.

    Args:
        parts: "unet", "text_encoder" or "text_encoder_2" → network. LoRAs for other parts are none of its business.
            Layers whose weights are views of others' (see `dmd2.compiled.fuse_projections`) change these, too.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = dict(parts)
        self._modules: dict[Layer, nn.Module] = {}
        for part, network in parts.items():
            for name, module in network.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    for alias in _aliases(part, name, network):
                        self._modules[part, alias.replace(".", "_")] = module
        self._originals: dict[nn.Module, Tensor] = {}
        self._used: tuple[tuple[str, float], ...] = ()

    def __bool__(self) -> bool:
        """Whether any weight is not the original one."""
        return bool(self._originals)

    def check(self, lora: Lora) -> None:
        """Raises UserError unless each of the LoRA's layers for these parts is there and has the right shape."""
        for (part, layer), factors in lora.layers.items():
            if part not in self._parts:
                continue
            module = self._modules.get((part, layer))
            if module is None or not isinstance(module.weight, Tensor):
                raise UserError(f"LoRA {lora.name}: made for another model: this one's {part} has no layer {layer}")
            if not factors.fits(module.weight):
                assert factors.down is not None and factors.up is not None
                raise UserError(
                    f"LoRA {lora.name}: made for another model: {layer} is {list(module.weight.shape)} here, "
                    f"the LoRA's factors {list(factors.up.shape)} and {list(factors.down.shape)}"
                )

    @torch.inference_mode(False)  # else torch would not count the changes, as `dmd2.memory` does
    @torch.no_grad()
    def use(self, loras: Loras) -> None:
        """These and no others from now on, in this order. An error leaves none of them.

        Raises:
            UserError: see `check`.
        """
        wanted = tuple((lora.sha256, scale) for lora, scale in loras)
        if wanted == self._used:
            return
        for lora, _ in loras:
            self.check(lora)
        changes: dict[nn.Module, list[tuple[Factors, float]]] = {}
        for lora, scale in loras:
            for layer, factors in lora.layers.items():
                if layer in self._modules:
                    changes.setdefault(self._modules[layer], []).append((factors, scale))
        try:
            for module, terms in changes.items():
                weight = self._weight(module)
                original = self._originals.setdefault(module, weight.detach().to("cpu", copy=True))
                exact = original.to(weight.device, torch.float32)
                weight.copy_(sum((scale * factors.change(weight) for factors, scale in terms), exact))
            self._restore(module for module in list(self._originals) if module not in changes)
            self._used = wanted
        except BaseException:
            self._restore(list(self._originals))
            self._used = ()
            raise

    def _restore(self, modules: Any) -> None:
        for module in modules:
            self._weight(module).copy_(self._originals.pop(module))

    @staticmethod
    def _weight(module: nn.Module) -> Tensor:
        assert isinstance(module.weight, Tensor)
        return module.weight


def _aliases(part: str, name: str, network: Any) -> Iterator[str]:
    """What LoRA files may call a layer."""
    yield name
    if part == "unet":
        attends = ["CrossAttn" in block for block in network.config.up_block_types]
        yield _ldm_name(name, network.config.layers_per_block, attends)
    elif not name.startswith("text_model."):  # one of transformers' two classes has lost this prefix
        yield f"text_model.{name}"


def _ldm_name(name: str, layers: int, attends: Sequence[bool]) -> str:
    """A layer of diffusers' UNet as Stability's own code calls it, which kohya's SDXL LoRAs follow.

    Args:
        layers: in each block of the way down; one more on the way up.
        attends: whether each block of the way up has attention.
    """
    fixed = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+?)s\.(\d+)\.(.+)", name)
    if name in fixed or not match:
        return fixed.get(name, name)
    where, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnet":
        inside = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
        rest = inside.get(rest, rest).replace("conv_shortcut", "skip_connection")
    if where == "mid":
        return f"middle_block.{2 * index if kind == 'resnet' else 1}.{rest}"
    if where == "down":
        if kind == "downsampler":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        return f"input_blocks.{1 + block * (layers + 1) + index}.{0 if kind == 'resnet' else 1}.{rest}"
    if kind == "upsampler":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends[block] else 1}.{rest}"
    return f"output_blocks.{block * (layers + 1) + index}.{0 if kind == 'resnet' else 1}.{rest}"
