"""Group norm where channels come last: PyTorch's numbers, layout and gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmd2.runtime.loading import GroupNorm, build_network


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4),
    each=st.integers(1, 3),
    size=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_numbers_gradients_and_layout_are_pytorchs(
    groups: int, each: int, size: list[int], last: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    plain, ours = nn.GroupNorm(groups, groups * each), GroupNorm(groups, groups * each)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, groups * each, *size)
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(x)
    found = []
    for module in (plain, ours):
        given_x = x.clone().requires_grad_()
        y = module(given_x)
        y.backward(upstream)
        found.append((y, given_x.grad, module.weight.grad, module.bias.grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert found[1][0].stride() == found[0][0].stride()


def test_networks_are_built_with_it_and_their_tensors_keep_their_names(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = {"block_out_channels": [32], "norm_num_groups": 8, "down_block_types": ["DownEncoderBlock2D"]}
    network = AutoencoderKL(**config, up_block_types=["UpDecoderBlock2D"])
    built = build_network(AutoencoderKL, tmp_path / "config.json", dict(network.config))
    norms = [module for module in built.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and all(type(module) is GroupNorm for module in norms)
    assert built.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("size", [(4, 5), (1, 1)])
def test_bf16_under_autocast_keeps_its_dtype(size: tuple[int, int]) -> None:
    x = torch.randn(2, 8, *size).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert GroupNorm(2, 8)(x).dtype == nn.GroupNorm(2, 8)(x).dtype
