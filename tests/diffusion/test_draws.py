"""What several processes draw for a batch is, together, what one draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.diffusion import draws
from dmd2.diffusion.draws import Ranks


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    world=st.integers(1, 5),
    each=st.integers(1, 9),
    rest=st.lists(st.integers(1, 5), max_size=2),
    seed=st.integers(0, 2**60),
)
def test_the_rows_of_all_ranks_are_the_draw_of_one(world: int, each: int, rest: list[int], seed: int) -> None:
    def drawn(ranks: Ranks) -> list[torch.Tensor]:
        generator, shape = ranks.generator(seed), (world * each // ranks.world, *rest)
        exit_step = torch.randint(4, (1,), generator=generator)
        return [
            draws.randn(shape, generator),
            draws.rand(shape, generator),
            draws.randint(3, 1000, shape, generator),
            exit_step,
        ]

    one = drawn(Ranks())
    parts = [drawn(Ranks(rank, world)) for rank in range(world)]
    for i in range(3):
        assert torch.equal(torch.cat([part[i] for part in parts]), one[i])
    assert all(torch.equal(part[3], one[3]) for part in parts)
    plain = torch.Generator().manual_seed(seed)
    assert torch.equal(torch.randint(4, (1,), generator=plain), one[3])
    assert torch.equal(torch.randn(one[0].shape, generator=plain), one[0])


def test_a_batch_is_shared_equally_or_not_at_all() -> None:
    assert [Ranks(rank, 3).rows(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        Ranks(0, 4).rows(6)
