"""Blocks of a network compiled one by one: kinds of block are few, and the whole takes the compiler far longer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Has each compile at its first call, in place, for each shape of input that it is called with.

    Blocks of one class share what is compiled: one graph for each shape of weights, each adapter in use, with and
    without gradient.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 256)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 1024)
    for block in blocks:
        if isinstance(block, FSDPModule):  # within gathering and freeing, through which the compiler cannot look
            block.forward = torch.compile(block.forward, dynamic=False, backend=backend)
        else:  # unlike `forward`, this does not go into a copy, where it would run the original's weights
            block.compile(dynamic=False, backend=backend)
