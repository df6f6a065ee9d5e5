"""Projected discriminator (Sauer et al. 2021, Projected GAN, 2111.01007): small heads on frozen features.

A small variant of our own, for runs without pretrained networks; `dmd2.training.discriminators.published` has GDD's.

Images are judged by what pretrained, frozen networks see in them, at several scales, mixed by fixed random
convolutions so that no part of the features can be ignored. Only the heads learn.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.runtime.errors import UserError
from dmd2.runtime.loading import GroupNorm

CLASS_CHANNELS = 64


class Backbone(Protocol):
    """A frozen feature network."""

    def __call__(self, images: Tensor, cond: Cond) -> list[Tensor]:
        """images (B, 3, H, W) fp32 in [−1, 1] → maps (B, C_l, h_l, w_l) fp32, finest first; `cond` may be unused."""
        ...


class ProjectedDiscriminator(nn.Module):
    """Images → logits, one head for each scale of each backbone.

    The mixing (Sauer et al. 2021, sec. 3.2) is random and fixed: across channels a 1×1 convolution of each map to
    `channels`, then across scales, from the coarsest to the finest, a 3×3 convolution of the sum so far, enlarged.
    It is kept in buffers: saved, never trained. Backbones are neither: bring them to the device yourself.

    Args:
        backbones: frozen feature networks.
        example: (n, 3, H, W) a picture of the size that will be judged, to learn the maps' shapes from.
        example_cond: its condition.
        channels: of the mixed maps.
        classes: for a discriminator that also judges whether image and class agree (projection, Miyato & Koyama
            2018, eq. 3): their number; 0 for none. Backbones that see the condition need it less.
        labels_of: for that, a condition's one-hot labels (B, classes).
    """

    def __init__(
        self,
        backbones: Sequence[Backbone],
        example: Tensor,
        example_cond: Cond,
        *,
        channels: int = 64,
        classes: int = 0,
        labels_of: Callable[[Cond], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if bool(classes) != (labels_of is not None):
            raise ValueError("classes, labels_of: expected both or neither")
        self._backbones, self._labels_of = tuple(backbones), labels_of  # a tuple: not this module's children
        with torch.no_grad():
            shapes = [[tuple(m.shape[1:]) for m in backbone(example, example_cond)] for backbone in backbones]
        self.branches = nn.ModuleList(_Branch(maps, channels, classes) for maps in shapes)

    def forward(self, images: Tensor, cond: Cond) -> Tensor:
        """images (B, 3, H, W) fp32 in [−1, 1] → logits (B, n): several places, all scales, all backbones."""
        labels = self._labels_of(cond) if self._labels_of else None
        logits = [
            branch(backbone(images, cond), labels)
            for backbone, branch in zip(self._backbones, self.branches, strict=True)
        ]
        return torch.cat(logits, dim=1)


class _Branch(nn.Module):
    """Mixing and heads on one backbone."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], channels: int, classes: int) -> None:
        super().__init__()
        for i, (c, _, _) in enumerate(shapes):
            self.register_buffer(f"across_channels{i}", torch.randn(channels, c, 1, 1) / math.sqrt(c))
            fan_in = channels * 9
            self.register_buffer(f"across_scales{i}", torch.randn(channels, channels, 3, 3) / math.sqrt(fan_in))
        self.heads = nn.ModuleList(_Head(channels, min(shape[1:]), classes) for shape in shapes)

    def mix(self, maps: Sequence[Tensor]) -> list[Tensor]:
        mixed: list[Tensor] = []
        below: Tensor | None = None
        for i in reversed(range(len(maps))):
            x = F.conv2d(maps[i], self.get_buffer(f"across_channels{i}"))
            if below is not None:
                # the sum of two of unit variance
                x = (x + F.interpolate(below, size=x.shape[2:], mode="bilinear")) * math.sqrt(0.5)
            below = F.conv2d(x, self.get_buffer(f"across_scales{i}"), padding=1)
            mixed.append(below)
        return mixed[::-1]

    def forward(self, maps: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """Maps, labels (B, classes) → logits (B, n)."""
        logits = [head(x, labels) for head, x in zip(self.heads, self.mix(maps), strict=True)]
        return torch.cat(logits, dim=1)


class _Head(nn.Module):
    """One scale's discriminator: spectrally normalised convolutions down to 8×8, then 5×5 logits by one of 4×4.

    Group norm, where Projected GAN has batch norm: an image's logits do not depend on its neighbours.
    """

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if side <= 8:  # without a non-linearity it could only compare means
            layers += [spectral_norm(nn.Conv2d(channels, channels, 3, 1, 1)), nn.LeakyReLU(0.2)]
        width = channels
        while side > 8:
            narrow, width, side = width, min(2 * width, 4 * channels), side // 2
            layers += [spectral_norm(nn.Conv2d(narrow, width, 4, 2, 1)), GroupNorm(max(1, width // 16), width)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.logits = spectral_norm(nn.Conv2d(width, 1 + (CLASS_CHANNELS if classes else 0), min(side, 4)))
        self.embed = nn.Linear(classes, CLASS_CHANNELS, bias=False) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """(B, channels, h, w), labels (B, classes) → logits (B, n)."""
        out = self.logits(self.layers(x))
        logits, agreement = out[:, :1], out[:, 1:]
        if self.embed is not None:
            assert labels is not None, "a discriminator of classes needs labels"
            wanted = self.embed(labels)[:, :, None, None]
            logits = logits + (agreement * wanted).sum(1, keepdim=True) / math.sqrt(CLASS_CHANNELS)
        flat: Tensor = logits.flatten(1)
        return flat


# Backbones


class _Enough(Exception):
    """The last wanted activation is there; the rest of the forward pass would be wasted."""


class DenoiserFeatures:
    """A frozen denoiser's activations as a backbone: no other network is needed, and images keep their size.

    Clean images are given as if they had noise of a low level: not the lowest, at which the network has next to
    nothing to do. The forward pass ends at the last of the layers: for an encoder's, less than half of the network
    runs.

    Args:
        denoiser: not compiled (hooks would not be called), its parameters without gradients.
        layers: modules of it whose outputs (B, C, h, w) are taken, in the order in which they run, finest first.
        sigma: the level.
    """

    def __init__(self, denoiser: Denoiser, layers: Sequence[nn.Module], sigma: float = 0.2) -> None:
        self.denoiser, self.layers, self.sigma = denoiser, tuple(layers), sigma

    def __call__(self, images: Tensor, cond: Cond) -> list[Tensor]:
        maps: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            maps.append(output.float())
            if len(maps) == len(self.layers):
                raise _Enough

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            self.denoiser(images, torch.full((len(images),), self.sigma, device=images.device), cond)
        except _Enough:
            return maps
        finally:
            for handle in handles:
                handle.remove()
        raise ValueError(f"layers: only {len(maps)} of {len(self.layers)} ran in a call of the denoiser")


INPUT_SIDE = 224  # what the pretrained networks were trained at, in pixels
STRIDES = (4, 8, 16, 32)  # of the four scales (Sauer et al. 2021, sec. 4)
STRIDES_OF = {"vgg16_bn": (2, 4, 8, 16)}
# Transformers have one resolution: four depths take the place of four scales (StyleGAN-XL, Sauer et al. 2022).
TRANSFORMER_LAYERS = {"deit_base_distilled_patch16_224": (2, 5, 8, 11)}


class TimmFeatures:
    """A pretrained network of timm's, frozen, as a backbone with four maps. Images are enlarged to 224×224.

    A transformer's maps are four layers' tokens, all 14×14, without those that stand for no place.

    GDD's pairs: vgg16_bn with tf_efficientnet_lite0 for CIFAR-10, deit_base_distilled_patch16_224 with
    tf_efficientnet_lite0 for everything else.

    Args:
        name: timm's name of the network; its weights come from where timm finds them.
        device: where to.
        to_rgb: x0 → images in [−1, 1].

    Raises:
        UserError: timm is not installed, or does not know the network.
    """

    def __init__(
        self, name: str, device: torch.device | str, to_rgb: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        self._to_rgb = to_rgb
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise UserError(
                f"discriminator {name}: needs timm and torchvision, which are not installed ({error}); "
                "install them, or use the teacher's own features"
            ) from None
        depths = TRANSFORMER_LAYERS.get(name)
        options = {} if depths is None else {"out_indices": depths}
        try:
            model = timm.create_model(name, pretrained=True, features_only=True, **options)
        except (RuntimeError, OSError) as error:  # unknown; or its weights cannot be had
            raise UserError(f"discriminator {name}: timm cannot make it ({error})") from error
        self.network = model.to(device).eval().requires_grad_(False)
        strides, wanted = list(model.feature_info.reduction()), STRIDES_OF.get(name, STRIDES)
        if depths is None and not set(wanted) <= set(strides):
            raise UserError(f"discriminator {name}: its maps have strides {strides}; expected {wanted} among them")
        self.chosen = range(len(wanted)) if depths else [strides.index(stride) for stride in wanted]
        mean, std = (torch.tensor(model.pretrained_cfg[key], device=device) for key in ("mean", "std"))
        self.mean, self.std = mean[:, None, None], std[:, None, None]

    def __call__(self, images: Tensor, cond: Cond) -> list[Tensor]:
        large = F.interpolate(self._to_rgb(images), size=(INPUT_SIDE, INPUT_SIDE), mode="bilinear")
        maps = self.network(((large + 1) / 2 - self.mean) / self.std)
        return [maps[i].float() for i in self.chosen]
