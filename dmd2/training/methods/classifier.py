"""The judges: of the embedded model (which emoji, on which background) and of small class-conditional models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dmd2.data.images import ImageSet
from dmd2.emoji.classifier import Classifier
from dmd2.emoji.scenes import BACKGROUNDS, EmojiScenes
from dmd2.evaluation.classifiers import save_classifier_file
from dmd2.evaluation.image_classifier import ImageClassifier
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.precision import autocast_dtype
from dmd2.training.loop import Batch, Logs, Method, Phase
from dmd2.training.methods.common import Recipe
from dmd2.training.ranges import Blur, Name, Part, Steps, Width
from dmd2.training.sources import EmojiSource, Inputs

CROP = 4  # pixels that a crop may be shifted by


Lesson = tuple[Tensor, ...]
"""images, uint8 (B, 3, H, W), then for each head of the network the right answers, int64 (B,)"""


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """A network with a head for each question about an image."""

    weight_decay: Part
    features: Width
    kind = "classifier"
    shared = False
    file_kind = "image"
    """see `dmd2.evaluation.classifiers`"""
    questions: ClassVar[tuple[str, ...]] = ()
    """what losses are called where there are several"""
    scores: ClassVar[tuple[str, ...]] = ("held_out_accuracy",)
    """what the shares of right answers are called"""

    def see(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images of a lesson, uint8 → as the network is shown them, float in [−1, 1]."""
        raise NotImplementedError

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        data: Callable[[int], Lesson],
        exam: Callable[[], list[Lesson]] | None,
        config: dict[str, Any],
    ) -> Method:
        """Cross-entropy of every head. `export` writes `classifier.safetensors` in fp16, with `config`."""
        autocast = autocast_dtype(self.precision, device)

        def logits(net: nn.Module, x: Tensor) -> list[Tensor]:
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                answers = net(x)
            return [part.float() for part in (answers if isinstance(answers, tuple) else (answers,))]

        def loss(batch: Batch) -> tuple[Tensor, Logs]:
            images, *truth = (part.to(device) for part in batch.data)
            answers = logits(model, self.see(images, batch.generator))
            losses = [F.cross_entropy(*pair) for pair in zip(answers, truth, strict=True)]
            right = (answers[0].detach().argmax(1) == truth[0]).float().mean()
            logs = {question: part.detach() for question, part in zip(self.questions, losses, strict=False)}
            return torch.stack(losses).sum(), logs | {"top1": right}

        @torch.no_grad()
        def score(ema_model: nn.Module | None) -> dict[str, float]:
            assert exam is not None
            net = ema_model or model
            before = net.training
            net.eval()
            right: list[list[Tensor]] = []
            for images, *truth in exam():
                answers = logits(net, images.to(device).float() / 127.5 - 1)
                right.append([part.argmax(1).cpu() == t for part, t in zip(answers, truth, strict=True)])
            net.train(before)
            shares = [float(torch.cat(parts).double().mean()) for parts in zip(*right, strict=True)]
            return dict(zip(self.scores, shares, strict=True))

        return Method(
            phases=[Phase("classifier", 1, model, optimizer, loss)],
            data=data,
            ema_model=model,
            score=score if exam else None,
            export=lambda ema, out: save_classifier_file(
                ema or model, self.file_kind, config, out / "classifier.safetensors"
            ),
        )


# Of the emoji


@dataclass(frozen=True)
class EmojiClassifierRecipe(ClassifierRecipe):
    """The judge that scores the embedded model. See `dmd2/training/methods/classifier.py`.

    It learns from blurred, dimmed and noisy scenes of every pair, held out or not: a judge must know the pairs that
    the judged has never seen, and must not stumble over the slight blur and noise of generated images.
    """

    widths: tuple[Width, Width, Width, Width]
    """channels at 1/2, 1/4, 1/8 and 1/16 of the image's side"""
    contrast: Part
    brightness: Part
    noise: Part
    """contrast: largest relative change; the other two: in units of images in [−1, 1], at most"""
    blur_pixels: Blur
    """largest standard deviation of the blur"""
    data = "emoji"
    file_kind = "emoji"
    questions = ("emoji", "background")
    scores = ("top1", "background")

    def network(self, emoji: int) -> Classifier:
        """An untrained one, of `emoji` emoji and the backgrounds, initialised from the seed."""
        torch.manual_seed(self.loop.seed)
        return Classifier(emoji, len(BACKGROUNDS), self.widths, self.features)

    def method(self, inputs: Inputs) -> Method:
        scenes = EmojiScenes(inputs.with_defaults(EmojiSource.defaults).need("data"))
        model = self.network(len(scenes)).to(inputs.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True
        )
        numbers = {"widths": self.widths, "features": self.features, "size": scenes.size}
        config = {"emoji": scenes.names, "backgrounds": list(BACKGROUNDS), **numbers}

        def lesson(n: int, seed: int, step: int) -> Lesson:
            batch = scenes.batch(n, seed=seed, step=step, split="every")
            return batch.images, batch.emoji, batch.background

        def data(step: int) -> Lesson:
            return lesson(self.loop.batch_size, self.loop.seed, step)

        def exam() -> list[Lesson]:
            return [lesson(256, self.loop.seed + 1, step) for step in range(4)]

        return self.train(model, optimizer, inputs.device, data, exam, config)

    def see(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Every second one blurred, each dimmed and noisy in its own way."""
        x = images.float() / 127.5 - 1
        u_contrast, u_brightness, u_noise, u_blur = torch.rand(4, len(x), 1, 1, 1, generator=generator).to(x.device)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        x[::2] = blur(x[::2], self.blur_pixels * u_blur[::2])
        x = x * (1 + self.contrast * (2 * u_contrast - 1)) + self.brightness * (2 * u_brightness - 1)
        return x + self.noise * u_noise * noise


def blur(x: Tensor, sigma_pixels: Tensor) -> Tensor:
    """Gaussian blur of (B, C, H, W) images, each with its own standard deviation (B, 1, 1, 1); 7 taps."""
    n, _, height, width = x.shape
    taps = torch.arange(-3, 4, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma_pixels.view(n, 1).clamp_min(1e-3)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    weights = kernel[:, :, None, None, None].unbind(1)
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")
    x = torch.stack([weight * x[..., i : i + width] for i, weight in enumerate(weights)]).sum(0)
    return torch.stack([weight * x[..., i : i + height, :] for i, weight in enumerate(weights)]).sum(0)


# Of image sets


@dataclass(frozen=True)
class ImageClassifierRecipe(ClassifierRecipe):
    """The judge of small class-conditional models. See `dmd2/training/methods/classifier.py`."""

    widths: tuple[Width, Width, Width]
    """channels at the image's own side, at a half, at a quarter and below"""
    held_out: Steps
    """images of the data, drawn by the seed, that only score it"""
    classes: Annotated[tuple[Name, ...], Field(min_length=2)]
    """what the labels 0, 1, … mean"""
    data = "images"

    def method(self, inputs: Inputs) -> Method:
        return self.of(ImageSet(inputs.need("data"), classes=len(self.classes)), inputs.device)

    def of(self, dataset: ImageSet, device: torch.device) -> Method:
        """
        Raises:
            UserError: there are no labels, or fewer images than the recipe holds out and batches take.
        """
        seed, size, labels = self.loop.seed, self.loop.batch_size, self._checked_labels(dataset)
        torch.manual_seed(seed)
        model = ImageClassifier(len(self.classes), self.widths, self.features)
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=True
        )
        numbers = {"widths": self.widths, "features": self.features, "size": dataset.resolution}
        config = {"classes": self.classes, **numbers}
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        held, kept = order[: self.held_out], order[self.held_out :]

        def data(step: int) -> Lesson:
            """Each epoch goes through the images in an order of its own; what does not fill a batch is left out."""
            epoch, place = divmod(step, len(kept) // size)
            shuffled = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed + epoch))
            rows = kept[shuffled[place * size : (place + 1) * size]]
            return dataset.images(rows), labels[rows]

        def exam() -> list[Lesson]:
            return [(dataset.images(rows), labels[rows]) for rows in held.split(256)]

        return self.train(model, optimizer, device, data, exam if self.held_out else None, config)

    def see(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return flip_and_crop(images, generator).float() / 127.5 - 1

    def _checked_labels(self, dataset: ImageSet) -> Tensor:
        n, least, labels = len(dataset), self.held_out + self.loop.batch_size, dataset.labels
        if labels is None:
            raise InvalidInput("data", "has no labels; a classifier needs the class of every image", dataset.path)
        if n < least:
            raise InvalidInput("data", f"{n} images; this recipe needs at least {least}", dataset.path)
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            found = f"{int(labels.min())} to {int(labels.max())}"
            knows = f"this recipe knows 0 to {len(self.classes) - 1}"
            raise InvalidInput("data", f"labels {found}; {knows}", dataset.path)
        return labels


def flip_and_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, H, W) → the same, half of them mirrored, each shifted by up to `CROP` pixels (reflected edges)."""
    n, _, height, width = images.shape
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored.to(images.device), images.flip(3), images)
    padded = F.pad(images.float(), (CROP, CROP, CROP, CROP), mode="reflect").byte()
    top, left = torch.randint(0, 2 * CROP + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    cropped = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return cropped.permute(0, 3, 1, 2)
