"""Post-hoc EMA (Karras et al. 2024, EDM2, 2312.02696, sec. 3): averages of two widths are kept while training, any
other is made of their snapshots afterwards.

An average of the power function's profile weighs step τ at step t by (γ + 1)·τ^γ / t^(γ + 1): it forgets the
beginning by itself, however long a run becomes. Its width σ_rel is the profile's standard deviation, as a part of the
run. Widths from 0.04 to 0.15 come out well, if there are eight snapshots or more.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.tensors import save_tensors

WIDTHS = 0.05, 0.10
"""σ_rel of the two that are kept, EDM2's"""
WIDEST = 0.28
"""√(1/12) is that of the mean over the whole run"""
FOLDER = "averages"
_NAME = re.compile(r"(\d{7,})\.safetensors")


def exponent(width: float) -> float:
    """γ of a profile's σ_rel (appendix C): σ_rel² = (γ + 1) / ((γ + 2)²·(γ + 3))."""
    t = width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class PowerAverages:
    """The running averages of a module's tensors, and their snapshots in a folder, one file a checkpoint."""

    def __init__(self, module: nn.Module, folder: Path) -> None:
        self.module, self.folder = module, folder
        self.averages = {width: {k: v.detach().clone() for k, v in _tensors(module).items()} for width in WIDTHS}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, counted from 0: θ̂ ← β·θ̂ + (1 − β)·θ with β = (1 − 1/t)^(γ + 1) (sec. 3.1)."""
        for width, average in self.averages.items():
            beta = (1 - 1 / (step + 1)) ** (exponent(width) + 1)
            for name, value in _tensors(self.module).items():
                average[name].lerp_(value, 1 - beta)

    def save(self, done: int) -> None:
        named = {
            f"{width:g}/{k}": v.contiguous().cpu() for width, part in self.averages.items() for k, v in part.items()
        }
        self.folder.mkdir(exist_ok=True)
        save_tensors(named, self.folder / f"{done:07d}.safetensors")

    def restore(self, done: int) -> None:
        """As they were after `done` steps; what came later is going to come again, and is removed.

        Raises:
            UserError: there is no such snapshot.
        """
        for step, path in _snapshots(self.folder).items():
            if step > done:
                path.unlink()
        if done:
            for width, average in self.averages.items():
                for name, value in _read(self.folder / f"{done:07d}.safetensors", width).items():
                    average[name].copy_(value)


def reconstruct(folder: Path, width: float) -> dict[str, Tensor]:
    """The average of σ_rel `width` at the last snapshot's step: name → tensor.

    It is the sum of all snapshots of both widths whose profile is nearest to that of `width` (sec. 3.2).

    Raises:
        UserError: there are no snapshots, or they are damaged; no average is that narrow or wide.
    """
    if not 0.01 <= width <= WIDEST:
        raise InvalidInput("width", f"expected 0.01 to {WIDEST}", width)
    snapshots = _snapshots(folder)
    if not snapshots:
        raise UserError(f"{folder}: no snapshots; expected a run with post_hoc_ema=true")
    kept = [(step, w) for step in sorted(snapshots) for w in WIDTHS]
    total: dict[str, Tensor] = {}
    for (step, w), share in zip(kept, shares(kept, (max(snapshots), width)), strict=True):
        for name, value in _read(snapshots[step], w).items():
            part = share * value.double()
            total[name] = total[name] + part if name in total else part
    return {name: value.float() for name, value in total.items()}


def shares(kept: list[tuple[int, float]], wanted: tuple[int, float]) -> list[float]:
    """Of each kept (step, width) in the one wanted: least squares over profiles as functions of time."""
    profiles = [(step, exponent(width)) for step, width in kept]
    target = wanted[0], exponent(wanted[1])
    products = np.array([[_product(one, other) for other in profiles] for one in profiles])
    return np.linalg.solve(products, np.array([_product(one, target) for one in profiles])).tolist()


def _product(one: tuple[int, float], other: tuple[int, float]) -> float:
    """∫ of two profiles' product, over the time that both have seen."""
    (a, ga), (b, gb) = one, other
    first = min(a, b)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (first / a) ** ga * (first / b) ** gb * first / (a * b)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is averaged: floats, whether trained or kept by batch normalisation."""
    return {name: value for name, value in module.state_dict().items() if value.is_floating_point()}


def _snapshots(folder: Path) -> dict[int, Path]:
    found = {path: _NAME.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())}
    return {int(match[1]): path for path, match in found.items() if match}


def _read(path: Path, width: float) -> dict[str, Tensor]:
    prefix = f"{width:g}/"
    try:
        with safe_open(path, "pt") as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no snapshot of averages ({error})") from error
