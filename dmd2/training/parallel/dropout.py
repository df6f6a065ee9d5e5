"""Dropout whose mask depends on an image's place in the whole batch alone, however many processes share it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmd2.diffusion.draws import Ranks

WORD = 0xFFFFFFFF


class SharedDropout(nn.Dropout):
    """As `nn.Dropout` with a mask that is a function of a key and of the place of each element.

    The key comes from torch's generator on the CPU, which all processes seed alike; so none draws the masks of the
    others' rows, which would take as many times longer as there are processes.
    """

    ranks = Ranks()

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) → the same; every process has as many rows."""
        if not self.training or self.p == 0:
            return x
        key = torch.randint(WORD, ())
        first = self.ranks.rank * x.numel()
        place = torch.arange(first, first + x.numel(), device=x.device).view(x.shape)
        kept = mixed(mixed(place) ^ (place >> 32) ^ key) >= round(self.p * 2**32)
        return x * kept / (1 - self.p)


def mixed(word: Tensor) -> Tensor:
    """int64 → a hash in [0, 2³²) of its lower 32 bits: Wellons' `lowbias32`, one to one."""
    word = word & WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & WORD
    return word ^ (word >> 16)


def share_dropout(network: nn.Module, ranks: Ranks) -> None:
    """Has every dropout of a network draw by place, in place."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.__class__, module.ranks = SharedDropout, ranks  # type: ignore[assignment]
