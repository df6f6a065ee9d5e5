"""Whether an image shows its emoji well: how like it is to the nearest scene that could be composed of that emoji.

A classifier cannot say so. It names an owl by its colours, however melted its face is; one that had learned to reject
spoiled scenes (blurred, bent, mixed, halves) named two of three generated smears all the same. But the emoji are
known: so the scene of the asked one that is nearest to the image is looked for, over size, angle, place, mirror image
and colour of the ground, and the two are compared by their edges. Nothing is learned, so nothing can be tuned to it.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.emoji.scenes import EmojiScenes

SIDE = 32
"""pixels at which images are compared: shapes and parts, not the last sharpness of an edge"""
GOOD = 0.44
"""from this likeness on an image passes. Chosen by 60 images that were rated by eye, and tried on 60 more
(tests/emoji/rated.json)"""

STEPS = 50
AWAY = 0.12  # where the search begins: in the middle and this far from it in each diagonal direction
CHUNK = 32  # images at once


def likeness(images: Tensor, emoji: Tensor, scenes: EmojiScenes) -> Tensor:
    """How well images show the emoji that were asked for.

    It is ⟨a, b⟩ / max(|a|², |b|²) of the gradients a and b, in all three colours, of the image and of the nearest
    scene, both brought to 32×32 pixels. Edges elsewhere lessen it, and so do soft edges, and edges that are too many.

    Args:
        images: uint8 (B, 3, S, S), S ≥ 32; what else the caption says, such as a background, is not looked at.
        emoji: int64 (B,), an index into `scenes.names`.
        scenes: what the emoji look like, and how freely they are composed.

    Returns:
        float (B,) in [−1, 1], on the CPU; each depends on its own image alone.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SIDE:
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"expected images, uint8 (B, 3, S, S) with S ≥ {SIDE}, not {found}")
    if not len(images):
        return torch.empty(0)
    glyphs = scenes.glyphs(SIDE * 3 // 2)
    parts = [
        _of_chunk(F.interpolate(part.cpu().float(), size=(SIDE, SIDE), mode="area"), glyphs[number.cpu()], scenes)
        for part, number in zip(images.split(CHUNK), emoji.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def _of_chunk(images: Tensor, glyphs: Tensor, scenes: EmojiScenes) -> Tensor:
    """Adam from several beginnings for each image, all at once; its steps are each number's own."""
    n, smallest = len(images), scenes.scale[0]
    places = [(0.0, 0.0), *itertools.product((-AWAY, AWAY), repeat=2)]
    mirrors = (1.0, -1.0) if scenes.mirrored else (1.0,)
    begun = torch.tensor([(smallest, 0.0, x, y, mirror) for mirror in mirrors for x, y in places])
    begun[:, 0] += torch.where(begun[:, 2] == 0, 0.5 * (scenes.scale[1] - smallest), 0.0)
    tries = len(begun)
    begun = begun.repeat(n, 1)
    pose, mirrored = begun[:, :4].clone().requires_grad_(), begun[:, 4]
    ground = _border(images).repeat_interleave(tries, 0).requires_grad_()
    glyphs, wanted = glyphs.repeat_interleave(tries, 0), images.repeat_interleave(tries, 0)
    most_turned = math.radians(scenes.rotation_degrees + 5)
    blurred = {taps: _blurred(wanted, taps) for taps in (4, 1)}
    optimizer = torch.optim.Adam([{"params": [pose], "lr": 0.02}, {"params": [ground], "lr": 2.0}], betas=(0.8, 0.95))
    for step in range(STEPS):
        taps = 4 if step < STEPS // 2 else 1  # by broad shapes first
        drawn = _drawn(glyphs, pose, mirrored, ground)
        error = ((_blurred(drawn, taps) - blurred[taps]) / 128).square().mean((1, 2, 3))
        optimizer.zero_grad()
        error.sum().backward()
        if step == STEPS * 7 // 10:
            for group in optimizer.param_groups:
                group["lr"] *= 0.3
        optimizer.step()
        with torch.no_grad():
            pose[:, 0].clamp_(0.75 * smallest, 1.1 * scenes.scale[1])
            pose[:, 1].clamp_(-most_turned, most_turned)
    with torch.no_grad():
        return _agreement(_drawn(glyphs, pose, mirrored, ground), wanted).view(n, tries).max(1).values


def _drawn(glyphs: Tensor, pose: Tensor, mirrored: Tensor, ground: Tensor) -> Tensor:
    """(B, 3, SIDE, SIDE): glyphs in a pose (B, 4) (scale, angle, x, y; see `EmojiScenes`) on a ground (B, 3)."""
    scale, angle, x, y = pose.unbind(1)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    inverse = torch.stack([mirrored * cos, mirrored * sin, -sin, cos], dim=1).view(-1, 2, 2)
    shift = -inverse @ torch.stack([x, y], dim=1)[:, :, None]
    grid = F.affine_grid(torch.cat([inverse, shift], dim=2), [len(glyphs), 4, SIDE, SIDE], align_corners=False)
    shown = F.grid_sample(glyphs, grid, mode="bilinear", align_corners=False)
    return shown[:, :3] + ground[:, :, None, None] * (1 - shown[:, 3:] / 255)


def _border(images: Tensor) -> Tensor:
    """(B, 3): the median colour along the border."""
    rows, columns = images[:, :, [0, -1]], images[:, :, :, [0, -1]]
    return torch.cat([rows.flatten(2), columns.flatten(2)], dim=2).median(2).values


def _blurred(images: Tensor, times: int) -> Tensor:
    """By (1 2 1)/4 along both sides, so often: a standard deviation of √(times / 2) pixels."""
    for _ in range(times):
        x = F.pad(images, (1, 1, 1, 1), mode="replicate")
        x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
        images = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return images


def _agreement(one: Tensor, other: Tensor) -> Tensor:
    """(B,): of the gradients along both sides; 0 where one of the images is flat."""
    a, b = (torch.cat([x.diff(dim=2)[..., :-1], x.diff(dim=3)[:, :, :-1]], dim=1).flatten(1) for x in (one, other))
    most = torch.maximum(a.square().sum(1), b.square().sum(1))
    return (a * b).sum(1) / most.clamp_min(1e-6)
