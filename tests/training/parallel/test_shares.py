"""Each method's loss is a mean over rows that depend on their place in the whole batch alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2.data.pairs import make_pairs
from dmd2.diffusion.draws import Ranks
from dmd2.training.loop import Batch, LoopSettings
from dmd2.training.methods.denoising import DenoisingRecipe
from dmd2.training.methods.dmd import DmdRecipe
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.methods.gdd import GddRecipe
from dmd2.training.parallel.group import Parallel
from dmd2.training.recipes import RECIPES
from dmd2.training.sources import EmojiSource, Inputs
from tests.training.pixels import CONFIG, write_set, write_teacher

CPU = torch.device("cpu")
LOOP = LoopSettings(iterations=4, batch_size=6)
RECIPES_OF_PIXELS: dict[str, Any] = {
    "dmd": DmdRecipe(LOOP, 1e-3, 1e-3, regression_weight=0.25, pairs_batch=3),
    "dmd2": Dmd2Recipe(LOOP, 1e-3, 1e-3, 2, gan_generator=0.1, gan_critic=0.1, sigmas=(80.0, 5.0)),
    "gdd": GddRecipe(LOOP, 1e-3, 1e-3, freeze=False, r1_every=2),
    "denoising": DenoisingRecipe(LOOP, 1e-3, augment=0.5),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("pixels")
    teacher = write_teacher(folder / "teacher", CONFIG.model_copy(update={"augment_dim": 9}))
    make_pairs(teacher, folder / "pairs", 6, 2, 6, CPU)
    return Inputs({"init": teacher, "data": write_set(folder / "set.zip"), "pairs": folder / "pairs"}, CPU)


@pytest.mark.parametrize("name", list(RECIPES_OF_PIXELS))
def test_the_mean_over_ranks_is_the_loss_of_one(name: str, sources: Inputs) -> None:
    recipe = replace(RECIPES_OF_PIXELS[name], precision="fp32")

    def losses(ranks: Ranks) -> dict[str, torch.Tensor]:
        method = recipe.method(replace(sources, parallel=Parallel(ranks)))
        found: dict[str, torch.Tensor] = {}
        for step in (0, 1):  # with and without the generator's turn; two exit steps
            batch = Batch(step, method.data(step), ranks.generator(step))
            for phase in method.phases:
                if step % phase.every == 0:
                    loss, figures = phase.loss(batch)
                    loss.backward()
                    found |= {f"{step} {phase.name}": loss.detach()}
                    found |= {f"{step} {key}": torch.as_tensor(value) for key, value in figures.items()}
        gradient = [p.grad.flatten() for p in method.phases[-1].module.parameters() if p.grad is not None]
        return found | {"gradient": torch.cat(gradient)}

    one, parts = losses(Ranks()), [losses(Ranks(rank, 3)) for rank in range(3)]
    assert len(one) > 2 and all(part.keys() == one.keys() for part in parts)
    for key, value in one.items():
        mean = torch.stack([part[key] for part in parts]).mean(0)
        assert float((mean - value).norm()) <= 1e-4 * float(value.norm()) + 1e-6, key


def test_emoji_are_shared_by_their_place_in_the_batch(tmp_path: Path) -> None:
    class Text:
        takes_classes, name, shape = False, "text", (4, 16, 16)

        class codec:
            factor = 4

    def batches(ranks: Ranks) -> list[Any]:
        inputs = Inputs({}, CPU, Parallel(ranks)).with_defaults(EmojiSource.defaults)
        source = EmojiSource(inputs, Text(), True)  # type: ignore[arg-type]
        return [
            source.batch(8, seed=1, step=2, images=True, paired=False),
            source.lesson(8, seed=1, step=2, freedom=1.0),
        ]

    assert RECIPES["emoji-dmd2-4step"].loop.batch_size % 2 == 0
    whole, halves = batches(Ranks()), [batches(Ranks(rank, 2)) for rank in range(2)]
    for i, one in enumerate(whole):
        assert one.labels == halves[0][i].labels + halves[1][i].labels
        assert torch.equal(one.images, torch.cat([half[i].images for half in halves]))
