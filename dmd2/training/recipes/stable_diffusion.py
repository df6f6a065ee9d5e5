"""Recipes of SD 1.5 and SDXL: DMD's and DMD2's published rows, and such as one card holds. Nobody has run these here.

`--prompts` is a file of prompts, `--data` real images with captions where there is a GAN; with `--set data=latents`
both are what `dmd2 data` made of them, and neither text encoders nor VAE are on the device.
"""

from __future__ import annotations

from typing import Any

from dmd2.training.loop import LoopSettings
from dmd2.training.methods.common import Recipe
from dmd2.training.methods.dmd import DmdRecipe
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.methods.regression import RegressionRecipe
from dmd2.training.recipes.edm import dmd_loop

_TEXT: dict[str, Any] = {"data": "prompts", "sigmas": ()}
_ONE: dict[str, Any] = {**_TEXT, "timesteps": (999,)}
_SDXL_ONE: dict[str, Any] = {**_TEXT, "timesteps": (399,)}
_FOUR: dict[str, Any] = {**_TEXT, "timesteps": (999, 749, 499, 249)}
_SDXL: dict[str, Any] = {"generator_every": 5, "guidance_scale": 8.0, "gan_generator": 5e-3, "gan_critic": 1e-2}
_SD15: dict[str, Any] = {"generator_every": 10, "guidance_scale": 1.75}
_DMD: dict[str, Any] = {"regression_weight": 0.25, "pairs_batch": 1152, "decoder": "tiny"}
_LORA: dict[str, Any] = {"adapter": "lora", "rank": 64, "alpha": 8.0, "lr": 5e-5, "lr_critic": 5e-5}
_ONE_CARD: dict[str, Any] = {**_LORA, "networks": "adapters", "checkpointing": True}


def _one_card(iterations: int) -> LoopSettings:
    """Sixteen images an update, one at a time."""
    return LoopSettings(
        iterations,
        batch_size=1,
        grad_accum_steps=16,
        warmup=100,
        decay=False,
        max_grad_norm=10.0,
        ema_decay=0.999,
        checkpoint_every=250,
    )


STABLE_DIFFUSION_RECIPES: dict[str, Recipe] = {
    # DMD (Yin et al. 2311.18828, app. B). COCO-30k FID 11.49 and 14.93.
    # --pairs: 500,000 by `dmd2 data pairs --solver pndm --steps 50 --guidance 3`
    "sd15-dmd": DmdRecipe(dmd_loop(20_000, 2304), lr=1e-5, lr_critic=1e-5, guidance_scale=3.0, **_DMD, **_ONE),
    # --pairs: 12 million, at guidance 8. The highest level for the gradient goes from 980 down to 500; how is not
    # said, here linearly. Nor are the batch and the iterations of this run: those of the one before.
    "sd15-dmd-cfg8": DmdRecipe(
        dmd_loop(20_000, 2304), lr=1e-5, lr_critic=1e-5, guidance_scale=8.0, dm_highest_end=0.5, **_DMD, **_ONE
    ),
    # DMD2 (Yin et al. 2405.14867). COCO-30k FID 9.28, then 8.35.
    "sd15-dmd2": Dmd2Recipe(dmd_loop(39_000, 2048), lr=1e-5, lr_critic=1e-5, **_SD15, **_ONE),
    # --student: model/ of a run of sd15-dmd2; its fake_score/ goes on, too, and the head is new
    "sd15-dmd2-gan": Dmd2Recipe(
        dmd_loop(2_000, 2048),
        lr=5e-7,
        lr_critic=5e-7,
        gan_generator=1e-3,
        gan_critic=1e-2,
        resumed=True,
        **_SD15,
        **_ONE,
    ),
    # --pairs: 10,000 by `dmd2 data pairs --solver euler-trailing --guidance 8`. The paper does not state the batch.
    "sdxl-regression": RegressionRecipe(dmd_loop(2_000, 128), lr=1e-5, decoder="tiny", **_SDXL_ONE),
    # --student: model/ of a run of sdxl-regression; the fake score begins as the teacher. FID 19.01
    "sdxl-dmd2-1step": Dmd2Recipe(
        dmd_loop(24_000, 128), lr=5e-7, lr_critic=5e-7, pretrained=True, **_SDXL, **_SDXL_ONE
    ),
    # FID 19.32
    "sdxl-dmd2-4step": Dmd2Recipe(dmd_loop(19_000, 128), lr=5e-7, lr_critic=5e-7, **_SDXL, **_FOUR),
    # FID 19.68. The fake score is trained whole; one rate is published for both.
    "sdxl-dmd2-4step-lora": Dmd2Recipe(dmd_loop(16_000, 128), **_LORA, **_SDXL, **_FOUR),
    # Ours, for one card: one frozen network, student and fake score as LoRAs on it. How good that gets is not known.
    "sd15-dmd2-low-memory": Dmd2Recipe(_one_card(16_000), **_ONE_CARD, **_SD15 | {"generator_every": 5}, **_ONE),
    "sdxl-dmd2-1step-low-memory": Dmd2Recipe(_one_card(16_000), **_ONE_CARD, **_SDXL, **_SDXL_ONE),
    "sdxl-dmd2-4step-low-memory": Dmd2Recipe(_one_card(16_000), **_ONE_CARD, **_SDXL, **_FOUR),
}
