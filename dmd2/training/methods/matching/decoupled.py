"""Decoupled DMD (Liu et al. 2025, 2511.22677): guidance and matching, each at noise levels of its own.

A guided teacher's prediction is u + w·(c − u) = c + (w − 1)·(c − u), so DMD's direction μ_fake − μ_guided is the sum
of μ_fake − c, which matches distributions, and −(w − 1)·(c − u), which drives the student where guidance points. DMD
takes both at one noisy sample; here each has its own. Guidance is taken at levels with less noise than the student's
step begins with (the paper's τ_CA > t, where t = 1 is a clean image): what is coarser than that is in its input
already. Matching is taken everywhere, to mend what guidance distorts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmd2.training.loop import Batch, Logs
from dmd2.training.losses import distribution_matching_gradient
from dmd2.training.methods.common import Networks, Samples
from dmd2.training.methods.dmd2 import DM_RANGE, Dmd2Recipe, Objective, follow, noised
from dmd2.training.ranges import Part

Range = tuple[float, float]
"""parts of the σ table, from and to"""


@dataclass(frozen=True)
class DecoupledRecipe(Dmd2Recipe):
    """A student by DMD2 with levels of its own for the guidance."""

    match_range: tuple[Part, Part] = DM_RANGE
    guidance_range: tuple[Part, Part] = DM_RANGE
    """parts of the σ table; of the guidance's, a step has what is below its own level"""
    kind = "decoupled-dmd"

    def conflict(self) -> str | None:
        for name in ("match_range", "guidance_range"):
            low, high = getattr(self, name)
            if low >= high:
                return f"{name}=[{low:g}, {high:g}]: expected two parts of the σ table, the lower one first"
        if self.guidance_scale == 1:
            return "guidance_scale=1: expected more; without guidance there is nothing to decouple"
        return super().conflict()

    def objective(self, networks: Networks) -> Objective:
        return decoupled_matching(networks, self.guidance_scale, self.match_range, self.guidance_range)


def decoupled_matching(n: Networks, scale: float, match: Range, guidance: Range) -> Objective:
    """Both terms with DMD's normalisation, each by how far x is from the teacher's prediction at its own sample.

    Args:
        scale: w, of the teacher's guidance.
        match, guidance: where in the σ table each term's levels are drawn from; the guidance's, as far as they are
            below the student's.
    """
    below: dict[float, Range] = {}  # by the student's level: there are as many as its steps

    def guided_range(level: float) -> Range:
        if level not in below:
            cleaner = int((n.teacher.sigmas < level).sum()) - 1
            high = min(guidance[1], max(0, cleaner) / len(n.teacher.sigmas))
            below[level] = min(guidance[0], high), high
        return below[level]

    def objective(x: Tensor, batch: Batch, level: float) -> tuple[Tensor, Logs]:
        samples: Samples = batch.data
        with torch.no_grad():
            noisy, sigma = noised(n.teacher, x, batch.generator, match)
            real = n.teacher(noisy, sigma, samples.cond)
            matching = distribution_matching_gradient(x, real, n.fake_score(noisy, sigma, samples.cond))
            noisy, sigma = noised(n.teacher, x, batch.generator, guided_range(level))
            both = n.teacher(torch.cat([noisy, noisy]), torch.cat([sigma, sigma]), samples.cond.cat(samples.uncond))
            conditional, unconditional = both.chunk(2)
            guided = (scale - 1) * distribution_matching_gradient(x, conditional, unconditional)
        loss, logs = follow(x, matching + guided)
        return loss, logs | {"guidance_gradient": guided.square().mean((1, 2, 3)).sqrt().mean()}

    return objective
