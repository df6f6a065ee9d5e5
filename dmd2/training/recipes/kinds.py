"""The kinds of recipes: a frozen dataclass for each, with the range of every number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dmd2.models.edm.network import PUBLISHED, EdmConfig
from dmd2.models.stable_diffusion.unet import PredictionType
from dmd2.runtime.errors import shown
from dmd2.runtime.precision import Precision
from dmd2.training.recipes.ranges import (
    Amount,
    Blocks,
    Blur,
    Count,
    Decay,
    Folder,
    Level,
    Name,
    Part,
    Rate,
    SamplerSteps,
    Seed,
    Steps,
    Timestep,
    Weight,
    Width,
)


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, how often. Intervals are in steps; a step is one turn of the loop.

    Ranges are checked where a recipe is resolved (`dmd2.training.recipes.kinds`).
    """

    iterations: Count
    batch_size: Count
    warmup: Steps = 0
    decay: bool = True
    """whether the learning rate falls linearly to zero after the warm-up"""
    max_grad_norm: Amount = 1.0
    """largest norm of a phase's gradient; 0 for no limit"""
    zero_nans: bool = False
    """whether a gradient's NaNs count as zero, if the loss is finite; otherwise such a gradient is not used at all"""
    grad_accum_steps: Count = 1
    """batches of `batch_size` that make one update: what does not fit into memory at once"""
    ema_decay: Decay = 0.999
    ema_half_life: Amount = 0.0
    """in images, instead of `ema_decay` if not 0; at most 5 % of the images so far"""
    seed: Seed = 0
    log_every: Count = 20
    sample_every: Count = 500
    checkpoint_every: Count = 500


Levels = Annotated[tuple[Level, ...], Field(min_length=1, max_length=64)]


@dataclass(frozen=True)
class EdmTeacherRecipe:
    """A teacher in pixel space from scratch. See `dmd2/training/methods/edm_teacher.py`."""

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
    """GDD's, or one of our own; each is a file in `dmd2/training/discriminators`"""
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


@dataclass(frozen=True)
class AutoencoderRecipe:
    """The embedded model's autoencoder. See `dmd2/training/methods/autoencoder.py`."""

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
    """The judge that scores the embedded model. See `dmd2/training/methods/emoji_classifier.py`."""

    loop: LoopSettings
    lr: Rate
    weight_decay: Part
    widths: tuple[Width, Width, Width, Width]
    """channels at 1/2, 1/4, 1/8 and 1/16 of the image's side"""
    features: Width
    contrast: Part
    brightness: Part
    noise: Part
    """contrast: largest relative change; the other two: in units of images in [−1, 1], at most"""
    blur_pixels: Blur
    """largest standard deviation of the blur"""
    precision: Precision = "auto"


@dataclass(frozen=True)
class ImageClassifierRecipe:
    """The judge of small class-conditional models. See `dmd2/training/methods/image_classifier.py`."""

    loop: LoopSettings
    lr: Rate
    weight_decay: Part
    widths: tuple[Width, Width, Width]
    """channels at the image's own side, at a half, at a quarter and below"""
    features: Width
    held_out: Steps
    """images of the data that only score it"""
    classes: Annotated[tuple[Name, ...], Field(min_length=2)]
    """what the labels 0, 1, … mean"""
    precision: Precision = "auto"


@dataclass(frozen=True)
class TeacherRecipe:
    """A text-to-image teacher from scratch. See `dmd2/training/methods/teacher.py`."""

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
    """A few-step student by DMD2. See `dmd2/training/methods/dmd2.py`."""

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
