"""LPIPS (Zhang et al. 2018, 1801.03924): how different two images look to a pretrained VGG16, read from a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.runtime.errors import UserError, first_line

SIDE = 224
"""what both images are enlarged to, in pixels (DMD, app. B)"""


class Lpips:
    """LPIPS by a TorchScript network.

    The network is called as `net(images, resize_images=False, return_lpips=True)` with fp32 (B, 3, 224, 224) in
    [0, 255] and returns vectors (B, n) whose squared difference, summed up, is the distance: the interface of
    the `vgg16.pt` that NVIDIA publishes with StyleGAN2-ADA and StyleGAN3.

    Args:
        path: the TorchScript file. Loading it runs what it holds: take it from a source that you trust.
        device: where to.

    Raises:
        UserError: there is no such file, or it is not such a network.
    """

    def __init__(self, path: Path, device: torch.device | str) -> None:
        if not path.is_file():
            raise UserError(f"LPIPS {path}: no such file; expected a TorchScript VGG16 (vgg16.pt)")
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated, but it is what these networks are published in.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(path, map_location=device).eval()
            for parameter in self.network.parameters():  # a ScriptModule has no requires_grad_ of its own
                parameter.requires_grad_(False)
            features = self._features(torch.zeros(2, 3, SIDE, SIDE, device=device))
        except (RuntimeError, ValueError) as error:  # what TorchScript raises for everything
            raise UserError(f"LPIPS {path}: not a TorchScript network of this kind ({first_line(error)})") from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
            raise UserError(f"LPIPS {path}: expected one vector for each image; is this a VGG16 with return_lpips?")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (B, 3, H, W) fp32 in [−1, 1] → () mean distance over the batch. Differentiable in both."""
        return (self._features(_enlarged(x)) - self._features(_enlarged(y))).square().sum(1).mean()

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.network((images + 1) * 127.5, resize_images=False, return_lpips=True)
        return features


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(SIDE, SIDE), mode="bilinear")
