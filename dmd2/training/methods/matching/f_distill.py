"""f-distill (Xu et al. 2025, 2502.15681): distribution matching of any f-divergence, by weights on DMD's gradient.

With r = p/q, the density of real images over that of generated ones at a noisy sample, the gradient of D_f(p ‖ q) is
DMD's times h(r) = f''(r)·r² (theorem 1); reverse KL, which is DMD's, has h = 1. The GAN's head tells r: where it is
optimal, its logit is log r. NVIDIA's FastGen, which the published figures are of, has the head on the frozen
teacher's activations (`gan_features=teacher`), and also divides r by its running mean at like levels, which is not
done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmd2.diffusion.denoiser import cfg_denoise
from dmd2.diffusion.noise import per_image
from dmd2.training.discriminators.head import activations
from dmd2.training.loop import Batch, Logs
from dmd2.training.losses import distribution_matching_gradient
from dmd2.training.methods.common import Networks, Samples
from dmd2.training.methods.dmd2 import DM_RANGE, Dmd2Recipe, Objective, follow, noised
from dmd2.training.ranges import Level

Divergence = Literal["forward-kl", "reverse-kl", "js", "jeffreys", "hellinger", "softened-reverse-kl"]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward-kl": lambda r: r,
    "reverse-kl": torch.ones_like,
    "js": lambda r: r / (r + 1),
    "jeffreys": lambda r: r + 1,
    "hellinger": lambda r: r.sqrt() / 4,
    "softened-reverse-kl": lambda r: 1 / (r + 1),
}
"""h(r) of each divergence (table 1)"""


@dataclass(frozen=True)
class FDistillRecipe(Dmd2Recipe):
    """A student by f-distill: DMD2 with a GAN, whose head also weighs the matching."""

    divergence: Divergence = "js"
    lowest_ratio: Level = 0.1
    highest_ratio: Level = 10.0
    """what r is kept between: a head that is sure would leave a batch to one image"""
    kind = "f-distill"
    shares_images = False
    """as in FastGen"""

    def conflict(self) -> str | None:
        if self.gan_critic == 0:
            return "gan_critic=0: expected a GAN, whose head tells the densities' ratio"
        if self.lowest_ratio >= self.highest_ratio:
            return f"lowest_ratio={self.lowest_ratio:g}: expected less than highest_ratio, {self.highest_ratio:g}"
        return super().conflict()

    def objective(self, networks: Networks) -> Objective:
        bounds, by_teacher = (self.lowest_ratio, self.highest_ratio), self.gan_features == "teacher"
        return weighted_matching(networks, self.guidance_scale, self.divergence, bounds, by_teacher=by_teacher)


def weighted_matching(
    n: Networks,
    guidance_scale: float,
    divergence: str,
    bounds: tuple[float, float],
    part: Any = DM_RANGE,
    *,
    by_teacher: bool = False,
) -> Objective:
    """DMD's matching with h(r) for each image, divided by the batch's mean h, so that rates keep their meaning.

    The head sees the fake score's activations at the very sample that is matched, in the same pass; or the teacher's.

    Args:
        n: with a head.
        bounds: of r.
        part: of the σ table.
        by_teacher: whose activations the head was trained on.
    """

    def objective(x: Tensor, batch: Batch, _: float) -> tuple[Tensor, Logs]:
        samples: Samples = batch.data
        assert n.head is not None
        with torch.no_grad():
            noisy, sigma = noised(n.teacher, x, batch.generator, part)
            mu_real = cfg_denoise(n.teacher, noisy, sigma, samples.cond, samples.uncond, guidance_scale)
            mu_fake, seen = n.fake_score.features(noisy, sigma, samples.cond)
            if by_teacher:
                seen = activations(n.teacher, noisy, sigma, samples.cond)
            weight = density_weight(n.head(seen), divergence, bounds)
            gradient = per_image(weight, x) * distribution_matching_gradient(x, mu_real, mu_fake)
        loss, logs = follow(x, gradient)
        return loss, logs | {"largest_weight": weight.max()}

    return objective


def density_weight(logits: Tensor, divergence: str, bounds: tuple[float, float]) -> Tensor:
    """h(r), mean 1 over the batch, (B,), from the head's logits (B, …): an image's mean is its log r."""
    ratio = logits.flatten(1).mean(1).exp().clamp(*bounds)
    h = WEIGHTS[divergence](ratio)
    return h / h.mean()
