"""Does a checkpoint belong to this run? Its recipe, its inputs, the shapes of its networks and optimizers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.terminal import say
from dmd2.training.parallel.group import local

FREE = {f"loop.{name}" for name in ("iterations", "log_every", "sample_every", "checkpoint_every")}
"""what may change when a run goes on: how long it is, and what it shows; never what a step does"""


def check_recipe(path: Path, mine: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> None:
    """Refuses another recipe. One that has gained keys since is the same; what they are now is said.

    Raises:
        UserError: naming what differs.
    """
    now, then = (_flat(recipe or {}) for recipe in (mine, theirs))
    gained = {key for key in now.keys() - then.keys() if key != "name"} if then else set()
    changed = sorted(k for k in (now.keys() | then.keys()) - gained - FREE if now.get(k) != then.get(k))
    if changed:
        raise UserError(f"{path}: made by another recipe (different: {', '.join(changed)})")
    if gained - FREE:
        values = ", ".join(f"{key}={json.dumps(now[key])}" for key in sorted(gained - FREE))
        say(f"{path}: its recipe says nothing of {values}; going on with that")


def check_inputs(mine: Mapping[str, str] | None, theirs: Mapping[str, str] | None) -> None:
    """Refuses other data, teacher and so on. Where one side does not know, nothing is compared.

    Args:
        mine: name of the option → sha256 of what it names.

    Raises:
        UserError: naming the option.
    """
    if mine is None or theirs is None:
        return
    for name in sorted(mine.keys() | theirs.keys()):
        now, then = (str(hashes.get(name) or "nothing")[:12] for hashes in (mine, theirs))
        if mine.get(name) != theirs.get(name):
            raise InvalidInput(
                name, f"not what this run began with (sha256 {then}, now {now}); name that, or another `out`"
            )


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lr": 1, "loop": {"seed": 0}} → {"lr": 1, "loop.seed": 0}, with tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        flat |= inner
    return json.loads(json.dumps(flat))


def check_module(what: str, module: nn.Module, state: object) -> None:
    """Raises UserError unless `state` has the tensors of `module`, all and only, of the same shapes."""
    expected = module.state_dict()
    if not isinstance(state, Mapping):
        raise UserError(f"{what}: lacks the network")
    for name, tensor in expected.items():
        there = state.get(name)
        if not isinstance(there, Tensor):
            raise UserError(f"{what}: lacks the tensor {name}")
        if there.shape != tensor.shape:
            raise UserError(f"{what}: the tensor {name} is {tuple(there.shape)}; this run's is {tuple(tensor.shape)}")
    for name in state.keys() - expected.keys():
        raise UserError(f"{what}: holds the tensor {str(name)[:200]!r}, which this run's network lacks")


def check_optimizer(what: str, optimizer: Optimizer, state: object) -> None:
    """Raises UserError unless `state` is of an optimizer of as many parameters, of the same shapes."""
    try:
        groups, values = state["param_groups"], state["state"]  # type: ignore[index]
        counts = [len(group["params"]) for group in groups]
        tensors = {i: [t for t in s.values() if isinstance(t, Tensor) and t.ndim] for i, s in values.items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{what}: lacks the optimizer's state") from None
    mine = [group["params"] for group in optimizer.param_groups]
    if counts != [len(group) for group in mine]:
        raise UserError(f"{what}: its optimizer has {counts} parameters; this run's has {[len(g) for g in mine]}")
    wanted = dict(zip((i for g in groups for i in g["params"]), (p for g in mine for p in g), strict=True))
    for i, found in tensors.items():
        # of fewer dimensions: scales and tables of averages that are kept in 8 bits
        if i not in wanted or any(t.shape != wanted[i].shape and t.ndim >= wanted[i].ndim for t in found):
            raise UserError(f"{what}: its optimizer's state does not fit this run's parameters")


def first_not_finite(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The name of the first parameter with a value that is infinite or no number. (Buffers, such as masks, may.)"""
    for name, module in modules:
        for key, value in module.named_parameters():
            if not bool(torch.isfinite(local(value)).all()):
                return f"{name}: {key}"
    return None
