"""A rehearsal: what a run would hold, need and take, from a few of its steps; nothing of it is kept or written."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.runtime.offload import peak_memory
from dmd2.training.loop import Batch, LoopSettings, Method, training_step


def rehearse(method: Method, settings: LoopSettings) -> dict[str, Any]:
    """Runs a step to get warm, then two timed ones: one in which every phase has its turn, and the one after it.

    Gives JSON's types: parameters by network (those that are only looked at, such as the teacher, together as
    "frozen"), megabytes, the peak of the process (of the GPU, if there is one) and seconds. It changes the networks.
    """
    whole = math.lcm(*(phase.every for phase in method.phases))
    begin = -(-max(phase.first for phase in method.phases) // whole) * whole
    _timed_step(method, settings, begin)
    all_phases, next_step = _timed_step(method, settings, begin), _timed_step(method, settings, begin + 1)
    rare = [1 / phase.every for phase in method.phases if phase.every > 1]
    step = next_step + (all_phases - next_step) * (max(rare) if rare else 0.5)

    trained = {phase.name: list(phase.module.parameters()) for phase in method.phases}
    ema = list(method.ema_model.parameters()) if method.ema_model is not None else []
    shown = {id(p) for p in [*ema, *(p for parameters in trained.values() for p in parameters)]}
    # By type: to ask whether a proxy is an instance would run it.
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    frozen = {id(p): p for module in modules for p in module.parameters(recurse=False) if id(p) not in shown}
    states = [t for phase in method.phases for t in _tensors(phase.optimizer.state_dict())]
    gradients = {id(p): p for parameters in trained.values() for p in parameters}.values()
    device = next(iter(gradients)).device
    return {
        "parameters": {
            **{name: _count(parameters) for name, parameters in trained.items()},
            "average": _count(ema),
            "frozen": _count(frozen.values()),
        },
        "megabytes": {
            "parameters": _megabytes([*gradients, *ema, *frozen.values()]),
            "gradients": _megabytes(gradients),
            "optimizer": _megabytes(states),
            "peak, GPU" if device.type == "cuda" else "peak, process": round(peak_memory(device) / 1e6, 1),
        },
        "seconds": {
            "step with every phase": round(all_phases, 4),
            "next step": round(next_step, 4),
            "whole run, without samples and checkpoints": round(step * settings.iterations, 1),
        },
    }


def _timed_step(method: Method, settings: LoopSettings, step: int) -> float:
    """Seconds of one step, as `dmd2.training.loop` takes it."""
    began = time.perf_counter()
    first, parts = step * settings.grad_accum_steps, settings.grad_accum_steps
    batches = [Batch(step, method.data(i), torch.Generator().manual_seed(i)) for i in range(first, first + parts)]
    training_step(method.phases, batches[0], settings, batches[1:])
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in _tensors(each)]


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 1)
