"""EDM's training of a teacher: the loss against its definition, learning, augmentation, what is exported."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dmd2.data.images import ImageSet
from dmd2.models.edm.family import EdmFamily
from dmd2.models.edm.folder import load_edm
from dmd2.models.edm.network import ClassCondition, Edm, EdmNetwork
from dmd2.models.stable_diffusion.family import StableDiffusionFamily
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.paths import EMOJI
from dmd2.training.loop import Batch, LoopSettings, train, training_step
from dmd2.training.losses import denoising
from dmd2.training.methods.denoising import DenoisingRecipe
from dmd2.training.recipes import build_method, resolve
from dmd2.training.sources import Examples, Inputs
from dmd2.weights.manifest import read_manifest
from tests.training.pixels import CONFIG, same_weights, write_set
from tests.training.test_product import sd15

CPU = torch.device("cpu")
RECIPE = DenoisingRecipe(
    loop=LoopSettings(iterations=6, batch_size=8, sample_every=100),
    network="tiny",
    lr=2e-3,
    class_names=("dark", "bright"),
    precision="fp32",
)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    tiny = {"tiny": CONFIG, "tiny-augmented": CONFIG.model_copy(update={"augment_dim": 9})}
    monkeypatch.setattr("dmd2.training.methods.denoising.NETWORKS", tiny)
    monkeypatch.setattr("dmd2.models.edm.family.heun_steps", lambda config: 2)
    return ImageSet(write_set(tmp_path / "set.zip"), 8, 2)


def edm_loss(denoiser: Edm, x0: Tensor) -> Tensor:
    """As a teacher's training puts it together, of images without class."""
    generator = torch.Generator().manual_seed(0)
    family = EdmFamily(denoiser.network, "tiny", "none", (), torch.float32)
    sigma = family.sample_sigma(len(x0), generator)
    noise = torch.randn(x0.shape, generator=generator)
    return denoising(denoiser, x0, sigma, noise, family.condition(family.any_labels(len(x0))))[0]


def test_the_loss_is_edm_s() -> None:
    """For a network that answers with zeros, λ(σ)·x0² with ln σ ~ N(−1.2, 1.2²); its noisy input has that σ."""
    seen: list[Tensor] = []

    class Zeros(Edm):
        def features(self, x: Tensor, sigma: Tensor, cond: ClassCondition) -> tuple[Tensor, Tensor]:
            seen.extend([x, sigma])
            return torch.zeros_like(x), x

    loss = edm_loss(Zeros(EdmNetwork(CONFIG)), x0 := torch.full((20_000, 3, 1, 1), 0.3))
    x, sigma = seen
    assert abs(float(sigma.log().mean()) + 1.2) < 0.03 and abs(float(sigma.log().std()) - 1.2) < 0.03
    n = (x - x0) / sigma[:, None, None, None]
    assert abs(float(n.mean())) < 0.02 and abs(float(n.std()) - 1) < 0.02
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert torch.isclose(loss, (weight * 0.09).mean(), rtol=1e-5)


def test_a_new_network_s_loss_is_about_one_at_every_level() -> None:
    """Unit variance of what the raw network should say is what EDM's preconditioning is for (eq. 7 and 8)."""
    x0 = 0.5 * torch.randn(600, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    with torch.no_grad():
        loss = edm_loss(Edm(EdmNetwork(CONFIG)), x0)
    assert abs(float(loss) - 1) < 0.03


def one_step(method: Any, recipe: DenoisingRecipe) -> float:
    """On the same batch with the same noise, each time. Returns the loss before the step."""
    batch = Batch(0, method.data(0), torch.Generator().manual_seed(0))
    return float(training_step(method.phases, batch, recipe.loop)["denoising"])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_teacher_learns_with_either_optimizer(images: ImageSet, optimizer: Literal["adam", "muon"]) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, lr={"adam": 2e-3, "muon": 1e-2}[optimizer])
    method = recipe.method(Inputs({"data": images.path}, CPU))
    losses = [one_step(method, recipe) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_network_is_told_of_augmentation_in_training_but_never_in_samples(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, network="tiny-augmented", augment=0.5)
    method = recipe.method(Inputs({"data": images.path}, CPU))
    assert method.sample is not None
    told: list[Tensor | None] = []
    original = EdmNetwork.forward

    def forward(self: EdmNetwork, x: Any, sigma: Any, labels: Any, augment: Tensor | None = None) -> Any:
        told.append(augment)
        return original(self, x, sigma, labels, augment)

    monkeypatch.setattr(EdmNetwork, "forward", forward)
    one_step(method, recipe)
    assert told[0] is not None and told[0].shape == (8, 9) and told[0].any()
    told.clear()
    method.sample(None)
    assert told and all(augment is None for augment in told)
    assert "augment" in str(replace(RECIPE, augment=0.5).conflict()) and recipe.conflict() is None


def test_images_that_come_again_are_encoded_once(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, lessons=3, still_until=6, free_from=8)
    method = recipe.method(Inputs({"data": images.path}, CPU))
    encoded = []
    x0 = Examples.x0
    monkeypatch.setattr(Examples, "x0", lambda self, *args: encoded.append(1) or x0(self, *args))
    drawn = [method.data(step) for step in range(12)]
    # Three without freedom, one on the way, three with all of it.
    assert len(encoded) == 3 + 1 + 3 and not any(lesson.images is not None for lesson in drawn)
    for step in (0, 1, 2):
        assert torch.equal(drawn[step].latents, drawn[step + 3].latents)
        assert torch.equal(drawn[step].labels, drawn[step + 3].labels)
    assert torch.equal(drawn[8].latents, drawn[11].latents) and not torch.equal(drawn[8].latents, drawn[9].latents)
    family = EdmFamily.new(CONFIG, "tiny", (), CPU, "fp32")
    afresh = RECIPE.method(Inputs({"data": images.path}, CPU)).data(1).x0(family, CPU)
    again = drawn[1].x0(family, CPU)
    assert again.dtype == torch.float32 and torch.allclose(again, afresh, atol=1e-3)


@pytest.mark.parametrize("lessons", [0, 2])
def test_a_run_writes_a_teacher_and_resumes_bit_for_bit(images: ImageSet, tmp_path: Path, lessons: int) -> None:
    def run(out: Path, iterations: int, resume: bool = False) -> None:
        recipe = replace(RECIPE, lessons=lessons, loop=replace(RECIPE.loop, iterations=iterations, decay=False))
        method = build_method(recipe, {"data": images.path}, CPU)
        assert train(method, recipe.loop, out, resume=resume, recipe={"name": "tiny", **asdict(recipe)})

    run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    (tmp_path / "parts" / "model").rename(tmp_path / "half")
    run(tmp_path / "parts", 6, resume=True)
    run(tmp_path / "parts", 6, resume=True)  # finished: it is exported again
    assert "Trained from scratch" in (tmp_path / "parts" / "model" / "README.md").read_text()
    whole, parts = tmp_path / "whole" / "model", tmp_path / "parts" / "model"
    assert same_weights(whole, parts) and not same_weights(whole, tmp_path / "half")
    assert (tmp_path / "whole" / "samples" / "0000006.png").is_file()

    manifest = read_manifest(whole)
    assert manifest.teacher is not None and not manifest.students
    assert (manifest.teacher.subfolder, manifest.teacher.steps, manifest.teacher.guidance_scale) == (".", 2, 1.0)
    assert manifest.class_names == ["dark", "bright"] and manifest.native_size == (8, 8)
    denoiser = load_edm(whole, "cpu")
    x0 = denoiser(torch.zeros(2, 3, 8, 8), torch.ones(2), ClassCondition.of(torch.tensor([0, 1]), 2))
    assert x0.shape == (2, 3, 8, 8) and torch.isfinite(x0).all()
    json.loads((tmp_path / "whole" / "recipe.json").read_text())


def test_what_is_missing_is_said(images: ImageSet) -> None:
    with pytest.raises(UserError, match="data: missing"):
        build_method(RECIPE, {}, CPU)
    with pytest.raises(UserError, match="set network=small: expected one of"):
        resolve("cifar10-small-teacher", ["network=small"])


def test_a_warm_start_takes_the_words_with_the_weights(weights: Path, emoji_zip: Path) -> None:
    """The committed teacher knows other words than this data has: their numbers are its own."""
    recipe = resolve("emoji-teacher", ["warm_start=true", "compile=false", "lessons=0", "precision=fp32"])
    assert isinstance(recipe, DenoisingRecipe)
    family = recipe._family(Inputs({"data": EMOJI / "emoji.zip", "init": EMOJI}, CPU))
    before = StableDiffusionFamily.open(EMOJI, CPU, "fp32")
    assert family.name == before.name
    x, sigma, prompts = torch.randn(2, *before.shape), torch.tensor([3.0, 9.0]), ["an owl", "a slice of pizza"]
    with torch.no_grad():
        found = family.denoiser(family.trainable())(x, sigma, family.condition(prompts, family.trainable()))
        wanted = before.teacher(x, sigma, before.condition(prompts))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    with pytest.raises(InvalidInput, match="its unet has other tensors than that of network=emoji") as error:
        recipe._family(Inputs({"data": emoji_zip, "init": weights}, CPU))
    assert error.value.field == "init"


def test_a_warm_start_of_one_text_encoder_is_refused(
    text_models: tuple[Any, Any, Any], emoji_zip: Path, tmp_path: Path
) -> None:
    recipe = resolve("emoji-teacher", ["warm_start=true", "compile=false", "lessons=0", "precision=fp32"])
    assert isinstance(recipe, DenoisingRecipe)
    given = Inputs({"data": emoji_zip, "init": sd15(tmp_path / "sd15", text_models)}, CPU)
    with pytest.raises(InvalidInput, match="it has 1 text encoder; expected two, as network=emoji has") as error:
        recipe._family(given)
    assert error.value.field == "init"
