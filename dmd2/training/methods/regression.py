"""A one-step student by regression on the teacher's own noise-image pairs alone.

DMD2's one-step student of SDXL begins so (Yin et al. 2405.14867).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dmd2.data.pairs import RegressionPairs
from dmd2.models.family import Family
from dmd2.training.distil import Distillation
from dmd2.training.loop import Batch, Logs, Phase
from dmd2.training.methods.common import Kit, OptimizerName
from dmd2.training.methods.dmd import distance_of, pairs_of, regression_loss
from dmd2.training.ranges import Decay
from dmd2.training.sources import Inputs


@dataclass(frozen=True)
class RegressionRecipe(Distillation):
    """A step's pairs are as many as `loop.batch_size`."""

    decoder: Literal["kl", "tiny"] = "kl"
    """as in DMD's recipes"""
    optimizer: OptimizerName = "adamw"
    beta2: Decay = 0.999
    kind = "regression"
    only_pairs = True

    def start(self, family: Family, inputs: Inputs, **_: Any) -> tuple[Any, Any]:
        """No score is learned."""
        self.refuse_student(inputs)
        return self.new_student(family, None), None

    def pairs(self, family: Family, inputs: Inputs) -> Callable[[int], RegressionPairs]:
        return pairs_of(family, inputs, self.loop.batch_size, self.loop.seed)

    def phases(self, kit: Kit) -> list[Phase]:
        distance = distance_of(kit, self.decoder, self.checkpointing)
        student, sigma = kit.networks.student, kit.sigmas[0]

        def loss(batch: Batch) -> tuple[Tensor, Logs]:
            return regression_loss(student, batch.data.pairs, sigma, distance), {}

        optimizer = kit.optimizer(self.optimizer, kit.student, self.lr, self.beta2)
        return [Phase("generator", 1, kit.student, optimizer, loss)]
