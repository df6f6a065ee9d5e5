"""Networks, gradients and optimizer states in shards, one for each process: FSDP2 (Zhao et al. 2023, 2304.11277)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dmd2.diffusion.draws import Ranks
from dmd2.training.parallel.blocks import compile_blocks
from dmd2.training.parallel.group import Replicated, full, local


class Sharded(Replicated):
    """Every process has a shard of each parameter, and gathers a block's when it runs."""

    collective = True

    def __init__(self, ranks: Ranks, device: torch.device, store: Any) -> None:
        super().__init__(ranks, device, store)
        self.mesh = init_device_mesh(device.type, (ranks.world,))
        self.hosts = init_device_mesh("cpu", (ranks.world,))
        self._whole = set[nn.Parameter]()
        self._prepared: dict[int, tuple[nn.Module, nn.Module, tuple[list[str], torch.dtype | None]]] = {}

    def prepare(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module] = (),
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        super().prepare(network)
        if not blocks:
            self._whole.update(network.parameters())
            return
        names = {id(module): name for name, module in network.named_modules()}
        self._shard(network, [names[id(block)] for block in blocks if block is not network], dtype)
        if compile:
            compile_blocks(blocks)

    def _shard(self, network: nn.Module, blocks: list[str], dtype: torch.dtype | None) -> None:
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 takes no other layout
        self._prepared[id(network)] = network, _bare(network), (blocks, dtype)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        how: dict[str, Any] = {"mesh": self.mesh, "mp_policy": policy}
        how["ignored_params"] = self._whole.intersection(network.parameters())  # of the adapters on it
        for name in blocks:
            fully_shard(network.get_submodule(name), **how)
        # A container is never called, so its members are sharded.
        for root in network.values() if isinstance(network, nn.ModuleDict) else [network]:
            fully_shard(root, **how)
            for entry in getattr(root, "entry_points", ()):
                register_fsdp_forward_method(root, entry)
            # Else it is at the first run that FSDP2 looks which type gradients have, and then all may be frozen.
            fully_shard.state(root)._lazy_init()  # type: ignore[attr-defined]

    def copy(self, network: nn.Module) -> nn.Module:
        if id(network) not in self._prepared:
            return super().copy(network)
        _, bare, how = self._prepared[id(network)]
        twin = _filled(bare, self.device)
        self._shard(twin, *how)
        with torch.no_grad():
            for parameter, value in zip(twin.parameters(), network.parameters(), strict=True):
                local(parameter).copy_(local(value))
            for buffer, source in zip(twin.buffers(), network.buffers(), strict=True):
                buffer.copy_(source)
        return twin

    @torch.no_grad()
    def whole(self, network: nn.Module) -> nn.Module | None:
        if id(network) not in self._prepared:
            return super().whole(network)
        _, bare, _ = self._prepared[id(network)]
        state: dict[str, Tensor] = {}
        for name, value in network.state_dict().items():  # each is gathered by all
            gathered = full(value)
            if self.leads:
                state[name] = gathered.cpu()
        if not self.leads:
            return None
        plain = deepcopy(bare)
        plain.load_state_dict(state, assign=True)
        return plain

    def staged(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return super().staged(tensor)
        own, dense = super().staged(tensor.to_local()), torch.empty(tensor.shape, device="meta").stride()
        return DTensor.from_local(own, self.hosts, tensor.placements, shape=tensor.shape, stride=dense)

    def settle(self) -> None:
        """FSDP2 brings a changed `requires_grad` from shards to what it gathers, never back."""
        for network, _, _ in self._prepared.values():
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of what is in shards FSDP2 has done it in the backward pass."""
        super().reduce(p for p in parameters if not isinstance(p, DTensor))


def _bare(network: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes alone."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    return deepcopy(network, memo)


def _filled(bare: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a `_bare` network with room for values."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in bare.parameters()}
    return deepcopy(bare, memo)
