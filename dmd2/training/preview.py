"""What a run shows while it trains: a grid of fixed captions or classes and seeds, and perhaps a quick score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.data.cifar10 import CLASSES as CIFAR10
from dmd2.data.images import ImageSet
from dmd2.diffusion.noise import seeded_noise
from dmd2.emoji.scenes import EmojiScenes
from dmd2.emoji.scores import EmojiClassifier, quick_score
from dmd2.evaluation.frechet import frechet_distance_of
from dmd2.evaluation.metrics import SmallFeatures
from dmd2.inference.image_output import labelled_grid
from dmd2.models.edm.network import ClassCondition, EdmConfig
from dmd2.runtime.errors import UserError
from dmd2.runtime.paths import ROOT
from dmd2.runtime.terminal import say

QUICK_N = 128  # images that a score while training is of
CIFAR10_JUDGE = ROOT / "weights" / "cifar10-classifier.safetensors"
Generate = Callable[[list[str], list[int]], Tensor]
"""(B captions, B seeds) → uint8 (B, 3, H, W)"""


class Preview:
    """Images of 32 captions that name emoji and background, always the same ones.

    Without a judge there is a grid but no score.
    """

    def __init__(self, scenes: EmojiScenes, judge: EmojiClassifier | None, columns: int = 8, rows: int = 4) -> None:
        self.scenes, self.judge, self.columns, self.told = scenes, judge, columns, False
        pairs = scenes.pairs("all")
        chosen = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(3))[: columns * rows]]
        self.captions = scenes.captioned(chosen[:, 0], chosen[:, 1], seed=0, plain=True).captions

    def grid(self, generate: Generate) -> Tensor:
        """uint8 (3, rows·H, columns·W)"""
        images = generate(self.captions, list(range(len(self.captions))))
        return tile(images, self.columns)

    def score(self, generate: Generate) -> dict[str, float]:
        if self.judge is None:
            return {}
        if not self.told:
            say(f"scores here are of {QUICK_N} images: an fd of so few is higher than of 1,000 (README)")
        self.told = True
        return quick_score(generate, self.scenes, self.judge, QUICK_N)


class ClassPreview:
    """Rows of classes (the first ten of them), or of samples of a network without classes; always the same noise."""

    def __init__(self, config: EdmConfig, class_names: Sequence[str] = (), columns: int = 8) -> None:
        self.config, self.columns = config, columns
        self.rows = min(config.classes, 10) or columns
        named = [*class_names[: self.rows], *map(str, range(len(class_names), self.rows))]
        self.names = named if config.classes else []

    def inputs(self, device: torch.device, steps: int = 1) -> tuple[Tensor, ClassCondition]:
        """Unit noise (rows·columns, steps, C, R, R) and the condition."""
        n, c = self.rows * self.columns, self.config
        noise = seeded_noise(list(range(n)), (steps, c.channels, c.resolution, c.resolution), device)
        classes = torch.arange(n) // self.columns if c.classes else torch.full((n,), -1)
        return noise, ClassCondition.of(classes, c.classes).to(device)

    def grid(self, images: Tensor) -> Tensor:
        """uint8 (rows·columns, 3, R, R) → one image, with the name of each row's class at its left."""
        if not self.names:
            return tile(images, self.columns).cpu()
        return torch.from_numpy(np.array(labelled_grid(images.cpu().unbind(), self.names))).permute(2, 0, 1)


class ClassScore:
    """How good a small class-conditional model is by now: a classifier's view of `QUICK_N` images.

    accuracy: the share that shows the class asked for, all classes alike. fd_small, where there is a data set: the
    Fréchet distance to as many of its images, in the classifier's features. Of so few images it is good for watching
    one run only, and is not `dmd2 evaluate`'s.
    """

    def __init__(self, network: SmallFeatures, config: EdmConfig, images: ImageSet | None) -> None:
        self.network, self.config, self.told = network, config, False
        self.real = None
        if images is not None and len(images) >= QUICK_N:
            rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))[:QUICK_N]
            self.real = network(images.images(rows))[0].cpu()

    @classmethod
    def find(
        cls, judge: Path | None, config: EdmConfig, class_names: Sequence[str], images: ImageSet | None, device: Any
    ) -> ClassScore | None:
        """None if there is no classifier that fits. Without `judge`, CIFAR-10's is used for CIFAR-10.

        Raises:
            UserError: `judge` is no classifier, or one of other classes or another size.
        """
        path = judge or CIFAR10_JUDGE
        if judge is None and not (path.is_file() and config.resolution == 32 and tuple(class_names) == CIFAR10):
            return None
        network = SmallFeatures(path, device)
        if network.size != config.resolution or len(network.classes) != config.classes or config.channels != 3:
            found = f"{len(network.classes)} classes at {network.size}x{network.size} pixels"
            wanted = f"{config.classes} at {config.resolution}x{config.resolution}"
            raise UserError(f"--judge {path}: knows {found}; expected {wanted}")
        return cls(network, config, images)

    def inputs(self, device: torch.device, steps: int = 1) -> tuple[Tensor, ClassCondition]:
        """Unit noise (QUICK_N, steps, C, R, R) and the condition: all classes in turn."""
        c = self.config
        noise = seeded_noise(list(range(QUICK_N)), (steps, c.channels, c.resolution, c.resolution), device)
        return noise, ClassCondition.of(torch.arange(QUICK_N) % c.classes, c.classes).to(device)

    def score(self, images: Tensor) -> dict[str, float]:
        """Of uint8 (QUICK_N, 3, R, R), drawn for `inputs`."""
        if not self.told:
            say(f"scores here are of {QUICK_N} images: for watching one run; `dmd2 evaluate` has comparable ones")
        self.told = True
        features, answers = self.network(images, answers=True)
        assert answers is not None
        right = answers.argmax(1).cpu() == torch.arange(QUICK_N) % self.config.classes
        scores = {"accuracy": float(right.double().mean())}
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
