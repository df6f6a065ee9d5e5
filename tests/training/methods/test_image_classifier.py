"""The judge of CIFAR-10: what its training sees, that it learns, and its file."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dmd2.data.images import ImageSet
from dmd2.evaluation.metrics import SmallFeatures
from dmd2.runtime.errors import UserError
from dmd2.training.loop import LoopSettings, train
from dmd2.training.methods.classifier import CROP, ImageClassifierRecipe, flip_and_crop
from dmd2.training.recipes import RECIPES

CPU = torch.device("cpu")
RECIPE = ImageClassifierRecipe(
    loop=LoopSettings(iterations=30, batch_size=16, warmup=2, sample_every=30, ema_decay=0.8),
    lr=0.1,
    weight_decay=0.0,
    widths=(8, 8, 16),
    features=8,
    held_out=20,
    classes=("red", "blue"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images of noise, reddish or bluish."""
    path = tmp_path_factory.mktemp("data") / "set.zip"
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        labels = []
        for i in range(200):
            pixels = generator.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            pixels[..., 0 if i % 2 == 0 else 2] += 50
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            archive.writestr(f"{i:03d}.png", content.getvalue())
            labels.append([f"{i:03d}.png", i % 2])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_images_are_flipped_and_shifted() -> None:
    """Every result is the image or its mirror image, moved by whole pixels, with reflected edges."""
    image = torch.arange(3 * 12 * 12).reshape(3, 12, 12).remainder(251).byte()
    found = flip_and_crop(image.expand(64, -1, -1, -1), torch.Generator().manual_seed(0))
    expected = set()
    for mirrored in (image, image.flip(2)):
        padded = np.pad(mirrored.numpy(), ((0, 0), (CROP, CROP), (CROP, CROP)), mode="reflect")
        for top in range(2 * CROP + 1):
            for left in range(2 * CROP + 1):
                expected.add(padded[:, top : top + 12, left : left + 12].tobytes())
    kinds = {one.contiguous().numpy().tobytes() for one in found}
    assert found.shape == (64, 3, 12, 12) and found.dtype == torch.uint8
    assert kinds <= expected and len(kinds) > 40


def test_it_learns_and_its_file_says_all(data: Path, tmp_path: Path) -> None:
    images = ImageSet(data)
    method = RECIPE.of(images, CPU)
    assert train(method, RECIPE.loop, tmp_path)
    scores = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert scores[-1]["score/held_out_accuracy"] > 0.9
    path = tmp_path / "classifier.safetensors"
    loaded = SmallFeatures(path)
    assert (loaded.classes, loaded.size) == (["red", "blue"], 16)
    assert all(t.dtype == torch.float16 for t in load_file(path).values() if t.is_floating_point())
    assert not loaded.net.training and not any(p.requires_grad for p in loaded.net.parameters())
    x = images.images(torch.arange(200)).float() / 127.5 - 1
    labels = images.labels
    assert labels is not None
    assert (loaded.net(x).argmax(1) == labels).float().mean() > 0.9
    assert loaded.net.features(x).shape == (200, 8) and (loaded.net.features(x) >= 0).all()


def test_held_out_images_are_never_trained_on_and_epochs_differ(data: Path) -> None:
    method = RECIPE.of(ImageSet(data), CPU)
    epoch = 180 // 16
    first = torch.cat([method.data(step)[0] for step in range(epoch)])
    second = torch.cat([method.data(step)[0] for step in range(epoch, 2 * epoch)])
    assert len(first.flatten(1).unique(dim=0)) == len(first) == 16 * epoch  # each image once
    assert not torch.equal(first, second)
    every = torch.cat([method.data(step)[0] for step in range(40 * epoch)]).flatten(1).unique(dim=0)
    assert len(every) == 180
    assert torch.equal(method.data(7)[0], RECIPE.of(ImageSet(data), CPU).data(7)[0])


def test_data_that_does_not_fit_is_one_line(data: Path, tmp_path: Path) -> None:
    def refused(recipe: ImageClassifierRecipe, path: Path, words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            recipe.of(ImageSet(path), CPU)
        assert "\n" not in str(error.value)

    refused(replace(RECIPE, held_out=190), data, "200 images; this recipe needs at least 206")
    refused(replace(RECIPE, classes=("one",)), data, "labels 0 to 1; this recipe knows 0 to 0")
    with zipfile.ZipFile(data) as archive:
        archive.extract("000.png", tmp_path)
    refused(RECIPE, tmp_path, "has no labels")


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            SmallFeatures(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    refused(tmp_path / "none.safetensors", "not a readable image classifier")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"format": "pt"})
    refused(tmp_path / "other.safetensors", "not an image classifier")
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors", {"format": "dmd2 image classifier 1"})
    refused(tmp_path / "no.safetensors", "not a readable image classifier")


def test_the_recipe_is_of_cifar10_s_classes() -> None:
    recipe = RECIPES["cifar10-classifier"]
    assert isinstance(recipe, ImageClassifierRecipe) and len(recipe.classes) == 10
