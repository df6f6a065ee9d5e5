"""Samplers: plain functions over a `Denoiser`. They never learn which network it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import TypeVar

import torch
from torch import Tensor

from dmd2.diffusion.denoiser import Cond, Denoiser, Predict, cfg_denoise
from dmd2.diffusion.noise import add_noise, karras_sigmas
from dmd2.runtime.errors import InvalidInput, shown

T = TypeVar("T")

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), sigma (B,)) → x0 (B, C, H, W): a denoiser with its condition and guidance filled in."""

Callback = Callable[[int, Tensor], object]
"""Called by a sampler after each step with the number of steps done and that step's x0 (B, C, H, W). What it raises
ends the sampling: no further step is computed."""


def conditioned(denoiser: Predict, cond: Cond, uncond: Cond | None = None, guidance_scale: float = 1.0) -> Denoise:
    """`denoiser` with its condition filled in, and guided where there is an `uncond`. See `cfg_denoise`."""
    if uncond is None:
        return lambda x, sigma: denoiser(x, sigma, cond)
    return lambda x, sigma: cfg_denoise(denoiser, x, sigma, cond, uncond, guidance_scale)


def sample_few_step(
    denoise: Denoise,
    start: Callable[[Tensor, Tensor], Tensor],
    noise: Iterable[Tensor],
    sigmas: Sequence[float],
    callback: Callback | None = None,
) -> Tensor:
    """DMD2's sampler (sec. 4.4), with one step or several: denoise to x0, re-noise with fresh noise, repeat.

    Args:
        denoise: the student.
        start: (unit noise, sigma) → x at the first level: the student's `Denoiser.scale_initial_noise`.
        noise: unit noise (B, C, H, W) for each step, the first to start from.
        sigmas: descending levels, one a step (DMD2: those of t = 999, 749, 499, 249).
        callback: see `Callback`.

    Returns:
        x0 (B, C, H, W), fp32.
    """
    x0: Tensor | None = None
    for done, (sigma_value, n) in enumerate(zip(sigmas, noise, strict=True), 1):
        sigma = _level(sigma_value, n)
        x0 = denoise(start(n, sigma) if x0 is None else add_noise(x0, sigma, n), sigma)
        if callback is not None:
            callback(done, x0)
    if x0 is None:
        raise ValueError("sigmas: expected at least one level")
    return x0


def timesteps_for_strength(levels: Sequence[T], strength: float) -> list[T]:
    """The levels of a few-step student that a given image goes through: the last ⌊strength · N⌋ of N, at least one.

    Of DMD2's four (t = 999, 749, 499, 249), a strength below 0.5 leaves t = 249, from 0.5 on 499 and 249, from 0.75
    on all but 999, and 1 all. A one-step student has nothing but its own level, whatever the strength.

    Raises:
        UserError: `strength` is not in (0, 1].
    """
    check_strength(strength)
    return list(levels[-max(1, int(strength * len(levels))) :])


def check_strength(strength: float) -> None:
    """Raises UserError unless it is in (0, 1]."""
    if not 0 < strength <= 1:
        raise InvalidInput("prompt_strength", f"{strength}; expected more than 0, at most 1")


def noised(image: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The `start` of `sample_few_step` that begins with an image instead of noise (Meng et al. 2021, SDEdit).

    Args:
        image: (B, C, H, W), encoded. See `timesteps_for_strength` for the levels to go through.
    """
    return lambda n, sigma: add_noise(image, sigma, n)


def inpaint(
    denoise: Denoise,
    start: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    mask: Tensor,
    noise: Iterable[Tensor],
    sigmas: Sequence[float],
    callback: Callback | None = None,
) -> Tensor:
    """`sample_few_step` where `mask` is true, around an image that is known elsewhere (Lugmayr et al. 2022, eq. 8).

    After each step the known part is put back, noised to the next level by the first step's noise: one noise for
    that part all the way down, as in diffusers' pipelines for networks that were not trained to inpaint.

    Args:
        start: `Denoiser.scale_initial_noise` to begin with noise alone; `noised(image)` to begin with the image.
        image: (B, C, H, W) in the denoiser's space.
        mask: bool, (B, 1, H, W).
        noise, sigmas, callback: as for `sample_few_step`.

    Returns:
        x0 (B, C, H, W), fp32; exactly `image` where `mask` is false.
    """
    first, *others = noise
    fresh = [first, *(torch.where(mask, n, first) for n in others)]

    def around(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(mask, denoise(x, sigma), image)

    return sample_few_step(around, start, fresh, sigmas, callback)


def _level(sigma: float, x: Tensor) -> Tensor:
    """One level for a batch: (B,) fp32 on x's device."""
    return torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)


def sample_dpm_solver_2m(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): the teacher's deterministic sampler.

    Args:
        denoise: the (guided) teacher.
        x: (B, C, H, W) start at sigmas[0].
        sigmas: descending levels; the step from the last one goes to 0.
        callback: see `Callback`.

    Returns:
        x0 (B, C, H, W), fp32.
    """
    previous: Tensor | None = None
    levels = torch.tensor(sigmas, dtype=torch.float64)
    for i, sigma_value in enumerate(sigmas):
        x0 = denoise(x, _level(sigma_value, x))
        if callback is not None:
            callback(i + 1, x0)
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


def sample_euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler's method on the probability-flow ODE dx/dσ = (x − x0)/σ (Karras et al. 2022, eq. 1 with σ(t) = t).

    Args:
        x: (B, C, H, W) start at sigmas[0].
        sigmas: descending levels; the step from the last one goes to 0.

    Returns:
        x0 (B, C, H, W), fp32.
    """
    for sigma, after in pairwise([*sigmas, 0.0]):
        x = x + (after - sigma) / sigma * (x - denoise(x, _level(sigma, x)))
    return x


PLMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""weights of the noise predicted now and before, newest first (Liu et al. 2022, 2202.09778, eqs. 12 and 22)"""


def sample_plms(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """PNDM by linear multistep alone (Liu et al. 2022; Stable Diffusion's PLMS), whose first step is improved Euler.

    Args:
        x: (B, C, H, W) start at sigmas[0].
        sigmas: at least three descending levels; where the last step leads to is the last of them, above 0.

    Returns:
        (B, C, H, W) at that level, scaled to the variance of images: what a VAE decodes.
    """
    before: list[Tensor] = []
    for sigma, after in pairwise(sigmas):
        noise = (x - denoise(x, _level(sigma, x))) / sigma
        if not before:
            ahead = x + (after - sigma) * noise
            slope = (noise + (ahead - denoise(ahead, _level(after, ahead))) / after) / 2
        else:
            weights = PLMS[min(len(before), 3)]
            slope = sum((w * n for w, n in zip(weights, (noise, *before), strict=False)), torch.zeros_like(x))
        before = [noise, *before][:3]
        x = x + (after - sigma) * slope
    return x / (1 + sigmas[-1] ** 2) ** 0.5


def trailing_sigmas(table: Tensor, steps: int) -> list[float]:
    """`steps` levels of an ascending (T,) table, evenly spaced from its last (Lin et al. 2023, sec. 3.3)."""
    last = len(table)
    return [float(table[round(last - i * last / steps) - 1]) for i in range(steps)]


def leading_sigmas(table: Tensor, steps: int) -> list[float]:
    """Stable Diffusion's for PLMS: every (T // steps)-th level plus one, downwards, and then the table's first."""
    every = len(table) // steps
    return [*(float(table[min(i * every + 1, len(table) - 1)]) for i in reversed(range(steps))), float(table[0])]


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
            raise InvalidInput("churn", f"expected {expected}", shown(text, 100))
        return found


def sample_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Iterable[Tensor] | None = None,
    churn: Churn | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """EDM's second-order sampler (Karras et al. 2022): algorithm 1, or with `churn` algorithm 2, which adds noise.

    A step costs two calls of `denoise`, the last one a single call. Between calls everything is float64.

    Args:
        denoise: the (guided) teacher.
        x: (B, C, H, W) start at sigmas[0]: unit noise times sigmas[0].
        sigmas: descending levels; the step from the last one goes to 0.
        noise: for algorithm 2, unit noise (B, C, H, W) for each level, whether it is added there or not. Not read
            without `churn`.
        callback: see `Callback`.

    Returns:
        x0 (B, C, H, W) in x's dtype.
    """
    if not sigmas:
        raise ValueError("sigmas: expected at least one level")
    if churn is not None and noise is None:
        raise ValueError("noise: expected unit noise for each level, as there is churn")
    dtype, x = x.dtype, x.double()

    def slope(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """dx/dt of the probability-flow ODE (eq. 4 with σ(t) = t, s(t) = 1), and the x0 that it leads to."""
        x0 = denoise(x.to(dtype), _level(t, x))
        return (x - x0.double()) / t, x0

    fresh = noise if churn is not None and noise is not None else repeat(None, len(sigmas))
    for done, ((t, t_next), n) in enumerate(zip(pairwise([*sigmas, 0.0]), fresh, strict=True), 1):
        if churn is not None and n is not None and churn.lowest <= t <= churn.highest:
            t_hat = t + min(churn.amount / len(sigmas), math.sqrt(2) - 1) * t
            x = x + math.sqrt(t_hat**2 - t**2) * churn.noise * n.double()
            t = t_hat
        d, x0 = slope(x, t)
        ahead = x + (t_next - t) * d
        if t_next != 0:
            d_next, x0 = slope(ahead, t_next)
            ahead = x + (t_next - t) * (d + d_next) / 2
        x = ahead
        if callback is not None:
            callback(done, x0)
    return x.to(dtype)


def teacher_sigmas(denoiser: Denoiser, steps: int) -> list[float]:
    """`steps` descending levels between the ends of the denoiser's table, spaced as Karras et al. 2022, eq. 5.

    The first is at most 4096, where diffusers cuts the infinite level of zero-terminal-SNR schedules, too.
    """
    low, high = float(denoiser.sigmas[0]), min(float(denoiser.sigmas[-1]), 4096.0)
    return list(karras_sigmas(steps, low, high).flip(0).tolist())
