"""LPIPS (Zhang et al. 2018, 1801.03924): how different two images look to a pretrained VGG16, read from a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.runtime.errors import UserError, first_line
from dmd2.runtime.files import only_shapes

SIDE = 224
"""what both images are enlarged to, in pixels (DMD, app. B)"""


class Lpips:
    """LPIPS by a TorchScript network.

    The network is called as `net(images, resize_images=False, return_lpips=True)` with fp32 (B, 3, 224, 224) in
    [0, 255] and returns vectors (B, n) whose squared difference, summed up, is the distance: the interface of
    the `vgg16.pt` that NVIDIA publishes with StyleGAN2-ADA and StyleGAN3. Within `shapes_alone` it is a `Vgg16`.

    Args:
        path: the TorchScript file. Loading it runs what it holds: take it from a source that you trust.
        device: where to.

    Raises:
        UserError: there is no such file, or it is not such a network.
    """

    def __init__(self, path: Path, device: torch.device | str) -> None:
        if only_shapes():
            size = path.stat().st_size if path.is_file() else 0
            self.network: nn.Module = Vgg16(size).to(device).requires_grad_(False)
            return
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


class Vgg16(nn.Module):
    """What `Lpips` reads, with any numbers: VGG16's convolutions (Simonyan & Zisserman 2014, 1409.1556, table 1, D).

    It is called and answers as that network, and takes about as much memory.

    Args:
        size: bytes of the file that it stands for. What convolutions leave of it are layers that LPIPS does not use.
    """

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        widths, blocks, channels = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3), 3
        self.blocks = nn.ModuleList()
        for width, count in zip(widths, blocks, strict=True):
            block = nn.Sequential()
            for _ in range(count):
                block.extend([nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()])
                channels = width
            self.blocks.append(block)
        kept = sum(parameter.nbytes for parameter in self.parameters())
        self.register_buffer("unused", torch.empty(max(0, size - kept), dtype=torch.uint8))

    def forward(self, images: Tensor, resize_images: bool = False, return_lpips: bool = True) -> Tensor:
        """images (B, 3, H, W) in [0, 255] → (B, n): all layers' features, each place of unit length, side by side."""
        x = images / 127.5 - 1
        features: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            length = x.square().sum(1, keepdim=True).sqrt()
            features.append((x / (length + 1e-10)).flatten(1))
            x = F.max_pool2d(x, 2)
        return torch.cat(features, 1)


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(SIDE, SIDE), mode="bilinear")
