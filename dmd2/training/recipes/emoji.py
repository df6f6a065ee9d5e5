"""Recipes of the embedded model: its autoencoder, its classifier, its teacher and its students."""

from __future__ import annotations

from dataclasses import replace

from dmd2.training.loop import LoopSettings
from dmd2.training.methods.autoencoder import AutoencoderRecipe
from dmd2.training.methods.classifier import EmojiClassifierRecipe
from dmd2.training.methods.common import Recipe
from dmd2.training.methods.denoising import DenoisingRecipe
from dmd2.training.methods.dmd2 import Dmd2Recipe

# Not compiled: in runs as short as these, compiling five graphs costs what it saves. A GAN heavier than
# the papers' keeps the images as varied as the data. Guidance as when the teacher samples: students of
# 1.5 that went on with 3 and then 2 had more right shapes, and a little more FD (weights/emoji/README.md).
FOUR_STEPS = Dmd2Recipe(
    LoopSettings(3200, batch_size=24, warmup=30, ema_decay=0.99, sample_every=200, checkpoint_every=100),
    lr=1e-4,
    lr_critic=2e-4,
    data="emoji",
    beta2=0.99,
    sigmas=(),
    timesteps=(999, 749, 499, 249),
    guidance_scale=2.0,
    generator_every=3,
    gan_generator=3e-2,
    gan_critic=3e-2,
)

VAE = AutoencoderRecipe(
    LoopSettings(3000, batch_size=32, warmup=100, ema_decay=0.995),
    lr=2e-3,
    optimizer="muon",
    channels=32,
    encoder_blocks=(0, 1, 2, 4),
    decoder_blocks=(4, 3, 3, 0),
    latent_channels=8,
    latent_noise=0.1,
)

JUDGE = EmojiClassifierRecipe(
    LoopSettings(3000, batch_size=64, warmup=300, max_grad_norm=5.0, ema_decay=0.99),
    lr=3e-3,
    weight_decay=0.05,
    widths=(32, 64, 128, 256),
    features=128,
    contrast=0.1,
    brightness=0.08,
    noise=0.08,
    blur_pixels=1.5,
)

# `scripts/reproduce-emoji` runs these one after the other.
EMOJI_RECIPES: dict[str, Recipe] = {
    "emoji-vae": VAE,
    # Draws at 128×128 what was learned at 64×64: scripts/enlarge-emoji puts it into weights of that size.
    "emoji-vae-enlarged": replace(
        VAE,
        loop=replace(VAE.loop, iterations=4000, batch_size=16, checkpoint_every=200),
        encoder_blocks=(0, 0, 1, 4),
        decoder_blocks=(8, 5, 1, 0),
        latent_channels=4,
        follow=True,
    ),
    "emoji-classifier": JUDGE,
    # A second opinion: another network, begun elsewhere, that learns from rougher images.
    # No student is ever trained or chosen by it.
    "emoji-second-opinion": replace(
        JUDGE,
        loop=replace(JUDGE.loop, seed=1),
        widths=(48, 64, 96, 192),
        features=96,
        contrast=0.3,
        brightness=0.2,
        noise=0.15,
        blur_pixels=2.0,
    ),
    # v-prediction, unlike SDXL's eps: at t = 999 an eps error is multiplied by σ = 14.6 on its way to x0, which
    # a small network in bf16 feels; the UNet, the schedule and all code paths are the same.
    "emoji-teacher": DenoisingRecipe(
        LoopSettings(8000, batch_size=128, warmup=100, sample_every=1000, checkpoint_every=100),
        network="emoji",
        data="emoji",
        optimizer="muon",
        lr=1e-3,
        weight_decay=0.01,
        guidance_scale=2.0,
        sample_steps=25,
        prediction_type="v_prediction",
        still_until=1500,
        free_from=4000,
        lessons=1000,
        compile=True,
    ),
    "emoji-dmd2-4step": FOUR_STEPS,
    # Starts from the 4-step student, whose first step is a one-step generator already; v-prediction makes
    # t = 999 as good a place to start from as SDXL's t = 399.
    "emoji-dmd2-1step": replace(
        FOUR_STEPS, loop=replace(FOUR_STEPS.loop, iterations=3000), timesteps=(999,), student_init="unet"
    ),
}
