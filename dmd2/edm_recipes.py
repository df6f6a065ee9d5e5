"""Recipes of training in pixel space: EDM's teachers, and DMD, DMD2, GDD and GDD-I on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from dmd2.cifar10 import CLASSES as CIFAR10
from dmd2.edm import PUBLISHED, EdmConfig
from dmd2.errors import shown
from dmd2.precision import Precision
from dmd2.ranges import Count, Level, Name, Part, Rate, Weight
from dmd2.training.loop import LoopSettings

Levels = Annotated[tuple[Level, ...], Field(min_length=1, max_length=64)]


@dataclass(frozen=True)
class EdmTeacherRecipe:
    """A teacher in pixel space from scratch. See `dmd2/training/edm_teacher.py`."""

    loop: LoopSettings
    network: Name
    """of `NETWORKS`"""
    lr: Rate
    optimizer: Literal["adam", "muon"] = "adam"
    augment: Part = 0.0
    """probability of each of EDM's augmentations; more than 0 needs a network with nine augmentation inputs"""
    class_names: tuple[Name, ...] = ()
    precision: Precision = "auto"
    compile: bool = False


@dataclass(frozen=True)
class EdmDmdRecipe:
    """A one-step student of an EDM teacher by DMD. See `dmd2/training/edm_distil.py`, also for the next two."""

    loop: LoopSettings
    lr: Rate
    lr_critic: Rate
    regression_weight: Weight
    """λ of DMD eq. 10"""
    pairs_batch: Count
    """pairs in a step, beside `loop.batch_size` samples"""
    sigmas: Levels = (80.0,)
    optimizer: Literal["adam", "muon"] = "adam"
    precision: Precision = "auto"
    compile: bool = False
    kind = "dmd"
    needs_images = False


@dataclass(frozen=True)
class EdmDmd2Recipe:
    """A student of an EDM teacher by DMD2."""

    loop: LoopSettings
    lr: Rate
    lr_critic: Rate
    generator_every: Count
    """k of the two time scales"""
    gan_generator: Weight = 0.0
    gan_critic: Weight = 0.0
    """weights of the GAN losses; 0 and 0 is no GAN"""
    resumed: bool = False
    """whether student and fake score go on from the run of --student instead of from the teacher's weights"""
    sigmas: Levels = (80.0,)
    """descending; as many as the student has steps"""
    optimizer: Literal["adam", "muon"] = "adam"
    precision: Precision = "auto"
    compile: bool = False
    kind = "dmd2"

    @property
    def needs_images(self) -> bool:
        return self.gan_critic > 0


@dataclass(frozen=True)
class EdmGddRecipe:
    """A one-step student by GDD, or GDD-I, which freezes most convolutions."""

    loop: LoopSettings
    lr: Rate
    lr_critic: Rate
    freeze: bool
    """GDD-I"""
    backbones: Annotated[tuple[Name, ...], Field(max_length=8)] = ()
    """timm's names of the discriminator's feature networks; none: the teacher's own features"""
    discriminator: Literal["published", "small"] = "small"
    """GDD's (`dmd2.training.published_discriminator`), or one of our own (`dmd2.training.discriminator`)"""
    r1_gamma: Weight = 1e-4 / 128
    """beside losses that are means; the paper's is beside sums, see below"""
    r1_every: Count = 16
    boundary: Part = 0.002
    """ε of the preconditioning (GDD, app. C); 0 is EDM's own"""
    sigmas: Levels = (80.0,)
    precision: Precision = "auto"
    compile: bool = False
    needs_images = True

    @property
    def kind(self) -> str:
        return "gdd-i" if self.freeze else "gdd"


EdmDistilRecipe = EdmDmdRecipe | EdmDmd2Recipe | EdmGddRecipe
EdmRecipe = EdmTeacherRecipe | EdmDistilRecipe


NETWORKS: dict[str, EdmConfig] = PUBLISHED | {
    # What two CPU cores train at 120 images a second
    "cifar10-small": EdmConfig(
        architecture="ddpmpp",
        resolution=32,
        classes=10,
        model_channels=32,
        channel_mult=(1, 2, 4),
        blocks=1,
        attention=(8,),
    ),
}
"""EDM networks by name: the published ones, and small ones of our own"""


def _small(iterations: int) -> LoopSettings:
    return LoopSettings(
        iterations, batch_size=32, warmup=20, clip_norm=10.0, ema_decay=0.99, sample_every=100, checkpoint_every=100
    )


def _edm(mimg: int, batch_size: int) -> LoopSettings:
    """EDM's training from scratch (Karras et al. 2022, app. F.3): 10 Mimg of warm-up, no decay, no clipping."""
    return LoopSettings(
        iterations=mimg * 10**6 // batch_size,
        batch_size=batch_size,
        warmup=10**7 // batch_size,
        decay=False,
        clip_norm=0,
        zero_nans=True,
        ema_half_life=5e5,
        sample_every=5000,
        checkpoint_every=5000,
    )


def _dmd(iterations: int, batch_size: int, ema_decay: float = 0.0) -> LoopSettings:
    """DMD's and DMD2's (app. B of both): 500 steps of warm-up, no decay, gradient norm at most 10, no average."""
    return LoopSettings(
        iterations,
        batch_size,
        warmup=500,
        decay=False,
        clip_norm=10.0,
        ema_decay=ema_decay,
        sample_every=5000,
        checkpoint_every=5000,
    )


def _gdd(mimg: int, batch_size: int, ema_half_life: float = 5e5) -> LoopSettings:
    """GDD's (app. C): no warm-up, no decay, no clipping."""
    return LoopSettings(
        iterations=mimg * 10**6 // batch_size,
        batch_size=batch_size,
        decay=False,
        clip_norm=0,
        zero_nans=True,
        ema_half_life=ema_half_life,
        sample_every=1000,
        checkpoint_every=1000,
    )


def _gdd_both(name: str, recipe: EdmGddRecipe) -> dict[str, EdmRecipe]:
    return {f"{name}-gdd": recipe, f"{name}-gdd-i": replace(recipe, freeze=True)}


_published_gdd = partial(EdmGddRecipe, freeze=False, discriminator="published")
VGG = ("vgg16_bn", "tf_efficientnet_lite0")
DEIT = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")

EDM_RECIPES: dict[str, EdmRecipe] = {
    # An hour on two idle cores: nine epochs
    "cifar10-small-teacher": EdmTeacherRecipe(
        loop=LoopSettings(
            iterations=7000, batch_size=64, warmup=100, ema_decay=0.998, sample_every=500, checkpoint_every=250
        ),
        network="cifar10-small",
        lr=4e-3,
        optimizer="muon",
        class_names=CIFAR10,
    ),
    # Students of cifar10-small-teacher, about twelve minutes on one core each. Muon: after a few hundred steps, Adam
    # is still on its way.
    "cifar10-small-dmd": EdmDmdRecipe(
        _small(460), lr=7e-4, lr_critic=2e-3, regression_weight=0.25, pairs_batch=16, optimizer="muon"
    ),
    "cifar10-small-dmd2": EdmDmd2Recipe(_small(720), lr=7e-4, lr_critic=2e-3, generator_every=2, optimizer="muon"),
    "cifar10-small-dmd2-gan": EdmDmd2Recipe(
        _small(580),
        lr=7e-4,
        lr_critic=2e-3,
        generator_every=2,
        gan_generator=3e-3,
        gan_critic=1e-2,
        optimizer="muon",
    ),
    **_gdd_both("cifar10-small", EdmGddRecipe(_small(660), lr=1e-3, lr_critic=2e-3, freeze=False, r1_gamma=1e-4)),
    # Teachers in pixel space, EDM's own recipe (Karras et al. 2022, table 7): FID 1.79 and 1.97 with Heun 18
    "cifar10-teacher": EdmTeacherRecipe(
        loop=_edm(200, 512),
        network="edm-cifar10-32x32-cond-vp",
        lr=1e-3,
        augment=0.12,
        class_names=CIFAR10,
        precision="fp32",
    ),
    "cifar10-uncond-teacher": EdmTeacherRecipe(
        loop=_edm(200, 512), network="edm-cifar10-32x32-uncond-vp", lr=1e-3, augment=0.12, precision="fp32"
    ),
    # What published recipes have in common that the published runs had otherwise: one seeded order of the data on
    # any number of processes; precision is what is faster ("auto") where theirs is fixed.
    # DMD (Yin et al. 2311.18828, app. B and tables 1 and 2). FID 2.66 (with L2 2.78), 3.77, 2.62
    # --init: edm-cifar10-32x32-cond-vp; --pairs: 100,000 by Heun 18
    "cifar10-dmd": EdmDmdRecipe(_dmd(300_000, 392), lr=5e-5, lr_critic=5e-5, regression_weight=0.25, pairs_batch=392),
    # --init: edm-cifar10-32x32-uncond-vp; --pairs: 500,000 by Heun 18
    "cifar10-uncond-dmd": EdmDmdRecipe(
        _dmd(300_000, 392), lr=5e-5, lr_critic=5e-5, regression_weight=0.5, pairs_batch=392
    ),
    # --init: edm-imagenet-64x64-cond-adm; --pairs: 25,000 by Heun 256
    "imagenet64-dmd": EdmDmdRecipe(
        _dmd(350_000, 336), lr=2e-6, lr_critic=2e-6, regression_weight=0.25, pairs_batch=336
    ),
    # DMD2 (Yin et al. 2405.14867, app. F and tables 1 and 3). FID 2.61, 1.51, 1.28. The published runs are in bf16,
    # and their critic judges generated images with noise of its own; here it sees those that its score denoises.
    # --init: edm-imagenet-64x64-cond-adm
    "imagenet64-dmd2": EdmDmd2Recipe(_dmd(410_000, 280), lr=2e-6, lr_critic=2e-6, generator_every=5),
    "imagenet64-dmd2-gan": EdmDmd2Recipe(
        _dmd(200_000, 280), lr=2e-6, lr_critic=2e-6, generator_every=5, gan_generator=3e-3, gan_critic=1e-2
    ),
    # --student: model/ of a run of imagenet64-dmd2; its fake_score/ goes on, too, and only the head is new
    "imagenet64-dmd2-gan-resumed": EdmDmd2Recipe(
        _dmd(140_000, 280),
        lr=5e-7,
        lr_critic=5e-7,
        generator_every=5,
        gan_generator=3e-3,
        gan_critic=1e-2,
        resumed=True,
    ),
    # The numbers of NVIDIA's FastGen, whose run gives FID 1.99 with EMAs of 0.9996 … 0.99995, but DMD2's method:
    # FastGen puts the head on the frozen teacher's features, may add an approximate R1, updates student and critic on
    # disjoint iterations, has no warm-up and computes in fp32. It names no weight for the critic's GAN loss: DMD2's.
    "cifar10-dmd2": EdmDmd2Recipe(
        _dmd(100_000, 2048, ema_decay=0.9999),
        lr=1e-4,
        lr_critic=1e-4,
        generator_every=5,
        gan_generator=1e-3,
        gan_critic=1e-2,
    ),
    # GDD (Zheng & Yang 2405.20750, tables 1 to 5). GDD-I's FID: 1.54, 1.23, 0.85, 1.16. The published runs add up the
    # losses of a GPU's images and of the feature networks, but take R1's mean: with 64 images on each GPU (ImageNet:
    # 128) R1 weighs 1/128 (1/256) of what γ = 1e-4 says. Losses are means here, so γ is divided by that. Where the
    # embeddings of classes come from, `dmd2.training.published_discriminator` says.
    # --init: edm-cifar10-32x32-uncond-ve or -cond-ve
    **_gdd_both("cifar10", _published_gdd(_gdd(5, 256), lr=1e-4, lr_critic=1e-4, backbones=VGG)),
    # --init: edm-afhqv2-64x64-uncond-ve
    **_gdd_both("afhqv2", _published_gdd(_gdd(10, 256), lr=2e-5, lr_critic=4e-5, backbones=DEIT)),
    # --init: edm-ffhq-64x64-uncond-ve
    **_gdd_both("ffhq", _published_gdd(_gdd(10, 256), lr=2e-5, lr_critic=4e-5, backbones=DEIT)),
    # --init: edm-imagenet-64x64-cond-adm
    **_gdd_both(
        "imagenet64",
        _published_gdd(_gdd(10, 512, 5e7), lr=8e-6, lr_critic=4e-5, backbones=DEIT, r1_gamma=1e-4 / 256),
    ),
}


def edm_conflict(recipe: EdmRecipe) -> str | None:
    """Which fields of `recipe` do not go together, and what would; None if all do."""
    if isinstance(recipe, EdmTeacherRecipe):
        return _teacher_conflict(recipe)
    levels = list(recipe.sigmas)
    if levels != sorted(set(levels), reverse=True):
        return f"sigmas={shown(levels, 100)}: expected descending levels"
    if len(levels) > 1 and not isinstance(recipe, EdmDmd2Recipe):
        return f"sigmas={shown(levels, 100)}: expected a single level; only DMD2 makes students of several steps"
    if isinstance(recipe, EdmDmd2Recipe):
        return gan_conflict(recipe.gan_generator, recipe.gan_critic)
    if isinstance(recipe, EdmGddRecipe) and recipe.boundary >= levels[-1]:
        return f"boundary={recipe.boundary:g}: expected less than the level in sigmas, {levels[-1]:g}"
    if isinstance(recipe, EdmGddRecipe) and recipe.discriminator == "published" and not recipe.backbones:
        return "discriminator=published with backbones=[]: expected timm's networks, or discriminator=small"
    return None


def _teacher_conflict(recipe: EdmTeacherRecipe) -> str | None:
    config = NETWORKS.get(recipe.network)
    if config is None:
        return f"network={shown(recipe.network, 100)}: expected one of {', '.join(NETWORKS)}"
    if recipe.augment > 0 and not config.augment_dim:
        return f"augment={recipe.augment:g}: expected 0; {recipe.network} has no inputs to be told by"
    if recipe.class_names and len(recipe.class_names) != config.classes:
        found = f"{len(recipe.class_names)} names"
        return f"class_names: {found} for the {config.classes} classes of {recipe.network}; expected as many, or []"
    return None


def gan_conflict(generator: float, critic: float) -> str | None:
    """A generator must not follow a classifier that nothing trains, nor a classifier be trained for nothing."""
    if (generator > 0) == (critic > 0):
        return None
    return f"gan_generator={generator:g} with gan_critic={critic:g}: expected both above 0, or both 0 for no GAN"
