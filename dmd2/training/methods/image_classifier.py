"""Training the classifier of small class-conditional models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dmd2.data.images import ImageSet
from dmd2.evaluation.classifiers import save_classifier_file
from dmd2.evaluation.image_classifier import ImageClassifier
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.precision import autocast_dtype
from dmd2.training.loop import Batch, Logs, Method, Phase
from dmd2.training.methods.common import Recipe
from dmd2.training.ranges import Name, Part, Steps, Width
from dmd2.training.sources import Inputs


@dataclass(frozen=True)
class ImageClassifierRecipe(Recipe):
    """The judge of small class-conditional models. See `dmd2/training/methods/image_classifier.py`."""

    weight_decay: Part
    widths: tuple[Width, Width, Width]
    """channels at the image's own side, at a half, at a quarter and below"""
    features: Width
    held_out: Steps
    """images of the data that only score it"""
    classes: Annotated[tuple[Name, ...], Field(min_length=2)]
    """what the labels 0, 1, … mean"""
    kind = "classifier"
    data = "images"

    def method(self, inputs: Inputs) -> Method:
        images = ImageSet(inputs.need("data"), classes=len(self.classes))
        return train_image_classifier(self, images, inputs.device)


CROP = 4  # pixels that a crop may be shifted by


def train_image_classifier(recipe: ImageClassifierRecipe, dataset: ImageSet, device: torch.device) -> Method:
    """Cross-entropy on flipped and shifted images. `export` writes `classifier.safetensors` in fp16.

    `recipe.held_out` of the images, drawn by the seed, are not trained on; `score` is the accuracy on them.

    Raises:
        UserError: there are no labels, or fewer images than the recipe holds out and batches take.
    """
    n, size, labels = len(dataset), recipe.loop.batch_size, _checked_labels(recipe, dataset)
    torch.manual_seed(recipe.loop.seed)
    model = ImageClassifier(len(recipe.classes), recipe.widths, recipe.features).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(recipe.loop.seed))
    held, kept = order[: recipe.held_out], order[recipe.held_out :]

    def data(step: int) -> tuple[Tensor, Tensor]:
        """Each epoch goes through the images in an order of its own; what does not fill a batch is left out."""
        epoch, place = divmod(step, len(kept) // size)
        shuffled = torch.randperm(len(kept), generator=torch.Generator().manual_seed(recipe.loop.seed + epoch))
        rows = kept[shuffled[place * size : (place + 1) * size]]
        return dataset.images(rows), labels[rows]

    autocast = autocast_dtype(recipe.precision, device)

    def logits(net: nn.Module, x: Tensor) -> Tensor:
        x = (x.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return net(x).float()

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        images, truth = batch.data
        answers, truth = logits(model, flip_and_crop(images, batch.generator)), truth.to(device)
        right = (answers.detach().argmax(1) == truth).float().mean()
        return F.cross_entropy(answers, truth), {"top1": right}

    @torch.no_grad()
    def score(ema_model: nn.Module | None) -> dict[str, float]:
        net = ema_model or model
        before = net.training
        net.eval()
        answers = torch.cat([logits(net, dataset.images(rows)).argmax(1).cpu() for rows in held.split(256)])
        net.train(before)
        return {"held_out_accuracy": float((answers == labels[held]).double().mean())}

    def export(ema_model: nn.Module | None, out: Path) -> None:
        net = ema_model or model
        assert isinstance(net, ImageClassifier)
        save_image_classifier(net, recipe, dataset.resolution, out / "classifier.safetensors")

    return Method(
        phases=[Phase("classifier", 1, model, optimizer, loss)],
        data=data,
        ema_model=model,
        score=score if recipe.held_out else None,
        export=export,
    )


def _checked_labels(recipe: ImageClassifierRecipe, dataset: ImageSet) -> Tensor:
    n, least, labels = len(dataset), recipe.held_out + recipe.loop.batch_size, dataset.labels
    if labels is None:
        raise InvalidInput("data", "has no labels; a classifier needs the class of every image", dataset.path)
    if n < least:
        raise InvalidInput("data", f"{n} images; this recipe needs at least {least}", dataset.path)
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(recipe.classes):
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise InvalidInput("data", f"labels {found}; this recipe knows 0 to {len(recipe.classes) - 1}", dataset.path)
    return labels


def flip_and_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, H, W) → the same, half of them mirrored, each shifted by up to `CROP` pixels (reflected edges)."""
    n, _, height, width = images.shape
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    padded = F.pad(images.float(), (CROP, CROP, CROP, CROP), mode="reflect").byte()
    top, left = torch.randint(0, 2 * CROP + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    cropped = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return cropped.permute(0, 3, 1, 2)


def save_image_classifier(model: ImageClassifier, recipe: ImageClassifierRecipe, size: int, path: Path) -> None:
    """See `dmd2.evaluation.classifiers`."""
    config = {"classes": recipe.classes, "widths": recipe.widths, "features": recipe.features, "size": size}
    save_classifier_file(model, "image", config, path)
