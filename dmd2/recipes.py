"""Every named training recipe. Whatever changes the numbers is here; where a run lives is on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from dmd2.cifar10 import CLASSES as CIFAR10
from dmd2.edm_recipes import (
    EDM_RECIPES,
    EdmDmd2Recipe,
    EdmDmdRecipe,
    EdmGddRecipe,
    EdmRecipe,
    EdmTeacherRecipe,
    edm_conflict,
    gan_conflict,
)
from dmd2.errors import UserError, shown
from dmd2.precision import Precision
from dmd2.ranges import (
    Blocks,
    Blur,
    Count,
    Folder,
    Name,
    Part,
    Rate,
    SamplerSteps,
    Steps,
    Timestep,
    Weight,
    Width,
    checked,
    field_types,
)
from dmd2.stable_diffusion import PredictionType
from dmd2.training.loop import LoopSettings


@dataclass(frozen=True)
class AutoencoderRecipe:
    """The embedded model's autoencoder. See `dmd2/training/autoencoder.py`."""

    loop: LoopSettings
    lr: Rate
    channels: Width
    encoder_blocks: tuple[Blocks, Blocks, Blocks]
    decoder_blocks: tuple[Blocks, Blocks, Blocks]
    latent_noise: Weight
    """standard deviation of the noise on the latents while training"""
    precision: Precision = "auto"


@dataclass(frozen=True)
class ClassifierRecipe:
    """The judge that scores the embedded model. See `dmd2/training/classifier.py`."""

    loop: LoopSettings
    lr: Rate
    weight_decay: Part
    widths: tuple[Width, Width, Width, Width]
    """channels at 1/2, 1/4, 1/8 and 1/16 of the picture's side"""
    features: Width
    contrast: Part
    brightness: Part
    noise: Part
    """contrast: largest relative change; the other two: in units of pictures in [−1, 1], at most"""
    blur_pixels: Blur
    """largest standard deviation of the blur"""
    precision: Precision = "auto"


@dataclass(frozen=True)
class ImageClassifierRecipe:
    """The judge of small class-conditional models. See `dmd2/training/image_classifier.py`."""

    loop: LoopSettings
    lr: Rate
    weight_decay: Part
    widths: tuple[Width, Width, Width]
    """channels at the picture's own side, at a half, at a quarter and below"""
    features: Width
    held_out: Steps
    """pictures of the data that only score it"""
    classes: Annotated[tuple[Name, ...], Field(min_length=2)]
    """what the labels 0, 1, … mean"""
    precision: Precision = "auto"


@dataclass(frozen=True)
class TeacherRecipe:
    """A text-to-image teacher from scratch. See `dmd2/training/teacher.py`."""

    loop: LoopSettings
    lr: Rate
    weight_decay: Part
    guidance_scale: Weight
    """of the samples it shows, and what the manifest recommends"""
    sample_steps: SamplerSteps
    prediction_type: PredictionType
    warm_start: bool = False
    """whether to start from the teacher in --init instead of from scratch"""
    still_until: Steps = 0
    """the step until which scenes have no freedom: what things look like is learned before where they may lie"""
    free_from: Steps = 0
    """the step from which they have all of it"""
    precision: Precision = "auto"
    compile: bool = True
    """whether torch.compile makes the network faster; needs a C++ compiler on a CPU"""


@dataclass(frozen=True)
class Dmd2Recipe:
    """A few-step student by DMD2. See `dmd2/training/dmd2.py`."""

    loop: LoopSettings
    lr: Rate
    lr_critic: Rate
    timesteps: Annotated[tuple[Timestep, ...], Field(min_length=1, max_length=1000)]
    """descending; as many as the student has steps"""
    guidance_scale: Weight
    """the teacher's"""
    generator_every: Count
    """k of the two time scales"""
    gan_generator: Weight
    gan_critic: Weight
    """weights of the GAN losses; 0 and 0 is no GAN"""
    student_init: Folder | None = None
    """subfolder of the weights that the student starts from; None: the teacher's"""
    precision: Precision = "auto"
    compile: bool = True


Recipe = AutoencoderRecipe | ClassifierRecipe | ImageClassifierRecipe | TeacherRecipe | Dmd2Recipe | EdmRecipe

# How long the emoji recipes take: hours of one x86-64 core with AVX-512 in fp32, from the CPU time of two or three
# steps of each while other work went on (so rather more than less), without samples and scores.
RECIPES: dict[str, Recipe] = {
    # 1 core hour
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
    # 0.3 core hours
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
    # 2.5 core hours, uncompiled.
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
    # 2.3 core hours.
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
    # 1.7 core hours.
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
        UserError: no such recipe or key, a value of the wrong type or out of range, values that do not go together.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {shown(name, 100)!r}: unknown; expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {shown(override, 100)}: expected key=value")
        field = key.removeprefix("loop.")
        part = recipe.loop if field in field_types(LoopSettings) else recipe
        if field not in field_types(type(part)) or field == "loop":
            valid = sorted((field_types(type(recipe)).keys() | field_types(LoopSettings).keys()) - {"loop"})
            raise UserError(f"--set {shown(key, 100)}: {name} has no such key; expected one of {', '.join(valid)}")
        try:
            value = checked(type(part), field, _literal(text))
        except UserError as error:
            raise UserError(f"--set {key.removesuffix(field)}{error}") from None
        if part is recipe.loop:
            recipe = replace(recipe, loop=replace(recipe.loop, **{field: value}))
        else:
            recipe = replace(recipe, **{field: value})
    problem = _conflict(recipe)  # after the last override: two fields may have to change together
    if problem is not None:
        raise UserError(f"--set {problem}")
    return recipe


def _conflict(recipe: Recipe) -> str | None:
    """Which fields do not go together, and what would; None if all do."""
    match recipe:
        case EdmTeacherRecipe() | EdmDmdRecipe() | EdmDmd2Recipe() | EdmGddRecipe():
            return edm_conflict(recipe)
        case TeacherRecipe() if recipe.free_from < recipe.still_until:
            return f"free_from={recipe.free_from}: expected still_until={recipe.still_until} or more"
        case Dmd2Recipe():
            steps = list(recipe.timesteps)
            if steps != sorted(set(steps), reverse=True):
                return f"timesteps={shown(steps, 100)}: expected descending timesteps within 0 to 999"
            return gan_conflict(recipe.gan_generator, recipe.gan_critic)
    return None


def _literal(text: str) -> Any:
    """JSON where it parses (numbers, true, null, [999, 749]), else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not JSON; a number of thousands of digits; nested too deep
        return text
