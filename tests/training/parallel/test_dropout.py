"""Dropout of a batch that lies on several processes: each has the mask that one process would give its rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dmd2.diffusion.draws import Ranks
from dmd2.training.parallel.dropout import mixed, share_dropout


def dropped(x: Tensor, ranks: Ranks, p: float = 0.3, seed: int = 5) -> Tensor:
    network = nn.Sequential(nn.Dropout(p), nn.Dropout(p))
    share_dropout(network, ranks)
    torch.manual_seed(seed)
    return network[1](network[0](x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_rows_are_dropped_by_their_place_in_the_whole_batch(world: int) -> None:
    x = torch.rand(6, 4, 5, 5) + 1
    parts = [dropped(x[Ranks(rank, world).rows(6)], Ranks(rank, world)) for rank in range(world)]
    assert torch.equal(torch.cat(parts), dropped(x, Ranks()))
    assert not torch.equal(dropped(x, Ranks(), seed=6), dropped(x, Ranks()))


def test_as_much_is_dropped_as_was_asked_for_and_masks_know_nothing_of_each_other() -> None:
    x = torch.ones(400_000)
    masks = [(dropped(x, Ranks(), 0.3, seed) > 0).double() for seed in (1, 2)]
    for mask in masks:  # of two dropouts in a row
        assert abs(float(mask.mean()) - 0.49) < 0.005
        for distance in (1, 2, 32, 1024):
            assert abs(float((mask[distance:] * mask[:-distance]).mean()) - 0.49**2) < 0.005
    assert abs(float((masks[0] * masks[1]).mean()) - 0.49**2) < 0.005
    kept = dropped(x, Ranks(), 0.3).unique()
    assert torch.allclose(kept, torch.tensor([0.0, 1 / 0.7**2]))


def test_the_hash_is_one_to_one_on_a_stretch_of_words() -> None:
    for first in (0, 2**31, 2**32 - 50_000):
        found = mixed(torch.arange(first, first + 50_000))
        assert len(found.unique()) == 50_000 and 0 <= int(found.min()) <= int(found.max()) < 2**32


def test_outside_of_training_nothing_is_dropped() -> None:
    network = nn.Sequential(nn.Dropout(0.5))
    share_dropout(network, Ranks(1, 2))
    x = torch.rand(3, 4)
    assert torch.equal(network.eval()(x), x)
    network.train()[0].p = 0.0
    assert torch.equal(network(x), x)
