"""Distilling in pixel space: every method's wiring, what is exported, resuming, and what is missing."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dmd2.training.edm_distil
import dmd2.training.preview
from dmd2.data.pairs import make_pairs
from dmd2.models.edm.folder import load_edm, save_edm
from dmd2.models.edm.network import ClassCondition, EdmNetwork
from dmd2.runtime.errors import UserError
from dmd2.training.build import build_method
from dmd2.training.discriminators.published import PublishedDiscriminator
from dmd2.training.edm_distil import EdmSources, distil_edm
from dmd2.training.loop import Batch, train, training_step
from dmd2.training.recipes.edm import EDM_RECIPES
from dmd2.training.recipes.kinds import EdmDistilRecipe, EdmDmd2Recipe, EdmDmdRecipe, EdmGddRecipe, LoopSettings
from dmd2.weights.manifest import read_manifest
from tests.training.discriminators.test_published import Maps
from tests.training.pixels import CONFIG, same_weights, write_set, write_teacher
from tests.training.test_preview import Brightness

CPU = torch.device("cpu")
LOOP = LoopSettings(iterations=4, batch_size=4, sample_every=100)
RECIPES: dict[str, EdmDistilRecipe] = {
    "dmd": EdmDmdRecipe(LOOP, lr=1e-3, lr_critic=1e-3, regression_weight=0.25, pairs_batch=3),
    "dmd2": EdmDmd2Recipe(LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2),
    "dmd2-gan": EdmDmd2Recipe(LOOP, 1e-3, 1e-3, generator_every=2, gan_generator=0.1, gan_critic=0.1),
    "gdd": EdmGddRecipe(LOOP, lr=1e-3, lr_critic=1e-3, freeze=False, r1_every=2),
    "gdd-i": EdmGddRecipe(LOOP, lr=1e-3, lr_critic=1e-3, freeze=True, r1_every=2),
}
RECIPES = {name: replace(recipe, precision="fp32") for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> EdmSources:
    folder = tmp_path_factory.mktemp("pixels")
    teacher = write_teacher(folder / "teacher")
    make_pairs(teacher, folder / "pairs", 6, 2, 6, CPU)
    return EdmSources(teacher, data=write_set(folder / "set.zip"), pairs=folder / "pairs")


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def run(recipe: EdmDistilRecipe, sources: EdmSources, out: Path, resume: bool = False) -> None:
    method = distil_edm(recipe, sources, CPU)
    assert train(method, recipe.loop, out, resume=resume, recipe=asdict(recipe))


@pytest.mark.parametrize("name", list(RECIPES))
def test_each_method_trains_its_networks_and_leaves_the_teacher(name: str, sources: EdmSources) -> None:
    recipe = RECIPES[name]
    method = distil_edm(recipe, sources, CPU)
    assert method.ema_model is not None
    before = state(method.ema_model)
    teacher = load_edm(sources.teacher, "cpu").network.state_dict()
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
    name: str, sources: EdmSources, tmp_path: Path
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


def test_few_step_students_name_their_levels(sources: EdmSources, tmp_path: Path) -> None:
    recipe = replace(RECIPES["dmd2"], sigmas=(80.0, 2.5))  # type: ignore[type-var]
    run(replace(recipe, loop=replace(LOOP, iterations=1)), sources, tmp_path / "run")
    manifest = read_manifest(tmp_path / "run" / "model")
    assert manifest.students[2].sigmas == [80.0, 2.5]


def test_a_run_can_go_on_from_a_student(sources: EdmSources, tmp_path: Path) -> None:
    run(replace(RECIPES["dmd2"], loop=replace(LOOP, iterations=1)), sources, tmp_path / "first")  # type: ignore[type-var]
    student = tmp_path / "first" / "model"
    resumed: Any = replace(RECIPES["dmd2-gan"], resumed=True)  # type: ignore[type-var]
    method = distil_edm(resumed, replace(sources, student=student), CPU)
    assert method.ema_model is not None
    expected = load_edm(student, "cpu").network.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in method.ema_model.state_dict().items())
    # The published run goes on with the fake score, too, which by now differs from the teacher.
    fake = load_edm(tmp_path / "first" / "fake_score", "cpu").network.state_dict()
    teacher = load_edm(sources.teacher, "cpu").network.state_dict()
    critic = next(phase.module for phase in method.phases if phase.name == "critic")
    started = {key.removeprefix("network."): value for key, value in critic.state_dict().items() if "network." in key}
    assert started.keys() == fake.keys() and all(torch.equal(value, fake[key]) for key, value in started.items())
    assert not all(torch.equal(value, teacher[key]) for key, value in started.items())
    (tmp_path / "alone").mkdir()
    alone = Path(shutil.copytree(student, tmp_path / "alone" / "model"))
    with pytest.raises(UserError, match="has no fake score beside it"):
        distil_edm(resumed, replace(sources, student=alone), CPU)
    with pytest.raises(UserError, match="--student: missing"):
        distil_edm(resumed, sources, CPU)
    with pytest.raises(UserError, match="this recipe starts from its teacher"):
        distil_edm(RECIPES["dmd2"], replace(sources, student=student), CPU)
    with pytest.raises(UserError, match="expected a student of"):
        distil_edm(resumed, replace(sources, student=sources.teacher), CPU)
    with pytest.raises(UserError, match="expected the teacher"):
        distil_edm(RECIPES["dmd2"], replace(sources, teacher=student), CPU)


def test_gdd_generates_the_classes_that_it_shows(sources: EdmSources) -> None:
    """As the published runs do; DMD2 draws its own."""
    for name, same in (("gdd", True), ("dmd2-gan", False)):
        steps = [distil_edm(RECIPES[name], sources, CPU).data(step).samples for step in range(6)]
        assert all(torch.equal(s.cond.labels, s.real_cond.labels) for s in steps) == same


def test_the_recipe_says_which_discriminator(sources: EdmSources, monkeypatch: pytest.MonkeyPatch) -> None:
    gdd = {name: recipe for name, recipe in EDM_RECIPES.items() if isinstance(recipe, EdmGddRecipe)}
    assert {name for name, recipe in gdd.items() if recipe.discriminator == "small"} == {
        "cifar10-small-gdd",
        "cifar10-small-gdd-i",
    }
    assert all(bool(recipe.backbones) == (recipe.discriminator == "published") for recipe in gdd.values())

    monkeypatch.setattr(dmd2.training.edm_distil, "TimmFeatures", lambda name, device: Maps(name))
    monkeypatch.setattr(dmd2.training.edm_distil, "class_embeddings", lambda classes: torch.eye(classes, 5))
    names = ("vgg16_bn", "tf_efficientnet_lite0")
    published = replace(RECIPES["gdd"], discriminator="published", backbones=names)
    method = distil_edm(published, sources, CPU)
    critic = next(phase.module for phase in method.phases if phase.name == "discriminator")
    assert isinstance(critic, PublishedDiscriminator) and len(critic.branches) == 2
    assert critic.embeddings is not None and critic.embeddings.shape == (2, 5)


def test_a_teacher_too_narrow_for_a_gan_is_one_line(sources: EdmSources, tmp_path: Path) -> None:
    narrow = CONFIG.model_copy(update={"model_channels": 8})
    save_edm(tmp_path / "narrow", EdmNetwork(narrow), name="narrow", licence="none", recipe={})
    with pytest.raises(UserError, match=r"--init .*narrow: has 16 channels in its middle; expected a multiple of 32"):
        distil_edm(RECIPES["dmd2-gan"], replace(sources, teacher=tmp_path / "narrow"), CPU)


def test_a_student_is_scored_where_a_classifier_is_at_hand(
    sources: EdmSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert distil_edm(RECIPES["gdd"], sources, CPU).score is None
    monkeypatch.setattr(dmd2.training.preview, "SmallFeatures", Brightness)
    method = distil_edm(RECIPES["gdd"], replace(sources, judge=Path("judge")), CPU)
    assert method.score is not None
    assert 0 <= method.score(None)["accuracy"] <= 1


def test_gdd_at_its_boundary_is_the_identity(sources: EdmSources) -> None:
    method = distil_edm(RECIPES["gdd"], sources, CPU)
    x = torch.randn(2, 3, 8, 8)
    assert method.ema_model is not None
    out, _ = method.ema_model(x, torch.full((2,), 0.002), torch.zeros(2, 2))
    assert torch.allclose(out, x, atol=1e-5)


def test_data_is_a_function_of_the_step(sources: EdmSources) -> None:
    for name in ("dmd", "dmd2-gan"):
        one, two = distil_edm(RECIPES[name], sources, CPU), distil_edm(RECIPES[name], sources, CPU)
        one.data(0)
        a, b = one.data(5), two.data(5)
        assert torch.equal(a.samples.cond.labels, b.samples.cond.labels)
        if a.pairs is not None:
            assert torch.equal(a.pairs.noise, b.pairs.noise) and len(a.pairs.noise) == 3
        if a.samples.real is not None:
            assert torch.equal(a.samples.real, b.samples.real)
            bright = a.samples.real.mean((1, 2, 3)) > 0
            assert torch.equal(bright, a.samples.real_cond.labels[:, 1] > 0)  # classes go with their images


@pytest.mark.parametrize(
    ("name", "lacks", "message"),
    [
        ("dmd", "pairs", "--pairs: missing"),
        ("dmd2-gan", "data", "--data: missing"),
        ("gdd", "data", "--data: missing"),
    ],
)
def test_what_is_missing_is_said(name: str, lacks: str, message: str, sources: EdmSources) -> None:
    with pytest.raises(UserError, match=message):
        distil_edm(RECIPES[name], replace(sources, **{lacks: None}), CPU)
    with pytest.raises(UserError, match="--init: missing"):
        build_method(RECIPES[name], {}, CPU)
