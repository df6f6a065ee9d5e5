"""Batch normalisation of a batch that lies on two processes, beside torch's own on the whole of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from dmd2.training.losses import r1
from dmd2.training.parallel.norm import SharedBatchNorm, share_batch_norms

WORLD = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)
    ).double()


def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def state_after_a_step(net: nn.Module, real: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss with a first and a second derivative, and what the forward passes left in the buffers."""
    real = real.clone().requires_grad_()
    logits = net(real).square()
    (logits.mean() + 0.1 * r1(logits.mean((1, 2, 3)), real)).backward()
    gradients = {f"{name}.grad": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return gradients | {name: value.double() for name, value in net.named_buffers()}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    net = network()
    share_batch_norms(net, WORLD)
    assert isinstance(net[1], SharedBatchNorm)
    own = images().chunk(WORLD)[rank]
    found = state_after_a_step(net, own)
    for name, value in found.items():
        if name.endswith(".grad"):
            dist.all_reduce(value)
            value /= WORLD
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_normalise_as_one_does_and_r1_may_look_through_it(tmp_path: Path) -> None:
    spawn(process, (str(tmp_path),), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    expected = state_after_a_step(network(), images())
    assert found.keys() == expected.keys() and len(found) > 8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def test_outside_of_training_it_is_torch_s_own() -> None:
    net = network().eval()
    before = net(images())
    shared = copy.deepcopy(net)
    share_batch_norms(shared, WORLD)
    assert torch.equal(shared(images()), before)
