"""The classifier of small images, such as CIFAR-10's: its network, and its features for FD-small and accuracy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))), each 3×3 convolution followed by batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = convolution(channels, channels, 3, 1)
        self.second = convolution(channels, channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    """A convolution that keeps the side (or divides it by `stride`), then batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Trunk(nn.Module):
    """A small residual network (He et al. 2016) whose features are what remains after global-average pooling.

    Args:
        widths: channels after each of four convolutions: the first is as `size` and `stride` say, the others halve
            the side. A residual block follows the second and the third.
        features: their number.
    """

    def __init__(self, widths: tuple[int, int, int, int], features: int, size: int, stride: int) -> None:
        super().__init__()
        a, b, c, d = widths
        self.body = nn.Sequential(
            *(convolution(3, a, size, stride), nn.ReLU()),
            *(convolution(a, b, 3, 2), nn.ReLU(), Residual(b)),
            *(convolution(b, c, 3, 2), nn.ReLU(), Residual(c)),
            *(convolution(c, d, 3, 2), nn.ReLU()),
            *(convolution(d, features, 1, 1), nn.ReLU()),
        )

    def features(self, x: Tensor) -> Tensor:
        """float (B, 3, H, W) in [−1, 1] → pooled features, fp32 (B, `features`), ≥ 0."""
        return self.body(x).float().mean((2, 3))


class ImageClassifier(Trunk):
    """With a linear head over the features.

    `widths` are the channels at the image's own side, at a half and at a quarter and below.
    """

    def __init__(self, classes: int, widths: tuple[int, int, int], features: int) -> None:
        super().__init__((*widths, widths[-1]), features, 3, 1)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """float (B, 3, H, W) in [−1, 1] → logits (B, classes)."""
        return self.head(self.features(x))
