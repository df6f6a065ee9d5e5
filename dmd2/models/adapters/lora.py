"""LoRAs (Hu et al. 2021) and their relatives: read from files, added to a network's weights, and taken out again."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmd2.models.adapters.lora_factors import Factors
from dmd2.models.adapters.lora_keys import (
    MOST_QUOTED,
    Layer,
    Patterns,
    Settings,
    is_pefts,
    parse,
    read_json,
    read_settings,
)
from dmd2.runtime.compiled import Fp8Linear
from dmd2.runtime.errors import UserError, first_line, shown
from dmd2.runtime.files import read_object, sha256_file
from dmd2.runtime.offload import Keeper, upload

logger = logging.getLogger(__name__)

LARGEST_SCALE = 4.0
LARGEST_HEADER = 20_000_000
"""bytes of a file's list of tensors and metadata"""
MOST_TENSORS = 20_000
LONGEST_NAME = 500
"""characters, of a tensor"""
PEFTS_FILE = "adapter_model.safetensors"
SETTINGS_FILE = "adapter_config.json"
"""PEFT's, beside its file; beside STEM.safetensors `STEM.adapter_config.json` comes first"""


@dataclass(frozen=True, eq=False)
class Lora:
    """The content of one LoRA file, on the CPU."""

    name: str
    sha256: str
    """of the file and of PEFT's settings, if there are any"""
    layers: dict[Layer, Factors] = field(repr=False)

    @cached_property
    def changes_text(self) -> bool:
        return any(part != "unet" for part, _ in self.layers)


_STABILITYS = re.compile(r"(?:input_blocks|middle_block|output_blocks)_")
_STABILITYS_OTHERS = re.compile(r"time_embed_|label_emb_|out_[02]$")
_DIFFUSERS = re.compile(r"(?:down_blocks|mid_block|up_blocks)_")

Loras = Sequence[tuple[Lora, float]]
"""with the scale of each"""


def settings_beside(path: Path) -> Iterator[Path]:
    """The path where PEFT keeps a LoRA's settings, whether there is such a file or not."""
    yield path.with_suffix(f".{SETTINGS_FILE}")
    yield path.with_name(SETTINGS_FILE)


def settings_of(path: Path) -> Path | None:
    """The file with PEFT's settings of a LoRA that can be read, if that has PEFT's name or its naming of tensors."""
    found = next((beside for beside in settings_beside(path) if beside.is_file()), None)
    if found is None or path.name == PEFTS_FILE:
        return found
    with safe_open(path, "pt") as file:
        return found if any(map(is_pefts, file.keys())) else None


def read_lora(path: Path, name: str | None = None) -> Lora:
    """Reads a safetensors file, in any naming that `lora_keys` knows, and PEFT's settings beside it.

    Args:
        name: what messages call it, the file's name by default.

    Raises:
        UserError: no safetensors; no LoRA, LoCon, DoRA, LoHa, LoKr or differences; its values are not finite, its
            settings not understood.
    """
    name = shown(name or path.name)
    found: dict[Layer, Factors] = {}
    others = []
    try:
        _check_header(path, name)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            if len(keys) > MOST_TENSORS:
                raise UserError(f"LoRA {name}: {len(keys)} tensors; expected at most {MOST_TENSORS}")
            beside = settings_of(path)
            settings = read_settings(read_object(beside), f"LoRA {name}: {SETTINGS_FILE}") if beside else None
            encoder = ((settings and settings.auto_mapping) or {}).get("base_model_class")
            text_part = "text_encoder_2" if encoder == "CLIPTextModelWithProjection" else "text_encoder"
            if (longest := max(map(len, keys), default=0)) > LONGEST_NAME:
                raise UserError(f"LoRA {name}: a name of {longest} characters; expected at most {LONGEST_NAME}")
            for key in keys:
                parsed = parse(name, key, text_part)
                if parsed is None:
                    others.append(key)
                    continue
                part, layer, what = parsed
                factors = found.setdefault((part, layer.replace(".", "_")), Factors(layer))
                if what in factors.tensors or (what == "alpha" and factors.alpha is not None):
                    raise UserError(
                        f"LoRA {name}: {shown(key, MOST_QUOTED)}: is there twice, by two names or adapters"
                    )
                value = _read(name, key, file)
                if what == "alpha":
                    factors.alpha = _scalar(name, key, value)
                else:
                    factors.tensors[what] = value
    except (SafetensorError, OSError) as error:
        reason = shown(first_line(error))
        raise UserError(f"LoRA {name}: cannot be read as safetensors ({reason}); no other format is read") from error
    if not found:
        told = f": {shown(others[0], MOST_QUOTED)} is no name of a LoRA for Stable Diffusion" if others else ""
        raise UserError(f"LoRA {name}: holds nothing{told}")
    others += _drop_second_names(found)
    if others:
        logger.warning("LoRA %s: %s skipped: %s", name, len(others), shown(", ".join(others[:5])))
    for (part, _), factors in found.items():
        if fault := factors.fault():
            raise UserError(f"LoRA {name}: {part} {shown(factors.layer, MOST_QUOTED)}: {fault}")
    _apply_settings(name, metadata, settings, found)
    has_strength = beside or metadata or any(factors.alpha is not None for factors in found.values())
    if not has_strength and any(map(is_pefts, keys)):
        logger.warning("LoRA %s: no %s and no alpha: its strength is taken to be alpha = rank", name, SETTINGS_FILE)
    sha256 = sha256_file(path)
    if beside:
        sha256 = hashlib.sha256(f"{sha256} {sha256_file(beside)}".encode()).hexdigest()
    return Lora(name, sha256, found)


def _check_header(path: Path, name: str) -> None:
    """Raises UserError for a header that is too large, before the library parses it: the cost grows with its size."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if LARGEST_HEADER < size < path.stat().st_size:
        raise UserError(
            f"LoRA {name}: lists {size / 1e6:.0f} MB of names; expected at most {LARGEST_HEADER / 1e6:.0f}"
        )


def _read(name: str, key: str, file: Any) -> Tensor:
    """Reads one tensor of a file, on the CPU. Its shape is checked first."""
    told = f"LoRA {name}: {shown(key, MOST_QUOTED)}"
    shape = file.get_slice(key).get_shape()
    if any(length >= 2**31 for length in shape) or len(shape) > 5:
        raise UserError(f"{told}: has the shape {shown(shape, MOST_QUOTED)}")
    try:
        value: Tensor = file.get_tensor(key)
        if value.is_complex() or value.dtype == torch.bool:
            raise UserError(f"{told}: is {value.dtype}; expected floating-point numbers")
        simple = value.float() if value.dtype.itemsize == 1 else value  # 8-bit floats have no minimum
        bounds = (
            torch.aminmax(simple) if value.numel() else ()
        )  # NaN if anything is; twenty times as fast as isfinite
        finite = all(math.isfinite(bound) for bound in bounds)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:  # of a type that torch has not
        raise UserError(f"{told}: cannot be read ({shown(error, MOST_QUOTED)})") from error
    if not finite:
        raise UserError(f"{told}: has values that are NaN or infinite: the file is damaged, or its training diverged")
    return value


def _scalar(name: str, key: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise UserError(
            f"LoRA {name}: {shown(key, MOST_QUOTED)}: has the shape {list(value.shape)}; expected one number"
        )
    return float(value)


def _drop_second_names(found: dict[Layer, Factors]) -> list[str]:
    """Of a file with both Stability's and diffusers' names of blocks the former go, as in diffusers' loader."""
    layers = [layer for part, layer in found if part == "unet"]
    if any(map(_STABILITYS.match, layers)) and any(map(_DIFFUSERS.match, layers)):
        stabilitys = [layer for layer in layers if _STABILITYS.match(layer) or _STABILITYS_OTHERS.match(layer)]
        for layer in stabilitys:
            del found["unet", layer]
        return stabilitys
    return []


def _apply_settings(
    name: str, metadata: Mapping[str, str], beside: Settings | None, found: Mapping[Layer, Factors]
) -> None:
    """Strengths beside the tensors. A tensor alpha comes first, then PEFT's settings, then plain metadata."""
    for part in {part for part, _ in found}:
        layers = [factors for (of, _), factors in found.items() if of == part]
        settings, where = beside, f"LoRA {name}: {SETTINGS_FILE}"
        if settings is None:
            where = f"LoRA {name}: lora_adapter_metadata"
            settings = _settings_in_metadata(metadata, part, where)
        if settings is None:
            _apply_flat(name, metadata, part, layers)
        else:
            _apply_pefts(settings, where, layers)


def _settings_in_metadata(metadata: Mapping[str, str], part: str, where: str) -> Settings | None:
    """diffusers keeps PEFT's settings of each network as JSON in the metadata."""
    content = read_json(metadata.get("lora_adapter_metadata") or "{}", where)
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected an object")
    own = {key.removeprefix(f"{part}."): value for key, value in content.items() if key.startswith(f"{part}.")}
    return read_settings(own, where) if own else None


def _apply_pefts(settings: Settings, where: str, layers: Iterable[Factors]) -> None:
    alphas = Patterns(settings.alpha_pattern, f"{where}: alpha_pattern")
    ranks = Patterns(settings.rank_pattern, f"{where}: rank_pattern")
    for factors in layers:
        rank, told = int(ranks.find(factors.layer) or settings.r), shown(factors.layer, MOST_QUOTED)
        down = factors.tensors.get("down")
        if down is not None and len(down) != rank:
            raise UserError(f"{where}: says rank {rank} of {told}, which has {len(down)}: another file's")
        if settings.use_dora and down is not None and factors.magnitude is None:
            raise UserError(f"{where}: use_dora, but {told} has no magnitudes")
        if factors.alpha is not None:
            continue
        special = alphas.find(factors.layer)
        usual = settings.alpha if down is None else settings.lora_alpha
        factors.alpha, factors.stabilised = usual if special is None else special, settings.use_rslora
        factors.rank = rank


def _apply_flat(name: str, metadata: Mapping[str, str], part: str, layers: Iterable[Factors]) -> None:
    """Plain entries: kohya's `ss_network_alpha` and, for larger kernels, `conv_alpha`; others' `lora_alpha`."""

    def number(key: str, value: object) -> float | None:
        if value in (None, "", "None", "null", "Dynamic"):
            return None
        try:
            found = float(str(value)[:50])
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise UserError(f"LoRA {name}: {key}: {shown(value, 50)}; expected a number")
        return found

    names = (f"{part}.lora_alpha", "lora_alpha", "ss_network_alpha")
    alpha = next((a for key in names if (a := number(key, metadata.get(key))) is not None), None)
    stabilised = any(metadata.get(key, "").lower() in ("true", "1") for key in (f"{part}.use_rslora", "use_rslora"))
    conv_alpha = None
    if "ss_network_args" in metadata:
        content = read_json(metadata["ss_network_args"], f"LoRA {name}: ss_network_args")
        conv_alpha = number("conv_alpha", content.get("conv_alpha")) if isinstance(content, dict) else None
    for factors in layers:
        kernels = any(value.ndim == 4 and value.shape[-1] > 1 for value in factors.tensors.values())
        own = conv_alpha if kernels and conv_alpha is not None else alpha
        if factors.alpha is None:
            factors.alpha, factors.stabilised = own, stabilised


_Place = tuple[nn.Module, str]
"""a layer, and weight or bias"""


class Fused:
    """LoRAs added to the weights of some networks, in place.

    Each weight is made anew from a kept original: W + Σ scale · α/r · B·A, rounded once. So LoRAs may come and go
    as often as they like, and without any the weights are the original ones, to the bit. Other kinds (see
    `dmd2.models.adapters.lora_factors`) add their own difference to that original; a scale of 0 adds nothing.

    Args:
        parts: "unet", "text_encoder" or "text_encoder_2" → network. LoRAs for other parts are none of its business.
            Layers whose weights are views of others' (see `fuse_projections`) change these, too, and 8-bit layers are
            rounded anew from what they were made of.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = dict(parts)
        self._modules: dict[Layer, nn.Module] = {}
        for part, network in parts.items():
            for name, found in network.named_modules():
                module = found.source if isinstance(found, Fp8Linear) else found
                if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
                    for alias in _aliases(part, name, network):
                        self._modules[part, alias.replace(".", "_")] = module
        self._originals: dict[_Place, Tensor] = {}
        self._rounded = [m for part in parts.values() for m in part.modules() if isinstance(m, Fp8Linear)]
        self._changed: set[int] = set()
        self._used: tuple[tuple[str, float], ...] = ()

    def __bool__(self) -> bool:
        """Whether any LoRA is in the weights now."""
        return bool(self._originals)

    def check(self, lora: Lora) -> None:
        """Raises UserError unless each of the LoRA's layers for these parts is there and has the right shape."""
        seen: dict[nn.Module, str] = {}
        for (part, layer), factors in lora.layers.items():
            if part not in self._parts:
                continue
            module, told = self._modules.get((part, layer)), shown(layer, MOST_QUOTED)
            if module is None or not isinstance(module.weight, Tensor):
                raise UserError(f"LoRA {lora.name}: made for another model: this one's {part} has no layer {told}")
            bias = module.bias if isinstance(module.bias, Tensor) else None
            if not factors.fits(module.weight, bias):
                here = f"{list(module.weight.shape)}{'' if bias is None else ' with a bias'} here"
                shapes = shown(factors.shapes(), 300)
                raise UserError(
                    f"LoRA {lora.name}: made for another model: {told} is {here}, the LoRA's factors {shapes}"
                )
            if module in seen:
                raise UserError(f"LoRA {lora.name}: {told} is the same layer as {seen[module]}; expected it once")
            seen[module] = told

    @torch.inference_mode(False)  # else torch would not count the changes, as `dmd2.runtime.offload` does
    @torch.no_grad()
    def use(self, loras: Loras) -> None:
        """Puts these LoRAs, and no others, on the networks, in this order. After an error there is none.

        Raises:
            UserError: see `check`; the changed weights are not finite.
        """
        wanted = tuple((lora.sha256, scale) for lora, scale in loras)
        if wanted == self._used:
            return
        for lora, _ in loras:
            self.check(lora)
        changes: dict[_Place, list[tuple[Factors, float]]] = {}
        for lora, scale in loras:
            for layer, factors in lora.layers.items():
                if module := self._modules.get(layer):
                    for place in ((module, "weight"),) * bool(factors.kinds) + ((module, "bias"),) * factors.has_bias:
                        changes.setdefault(place, []).append((factors, scale))
        finite: list[Tensor] = []
        kept = Keeper()
        try:
            for place, terms in changes.items():
                value = self._value(place)
                if place not in self._originals:
                    self._originals[place] = kept(value)
                original = self._originals[place]
                exact = upload(original, value.device).float()
                of_weight = place[1] == "weight"
                added = ((f.change if of_weight else f.bias_change)(exact, scale) for f, scale in terms)
                value.copy_(sum(added, exact))
                self._changed.add(value.untyped_storage().data_ptr())
                finite.append(torch.stack(torch.aminmax(value)).isfinite().all())
            if finite and not bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all()):
                names = ", ".join(lora.name for lora, _ in loras)
                raise UserError(
                    f"LoRA {names}: makes weights that are too large for the model; expected smaller scales"
                )
            self._restore(place for place in list(self._originals) if place not in changes)
            self._used = wanted
        except BaseException:
            self._restore(list(self._originals))
            self._used = ()
            raise
        finally:
            self._round()

    def _restore(self, places: Iterable[_Place]) -> None:
        for place in places:
            value = self._value(place)
            value.copy_(self._originals.pop(place))
            self._changed.add(value.untyped_storage().data_ptr())

    def _round(self) -> None:
        """8-bit layers follow what was changed: their sources, or views of these."""
        for layer in self._rounded:
            if layer.source.weight.untyped_storage().data_ptr() in self._changed:
                layer.round()
        self._changed.clear()

    @staticmethod
    def _value(place: _Place) -> Tensor:
        value = getattr(*place)
        assert isinstance(value, Tensor)
        return value


def _aliases(part: str, name: str, network: Any) -> Iterator[str]:
    """The names that LoRA files may have for a layer."""
    yield name
    if part == "unet":
        attends = ["CrossAttn" in block for block in network.config.up_block_types]
        yield _ldm_name(name, network.config.layers_per_block, attends)
    else:  # one of transformers' two classes has lost this prefix
        yield name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"


def _ldm_name(name: str, layers: int, attends: Sequence[bool]) -> str:
    """A layer of diffusers' UNet as Stability's own code calls it, which kohya's SDXL LoRAs follow.

    Args:
        layers: in each block of the way down; one more on the way up.
        attends: whether each block of the way up has attention.
    """
    fixed = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
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
        inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
        inside["time_emb_proj"] = "emb_layers.1"
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
