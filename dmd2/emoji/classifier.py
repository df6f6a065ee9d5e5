"""The classifier that scores the emoji model: which emoji, and on which background, a 64×64 image shows."""

from __future__ import annotations

from torch import Tensor, nn

from dmd2.evaluation.image_classifier import Residual, convolution


class Classifier(nn.Module):
    """A small residual network with two linear heads over its global-average pooled features.

    `widths` are the channels at 1/2, 1/4, 1/8 and 1/16 of the image's side; a residual block is at 1/4 and
    one at 1/8. The pooled features are what Fréchet distances and diversity are measured in.
    """

    def __init__(self, emoji: int, backgrounds: int, widths: tuple[int, int, int, int], features: int) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = widths
        self.body = nn.Sequential(
            convolution(3, half, 5, 2),
            nn.ReLU(),
            convolution(half, quarter, 3, 2),
            nn.ReLU(),
            Residual(quarter),
            convolution(quarter, eighth, 3, 2),
            nn.ReLU(),
            Residual(eighth),
            convolution(eighth, sixteenth, 3, 2),
            nn.ReLU(),
            convolution(sixteenth, features, 1, 1),
            nn.ReLU(),
        )
        self.emoji = nn.Linear(features, emoji)
        self.background = nn.Linear(features, backgrounds)

    def features(self, x: Tensor) -> Tensor:
        """float (B, 3, H, W) in [−1, 1] → pooled features, fp32 (B, `features`), ≥ 0."""
        return self.body(x).float().mean((2, 3))

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, `features`) → logits (B, emoji) and (B, backgrounds)."""
        return self.emoji(features), self.background(features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float (B, 3, H, W) in [−1, 1] → logits (B, emoji) and (B, backgrounds)."""
        return self.heads(self.features(x))
