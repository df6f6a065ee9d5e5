"""The Fréchet distance of two sets of features: FID, where they are Inception's."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096  # rows of a sum in float64 that are held at once


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F) of features (N, F), in float64 on their device; what `frechet_distance` takes.

    Raises:
        ValueError: fewer than two samples.
    """
    n, width = features.shape
    if n < 2:
        raise ValueError(f"expected at least two samples, not {n}")
    blocks = features.split(BLOCK)
    mean = sum((block.double().sum(0) for block in blocks), features.new_zeros(width, dtype=torch.float64)) / n
    scatter = features.new_zeros(width, width, dtype=torch.float64)
    for block in blocks:
        centred = block.double() - mean
        scatter += centred.T @ centred
    return mean, scatter / (n - 1)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians; what FID is, of Inception features.

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½), Dowson and Landau 1982. The last trace is the sum of the
    singular values of Σ₁^½ Σ₂^½, which needs no root of an ill-conditioned product.

    Args:
        mean1, mean2: (F,).
        covariance1, covariance2: (F, F), symmetric and positive semi-definite up to rounding. Any rank.

    Raises:
        ValueError: the shapes do not match, or something is not finite.
    """
    features = len(mean1)
    for mean, covariance in ((mean1, covariance1), (mean2, covariance2)):
        if mean.shape != (features,) or covariance.shape != (features, features):
            raise ValueError(
                f"expected means ({features},) and covariances ({features}, {features}), "
                f"not {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("a mean or a covariance is not finite")
    cross = torch.linalg.svdvals(_root(covariance1) @ _root(covariance2)).sum()
    apart = (mean1.double() - mean2.double()).square().sum()
    spread = covariance1.double().trace() + covariance2.double().trace() - 2 * cross
    return max(0.0, float(apart + spread))


def frechet_distance_of(features1: Tensor, features2: Tensor) -> float:
    """`frechet_distance` between Gaussians fitted to features (N, F) and (M, F); N and M at least 2.

    It is biased upwards, the more so the fewer samples there are: compare distances of equal N and M only.

    Raises:
        ValueError: fewer than two samples, or different F.
    """
    return frechet_distance(*moments(features1), *moments(features2))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a (F, F) covariance, in float64."""
    values, vectors = torch.linalg.eigh((covariance.double() + covariance.double().T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
