"""Metrics against closed forms, known answers, slow re-derivations and torchmetrics; the networks behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dmd2.evaluation.frechet import frechet_distance, moments
from dmd2.evaluation.metrics import (
    PATCH,
    ClipScore,
    Inception,
    SmallFeatures,
    centre_crop,
    inception_score,
    kernel_distance,
    prdc,
    resized,
)
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import sha256_file

ROOT = Path(__file__).resolve().parents[2]
CLASSIFIER = ROOT / "weights" / "cifar10-classifier.safetensors"


def normal(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def samples(n: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)


class StandIn(nn.Module):
    """Called as NVIDIA's Inception is: 2048 features, or probabilities (with `logits`: those) of 1008 classes."""

    def __init__(self, width: int = 2048, logits: bool = False) -> None:
        super().__init__()
        self.width, self.logits = width, logits
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("mix", torch.randn(3 * 8 * 8, width, generator=generator) / 50)
        self.register_buffer("head", torch.randn(width, 1008, generator=generator) / 20)

    def forward(
        self, img: Tensor, use_fp16: bool = False, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        x = F.interpolate(img.float() / 255 - 0.5, [8, 8], mode="bilinear", align_corners=False)
        features = torch.relu(x.flatten(1) @ self.mix)
        if return_features:
            return features
        assert no_output_bias
        answer = features @ self.head
        return answer if self.logits else answer.softmax(1)


def stand_in(path: Path, **options: Any) -> Path:
    torch.jit.script(StandIn(**options)).save(path)
    return path


# Fréchet distance


def test_moments_are_mean_and_covariance() -> None:
    x = normal(9000, 5, 0) * 3 + 100  # more than one block
    mean, covariance = moments(x)
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy().T), rtol=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        moments(x[:1])


def test_distance_of_a_set_to_itself_is_zero_and_of_gaussians_the_closed_form() -> None:
    x = normal(20_000, 6, 1)
    assert frechet_distance(*moments(x), *moments(x)) == pytest.approx(0, abs=1e-9)
    # Σ₂ = 4Σ₁ in every direction: ‖Δμ‖² + tr(Σ₁ + 4Σ₁ − 2·2Σ₁) = ‖Δμ‖² + tr Σ₁
    mean, covariance = moments(x)
    exact = 6 * 0.5**2 + float(covariance.trace())
    assert frechet_distance(*moments(x), *moments(2 * x - mean + 0.5)) == pytest.approx(exact, rel=1e-5)
    assert frechet_distance(*moments(normal(20_000, 6, 2)), mean, covariance) < 0.01


def test_distance_is_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    first, second = moments(normal(500, 16, 3)), moments(normal(400, 16, 4) * 1.3 + 0.2)
    assert frechet_distance(*first, *second) == pytest.approx(float(_compute_fid(*first, *second)), rel=1e-6)


# KID


def test_kid_is_unbiased() -> None:
    """Its mean over independent sets of one distribution is 0, and so some are below; biased MMD would be above."""
    found = [kernel_distance(normal(60, 8, seed), normal(50, 8, 1000 + seed))[0] for seed in range(24)]
    spread = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * spread and min(found) < 0 < max(found)
    assert kernel_distance(normal(60, 8, 0), normal(60, 8, 1) + 0.5)[0] > 10 * np.std(found)


def test_kid_is_its_definition_and_repeatable() -> None:
    real, fake = normal(30, 4, 0), normal(30, 4, 1) + 0.3  # one subset: everything
    state = torch.get_rng_state()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / 4 + 1) ** 3

    off = ~torch.eye(30, dtype=torch.bool)
    exact = kernel(real, real)[off].mean() + kernel(fake, fake)[off].mean() - 2 * kernel(real, fake).mean()
    mean, deviation = kernel_distance(real, fake)
    assert mean == pytest.approx(float(exact), rel=1e-4) and deviation < 1e-4
    large = normal(1200, 4, 2), normal(1100, 4, 3)
    assert kernel_distance(*large, seed=5) == kernel_distance(*large, seed=5) != kernel_distance(*large, seed=6)
    assert torch.equal(torch.get_rng_state(), state)


# Inception score


def test_inception_score_of_uniform_answers_is_one_and_of_perfect_ones_the_number_of_classes() -> None:
    assert inception_score(torch.zeros(100, 7).log_softmax(1)) == pytest.approx((1, 0))
    perfect = (1000 * torch.eye(7)).log_softmax(1).repeat(20, 1)
    assert inception_score(perfect) == pytest.approx((7, 0))
    one_class = (1000 * torch.eye(7)[:1]).log_softmax(1).repeat(50, 1)
    assert inception_score(one_class) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="at least 10"):
        inception_score(torch.zeros(9, 7))


# Precision, recall, density, coverage


def slow_prdc(real: Tensor, fake: Tensor, k: tuple[int, int]) -> dict[str, float]:
    """As in the papers, one pair of samples at a time, in float64."""
    r, f = real.double().numpy(), fake.double().numpy()

    def reach(x: Any, i: int, k: int) -> float:
        return float(sorted(float(np.linalg.norm(x[i] - x[j])) for j in range(len(x)) if j != i)[k - 1])

    d = [[float(np.linalg.norm(a - b)) for b in f] for a in r]
    real_p, real_d = ([reach(r, i, kk) for i in range(len(r))] for kk in k)
    fake_r = [reach(f, j, k[0]) for j in range(len(f))]
    n, m = range(len(r)), range(len(f))
    return {
        "precision": np.mean([any(d[i][j] <= real_p[i] for i in n) for j in m]),
        "recall": np.mean([any(d[i][j] <= fake_r[j] for j in m) for i in n]),
        "density": sum(d[i][j] < real_d[i] for i in n for j in m) / (k[1] * len(f)),
        "coverage": np.mean([min(d[i]) < real_d[i] for i in n]),
    }


def test_prdc_of_identical_and_of_far_sets() -> None:
    x = normal(600, 16, 0)  # more than one block of rows
    assert prdc(x, x.clone()) == dict.fromkeys(("precision", "recall", "density", "coverage"), 1.0)
    assert prdc(x, x + 100) == dict.fromkeys(("precision", "recall", "density", "coverage"), 0.0)


@pytest.mark.parametrize("k", [(3, 5), (4, 2)])
def test_prdc_is_its_definition(k: tuple[int, int]) -> None:
    real, fake = normal(60, 3, 1), normal(45, 3, 2) * 0.8 + 0.5
    assert prdc(real, fake, k) == pytest.approx(slow_prdc(real, fake, k))
    far = torch.full((3,), 300.0)  # a common offset costs no digits
    assert prdc(real + far, fake + far, k) == pytest.approx(slow_prdc(real, fake, k), abs=0.02)


def test_prdc_tells_what_is_lacking() -> None:
    """Fakes of one of two modes are precise, but recall and coverage are a half; the other way round likewise."""
    left, right = normal(400, 4, 3), normal(400, 4, 4) + 50
    lacking = prdc(torch.cat([left, right]), normal(400, 4, 5))
    assert lacking["precision"] > 0.85 and lacking["recall"] < 0.5 and lacking["coverage"] < 0.5
    straying = prdc(left, torch.cat([normal(400, 4, 6), right]))
    assert straying["precision"] < 0.5 and straying["recall"] > 0.85 and straying["coverage"] > 0.85
    with pytest.raises(ValueError, match="more than 5 samples, not 6 and 5"):
        prdc(left[:6], right[:5])


# Networks


def test_inception_is_called_as_nvidia_s(tmp_path: Path) -> None:
    path = stand_in(tmp_path / "inception.pt")
    inception, images = Inception(path), samples(4, 20)
    features, none = inception(images)
    assert none is None and features.shape == (4, 2048) and features.dtype == torch.float32
    torch.testing.assert_close(features, StandIn()(images, return_features=True))
    again, answers = inception(images, answers=True)
    assert answers is not None and torch.equal(again, features)
    torch.testing.assert_close(answers, StandIn()(images, no_output_bias=True).log())
    _, from_logits = Inception(stand_in(tmp_path / "logits.pt", logits=True))(images, answers=True)
    torch.testing.assert_close(from_logits, answers)
    assert inception.sha256 == sha256_file(path)


def test_another_inception_is_one_line(tmp_path: Path) -> None:
    def refused(path: Path, *words: str) -> None:
        with pytest.raises(UserError) as error:
            Inception(path)(samples(2, 8))
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in (str(path), *words))

    refused(tmp_path / "none.pt", "no such file", "scripts/download-metrics", "features small")
    (tmp_path / "text.pt").write_text("no TorchScript")
    refused(tmp_path / "text.pt", "not a TorchScript file")
    torch.jit.script(nn.Linear(3, 3)).save(tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "cannot be called with return_features")
    refused(stand_in(tmp_path / "narrow.pt", width=100), "(2, 100)", "(2, 2048)")


def test_the_committed_classifier_is_small_and_known() -> None:
    classifier = SmallFeatures(CLASSIFIER)
    assert CLASSIFIER.stat().st_size < 2_000_000
    assert (classifier.size, classifier.width, len(classifier.classes), classifier.classes[3]) == (32, 128, 10, "cat")
    images = samples(3, 32)
    features, answers = classifier(images, answers=True)
    assert features.shape == (3, 128) and answers is not None and answers.shape == (3, 10)
    torch.testing.assert_close(answers.exp().sum(1), torch.ones(3))
    alone, _ = classifier(images[1:2])
    torch.testing.assert_close(alone, features[1:2])
    with pytest.raises(UserError, match=r"32x32 pixels, not 16x16; resizing to 32"):
        classifier(samples(1, 16))


def test_clip_score_is_the_cosine(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    words = ["a</w>", "cat</w>", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*letters, *words]))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    end = vocabulary["<|endoftext|>"]
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = sizes | {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": end}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = CLIPImageProcessorPil(**size)
    processor.save_pretrained(tmp_path)

    prompts, images = ["a cat", "a dog " * 30], samples(2, 24)
    found = ClipScore(tmp_path)(images, prompts)
    pixels = processor([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], return_tensors="pt")
    with torch.no_grad():
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=12, return_tensors="pt")
        answer = model(**pixels, **tokens)
    cosine = answer.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(found, cosine, atol=1e-5, rtol=1e-4)
    assert found[0] != found[1]

    with pytest.raises(UserError, match=r"none: holds no CLIP model; scripts/download-metrics --clip"):
        ClipScore(tmp_path / "none")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(UserError, match="of the type 'bert'"):
        ClipScore(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged") as error:
        ClipScore(tmp_path)
    assert "\n" not in str(error.value)


# Images


def test_patches_are_the_middle_of_full_size_images() -> None:
    images = samples(2, 305)
    patch = centre_crop(images)
    assert patch.shape == (2, 3, PATCH, PATCH) and torch.equal(patch, images[:, :, 3:302, 3:302])
    assert torch.equal(centre_crop(images[:, :, 3:302, 3:302]), patch)
    with pytest.raises(UserError, match="305x298 pixels; expected at least 299x299"):
        centre_crop(images[:, :, :298])


def test_resizing_is_pillow_s_lanczos() -> None:
    images = samples(2, 30)
    expected = Image.fromarray(images[1].permute(1, 2, 0).numpy()).resize((12, 12), Image.Resampling.LANCZOS)
    assert np.array_equal(resized(images, 12)[1].permute(1, 2, 0).numpy(), np.array(expected))
    assert resized(images, 30) is images
