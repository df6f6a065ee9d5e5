"""GDD's discriminator as published (Zheng & Yang 2405.20750; Sauer et al. 2021, Projected GAN, 2111.01007, sec. 3.2).

As `ProjectedDiscriminator` it judges images by frozen features, mixed at random, with heads that learn; but it has
the published widths, with about 10.3 million parameters in the heads of each feature network, batch normalisation,
and for classes nothing but projection on embeddings that begin as pretrained ones.

    map 0  1×1 → 64   + ────→ 1×1 → 64   at 112×112 → head
    map 1  1×1 → 128  + ─┘ → 1×1 → 64   at 56×56   → head
    map 2  1×1 → 256  + ─┘ → 1×1 → 128  at 28×28   → head
    map 3  1×1 → 512  ───┘ → 1×1 → 256  at 14×14   → head

Two things are not known of the published one and chosen here: the rows of a pretrained network's last layer are the
class embeddings, and all heads share one table of them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dmd2.diffusion.denoiser import Cond
from dmd2.runtime.errors import UserError, shown
from dmd2.training.discriminators.projected import CLASS_CHANNELS, Backbone

MIXED = (64, 128, 256, 512)
"""channels of the four maps after mixing across channels, finest first"""
HEAD_SIDES = (112, 56, 28, 14)
HEAD_WIDTHS = ((64, 64, 128, 256, 512), (64, 128, 256, 512), (128, 256, 512), (256, 512))
"""channels of a head's input, and after each of the convolutions that halve its side"""
TRANSFORMER_CHANNELS = (96, 192, 384, 768)
"""what the layers of a transformer are brought to, which all have one side"""
LABELLED_BY = "tf_efficientnet_lite0"


class PublishedDiscriminator(nn.Module):
    """Images → logits: 4×4 from each of four scales of each backbone.

    What is random and fixed is kept in buffers: saved, never trained. Backbones are neither: bring them to the device
    yourself. With batch normalisation an image's logits depend on its batch, so real and generated ones are to be
    judged apart.

    Args:
        backbones: frozen feature networks that give four maps each.
        example: (n, 3, H, W) a picture of the size that will be judged, to learn the maps' shapes from.
        example_cond: its condition.
        embeddings: (classes, d) what stands for a class at first; None for no classes.
        labels_of: with `embeddings`, a condition's one-hot labels (B, classes).
    """

    def __init__(
        self,
        backbones: Sequence[Backbone],
        example: Tensor,
        example_cond: Cond,
        *,
        embeddings: Tensor | None = None,
        labels_of: Callable[[Cond], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if (embeddings is None) != (labels_of is None):
            raise ValueError("embeddings, labels_of: expected both or neither")
        self._backbones, self._labels_of = tuple(backbones), labels_of  # a tuple: not this module's children
        self.embeddings = None if embeddings is None else nn.Parameter(embeddings.detach().clone())
        width = 0 if embeddings is None else embeddings.shape[1]
        with torch.no_grad():
            shapes = [[tuple(m.shape[1:]) for m in backbone(example, example_cond)] for backbone in backbones]
        self.branches = nn.ModuleList(_Branch(maps, width) for maps in shapes)

    def forward(self, images: Tensor, cond: Cond) -> Tensor:
        """images (B, 3, H, W) fp32 in [−1, 1] → logits (B, 64 × backbones)."""
        classes = None
        if self._labels_of is not None and self.embeddings is not None:
            classes = self._labels_of(cond) @ self.embeddings
        logits = [
            branch(backbone(images, cond), classes)
            for backbone, branch in zip(self._backbones, self.branches, strict=True)
        ]
        return torch.cat(logits, dim=1)


class _Frozen(nn.Module):
    """A convolution as torch initialises it, in buffers."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        assert layer.bias is not None
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("bias", layer.bias.detach())
        self._apply_to: Any = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else F.conv2d
        self._options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._apply_to(x, self.get_buffer("weight"), self.get_buffer("bias"), **self._options)
        return out


def _scales_of_a_transformer(channels: int) -> nn.ModuleList:
    """Four layers' tokens (B, `channels`, 14, 14) → sides 56, 28, 14 and 7."""
    a, b, _, d = TRANSFORMER_CHANNELS
    resample = (
        _Frozen(nn.ConvTranspose2d(a, a, 4, 4)),
        _Frozen(nn.ConvTranspose2d(b, b, 2, 2)),
        nn.Identity(),
        _Frozen(nn.Conv2d(d, d, 3, 2, 1)),
    )
    return nn.ModuleList(
        nn.Sequential(_Frozen(nn.Conv2d(channels, c, 1)), layer)
        for c, layer in zip(TRANSFORMER_CHANNELS, resample, strict=True)
    )


class _Branch(nn.Module):
    """Mixing and heads on one backbone; `classes`: width of the class embeddings, 0 for none."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], classes: int) -> None:
        super().__init__()
        if len(shapes) != len(MIXED):
            raise ValueError(f"backbones: a network of {len(shapes)} maps; expected {len(MIXED)}")
        channels = [shape[0] for shape in shapes]
        self.scales = None
        if len({shape[1:] for shape in shapes}) == 1:
            self.scales, channels = _scales_of_a_transformer(channels[0]), list(TRANSFORMER_CHANNELS)
        self.across_channels = nn.ModuleList(
            _Frozen(nn.Conv2d(c, m, 1)) for c, m in zip(channels, MIXED, strict=True)
        )
        self.across_scales = nn.ModuleList(
            _Frozen(nn.Conv2d(m, widths[0], 1)) for m, widths in zip(MIXED, HEAD_WIDTHS, strict=True)
        )
        self.heads = nn.ModuleList(_Head(widths, classes) for widths in HEAD_WIDTHS)

    def mix(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps → the heads' inputs, finest first: what is coarser is added to what is finer."""
        if self.scales is not None:
            maps = [scale(x) for scale, x in zip(self.scales, maps, strict=True)]
        mixed: list[Tensor] = []
        for i in reversed(range(len(MIXED))):
            x = self.across_channels[i](maps[i])
            if mixed:
                x = x + _enlarged(mixed[-1], x.shape[2])
            # A 1×1 convolution and linear interpolation may change places; so it is a quarter of the work.
            mixed.append(_enlarged(self.across_scales[i](x), HEAD_SIDES[i]))
        return mixed[::-1]

    def forward(self, maps: Sequence[Tensor], classes: Tensor | None) -> Tensor:
        """Maps, class embeddings (B, d) → logits (B, 64)."""
        return torch.cat([head(x, classes) for head, x in zip(self.heads, self.mix(maps), strict=True)], dim=1)


def _enlarged(x: Tensor, side: int) -> Tensor:
    return x if x.shape[2] == side else F.interpolate(x, size=(side, side), mode="bilinear")


class _Head(nn.Module):
    """One scale's discriminator: convolutions of 4×4 that halve the side down to 7×7, then 4×4 logits by another."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            # without a bias: the normalisation would take it away
            layers += [spectral_norm(nn.Conv2d(narrow, wide, 4, 2, 1, bias=False)), nn.BatchNorm2d(wide)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.logits = spectral_norm(nn.Conv2d(widths[-1], CLASS_CHANNELS if classes else 1, 4, bias=False))
        self.project = nn.Linear(classes, CLASS_CHANNELS) if classes else None

    def forward(self, x: Tensor, classes: Tensor | None) -> Tensor:
        """(B, c, h, w), class embeddings (B, d) → logits (B, n)."""
        out: Tensor = self.logits(self.layers(x))
        if self.project is not None:  # Miyato & Koyama 2018, eq. 3, without its term of the image alone
            assert classes is not None, "a discriminator of classes needs labels"
            out = (out * self.project(classes)[:, :, None, None]).sum(1, keepdim=True) / math.sqrt(CLASS_CHANNELS)
        return out.flatten(1)


def class_embeddings(classes: int, name: str = LABELLED_BY) -> Tensor:
    """(classes, d): the rows of a pretrained ImageNet classifier's last layer, from the first.

    Of CIFAR-10's classes they know nothing; as in the published run they are a start, and are trained.

    Raises:
        UserError: timm is not installed, cannot give the network, or that knows fewer classes.
    """
    try:
        timm: Any = importlib.import_module("timm")
        rows: Tensor = timm.create_model(name, pretrained=True).get_classifier().weight.detach().float()
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"discriminator: {name} cannot be had from timm ({shown(error)})") from None
    if classes > len(rows):
        raise UserError(f"discriminator: {name} has embeddings of {len(rows)} classes, not {classes}")
    return rows[:classes].cpu().clone()
