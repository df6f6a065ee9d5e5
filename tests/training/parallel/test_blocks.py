"""Blocks that are compiled one by one train as they do uncompiled; with shards, too, in `test_together`."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dmd2.training.loop import Batch, Ema, LoopSettings, training_step
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.parallel import group
from dmd2.training.parallel.blocks import compile_blocks
from dmd2.training.sources import Inputs

CPU = torch.device("cpu")
LOOP = LoopSettings(2, 2, warmup=0)
CASES: dict[str, dict[str, Any]] = {
    "full-gan": {"gan_generator": 0.1, "gan_critic": 0.1},
    "adapters-checkpointing": {"adapter": "lora", "networks": "adapters", "rank": 2, "checkpointing": True},
}


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of torch.compile but its last part, the making of kernels."""
    monkeypatch.setattr(group, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    counters.clear()
    yield
    torch.compiler.reset()


def trained(inputs: Inputs, compile: bool, **fields: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps, and the gradients' averages of the optimizers."""
    torch.compiler.reset()
    counters.clear()
    given: dict[str, Any] = {"data": "emoji", "sigmas": (), "timesteps": (999,), "precision": "fp32"}
    recipe = Dmd2Recipe(LOOP, 1e-4, lr_critic=1e-4, generator_every=1, compile=compile, **given, **fields)
    assert recipe.conflict() is None
    method = recipe.method(inputs)
    losses = []
    for step in range(2):
        batch = Batch(step, method.data(step), torch.Generator().manual_seed(step))
        told = training_step(method.phases, batch, LOOP)
        losses += [float(told[phase.name]) for phase in method.phases]
        assert not any(told[f"{phase.name}/skipped"] for phase in method.phases)
    states = {
        f"{phase.name} {number}": state["exp_avg"]
        for phase in method.phases
        for number, state in phase.optimizer.state_dict()["state"].items()
    }
    return losses, states


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_trains_as_uncompiled(name: str, weights: Path, emoji_zip: Path) -> None:
    inputs = Inputs({"init": weights, "data": emoji_zip, "classifier": weights / "none"}, CPU)
    plain, moments = trained(inputs, False, **CASES[name])
    assert not counters["stats"]
    losses, others = trained(inputs, True, **CASES[name])
    assert counters["stats"]["unique_graphs"] > 4 and not counters["graph_break"]
    assert losses == pytest.approx(plain, rel=1e-4)
    size = torch.stack([value.norm() for value in moments.values()]).norm()
    apart = torch.stack([(moments[key] - others[key]).norm() for key in moments]).norm()
    assert size > 0 and apart <= 1e-3 * size


def test_a_copy_runs_weights_of_its_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    network = nn.Sequential(Block(), Block())
    group.Parallel().prepare(network, list(network), compile=True)
    average = Ema(network, 0.9).module
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    x = torch.ones(2, 3)
    assert network(x).eq(4).all() and average(x).eq(1).all() and deepcopy(network)(x).eq(4).all()
    assert counters["stats"]["unique_graphs"] > 0
