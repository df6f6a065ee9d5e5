"""Recipe → method: the one place that knows which kind of recipe is trained by which function."""

from __future__ import annotations

from pathlib import Path

import torch

from dmd2.evaluation import EmojiJudge
from dmd2.recipes import AutoencoderRecipe, ClassifierRecipe, Dmd2Recipe, Recipe, TeacherRecipe
from dmd2.training.autoencoder import train_autoencoder
from dmd2.training.classifier import train_classifier
from dmd2.training.data import EmojiScenes
from dmd2.training.distil import distil
from dmd2.training.loop import Method
from dmd2.training.teacher import train_teacher


def build_method(
    recipe: Recipe, scenes: EmojiScenes, init: Path, judge: EmojiJudge | None, device: torch.device
) -> Method:
    """What `recipe` trains.

    Args:
        scenes: the data.
        init: folder of weights in diffusers' layout to start from: a teacher needs its `vae`, a student its teacher.
        judge: scores the samples while training; None for no scores.
    """
    match recipe:
        case AutoencoderRecipe():
            return train_autoencoder(recipe, scenes, device)
        case ClassifierRecipe():
            return train_classifier(recipe, scenes, device)
        case TeacherRecipe():
            return train_teacher(recipe, scenes, init, judge, device)
        case Dmd2Recipe():
            return distil(recipe, scenes, init, judge, device)
