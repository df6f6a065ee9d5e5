"""The classifier of emoji images: it learns, is exported whole, and its training images are what they should be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmd2.emoji.scenes import EmojiScenes
from dmd2.emoji.scores import EmojiClassifier
from dmd2.training.loop import Batch, training_step
from dmd2.training.methods.classifier import EmojiClassifierRecipe, blur
from dmd2.training.recipes import RECIPES
from dmd2.training.sources import Inputs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def scenes() -> EmojiScenes:
    return EmojiScenes(ROOT / "weights" / "emoji" / "emoji.zip")


@pytest.fixture
def recipe() -> EmojiClassifierRecipe:
    """The named recipe with a small network."""
    named = RECIPES["emoji-classifier"]
    assert isinstance(named, EmojiClassifierRecipe)
    loop = replace(named.loop, iterations=100, batch_size=16, warmup=5)
    return replace(named, loop=loop, widths=(8, 16, 32, 32), features=32, lr=5e-3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_batch_is_learned_by_heart_and_exported(
    recipe: EmojiClassifierRecipe, scenes: EmojiScenes, tmp_path: Path
) -> None:
    method = recipe.method(Inputs({}, torch.device("cpu")))
    batch = method.data(0)
    images, *_ = batch
    assert torch.equal(images, method.data(0)[0]) and len(images) == 16
    first = last = {}
    for step in range(recipe.loop.iterations):
        last = training_step(method.phases, Batch(step, batch, generator(step)), recipe.loop)
        first = first or last
    assert float(first["emoji"]) > 5 and float(last["emoji"]) < 1
    assert float(last["top1"]) >= 0.9

    assert method.score and method.export
    model = method.ema_model
    assert isinstance(model, nn.Module) and model.training
    scores = method.score(None)
    assert set(scores) == {"top1", "background"} and all(0 <= value <= 1 for value in scores.values())
    assert model.training  # scoring borrows it

    method.export(None, tmp_path)
    classifier = EmojiClassifier.load(tmp_path / "classifier.safetensors")
    assert classifier.names == scenes.names and classifier.size == scenes.size
    model.eval()
    with torch.no_grad():
        expected, _ = model(images.float() / 127.5 - 1)
    found, background = classifier.answers(classifier.features(images))
    assert found.shape == (16, len(scenes)) and background.shape == (16, 9)
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())  # fp16 weights


def test_same_seed_builds_the_same_network(recipe: EmojiClassifierRecipe) -> None:
    first, second = (recipe.network(7).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["emoji.weight"].shape == (7, recipe.features)


def test_a_lesson_is_a_batch_of_scenes_of_every_pair(recipe: EmojiClassifierRecipe, scenes: EmojiScenes) -> None:
    images, emoji, background = recipe.method(Inputs({}, torch.device("cpu"))).data(0)
    batch = scenes.batch(16, seed=recipe.loop.seed, step=0, split="every")
    assert torch.equal(images, batch.images)
    assert torch.equal(emoji, batch.emoji) and torch.equal(background, batch.background)


def test_named_recipe_fits_two_megabytes_in_fp16(scenes: EmojiScenes) -> None:
    named = RECIPES["emoji-classifier"]
    assert isinstance(named, EmojiClassifierRecipe)
    count = sum(parameter.numel() for parameter in named.network(len(scenes)).parameters())
    assert 700_000 <= count <= 900_000


def test_blur_is_a_gaussian_of_the_asked_width() -> None:
    impulse = torch.zeros(3, 1, 15, 15)
    impulse[:, :, 7, 7] = 1
    found = blur(impulse, torch.tensor([0.0, 0.8, 1.2]).view(3, 1, 1, 1))
    assert torch.allclose(found[0], impulse[0])
    offsets = torch.arange(15.0) - 7
    for image, sigma in ((found[1, 0], 0.8), (found[2, 0], 1.2)):
        assert float(image.sum()) == pytest.approx(1, abs=1e-5)
        assert torch.allclose(image, image.T)
        assert float((image.sum(0) * offsets**2).sum()) == pytest.approx(sigma**2, rel=0.05)
    flat = torch.full((2, 3, 8, 8), 0.3)
    assert torch.allclose(blur(flat, torch.ones(2, 1, 1, 1)), flat)  # borders too


def test_augmentation_is_mild_seeded_and_off_at_zero(recipe: EmojiClassifierRecipe) -> None:
    images = torch.randint(256, (8, 3, 16, 16), generator=generator(0)).byte()
    off = replace(recipe, contrast=0.0, brightness=0.0, noise=0.0, blur_pixels=0.0)
    assert torch.allclose(off.see(images, generator(1)), images.float() / 127.5 - 1, atol=1e-6)
    once: Tensor = recipe.see(images, generator(1))
    assert torch.equal(once, recipe.see(images, generator(1)))
    assert not torch.equal(once, recipe.see(images, generator(2)))
    smooth = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    assert float(recipe.see(smooth, generator(3)).std()) < recipe.noise + recipe.brightness
