"""The losses: pure functions, one equation each. DMD: Yin et al. 2311.18828; DMD2: Yin et al. 2405.14867."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.diffusion.noise import add_noise, per_image

Noisy = tuple[Tensor, Tensor, Cond]
"""images with noise (B, C, H, W), their σ (B,), their condition"""


def denoising(
    denoiser: Denoiser, x0: Tensor, sigma: Tensor, noise: Tensor, cond: Cond, beside: Noisy | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted denoising loss (DMD eq. 6), for teachers and for the fake score.

    Args:
        denoiser: the network in training.
        x0: (B, C, H, W) clean samples.
        sigma: (B,) noise levels.
        noise: (B, C, H, W) unit noise.
        beside: B' others, which go with these as far as the bottleneck; for a denoiser that `takes_first`.

    Returns:
        The mean loss, and the bottleneck activations of the same pass: (B, C', h, w), or (B + B', C', h, w).
    """
    noisy = add_noise(x0, sigma, noise)
    if beside is None:
        prediction, bottleneck = denoiser.features(noisy, sigma, cond)
    else:
        x, levels, conds = torch.cat([noisy, beside[0]]), torch.cat([sigma, beside[1]]), cond.cat(beside[2])
        features: Any = denoiser.features
        prediction, bottleneck = features(x, levels, conds, first=len(noisy))
    weight = per_image(denoiser.loss_weight(sigma), x0)
    return (weight * (prediction - x0) ** 2).mean(), bottleneck


def distribution_matching_gradient(x: Tensor, mu_real: Tensor, mu_fake: Tensor) -> Tensor:
    """The gradient of the KL divergence with respect to x (DMD eqs. 7 and 8), normalised per image.

    (μ_fake − μ_real) / mean|x − μ_real|: before normalisation it is σ²·∇ log(p_fake,σ / p_real,σ) at the
    noisy sample. NaNs (0/0 where the teacher reproduces x exactly) become zero.

    Args:
        x: (B, C, H, W) generated samples.
        mu_real, mu_fake: x0 predictions of teacher and fake score from the same noisy version of x.
    """
    scale = (x - mu_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return torch.nan_to_num((mu_fake - mu_real) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def distribution_matching(x: Tensor, gradient: Tensor) -> Tensor:
    """½·‖x − sg(x − gradient)‖², mean over the batch: its gradient at x is `gradient` / numel(x) (DMD, alg. 1)."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def gan_generator(logits_fake: Tensor) -> Tensor:
    """Non-saturating generator loss (DMD2 eq. 4): softplus(−D(fake)), mean over (B, …) logits."""
    return F.softplus(-logits_fake).mean()


def gan_critic(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The classifier's loss (DMD2 eq. 4): softplus(D(fake)) + softplus(−D(real)), means over the logits."""
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


def r1(logits: Tensor, images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, eq. 9) without its γ/2: E ‖∇ₓ D(x)‖², mean over the batch.

    Args:
        logits: (B, …) of real images, each depending on its own image alone; an image's are summed up.
        images: (B, C, H, W) those images, requiring gradients.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def approximate_r1(logits: Tensor, moved: Tensor, noise: float) -> Tensor:
    """R1 by a finite difference (Lin et al. 2025, 2501.08316, eq. 4): E (D(x + s·n) − D(x))² / s².

    For small s that is E ‖∇ₓ D(x)‖², since n is unit noise. Divided by s² it has R1's size, whatever s is.

    Args:
        logits, moved: (B, …) of images, and of the same with noise of standard deviation `noise` on them; summed up
            for each.
    """
    return ((moved - logits).flatten(1).sum(1) / noise).square().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """DMD's regression loss (eq. 9) without a perceptual network: the mean squared difference."""
    return F.mse_loss(x, y)
