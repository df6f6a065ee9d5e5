"""The scores of the emoji model on draws whose scores are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmd2.emoji.scenes import BACKGROUNDS, EmojiScenes
from dmd2.emoji.scores import EmojiClassifier, RealScenes, quick_score, score_emoji
from dmd2.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights" / "emoji"


@pytest.fixture(scope="module")
def scenes() -> EmojiScenes:
    return EmojiScenes(WEIGHTS / "emoji.zip")


@pytest.fixture(scope="module")
def classifier() -> EmojiClassifier:
    return EmojiClassifier.load(WEIGHTS / "classifier.safetensors")


def test_committed_classifier_is_small_and_knows_the_committed_scenes(
    scenes: EmojiScenes, classifier: EmojiClassifier
) -> None:
    assert (WEIGHTS / "classifier.safetensors").stat().st_size < 2_000_000
    assert classifier.names == scenes.names and classifier.backgrounds == list(BACKGROUNDS)
    fresh = scenes.batch(200, seed=4321, step=0, split="all")
    emoji, background = classifier.answers(classifier.features(fresh.images))
    assert float((emoji.argmax(1) == fresh.emoji).float().mean()) >= 0.99
    assert float((background.argmax(1) == fresh.background).float().mean()) >= 0.99


def test_classifier_refuses_other_files_and_other_images(classifier: EmojiClassifier, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        EmojiClassifier.load(tmp_path / "missing.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable emoji classifier"):
        EmojiClassifier.load(tmp_path / "damaged.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not an emoji classifier"):
        EmojiClassifier.load(tmp_path / "other.safetensors")
    with safe_open(WEIGHTS / "classifier.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors", metadata)
    with pytest.raises(UserError, match=r"not a readable emoji classifier .*Missing key") as error:
        EmojiClassifier.load(tmp_path / "foreign.safetensors")
    assert "\n" not in str(error.value)
    sizes = (32, 32), (96, 96), (128, 64), (0, 0)
    for images in (torch.zeros(2, 3, 64, 64), *(torch.zeros(2, 3, *size, dtype=torch.uint8) for size in sizes)):
        with pytest.raises(ValueError, match="expected images"):
            classifier.features(images)


def test_larger_images_are_judged_by_their_averages(scenes: EmojiScenes, classifier: EmojiClassifier) -> None:
    images = EmojiScenes(WEIGHTS / "emoji.zip", 64).batch(4, seed=0, step=0).images
    twice = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(classifier.features(twice), classifier.features(images))


def test_real_scenes_answer_to_captions_and_depend_on_their_seed_alone(scenes: EmojiScenes) -> None:
    real = RealScenes(scenes)
    captions = ["a red apple on a blue background", "a red apple", "a fruit"]
    images = real(captions, [7, 8, 9])
    assert images.dtype == torch.uint8 and images.shape == (3, 3, scenes.size, scenes.size)
    assert torch.equal(real(captions[1:], [8, 9]), images[1:])
    assert not torch.equal(real(["a fruit"], [10]), images[2:])
    apple, fruit = scenes.names.index("red apple"), scenes.kinds[scenes.names.index("red apple")]
    assert {e for e, _ in real.pairs["a red apple"]} == {apple}
    assert {scenes.kinds[e] for e, _ in real.pairs["a fruit"]} == {fruit}
    for caption in captions[1:]:  # only a caption that leaves nothing open may mean a held-out pair
        assert not scenes.is_held_out(*torch.tensor(real.pairs[caption]).unbind(1)).any()
    assert len(real.pairs["a bird"]) > len(BACKGROUNDS)  # a name and a kind: it may mean either
    with pytest.raises(ValueError, match="a flying pig"):
        real(["a flying pig"], [0])


def test_real_scenes_score_like_real_scenes(scenes: EmojiScenes, classifier: EmojiClassifier) -> None:
    batches: list[int] = []
    real = RealScenes(scenes)

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        batches.append(len(captions))
        return real(captions, seeds)

    scores = score_emoji(generate, scenes, classifier, n=400, seed=1)
    assert sum(batches) == 400 + 200 and max(batches) <= 64
    assert scores["likeness"] > 0.9
    for name in ("top1", "top5", "right", "background"):
        share = scores[name]
        assert isinstance(share, dict) and set(share) == {"all", "seen", "held_out"}
        assert all(0.97 <= value <= 1 for value in share.values())
    assert scores["fd"] == pytest.approx(scores["fd_real"], rel=0.25)
    assert scores["precision"] > 0.7 and scores["recall"] > 0.7
    assert scores["diversity"] == pytest.approx(1, abs=0.1)


def test_generator_that_ignores_the_caption_is_found_out(scenes: EmojiScenes, classifier: EmojiClassifier) -> None:
    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        return scenes.batch(len(captions), seed=seeds[0], step=0).images

    scores = quick_score(generate, scenes, classifier, n=96)
    assert scores["top1"] <= 0.1
    assert scores["background"] == pytest.approx(1 / len(BACKGROUNDS), abs=0.1)
    real = quick_score(RealScenes(scenes), scenes, classifier, n=96)
    assert real["top1"] >= 0.97 and real["top1_held_out"] >= 0.97
    assert real["right"] >= 0.95 and scores["right"] <= scores["top1"]
    assert real["fd"] < scores["fd"]  # even though the images are real: the mix of emoji differs


def test_one_image_for_all_captions_has_no_diversity(scenes: EmojiScenes, classifier: EmojiClassifier) -> None:
    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        return torch.full((len(captions), 3, 64, 64), 128, dtype=torch.uint8)

    scores = score_emoji(generate, scenes, classifier, n=64)
    assert scores["diversity"] == pytest.approx(0, abs=1e-3)
    floor, distance = scores["fd_real"], scores["fd"]
    assert isinstance(floor, float) and isinstance(distance, float) and distance > 3 * floor


def test_scores_are_reproducible_and_depend_on_the_seed(scenes: EmojiScenes, classifier: EmojiClassifier) -> None:
    real = RealScenes(scenes)
    assert quick_score(real, scenes, classifier, n=16) == quick_score(real, scenes, classifier, n=16)
    assert quick_score(real, scenes, classifier, n=16) != quick_score(real, scenes, classifier, n=16, seed=1)


def test_scoring_refuses_what_makes_no_sense(scenes: EmojiScenes, classifier: EmojiClassifier) -> None:
    real = RealScenes(scenes)
    with pytest.raises(ValueError, match="at least 4"):
        quick_score(real, scenes, classifier, n=3)
    with pytest.raises(ValueError, match="expected 8 images"):
        quick_score(lambda captions, seeds: real(captions, seeds)[1:], scenes, classifier, n=8)
    stranger = EmojiClassifier(classifier.model, classifier.names[::-1], classifier.backgrounds, classifier.size)
    with pytest.raises(UserError, match="other emoji"):
        quick_score(real, scenes, stranger, n=8)


@pytest.mark.slow
def test_script_scores_real_scenes() -> None:
    command = [sys.executable, ROOT / "scripts" / "score-emoji", "--steps", "real", "-n", "32"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    figures = json.loads(done.stdout)
    assert figures["n"] == 32 and figures["seed"] == 0 and figures["top1"]["all"] >= 0.97
    assert figures["torch"] == torch.__version__ and figures["seconds"] > 0


@pytest.mark.slow
def test_script_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "score-emoji", "--weights", tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no such folder" in done.stderr
