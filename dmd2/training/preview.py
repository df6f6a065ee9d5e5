"""What a run shows while it trains: a grid of fixed captions or classes and seeds, and perhaps a quick score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmd2.data.cifar10 import CLASSES as CIFAR10
from dmd2.data.images import ImageSet
from dmd2.emoji.scenes import EmojiScenes
from dmd2.emoji.scores import EmojiClassifier, quick_score
from dmd2.evaluation.frechet import frechet_distance_of
from dmd2.evaluation.metrics import ClipScore, Inception, SmallFeatures, centre_crop
from dmd2.inference.image_output import labelled_grid
from dmd2.models.family import Family, Labels
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.paths import ROOT
from dmd2.runtime.terminal import say

QUICK_N = 128  # images that a score while training is of
QUICK_BATCH = 8  # images of text at once
CIFAR10_CLASSIFIER = ROOT / "weights" / "cifar10-classifier.safetensors"
Generate = Callable[[Labels, list[int]], Tensor]
"""(labels of B images, B seeds) → uint8 (B, 3, H, W)"""


class Preview(Protocol):
    """Always the same captions or classes, and seeds."""

    scores: bool
    """whether `score` has something to say"""

    def grid(self, generate: Generate) -> Tensor:
        """An image, uint8 (3, H, W)."""
        ...

    def score(self, generate: Generate) -> dict[str, float]:
        """Of `QUICK_N` images: for watching one run."""
        ...


class CaptionPreview:
    """Images of 32 captions that name emoji and background. Without a classifier there is a grid but no score."""

    def __init__(
        self, scenes: EmojiScenes, classifier: EmojiClassifier | None, columns: int = 8, rows: int = 4
    ) -> None:
        self.scenes, self.classifier, self.columns, self.told = scenes, classifier, columns, False
        self.scores = classifier is not None
        pairs = scenes.pairs("all")
        chosen = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(3))[: columns * rows]]
        self.captions = scenes.captioned(chosen[:, 0], chosen[:, 1], seed=0, plain=True).captions

    def grid(self, generate: Generate) -> Tensor:
        return tile(generate(self.captions, list(range(len(self.captions)))), self.columns)

    def score(self, generate: Generate) -> dict[str, float]:
        assert self.classifier is not None
        if not self.told:
            say(f"scores here are of {QUICK_N} images: an fd of so few is higher than of 1,000 (README)")
        self.told = True
        return quick_score(generate, self.scenes, self.classifier, QUICK_N)


class RowsPreview:
    """Images of the first texts of a run's data, as captions or encoded before."""

    def __init__(self, cond: Any, columns: int = 4, judge: TextScore | None = None) -> None:
        self.cond, self.columns, self.judge, self.scores = cond, columns, judge, judge is not None

    def grid(self, generate: Generate) -> Tensor:
        return tile(generate(self.cond, list(range(len(self.cond)))).cpu(), self.columns)

    def score(self, generate: Generate) -> dict[str, float]:
        assert self.judge is not None
        return self.judge.score(generate)


class TextScore:
    """How good a text-to-image student is by now, of up to `QUICK_N` prompts and as many real images.

    clip_score: the mean cosine of image and prompt. patch_fid: the Fréchet distance of Inception's features of the
    images' middles (299x299) to those of real images. Of so few it is good for watching one run only. Networks are
    loaded for a score and freed after it, so that training has their memory.

    Args:
        prompts: images are generated for the first of these.
        clip: folder of a CLIP model; None: no clip_score.
        inception: TorchScript file; None: no patch_fid.
        real: rows → uint8 (B, 3, H, W), of which there are `count`. They are asked for once.
        embedded: what to generate by in the prompts' place, where these were encoded before: as many rows.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        clip: Path | None,
        inception: Path | None,
        real: Callable[[list[int]], Tensor],
        count: int,
        device: torch.device,
        embedded: Any = None,
    ) -> None:
        self.prompts, self.clip, self.inception = list(prompts[:QUICK_N]), clip, inception
        self.real, self.count, self.device, self.told = real, min(QUICK_N, count), device, False
        self.asked: Any = self.prompts if embedded is None else embedded
        self.features: Tensor | None = None
        if inception is not None and min(self.count, len(self.prompts)) < 2:
            found = f"{self.count} images and {len(self.prompts)} prompts"
            raise InvalidInput("inception", f"patch-FID compares at least two images with two; there are {found}")

    def score(self, generate: Generate) -> dict[str, float]:
        if not self.told:
            say(f"scores here are of {len(self.prompts)} images; `dmd2 evaluate` has comparable ones")
        self.told = True
        clip = ClipScore(self.clip, self.device) if self.clip else None
        inception = Inception(self.inception, self.device) if self.inception else None
        cosines, features = [], []
        for start in range(0, len(self.prompts), QUICK_BATCH):
            rows = range(start, min(start + QUICK_BATCH, len(self.prompts)))
            texts = self.prompts[start : rows.stop]
            images = generate(self.asked[start : rows.stop], list(rows)).cpu()
            cosines += [clip(images, texts).cpu()] if clip else []
            features += [inception(centre_crop(images))[0].cpu()] if inception else []
        scores = {"clip_score": float(torch.cat(cosines).double().mean())} if clip else {}
        if inception:
            self.features = self._of_real(inception) if self.features is None else self.features
            scores["patch_fid"] = frechet_distance_of(torch.cat(features), self.features)
        return scores

    def _of_real(self, inception: Inception) -> Tensor:
        chosen = torch.randperm(self.count, generator=torch.Generator().manual_seed(3)).tolist()
        parts = [chosen[start : start + QUICK_BATCH] for start in range(0, len(chosen), QUICK_BATCH)]
        return torch.cat([inception(centre_crop(self.real(part)))[0].cpu() for part in parts])


class ClassPreview:
    """Rows of classes (the first ten of them), or of samples of a network without classes."""

    def __init__(
        self, class_names: Sequence[str], classes: int, classifier: ClassScore | None = None, columns: int = 8
    ) -> None:
        self.columns, self.classifier, self.scores = columns, classifier, classifier is not None
        self.rows = min(classes, 10) or columns
        named = [*class_names[: self.rows], *map(str, range(len(class_names), self.rows))]
        self.names = named if classes else []

    def grid(self, generate: Generate) -> Tensor:
        """With the name of each row's class at its left."""
        n = self.rows * self.columns
        labels = torch.arange(n) // self.columns if self.names else torch.full((n,), -1)
        images = generate(labels, list(range(n))).cpu()
        if not self.names:
            return tile(images, self.columns)
        return torch.from_numpy(np.array(labelled_grid(images.unbind(), self.names))).permute(2, 0, 1)

    def score(self, generate: Generate) -> dict[str, float]:
        assert self.classifier is not None
        return self.classifier.score(generate)


class ClassScore:
    """How good a small class-conditional model is by now: a classifier's view of `QUICK_N` images.

    accuracy: the share that shows the class asked for, all classes alike. fd_small, where there is a data set: the
    Fréchet distance to as many of its images, in the classifier's features. Of so few images it is good for watching
    one run only, and is not `dmd2 evaluate`'s.
    """

    def __init__(self, network: SmallFeatures, images: ImageSet | None) -> None:
        self.network, self.told = network, False
        self.real = None
        if images is not None and len(images) >= QUICK_N:
            rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))[:QUICK_N]
            self.real = network(images.images(rows))[0].cpu()

    @classmethod
    def find(
        cls, path: Path | None, family: Family, images: ImageSet | None, device: torch.device | str
    ) -> ClassScore | None:
        """None if there is no classifier that fits. Without a `path`, CIFAR-10's is used for CIFAR-10.

        Raises:
            UserError: what is there is no classifier, or one of other classes or another size.
        """
        channels, side, _ = family.shape
        ours = path is None and side == 32 and tuple(family.class_names) == CIFAR10 and CIFAR10_CLASSIFIER.is_file()
        if path is None and not ours:
            return None
        network = SmallFeatures(path or CIFAR10_CLASSIFIER, device)
        if network.size != side or len(network.classes) != family.classes or channels != 3:
            found = f"{len(network.classes)} classes at {network.size}x{network.size} pixels"
            raise InvalidInput("classifier", f"knows {found}; expected {family.classes} at {side}x{side}", path)
        return cls(network, images)

    def score(self, generate: Generate) -> dict[str, float]:
        """Of all classes in turn."""
        if not self.told:
            say(f"scores here are of {QUICK_N} images: for watching one run; `dmd2 evaluate` has comparable ones")
        self.told = True
        labels = torch.arange(QUICK_N) % len(self.network.classes)
        features, answers = self.network(generate(labels, list(range(QUICK_N))), answers=True)
        assert answers is not None
        scores = {"accuracy": float((answers.argmax(1).cpu() == labels).double().mean())}
        if self.real is not None:
            scores["fd_small"] = frechet_distance_of(features.cpu(), self.real)
        return scores


def tile(images: Tensor, columns: int) -> Tensor:
    """uint8 (N, 3, H, W) → one image (3, ceil(N / columns)·H, columns·W); missing places stay white."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = images.new_full((rows * columns, channels, height, width), 255)
    canvas[:n] = images
    grid = canvas.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)
