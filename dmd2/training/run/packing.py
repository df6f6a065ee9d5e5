"""What a run is made of, as named tensors and the numbers beside them; and back, once all of it is known to fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd2.runtime.errors import UserError
from dmd2.training.parallel.group import Parallel
from dmd2.training.run.belonging import check_module, check_optimizer
from dmd2.training.run.checkpoints import Stored, Tensors, packed_optimizer

Part = tuple[str, nn.Module, Optimizer]
"""of a run: a phase's name, what it trains, and how. Phases that share both are in a checkpoint once."""


def pack(parts: Iterable[Part], average: nn.Module | None) -> tuple[dict[str, Any], Tensors]:
    """(numbers by phase, tensors), which are the run's own."""
    numbers, tensors, owners = dict[str, Any](), Tensors(), _Owners()
    for name, module, optimizer in parts:
        if (owner := owners.of(name, module, optimizer)) != name:
            numbers[name] = {"as": owner}
            continue
        tensors |= {f"{name}/module/{k}": v for k, v in module.state_dict().items()}
        numbers[name] = packed_optimizer(optimizer.state_dict(), name, tensors)
    if average is not None:
        tensors |= {f"average/{k}": v for k, v in average.state_dict().items()}
    return numbers, tensors


def unpack(stored: Stored, parts: Iterable[Part], average: nn.Module | None, parallel: Parallel) -> None:
    """Loads all of it, in place, or nothing.

    Raises:
        UserError: something is of other shapes, or not there.
    """
    path, numbers = stored.path, stored.about["phases"]
    parts = list(parts)
    if numbers.keys() != {name for name, _, _ in parts}:
        mine = ", ".join(name for name, _, _ in parts)
        raise UserError(f"{path}: trains {', '.join(map(str, numbers))}; this run {mine}")
    targets, states, owners = Tensors(), list[tuple[Optimizer, dict[str, Any]]](), _Owners()
    for name, module, optimizer in parts:
        if owners.of(name, module, optimizer) != name:
            continue
        check_module(f"{path}: {name}", module, _under(stored.tensors, f"{name}/module/"))
        state = _optimizer_state(path, name, numbers[name], stored.tensors)
        check_optimizer(f"{path}: {name}", optimizer, state)
        targets |= {f"{name}/module/{k}": v for k, v in module.state_dict().items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        order = [i for group in state["param_groups"] for i in group["params"]]
        for i, parameter in zip(order, parameters, strict=True):
            values = state["state"].get(i, {})
            for key, value in values.items():
                if isinstance(value, Tensor):
                    targets[f"{name}/optimizer/{i}/{key}"] = values[key] = _room(value, parameter)
        states.append((optimizer, state))
    if average is not None:
        check_module(f"{path}: average", average, _under(stored.tensors, "average/"))
        targets |= {f"average/{k}": v for k, v in average.state_dict().items()}
    with torch.no_grad():
        stored.fill(targets, parallel)
    for optimizer, state in states:
        optimizer.load_state_dict(state)


class _Owners:
    """Which phase's module and optimizer are first those of each."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], str] = {}

    def of(self, name: str, module: nn.Module, optimizer: Optimizer) -> str:
        return self._names.setdefault((id(module), id(optimizer)), name)


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer_state(path: Path, name: str, numbers: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """As the optimizer's `state_dict`, with tensors that have shapes alone."""
    values = {int(i): dict(each) for i, each in numbers["values"].items()}
    for key, value in _under(tensors, f"{name}/optimizer/").items():
        number, _, what = key.partition("/")
        values.setdefault(int(number), {})[what] = value
    return {"state": values, "param_groups": [dict(group) for group in numbers["groups"]]}


def _room(value: Tensor, parameter: Tensor) -> Tensor:
    """An empty tensor like `value`, in shards and laid out as the parameter where it is of its shape."""
    if value.shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    return torch.zeros(value.shape, dtype=value.dtype)
