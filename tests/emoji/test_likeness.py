"""Likeness: high for scenes however they are composed, low for what is no such emoji, and as the eye rates images.

rated.png holds 120 images of the embedded model of 27 November 2026, twelve in a row, in rated.json's order: captions
by chance, by the teacher in 25 steps and in one, by the students in four and in one. They were rated by eye,
beside the emoji, not knowing which was which: "right" (sharp enough and right at once), "so-so", "smear" (melted,
half drawn, without its parts, or another emoji). The first 60 chose how much is
good enough, the second 60 tried it; the formula was chosen with all 120 in sight.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmd2.emoji.likeness import GOOD, likeness
from dmd2.emoji.scenes import EmojiScenes

HERE = Path(__file__).parent
ZIP = HERE.parents[1] / "weights" / "emoji" / "emoji.zip"


@pytest.fixture(scope="module")
def scenes() -> EmojiScenes:
    return EmojiScenes(ZIP)


@pytest.fixture(scope="module")
def rated(scenes: EmojiScenes) -> dict[str, dict[str, Tensor]]:
    """Set → rating → likeness."""
    rows = json.loads((HERE / "rated.json").read_text())
    with Image.open(HERE / "rated.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGB")))
    images = pixels.unflatten(1, (12, 64)).unflatten(0, (10, 64)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    emoji = torch.tensor([scenes.names.index(row["emoji"]) for row in rows])
    found: dict[str, dict[str, list[float]]] = {"chosen": defaultdict(list), "tried": defaultdict(list)}
    for row, value in zip(rows, likeness(images, emoji, scenes).tolist(), strict=True):
        found[row["set"]][row["rating"]].append(value)
    return {part: {rating: torch.tensor(values) for rating, values in by.items()} for part, by in found.items()}


@pytest.mark.parametrize("part", ["chosen", "tried"])
def test_it_agrees_with_the_eye(rated: dict[str, dict[str, Tensor]], part: str) -> None:
    right, middling, smears = (rated[part][rating] for rating in ("right", "so-so", "smear"))
    assert len(right) + len(middling) + len(smears) == 60 and min(len(right), len(smears)) >= 15
    assert (right[:, None] > smears).float().mean() >= 0.92, "of one of each, the right one is more alike"
    assert right.mean() > middling.mean() > smears.mean()
    assert (right >= GOOD).float().mean() >= 0.8 and (smears >= GOOD).float().mean() <= 0.3


def test_scenes_are_alike_whatever_their_size_place_and_ground(scenes: EmojiScenes) -> None:
    batch = scenes.batch(48, seed=11, step=0, split="every")
    alike = likeness(batch.images, batch.emoji, scenes)
    assert alike.shape == (48,) and alike.dtype == torch.float32
    assert alike.mean() > 0.9 and alike.min() > 0.8 and alike.max() <= 1.0001
    larger = EmojiScenes(ZIP, 128).batch(16, seed=11, step=0, split="every")
    assert likeness(larger.images, larger.emoji, scenes).mean() > 0.9, "at any size"


def test_mirror_images_are_alike_where_scenes_are_mirrored(
    scenes: EmojiScenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    camel = torch.tensor([scenes.names.index("camel")])
    image = scenes.captioned(camel, torch.tensor([0]), seed=3, plain=True).images
    assert likeness(image.flip(3), camel, scenes) < GOOD < 0.8 < likeness(image, camel, scenes)
    monkeypatch.setattr(scenes, "mirrored", True)
    assert likeness(image.flip(3), camel, scenes) > 0.8


def test_what_is_no_such_emoji_is_not_alike(scenes: EmojiScenes) -> None:
    batch = scenes.batch(48, seed=12, step=0, split="all")
    other = (batch.emoji + 7) % len(scenes)
    assert likeness(batch.images, other, scenes).quantile(0.9) < GOOD
    flat = torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)
    noise = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = likeness(torch.cat([flat, noise]), batch.emoji[:4], scenes)
    assert found.isfinite().all() and found.max() < 0.3
    halves = batch.images.clone()
    middle = scenes.size // 2
    halves[..., :middle] = halves.roll(1, 0)[..., :middle]
    assert likeness(halves, batch.emoji, scenes).mean() < GOOD, "half of it another's"


def test_more_blur_is_less_alike(scenes: EmojiScenes) -> None:
    batch = scenes.batch(32, seed=13, step=0, split="all")
    means = []
    for side in (64, 24, 16, 8):
        small = torch.nn.functional.interpolate(batch.images.float(), size=(side, side), mode="area")
        back = torch.nn.functional.interpolate(small, size=(64, 64), mode="bilinear")
        means.append(float(likeness(back.round().to(torch.uint8), batch.emoji, scenes).mean()))
    assert means == sorted(means, reverse=True) and means[0] > 0.9 and means[-1] < GOOD, means


def test_each_image_is_judged_alone(scenes: EmojiScenes) -> None:
    batch = scenes.batch(40, seed=14, step=0, split="all")
    together = likeness(batch.images, batch.emoji, scenes)
    alone = likeness(batch.images[35:37], batch.emoji[35:37], scenes)
    assert torch.allclose(together[35:37], alone, atol=0.01)
    assert likeness(batch.images[:0], batch.emoji[:0], scenes).shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 64, 64),
        torch.zeros(1, 1, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 3, 16, 64, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(scenes: EmojiScenes, images: Tensor) -> None:
    with pytest.raises(ValueError, match="expected images, uint8"):
        likeness(images, torch.tensor([0]), scenes)
