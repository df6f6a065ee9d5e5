"""The embedded model's autoencoder: latents of its own, or those of a smaller one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dmd2.emoji.scenes import EmojiScenes
from dmd2.models.stable_diffusion.folder import load_vae
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.paths import EMOJI
from dmd2.training.loop import Method, train
from dmd2.training.methods.autoencoder import AutoencoderRecipe, build_autoencoder
from dmd2.training.recipes import RECIPES, build_method

CPU = torch.device("cpu")
DATA = EMOJI / "emoji.zip"


def enlarged(**changes: object) -> AutoencoderRecipe:
    recipe = RECIPES["emoji-vae-enlarged"]
    assert isinstance(recipe, AutoencoderRecipe)
    loop = replace(recipe.loop, iterations=60, batch_size=4, warmup=0, ema_decay=0.9)
    small = replace(recipe, loop=loop, channels=8, encoder_blocks=(0, 0, 1, 1), decoder_blocks=(1, 1, 1, 0))
    return replace(small, precision="fp32", **changes)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder of four pixels to a latent, whose latents are nothing like those of another."""
    folder = tmp_path_factory.mktemp("smaller")
    build_autoencoder(enlarged(encoder_blocks=(0, 0, 1), decoder_blocks=(1, 1, 0))).save_pretrained(folder / "vae")
    return folder


def made(recipe: AutoencoderRecipe, data: Path, init: Path) -> Method:
    return build_method(recipe, {"data": data, "init": init}, CPU)


def test_an_enlarged_one_finds_in_an_image_the_latents_of_its_half(smaller: Path, tmp_path: Path) -> None:
    recipe, scenes = enlarged(), EmojiScenes(DATA)
    assert recipe.inputs == ("data", "init") and replace(recipe, follow=False).inputs == ("data",)
    train(made(recipe, DATA, smaller), recipe.loop, tmp_path / "run")
    found = load_vae(tmp_path / "run" / "model" / "vae", CPU, torch.float32)
    theirs = load_vae(smaller / "vae", CPU, torch.float32)
    images = scenes.batch(16, seed=5, step=0, split="all").images.float() / 127.5 - 1
    with torch.no_grad():
        wanted = theirs.encoder(F.avg_pool2d(images, 2))
        before = (build_autoencoder(recipe).encoder(images) - wanted).square().mean()
        after = (found.encoder(images) - wanted).square().mean()
    side = scenes.size // 8
    assert wanted.shape == (16, 4, side, side) and after < 0.5 * before


def test_one_of_other_latents_cannot_be_followed(smaller: Path, emoji_zip: Path) -> None:
    for changes, said in (
        ({"latent_channels": 8}, "expected AutoencoderTiny, 8 channels, 4 pixels to a latent"),
        ({"encoder_blocks": (0, 1), "decoder_blocks": (1, 0)}, "4 pixels to a latent; expected .* 1 pixels"),
    ):
        with pytest.raises(InvalidInput, match=f"its VAE is AutoencoderTiny, 4 channels.*{said}") as error:
            made(enlarged(**changes), emoji_zip, smaller)
        assert error.value.field == "init"
