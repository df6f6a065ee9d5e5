"""A LoRA student of any text-to-image teacher, from `dmd2 data`: what one card holds, and what `/trainings` runs."""

from __future__ import annotations

from dmd2.training.loop import LoopSettings
from dmd2.training.methods.common import Recipe
from dmd2.training.methods.dmd2 import Dmd2Recipe

LORA_RECIPES: dict[str, Recipe] = {
    # DMD2's SDXL LoRA run (2405.14867: rate, rank, alpha, k, guidance), at a batch for one card. Without a
    # GAN, which needs images.
    "lora-dmd2": Dmd2Recipe(
        LoopSettings(iterations=16_000, batch_size=4, warmup=100, max_grad_norm=10.0, ema_decay=0.0),
        lr=5e-5,
        lr_critic=5e-5,
        generator_every=5,
        sigmas=(),
        timesteps=(999, 749, 499, 249),
        guidance_scale=8.0,
        data="latents",
        adapter="lora",
        networks="adapters",
        rank=64,
        alpha=8.0,
    )
}
