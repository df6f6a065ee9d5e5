"""Grids of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dmd2.training.preview
from dmd2.data.cifar10 import CLASSES as CIFAR10
from dmd2.data.images import ImageSet
from dmd2.models.edm.family import EdmFamily
from dmd2.models.edm.network import EdmConfig
from dmd2.runtime.errors import UserError
from dmd2.training.preview import QUICK_N, ClassScore, RowsPreview, TextScore, tile
from dmd2.training.recipes import build_method, resolve
from tests.training.pixels import CONFIG, write_set


class Brightness:
    """In a small classifier's place: tells dark images (class 0) from bright ones (class 1) of 8×8 pixels."""

    size = 8
    classes = ("dark", "bright")

    def __init__(self, path: Path, device: Any) -> None:
        self.path = path

    def __call__(self, images: Tensor, *, answers: bool = False) -> tuple[Tensor, Tensor | None]:
        means = images.float().mean((2, 3)) / 127.5 - 1
        return means, torch.stack([-means.sum(1), means.sum(1)], dim=1)


def test_images_lie_row_by_row_and_missing_ones_are_white() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 4)
    grid = tile(images, columns=3)
    assert grid.shape == (3, 4, 12)
    assert [int(grid[0, 0, 4 * column]) for column in range(3)] == [0, 1, 2]
    assert [int(grid[0, 2, 4 * column]) for column in range(3)] == [3, 4, 255]


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmd2.training.preview, "SmallFeatures", Brightness)


def test_a_class_conditional_student_is_scored_by_a_classifier(
    brightness: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ImageSet(write_set(tmp_path / "set.zip", 2 * QUICK_N), 8, 2)
    score = ClassScore.find(Path("judge"), family(), images, "cpu")
    assert score is not None
    levels = torch.tensor([30, 220], dtype=torch.uint8)

    def right(labels: Tensor, seeds: list[int]) -> Tensor:
        assert labels.bincount().tolist() == [QUICK_N / 2] * 2 and seeds == list(range(QUICK_N))
        return levels[labels][:, None, None, None].expand(-1, 3, 8, 8).contiguous()

    scores = score.score(right)
    assert scores["accuracy"] == 1 and scores["fd_small"] >= 0
    assert score.score(lambda labels, seeds: 255 - right(labels, seeds))["accuracy"] == 0
    assert score.score(lambda labels, seeds: 255 * (right(labels, seeds) > 128))["fd_small"] > scores["fd_small"]
    assert capsys.readouterr().out.count(f"scores here are of {QUICK_N} images") == 1


def family(config: EdmConfig = CONFIG, names: Sequence[str] = ("dark", "bright")) -> EdmFamily:
    return EdmFamily.new(config, "tiny", names, torch.device("cpu"), "fp32")


def test_a_classifier_of_other_images_is_refused_and_none_is_guessed(brightness: None) -> None:
    assert ClassScore.find(None, family(), None, "cpu") is None
    larger = EdmConfig.model_validate(CONFIG.model_dump() | {"resolution": 32, "classes": 10})
    with pytest.raises(UserError, match="classifier judge: knows 2 classes at 8x8 pixels; expected 10 at 32x32"):
        ClassScore.find(Path("judge"), family(larger, CIFAR10), None, "cpu")


def test_cifar10_s_classifier_is_at_hand() -> None:
    config = EdmConfig.model_validate(CONFIG.model_dump() | {"resolution": 32, "classes": 10})
    score = ClassScore.find(None, family(config, CIFAR10), None, "cpu")
    assert score is not None and score.network.classes == list(CIFAR10)
    scores = score.score(lambda labels, seeds: torch.zeros(QUICK_N, 3, 32, 32, dtype=torch.uint8))
    assert scores.keys() == {"accuracy"} and scores["accuracy"] < 0.2  # one and the same image


class Length:
    """In CLIP's place: an image is the nearer to its prompt the more its brightness is the prompt's length."""

    def __init__(self, folder: Path, device: Any) -> None:
        assert folder.name == "clip"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 1 - (images.float().mean((1, 2, 3)) - torch.tensor([float(len(p)) for p in prompts])).abs() / 255


class Corner:
    """In Inception's place: an image's first three colours."""

    def __init__(self, path: Path, device: Any) -> None:
        assert path.name == "inception.pt"

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        assert images.shape[2:] == (299, 299)
        return images[:, :, 0, 0].float(), None


@pytest.fixture
def _judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmd2.training.preview, "ClipScore", Length)
    monkeypatch.setattr(dmd2.training.preview, "Inception", Corner)


@pytest.mark.usefixtures("_judges")
def test_images_of_prompts_are_scored_by_their_prompts_and_real_images() -> None:
    prompts = ["a" * n for n in range(1, 21)]
    pixels = torch.randint(256, (20, 3, 320, 300), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen: list[tuple[list[str], list[int]]] = []

    def bright(texts: Any, seeds: list[int]) -> Tensor:
        seen.append((texts, seeds))
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.uint8)
        return lengths[:, None, None, None].expand(-1, 3, 320, 300).clone()

    score = TextScore(prompts, Path("clip"), Path("inception.pt"), lambda rows: pixels[rows], 20, torch.device("cpu"))
    found = score.score(bright)
    assert found["clip_score"] == pytest.approx(1) and set(found) == {"clip_score", "patch_fid"}
    assert [t for texts, _ in seen for t in texts] == prompts and [i for _, s in seen for i in s] == list(range(20))
    # What is generated are the real images themselves: in any order their distance is none.
    same = score.score(lambda texts, seeds: pixels[seeds])
    assert same["patch_fid"] == pytest.approx(0, abs=1e-3) and found["patch_fid"] > 1 and same["clip_score"] < 1
    alone = TextScore(prompts, Path("clip"), None, lambda rows: pixels, 0, torch.device("cpu"))
    assert set(alone.score(bright)) == {"clip_score"}
    assert RowsPreview(prompts, judge=alone).scores and not RowsPreview(prompts).scores


def test_a_score_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"inception: patch-FID compares at least two .* 1 images and 2 prompts"):
        TextScore(["a", "b"], None, Path("inception.pt"), lambda rows: torch.zeros(1), 1, cpu)
    with pytest.raises(UserError, match=r"clip .*: scores images of prompts, not of data=emoji"):
        build_method(resolve("emoji-dmd2-1step", []), {"clip": tmp_path}, cpu)
    with pytest.raises(UserError, match=r"clip .*none: no such file or folder; scripts/download-metrics"):
        build_method(resolve("sd15-dmd2", []), {"clip": tmp_path / "none"}, cpu)
