"""DMD (Yin et al. 2311.18828): distribution matching, held in place by regression on the teacher's own pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmd2.data.pairs import Pairs, RegressionPairs
from dmd2.diffusion.denoiser import Denoiser
from dmd2.evaluation.perceptual import Lpips
from dmd2.models.family import Family
from dmd2.runtime.terminal import say
from dmd2.training.distil import Distillation
from dmd2.training.loop import Batch, Logs, Phase
from dmd2.training.losses import l2
from dmd2.training.methods.common import Kit, Networks, OptimizerName
from dmd2.training.methods.dmd2 import DM_RANGE, dmd2_phases
from dmd2.training.ranges import Count, Decay, Part, Rate, Weight
from dmd2.training.sources import Inputs

Distance = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), y (B, C, H, W)) → () how far apart they are, mean over the batch: LPIPS or `losses.l2`"""


@dataclass(frozen=True)
class DmdRecipe(Distillation):
    """A one-step student by DMD."""

    lr_critic: Rate
    regression_weight: Weight
    """λ of DMD eq. 10"""
    pairs_batch: Count
    """pairs in a step, beside `loop.batch_size` samples"""
    guidance_scale: Weight = 1.0
    """the teacher's"""
    decoder: Literal["kl", "tiny"] = "kl"
    """of a latent teacher: what LPIPS sees images by; with `checkpointing` one image at a time"""
    dm_highest: Part = DM_RANGE[1]
    dm_highest_end: Part | None = None
    """the highest level for the gradient, as a part of the σ table; at the run's end, where it falls linearly"""
    optimizer: OptimizerName = "adamw"
    beta2: Decay = 0.999
    kind = "dmd"

    def conflict(self) -> str | None:
        for name in ("dm_highest", "dm_highest_end"):
            if (given := getattr(self, name)) is not None and given <= DM_RANGE[0]:
                return f"{name}={given:g}: expected more than {DM_RANGE[0]:g}, where the levels begin"
        return super().conflict()

    def dm_range(self, step: int) -> tuple[float, float]:
        """Parts of the σ table that a step's gradient draws levels from."""
        end = self.dm_highest if self.dm_highest_end is None else self.dm_highest_end
        done = min(1.0, step / max(1, self.loop.iterations - 1))
        return DM_RANGE[0], self.dm_highest + done * (end - self.dm_highest)

    def pairs(self, family: Family, inputs: Inputs) -> Callable[[int], RegressionPairs]:
        return pairs_of(family, inputs, self.pairs_batch, self.loop.seed)

    def phases(self, kit: Kit) -> list[Phase]:
        optimizers = (
            kit.optimizer(self.optimizer, kit.student, self.lr, self.beta2),
            kit.optimizer(self.optimizer, kit.fake_score, self.lr_critic, self.beta2),
        )
        distance = distance_of(kit, self.decoder, self.checkpointing)
        modules = kit.student, kit.fake_score
        weights = self.regression_weight, self.guidance_scale
        numbers = (kit.sigmas[0], distance, *weights)
        return dmd_phases(kit.networks, modules, optimizers, *numbers, dm_range=self.dm_range)


def dmd_phases(
    networks: Networks,
    modules: tuple[nn.Module, nn.Module],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    sigma: float,
    distance: Distance,
    regression_weight: float,
    guidance_scale: float = 1.0,
    dm_range: Callable[[int], tuple[float, float]] = lambda step: DM_RANGE,
) -> list[Phase]:
    """Generator and critic phases, both at every step (DMD, algorithm 1).

    Matching and critic are DMD2's with one time scale, one step and no GAN.

    Args:
        networks: student, teacher, fake score.
        modules: what the two phases train: the student's; the fake score's.
        optimizers: theirs.
        sigma: the level that the student starts from.
        distance: between the student's image and the teacher's.
        regression_weight: λ of DMD eq. 10.
        guidance_scale: the teacher's; the fake score is never guided.
        dm_range: step → the part of the σ table that the matching's levels are drawn from.
    """
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "dm_range": dm_range}
    generator, critic = dmd2_phases(networks, modules, optimizers, (sigma,), **options)

    def generator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        loss, logs = generator.loss(batch)
        regression = regression_loss(networks.student, batch.data.pairs, sigma, distance)
        return loss + regression_weight * regression, logs | {"regression": regression.detach()}

    return [replace(generator, loss=generator_loss), critic]


def regression_loss(student: Denoiser, pairs: RegressionPairs, sigma: float, distance: Distance) -> Tensor:
    """DMD eq. 9. The pairs' number need not be that of a step's samples."""
    level = torch.full((len(pairs.noise),), sigma, device=pairs.noise.device)
    return distance(student(student.scale_initial_noise(pairs.noise, level), level, pairs.cond), pairs.target)


def pairs_of(family: Family, inputs: Inputs, n: int, seed: int) -> Callable[[int], RegressionPairs]:
    """step → this process's part of `n` pairs. Raises UserError if none are given, or those of another teacher."""
    folder = inputs.need("pairs", "this recipe needs noise-image pairs, which `dmd2 data pairs` makes")
    pairs = Pairs(folder, family)
    return lambda step: pairs.batch(n, seed=seed, step=step, rows=inputs.rows(n), device=inputs.device)


def distance_of(kit: Kit, decoder: str, one_by_one: bool) -> Distance:
    """LPIPS, if it is given, of what a decoder makes of x0."""
    path = kit.inputs.get("lpips")
    to_rgb = kit.family.to_rgb if path is None else kit.family.rgb(decoder, one_by_one)
    return regression_distance(path, kit.inputs.device, to_rgb)


def regression_distance(
    path: Path | None, device: torch.device | str, to_rgb: Callable[[Tensor], Tensor] = lambda x: x
) -> Distance:
    """LPIPS of the images that `to_rgb` makes if there is a file, else L2 of x0; the terminal says which.

    Raises:
        UserError: see `Lpips`.
    """
    if path is None:
        say("regression: L2, as no LPIPS network is given")
        return l2
    say(f"regression: LPIPS, {path}")
    lpips = Lpips(path, device)
    return lambda x, y: lpips(to_rgb(x), to_rgb(y))
