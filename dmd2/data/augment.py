"""EDM's augmentation (Karras et al. 2022, app. F.2): geometric, and told to the network in labels.

The transformations and their resampling are those of ADA (Karras et al. 2020, 2006.06676, app. B).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.diffusion import draws

AUGMENT_DIM = 9
SCALE, ANISOTROPY, TRANSLATION = 2**0.2, 2**0.2, 1 / 8  # (Karras et al. 2022, table 6)
OBLIQUE = 0.5  # probability that stretching is along another direction than the axes, as in EDM's released code

# The least asymmetric orthogonal low-pass filter with six vanishing moments (Daubechies 1992, table 6.3: "sym6")
LOW_PASS = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)


def augment(x0: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image flipped, scaled, turned, stretched and moved at random, and what was done to it.

    Half of the images are mirrored, always; each other transformation happens with `probability`.

    Args:
        x0: (B, C, R, R) images in [−1, 1].
        probability: CIFAR-10 0.12, the 64×64 sets 0.15; 0 only mirrors.
        generator: on the CPU.

    Returns:
        The images, as x0, and their labels (B, 9) fp32 for `map_augment`: zeros for an image that is as it was.
    """
    forward, labels = _generate(len(x0), probability, generator)
    return transform(x0, forward.to(x0.device)), labels.to(x0.device)


def _generate(n: int, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random transformations of n images (n, 3, 3), in units of half an image's side, and their labels (n, 9)."""

    def uniform() -> Tensor:
        return draws.rand((n,), generator)

    def enabled(value: Tensor) -> Tensor:
        return value * (uniform() < probability)

    def normal() -> Tensor:
        return draws.randn((n,), generator)

    # a0 … a7 of Karras et al. 2022, table 6. Angles count against the image's y axis, which points down.
    a0 = (uniform() < 0.5).float()
    a1 = enabled((uniform() < 0.5).float())
    a2 = enabled(normal())
    a3 = enabled((2 * uniform() - 1) * math.pi)
    a4, a5 = (2 * uniform() - 1) * math.pi * (uniform() < OBLIQUE), enabled(normal())
    moved = uniform() < probability
    a6, a7 = normal() * moved, normal() * moved

    steps = [
        _scaling(1 - 2 * a0, 1 - 2 * a1),
        _scaling(SCALE**a2, SCALE**a2),
        _rotation(-a3),
        _rotation(a4),
        _scaling(ANISOTROPY**a5, ANISOTROPY**-a5),
        _rotation(-a4),
        _translation(2 * TRANSLATION * a6, 2 * TRANSLATION * a7),
    ]
    forward = torch.eye(3).repeat(n, 1, 1)
    for step in steps:
        forward = step @ forward
    labels = [a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7]
    return forward, torch.stack(labels, dim=1)


def transform(x: Tensor, forward: Tensor) -> Tensor:
    """Images x (B, C, R, R) moved by `forward` (B, 3, 3), with mirrored surroundings.

    Coordinates are (x, y), zero in the middle, one at the edge. The identity gives back x: the filter that doubles
    the resolution before bilinear sampling, and the one that halves it after, are each other's inverse.
    """
    channels, side = x.shape[1], x.shape[-1]
    margin = side // 2
    f = torch.tensor(LOW_PASS, device=x.device)
    kernel = f.outer(f)[None, None].repeat(channels, 1, 1, 1)
    padding = len(LOW_PASS) // 2 - 1
    padded = F.pad(x, (margin,) * 4, mode="reflect")
    large = F.conv_transpose2d(padded, 2 * kernel, stride=2, padding=padding, groups=channels)

    # From our coordinates to grid_sample's: they are one at the edge of what is padded, and as the filter is
    # not quite symmetric, everything in `large` is a little beside its place.
    ratio = side / padded.shape[-1]
    centre = float((f * torch.arange(len(f), device=x.device)).sum() / f.sum())
    shift = (centre - (len(f) - 1) / 2) / padded.shape[-1]
    place = torch.tensor([[ratio, 0.0, shift], [0.0, ratio, shift], [0.0, 0.0, 1.0]], device=x.device)
    inverse = place @ torch.linalg.inv(forward) @ torch.linalg.inv(place)
    grid = F.affine_grid(inverse[:, :2], list(large.shape), align_corners=False)
    moved = F.grid_sample(large, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    small = F.conv2d(moved, kernel / 2, stride=2, padding=padding, groups=channels)
    return small[..., margin : margin + side, margin : margin + side]


def _matrices(rows: list[list[Tensor | float]]) -> Tensor:
    n = max(len(v) for row in rows for v in row if isinstance(v, Tensor))
    return torch.stack([torch.stack([torch.as_tensor(v).expand(n) for v in row], 1) for row in rows], 1)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrices([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]])


def _rotation(angle: Tensor) -> Tensor:
    return _matrices([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0], [0.0, 0.0, 1.0]])


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrices([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])
