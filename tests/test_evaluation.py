"""Fréchet distance against closed forms and scipy; the scores of the emoji model on draws whose scores are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor

from dmd2.errors import UserError
from dmd2.evaluation import (
    EmojiJudge,
    RealScenes,
    frechet_distance,
    frechet_distance_of,
    quick_score,
    score_emoji,
)
from dmd2.training.data import BACKGROUNDS, EmojiScenes

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights" / "emoji"


@pytest.fixture(scope="module")
def scenes() -> EmojiScenes:
    return EmojiScenes(WEIGHTS / "emoji.zip")


@pytest.fixture(scope="module")
def judge() -> EmojiJudge:
    return EmojiJudge.load(WEIGHTS / "classifier.safetensors")


def covariance(features: int, rank: int, seed: int) -> Tensor:
    a = torch.randn(features, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / rank


def test_frechet_distance_of_one_dimension_is_closed_form() -> None:
    # (m1 - m2)² + (s1 - s2)²
    found = frechet_distance(*(torch.tensor(v) for v in ([1.0], [[4.0]], [-2.0], [[0.25]])))
    assert found == pytest.approx(3.0**2 + 1.5**2, rel=1e-12)


def test_frechet_distance_of_commuting_covariances_is_closed_form() -> None:
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())
    first = torch.tensor([9.0, 4.0, 1.0, 1e-6, 0.0, 2.0]).double()
    second = torch.tensor([1.0, 4.0, 0.0, 1e-2, 0.0, 3.0]).double()
    mean = torch.zeros(6)
    found = frechet_distance(mean, turn @ first.diag() @ turn.T, mean + 0.5, turn @ second.diag() @ turn.T)
    assert found == pytest.approx(float(6 * 0.25 + (first.sqrt() - second.sqrt()).square().sum()), rel=1e-6)


@pytest.mark.parametrize("rank", [3, 16])
def test_frechet_distance_is_zero_between_equals_and_symmetric(rank: int) -> None:
    mean, first, second = torch.ones(16), covariance(16, rank, 1), covariance(16, 16, 2)
    assert frechet_distance(mean, first, mean, first) == pytest.approx(0, abs=1e-10)
    there = frechet_distance(mean, first, -mean, second)
    assert there == pytest.approx(frechet_distance(-mean, second, mean, first), rel=1e-9)


@pytest.mark.parametrize("rank", [4, 12])
def test_frechet_distance_agrees_with_scipy(rank: int) -> None:
    first, second = covariance(12, 12, 3), covariance(12, rank, 4)
    means = torch.randn(2, 12, generator=torch.Generator().manual_seed(5)).double()
    root = np.real(scipy.linalg.sqrtm(first.numpy() @ second.numpy()))
    expected = float((means[0] - means[1]).square().sum() + first.trace() + second.trace()) - 2 * root.trace()
    assert frechet_distance(means[0], first, means[1], second) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_features_fits_unbiased_moments() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(6))
    expected = frechet_distance(
        x.double().mean(0), torch.from_numpy(np.cov(x.double().numpy().T)), torch.zeros(3), torch.eye(3)
    )
    y = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * (3 / 4) ** 0.5  # mean 0, covariance 1
    assert frechet_distance_of(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_refuses_what_it_cannot_measure() -> None:
    one, eye = torch.zeros(2), torch.eye(2)
    with pytest.raises(ValueError, match=r"expected means \(2,\)"):
        frechet_distance(one, eye, torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(one, eye, one / 0, eye)
    with pytest.raises(ValueError, match="at least two samples"):
        frechet_distance_of(torch.zeros(1, 2), torch.zeros(5, 2))


def test_committed_classifier_is_small_and_knows_the_committed_scenes(scenes: EmojiScenes, judge: EmojiJudge) -> None:
    assert (WEIGHTS / "classifier.safetensors").stat().st_size < 2_000_000
    assert judge.names == scenes.names and judge.backgrounds == list(BACKGROUNDS)
    fresh = scenes.batch(200, seed=4321, step=0, split="all")
    emoji, background = judge.answers(judge.features(fresh.images))
    assert float((emoji.argmax(1) == fresh.emoji).float().mean()) >= 0.99
    assert float((background.argmax(1) == fresh.background).float().mean()) >= 0.99


def test_judge_refuses_other_files_and_other_pictures(judge: EmojiJudge, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        EmojiJudge.load(tmp_path / "missing.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable emoji classifier"):
        EmojiJudge.load(tmp_path / "damaged.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not an emoji classifier"):
        EmojiJudge.load(tmp_path / "other.safetensors")
    for images in (torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected pictures"):
            judge.features(images)


def test_real_scenes_answer_to_captions_and_depend_on_their_seed_alone(scenes: EmojiScenes) -> None:
    real = RealScenes(scenes)
    captions = ["a red apple on a blue background", "a red apple", "a fruit"]
    images = real(captions, [7, 8, 9])
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 64, 64)
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


def test_real_scenes_score_like_real_scenes(scenes: EmojiScenes, judge: EmojiJudge) -> None:
    batches: list[int] = []
    real = RealScenes(scenes)

    def draw(captions: list[str], seeds: list[int]) -> Tensor:
        batches.append(len(captions))
        return real(captions, seeds)

    scores = score_emoji(draw, scenes, judge, n=400, seed=1)
    assert sum(batches) == 400 + 200 and max(batches) <= 64
    for name in ("top1", "top5", "background"):
        share = scores[name]
        assert isinstance(share, dict) and set(share) == {"all", "seen", "held_out"}
        assert all(0.97 <= value <= 1 for value in share.values())
    assert scores["fd"] == pytest.approx(scores["fd_real"], rel=0.25)
    assert scores["diversity"] == pytest.approx(1, abs=0.1)


def test_draw_that_ignores_the_caption_is_found_out(scenes: EmojiScenes, judge: EmojiJudge) -> None:
    def draw(captions: list[str], seeds: list[int]) -> Tensor:
        return scenes.batch(len(captions), seed=seeds[0], step=0).images

    scores = quick_score(draw, scenes, judge, n=256)
    assert scores["top1"] <= 5 / len(scenes) + 0.02
    assert scores["background"] == pytest.approx(1 / len(BACKGROUNDS), abs=0.1)
    real = quick_score(RealScenes(scenes), scenes, judge, n=256)
    assert real["top1"] >= 0.97 and real["top1_held_out"] >= 0.97
    assert real["fd"] < scores["fd"]  # even though the pictures are real: the mix of emoji differs


def test_one_picture_for_all_captions_has_no_diversity(scenes: EmojiScenes, judge: EmojiJudge) -> None:
    def draw(captions: list[str], seeds: list[int]) -> Tensor:
        return torch.full((len(captions), 3, 64, 64), 128, dtype=torch.uint8)

    scores = score_emoji(draw, scenes, judge, n=64)
    assert scores["diversity"] == pytest.approx(0, abs=1e-3)
    floor, distance = scores["fd_real"], scores["fd"]
    assert isinstance(floor, float) and isinstance(distance, float) and distance > 3 * floor


def test_scores_are_reproducible_and_depend_on_the_seed(scenes: EmojiScenes, judge: EmojiJudge) -> None:
    real = RealScenes(scenes)
    assert quick_score(real, scenes, judge, n=16) == quick_score(real, scenes, judge, n=16)
    assert quick_score(real, scenes, judge, n=16) != quick_score(real, scenes, judge, n=16, seed=1)


def test_scoring_refuses_what_makes_no_sense(scenes: EmojiScenes, judge: EmojiJudge) -> None:
    real = RealScenes(scenes)
    with pytest.raises(ValueError, match="at least 4"):
        quick_score(real, scenes, judge, n=3)
    with pytest.raises(ValueError, match="expected 8 pictures"):
        quick_score(lambda captions, seeds: real(captions, seeds)[1:], scenes, judge, n=8)
    stranger = EmojiJudge(judge.model, judge.names[::-1], judge.backgrounds, judge.size)
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
