"""A network from its `config.json` and safetensors file: built without memory, filled straight from the file.

diffusers' and transformers' own loaders are lenient (a missing key gets random values) and slow to start.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, suppress
from functools import cached_property
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmd2.runtime.errors import WeightsError, shown
from dmd2.runtime.files import only_shapes, read_object

# diffusers up to 0.16 named the attention of VAEs differently. Files of that time are still about.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MOST_LAYERS, MOST_CHANNELS = 200, 1_000_000
"""of any number in a config.json, and of the numbers in one list. (CLIP's vocabulary has 49,408 words.)"""
MOST_SHARDS = 100
NAMED = 3  # keys in an error message, at most


class GroupNorm(nn.GroupNorm):
    """PyTorch's own, the same numbers but for rounding, for networks whose images have their channels last.

    A CPU takes up to 30 times as long for those, forward and backward, as where channels come first (bf16 in torch
    2.13; up to 5 times in fp32). So there they come first for as long as this takes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, …) → the same size, in the same layout."""
        return self.normalised(x, self.weight, self.bias)

    def normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """With these in place of its own."""
        if x.device.type != "cpu" or x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        y = F.group_norm(x.contiguous(), self.num_groups, weight, bias, self.eps)
        return y.contiguous(memory_format=torch.channels_last)


class Deferred:
    """A network that is loaded at its first use; its configuration is known before.

    Args:
        config: as the network has it.
        load: the network.
    """

    def __init__(self, config: Any, load: Callable[[], Any]) -> None:
        self.config, self._load = config, load

    @cached_property
    def network(self) -> Any:
        return self._load()

    @classmethod
    def of(cls, network: Any) -> Deferred:
        """A network that is loaded already, or one of these."""
        return network if isinstance(network, Deferred) else cls(network.config, lambda: network)


def of_diffusers(name: str) -> Any:
    """A class of diffusers, imported as if bitsandbytes were not there.

    It would be imported with it, by PEFT, which takes seconds, for networks quantized by it, which are not read. An
    optimizer that is bitsandbytes' finds it afterwards.
    """
    hidden = "bitsandbytes" not in sys.modules
    if hidden:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        import diffusers

        return getattr(diffusers, name)
    finally:
        if hidden:
            sys.modules.pop("bitsandbytes", None)


def unfilled(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A network on "meta" as `load_network` would give it, but for the numbers."""
    tensors = {
        name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device=device)
        for name, value in network.state_dict().items()
    }
    network.load_state_dict(tensors, assign=True)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    return network.requires_grad_(False).eval()


@torch.inference_mode(False)  # or weights could not be changed later, wherever this is called
def load_network(
    kind: Any, path: Path, device: torch.device, dtype: torch.dtype, settings: Mapping[str, Any] | None = None
) -> Any:
    """The network of class `kind` whose weights are in `path` and whose `config.json` lies beside it, frozen.

    In place of `path` there may be shards of it or files in half precision, see `weight_files`. Each tensor goes from
    the file to `device` in `dtype`, convolutions in channels_last; nothing is initialised and nothing is held
    twice. On a CPU, what is in `dtype` already is mapped, not read. `settings` are used in place of those in
    `config.json`.

    Raises:
        UserError: a file is missing or broken, or they do not fit together: names the keys that are missing,
            unexpected or of the wrong shape.
    """
    if only_shapes():
        return unfilled(build_network(kind, path.with_name("config.json"), settings), device, dtype)
    network, files = _described(kind, path, settings=settings)
    network.load_state_dict(_read(network, files, device, dtype), strict=True, assign=True)
    return network.requires_grad_(False).eval().to(device)  # the last for buffers that no file holds


def check_network(kind: Any, path: Path, *, half: bool = False) -> None:
    """Raises UserError where `load_network` would, but for damage within tensors. Reads headers only."""
    network, files = _described(kind, path, half)
    shapes: dict[str, Sequence[int]] = {}
    floats: dict[str, bool] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
                shapes |= {key: part.get_shape() for key, part in slices.items()}
                floats |= {key: part.get_dtype().startswith(("F", "BF")) for key, part in slices.items()}
        except SafetensorError as error:
            raise WeightsError(f"not a whole safetensors file ({shown(error)})", file) from None
    expect_floats(network, files[0], {name: floats[key] for name, key in fit(network, files[0], shapes).items()})


def _described(
    kind: Any, path: Path, half: bool = False, settings: Mapping[str, Any] | None = None
) -> tuple[Any, list[Path]]:
    config = path.with_name("config.json")
    if not config.is_file():
        raise WeightsError(f"missing; expected a {kind.__name__} there", config)
    files = weight_files(path, half=half)
    return build_network(kind, config, settings), files


def weight_files(path: Path, *, half: bool = False) -> list[Path]:
    """The safetensors files that the usual name `path` stands for: one, or the shards that an index lists.

    Names with "fp16" in them are taken where there are no others, or, where `half`, before others.

    Raises:
        UserError: there are none, or an index is broken.
    """
    stem = path.name.removesuffix(".safetensors")
    plain = [path.name, f"{path.name}.index.json"]
    # Libraries name indexes of variants in two ways.
    halves = [f"{stem}.fp16.safetensors", f"{path.name}.index.fp16.json", f"{stem}.fp16.safetensors.index.json"]
    for name in halves + plain if half else plain + halves:
        file = path.with_name(name)
        if file.is_file():
            return _shards(file) if name.endswith(".json") else [file]
    others = [p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".pth", ".msgpack")]
    there = f", as safetensors; {shown(min(others))} is not read" if others else ""
    raise WeightsError(f"missing; expected weights there{there}", path)


def _shards(index: Path) -> list[Path]:
    of_keys = read_object(index).get("weight_map")
    names = set(of_keys.values()) if isinstance(of_keys, dict) and _are_names(of_keys.values()) else set()
    if not 1 <= len(names) <= MOST_SHARDS:
        raise WeightsError(f"expected a weight_map from tensors to up to {MOST_SHARDS} files beside it", index)
    files = [index.with_name(name) for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise WeightsError(f"missing; {index.name} lists it", file)
    return files


def _are_names(values: Iterable[object]) -> bool:
    return all(isinstance(v, str) and re.fullmatch(r"[\w][\w.-]*\.safetensors", v) for v in values)


def parameters_in(paths: Iterable[Path]) -> int:
    """How many numbers safetensors files hold. Reads their headers only; damaged files count as empty."""
    total = 0
    for path in paths:
        with suppress(SafetensorError), safe_open(path, "pt") as file:  # loading it will say what is wrong
            total += sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    return total


def build_network(kind: Any, config: Path, settings: Mapping[str, Any] | None = None) -> Any:
    """The network of class `kind` that a `config.json` describes, its parameters without memory (on "meta").

    Args:
        settings: instead of the file's content.

    Raises:
        UserError: it describes none.
    """
    from accelerate import init_empty_weights

    settings = dict(read_object(config) if settings is None else settings)
    transformers = hasattr(kind, "config_class")
    parameters = signature(kind.config_class if transformers else kind).parameters
    # Others are notes of those who made it: of training, of versions.
    known = {name: value for name, value in settings.items() if name in parameters}
    _check_counts(config, known)
    _check_types(config, known, parameters)
    try:
        # Parameters only: buffers that are in no file (CLIP's position_ids) keep the values they are made with.
        with init_empty_weights(include_buffers=False):
            made = kind(kind.config_class.from_dict(settings)) if transformers else kind.from_config(settings)
    except Exception as error:  # of any kind: what the libraries raise for wrong types and values
        raise WeightsError(f"describes no {kind.__name__} ({shown(error)})", config) from error
    for module in made.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
    return made


def _check_types(config: Path, settings: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
    """Raises UserError unless settings are of the types that a class's parameters have.

    The libraries look at few of them, and fail when the network runs.
    """
    for name, value in settings.items():
        default, allowed = parameters[name].default, str(parameters[name].annotation)
        if value is None and ("None" in allowed or default is None or isinstance(default, bool)):
            continue  # SDXL's own has "upcast_attention": null
        if isinstance(value, list) and ("tuple" in allowed or "list" in allowed) and not name.endswith("_id"):
            continue
        lowest = -1 if name.endswith("_id") else 0
        match default:
            case bool():
                fine, expected = isinstance(value, bool), "true or false"
            case int() | float():
                fine = isinstance(value, int | float) and math.isfinite(value) and value >= lowest
                expected = f"a number of at least {lowest}"
            case str():
                fine, expected = isinstance(value, str), "text"
            case _:
                continue
        if not fine:
            raise WeightsError(f"{name}: {shown(value)}; expected {expected}", config)


def _check_counts(config: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError for numbers (of layers, channels, …) so large that no network could be built of them."""
    for name, value in settings.items():
        flat, left = [], [value]
        while left:
            item = left.pop()
            left += item if isinstance(item, list) else []
            flat.append(item)
        largest = MOST_LAYERS if "layers" in name or "blocks" in name else MOST_CHANNELS
        if len(flat) > MOST_LAYERS or any(isinstance(n, int) and abs(n) > largest for n in flat):
            raise WeightsError(f"{shown(name)}: {shown(value)}; expected numbers of at most {largest}", config)


def _read(network: nn.Module, files: Sequence[Path], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt", device=str(device))) for file in files]
            where = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
            keys = fit(network, files[0], {key: file.get_slice(key).get_shape() for key, file in where.items()})
            tensors = {name: _placed(where[key].get_tensor(key), device, dtype) for name, key in keys.items()}
    except SafetensorError as error:
        raise WeightsError(f"not a whole safetensors file ({shown(error)})", files[0]) from None
    expect_floats(network, files[0], {name: tensor.is_floating_point() for name, tensor in tensors.items()})
    return tensors


def expect_floats(network: nn.Module, path: Path, floats: Mapping[str, bool]) -> None:
    """Raises UserError where a file has integers (of whatever quantization) for a network's floats."""
    for name, wanted in network.state_dict().items():
        if wanted.is_floating_point() and not floats[name]:
            raise WeightsError(f"{name}: integers; expected floats (quantized weights are not read)", path)


def fit(network: nn.Module, path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Matches a file's tensors to a network: name in the network → key in the file.

    Raises:
        UserError: names the keys that are missing, unexpected or of the wrong shape.
    """
    wanted = network.state_dict()
    derived = {name for name, _ in network.named_buffers()} - wanted.keys()
    known = wanted.keys() | derived
    keys = {_today(key, known): key for key in shapes}
    # Older versions of a library stored what newer ones derive.
    keys = {name: key for name, key in keys.items() if name not in derived}
    found = {name: tuple(shapes[key]) for name, key in keys.items()}
    _check(path, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, found)
    return keys


def _today(key: str, known: AbstractSet[str]) -> str:
    """The name in the network of a key in a file: libraries renamed some."""
    name = re.sub(r"\.(query|key|value|proj_attn)\.(?=weight$|bias$)", lambda m: f".{OLD_ATTENTION[m[1]]}.", key)
    bare = name.removeprefix("text_model.")  # transformers 5 dropped it from CLIPTextModel
    return next((candidate for candidate in (key, name, bare, f"text_model.{bare}") if candidate in known), bare)


def _check(path: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    faults = []
    if missing := [name for name in wanted if name not in found]:
        faults.append(f"lacks {_some(missing)}")
    if unexpected := [name for name in found if name not in wanted]:
        faults.append(f"has {_some(unexpected)}, which it should not")
    wrong = [name for name in wanted if name in found and wanted[name] != found[name]]
    if wrong:
        sizes = [f"{name} as {_size(found[name])} instead of {_size(wanted[name])}" for name in wrong]
        faults.append(f"has {_some(sizes)}")
    if faults:
        raise WeightsError(f"not the network that its config.json describes: {'; '.join(faults)}", path)


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(shown(name) for name in names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, memory_format=layout)
