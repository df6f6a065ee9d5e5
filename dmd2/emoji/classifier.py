"""The classifier that scores the emoji model: which emoji, and on which background, an image shows."""

from __future__ import annotations

from torch import Tensor, nn

from dmd2.evaluation.image_classifier import Trunk


class Classifier(Trunk):
    """Two linear heads over the features, which are what Fréchet distances and diversity are measured in.

    `widths` are the channels at 1/2, 1/4, 1/8 and 1/16 of the image's side.
    """

    def __init__(self, emoji: int, backgrounds: int, widths: tuple[int, int, int, int], features: int) -> None:
        super().__init__(widths, features, 5, 2)
        self.emoji = nn.Linear(features, emoji)
        self.background = nn.Linear(features, backgrounds)

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, `features`) → logits (B, emoji) and (B, backgrounds)."""
        return self.emoji(features), self.background(features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float (B, 3, H, W) in [−1, 1] → logits (B, emoji) and (B, backgrounds)."""
        return self.heads(self.features(x))
