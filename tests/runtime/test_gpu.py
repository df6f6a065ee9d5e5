"""What a GPU alone can show: captured graphs, steps that wait for nothing, 8-bit products. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dmd2.diffusion.sampling import sample_few_step
from dmd2.models.stable_diffusion.text import TextCondition
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.compiled import Compiler, Fp8Linear, has_fp8
from dmd2.runtime.offload import download, upload
from tests.tiny_sdxl import build_sdxl_unet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")


def condition(batch: int) -> TextCondition:
    torch.manual_seed(1)
    sizes = torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0]).expand(batch, -1)
    return TextCondition(torch.randn(batch, 8, 256), torch.randn(batch, 128), sizes).to(GPU)


@pytest.fixture
def both() -> Iterator[tuple[StableDiffusion, StableDiffusion, Compiler]]:
    """Eager, and captured for batches of one and two."""
    network, compiler = build_sdxl_unet().to(GPU), Compiler(GPU, compile=False)
    captured, cond = StableDiffusion(network, compiler=compiler), condition(2)
    with torch.no_grad(), captured.recording():
        for count in (1, 2):
            x = torch.randn(count, 4, 8, 8, device=GPU)
            captured(x, torch.full((count,), 5.0, device=GPU), cond[:count])
    yield StableDiffusion(network), captured, compiler
    torch.cuda.synchronize()


@torch.no_grad()
def test_captured_graphs_compute_what_the_network_does(
    both: tuple[StableDiffusion, StableDiffusion, Compiler],
) -> None:
    eager, captured, compiler = both
    for count in (1, 2, 3, 5):
        x, sigma = torch.randn(count, 4, 8, 8, device=GPU), torch.full((count,), 2.0, device=GPU)
        cond = condition(count)
        assert torch.allclose(captured(x, sigma, cond), eager(x, sigma, cond), atol=1e-2)
    assert compiler.failures == compiler.unprepared == 0


@torch.no_grad()
def test_no_step_makes_the_host_wait(both: tuple[StableDiffusion, StableDiffusion, Compiler]) -> None:
    _, captured, _ = both
    cond, noise = condition(2), torch.randn(4, 2, 4, 8, 8, device=GPU)
    sigmas = captured.table[[999, 749, 499, 249]].tolist()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x0 = sample_few_step(lambda x, s: captured(x, s, cond), captured.scale_initial_noise, noise.unbind(0), sigmas)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x0.isfinite().all()


@torch.no_grad()
def test_8_bit_products_are_the_products_but_for_rounding() -> None:
    if not has_fp8(GPU):
        pytest.skip("this GPU has no 8-bit floats")
    linear = nn.Linear(256, 128, device=GPU, dtype=torch.float16)
    x = torch.randn(3, 40, 256, device=GPU, dtype=torch.float16)
    expected = linear(x).float()
    assert 0 < float((Fp8Linear(linear)(x).float() - expected).norm() / expected.norm()) < 0.1


def test_what_goes_there_comes_back() -> None:
    x = torch.arange(1000)
    back = download(upload(x, GPU))
    assert torch.equal(back, x) and back.is_pinned()
