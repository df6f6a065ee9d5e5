"""Each method's loss is a mean over rows that depend on their place in the whole batch alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2.data.pairs import make_pairs
from dmd2.diffusion.draws import Ranks
from dmd2.runtime.errors import UserError
from dmd2.training.loop import Batch, LoopSettings
from dmd2.training.methods.common import Samples, generate
from dmd2.training.methods.denoising import NETWORKS, DenoisingRecipe
from dmd2.training.methods.dmd import DmdRecipe
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.methods.gdd import GddRecipe
from dmd2.training.parallel.group import Parallel, joined
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
    "dropout": DenoisingRecipe(LOOP, 1e-3, network="dropping"),
}
DROPPING = CONFIG.model_copy(update={"dropout": 0.3})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("pixels")
    teacher = write_teacher(folder / "teacher", CONFIG.model_copy(update={"augment_dim": 9}))
    make_pairs(teacher, folder / "pairs", 6, 2, 6, CPU)
    return Inputs({"init": teacher, "data": write_set(folder / "set.zip"), "pairs": folder / "pairs"}, CPU)


@pytest.mark.parametrize("name", list(RECIPES_OF_PIXELS))
def test_the_mean_over_ranks_is_the_loss_of_one(name: str, sources: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "dropping", DROPPING)
    recipe = replace(RECIPES_OF_PIXELS[name], precision="fp32")

    def losses(ranks: Ranks) -> dict[str, torch.Tensor]:
        method = recipe.method(replace(sources, parallel=Parallel(ranks)))
        found: dict[str, torch.Tensor] = {}
        for step in (0, 1):  # with and without the generator's turn; two exit steps
            batch = Batch(step, method.data(step), ranks.generator(step))
            for phase in method.phases:
                if phase.is_due(step):
                    torch.manual_seed(step)  # as the loop does, in all processes alike
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


class Recording:
    """A denoiser that notes the levels it is called at."""

    sigmas = torch.ones(1)

    def __init__(self) -> None:
        self.calls: list[list[float]] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: object) -> torch.Tensor:
        self.calls.append(sigma.tolist())
        return x / (1 + sigma[:, None, None, None])

    def scale_initial_noise(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return noise * sigma[:, None, None, None]


@pytest.mark.parametrize("world", [2, 4])
def test_all_processes_leave_the_backward_simulation_at_the_same_step(world: int) -> None:
    levels, exits = (80.0, 20.0, 5.0, 1.0), set[float]()
    for seed in range(24):
        students, images = [], []
        for ranks in [Ranks(), *(Ranks(rank, world) for rank in range(world))]:
            student = Recording()
            samples = Samples((8 // ranks.world, 3, 2, 2), None, None)
            images.append(generate(student, samples, levels, ranks.generator(seed)))  # type: ignore[arg-type]
            students.append(student)
        one, *others = ([sorted(set(call)) for call in student.calls] for student in students)
        assert all(calls == one for calls in others)
        assert torch.equal(images[0], torch.cat(images[1:]))
        exits.add(one[-1][0])
    assert exits == set(levels)


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


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, expected in (("cuda:1", "cuda:1: expected cuda: torchrun's"), ("cuda", "process 2 .* there are 2")):
        with pytest.raises(UserError, match=expected), joined("ddp", torch.device(device)):
            pass
