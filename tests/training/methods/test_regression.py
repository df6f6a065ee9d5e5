"""Regression on pairs, decoders for LPIPS, levels that fall, and runs that go on from others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.data.pairs import Pairs, make_pairs
from dmd2.models.family import open_family
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import shapes_alone
from dmd2.training.discriminators.head import HEAD_FILE
from dmd2.training.loop import Batch, training_step
from dmd2.training.methods.common import Recipe
from dmd2.training.methods.dmd import DmdRecipe
from dmd2.training.methods.regression import RegressionRecipe
from dmd2.training.preview import CaptionPreview
from dmd2.training.recipes import inputs_of, resolve
from dmd2.training.run.checkpoints import Checkpoints, read
from dmd2.training.sources import Inputs
from tests.training.pixels import write_set, write_teacher
from tests.training.test_product import CPU, LOOP, METHODS, PROMPTS, equal, run

TEXT: dict[str, Any] = {"data": "emoji", "sigmas": (), "timesteps": (999,), "precision": "fp32"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, weights: Path, emoji_zip: Path) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    make_pairs(weights, folder / "pairs", 4, 4, 4, CPU, prompts=PROMPTS, solver="euler-trailing", guidance_scale=2.0)
    paths = {"init": weights, "data": emoji_zip, "pairs": folder / "pairs", "classifier": folder / "none"}
    return Inputs(paths, CPU)


@pytest.fixture(autouse=True)
def _small_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CaptionPreview, "grid", lambda self, generate: generate(self.captions[:2], [0, 1])[0])


def made(method: str, **fields: Any) -> Any:
    recipe: Any = replace(METHODS[method], **TEXT, **fields)  # type: ignore[type-var]
    assert recipe.conflict() is None
    return recipe


def test_a_student_learns_the_pairs_and_dmd2_goes_on_with_it(inputs: Inputs, tmp_path: Path) -> None:
    recipe: Any = RegressionRecipe(LOOP, lr=1e-3, **TEXT)
    method, losses = recipe.method(inputs), []
    assert [phase.name for phase in method.phases] == ["generator"]
    for step in range(20):
        batch = Batch(step, method.data(step), torch.Generator().manual_seed(step))
        losses.append(float(training_step(method.phases, batch, replace(LOOP, decay=False))["generator"]))
    assert losses[-1] < 0.7 * losses[0]

    run(recipe, inputs, tmp_path / "first", 2)
    assert not (tmp_path / "first" / "fake_score").exists()
    onward = Inputs({**inputs.paths, "student": tmp_path / "first" / "model"}, CPU)
    next_one = made("dmd2", pretrained=True).method(onward)
    generator, critic = (phase.module for phase in next_one.phases)
    teacher = open_family(inputs.need("init"), CPU, "fp32").teacher_network.state_dict()
    (file,) = (tmp_path / "first" / "model" / "unet_1step").glob("*.safetensors")
    assert all(torch.equal(value, load_file(file)[name].float()) for name, value in generator.state_dict().items())
    assert equal(dict(critic["network"].state_dict()), teacher)
    with pytest.raises(UserError, match="student: missing; this recipe goes on from a pretrained student"):
        made("dmd2", pretrained=True).method(inputs)
    with pytest.raises(UserError, match="starts from its teacher"):
        recipe.method(onward)


def test_regression_is_on_classes_too(tmp_path: Path) -> None:
    teacher, data = write_teacher(tmp_path / "teacher"), write_set(tmp_path / "set.zip")
    make_pairs(teacher, tmp_path / "pairs", 4, 2, 4, CPU)
    edm = Inputs({"init": teacher, "data": data, "pairs": tmp_path / "pairs"}, CPU)
    run(RegressionRecipe(LOOP, lr=1e-3, precision="fp32"), edm, tmp_path / "run", 2)
    assert (tmp_path / "run" / "model" / "dmd2.json").is_file()
    with pytest.raises(UserError, match="decoder tiny: expected kl"):
        given = Inputs({**edm.paths, "lpips": tmp_path / "vgg16.pt"}, CPU)  # without LPIPS, nothing is decoded
        RegressionRecipe(LOOP, lr=1e-3, decoder="tiny").method(given)
    with pytest.raises(UserError, match="solver pndm: expected teacher"):
        make_pairs(teacher, tmp_path / "others", 4, 2, 4, CPU, solver="pndm")
    with pytest.raises(UserError, match=r"guidance.*: expected none for a teacher of classes"):
        make_pairs(teacher, tmp_path / "more", 4, 2, 4, CPU, guidance_scale=2.0)


def test_pairs_bring_their_texts_embeddings_along(weights: Path, inputs: Inputs, tmp_path: Path) -> None:
    """Text encoders are not run again then, and the batches are the same up to fp16."""
    given: dict[str, Any] = {"prompts": PROMPTS, "solver": "euler-trailing", "guidance_scale": 2.0}
    make_pairs(weights, tmp_path / "pairs", 4, 4, 4, CPU, embeddings=True, **given)
    family = open_family(weights, CPU, "fp32")
    expected = Pairs(inputs.need("pairs"), family).batch(3, seed=1, step=2)
    encoded: list[object] = []
    family.condition = lambda *given: encoded.append(given)  # type: ignore[method-assign, assignment]
    found = Pairs(tmp_path / "pairs", family).batch(3, seed=1, step=2)
    assert not encoded and torch.equal(found.noise, expected.noise) and torch.equal(found.target, expected.target)
    for name in ("context", "pooled", "time_ids"):
        torch.testing.assert_close(
            getattr(found.cond, name), getattr(expected.cond, name), rtol=2e-3, atol=1e-3, msg=name
        )
    recipe: Any = RegressionRecipe(LOOP, lr=1e-3, **TEXT)
    run(recipe, replace(inputs, paths={**inputs.paths, "pairs": tmp_path / "pairs"}), tmp_path / "run", 2)
    assert (tmp_path / "run" / "model" / "dmd2.json").is_file()
    with pytest.raises(UserError, match="whose columns is"):
        make_pairs(weights, tmp_path / "pairs", 4, 4, 4, CPU, **given)


def test_pairs_say_what_their_teacher_ran_in(weights: Path, inputs: Inputs, tmp_path: Path) -> None:
    given: dict[str, Any] = {"prompts": PROMPTS, "solver": "euler-trailing", "guidance_scale": 2.0}
    make_pairs(weights, tmp_path / "half", 2, 4, None, CPU, precision="bf16", **given)
    family = open_family(weights, CPU, "fp32")
    half, whole = (Pairs(folder, family) for folder in (tmp_path / "half", inputs.need("pairs")))
    assert (half.made.precision, whole.made.precision) == ("bf16", "fp32")
    a, b = (pairs._shards.rows(torch.tensor([0]))["images"].float() for pairs in (half, whole))
    assert 0 < float((a - b).abs().max()) < 0.5 * float(b.std())
    with pytest.raises(UserError, match="whose precision is bf16, not fp32"):
        make_pairs(weights, tmp_path / "half", 2, 4, 4, CPU, **given)


def test_pairs_by_a_solver_say_so(inputs: Inputs, weights: Path, tmp_path: Path) -> None:
    family = open_family(weights, CPU, "fp32")
    made = Pairs(inputs.need("pairs"), family).made
    assert (made.solver, made.guidance_scale) == ("euler-trailing", 2.0)
    make_pairs(weights, tmp_path / "pndm", 2, 4, 2, CPU, prompts=PROMPTS, solver="pndm")
    images = [
        Pairs(folder, family).batch(2, seed=0, step=0).target for folder in (inputs.need("pairs"), tmp_path / "pndm")
    ]
    assert all(image.isfinite().all() for image in images)
    for given, words in (
        ({"solver": "ddim"}, "solver ddim: expected teacher, pndm, euler-trailing"),
        ({"solver": "pndm"}, "whose solver is euler-trailing, not pndm"),
        ({"guidance_scale": 3.0}, "whose guidance_scale is 2.0, not 3.0"),
        ({"guidance_scale": float("nan")}, "guidance nan: expected 0 to 100"),
    ):
        wanted: dict[str, Any] = {"solver": "euler-trailing", "guidance_scale": 2.0} | given
        with pytest.raises(UserError, match=words):
            make_pairs(weights, inputs.need("pairs"), 4, 4, 4, CPU, prompts=PROMPTS, **wanted)


def test_images_are_decoded_one_at_a_time_where_memory_is_short(weights: Path) -> None:
    family = open_family(weights, CPU, "fp32")
    x0 = torch.randn(3, *family.shape, generator=torch.Generator().manual_seed(0))
    results = []
    for decode in (family.to_rgb, family.rgb("kl", True), family.rgb("tiny", False), family.rgb("tiny", True)):
        x = x0.clone().requires_grad_()
        images = decode(x)
        images.square().mean().backward()
        assert x.grad is not None
        results.append((images.detach(), x.grad))
    for image, gradient in results[1:]:  # these weights have a tiny VAE alone
        assert torch.allclose(image, results[0][0], atol=1e-5)
        assert torch.allclose(gradient, results[0][1], atol=1e-6)


def test_images_are_decoded_where_the_networks_are_and_not_where_data_are_made(weights: Path) -> None:
    with shapes_alone():  # which reads nothing: there would be nothing to put there
        family = open_family(weights, CPU, "fp32", torch.device("meta"))
    for decoder in ("kl", "tiny"):
        images = family.rgb(decoder, False)(torch.zeros(1, *family.shape))
        assert images.device == CPU and images.isfinite().all()


def test_the_highest_level_of_the_gradient_falls(inputs: Inputs) -> None:
    recipe: Any = made("dmd", dm_highest_end=0.5, loop=replace(LOOP, iterations=11))
    assert recipe.dm_range(0) == (0.02, 0.98) and recipe.dm_range(5) == (0.02, pytest.approx(0.74))
    assert recipe.dm_range(10) == recipe.dm_range(99) == (0.02, pytest.approx(0.5))
    assert DmdRecipe(LOOP, lr=1e-3, lr_critic=1e-3, regression_weight=1, pairs_batch=1).dm_range(2) == (0.02, 0.98)
    method, seen = recipe.method(inputs), []
    teacher = method.phases[0].loss
    sigmas: list[Tensor] = []
    import dmd2.training.methods.dmd2 as module

    before = module.sample_sigma
    try:
        module.sample_sigma = lambda *given: sigmas.append(before(*given)) or sigmas[-1]  # type: ignore[func-returns-value]
        for step in range(11):
            teacher(Batch(step, method.data(step), torch.Generator().manual_seed(step)))
            seen.append(float(sigmas[-1].max()))
    finally:
        module.sample_sigma = before
    table = open_family(inputs.need("init"), CPU, "fp32").teacher.sigmas
    for step, highest in enumerate(seen):
        assert highest <= float(table[round(recipe.dm_range(step)[1] * 1000)])
    for given in ("dm_highest=0.01", "dm_highest_end=0.02"):
        with pytest.raises(UserError, match=r"expected more than 0\.02"):
            resolve("cifar10-dmd", [given])


def test_the_head_goes_on_where_it_is_wanted(inputs: Inputs, tmp_path: Path) -> None:
    run(made("dmd2-gan"), inputs, tmp_path / "first", 2)
    head = tmp_path / "first" / "fake_score" / HEAD_FILE
    onward = Inputs({**inputs.paths, "student": tmp_path / "first" / "model"}, CPU)
    for wanted in (True, False):
        recipe = made("dmd2-gan", resumed=True, resumed_head=wanted)
        critic = recipe.method(onward).phases[1].module
        assert isinstance(critic, nn.ModuleDict)
        assert equal(dict(critic["head"].state_dict()), load_file(head)) == wanted
        assert ("student (its head)" in inputs_of(recipe, onward.paths)) == wanted
    head.write_bytes(b"damaged")
    with pytest.raises(UserError, match="no head for this teacher"):
        made("dmd2-gan", resumed=True, resumed_head=True).method(onward)
    head.unlink()
    with pytest.raises(UserError, match="has no head of a GAN beside it"):
        made("dmd2-gan", resumed=True, resumed_head=True).method(onward)
    for given in (["resumed_head=true"], ["resumed=true", "pretrained=true"], ["pretrained=true"]):
        with pytest.raises(UserError, match="expected"):
            resolve("emoji-dmd2-1step", given)


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_an_optimizer_in_8_bits_is_one_that_is_installed(
    name: Any, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    recipe: Recipe = made("dmd2", optimizer=name)
    with pytest.raises(UserError, match=f"optimizer={name}: needs bitsandbytes, which is not installed"):
        recipe.method(inputs)

    monkeypatch.undo()
    kind = getattr(bitsandbytes.optim, {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}[name])
    assert all(type(phase.optimizer) is kind for phase in recipe.method(inputs).phases)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_states_in_8_bits_are_resumed_to_the_bit(name: Any, inputs: Inputs, tmp_path: Path) -> None:
    recipe = made("dmd2", optimizer=name)
    run(recipe, inputs, tmp_path / "whole", 3)
    run(recipe, inputs, tmp_path / "parts", 2)
    run(recipe, inputs, tmp_path / "parts", 3, resume=True)
    whole, parts = (read(Checkpoints(tmp_path / name).all()[0]).whole() for name in ("whole", "parts"))
    assert equal(whole, parts)
    assert any(value.dtype == torch.uint8 for name, value in whole.items() if "/optimizer/" in name)
