"""Noise levels: the σ tables of Stable Diffusion and EDM, sampling σ, adding noise.

Everything here is in the variance-exploding form ``x = x0 + σ·n`` (Karras et al. 2022, eq. 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmd2.diffusion import draws

SD_TRAIN_STEPS = 1000


def sd_sigmas(steps: int = SD_TRAIN_STEPS, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Stable Diffusion's "scaled linear" schedule as σ = √((1−ᾱ)/ᾱ), ascending, shape (steps,), float64.

    SD 1.5 and SDXL share it: 0.029 … 14.61. ᾱ is the cumulative product of Ho et al. 2020, eq. 4.
    """
    beta = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def zero_snr_sigmas() -> Tensor:
    """`sd_sigmas`, rescaled so that the last level is noise alone: Lin et al. 2023 (2305.08891), algorithm 1.

    There ᾱ would be 0 and σ infinite; ᾱ is 2⁻⁴⁰ and σ 2²⁰, so that x0's share in a network's input is 1e-6.
    """
    root = (1 + sd_sigmas() ** 2) ** -0.5  # √ᾱ
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = (root**2).clamp(min=2**-40)
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def karras_sigmas(steps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """EDM's levels (Karras et al. 2022, eq. 5), ascending, shape (steps,), float64."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (sigma_min ** (1 / rho) + ramp * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho


def sample_sigma(
    sigmas: Tensor, n: int, generator: torch.Generator, lowest: float = 0.0, highest: float = 1.0
) -> Tensor:
    """σ at `n` indices sampled uniformly from the part [lowest, highest] of the table, both ends included.

    DMD (sec. 3.2) draws from [0.02, 0.98] for the distribution-matching gradient: 20 … 980 of 1,000.

    Args:
        sigmas: (T,) ascending.
        n: how many.
        generator: lives on the CPU, so that a seed gives the same levels on every device.
        lowest, highest: parts of the table, 0 ≤ lowest ≤ highest ≤ 1.

    Returns:
        (n,) float32 on `sigmas`' device.
    """
    if not 0 <= lowest <= highest <= 1:
        raise ValueError(f"lowest, highest: expected 0 <= lowest <= highest <= 1, not {lowest}, {highest}")
    last = len(sigmas) - 1
    first, stop = round(lowest * len(sigmas)), min(round(highest * len(sigmas)), last) + 1
    index = draws.randint(min(first, last), stop, (n,), generator)
    return sigmas[index.to(sigmas.device)].float()


def add_noise(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x = x0 + σ·n for x0, noise (B, …) and sigma (B,)."""
    return x0 + per_image(sigma, x0) * noise


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, …, 1) with as many dimensions as `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def seeded_noise(seeds: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Unit noise (len(seeds), *shape), float32: image i comes from its own CPU generator seeded `seeds[i]`.

    So a seed gives the same noise whatever batch it is in and whatever device it is made on. What
    networks make of it still differs in the last bits with the batch size and the device.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)
