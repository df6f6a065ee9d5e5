"""Every named recipe. Whatever changes the numbers is here; where a run lives is on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dmd2.runtime.errors import InvalidInput, UserError, shown
from dmd2.runtime.offload import keep_freed_memory
from dmd2.training.discriminators.head import HEAD_FILE
from dmd2.training.distil import FAKE_SCORE
from dmd2.training.loop import LoopSettings, Method
from dmd2.training.methods.common import Recipe
from dmd2.training.parallel.group import ALONE, Parallel, check_shares
from dmd2.training.ranges import checked, field_types
from dmd2.training.recipes.edm import EDM_RECIPES
from dmd2.training.recipes.emoji import EMOJI_RECIPES
from dmd2.training.recipes.lora import LORA_RECIPES
from dmd2.training.recipes.matching import MATCHING_RECIPES
from dmd2.training.recipes.stable_diffusion import STABLE_DIFFUSION_RECIPES
from dmd2.training.sources import SOURCES, Inputs

RECIPES: dict[str, Recipe] = {
    **EMOJI_RECIPES,
    **EDM_RECIPES,
    **LORA_RECIPES,
    **STABLE_DIFFUSION_RECIPES,
    **MATCHING_RECIPES,
}


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
            raise InvalidInput("set", "expected key=value", shown(override, 100))
        field = key.removeprefix("loop.")
        part = recipe.loop if field in field_types(LoopSettings) else recipe
        if field not in field_types(type(part)) or field == "loop":
            valid = sorted((field_types(type(recipe)).keys() | field_types(LoopSettings).keys()) - {"loop"})
            known = f"{name} has no such key; expected one of {', '.join(valid)}"
            raise InvalidInput("set", known, shown(key, 100))
        try:
            value = checked(type(part), field, _literal(text))
        except UserError as error:
            raise _of_set(f"{key.removesuffix(field)}{error}") from None
        if part is recipe.loop:
            recipe = replace(recipe, loop=replace(recipe.loop, **{field: value}))
        else:
            recipe = replace(recipe, **{field: value})
    problem = recipe.conflict()  # after the last override: two fields may have to change together
    if problem is not None:
        raise _of_set(problem)
    return recipe


def _of_set(problem: str) -> InvalidInput:
    """ "lr=2: expected …" as what is wrong with one `--set`."""
    given, _, message = problem.partition(": ")
    return InvalidInput("set", message, given)


def _literal(text: str) -> Any:
    """JSON where it parses (numbers, true, null, [999, 749]), else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not JSON; a number of thousands of digits; nested too deep
        return text


def build_method(
    recipe: Recipe, paths: Mapping[str, Path | None], device: torch.device, parallel: Parallel = ALONE
) -> Method:
    """What `recipe` trains.

    Args:
        paths: `data`, `init`, `classifier`, `student`, `pairs`, `lpips`, `clip` and `inception`, as on the command
            line; None for what it has not said. Recipes of the embedded model have defaults for the first three.

    Raises:
        UserError: a path that this recipe needs is not given, or what is there does not do.
    """
    if device.type == "cpu":
        keep_freed_memory()
    sizes = {"batch_size": recipe.loop.batch_size, "pairs_batch": getattr(recipe, "pairs_batch", 0)}
    check_shares(parallel, recipe.shared, sizes)
    for name in ("clip", "inception"):
        if given := paths.get(name):
            if recipe.data not in ("prompts", "latents"):
                raise InvalidInput(name, f"scores images of prompts, not of data={recipe.data}", given)
            if not given.exists():
                raise InvalidInput(name, "no such file or folder; scripts/download-metrics fetches one", given)
    return recipe.method(Inputs(paths, device, parallel))


def inputs_of(recipe: Recipe, paths: Mapping[str, Path | None]) -> dict[str, Path]:
    """Option → path of everything that the results depend on. The classifier only looks on."""
    defaults = SOURCES[recipe.data].defaults
    found = {name: path for name in recipe.inputs if (path := paths.get(name) or defaults.get(name))}
    if getattr(recipe, "resumed", False) and "student" in found:
        found["student (its fake score)"] = found["student"].parent / FAKE_SCORE
    if getattr(recipe, "resumed_head", False) and "student" in found:
        found["student (its head)"] = found["student"].parent / FAKE_SCORE / HEAD_FILE
    return found
