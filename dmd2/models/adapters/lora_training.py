"""LoRAs in training: one frozen UNet and any number of adapters on it, each of them a network of its own.

PEFT's layers hold the factors; which adapter a call of the UNet uses is decided by the `Adapted` that makes the call,
and no other call ever sees it: without one, the UNet is the bare one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.models.adapters.lora import read_lora
from dmd2.runtime.errors import UserError
from dmd2.runtime.tensors import save_tensors

TARGETS = (
    r".*\.(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv[12]|conv_shortcut|time_emb_proj)"
)
"""Attention, feed-forward layers and residual blocks. Not the convolutions that change the resolution: A1111 takes
diffusers' name of SDXL's first for another layer's."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' own name for it: `load_lora_weights(folder)` finds it"""


@dataclass(frozen=True)
class LoraShape:
    """The numbers of an adapter."""

    rank: int
    alpha: float
    """its strength: what is added to a weight is alpha / rank · B·A"""


class Switch:
    """Which of the adapters on a UNet its calls use. It lies on the UNet; without adapters it has nothing to do."""

    def __init__(self, unet: nn.Module) -> None:
        self.layers = [module for _, module in _layers(unet)]
        self.names: list[str] = []
        self.set([])

    @staticmethod
    def of(unet: Any) -> Switch:
        return unet.__dict__.get("adapter_switch") or Switch(unet)

    def set(self, names: list[str]) -> None:
        """PEFT's own `set_adapter` would freeze the other adapters, and backward then skip what they are owed."""
        self.names = names
        for layer in self.layers:
            layer._active_adapter = names

    @contextmanager
    def using(self, names: list[str]) -> Iterator[None]:
        """Within it, these; afterwards again those from before."""
        before = self.names
        self.set(names)
        try:
            yield
        finally:
            self.set(before)


class Adapted(nn.Module):
    """One LoRA on a frozen UNet, as a UNet whose parameters are the LoRA's alone, fp32.

    A new one leaves the UNet's function as it is (B is zero). A deep copy is another adapter on the same UNet.

    Args:
        unet: diffusers' `UNet2DConditionModel`, frozen, in any dtype. It is given PEFT's layers.
        name: of this adapter; no other's on this UNet.
    """

    unet: Any
    name: str
    shape: LoraShape

    def __init__(self, unet: Any, name: str, shape: LoraShape) -> None:
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UserError("adapter=lora: needs PEFT; pip install 'dmd2[train]' brings it") from error
        self.__dict__.update(unet=unet, name=name, shape=shape)  # the UNet is no part of this module
        given = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=TARGETS)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            inject_adapter_in_model(given, unet, adapter_name=name)
        self.layers = nn.ModuleDict()
        for layer, module in _layers(unet):
            down, up = module.lora_A[name].float(), module.lora_B[name].float()
            self.layers[layer.replace(".", "_")] = nn.ModuleDict({"lora_down": down, "lora_up": up})
        unet.__dict__["adapter_switch"] = Switch(unet)
        self.requires_grad_(True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        taken = {name for _, module in _layers(self.unet) for name in module.lora_A}
        free = next(name for n in range(len(taken) + 1) if (name := f"{self.name}_{n}") not in taken)
        memo[id(self)] = copy = Adapted(self.unet, free, self.shape)
        copy.load_state_dict(self.state_dict())
        return copy

    def active(self) -> AbstractContextManager[None]:
        """Calls of the UNet in here use this adapter."""
        return Switch.of(self.unet).using([self.name])

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with self.active():
            return self.unet(*inputs, **named)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Writes kohya's names with diffusers' names of blocks, and alpha as a tensor beside each pair of factors.

        Of the spellings that diffusers reads it is the one that ComfyUI and A1111 read as well, for SD 1.5 and SDXL:
        A1111 knows neither PEFT's nor diffusers' own. fp32, so that a run that goes on loses nothing.
        """
        tensors: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            tensors[f"lora_unet_{name.removeprefix('layers.')}"] = value.detach().cpu().contiguous()
        for layer in self.layers:
            tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(float(self.shape.alpha))
        save_tensors(tensors, path, {"format": "pt", **metadata})

    def load(self, path: Path) -> None:
        """Takes over what `save` has written. Raises UserError if it is a LoRA of another shape, or none."""
        read_lora(path)  # says in one line what is wrong with a file
        tensors = load_file(path)
        alphas = {float(value) for name, value in tensors.items() if name.endswith(".alpha")}
        factors = {
            name.replace("lora_unet_", "layers.", 1): value
            for name, value in tensors.items()
            if not name.endswith(".alpha")
        }
        own = {name: value.shape for name, value in self.state_dict().items()}
        if {name: value.shape for name, value in factors.items()} != own or alphas != {float(self.shape.alpha)}:
            expected = f"expected one of rank {self.shape.rank} and alpha {self.shape.alpha:g} that a run exported"
            raise UserError(f"{path}: a LoRA of other layers, another rank or alpha; {expected}")
        self.load_state_dict(factors)


def bare(unet: Any) -> Any:
    """A copy of a UNet without the adapters that it may carry."""
    copy = deepcopy(unet)
    for name, module in list(_layers(copy)):
        parent, _, child = name.rpartition(".")
        setattr(copy.get_submodule(parent), child, module.base_layer)
    copy.__dict__.pop("adapter_switch", None)
    return copy


def halve(unet: nn.Module, dtype: torch.dtype) -> None:
    """The UNet in `dtype`, but not the adapters that it carries."""
    for name, parameter in unet.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def checkpoint_activations(unet: Any) -> None:
    """Has a UNet's blocks run again in backward instead of keeping what is inside them.

    In backward another adapter may be in use, or none: a block runs again with those that it was called with.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.utils.checkpoint import checkpoint

    def call(block: nn.Module, *inputs: Any) -> Any:
        switch = Switch.of(unet)
        contexts = partial(_twice, switch, switch.names)
        # FSDP2 passes a block's inputs through `view_as`, in its first run alone. Where a size is 1, that changes its
        # stride, and what is compiled for another stride keeps other tensors. A second `view_as` changes nothing.
        if isinstance(block, FSDPModule):
            inputs = tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in inputs)
        return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)

    unet.enable_gradient_checkpointing(call)


def _twice(switch: Switch, names: list[str]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds a block's first run and its second."""
    return nullcontext(), switch.using(names)


def _layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers by name. Without adapters there is no need of PEFT, which not every installation has."""
    if sys.modules.get("peft") is None:
        return iter(())
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in unet.named_modules() if isinstance(module, LoraLayer))
