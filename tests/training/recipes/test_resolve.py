"""Recipes and the overrides of the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.runtime.errors import UserError
from dmd2.training.loop import LoopSettings
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.ranges import field_types
from dmd2.training.recipes import RECIPES, build_method, resolve
from tests.training.pixels import write_set, write_teacher


def test_every_recipe_resolves_to_itself() -> None:
    for name, recipe in RECIPES.items():
        assert resolve(name, []) == recipe


def test_overrides_are_typed_and_reach_the_loop() -> None:
    changed = resolve(
        "emoji-dmd2-1step", ["iterations=7", "loop.seed=3", "lr=0.5", "student_init=null", "timesteps=[399]"]
    )
    assert isinstance(changed, Dmd2Recipe)
    assert (changed.loop.iterations, changed.loop.seed, changed.lr) == (7, 3, 0.5)
    assert changed.student_init is None and changed.timesteps == (399,)
    assert RECIPES["emoji-dmd2-1step"].loop.iterations != 7


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["learning_rate=1"], "learning_rate"),
        (["loop=1"], "loop"),
        (["iterations"], "key=value"),
        (["iterations=soon"], "iterations=soon"),
        (["precision=fp8"], "precision=fp8"),
    ],
)
def test_a_wrong_override_is_named(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve("emoji-dmd2-1step", overrides)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="emoji-dmd2-4step"):
        resolve("emoji", [])


KINDS = {type(recipe): name for name, recipe in RECIPES.items()}  # one recipe of each kind has all the fields
FIELDS = [(name, f.name) for kind, name in KINDS.items() for f in (*fields(kind), *fields(LoopSettings))]
SETTABLE = [(name, field) for name, field in FIELDS if field != "loop"]


def types_of(name: str) -> dict[str, Any]:
    return field_types(type(RECIPES[name])) | field_types(LoopSettings)


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("emoji-dmd2-1step", ["max_grad_norm=-1"], "max_grad_norm=-1: expected a number from 0"),
        ("emoji-dmd2-1step", ["lr=Infinity"], "lr=Infinity: expected a number above 0, at most 1"),
        ("emoji-dmd2-1step", ["lr=NaN"], "lr=NaN: expected a number above 0, at most 1"),
        ("emoji-dmd2-1step", ["ema_decay=2"], "ema_decay=2: expected a number from 0, below 1"),
        ("emoji-dmd2-1step", ["generator_every=0"], "generator_every=0: expected a whole number from 1"),
        ("emoji-dmd2-1step", ["warmup=-5"], "warmup=-5: expected a whole number from 0"),
        ("emoji-dmd2-1step", ["batch_size=true"], "batch_size=true: expected a whole number from 1"),
        ("emoji-dmd2-1step", ["gan_critic=0"], "gan_generator=0.03 with gan_critic=0: expected both"),
        ("emoji-dmd2-1step", ["gan_generator=-1"], "gan_generator=-1: expected a number from 0"),
        ("emoji-dmd2-1step", ["timesteps=[249, 999]"], "expected descending levels"),
        ("emoji-dmd2-1step", ["timesteps=[]"], "expected the levels of the student"),
        ("emoji-dmd2-1step", ["student_init=../unet"], "student_init=../unet: expected a name"),
        ("emoji-vae", ["encoder_blocks=[1]"], "encoder_blocks=.*: expected a list of 2 to 6"),
        ("emoji-vae", ["encoder_blocks=[1, 2]"], "decoder_blocks: 4 stages; expected 2, as encoder_blocks has"),
        ("emoji-vae", ["latent_channels=5"], "latent_channels=5: expected 4 or 8"),
        ("emoji-teacher", ["sample_steps=0"], "sample_steps=0: expected a whole number from 2"),
        ("emoji-teacher", ["still_until=5000"], "free_from=4000: expected still_until=5000 or more"),
        ("cifar10-small-dmd2", ["sigmas=[NaN]"], "sigmas=.*NaN.*: expected a list of 0 to 64, each a number above 0"),
        ("cifar10-small-dmd2", ["gan_generator=1"], "gan_generator=1 with gan_critic=0"),
        (
            "cifar10-small-dmd2",
            ["disjoint=true", "generator_every=1"],
            "disjoint=true with generator_every=1: expected 2",
        ),
        ("cifar10-small-dmd", ["sigmas=[80, 1]"], "expected a single level"),
        ("cifar10-small-gdd", ["sigmas=[0.001]"], "boundary=0.002: expected less than"),
        ("cifar10-small-gdd", ["r1_gamma=-1e-4"], "r1_gamma=-0.0001: expected a number from 0"),
        ("cifar10-small-teacher", ["augment=0.1"], "augment=0.1: expected 0"),
        ("cifar10-small-teacher", ["network=edm-imagenet-64x64-cond-adm"], "class_names: 10 names for the 1000"),
        ("cifar10-small-teacher", ["seed=" + "9" * 5000], "seed=9+ ?… ?9*: expected a whole number"),
        ("cifar10-small-dmd2", ["sigmas=" + "[" * 100_000], "expected a list"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_valid(name: str, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        resolve(name, overrides)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["cifar10-dmd2", "imagenet64-dmd2-fastgen"])
def test_fastgen_s_recipes_are_its_method(name: str, tmp_path: Path) -> None:
    recipe: Any = RECIPES[name]
    assert recipe.loop.warmup == 0 and recipe.gan_features == "teacher" and recipe.generator_every == 5
    teacher = write_teacher(tmp_path / "teacher")
    tiny: Any = replace(recipe, loop=replace(recipe.loop, batch_size=2), precision="fp32")
    images = write_set(tmp_path / "images.zip")
    method = build_method(tiny, {"init": teacher, "data": images}, torch.device("cpu"))
    due = [[phase.name for phase in method.phases if phase.is_due(step)] for step in range(6)]
    assert due == [["generator"], *[["critic"]] * 4, ["generator"]]


def test_two_fields_may_change_together() -> None:
    changed = resolve("emoji-dmd2-1step", ["gan_critic=0", "gan_generator=0"])
    assert isinstance(changed, Dmd2Recipe) and changed.gan_critic == changed.gan_generator == 0


@pytest.mark.parametrize("value", ["-1", "NaN", "Infinity", "-Infinity", "1e300", "true", '"1"', "[]", "{}"])
def test_every_number_of_every_recipe_has_a_range(value: str) -> None:
    tried = 0
    for name, field in SETTABLE:
        if getattr(types_of(name)[field], "__origin__", None) in (int, float):
            tried += 1
            with pytest.raises(UserError, match=f"set {field}="):
                resolve(name, [f"{field}={value}"])
    assert tried > 100


VALUES = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(-5, 1005), st.floats(), st.text(max_size=5)), max_size=6),
    st.sampled_from([0, 1, 2, 1e-3, 0.5, [80.0], [999, 499], "unet", "fp32", "adam", [1, 1, 1]]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(place=st.sampled_from(SETTABLE), value=st.one_of(VALUES.map(json.dumps), st.text(max_size=50)))
def test_any_override_is_a_recipe_or_one_line(place: tuple[str, str], value: str) -> None:
    name, field = place
    try:
        recipe = resolve(name, [f"{field}={value}"])
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700 and field in str(error)
        return
    numbers = [n for n in json.loads(json.dumps(list(flat(asdict(recipe))))) if isinstance(n, int | float)]
    assert all(0 <= n <= 1e12 for n in numbers)  # not so for NaN
    settled = getattr(recipe.loop if hasattr(recipe.loop, field) else recipe, field)
    assert resolve(name, [f"{field}={json.dumps(settled)}"]) == recipe


def flat(value: Any) -> Any:
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from flat(part)
    else:
        yield value
