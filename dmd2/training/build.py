"""Recipe → method: the one place that knows which kind of recipe is trained by which function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dmd2.data.images import ImageSet
from dmd2.emoji.scenes import EmojiScenes
from dmd2.emoji.scores import EmojiClassifier
from dmd2.runtime.errors import UserError
from dmd2.runtime.paths import ROOT
from dmd2.runtime.terminal import say
from dmd2.training.distil import distil
from dmd2.training.edm_distil import FAKE_SCORE, EdmSources, distil_edm
from dmd2.training.loop import Method
from dmd2.training.methods.autoencoder import train_autoencoder
from dmd2.training.methods.edm_teacher import train_edm_teacher
from dmd2.training.methods.emoji_classifier import train_classifier
from dmd2.training.methods.image_classifier import train_image_classifier
from dmd2.training.methods.teacher import train_teacher
from dmd2.training.recipes.kinds import (
    NETWORKS,
    AutoencoderRecipe,
    ClassifierRecipe,
    Dmd2Recipe,
    EdmDmd2Recipe,
    EdmDmdRecipe,
    EdmGddRecipe,
    EdmTeacherRecipe,
    ImageClassifierRecipe,
    Recipe,
    TeacherRecipe,
)

EMOJI = ROOT / "weights" / "emoji"
EMOJI_JUDGE = EMOJI / "classifier.safetensors"


INPUTS: dict[type, tuple[str, ...]] = {
    TeacherRecipe: ("data", "init"),
    Dmd2Recipe: ("data", "init"),
    EdmDmdRecipe: ("init", "data", "student", "pairs", "lpips"),
    EdmDmd2Recipe: ("init", "data", "student", "pairs", "lpips"),
    EdmGddRecipe: ("init", "data", "student", "pairs", "lpips"),
}
"""what the results of a recipe depend on; of others, the data alone"""


def inputs_of(recipe: Recipe, paths: Mapping[str, Path | None]) -> dict[str, Path]:
    """Option → path of everything that the results depend on; see `build_method`. The judge only looks on."""
    emoji = isinstance(recipe, AutoencoderRecipe | ClassifierRecipe | TeacherRecipe | Dmd2Recipe)
    defaults = {"data": EMOJI / "emoji.zip", "init": EMOJI} if emoji else {}
    names = INPUTS.get(type(recipe), ("data",))
    found = {name: path for name in names if (path := paths.get(name) or defaults.get(name))}
    if isinstance(recipe, EdmDmd2Recipe) and recipe.resumed and "student" in found:
        found["student (its fake score)"] = found["student"].parent / FAKE_SCORE
    return found


def build_method(recipe: Recipe, paths: dict[str, Path | None], device: torch.device) -> Method:
    """What `recipe` trains.

    Args:
        paths: `data`, `init`, `judge`, `student`, `pairs` and `lpips`, as on the command line; None for
            what it has not said. Recipes of the embedded model have defaults for the first three.

    Raises:
        UserError: a path that this recipe needs is not given, or what is there does not do.
    """

    def path(name: str, default: Path | None = None) -> Path:
        given = paths.get(name) or default
        if given is None:
            raise UserError(f"--{name}: missing; this recipe needs it")
        return given

    match recipe:
        case EdmTeacherRecipe():
            network = NETWORKS[recipe.network]
            images = ImageSet(path("data"), network.resolution, network.classes)
            return train_edm_teacher(recipe, images, device)
        case EdmDmdRecipe() | EdmDmd2Recipe() | EdmGddRecipe():
            given = {name: paths.get(name) for name in ("data", "student", "pairs", "lpips", "judge")}
            return distil_edm(recipe, EdmSources(path("init"), **given), device)
        case ImageClassifierRecipe():
            images = ImageSet(path("data"), classes=len(recipe.classes))
            return train_image_classifier(recipe, images, device)
    return _emoji_method(recipe, path, device)


def _emoji_method(recipe: Recipe, path: Callable[[str, Path], Path], device: torch.device) -> Method:
    scenes = EmojiScenes(path("data", EMOJI / "emoji.zip"))
    init, judge_file = path("init", EMOJI), path("judge", EMOJI_JUDGE)
    judge = EmojiClassifier.load(judge_file, device) if judge_file.is_file() else None
    if judge is None and isinstance(recipe, TeacherRecipe | Dmd2Recipe):
        say(f"--judge {judge_file}: no such file; samples get no scores")
    match recipe:
        case AutoencoderRecipe():
            return train_autoencoder(recipe, scenes, device)
        case ClassifierRecipe():
            return train_classifier(recipe, scenes, device)
        case TeacherRecipe():
            return train_teacher(recipe, scenes, init, judge, device)
        case Dmd2Recipe():
            return distil(recipe, scenes, init, judge, device)
    raise AssertionError(recipe)
