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
from dmd2.training.parallel.group import Replicated, full, local


class Sharded(Replicated):
    """Every process has a shard of each parameter, and gathers a block's when it runs."""

    collective = True

    def __init__(self, ranks: Ranks, device: torch.device, store: Any) -> None:
        super().__init__(ranks, device, store)
        self.mesh = init_device_mesh(device.type, (ranks.world,))
        self.hosts = init_device_mesh("cpu", (ranks.world,))
        self._prepared: dict[int, tuple[nn.Module, nn.Module, tuple[list[str], torch.dtype | None]]] = {}

    def prepare(self, network: nn.Module, blocks: Sequence[nn.Module] = (), dtype: torch.dtype | None = None) -> None:
        super().prepare(network)
        names = {id(module): name for name, module in network.named_modules()}
        self._shard(network, [names[id(block)] for block in blocks], dtype)

    def _shard(self, network: nn.Module, blocks: list[str], dtype: torch.dtype | None) -> None:
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 takes no other layout
        self._prepared[id(network)] = network, _bare(network), (blocks, dtype)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for name in blocks:
            fully_shard(network.get_submodule(name), mesh=self.mesh, mp_policy=policy)
        # A container is never called, so its members are sharded.
        for root in network.values() if isinstance(network, nn.ModuleDict) else [network]:
            fully_shard(root, mesh=self.mesh, mp_policy=policy)
            for entry in getattr(root, "entry_points", ()):
                register_fsdp_forward_method(root, entry)

    def copy(self, network: nn.Module) -> nn.Module:
        _, bare, how = self._prepared[id(network)]
        twin = _filled(bare, self.device)
        self._shard(twin, *how)
        with torch.no_grad():
            for parameter, value in zip(twin.parameters(), network.parameters(), strict=True):
                local(parameter).copy_(local(value))
            for buffer, source in zip(twin.buffers(), network.buffers(), strict=True):
                buffer.copy_(source)
        return twin

    def whole(self, network: nn.Module) -> nn.Module | None:
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
        """FSDP2 has done it in the backward pass."""


def _bare(network: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes alone."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    return deepcopy(network, memo)


def _filled(bare: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a `_bare` network with room for values."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in bare.parameters()}
    return deepcopy(bare, memo)
