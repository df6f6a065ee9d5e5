"""The processes of a run, as loop and wiring see them: one alone, or replicas that average their gradients."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from dmd2.diffusion.draws import Ranks
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.training.parallel.blocks import compile_blocks
from dmd2.training.parallel.dropout import share_dropout
from dmd2.training.parallel.norm import share_batch_norms

Strategy = Literal["ddp", "fsdp2"]
T = TypeVar("T")
ONE = Ranks()

BUCKET = 16_000_000
"""elements that are averaged at once"""
PATIENCE = timedelta(hours=2)
"""what one process may take while the others wait, for samples and exports"""


class Parallel:
    """A run of one process. What the others override is called in all processes alike, in the same order."""

    collective = False
    """whether a network runs in all processes at once or not at all"""
    writers: Any = None
    """the processes as a group of torch's, for the threads that write checkpoints"""

    def __init__(self, ranks: Ranks = ONE) -> None:
        self.ranks = ranks

    @property
    def leads(self) -> bool:
        """Whether this process prints, writes logs and exports."""
        return self.ranks.rank == 0

    def prepare(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module] = (),
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        """Makes a network that every process has built alike ready for this run, in place.

        Args:
            blocks: its parts that are gathered one at a time, where it is sharded. Without any it stays whole, as
                adapters and heads do.
            dtype: what they are gathered in; None for their own.
            compile: whether they are compiled, one by one: those that are alike compile once. Of copies they are not.
        """
        share_dropout(network, self.ranks)
        if compile:
            compile_blocks(blocks)

    def copy(self, network: nn.Module) -> nn.Module:
        """Another network of the same weights."""
        return deepcopy(network)

    def whole(self, network: nn.Module) -> nn.Module | None:
        """The network with all of its weights, to be saved; None in a process that saves nothing."""
        return network if self.leads else None

    def settle(self) -> None:
        """After networks have run: parameters are again what optimizers know, and may be frozen or not."""

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes gradients those of the whole batch: their means over the processes."""

    def averaged(self, figures: dict[str, float | Tensor]) -> dict[str, float | Tensor]:
        """The same names in every process → means over them."""
        return figures

    def all(self, true: bool) -> bool:
        """Whether it is true in every process."""
        return true

    def any(self, true: bool) -> bool:
        """Whether it is true in some process."""
        return not self.all(not true)

    def told(self, value: T) -> T:
        """What the leading process has."""
        return value

    def each(self, value: T) -> list[T]:
        """What every process has, by rank. Not in two threads at once."""
        return [value]

    def staged(self, tensor: Tensor) -> Tensor:
        """A copy on the host, of what this process has."""
        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """What goes wrong within is told once, by the process that it happened in first."""
        yield


ALONE = Parallel()


class Replicated(Parallel):
    """Every process has all networks, and the same weights in them.

    Without a `store` the other processes are imagined (`run/memory.py`), and no checkpoint is written.
    """

    def __init__(self, ranks: Ranks, device: torch.device, store: Any) -> None:
        super().__init__(ranks)
        self.device, self.store = device, store
        self.writers = None if store is None else dist.new_group(backend="gloo", timeout=PATIENCE)

    def prepare(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module] = (),
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        super().prepare(network, blocks, dtype, compile)
        share_batch_norms(network, self.ranks.world)
        # CPUs of two kinds need not initialise alike to the last bit
        for tensor in (*network.parameters(), *network.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, 0)
            tensor.detach().copy_(whole)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.ranks.world
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view(gradient.shape))

    def averaged(self, figures: dict[str, float | Tensor]) -> dict[str, float | Tensor]:
        values = [torch.as_tensor(value).detach().double().reshape(()).to(self.device) for value in figures.values()]
        total = torch.stack(values).cpu()
        dist.all_reduce(total)
        return dict(zip(figures, (total / self.ranks.world).unbind(), strict=True))

    def all(self, true: bool) -> bool:
        flag = torch.tensor(int(true))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def told(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def each(self, value: T) -> list[T]:
        box: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(box, value, self.writers)
        return box

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if self.store.add("failed", 1) > 1:
                sys.exit(2)
            alike = self.leads or isinstance(error, InvalidInput)  # what was asked for is wrong everywhere
            raise error if alike else UserError(f"process {self.ranks.rank}: {error}") from error
        except RuntimeError:  # such as a connection that is closed, as another process has failed
            if self.store.add("failed", 0):
                sys.exit(2)
            raise


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, each of one type and of at most `BUCKET` elements if it is not a single one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def joined(strategy: Strategy | None, device: torch.device) -> Iterator[Parallel]:
    """The processes that torchrun has started, joined for the block. Without torchrun this one is alone.

    Args:
        device: "cuda" is for each process the GPU of its place on its machine.

    Raises:
        UserError: `strategy` is named, and there is no torchrun; one GPU is named for all processes; a machine has
            fewer GPUs than processes.
    """
    if strategy is not None and "RANK" not in os.environ:
        example = f"torchrun --nproc-per-node 2 -m dmd2.cli train NAME --parallel {strategy}"
        raise InvalidInput("parallel", f"expected a start by torchrun: {example}", strategy)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and strategy != "fsdp2":
        yield ALONE
        return
    if device.type == "cuda":
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if device != torch.device("cuda"):
            raise InvalidInput("device", "expected cuda: torchrun's processes each have a GPU of their own", device)
        if number >= count:
            raise UserError(f"process {number} of this machine: expected a GPU for each, and there are {count}")
        torch.cuda.set_device(number)
    store, rank, world = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world)
    try:
        if strategy == "fsdp2":
            from dmd2.training.parallel.sharded import Sharded

            yield Sharded(Ranks(rank, world), device, store)
        else:
            yield Replicated(Ranks(rank, world), device, store)
    finally:
        dist.destroy_process_group()


def check_shares(parallel: Parallel, shared: bool, sizes: dict[str, int]) -> None:
    """
    Args:
        sizes: images of a batch, by the recipe's field.

    Raises:
        UserError: one cannot be shared equally, or the recipe is not to be `shared`.
    """
    if parallel.ranks.world > 1 and not shared:
        raise UserError("this recipe's loss looks at its whole batch; expected one process, without torchrun")
    for name, size in sizes.items():
        if size % parallel.ranks.world:
            raise InvalidInput(
                "set", f"expected a multiple of the {parallel.ranks.world} processes", f"{name}={size}"
            )


def local(tensor: Any) -> Any:
    """What this process has of a tensor: all, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Any) -> Any:
    """All of a tensor, gathered by all processes if it is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_of(part: Tensor, like: Any) -> Tensor:
    """All of a tensor of which every process has the part that it has of `like`."""
    if not isinstance(like, DTensor):
        return part
    where = like.device_mesh, like.placements
    return DTensor.from_local(part, *where, shape=like.shape, stride=like.stride()).full_tensor()


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has all of, as `like` has it: as a whole or in shards."""
    if isinstance(like, DTensor) and not isinstance(value, DTensor) and value.shape == like.shape:
        where = like.device_mesh
        return distribute_tensor(value.to(where.device_type), where, like.placements, src_data_rank=None)
    return value
