"""DMD (Yin et al. 2311.18828): distribution matching, held in place by regression on the teacher's own pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from dmd2.data.pairs import RegressionPairs
from dmd2.evaluation.perceptual import Lpips
from dmd2.runtime.precision import Precision
from dmd2.runtime.terminal import say
from dmd2.training.distil import DISTILLATION_INPUTS, distil
from dmd2.training.loop import Batch, Logs, LoopSettings, Method, Phase
from dmd2.training.losses import l2
from dmd2.training.methods.common import Kit, Networks, OptimizerName
from dmd2.training.methods.dmd2 import Dmd2Settings, dmd2_phases
from dmd2.training.ranges import Count, DataName, Decay, Levels, Rate, Timesteps, Weight, levels_conflict
from dmd2.training.sources import Inputs

Distance = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), y (B, C, H, W)) → () how far apart they are, mean over the batch: LPIPS or `losses.l2`"""


@dataclass(frozen=True)
class DmdRecipe:
    """A one-step student by DMD."""

    loop: LoopSettings
    lr: Rate
    lr_critic: Rate
    regression_weight: Weight
    """λ of DMD eq. 10"""
    pairs_batch: Count
    """pairs in a step, beside `loop.batch_size` samples"""
    sigmas: Levels = (80.0,)
    timesteps: Timesteps = ()
    """of the student's step: σ for EDM's teachers, a timestep for Stable Diffusion's, the other empty"""
    guidance_scale: Weight = 1.0
    """the teacher's"""
    optimizer: OptimizerName = "adamw"
    beta2: Decay = 0.999
    data: DataName = "images"
    precision: Precision = "auto"
    compile: bool = False
    inputs: ClassVar = DISTILLATION_INPUTS
    kind = "dmd"
    needs_images = False
    paired: ClassVar = False
    keeps_fake_score: ClassVar = False

    def conflict(self) -> str | None:
        return levels_conflict(self, most=1)

    def method(self, inputs: Inputs) -> Method:
        return distil(self, inputs)

    def phases(self, kit: Kit) -> list[Phase]:
        return dmd_phases(
            kit.networks,
            DmdSettings(kit.sigmas[0], self.regression_weight, self.guidance_scale),
            (kit.student, kit.fake_score),
            (
                kit.optimizer(self.optimizer, kit.student, self.lr, self.beta2),
                kit.optimizer(self.optimizer, kit.fake_score, self.lr_critic, self.beta2),
            ),
            regression_distance(kit.inputs.get("lpips"), kit.inputs.device, kit.family.to_rgb),
        )


@dataclass(frozen=True)
class DmdSettings:
    """DMD's own numbers (see `dmd2.training.recipes` for the paper's values)."""

    sigma: float
    """the level that the one-step student starts from"""
    regression_weight: float
    """λ of DMD eq. 10"""
    guidance_scale: float = 1.0
    """the teacher's; the fake score is never guided"""
    dm_range: tuple[float, float] = (0.02, 0.98)
    """the part of the σ table that the distribution-matching gradient draws from"""


def dmd_phases(
    networks: Networks,
    settings: DmdSettings,
    modules: tuple[nn.Module, nn.Module],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    distance: Distance,
) -> list[Phase]:
    """Generator and critic phases, both at every step (DMD, algorithm 1).

    Matching and critic are DMD2's with one time scale, one step and no GAN.

    Args:
        networks: student, teacher, fake score; no classifier head.
        settings: DMD's numbers.
        modules: what the two phases train: the student's; the fake score's.
        optimizers: theirs.
        distance: between the student's image and the teacher's.
    """
    if networks.head is not None:
        raise ValueError("networks: DMD has no classifier head")
    matching = Dmd2Settings((settings.sigma,), settings.guidance_scale, generator_every=1, dm_range=settings.dm_range)
    generator, critic = dmd2_phases(networks, matching, modules, optimizers)

    def generator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        loss, logs = generator.loss(batch)
        pairs: RegressionPairs = batch.data.pairs  # their number need not be that of the samples
        sigma = torch.full((len(pairs.noise),), settings.sigma, device=pairs.noise.device)
        drawn = networks.student(networks.student.scale_initial_noise(pairs.noise, sigma), sigma, pairs.cond)
        regression = distance(drawn, pairs.target)  # DMD eq. 9
        return loss + settings.regression_weight * regression, logs | {"regression": regression.detach()}

    return [replace(generator, loss=generator_loss), critic]


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
