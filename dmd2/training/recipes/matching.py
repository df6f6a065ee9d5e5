"""Recipes of what came after DMD2, on the small models: f-distill, SiD, SiDA, Decoupled DMD, a GAN on the teacher's
activations; and GDD and GDD-I on the emoji teacher. Papers' methods with numbers of ours, for short runs.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from dmd2.training.methods.common import Recipe
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.methods.gdd import GddRecipe
from dmd2.training.methods.matching.decoupled import DecoupledRecipe
from dmd2.training.methods.matching.f_distill import FDistillRecipe
from dmd2.training.methods.matching.sid import SidRecipe
from dmd2.training.recipes.edm import EDM_RECIPES
from dmd2.training.recipes.emoji import EMOJI_RECIPES, FOUR_STEPS


def _as(kind: type[Dmd2Recipe], base: Recipe, **changes: Any) -> Dmd2Recipe:
    """A recipe of DMD2 as one of a method that builds on it."""
    return kind(**{field.name: getattr(base, field.name) for field in fields(base)} | changes)


_ONE_STEP, _SMALL = EMOJI_RECIPES["emoji-dmd2-1step"], EDM_RECIPES["cifar10-small-dmd2-gan"]
_TEACHER_HEAD: dict[str, Any] = {"gan_features": "teacher", "r1": 0.01}
_SID: dict[str, Any] = {"generator_every": 1, "student_begins": 50}
_NO_GAN: dict[str, Any] = {"gan_generator": 0.0, "gan_critic": 0.0}
_SIDA: dict[str, Any] = {"gan_generator": 1e-4, "gan_critic": 1e-2, "fisher": 1.0}
"""SiDA's weights beside losses that are means (`methods/matching/sid.py`), and its α. Its critic's varies with σ,
from 2e-3 to 3e-2 for most."""
_TABLE: dict[str, Any] = {"match_range": (0.02, 0.98)}
"""of Stable Diffusion's σ table, whose upper fifth, unlike EDM's, is where a one-step student makes its layout"""

MATCHING_RECIPES: dict[str, Recipe] = {
    "emoji-f-distill": _as(FDistillRecipe, FOUR_STEPS),
    "emoji-dmd2-teacher-head": replace(FOUR_STEPS, **_TEACHER_HEAD),
    "emoji-decoupled": _as(DecoupledRecipe, FOUR_STEPS),
    # From the four-step student, as emoji-dmd2-1step
    "emoji-sid": _as(SidRecipe, _ONE_STEP, **_SID, **_NO_GAN, **_TABLE),
    "emoji-sida": _as(SidRecipe, _ONE_STEP, **_SID, **_SIDA, **_TABLE),
    **{
        name: GddRecipe(
            replace(FOUR_STEPS.loop, iterations=3000, max_grad_norm=0.0, zero_nans=True),
            lr=1e-4,
            lr_critic=1e-3,
            freeze=freeze,
            data="emoji",
            sigmas=(),
            timesteps=(999,),
            boundary=0.0,
            r1_gamma=1e-4,  # ours, and 128 times the published: for a small discriminator and short runs
        )
        for name, freeze in (("emoji-gdd", False), ("emoji-gdd-i", True))
    },
    # As long as cifar10-small-dmd2-gan. Its teacher knows no guidance, so there is none to decouple.
    "cifar10-small-f-distill": _as(FDistillRecipe, _SMALL),
    "cifar10-small-dmd2-teacher-head": _as(Dmd2Recipe, _SMALL, **_TEACHER_HEAD),
    # σ = 2.5: SiD's, for EDM's networks
    "cifar10-small-sid": _as(SidRecipe, _SMALL, sigmas=(2.5,), **_SID, **_NO_GAN),
    "cifar10-small-sida": _as(SidRecipe, _SMALL, sigmas=(2.5,), **_SID, **_SIDA),
    # NVIDIA's FastGen's runs, FID 1.85 and 1.11: what its DMD2 has, and the weights. Its ratio is divided by a
    # running mean at like levels, too; which divergence these figures are of it does not say.
    "cifar10-f-distill": _as(FDistillRecipe, EDM_RECIPES["cifar10-dmd2"]),
    "imagenet64-f-distill": _as(FDistillRecipe, EDM_RECIPES["imagenet64-dmd2-fastgen"]),
}
