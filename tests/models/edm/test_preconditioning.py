"""The preconditionings of Karras et al. 2022, table 1, each against another form of the same equation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dmd2.models.edm.network import Edm, EdmConfig, EdmNetwork
from dmd2.models.edm.preconditioning import RANGES, Kind, iddpm_levels, precondition
from tests.models.edm.test_published import config

KINDS: tuple[Kind, ...] = ("edm", "vp", "ve", "iddpm")


def test_vp_counts_its_own_time() -> None:
    time = torch.linspace(0.001, 1, 50, dtype=torch.float64)
    sigma = (torch.exp(0.5 * 19.9 * time**2 + 0.1 * time) - 1).sqrt()
    skip, out, scale, noise = precondition("vp", sigma, 0.5, 0.0)
    torch.testing.assert_close(noise, (999 * time).float(), rtol=1e-3, atol=1e-2)
    assert torch.equal(skip, torch.ones(50)) and torch.equal(out, -sigma.float())
    torch.testing.assert_close(scale, (1 / (sigma**2 + 1).sqrt()).float())


def test_ve_is_not_scaled() -> None:
    skip, out, scale, noise = precondition("ve", torch.tensor([0.02, 2.0, 100.0]), 0.5, 0.0)
    assert skip.tolist() == scale.tolist() == [1, 1, 1] and noise[1] == 0
    torch.testing.assert_close(out, torch.tensor([0.02, 2.0, 100.0]))
    assert noise[2] == pytest.approx(math.log(50))


def test_iddpm_counts_the_levels_of_its_cosine_schedule() -> None:
    levels = iddpm_levels()
    assert len(levels) == 1001 and levels[-1] == 0 and bool((levels.diff() < 0).all())
    # ᾱ = 1/(1 + σ²) falls as cos² from level to level, but where a step would be too large (C_1).
    angle = 0.5 * math.pi * torch.arange(1001, dtype=torch.float64) / 1000 / 1.008
    alpha_bar = angle.sin() ** 2 / angle[-1].sin() ** 2
    middle = slice(50, 1001)
    torch.testing.assert_close(1 / (1 + levels[middle] ** 2), alpha_bar[middle], rtol=1e-9, atol=0)
    chosen = torch.tensor([300, 600, 999])
    near = levels[chosen].float() * 1.0001
    assert precondition("iddpm", near, 0.5, 0.0)[3].tolist() == [699, 399, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddpmpp", "adm"])
def test_a_network_of_each_kind_denoises(kind: Kind, name: str) -> None:
    """With a raw output of zero, x0 is c_skip·x; iDDPM's has channels of a variance, which are left out."""
    lowest, highest = RANGES[kind]
    made = config(name).model_copy(update={"preconditioning": kind, "sigma_min": lowest, "sigma_max": highest})
    network = EdmNetwork(EdmConfig.model_validate(made.model_dump())).eval()
    last = network.model.out_conv if name == "adm" else network.model.dec["8x8_aux_conv"]
    assert last.weight.shape[0] == (6 if kind == "iddpm" else 3)
    with torch.no_grad():
        last.weight.zero_()
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([lowest, highest])
    labels = torch.zeros(2, made.classes)
    x0: Tensor = network(x, sigma, labels)[0]
    skip = precondition(kind, sigma, 0.5, 0.0)[0]
    torch.testing.assert_close(x0, skip[:, None, None, None] * x)
    assert network.bottleneck(x, sigma, labels).isfinite().all()
    table = Edm(network).sigmas
    assert float(table[0]) == pytest.approx(lowest) and float(table[-1]) == pytest.approx(highest)


def test_gdd_s_boundary_is_of_edm_s_own() -> None:
    with pytest.raises(ValueError, match=r"boundary 0\.002: expected 0 with the preconditioning vp"):
        EdmConfig.model_validate(config("ddpmpp").model_dump() | {"preconditioning": "vp", "boundary": 0.002})
