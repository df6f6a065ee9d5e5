"""What a run shows while it trains: a grid of fixed captions or classes and seeds, and perhaps a quick score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dmd2.edm import ClassCondition, EdmConfig
from dmd2.emoji_judge import EmojiJudge, quick_score
from dmd2.noise import seeded_noise
from dmd2.picture import labelled_grid
from dmd2.training.data import EmojiScenes

Draw = Callable[[list[str], list[int]], Tensor]
"""(B captions, B seeds) → uint8 (B, 3, H, W)"""


class Preview:
    """Pictures of 32 captions that name emoji and background, always the same ones.

    Without a judge there is a grid but no score.
    """

    def __init__(self, scenes: EmojiScenes, judge: EmojiJudge | None, columns: int = 8, rows: int = 4) -> None:
        self.scenes, self.judge, self.columns = scenes, judge, columns
        pairs = scenes.pairs("all")
        chosen = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(3))[: columns * rows]]
        self.captions = scenes.captioned(chosen[:, 0], chosen[:, 1], seed=0, plain=True).captions

    def grid(self, draw: Draw) -> Tensor:
        """uint8 (3, rows·H, columns·W)"""
        images = draw(self.captions, list(range(len(self.captions))))
        return tile(images, self.columns)

    def score(self, draw: Draw) -> dict[str, float]:
        return {} if self.judge is None else quick_score(draw, self.scenes, self.judge)


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
        """uint8 (rows·columns, 3, R, R) → one picture, with the name of each row's class at its left."""
        if not self.names:
            return tile(images, self.columns).cpu()
        return torch.from_numpy(np.array(labelled_grid(images.cpu().unbind(), self.names))).permute(2, 0, 1)


def tile(images: Tensor, columns: int) -> Tensor:
    """uint8 (N, 3, H, W) → one picture (3, ceil(N / columns)·H, columns·W); missing places stay white."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = images.new_full((rows * columns, channels, height, width), 255)
    canvas[:n] = images
    grid = canvas.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)
