"""Training a teacher: denoising alone (Karras et al. 2022, eq. 2), of a new network or of weights that go on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmd2.data.augment import AUGMENT_DIM, augment
from dmd2.diffusion import draws
from dmd2.diffusion.noise import seeded_noise
from dmd2.emoji.architecture import build_models, build_tokenizer
from dmd2.emoji.scenes import EmojiScenes, vocabulary
from dmd2.models.edm.family import EdmFamily
from dmd2.models.edm.network import PUBLISHED, EdmConfig
from dmd2.models.family import Family, Labels, open_family
from dmd2.models.stable_diffusion.configs import read_vae_config
from dmd2.models.stable_diffusion.family import StableDiffusionFamily
from dmd2.models.stable_diffusion.folder import load_tokenizer
from dmd2.models.stable_diffusion.unet import PredictionType
from dmd2.runtime.errors import InvalidInput, shown
from dmd2.runtime.precision import training_dtype
from dmd2.training.loop import Batch, Logs, Method, Phase
from dmd2.training.losses import denoising
from dmd2.training.methods.common import Recipe
from dmd2.training.methods.muon import Muon
from dmd2.training.ranges import DataName, Name, Part, SamplerSteps, Steps, Weight
from dmd2.training.run.card import model_card
from dmd2.training.sources import SOURCES, Examples, Inputs, Source

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
EMOJI_NETWORK = "emoji"
"""SDXL's architecture in small, with text encoders and a tokenizer of its own"""


@dataclass(frozen=True)
class DenoisingRecipe(Recipe):
    """A teacher. Samples that it shows are of its deterministic sampler."""

    network: Name | None = None
    """what to train from scratch: "emoji", or one of `NETWORKS`; null: the teacher in --init goes on"""
    optimizer: Literal["adam", "muon"] = "adam"
    weight_decay: Part = 0.0
    """of Muon"""
    augment: Part = 0.0
    """probability of each of EDM's augmentations; more than 0 needs a network with nine augmentation inputs"""
    class_names: tuple[Name, ...] = ()
    guidance_scale: Weight | None = None
    sample_steps: SamplerSteps | None = None
    """of the samples it shows, and what the manifest recommends; null: as the teacher in --init, or as EDM's paper"""
    prediction_type: PredictionType = "epsilon"
    """of a new text-to-image network"""
    warm_start: bool = False
    """whether a new text-to-image network takes its weights from the teacher in --init"""
    still_until: Steps = 0
    """the step until which scenes have no freedom: what things look like is learned before where they may lie"""
    free_from: Steps = 0
    """the step from which they have all of it"""
    lessons: Steps = 0
    """after how many batches the same images come again; 0: never. See `Lessons`"""
    data: DataName = "images"
    compile: bool = False
    kind = "denoising"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("data", "init") if self.network in (None, EMOJI_NETWORK) else ("data",)

    def conflict(self) -> str | None:
        if self.free_from < self.still_until:
            return f"free_from={self.free_from}: expected still_until={self.still_until} or more"
        if self.network in (None, EMOJI_NETWORK):
            return None if self.augment == 0 else f"augment={self.augment:g}: expected 0 for this network"
        config = NETWORKS.get(str(self.network))
        if config is None:
            return f"network={shown(self.network, 100)}: expected one of {', '.join((EMOJI_NETWORK, *NETWORKS))}"
        if self.augment > 0 and config.augment_dim != AUGMENT_DIM:
            return f"augment={self.augment:g}: expected 0; {self.network} has no inputs to be told by"
        if self.class_names and len(self.class_names) != config.classes:
            found = f"{len(self.class_names)} names"
            return f"class_names: {found} for the {config.classes} classes of {self.network}; expected as many, or []"
        return None

    def method(self, inputs: Inputs) -> Method:
        source = SOURCES[self.data]
        inputs = inputs.with_defaults(source.defaults)
        torch.manual_seed(self.loop.seed)
        family = self._family(inputs)
        return train_teacher(self, family, source(inputs, family, True), inputs)

    def _family(self, inputs: Inputs) -> Family:
        device = inputs.device
        if self.network is None:
            return open_family(inputs.need("init"), device, self.precision)
        if self.network != EMOJI_NETWORK:
            return EdmFamily.new(NETWORKS[self.network], self.network, self.class_names, device, self.precision)
        scenes, init = EmojiScenes(inputs.need("data")), inputs.need("init")
        latents = read_vae_config(init / "vae")["latent_channels"]
        teacher = StableDiffusionFamily.open(init, device, "fp32") if self.warm_start else None
        # Another vocabulary's embeddings would be other words'.
        tokenizer = load_tokenizer(init / "tokenizer") if teacher else build_tokenizer(vocabulary(scenes))
        models = build_models(tokenizer, self.loop.seed, latents)
        if teacher is not None:
            _take_weights(models, teacher)
        text = (tokenizer, models["text_encoder"], models["text_encoder_2"])
        return StableDiffusionFamily.new(
            init, models["unet"], text, self.prediction_type, (scenes.size,) * 2, device, self.precision
        )


def _take_weights(models: nn.ModuleDict, teacher: StableDiffusionFamily) -> None:
    """UNet and text encoders. Raises InvalidInput if they are others than the embedded model's."""
    networks = (teacher.teacher_network, *teacher.encode_text.encoders)
    if len(networks) != len(models):
        raise InvalidInput("init", f"it has {len(networks) - 1} text encoder; expected two, as network=emoji has")
    for name, network in zip(("unet", "text_encoder", "text_encoder_2"), networks, strict=True):
        try:
            models[name].load_state_dict(network.state_dict())
        except RuntimeError as error:
            message = f"its {name} has other tensors than that of network=emoji; expected that architecture"
            raise InvalidInput("init", message) from error


def _lesson(source: Source, recipe: DenoisingRecipe, step: int, freedom: float) -> Examples:
    return source.lesson(recipe.loop.batch_size, seed=recipe.loop.seed, step=step, freedom=freedom)


class Lessons:
    """Batches that come again after `recipe.lessons` of them, so that images are composed and encoded only once.

    Kept in fp16 on the CPU, in one tensor: among the blocks of a step, which come and go, hundreds that stay would
    leave gaps. What a batch becomes is the same whenever it comes, so that a run that is resumed goes on to the bit.
    """

    def __init__(self, source: Source, family: Family, recipe: DenoisingRecipe, inputs: Inputs) -> None:
        self._source, self._family, self._recipe, self._device = source, family, recipe, inputs.device
        rows = inputs.rows(recipe.loop.batch_size)
        size = recipe.lessons, rows.stop - rows.start, *family.shape
        self._x0 = torch.empty(size, dtype=torch.float16)
        self._kept: dict[int, Examples] = {}
        self._freedom = 0.0

    def __call__(self, step: int, freedom: float) -> Examples:
        if freedom != self._freedom:  # it grows, and what had less of it never comes back
            self._kept.clear()
            self._freedom = freedom
        place = step % self._recipe.lessons
        if place not in self._kept:
            made = _lesson(self._source, self._recipe, place, freedom)
            x0 = made.x0(self._family, self._device)
            assert x0 is not None
            self._x0[place] = x0
            self._kept[place] = replace(made, images=None, latents=self._x0[place])
        return self._kept[place]


def train_teacher(recipe: DenoisingRecipe, family: Family, source: Source, inputs: Inputs) -> Method:
    """The one phase, on whatever `family.trainable` returns.

    Augmented images come with labels that say what was done to them. Samples, here and later, are made without any,
    which means "nothing was done", so that augmentation never shows in them.
    """
    module: Any = family.trainable()
    parallel = inputs.parallel
    parallel.prepare(module, family.blocks(module), family.gathered, recipe.compile)
    denoiser = family.denoiser(module)
    dtype = training_dtype(recipe.precision, inputs.device)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "muon":
        optimizer = Muon(module, recipe.lr, recipe.weight_decay, dtype=dtype)
    else:
        optimizer = torch.optim.Adam(module.parameters(), lr=recipe.lr, betas=(0.9, 0.999), fused=True)
    preview = source.preview()
    steps = recipe.sample_steps or family.sample_steps
    guidance = family.guidance_scale if recipe.guidance_scale is None else recipe.guidance_scale
    lesson = Lessons(source, family, recipe, inputs) if recipe.lessons else partial(_lesson, source, recipe)

    def data(step: int) -> Examples:
        freedom = (step - recipe.still_until) / max(1, recipe.free_from - recipe.still_until)
        return lesson(step, min(1.0, max(0.0, freedom)))

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        x0, told = batch.data.x0(family, inputs.device), None
        if recipe.augment > 0:
            x0, told = augment(x0, recipe.augment, batch.generator)
        sigma = family.sample_sigma(len(x0), batch.generator)
        noise = draws.randn(x0.shape, batch.generator).to(x0.device)
        cond = family.condition(batch.data.labels, module)
        if told is not None:
            cond = cond.augmented(told)
        return denoising(denoiser, x0, sigma, noise, cond)[0], {}

    @torch.no_grad()
    def generate(ema: nn.Module | None, labels: Labels, seeds: list[int]) -> Tensor:
        network = ema or module
        noise = seeded_noise(seeds, family.shape, inputs.device)
        x0 = family.sample(family.denoiser(network), family.condition(labels, network), noise, steps, guidance)
        return family.codec.decode(x0)

    def export(ema: nn.Module | None, out: Path) -> None:
        began = f"Trained from scratch as {recipe.network}." if recipe.network else f"Began as {family.origin}."
        card = model_card("teacher", family.licence, began, recipe)
        if network := inputs.parallel.whole(ema or module):
            family.save_teacher(out / "model", network, steps, guidance, asdict(recipe), card)

    return Method(
        [Phase("denoising", 1, module, optimizer, loss)],
        data,
        module,
        sample=lambda ema: preview.grid(partial(generate, ema)),
        score=(lambda ema: preview.score(partial(generate, ema))) if preview.scores else None,
        export=export,
    )
