"""Muon: orthogonal updates, a state that resumes, and weights that learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dmd2.training.methods.muon import Muon, orthogonalised


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.5


def test_the_update_is_the_gradient_without_its_singular_values() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(8, 24)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    found = orthogonalised(gradient[None])[0]
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.97


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 16, 16), (3, 16, 64), (2, 200, 16), (2, 1, 9)])
def test_the_five_steps_are_those_of_the_polynomial(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices[0, :, 0] = 0
    x = matrices.double() if shape[1] <= shape[2] else matrices.double().mT
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    expected = x if shape[1] <= shape[2] else x.mT
    torch.testing.assert_close(orthogonalised(matrices).double(), expected, rtol=0, atol=1e-5)
    assert not orthogonalised(torch.zeros(shape)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_low_rank_stay_bounded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((96, 864), (128, 128), (512, 64)):
        low = torch.randn(2, rows, 4, generator=generator) @ torch.randn(2, 4, columns, generator=generator)
        assert torch.linalg.svdvals(orthogonalised(low.to(dtype)).float()).max() < 1.3


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 16, 3))


def steps(net: nn.Module, optimizer: Muon, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x.flatten(1)[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_muon_lowers_a_loss_tenfold_in_100_steps() -> None:
    net = model()
    losses = steps(net, Muon(net, lr=0.01), 0, 100)
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


def test_its_state_resumes_bit_exactly() -> None:
    whole = model()
    steps(whole, Muon(whole, lr=0.01), 0, 6)

    first = model()
    optimizer = Muon(first, lr=0.01)
    steps(first, optimizer, 0, 3)
    second = model()
    second.load_state_dict(first.state_dict())
    resumed = Muon(second, lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_embeddings_and_biases_are_left_to_adam() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(5, 4), "linear": nn.Linear(4, 3)})
    matrices, others = Muon(net, lr=0.01).param_groups
    assert [p.shape for p in matrices["params"]] == [(3, 4)]
    assert sorted(p.numel() for p in others["params"]) == [3, 20]
