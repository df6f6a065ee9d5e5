"""Random numbers for a batch that several processes share: each draws the whole batch's and keeps its own rows.

So what a row is given depends on its place in the whole batch alone, never on how many processes there are. Whatever
is drawn once for a batch, such as an exit step, is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Which of the processes that share each batch this is."""

    rank: int = 0
    world: int = 1

    def rows(self, n: int) -> slice:
        """Of a whole batch of `n`, this process's part.

        Raises:
            ValueError: `n` cannot be shared equally.
        """
        if n % self.world:
            raise ValueError(f"n: expected a multiple of {self.world}, not {n}")
        each = n // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def generator(self, seed: int) -> RowGenerator:
        """On the CPU. The functions below draw from it for a whole batch, and keep this process's rows."""
        generator = RowGenerator()
        generator.ranks = self
        generator.manual_seed(seed)
        return generator


class RowGenerator(torch.Generator):
    """A generator that knows whose rows it draws."""

    ranks = Ranks()


def randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Unit noise (B, …) for this process's B rows; with a plain generator, `torch.randn`."""
    return _own(torch.randn(_whole(shape, generator), generator=generator), generator)


def rand(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """(B, …) in [0, 1). See `randn`."""
    return _own(torch.rand(_whole(shape, generator), generator=generator), generator)


def randint(low: int, high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """int64 (B, …) in [low, high). See `randn`."""
    return _own(torch.randint(low, high, _whole(shape, generator), generator=generator), generator)


def _ranks(generator: torch.Generator) -> Ranks:
    return generator.ranks if isinstance(generator, RowGenerator) else Ranks()


def _whole(shape: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
    return shape[0] * _ranks(generator).world, *shape[1:]


def _own(whole: Tensor, generator: torch.Generator) -> Tensor:
    return whole[_ranks(generator).rows(len(whole))]
