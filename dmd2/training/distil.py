"""A teacher, a recipe and data → a run: the one wiring of every distillation, whatever its family and its method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.data.pairs import Pairs
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.models.family import Family, Labels, open_family
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.precision import training_dtype
from dmd2.training.loop import Method
from dmd2.training.methods.common import Distillation, Kit, Networks, Samples
from dmd2.training.run.card import model_card
from dmd2.training.sources import SOURCES, Inputs, Source

DISTILLATION_INPUTS = ("init", "data", "student", "pairs", "lpips")
FAKE_SCORE = "fake_score"  # folder beside a run's `model`


def distil(recipe: Distillation, inputs: Inputs) -> Method:
    """The recipe on the teacher and the data that were named.

    Raises:
        UserError: something that the recipe needs is not given, or is not what it should be.
    """
    source = SOURCES[recipe.data]
    inputs = inputs.with_defaults(source.defaults)
    family = open_family(inputs.need("init"), inputs.device, recipe.precision)
    return wire(recipe, family, source(inputs, family, recipe.needs_images), inputs)


def wire(recipe: Distillation, family: Family, source: Source, inputs: Inputs) -> Method:
    """As `distil`, for any family and any source of data."""
    sigmas = family.sigmas(recipe.timesteps, recipe.sigmas)  # first: it knows which of the two it takes
    torch.manual_seed(recipe.loop.seed)
    student, fake_score = _networks(recipe, family, inputs)
    data = _data(recipe, family, source, inputs)
    preview = source.preview()
    networks = Networks(
        family.denoiser(student, recipe.compile),
        family.denoiser(family.teacher_network, recipe.compile),
        family.denoiser(fake_score, recipe.compile),
    )
    dtype = training_dtype(recipe.precision, inputs.device)
    kit = Kit(family, student, fake_score, networks, sigmas, inputs, dtype)

    @torch.no_grad()
    def generate(module: nn.Module | None, labels: Labels, seeds: list[int]) -> Tensor:
        denoiser = family.denoiser(module or student)
        noise = seeded_noise(seeds, (len(sigmas), *family.shape), inputs.device)
        denoise = conditioned(denoiser, family.condition(labels))
        return family.codec.decode(sample_few_step(denoise, denoiser.scale_initial_noise, noise.unbind(1), sigmas))

    def export(module: nn.Module | None, out: Path) -> None:
        levels: Any = recipe.timesteps or recipe.sigmas
        named = f"the {'timesteps' if recipe.timesteps else 'levels'} {', '.join(f'{level:g}' for level in levels)}"
        text = f"Distilled by {recipe.kind.upper()} from {family.origin}, for {named}."
        card = model_card(f"{len(levels)}-step student", family.licence, text, recipe)
        family.save_student(out / "model", module or student, levels, recipe.kind, asdict(recipe), card)
        if recipe.keeps_fake_score:  # what a recipe with `resumed` goes on with
            text = (
                f"The score of what the student in `model` beside it generates, which began as {family.origin}. "
                "A recipe that resumes the student goes on with it."
            )
            card = model_card("fake score", family.licence, text, recipe)
            family.save_fake_score(out / FAKE_SCORE, fake_score, recipe.kind, asdict(recipe), card)

    def sample(module: nn.Module | None) -> Tensor:
        return preview.grid(lambda labels, seeds: generate(module, labels, seeds))

    def score(module: nn.Module | None) -> dict[str, float]:
        return preview.score(lambda labels, seeds: generate(module, labels, seeds))

    return Method(recipe.phases(kit), data, student, sample, score if preview.scores else None, export)


def _networks(recipe: Distillation, family: Family, inputs: Inputs) -> tuple[Any, Any]:
    """Student and fake score: the teacher's weights, or both of a run, for only together they give its gradient."""
    start, fake = inputs.get("student"), None
    if getattr(recipe, "resumed", False):
        start = inputs.need("student", "this recipe goes on from a student that was trained without GAN")
        fake = start.parent / FAKE_SCORE
    elif start is not None:
        raise InvalidInput("student", "this recipe starts from its teacher", start)
    levels: Any = recipe.timesteps or recipe.sigmas
    boundary, subfolder = getattr(recipe, "boundary", 0.0), getattr(recipe, "student_init", None)
    student = family.student(levels, boundary=boundary, subfolder=subfolder, start=start)
    if fake is not None and not fake.is_dir():
        expected = "expected the model/ of a run of DMD2"
        raise InvalidInput("student", f"has no fake score beside it ({fake}); {expected}", start)
    return student, family.fake_score(fake)


def _data(recipe: Distillation, family: Family, source: Source, inputs: Inputs) -> Callable[[int], Samples]:
    """step → labels, real images where the method asks for them, and pairs."""
    n, seed, device = recipe.loop.batch_size, recipe.loop.seed, inputs.device
    pairs = None
    if recipe.pairs_batch:
        folder = inputs.need("pairs", "DMD needs noise-image pairs, which `dmd2 pairs` makes")
        pairs = Pairs(folder, family)

    @torch.no_grad()
    def data(step: int) -> Samples:
        batch = source.batch(n, seed=seed, step=step, images=recipe.needs_images, paired=recipe.paired)
        cond = family.condition(batch.labels)
        real = real_cond = None
        if batch.images is not None:
            real = family.codec.encode(batch.images.to(device))
            real_cond = cond if batch.image_labels is batch.labels else family.condition(batch.image_labels)
        chosen = None if pairs is None else pairs.batch(recipe.pairs_batch, seed=seed, step=step, device=device)
        return Samples((len(cond), *family.shape), cond, family.unconditional(cond), real, real_cond, chosen)

    return data
