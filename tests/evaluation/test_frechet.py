"""Fréchet distance against closed forms and scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from dmd2.evaluation.frechet import frechet_distance, frechet_distance_of


def covariance(features: int, rank: int, seed: int) -> Tensor:
    a = torch.randn(features, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / rank


def test_frechet_distance_of_one_dimension_is_closed_form() -> None:
    # (m1 - m2)² + (s1 - s2)²
    found = frechet_distance(*(torch.tensor(v) for v in ([1.0], [[4.0]], [-2.0], [[0.25]])))
    assert found == pytest.approx(3.0**2 + 1.5**2, rel=1e-12)


def test_frechet_distance_of_commuting_covariances_is_closed_form() -> None:
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())
    first = torch.tensor([9.0, 4.0, 1.0, 1e-6, 0.0, 2.0]).double()
    second = torch.tensor([1.0, 4.0, 0.0, 1e-2, 0.0, 3.0]).double()
    mean = torch.zeros(6)
    found = frechet_distance(mean, turn @ first.diag() @ turn.T, mean + 0.5, turn @ second.diag() @ turn.T)
    assert found == pytest.approx(float(6 * 0.25 + (first.sqrt() - second.sqrt()).square().sum()), rel=1e-6)


@pytest.mark.parametrize("rank", [3, 16])
def test_frechet_distance_is_zero_between_equals_and_symmetric(rank: int) -> None:
    mean, first, second = torch.ones(16), covariance(16, rank, 1), covariance(16, 16, 2)
    assert frechet_distance(mean, first, mean, first) == pytest.approx(0, abs=1e-10)
    there = frechet_distance(mean, first, -mean, second)
    assert there == pytest.approx(frechet_distance(-mean, second, mean, first), rel=1e-9)


@pytest.mark.parametrize("rank", [4, 12])
def test_frechet_distance_agrees_with_scipy(rank: int) -> None:
    first, second = covariance(12, 12, 3), covariance(12, rank, 4)
    means = torch.randn(2, 12, generator=torch.Generator().manual_seed(5)).double()
    root = np.real(scipy.linalg.sqrtm(first.numpy() @ second.numpy()))
    expected = float((means[0] - means[1]).square().sum() + first.trace() + second.trace()) - 2 * root.trace()
    assert frechet_distance(means[0], first, means[1], second) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_features_fits_unbiased_moments() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(6))
    expected = frechet_distance(
        x.double().mean(0), torch.from_numpy(np.cov(x.double().numpy().T)), torch.zeros(3), torch.eye(3)
    )
    y = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * (3 / 4) ** 0.5  # mean 0, covariance 1
    assert frechet_distance_of(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_refuses_what_it_cannot_measure() -> None:
    one, eye = torch.zeros(2), torch.eye(2)
    with pytest.raises(ValueError, match=r"expected means \(2,\)"):
        frechet_distance(one, eye, torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(one, eye, one / 0, eye)
    with pytest.raises(ValueError, match="at least two samples"):
        frechet_distance_of(torch.zeros(1, 2), torch.zeros(5, 2))
