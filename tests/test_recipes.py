"""Recipes and the overrides of the command line."""

from __future__ import annotations

import pytest

from dmd2.errors import UserError
from dmd2.recipes import RECIPES, Dmd2Recipe, resolve


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
