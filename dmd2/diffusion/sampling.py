"""Samplers: plain functions over a `Denoiser`. They never learn which network it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import TypeVar

import torch
from torch import Tensor

from dmd2.diffusion.denoiser import Cond, Denoiser, cfg_denoise
from dmd2.diffusion.noise import add_noise, karras_sigmas
from dmd2.runtime.errors import UserError

T = TypeVar("T")

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), sigma (B,)) → x0 (B, C, H, W): a denoiser with its condition and guidance filled in."""


def conditioned(denoiser: Denoiser, cond: Cond, uncond: Cond | None = None, guidance_scale: float = 1.0) -> Denoise:
    """`denoiser` with its condition filled in, and guided where the scale is not 1."""
    if guidance_scale == 1.0 or uncond is None:
        return lambda x, sigma: denoiser(x, sigma, cond)
    return lambda x, sigma: cfg_denoise(denoiser, x, sigma, cond, uncond, guidance_scale)


def sample_few_step(
    denoise: Denoise,
    start: Callable[[Tensor, Tensor], Tensor],
    noise: Iterable[Tensor],
    sigmas: Sequence[float],
) -> Tensor:
    """DMD2's sampler (sec. 4.4), with one step or several: denoise to x0, re-noise with fresh noise, repeat.

    Args:
        denoise: the student.
        start: the student's `Denoiser.start`.
        noise: unit noise (B, C, H, W) for each step, the first to start from; read lazily, so a caller can stop
            between steps by raising.
        sigmas: descending levels, one a step (DMD2: those of t = 999, 749, 499, 249).

    Returns:
        x0 (B, C, H, W), fp32.
    """
    x0: Tensor | None = None
    for sigma_value, n in zip(sigmas, noise, strict=True):
        sigma = torch.full((len(n),), sigma_value, dtype=torch.float32, device=n.device)
        x0 = denoise(start(n, sigma) if x0 is None else add_noise(x0, sigma, n), sigma)
    if x0 is None:
        raise ValueError("sigmas: expected at least one level")
    return x0


def timesteps_for_strength(levels: Sequence[T], strength: float) -> list[T]:
    """The levels of a few-step student that a given image goes through: the last ⌊strength · N⌋ of N, at least one.

    Of DMD2's four (t = 999, 749, 499, 249), a strength below 0.5 leaves t = 249, from 0.5 on 499 and 249, from 0.75
    on all but 999, and 1 all. A one-step student has nothing but its own level, whatever the strength.

    Raises:
        ValueError: `strength` is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength}: expected more than 0, at most 1")
    return list(levels[-max(1, int(strength * len(levels))) :])


def image_to_image(denoise: Denoise, image: Tensor, noise: Iterable[Tensor], sigmas: Sequence[float]) -> Tensor:
    """`sample_few_step`, begun with an image noised to the first level instead of noise (Meng et al. 2021, SDEdit).

    Args:
        image: (B, C, H, W), what the codec makes of the image.
        noise, sigmas: as for `sample_few_step`; see `timesteps_for_strength`.
    """
    return sample_few_step(denoise, lambda n, sigma: add_noise(image, sigma, n), noise, sigmas)


def inpaint(
    denoise: Denoise,
    start: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    mask: Tensor,
    noise: Iterable[Tensor],
    sigmas: Sequence[float],
) -> Tensor:
    """`sample_few_step` where `mask` is true, around an image that is known elsewhere (Lugmayr et al. 2022, eq. 8).

    After each step the known part is put back, noised to the next level by the first step's noise: one noise for
    that part all the way down, as in diffusers' pipelines for networks that were not trained to paint into images.

    Args:
        start: `Denoiser.start` to begin with noise alone; to begin with the image, what noises it.
        image: (B, C, H, W) in the denoiser's space.
        mask: bool, (B, 1, H, W).
        noise, sigmas: as for `sample_few_step`.

    Returns:
        x0 (B, C, H, W), fp32; exactly `image` where `mask` is false.
    """

    def fixed() -> Iterator[Tensor]:
        first: Tensor | None = None
        for n in noise:
            first = n if first is None else first
            yield torch.where(mask, n, first)

    return sample_few_step(lambda x, sigma: torch.where(mask, denoise(x, sigma), image), start, fixed(), sigmas)


def sample_dpm_solver_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): the teacher's deterministic sampler.

    Args:
        denoise: the (guided) teacher.
        x: (B, C, H, W) start at sigmas[0].
        sigmas: descending levels; the step from the last one goes to 0.

    Returns:
        x0 (B, C, H, W), fp32.
    """
    previous: Tensor | None = None
    levels = torch.tensor(sigmas, dtype=torch.float64)
    for i, sigma_value in enumerate(sigmas):
        x0 = denoise(x, torch.full((len(x),), sigma_value, dtype=torch.float32, device=x.device))
        if i + 1 == len(sigmas):
            return x0
        h = float((levels[i] / levels[i + 1]).log())  # in λ = −ln σ
        if previous is None:
            slope = x0
        else:
            r = float((levels[i - 1] / levels[i]).log()) / h
            slope = x0 + (x0 - previous) / (2 * r)
        x = float(levels[i + 1] / levels[i]) * x + (1 - float(levels[i + 1] / levels[i])) * slope
        previous = x0
    raise ValueError("sigmas: expected at least one level")


@dataclass(frozen=True)
class Churn:
    """Noise added on the way (Karras et al. 2022, algorithm 2)."""

    amount: float
    """S_churn, over all steps; ImageNet-64's best is 40 in 256 steps"""
    lowest: float = 0.0
    highest: float = math.inf
    """S_tmin and S_tmax, the levels between which noise is added (ImageNet-64: 0.05, 50)"""
    noise: float = 1.0
    """S_noise, standard deviation of the added noise (ImageNet-64: 1.003)"""

    @staticmethod
    def parse(text: str) -> Churn:
        """S_churn[,S_tmin,S_tmax,S_noise].

        Raises:
            UserError: it is not that.
        """
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        found = Churn(*values) if len(values) in (1, 4) else Churn(math.nan)
        if not (0 <= found.amount < math.inf and 0 <= found.lowest <= found.highest and 0 <= found.noise < math.inf):
            expected = "S_churn or S_churn,S_tmin,S_tmax,S_noise, such as 40,0.05,50,1.003"
            raise UserError(f"--churn {text[:100]}: expected {expected}")
        return found


def sample_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Iterable[Tensor] | None = None,
    churn: Churn | None = None,
) -> Tensor:
    """EDM's second-order sampler (Karras et al. 2022): algorithm 1, or with `churn` algorithm 2, which adds noise.

    A step costs two calls of `denoise`, the last one a single call. Between calls everything is float64.

    Args:
        denoise: the (guided) teacher.
        x: (B, C, H, W) start at sigmas[0]: unit noise times sigmas[0].
        sigmas: descending levels; the step from the last one goes to 0.
        noise: for algorithm 2, unit noise (B, C, H, W) for each level, whether it is added there or not; read
            lazily. Not read without `churn`.

    Returns:
        x0 (B, C, H, W) in x's dtype.
    """
    if not sigmas:
        raise ValueError("sigmas: expected at least one level")
    if churn is not None and noise is None:
        raise ValueError("noise: expected unit noise for each level, as there is churn")
    dtype, x = x.dtype, x.double()

    def slope(x: Tensor, t: float) -> Tensor:
        """dx/dt of the probability-flow ODE (eq. 4 with σ(t) = t, s(t) = 1)."""
        level = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        return (x - denoise(x.to(dtype), level).double()) / t

    fresh = noise if churn is not None and noise is not None else repeat(None, len(sigmas))
    for (t, t_next), n in zip(pairwise([*sigmas, 0.0]), fresh, strict=True):
        if churn is not None and n is not None and churn.lowest <= t <= churn.highest:
            t_hat = t + min(churn.amount / len(sigmas), math.sqrt(2) - 1) * t
            x = x + math.sqrt(t_hat**2 - t**2) * churn.noise * n.double()
            t = t_hat
        d = slope(x, t)
        ahead = x + (t_next - t) * d
        if t_next != 0:
            ahead = x + (t_next - t) * (d + slope(ahead, t_next)) / 2
        x = ahead
    return x.to(dtype)


def teacher_sigmas(denoiser: Denoiser, steps: int) -> list[float]:
    """`steps` descending levels between the ends of the denoiser's table, spaced as Karras et al. 2022, eq. 5.

    The first is at most 4096, where diffusers cuts the infinite level of zero-terminal-SNR schedules, too.
    """
    low, high = float(denoiser.sigmas[0]), min(float(denoiser.sigmas[-1]), 4096.0)
    return list(karras_sigmas(steps, low, high).flip(0).tolist())
