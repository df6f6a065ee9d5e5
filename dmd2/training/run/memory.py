"""What a run will take, before there is one: its step on tensors that have everything but numbers.

Networks, optimizers and batches are made as for a run, of fake tensors (`torch._subclasses.FakeTensorMode`): shapes,
types and lifetimes are a run's own, so each tensor's bytes are counted from its making to its end, and with them the
arithmetic. Nothing is allocated, no weights are read, and a cluster of any size needs one process.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from dmd2.data.pairs import RegressionPairs
from dmd2.diffusion.draws import Ranks
from dmd2.models.family import Family, open_family
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.files import shapes_alone
from dmd2.training.distil import Distillation, wire
from dmd2.training.loop import Batch, Ema, Method, training_step
from dmd2.training.methods.common import Recipe, Samples
from dmd2.training.parallel.group import ALONE, Parallel, Replicated, Strategy, check_shares
from dmd2.training.preview import RowsPreview
from dmd2.training.sources import SOURCES, Inputs

aten: Any = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
BEGUN = ("resumed", "resumed_head", "pretrained"), ("student_init",)
"""fields that say what networks begin as, of the same shapes in any case: what they are to be without"""


class Tracker(TorchDispatchMode):
    """Counts bytes of the tensors that are made within it, while they live, and floating-point operations.

    It sees real tensors as well as fake ones, but not what a kernel takes for itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self.chosen = 0
        """what a random whole number on fake tensors is, such as the student's exit step"""
        self._known: dict[int, int] = {}
        """bytes by storage"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return {torch.bool: True, torch.int64: self.chosen}.get(args[0].dtype, 1.0)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it takes itself apart first: its shards are what is there
        out = func(*args, **(kwargs or {}))
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._note(tensor.untyped_storage())
        return out

    def __enter__(self) -> Tracker:
        resize, tracker = torch.UntypedStorage.resize_, self

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if storage._cdata in tracker._known:
                tracker._count(storage._cdata, size)
            return storage

        self._resizing = patch.object(torch.UntypedStorage, "resize_", resized)  # how FSDP2 frees what it gathered
        self._resizing.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        self._resizing.stop()

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._count(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _count(self, key: int, size: int) -> None:
        self.now += size - self._known.get(key, 0)
        self._known[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


class _Fake(FakeTensorMode):
    """A copy of a network is of the same mode as the network."""

    def __deepcopy__(self, memo: Any) -> _Fake:
        return self


@dataclass(frozen=True)
class Prediction:
    """Bytes of tensors of one process, and operations of one step of all processes."""

    weights: int
    """of all networks: those that are trained, frozen ones, adapters; where they are sharded, this one's shards"""
    average: int
    """the student's exponential moving average, where there is one"""
    optimizer: int
    step: int
    """what a step adds at its peak: gradients, activations, gathered shards"""
    peak: int
    flops: int
    """a step's, the mean over exit steps and over steps with and without the generator's update"""

    def as_json(self) -> dict[str, Any]:
        sizes = {name: round(size / 1e6, 1) for name, size in asdict(self).items() if name != "flops"}
        return {"megabytes": sizes, "teraflops": round(self.flops / 1e12, 6)}


def predict(
    recipe: Recipe,
    paths: Mapping[str, Path | None],
    device: torch.device,
    cards: int = 1,
    strategy: Strategy = "ddp",
    *,
    count_flops: bool = True,
) -> Prediction:
    """What a process of a run would take.

    Args:
        paths: `init` and `lpips`, as on the command line. Of the folder the configurations alone are read, of the
            file its size, if it is there.
        device: whose operations are counted; "cuda" needs one.
        cards: processes that share each batch.

    Raises:
        UserError: the recipe trains no student; its batch cannot be shared by so many.
    """
    if not predictable(recipe):
        raise InvalidInput("recipe", "expected one that makes a student, without timm's networks", recipe.kind)
    recipe = _bare(recipe)
    sizes = {"batch_size": recipe.loop.batch_size, "pairs_batch": getattr(recipe, "pairs_batch", 0)}
    tracker = Tracker()
    with (
        warnings.catch_warnings(),
        shapes_alone(),
        _group(strategy, cards, device) as parallel,
        _Fake(allow_non_fake_inputs=True),
        patch("torch.utils.swap_tensors", _set),
        tracker,
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own copying does so
        check_shares(parallel, recipe.shared, sizes)
        method = _wired(recipe, Inputs(paths, device, parallel))
        weights = tracker.now
        kept = method.ema_model if recipe.loop.averages else None
        average = Ema(kept, 0.999, 0.0, parallel) if kept is not None else None
        with_average = tracker.now
        _fill(method)
        standing = tracker.now
        tracker.peak = tracker.flops = 0
        step = partial(_step, method, recipe, parallel, tracker)
        first = step(0, 0)
        if any(phase.rests for phase in method.phases):  # then no step has all of them
            step(1, 0)
        peak = tracker.peak
        flops = _mean(method, recipe, step, first) * cards if count_flops else 0
        del average
    return Prediction(weights, with_average - weights, standing - with_average, peak - standing, peak, round(flops))


def _set(parameter: Tensor, value: Tensor) -> None:
    """What `Module.to` does to a fake parameter; torch's own way refuses one that a weak reference points to."""
    parameter.data = value.data


def predictable(recipe: Recipe) -> TypeGuard[Distillation]:
    """Whether there are only networks that their configurations describe."""
    return isinstance(recipe, Distillation) and not getattr(recipe, "backbones", ())


def _bare(recipe: Distillation) -> Distillation:
    named = {field.name for field in fields(recipe)}
    changed: dict[str, Any] = {"compile": False}
    for names, value in zip(BEGUN, (False, None), strict=True):
        changed |= {name: value for name in names if name in named}
    return replace(recipe, **changed)


def _wired(recipe: Distillation, inputs: Inputs) -> Method:
    source = SOURCES[recipe.data]
    init = inputs.with_defaults(source.defaults).need("init")
    inputs = replace(inputs, paths={"init": init, "lpips": inputs.get("lpips")})
    host = torch.device("meta") if source.precomputed else None  # what is on "meta" is not counted
    family = open_family(init, inputs.device, recipe.precision, host)
    nothing: Any = _NoSource()
    return wire(recipe, family, nothing, inputs, _data(recipe, family, inputs, source.precomputed))


class _NoSource:
    """Shows nothing."""

    def preview(self) -> Any:
        return RowsPreview(None)


def _data(recipe: Distillation, family: Family, inputs: Inputs, precomputed: bool) -> Callable[[int], Samples]:
    """A step's data as `dmd2.training.distil` makes them, of any labels and of black images."""

    def own(n: int) -> int:
        rows = inputs.rows(n)
        return rows.stop - rows.start

    def real(n: int) -> Tensor:
        channels, height, width = family.shape
        if precomputed:
            return torch.zeros(n, channels, height, width, device=inputs.device)
        factor = family.codec.factor
        size = n, 3, height * factor, width * factor
        return family.codec.encode(torch.zeros(size, dtype=torch.uint8, device=inputs.device))

    def pairs(n: int) -> RegressionPairs:
        noise = torch.zeros(n, *family.shape, device=inputs.device)
        return RegressionPairs(noise, torch.zeros_like(noise), family.condition(family.any_labels(n)))

    @torch.no_grad()
    def data(step: int) -> Samples:
        n = own(recipe.loop.batch_size)
        if recipe.only_pairs:
            found = pairs(n)
            return Samples(tuple(found.noise.shape), found.cond, None, pairs=found)
        cond = family.condition(family.any_labels(n))
        images = real(n) if recipe.needs_images else None
        real_cond = None if images is None else family.condition(family.any_labels(n))
        few = getattr(recipe, "pairs_batch", 0)
        return Samples(
            (n, *family.shape), cond, family.unconditional(cond), images, real_cond, pairs(own(few)) if few else None
        )

    return data


@contextmanager
def _group(strategy: Strategy, cards: int, device: torch.device) -> Iterator[Parallel]:
    """`cards` processes, of which this is the first, and the others are imagined."""
    if cards == 1 and strategy == "ddp":
        yield ALONE
        return
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

    from dmd2.training.parallel.sharded import Sharded

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("fake", store=store, rank=0, world_size=cards)
    try:
        yield (Sharded if strategy == "fsdp2" else Replicated)(Ranks(0, cards), device, None)
    finally:
        dist.destroy_process_group()


def _fill(method: Method) -> None:
    """The optimizers' states, which they make at their first step."""
    for phase in method.phases:
        for group in phase.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        phase.optimizer.step()
        phase.optimizer.zero_grad(set_to_none=True)


def _step(method: Method, recipe: Distillation, parallel: Parallel, tracker: Tracker, after: int, chosen: int) -> int:
    """A step in which every phase has its turn, or one some steps `after` it. Gives its operations."""
    settings, parts = recipe.loop, min(2, recipe.loop.grad_accum_steps)
    whole = math.lcm(*(phase.every for phase in method.phases))
    step = -(-max(phase.first for phase in method.phases) // whole) * whole + after
    before, tracker.chosen = tracker.flops, chosen
    batches = [Batch(step, method.data(i), parallel.ranks.generator(i)) for i in range(parts)]
    training_step(method.phases, batches[0], settings, batches[1:], [], parallel)
    return (tracker.flops - before) * settings.grad_accum_steps // parts


def _mean(method: Method, recipe: Distillation, step: Callable[[int, int], int], first: int) -> float:
    """Operations of a mean step, given those of one in which every phase has its turn and the student takes one pass.

    Exit steps are equally likely: of each rollout, half of the passes before the last are added.
    """
    share = max((1 / phase.every for phase in method.phases if phase.every > 1), default=1.0)
    more = len(recipe.levels) - 1
    alone = step(1, 0) if share < 1 or more else 0
    longer = step(1, more) if more else alone
    return share * first + (1 - share) * alone + (longer - alone) / 2
