"""A teacher, a recipe and data → a run: the one wiring of every distillation, whatever its family and its method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import KW_ONLY, asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmd2.data.pairs import RegressionPairs
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.models.adapters.lora_training import LoraShape
from dmd2.models.family import Family, Labels, open_family
from dmd2.runtime.errors import InvalidInput, shown
from dmd2.runtime.precision import training_dtype
from dmd2.runtime.tensors import save_tensors
from dmd2.training.discriminators.head import HEAD_FILE
from dmd2.training.loop import Method, Phase
from dmd2.training.methods.common import Kit, Networks, Recipe, Samples
from dmd2.training.parallel.group import full
from dmd2.training.ranges import Alpha, DataName, Levels, Rank, Timesteps, as_text
from dmd2.training.run.card import model_card
from dmd2.training.sources import SOURCES, Inputs, Source

FAKE_SCORE = "fake_score"  # folder beside a run's `model`


@dataclass(frozen=True)
class Distillation(Recipe):
    """A recipe that makes a student of a teacher. A method gives it `kind`, `phases` and fields of its own."""

    _: KW_ONLY
    sigmas: Levels = (80.0,)
    timesteps: Timesteps = ()
    """of the student's steps, descending; σ for EDM's teachers, timesteps for Stable Diffusion's, the other empty"""
    data: DataName = "images"
    compile: bool = False
    adapter: Literal["full", "lora"] = "full"
    """what is trained of the student: all of its weights, or a LoRA on the frozen teacher"""
    networks: Literal["separate", "adapters"] = "separate"
    """whether the fake score has weights of its own, or is a LoRA, too: then student, fake score and teacher are one
    frozen network, which is in memory once, in bf16 where networks run in that"""
    rank: Rank = 64
    alpha: Alpha = 8.0
    """of the LoRAs"""
    checkpointing: bool = False
    """whether backward runs the networks' blocks again instead of having kept their activations"""
    inputs = ("init", "data", "prompts", "student", "pairs", "lpips")
    most_steps = 1
    """of the students that it makes"""
    paired = False
    """whether images are generated with the labels of the real ones"""
    keeps_fake_score = False
    whole_teacher = False
    """whether every process has all of the teacher, also where networks are sharded"""
    only_pairs = False
    """whether noise-image pairs are all that it learns from"""

    @property
    def levels(self) -> tuple[float, ...]:
        return self.timesteps or self.sigmas

    @property
    def needs_images(self) -> bool:
        """Whether it learns from real images."""
        return False

    def conflict(self) -> str | None:
        name, other = ("timesteps", "sigmas") if self.timesteps else ("sigmas", "timesteps")
        if getattr(self, other):
            return f"{other}={as_text(getattr(self, other))}: given beside {name}; expected [] for one of the two"
        if not self.levels:
            return "sigmas=[] with timesteps=[]: expected the levels of the student's steps in one of the two"
        given = f"{name}={shown(list(self.levels), 100)}"
        if list(self.levels) != sorted(set(self.levels), reverse=True):
            return f"{given}: expected descending levels"
        if len(self.levels) > self.most_steps:
            return f"{given}: expected a single level; only DMD2 makes students of several steps"
        if self.networks == "adapters" and self.adapter != "lora":
            return f"networks=adapters with adapter={self.adapter}: expected adapter=lora with it"
        return None

    def method(self, inputs: Inputs) -> Method:
        return distil(self, inputs)

    def start(
        self, family: Family, inputs: Inputs, *, boundary: float = 0.0, subfolder: str | None = None
    ) -> tuple[Any, Any]:
        """Student and fake score to begin with: the teacher's weights, or for the student those in a `subfolder`.

        A method that has no fake score gives None.
        """
        self.refuse_student(inputs)
        student = self.new_student(family, None, boundary=boundary, subfolder=subfolder)
        return student, self.new_fake_score(family, None)

    @staticmethod
    def refuse_student(inputs: Inputs) -> None:
        if given := inputs.get("student"):
            raise InvalidInput("student", "this recipe starts from its teacher", given)

    def new_student(
        self, family: Family, start: Path | None, *, boundary: float = 0.0, subfolder: str | None = None
    ) -> Any:
        """To train: as the teacher, or as a run's in `start`, or that in a `subfolder` of the teacher's folder."""
        if self.adapter == "full":
            return family.student(self.levels, boundary=boundary, subfolder=subfolder, start=start)
        return family.adapter("student", LoraShape(self.rank, self.alpha), self.levels, start)

    def new_fake_score(self, family: Family, start: Path | None) -> Any:
        """To train: as the teacher, or as what a run exported into the folder `start`."""
        if self.networks == "separate":
            return family.fake_score(start)
        return family.adapter("fake_score", LoraShape(self.rank, self.alpha), (), start)

    def pairs(self, family: Family, inputs: Inputs) -> Callable[[int], RegressionPairs] | None:
        """Step → its noise-image pairs, where the method learns from some."""
        return None

    def phases(self, kit: Kit) -> list[Phase]:
        """What is minimised."""
        raise NotImplementedError


def distil(recipe: Distillation, inputs: Inputs) -> Method:
    """The recipe on the teacher and the data that were named.

    Raises:
        UserError: something that the recipe needs is not given, or is not what it should be.
    """
    source = SOURCES[recipe.data]
    inputs = inputs.with_defaults(source.defaults)
    host = torch.device("cpu") if source.precomputed else None
    family = open_family(inputs.need("init"), inputs.device, recipe.precision, host)
    return wire(recipe, family, source(inputs, family, recipe.needs_images), inputs)


def wire(
    recipe: Distillation,
    family: Family,
    source: Source,
    inputs: Inputs,
    data: Callable[[int], Samples] | None = None,
) -> Method:
    """As `distil`, for any family and any source of data. `data`: step → batches in place of the source's."""
    sigmas = family.sigmas(recipe.timesteps, recipe.sigmas)  # first: it knows which of the two it takes
    torch.manual_seed(recipe.loop.seed)
    student, fake_score = recipe.start(family, inputs)
    half = recipe.networks == "adapters"
    if half or recipe.checkpointing:
        family.lighten(
            half=half, checkpoints=[n for n in (student, fake_score) if n is not None and recipe.checkpointing]
        )
    parallel = inputs.parallel
    for network in (student, fake_score, family.teacher_network):  # first the adapters, which stay whole
        if network is not None:
            whole = network is family.teacher_network and recipe.whole_teacher
            parallel.prepare(network, [] if whole else family.blocks(network), family.gathered, recipe.compile)
    data = data or _data(recipe, family, source, inputs)
    preview = source.preview()
    networks = Networks(
        family.denoiser(student),
        family.denoiser(family.teacher_network),
        family.denoiser(family.teacher_network if fake_score is None else fake_score),
    )
    dtype = training_dtype(recipe.precision, inputs.device)
    kit = Kit(family, student, fake_score, networks, sigmas, inputs, dtype)

    @torch.no_grad()
    def generate(module: nn.Module | None, labels: Labels, seeds: list[int]) -> Tensor:
        denoiser = family.denoiser(module or student)
        noise = seeded_noise(seeds, (len(sigmas), *family.shape), inputs.device)
        denoise = conditioned(denoiser, family.condition(labels))
        # As many images as are shown are seen too rarely to compile anything for them.
        with torch.compiler.set_stance("force_eager") if recipe.compile else nullcontext():
            x0 = sample_few_step(denoise, denoiser.scale_initial_noise, noise.unbind(1), sigmas)
        return family.codec.decode(x0)

    def export(module: nn.Module | None, out: Path) -> None:
        levels = recipe.levels
        named = f"the {'timesteps' if recipe.timesteps else 'levels'} {', '.join(f'{level:g}' for level in levels)}"
        text = f"Distilled by {recipe.kind.upper()} from {family.origin}, for {named}."
        card = model_card(f"{len(levels)}-step student", family.licence, text, recipe)
        if network := parallel.whole(module or student):
            family.save_student(out / "model", network, levels, recipe.kind, asdict(recipe), card)
        if recipe.keeps_fake_score:  # what a recipe with `resumed` goes on with
            text = (
                f"The score of what the student in `model` beside it generates, which began as {family.origin}. "
                "A recipe that resumes the student goes on with it."
            )
            card = model_card("fake score", family.licence, text, recipe)
            network = parallel.whole(fake_score)
            critic = next(phase.module for phase in phases if phase.name == "critic")
            head = critic["head"].state_dict() if isinstance(critic, nn.ModuleDict) and "head" in critic else {}
            head = {name: full(value.detach()).cpu() for name, value in head.items()}
            if network is None:
                return
            family.save_fake_score(out / FAKE_SCORE, network, recipe.kind, asdict(recipe), card)
            if head:
                save_tensors(head, out / FAKE_SCORE / HEAD_FILE)

    phases = recipe.phases(kit)
    return Method(
        phases,
        data,
        student,
        sample=lambda module: preview.grid(partial(generate, module)),
        score=(lambda module: preview.score(partial(generate, module))) if preview.scores else None,
        export=export,
    )


def _data(recipe: Distillation, family: Family, source: Source, inputs: Inputs) -> Callable[[int], Samples]:
    """step → labels, real images where the method asks for them, and pairs."""
    n, seed, device = recipe.loop.batch_size, recipe.loop.seed, inputs.device
    pairs = recipe.pairs(family, inputs)

    @torch.no_grad()
    def data(step: int) -> Samples:
        if recipe.only_pairs and pairs:
            found = pairs(step)
            return Samples(tuple(found.noise.shape), found.cond, None, pairs=found)
        batch = source.batch(n, seed=seed, step=step, images=recipe.needs_images, paired=recipe.paired)
        cond = family.condition(batch.labels)
        real, real_cond = batch.x0(family, device), None
        if real is not None:
            real_cond = cond if batch.image_labels is batch.labels else family.condition(batch.image_labels)
        shape, uncond = (len(cond), *family.shape), family.unconditional(cond)
        return Samples(shape, cond, uncond, real, real_cond, pairs(step) if pairs else None)

    return data
