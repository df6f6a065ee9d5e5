"""The fake score with its classifier head (DMD2, sec. 4.3): one UNet that denoises and tells real from fake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.diffusion import draws
from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.diffusion.noise import add_noise, sample_sigma
from dmd2.models.family import Family
from dmd2.runtime.errors import InvalidInput, shown
from dmd2.runtime.loading import GroupNorm
from dmd2.training.loop import Logs
from dmd2.training.losses import approximate_r1, denoising, gan_critic

if TYPE_CHECKING:
    from dmd2.training.methods.common import Networks

GROUPS = 32
HEAD_FILE = "head.safetensors"
"""beside the fake score that a run exports"""


class ClassifierHead(nn.Module):
    """Bottleneck activations (B, C, h, w) → logits (B, 1, …).

    4×4 stride-2 convolutions with GroupNorm(32) and SiLU down to 4×4, one 4×4 stride-4, one 1×1, as in DMD2.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        if channels % GROUPS or channels == GROUPS:
            # On 1×1 activations a group of one channel is normalised to a constant: the head would see nothing.
            raise ValueError(f"channels: expected a multiple of {GROUPS}, at least {2 * GROUPS}, not {channels}")
        layers: list[nn.Module] = []
        while side > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), GroupNorm(GROUPS, channels), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(channels, channels, min(side, 4), 4), GroupNorm(GROUPS, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, bottleneck: Tensor) -> Tensor:
        logits: Tensor = self.layers(bottleneck)
        return logits


def new_head(family: Family) -> ClassifierHead:
    """For the activations of the family's networks. Raises UserError where there are too few channels."""
    channels, side = family.bottleneck
    if channels % GROUPS or channels < 2 * GROUPS:
        expected = "expected a multiple of 32, at least 64, for a GAN's head; or gan_generator=0, gan_critic=0"
        raise InvalidInput("init", f"{family.name} has {channels} channels in its middle; {expected}")
    return ClassifierHead(channels, side)


def load_head(head: nn.Module, path: Path) -> None:
    """What a run exported beside its fake score. Raises UserError if there is none, or one of another size."""
    if not path.is_file():
        raise InvalidInput("student", f"has no head of a GAN beside it ({path}); expected resumed_head=false")
    try:
        head.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise InvalidInput("student", f"{path}: no head for this teacher ({shown(error)})") from error


def noised_logits(denoiser: Denoiser, head: nn.Module, x0: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
    """The classifier on a noisy version of x0 (B, C, H, W), σ drawn uniformly from the whole table."""
    sigma = sample_sigma(denoiser.sigmas, len(x0), generator)
    noise = draws.randn(x0.shape, generator).to(x0.device)
    logits: Tensor = head(activations(denoiser, add_noise(x0, sigma, noise), sigma, cond))
    return logits


def activations(denoiser: Denoiser, noisy: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """(B, C', h, w) in the middle of the network."""
    half = getattr(denoiser, "bottleneck", None)  # only half of the network is run
    found: Tensor = half(noisy, sigma, cond) if half else denoiser.features(noisy, sigma, cond)[1]
    return found


@dataclass(frozen=True)
class GanJudge:
    """Where the head gets its activations, and what keeps it smooth.

    `by_teacher`: of the frozen teacher, as NVIDIA's FastGen has it, instead of the fake score. `r1`: weight of an
    approximate R1 (Lin et al. 2025, 2501.08316, eq. 4): how much the logits of noised real images move where noise of
    standard deviation `noise` is added, squared; as R1 to first order, but without a second derivative. The penalty
    is divided by the variance of that noise, so that its size is R1's whatever the noise. `together`: whether the
    real images go down the fake score in one batch with the generated ones, which go up again alone: the same loss by
    fewer operations, each of more images. `levels`: (n, generator) → σ (n,) that the critic's images are noised by;
    None for levels drawn uniformly from the whole table.
    """

    by_teacher: bool = False
    r1: float = 0.0
    noise: float = 0.1
    together: bool = False
    levels: Callable[[int, torch.Generator], Tensor] | None = None

    def _sigma(self, denoiser: Denoiser, n: int, generator: torch.Generator) -> Tensor:
        return sample_sigma(denoiser.sigmas, n, generator) if self.levels is None else self.levels(n, generator)

    def logits(self, n: Networks, x0: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        assert n.head is not None
        return noised_logits(n.teacher if self.by_teacher else n.fake_score, n.head, x0, cond, generator)

    def critic_loss(
        self,
        n: Networks,
        fake: Tensor,
        cond_fake: Cond,
        real: Tensor | None,
        cond_real: Cond,
        gan_weight: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Logs]:
        """Denoising on generated samples, plus the classification of noised real and generated ones.

        The fake score's denoising pass also gives the generated samples' logits: same noise, one forward pass less.

        Args:
            n: with a head, or without a GAN; then `real` is not used.
            fake, real: (B, C, H, W) clean generated samples (detached) and data.
            gan_weight: of the classification loss.
        """
        sigma = self._sigma(n.fake_score, len(fake), generator)
        noise = draws.randn(fake.shape, generator).to(fake.device)
        generated = n.fake_score, fake, sigma, noise, cond_fake
        if n.head is None:
            loss, _ = denoising(*generated)
            return loss, {"fake_score": loss.detach()}
        assert real is not None, "a classifier needs real samples"
        by = n.teacher if self.by_teacher else n.fake_score
        by_teacher = self.logits(n, fake, cond_fake, generator) if self.by_teacher else None
        sigma = self._sigma(by, len(real), generator)
        noisy = add_noise(real, sigma, draws.randn(real.shape, generator).to(real.device))
        together = self.together and by_teacher is None and getattr(n.fake_score, "takes_first", False)
        if together and cond_fake.length == cond_real.length:
            loss, both = denoising(*generated, beside=(noisy, sigma, cond_real))
            middle, middle_real = both.tensor_split([len(fake)])
        else:
            loss, middle = denoising(*generated)
            middle_real = activations(by, noisy, sigma, cond_real)
        logs: Logs = {"fake_score": loss.detach()}
        logits_fake = n.head(middle) if by_teacher is None else by_teacher
        logits_real = n.head(middle_real)
        classification = gan_critic(logits_real, logits_fake)
        accuracy = ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean()) / 2
        logs |= {"gan_critic": classification.detach(), "gan_accuracy": accuracy}
        loss = loss + gan_weight * classification
        if self.r1 > 0:
            step = self.noise * draws.randn(real.shape, generator).to(real.device)
            penalty = approximate_r1(logits_real, n.head(activations(by, noisy + step, sigma, cond_real)), self.noise)
            logs["r1"] = penalty.detach()
            loss = loss + self.r1 / 2 * penalty
        return loss, logs
