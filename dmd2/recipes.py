"""Every named training recipe. Whatever changes the numbers is here; where a run lives is on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dmd2.cifar10 import CLASSES as CIFAR10
from dmd2.edm_recipes import EDM_RECIPES, EdmRecipe, check_edm
from dmd2.errors import UserError
from dmd2.precision import Precision
from dmd2.stable_diffusion import PredictionType
from dmd2.training.loop import LoopSettings


@dataclass(frozen=True)
class AutoencoderRecipe:
    """The embedded model's autoencoder. See `dmd2/training/autoencoder.py`."""

    loop: LoopSettings
    lr: float
    channels: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    latent_noise: float
    """standard deviation of the noise on the latents while training"""
    precision: Precision = "auto"


@dataclass(frozen=True)
class ClassifierRecipe:
    """The judge that scores the embedded model. See `dmd2/training/classifier.py`."""

    loop: LoopSettings
    lr: float
    weight_decay: float
    widths: tuple[int, int, int, int]
    """channels at 1/2, 1/4, 1/8 and 1/16 of the picture's side"""
    features: int
    contrast: float
    brightness: float
    noise: float
    """contrast: largest relative change; the other two: in units of pictures in [−1, 1], at most"""
    blur_pixels: float
    """largest standard deviation of the blur"""
    precision: Precision = "auto"


@dataclass(frozen=True)
class ImageClassifierRecipe:
    """The judge of small class-conditional models. See `dmd2/training/image_classifier.py`."""

    loop: LoopSettings
    lr: float
    weight_decay: float
    widths: tuple[int, int, int]
    """channels at the picture's own side, at a half, at a quarter and below"""
    features: int
    held_out: int
    """pictures of the data that only score it"""
    classes: tuple[str, ...]
    """what the labels 0, 1, … mean"""
    precision: Precision = "auto"


@dataclass(frozen=True)
class TeacherRecipe:
    """A text-to-image teacher from scratch. See `dmd2/training/teacher.py`."""

    loop: LoopSettings
    lr: float
    weight_decay: float
    guidance_scale: float
    """of the samples it shows, and what the manifest recommends"""
    sample_steps: int
    prediction_type: PredictionType
    warm_start: bool = False
    """whether to start from the teacher in --init instead of from scratch"""
    still_until: int = 0
    """the step until which scenes have no freedom: what things look like is learned before where they may lie"""
    free_from: int = 0
    """the step from which they have all of it"""
    precision: Precision = "auto"
    compile: bool = True
    """whether torch.compile makes the network faster; needs a C++ compiler on a CPU"""


@dataclass(frozen=True)
class Dmd2Recipe:
    """A few-step student by DMD2. See `dmd2/training/dmd2.py`."""

    loop: LoopSettings
    lr: float
    lr_critic: float
    timesteps: tuple[int, ...]
    """descending; as many as the student has steps"""
    guidance_scale: float
    """the teacher's"""
    generator_every: int
    """k of the two time scales"""
    gan_generator: float
    gan_critic: float
    """weights of the GAN losses; 0 and 0 is no GAN"""
    student_init: str | None = None
    """subfolder of the weights that the student starts from; None: the teacher's"""
    precision: Precision = "auto"
    compile: bool = True


Recipe = AutoencoderRecipe | ClassifierRecipe | ImageClassifierRecipe | TeacherRecipe | Dmd2Recipe | EdmRecipe

RECIPES: dict[str, Recipe] = {
    "emoji-vae": AutoencoderRecipe(
        loop=LoopSettings(
            iterations=4000,
            batch_size=32,
            warmup=100,
            ema_decay=0.995,
            sample_every=500,
            checkpoint_every=500,
        ),
        lr=2e-3,
        channels=48,
        encoder_blocks=(0, 1, 4),
        decoder_blocks=(5, 2, 0),
        latent_noise=0.05,
    ),
    "emoji-classifier": ClassifierRecipe(
        loop=LoopSettings(
            iterations=4000, batch_size=64, warmup=300, clip_norm=5.0, ema_decay=0.99, sample_every=500
        ),
        lr=3e-3,
        weight_decay=0.05,
        widths=(32, 64, 128, 256),
        features=128,
        contrast=0.1,
        brightness=0.08,
        noise=0.12,
        blur_pixels=1.2,
    ),
    # 16 epochs
    "cifar10-classifier": ImageClassifierRecipe(
        loop=LoopSettings(
            iterations=6000, batch_size=128, warmup=800, clip_norm=5.0, ema_decay=0.995, sample_every=1000
        ),
        lr=0.15,
        weight_decay=5e-4,
        widths=(32, 64, 128),
        features=128,
        held_out=1000,
        classes=CIFAR10,
    ),
    # v-prediction, unlike SDXL's eps: at t = 999 an eps error is multiplied by σ = 14.6 on its way to x0, which
    # a small network in bf16 feels; the UNet, the schedule and all code paths are the same.
    "emoji-teacher": TeacherRecipe(
        loop=LoopSettings(
            iterations=3300,
            batch_size=64,
            warmup=100,
            ema_decay=0.999,
            sample_every=1000,
            checkpoint_every=250,
        ),
        lr=1e-3,
        weight_decay=0.01,
        guidance_scale=2.0,
        sample_steps=25,
        prediction_type="v_prediction",
        still_until=1500,
        free_from=2500,
    ),
    # Not compiled: in runs as short as these, compiling five graphs costs what it saves. A GAN heavier than
    # the papers', and a teacher less guided than when it samples (2): both keep the pictures as varied as the data.
    "emoji-dmd2-4step": Dmd2Recipe(
        loop=LoopSettings(
            iterations=3200, batch_size=24, warmup=30, ema_decay=0.99, sample_every=200, checkpoint_every=100
        ),
        lr=1e-4,
        lr_critic=2e-4,
        timesteps=(999, 749, 499, 249),
        guidance_scale=1.5,
        generator_every=3,
        gan_generator=3e-2,
        gan_critic=3e-2,
        compile=False,
    ),
    # Starts from the 4-step student, whose first step is a one-step generator already; v-prediction makes
    # t = 999 as good a place to start from as SDXL's t = 399.
    "emoji-dmd2-1step": Dmd2Recipe(
        loop=LoopSettings(
            iterations=3000, batch_size=24, warmup=30, ema_decay=0.99, sample_every=200, checkpoint_every=100
        ),
        lr=1e-4,
        lr_critic=2e-4,
        timesteps=(999,),
        guidance_scale=1.5,
        generator_every=3,
        gan_generator=3e-2,
        gan_critic=3e-2,
        student_init="unet",
        compile=False,
    ),
    **EDM_RECIPES,
}


def resolve(name: str, overrides: list[str]) -> Recipe:
    """The recipe `name` with `key=value` overrides applied; loop settings may be named with or without "loop.".

    Raises:
        UserError: no such recipe or key, or a value of the wrong type.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {name!r}: unknown; expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected key=value")
        field = key.removeprefix("loop.")
        part = recipe.loop if field in _types(recipe.loop) else recipe
        types = _types(part)
        if field not in types or field == "loop":
            valid = sorted((_types(recipe) | _types(recipe.loop)).keys() - {"loop"})
            raise UserError(f"--set {key}: {name} has no such key; expected one of {', '.join(valid)}")
        try:
            value = TypeAdapter(types[field]).validate_python(_literal(text))
        except ValidationError as error:
            raise UserError(f"--set {override}: {error.errors()[0]['msg']}") from None
        if part is recipe.loop:
            recipe = replace(recipe, loop=replace(recipe.loop, **{field: value}))
        else:
            recipe = replace(recipe, **{field: value})
        _check(recipe, override)
    return recipe


def _check(recipe: Recipe, override: str) -> None:
    for key in ("iterations", "batch_size", "accumulate", "log_every", "sample_every", "checkpoint_every"):
        if getattr(recipe.loop, key) < 1:
            raise UserError(f"--set {override}: expected at least 1")
    if isinstance(recipe, EdmRecipe):
        check_edm(recipe, override)
    if isinstance(recipe, Dmd2Recipe):
        steps = list(recipe.timesteps)
        if not steps or steps != sorted(set(steps), reverse=True) or not all(0 <= t <= 999 for t in steps):
            raise UserError(f"--set {override}: expected timesteps within 0 to 999, descending")


def _types(part: Any) -> dict[str, Any]:
    return get_type_hints(type(part))


def _literal(text: str) -> Any:
    """JSON where it parses (numbers, true, null, [999, 749]), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
