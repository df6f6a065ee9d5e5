"""Distilling an EDM teacher: what each method trains, what is exported, resuming, and what is missing."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dmd2.training.methods.gdd
import dmd2.training.preview
from dmd2.data.pairs import make_pairs
from dmd2.models.edm.folder import load_edm, save_edm
from dmd2.models.edm.network import ClassCondition, EdmNetwork
from dmd2.runtime.errors import UserError
from dmd2.training.discriminators.published import PublishedDiscriminator
from dmd2.training.distil import Distillation, distil
from dmd2.training.loop import Batch, LoopSettings, train, training_step
from dmd2.training.methods.dmd import DmdRecipe
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.methods.gdd import GddRecipe
from dmd2.training.recipes import build_method
from dmd2.training.recipes.edm import EDM_RECIPES
from dmd2.training.sources import Inputs
from dmd2.weights.manifest import read_manifest
from tests.training.discriminators.test_published import Maps
from tests.training.pixels import CONFIG, same_weights, write_set, write_teacher
from tests.training.test_preview import Brightness

CPU = torch.device("cpu")
LOOP = LoopSettings(iterations=4, batch_size=4, sample_every=100)
RECIPES: dict[str, Distillation] = {
    "dmd": DmdRecipe(LOOP, lr=1e-3, lr_critic=1e-3, regression_weight=0.25, pairs_batch=3),
    "dmd2": Dmd2Recipe(LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2),
    "dmd2-gan": Dmd2Recipe(LOOP, 1e-3, 1e-3, generator_every=2, gan_generator=0.1, gan_critic=0.1),
    "gdd": GddRecipe(LOOP, lr=1e-3, lr_critic=1e-3, freeze=False, r1_every=2),
    "gdd-i": GddRecipe(LOOP, lr=1e-3, lr_critic=1e-3, freeze=True, r1_every=2),
}
RECIPES = {name: replace(recipe, precision="fp32") for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("pixels")
    teacher = write_teacher(folder / "teacher")
    make_pairs(teacher, folder / "pairs", 6, 2, 6, CPU)
    return Inputs({"init": teacher, "data": write_set(folder / "set.zip"), "pairs": folder / "pairs"}, CPU)


def given(sources: Inputs, **paths: Path | None) -> Inputs:
    return replace(sources, paths={**sources.paths, **paths})


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def run(recipe: Distillation, sources: Inputs, out: Path, resume: bool = False) -> None:
    method = distil(recipe, sources)
    assert train(method, recipe.loop, out, resume=resume, recipe=asdict(recipe))


@pytest.mark.parametrize("name", list(RECIPES))
def test_each_method_trains_its_networks_and_leaves_the_teacher(name: str, sources: Inputs) -> None:
    recipe = RECIPES[name]
    method = distil(recipe, sources)
    assert method.ema_model is not None
    before = state(method.ema_model)
    teacher = load_edm(sources.need("init"), "cpu").network.state_dict()
    assert all(torch.equal(value, teacher[key]) for key, value in before.items())  # it starts as the teacher
    critics = [state(phase.module) for phase in method.phases]
    for step in range(2):
        batch = Batch(step, method.data(step), torch.Generator().manual_seed(step))
        figures = training_step(method.phases, batch, recipe.loop)
        assert all(torch.isfinite(torch.as_tensor(value)) for value in figures.values())
    after = method.ema_model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    frozen = {key for key in before if key not in moved}
    if name == "gdd-i":
        assert frozen and all(".conv" in key or ".proj" in key for key in frozen if "filter" not in key)
    else:
        assert all("filter" in key for key in frozen)
    for phase, old in zip(method.phases, critics, strict=True):
        assert any(not torch.equal(old[key], value) for key, value in phase.module.state_dict().items())


@pytest.mark.parametrize("name", ["dmd", "dmd2-gan", "gdd-i"])
def test_a_run_exports_a_student_that_loads_and_resumes_bit_for_bit(
    name: str, sources: Inputs, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    whole, half = (replace(recipe, loop=replace(LOOP, iterations=n, decay=False)) for n in (4, 2))
    run(whole, sources, tmp_path / "whole")
    run(half, sources, tmp_path / "parts")
    (tmp_path / "parts" / "model").rename(tmp_path / "half")
    run(whole, sources, tmp_path / "parts", resume=True)
    run(whole, sources, tmp_path / "parts", resume=True)  # finished: it is exported again
    one, two = tmp_path / "whole" / "model", tmp_path / "parts" / "model"
    assert same_weights(one, two) and not same_weights(one, tmp_path / "half")

    manifest = read_manifest(one)
    assert manifest.teacher is None and list(manifest.students) == [1]
    assert manifest.students[1].subfolder == "." and manifest.students[1].sigmas == [80.0]
    assert manifest.class_names == ["dark", "bright"]
    student = load_edm(one, "cpu")
    assert student.config.sigmas == (80.0,)
    assert student.config.boundary == (0.002 if name == "gdd-i" else 0.0)
    x0 = student(80 * torch.randn(2, 3, 8, 8), torch.full((2,), 80.0), ClassCondition.of(torch.tensor([0, 1]), 2))
    assert torch.isfinite(x0).all()


def test_few_step_students_name_their_levels(sources: Inputs, tmp_path: Path) -> None:
    recipe = replace(RECIPES["dmd2"], sigmas=(80.0, 2.5))
    run(replace(recipe, loop=replace(LOOP, iterations=1)), sources, tmp_path / "run")
    manifest = read_manifest(tmp_path / "run" / "model")
    assert manifest.students[2].sigmas == [80.0, 2.5]


def test_a_run_can_go_on_from_a_student(sources: Inputs, tmp_path: Path) -> None:
    run(replace(RECIPES["dmd2"], loop=replace(LOOP, iterations=1)), sources, tmp_path / "first")
    student = tmp_path / "first" / "model"
    resumed: Any = replace(RECIPES["dmd2-gan"], resumed=True)
    method = distil(resumed, given(sources, student=student))
    assert method.ema_model is not None
    expected = load_edm(student, "cpu").network.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in method.ema_model.state_dict().items())
    # The published run goes on with the fake score, too, which by now differs from the teacher.
    fake = load_edm(tmp_path / "first" / "fake_score", "cpu").network.state_dict()
    teacher = load_edm(sources.need("init"), "cpu").network.state_dict()
    critic = next(phase.module for phase in method.phases if phase.name == "critic")
    started = {key.removeprefix("network."): value for key, value in critic.state_dict().items() if "network." in key}
    assert started.keys() == fake.keys() and all(torch.equal(value, fake[key]) for key, value in started.items())
    assert not all(torch.equal(value, teacher[key]) for key, value in started.items())
    (tmp_path / "alone").mkdir()
    alone = Path(shutil.copytree(student, tmp_path / "alone" / "model"))
    with pytest.raises(UserError, match="has no fake score beside it"):
        distil(resumed, given(sources, student=alone))
    with pytest.raises(UserError, match="student: missing"):
        distil(resumed, sources)
    with pytest.raises(UserError, match="this recipe starts from its teacher"):
        distil(RECIPES["dmd2"], given(sources, student=student))
    with pytest.raises(UserError, match="expected a student of"):
        distil(resumed, given(sources, student=sources.need("init")))
    with pytest.raises(UserError, match="expected a teacher"):
        distil(RECIPES["dmd2"], given(sources, init=student))


def test_gdd_generates_the_classes_that_it_shows(sources: Inputs) -> None:
    """As the published runs do; DMD2 draws its own."""
    for name, same in (("gdd", True), ("dmd2-gan", False)):
        steps = [distil(RECIPES[name], sources).data(step) for step in range(6)]
        assert all(torch.equal(s.cond.labels, s.real_cond.labels) for s in steps) == same


def test_the_recipe_says_which_discriminator(sources: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    gdd = {name: recipe for name, recipe in EDM_RECIPES.items() if isinstance(recipe, GddRecipe)}
    assert {name for name, recipe in gdd.items() if recipe.discriminator == "small"} == {
        "cifar10-small-gdd",
        "cifar10-small-gdd-i",
    }
    assert all(bool(recipe.backbones) == (recipe.discriminator == "published") for recipe in gdd.values())

    monkeypatch.setattr(dmd2.training.methods.gdd, "TimmFeatures", lambda name, device, to_rgb: Maps(name))
    monkeypatch.setattr(dmd2.training.methods.gdd, "class_embeddings", lambda classes: torch.eye(classes, 5))
    names = ("vgg16_bn", "tf_efficientnet_lite0")
    published = replace(RECIPES["gdd"], discriminator="published", backbones=names)
    method = distil(published, sources)
    critic = next(phase.module for phase in method.phases if phase.name == "discriminator")
    assert isinstance(critic, PublishedDiscriminator) and len(critic.branches) == 2
    assert critic.embeddings is not None and critic.embeddings.shape == (2, 5)


def test_a_teacher_too_narrow_for_a_gan_is_one_line(sources: Inputs, tmp_path: Path) -> None:
    narrow = CONFIG.model_copy(update={"model_channels": 8})
    save_edm(tmp_path / "narrow", EdmNetwork(narrow), name="narrow", licence="none", recipe={})
    with pytest.raises(UserError, match=r"init: narrow has 16 channels in its middle; expected a multiple of 32"):
        distil(RECIPES["dmd2-gan"], given(sources, init=tmp_path / "narrow"))


def test_a_student_is_scored_where_a_classifier_is_at_hand(sources: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert distil(RECIPES["gdd"], sources).score is None
    monkeypatch.setattr(dmd2.training.preview, "SmallFeatures", Brightness)
    method = distil(RECIPES["gdd"], given(sources, classifier=Path("judge")))
    assert method.score is not None
    assert 0 <= method.score(None)["accuracy"] <= 1


def test_gdd_at_its_boundary_is_the_identity(sources: Inputs) -> None:
    method = distil(RECIPES["gdd"], sources)
    x = torch.randn(2, 3, 8, 8)
    assert method.ema_model is not None
    out, _ = method.ema_model(x, torch.full((2,), 0.002), torch.zeros(2, 2))
    assert torch.allclose(out, x, atol=1e-5)


def test_data_is_a_function_of_the_step(sources: Inputs) -> None:
    for name in ("dmd", "dmd2-gan"):
        one, two = distil(RECIPES[name], sources), distil(RECIPES[name], sources)
        one.data(0)
        a, b = one.data(5), two.data(5)
        assert torch.equal(a.cond.labels, b.cond.labels)
        if a.pairs is not None:
            assert torch.equal(a.pairs.noise, b.pairs.noise) and len(a.pairs.noise) == 3
        if a.real is not None:
            assert torch.equal(a.real, b.real)
            bright = a.real.mean((1, 2, 3)) > 0
            assert torch.equal(bright, a.real_cond.labels[:, 1] > 0)  # classes go with their images


@pytest.mark.parametrize(
    ("name", "lacks", "message"),
    [
        ("dmd", "pairs", "pairs: missing"),
        ("dmd2-gan", "data", "data: missing"),
        ("gdd", "data", "data: missing"),
    ],
)
def test_what_is_missing_is_said(name: str, lacks: str, message: str, sources: Inputs) -> None:
    with pytest.raises(UserError, match=message):
        distil(RECIPES[name], given(sources, **{lacks: None}))
    with pytest.raises(UserError, match="init: missing"):
        build_method(RECIPES[name], {}, CPU)
