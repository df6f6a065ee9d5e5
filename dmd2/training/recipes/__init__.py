"""Every named recipe. Whatever changes the numbers is here; where a run lives is on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from dmd2.runtime.errors import UserError, shown
from dmd2.training.recipes.edm import EDM_RECIPES
from dmd2.training.recipes.emoji import EMOJI_RECIPES
from dmd2.training.recipes.kinds import (
    Dmd2Recipe,
    EdmDmd2Recipe,
    EdmDmdRecipe,
    EdmGddRecipe,
    EdmTeacherRecipe,
    LoopSettings,
    Recipe,
    TeacherRecipe,
    edm_conflict,
    gan_conflict,
)
from dmd2.training.recipes.ranges import checked, field_types

RECIPES: dict[str, Recipe] = {**EMOJI_RECIPES, **EDM_RECIPES}


def resolve(name: str, overrides: list[str]) -> Recipe:
    """The recipe `name` with `key=value` overrides applied; loop settings may be named with or without "loop.".

    Raises:
        UserError: no such recipe or key, a value of the wrong type or out of range, values that do not go together.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {shown(name, 100)!r}: unknown; expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {shown(override, 100)}: expected key=value")
        field = key.removeprefix("loop.")
        part = recipe.loop if field in field_types(LoopSettings) else recipe
        if field not in field_types(type(part)) or field == "loop":
            valid = sorted((field_types(type(recipe)).keys() | field_types(LoopSettings).keys()) - {"loop"})
            raise UserError(f"--set {shown(key, 100)}: {name} has no such key; expected one of {', '.join(valid)}")
        try:
            value = checked(type(part), field, _literal(text))
        except UserError as error:
            raise UserError(f"--set {key.removesuffix(field)}{error}") from None
        if part is recipe.loop:
            recipe = replace(recipe, loop=replace(recipe.loop, **{field: value}))
        else:
            recipe = replace(recipe, **{field: value})
    problem = _conflict(recipe)  # after the last override: two fields may have to change together
    if problem is not None:
        raise UserError(f"--set {problem}")
    return recipe


def _conflict(recipe: Recipe) -> str | None:
    """Which fields do not go together, and what would; None if all do."""
    match recipe:
        case EdmTeacherRecipe() | EdmDmdRecipe() | EdmDmd2Recipe() | EdmGddRecipe():
            return edm_conflict(recipe)
        case TeacherRecipe() if recipe.free_from < recipe.still_until:
            return f"free_from={recipe.free_from}: expected still_until={recipe.still_until} or more"
        case Dmd2Recipe():
            steps = list(recipe.timesteps)
            if steps != sorted(set(steps), reverse=True):
                return f"timesteps={shown(steps, 100)}: expected descending timesteps within 0 to 999"
            return gan_conflict(recipe.gan_generator, recipe.gan_critic)
    return None


def _literal(text: str) -> Any:
    """JSON where it parses (numbers, true, null, [999, 749]), else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not JSON; a number of thousands of digits; nested too deep
        return text
