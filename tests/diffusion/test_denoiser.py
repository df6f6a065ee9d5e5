"""Classifier-free guidance: its algebra, one batch of 2B, and no second half where there is nothing to guide."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from dmd2.diffusion.denoiser import cfg_denoise
from dmd2.diffusion.sampling import conditioned


@dataclass(frozen=True)
class Shift:
    """A condition of one number for each image."""

    values: Tensor

    def cat(self, *others: Shift) -> Shift:
        return Shift(torch.cat([self.values, *(other.values for other in others)]))


@dataclass
class Toy:
    """x0 = x / (1 + σ) + the condition. Remembers the batch sizes it was called with."""

    sigmas: Tensor = field(default_factory=lambda: torch.linspace(0.1, 10, 100))
    calls: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Shift) -> Tensor:
        self.calls.append(len(x))
        assert len(x) == len(sigma) == len(cond.values)
        return x / (1 + sigma[:, None, None, None]) + cond.values[:, None, None, None]

    def features(self, x: Tensor, sigma: Tensor, cond: Shift) -> tuple[Tensor, Tensor]:
        return self(x, sigma, cond), x

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise * sigma[:, None, None, None]

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


SIGMA = torch.tensor([0.5, 1.0, 4.0])
COND, UNCOND = Shift(torch.tensor([1.0, 2.0, 3.0])), Shift(torch.tensor([-1.0, 0.0, 0.5]))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_unconditional_to_conditional(x: Tensor, scale: float) -> None:
    toy = Toy()
    found = cfg_denoise(toy, x, SIGMA, COND, UNCOND, scale)
    assert toy.calls == [6]  # one pass of both
    c, u = Toy()(x, SIGMA, COND), Toy()(x, SIGMA, UNCOND)
    assert torch.allclose(found, u + scale * (c - u), atol=1e-6)
    if scale == 0:
        assert torch.equal(found, u)


def test_scale_one_is_one_unguided_pass(x: Tensor) -> None:
    toy = Toy()
    assert torch.equal(cfg_denoise(toy, x, SIGMA, COND, UNCOND, 1.0), Toy()(x, SIGMA, COND))
    assert toy.calls == [3]


def test_a_conditioned_denoiser_is_guided_only_where_it_must_be(x: Tensor) -> None:
    toy = Toy()
    plain = conditioned(toy, COND)(x, SIGMA)
    assert torch.equal(plain, conditioned(toy, COND, UNCOND, 1.0)(x, SIGMA))
    assert toy.calls == [3, 3]
    found = conditioned(toy, COND, UNCOND, 3.0)(x, SIGMA)
    assert toy.calls == [3, 3, 6]
    assert torch.equal(found, cfg_denoise(toy, x, SIGMA, COND, UNCOND, 3.0))
