"""Images that show no emoji properly, made of ones that do: what the classifier learns to call none of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WAYS = 6


def smeared(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of these images (B ≥ 2, of different emoji) spoiled in one of `WAYS`, as weak generators spoil theirs.

    Blurred until no detail is left, bent out of shape, mixed with another image, half of it another's, patches of it
    another's, or a part of it gone.

    Args:
        images: float (B, 3, H, W) in any range.
        generator: on the CPU.

    Returns:
        Images of the same shape.
    """
    n, _, height, width = images.shape
    others = images.roll(1, 0)
    way = torch.randint(WAYS, (n,), generator=generator)
    u = torch.rand(n, 4, generator=generator)
    made = torch.stack(
        [
            _blurred(images, u),
            _bent(images, generator),
            _faded(images, others, u),
            torch.where(_half(height, width, u).to(images.device), images, others),
            torch.where(_patches(n, height, width, generator).to(images.device), images, others),
            _with_a_part_gone(images, u),
        ]
    )
    return made[way, torch.arange(n)]


def _blurred(images: Tensor, u: Tensor) -> Tensor:
    """To a tenth or a sixteenth of the side and back."""
    side = images.shape[-1]
    coarse = [F.interpolate(images, size=max(2, side // by), mode="area") for by in (10, 16)]
    small, smaller = (F.interpolate(part, size=images.shape[2:], mode="bicubic") for part in coarse)
    return torch.where((u[:, 0] < 0.5).to(images.device)[:, None, None, None], small, smaller)


def _bent(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every point moved by up to a seventh of the frame, neighbours alike: moves of 5×5 points, interpolated."""
    n = len(images)
    moves = 0.6 * (torch.rand(n, 2, 5, 5, generator=generator) - 0.5).to(images)
    moves = F.interpolate(moves, size=images.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).to(images).expand(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, still + moves, padding_mode="border", align_corners=False)


def _faded(images: Tensor, others: Tensor, u: Tensor) -> Tensor:
    share = (0.35 + 0.3 * u[:, 0]).to(images)[:, None, None, None]
    return share * images + (1 - share) * others


def _half(height: int, width: int, u: Tensor) -> Tensor:
    """bool (B, 1, H, W): one side of a line through the middle, at any angle."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    angle = (2 * torch.pi * u[:, 1])[:, None, None]
    return (x * torch.cos(angle) + y * torch.sin(angle) > 0)[:, None]


def _patches(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """bool (B, 1, H, W): half of 6×6 patches."""
    coarse = torch.rand(n, 1, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="nearest") > 0.5


def _with_a_part_gone(images: Tensor, u: Tensor) -> Tensor:
    """A third to a half of the frame, from one of its sides, painted in the colour of a corner opposite."""
    height, width = images.shape[2:]
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    sides = torch.stack([x, 1 - x, y, 1 - y])[(4 * u[:, 2]).long().clamp(max=3)]
    gone = (sides < (0.4 + 0.2 * u[:, 3])[:, None, None])[:, None].to(images.device)
    ground = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(2).values[:, :, None, None]
    return torch.where(gone, ground, images)
