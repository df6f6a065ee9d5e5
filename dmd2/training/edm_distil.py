"""Distilling an EDM teacher: wires the phases of DMD, DMD2, GDD or GDD-I, shows and exports the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd2.data.images import ImageSet
from dmd2.data.pairs import Pairs, RegressionPairs
from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.models.edm.folder import load_edm, save_edm
from dmd2.models.edm.network import ClassCondition, Edm, EdmConfig, EdmNetwork, RgbCodec
from dmd2.runtime.errors import UserError
from dmd2.runtime.precision import training_dtype
from dmd2.training.discriminators.head import ClassifierHead
from dmd2.training.discriminators.projected import (
    Backbone,
    DenoiserFeatures,
    ProjectedDiscriminator,
    TimmFeatures,
    encoder_levels,
)
from dmd2.training.discriminators.published import PublishedDiscriminator, class_embeddings
from dmd2.training.loop import Batch, Method, Phase
from dmd2.training.methods.dmd import DmdSettings, dmd_phases, regression_distance
from dmd2.training.methods.dmd2 import Dmd2Settings, Networks, Samples, dmd2_phases
from dmd2.training.methods.gdd import GddSettings, freeze_for_gdd_i, gdd_phases, lazy_adam
from dmd2.training.muon import Muon
from dmd2.training.preview import ClassPreview, ClassScore
from dmd2.training.recipes.kinds import EdmDistilRecipe, EdmDmd2Recipe, EdmDmdRecipe, EdmGddRecipe
from dmd2.training.run.card import model_card, name_of
from dmd2.weights.manifest import read_manifest

FAKE_SCORE = "fake_score"  # folder beside a run's `model`: DMD2's fake score, in the layout of a teacher


@dataclass(frozen=True)
class EdmSources:
    """Where a distillation finds what it works on. None: not given."""

    teacher: Path
    data: Path | None = None
    student: Path | None = None
    """`model` of the run to go on from, instead of from the teacher's weights; its fake score lies beside it"""
    pairs: Path | None = None
    lpips: Path | None = None
    judge: Path | None = None
    """classifier that scores samples; None: CIFAR-10's for CIFAR-10, else none"""


@dataclass(frozen=True)
class _Step:
    """The data of one step, on the device."""

    samples: Samples
    pairs: RegressionPairs | None


def distil_edm(recipe: EdmDistilRecipe, sources: EdmSources, device: torch.device) -> Method:
    """Any of the methods on the teacher in `sources.teacher`, as the recipe says.

    Raises:
        UserError: something that the recipe needs is not given, or is not what it should be.
    """
    manifest = read_manifest(sources.teacher)
    if manifest.students:
        raise UserError(f"--init {sources.teacher}: a student; expected the teacher of an EDM network")
    teacher = load_edm(sources.teacher, device)
    torch.manual_seed(recipe.loop.seed)
    student = _student(recipe, sources, teacher, device)
    fake = _fake_score(recipe, sources, teacher, device)
    for network in (teacher.network, student, fake):
        network.dtype = training_dtype(recipe.precision, device)
    build = {EdmDmdRecipe: _dmd, EdmDmd2Recipe: _dmd2, EdmGddRecipe: _gdd}[type(recipe)]
    parts = _Parts(recipe, sources, teacher, student, fake, device)
    data = parts.data()  # before feature networks are fetched
    images = parts.images if sources.data is not None else None
    judge = ClassScore.find(sources.judge, teacher.config, manifest.class_names, images, device)
    phases = build(parts)

    preview = ClassPreview(teacher.config, manifest.class_names)

    @torch.no_grad()
    def generate(ema_model: nn.Module | None, noise: Tensor, cond: ClassCondition) -> Tensor:
        denoiser = Edm(ema_model or student)  # type: ignore[arg-type]
        x0 = sample_few_step(
            conditioned(denoiser, cond), denoiser.scale_initial_noise, noise.unbind(1), recipe.sigmas
        )
        return RgbCodec().decode(x0)

    def sample(ema_model: nn.Module | None) -> Tensor:
        return preview.grid(generate(ema_model, *preview.inputs(device, len(recipe.sigmas))))

    def score(ema_model: nn.Module | None) -> dict[str, float]:
        assert judge is not None
        return judge.score(generate(ema_model, *judge.inputs(device, len(recipe.sigmas))))

    def export(ema_model: nn.Module | None, out: Path) -> None:
        network = ema_model or student
        assert isinstance(network, EdmNetwork)
        save_edm(
            out / "model",
            network,
            name=f"{manifest.name}-{recipe.kind}",
            licence=manifest.licence,
            recipe=asdict(recipe),
            class_names=manifest.class_names,
            card=model_card(
                f"{len(recipe.sigmas)}-step student",
                manifest.licence,
                f"Distilled by {recipe.kind.upper()} from {name_of(sources.teacher)}, for the levels "
                f"{', '.join(f'{sigma:g}' for sigma in recipe.sigmas)}.",
                recipe,
            ),
        )
        if isinstance(recipe, EdmDmd2Recipe):  # what a recipe with `resumed` goes on with
            save_edm(
                out / FAKE_SCORE,
                fake,
                name=f"{manifest.name}-{recipe.kind}-fake-score",
                licence=manifest.licence,
                recipe=asdict(recipe),
                class_names=manifest.class_names,
                card=model_card(
                    "fake score",
                    manifest.licence,
                    f"The score of what the student in `model` beside it generates, which began as "
                    f"{name_of(sources.teacher)}. A recipe that resumes the student goes on with it.",
                    recipe,
                ),
            )

    return Method(phases, data, student, sample, score if judge else None, export)


def _student(recipe: EdmDistilRecipe, sources: EdmSources, teacher: Edm, device: torch.device) -> EdmNetwork:
    """The teacher's weights, or those of a student to go on from, ready to be trained."""
    resumed = isinstance(recipe, EdmDmd2Recipe) and recipe.resumed
    if resumed and sources.student is None:
        raise UserError("--student: missing; this recipe goes on from a student that was trained without GAN")
    if sources.student is not None and not resumed:
        raise UserError(f"--student {sources.student}: this recipe starts from its teacher")
    start = load_edm(sources.student, device).network if sources.student else deepcopy(teacher.network)
    boundary = recipe.boundary if isinstance(recipe, EdmGddRecipe) else teacher.config.boundary
    wanted = teacher.config.model_copy(update={"sigmas": recipe.sigmas, "boundary": boundary})
    if sources.student and start.config != wanted:
        raise UserError(f"--student {sources.student}: expected a student of {sources.teacher} at σ {recipe.sigmas}")
    start.config = EdmConfig.model_validate(wanted.model_dump())
    return start.requires_grad_(True).train()


def _fake_score(recipe: EdmDistilRecipe, sources: EdmSources, teacher: Edm, device: torch.device) -> EdmNetwork:
    """The teacher's weights, or what followed the student to go on from: only together do they give its gradient."""
    network = teacher.network
    if isinstance(recipe, EdmDmd2Recipe) and recipe.resumed and sources.student is not None:
        folder = sources.student.parent / FAKE_SCORE
        if not folder.is_dir():
            expected = "expected the model/ of a run of DMD2"
            raise UserError(f"--student {sources.student}: has no fake score beside it ({folder}); {expected}")
        network = load_edm(folder, device).network
        if network.config != teacher.config:
            raise UserError(f"--student {sources.student}: {folder} is not of the structure of {sources.teacher}")
    return deepcopy(network).requires_grad_(True).train()


@dataclass(frozen=True)
class _Parts:
    """What each method's wiring starts from."""

    recipe: Any
    sources: EdmSources
    teacher: Edm
    student: EdmNetwork
    fake: EdmNetwork
    device: torch.device

    def denoiser(self, network: EdmNetwork) -> Edm:
        return Edm(network, compile=self.recipe.compile)

    def networks(self, head: nn.Module | None = None) -> Networks:
        frozen = self.denoiser(self.teacher.network)
        return Networks(self.denoiser(self.student), frozen, self.denoiser(self.fake), head)

    def optimizer(self, module: nn.Module, lr: float) -> Optimizer:
        if self.recipe.optimizer == "muon":
            return Muon(module, lr, dtype=training_dtype(self.recipe.precision, self.device))
        return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)

    def data(self) -> Callable[[int], _Step]:
        """step → classes drawn uniformly, real images where the method asks for them, and pairs."""
        recipe, config, n = self.recipe, self.teacher.config, self.recipe.loop.batch_size
        shape = (n, config.channels, config.resolution, config.resolution)
        images = self.images if recipe.needs_images else None
        pairs = self._pairs() if isinstance(recipe, EdmDmdRecipe) else None

        def step_data(step: int) -> _Step:
            generator = torch.Generator().manual_seed(recipe.loop.seed * 1_000_003 + step)
            classes = torch.randint(config.classes, (n,), generator=generator) if config.classes else -torch.ones(n)
            cond = ClassCondition.of(classes.long(), config.classes).to(self.device)
            real = real_cond = None
            if images is not None:
                rows = images.batch(n, recipe.loop.seed, step)
                real = RgbCodec().encode(images.images(rows).to(self.device))
                real_cond = ClassCondition(images.one_hot(rows, config.classes).to(self.device))
            if real_cond is not None and isinstance(recipe, EdmGddRecipe):
                cond = real_cond  # as published: each class is generated as often as it is shown
            samples = Samples(shape, cond, cond.unconditional(), real, real_cond)
            if pairs is None:
                return _Step(samples, None)
            chosen = pairs.batch(recipe.pairs_batch, seed=recipe.loop.seed, step=step, device=self.device)
            return _Step(samples, chosen)

        return step_data

    @cached_property
    def images(self) -> ImageSet:
        if self.sources.data is None:
            raise UserError("--data: missing; this recipe learns from real images, a zip or a folder")
        return ImageSet(self.sources.data, self.teacher.config.resolution, self.teacher.config.classes)

    def _pairs(self) -> Pairs:
        if self.sources.pairs is None:
            raise UserError("--pairs: missing; DMD needs noise-image pairs, which `dmd2 pairs` makes")
        return Pairs(self.sources.pairs, self.sources.teacher)


def _samples(batch: Batch) -> Samples:
    return batch.data.samples


def _dmd(parts: _Parts) -> list[Phase]:
    recipe: EdmDmdRecipe = parts.recipe
    return dmd_phases(
        parts.networks(),
        DmdSettings(recipe.sigmas[0], recipe.regression_weight),
        (parts.student, parts.fake),
        (parts.optimizer(parts.student, recipe.lr), parts.optimizer(parts.fake, recipe.lr_critic)),
        _samples,
        lambda batch: batch.data.pairs,
        regression_distance(parts.sources.lpips, parts.device),
    )


def _dmd2(parts: _Parts) -> list[Phase]:
    recipe: EdmDmd2Recipe = parts.recipe
    head, config = None, parts.teacher.config
    if recipe.gan_critic > 0:
        side = config.resolution >> (len(config.channel_mult) - 1)
        channels = config.model_channels * config.channel_mult[-1]
        if channels % 32 or channels < 64:
            expected = "expected a multiple of 32, at least 64, for a GAN's head; or gan_generator=0, gan_critic=0"
            raise UserError(f"--init {parts.sources.teacher}: has {channels} channels in its middle; {expected}")
        head = ClassifierHead(channels, side).to(parts.device)
    critic = nn.ModuleDict({"network": parts.fake} | ({"head": head} if head else {}))
    return dmd2_phases(
        parts.networks(head),
        Dmd2Settings(recipe.sigmas, 1.0, recipe.generator_every, recipe.gan_generator, recipe.gan_critic),
        (parts.student, critic),
        (parts.optimizer(parts.student, recipe.lr), parts.optimizer(critic, recipe.lr_critic)),
        _samples,
    )


def _gdd(parts: _Parts) -> list[Phase]:
    recipe: EdmGddRecipe = parts.recipe
    trained: nn.Module = freeze_for_gdd_i(parts.student) if recipe.freeze else parts.student
    config = parts.teacher.config
    backbones: list[Backbone] = [TimmFeatures(name, parts.device) for name in recipe.backbones]
    if not backbones:
        backbones = [DenoiserFeatures(parts.teacher, encoder_levels(parts.teacher.network))]
    example = torch.zeros(1, config.channels, config.resolution, config.resolution, device=parts.device)
    cond = ClassCondition(torch.zeros(1, config.classes, device=parts.device))
    labels_of = (lambda c: c.labels) if config.classes else None
    discriminator: nn.Module
    if recipe.discriminator == "published":
        rows = class_embeddings(config.classes) if config.classes else None
        discriminator = PublishedDiscriminator(backbones, example, cond, embeddings=rows, labels_of=labels_of)
    else:
        discriminator = ProjectedDiscriminator(backbones, example, cond, classes=config.classes, labels_of=labels_of)
    discriminator.to(parts.device)
    return gdd_phases(
        parts.denoiser(parts.student),
        discriminator,
        GddSettings(recipe.sigmas[0], recipe.r1_gamma, recipe.r1_every),
        (trained, discriminator),
        (
            _adam(trained.parameters(), recipe.lr),
            lazy_adam(discriminator.parameters(), recipe.lr_critic, (0.0, 0.99), recipe.r1_every),
        ),
        _samples,
    )


def _adam(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.99))
