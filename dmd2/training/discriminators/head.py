"""The fake score with its classifier head (DMD2, sec. 4.3): one UNet that denoises and tells real from fake."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.diffusion import draws
from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.diffusion.noise import add_noise, sample_sigma
from dmd2.models.family import Family
from dmd2.runtime.errors import InvalidInput, shown
from dmd2.training.loop import Logs
from dmd2.training.losses import denoising, gan_critic

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
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(GROUPS, channels), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(channels, channels, min(side, 4), 4), nn.GroupNorm(GROUPS, channels), nn.SiLU()]
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
    noisy = add_noise(x0, sigma, noise)
    half = getattr(denoiser, "bottleneck", None)  # EDM's networks; diffusers' UNet runs as a whole or not at all
    logits: Tensor = head(half(noisy, sigma, cond) if half else denoiser.features(noisy, sigma, cond)[1])
    return logits


def critic_loss(
    denoiser: Denoiser,
    head: nn.Module | None,
    fake: Tensor,
    cond_fake: Cond,
    real: Tensor | None,
    cond_real: Cond,
    gan_weight: float,
    generator: torch.Generator,
) -> tuple[Tensor, Logs]:
    """Denoising on generated samples, plus the classification of noised real and generated ones.

    The generated samples' denoising pass also gives their logits: same noise, one forward pass less.

    Args:
        denoiser: the fake score.
        head: None for no GAN; then `real` is not used.
        fake, real: (B, C, H, W) clean generated samples (detached) and data.
        gan_weight: of the classification loss.
    """
    sigma = sample_sigma(denoiser.sigmas, len(fake), generator)
    noise = draws.randn(fake.shape, generator).to(fake.device)
    loss, bottleneck = denoising(denoiser, fake, sigma, noise, cond_fake)
    logs: Logs = {"fake_score": loss.detach()}
    if head is not None:
        assert real is not None, "a classifier needs real samples"
        logits_fake = head(bottleneck)
        logits_real = noised_logits(denoiser, head, real, cond_real, generator)
        classification = gan_critic(logits_real, logits_fake)
        accuracy = ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean()) / 2
        logs |= {"gan_critic": classification.detach(), "gan_accuracy": accuracy}
        loss = loss + gan_weight * classification
    return loss, logs
