"""The small autoencoder of the embedded model: scenes to latents of 16×16, in `AutoencoderTiny`'s layout.

It finds latents of its own, or takes those of a smaller one: what was trained on them then draws larger images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from dmd2.emoji.scenes import EmojiScenes
from dmd2.models.stable_diffusion.codec import vae_factor
from dmd2.models.stable_diffusion.configs import read_vae_config
from dmd2.models.stable_diffusion.folder import LICENCE, load_vae, save_vae
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.files import atomic_text
from dmd2.runtime.precision import autocast_dtype, training_dtype
from dmd2.training.loop import Batch, Logs, Method, Phase
from dmd2.training.methods.common import Recipe
from dmd2.training.methods.muon import Muon
from dmd2.training.ranges import Stages, Weight, Width
from dmd2.training.run.card import model_card
from dmd2.training.sources import EmojiSource, Inputs
from dmd2.weights.folders import whole_folder


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """The embedded model's autoencoder. See `dmd2/training/methods/autoencoder.py`."""

    channels: Width
    encoder_blocks: Stages
    decoder_blocks: Stages
    """blocks at each resolution, from pixels to latents and from latents to pixels: each stage but an encoder's first
    halves the side, each but a decoder's first doubles it"""
    latent_channels: Literal[4, 8]
    optimizer: Literal["adam", "muon"] = "adam"
    latent_noise: Weight = 0.05
    """standard deviation of the noise on the latents while training"""
    follow: bool = False
    """whether an image's latents are those that the autoencoder in --init finds in it, brought to half the side"""
    kind = "autoencoder"
    shared = False
    data = "emoji"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("data", "init") if self.follow else ("data",)

    def conflict(self) -> str | None:
        if len(self.decoder_blocks) != len(self.encoder_blocks):
            found, wanted = len(self.decoder_blocks), len(self.encoder_blocks)
            return f"decoder_blocks: {found} stages; expected {wanted}, as encoder_blocks has"
        return None

    @property
    def factor(self) -> int:
        """Pixels along a latent's side."""
        return int(2 ** (len(self.encoder_blocks) - 1))

    def method(self, inputs: Inputs) -> Method:
        scenes = EmojiScenes(inputs.with_defaults(EmojiSource.defaults).need("data"))
        smaller = _smaller(self, inputs.need("init") / "vae", inputs.device) if self.follow else None
        return train_autoencoder(self, scenes, inputs.device, smaller)


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderTiny:
    """An untrained autoencoder, initialised from `recipe.loop.seed`."""
    torch.manual_seed(recipe.loop.seed)
    stages = len(recipe.encoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=(recipe.channels,) * stages,
        decoder_block_out_channels=(recipe.channels,) * stages,
        num_encoder_blocks=recipe.encoder_blocks,
        num_decoder_blocks=recipe.decoder_blocks,
        latent_channels=recipe.latent_channels,
    )


def _smaller(recipe: AutoencoderRecipe, folder: Path, device: torch.device) -> AutoencoderTiny:
    """The autoencoder to follow.

    Raises:
        InvalidInput: its latents are not the ones that the recipe's would have, of an image of half the side.
    """
    config = read_vae_config(folder)
    found = config["_class_name"], config.get("latent_channels"), vae_factor(config)
    wanted = "AutoencoderTiny", recipe.latent_channels, recipe.factor // 2
    if found != wanted:
        said, expected = ("{}, {} channels, {} pixels to a latent".format(*values) for values in (found, wanted))
        raise InvalidInput("init", f"its VAE is {said}; expected {expected}, whose latents this recipe takes")
    return load_vae(folder, device, torch.float32).to(memory_format=torch.channels_last)


def train_autoencoder(
    recipe: AutoencoderRecipe, scenes: EmojiScenes, device: torch.device, smaller: AutoencoderTiny | None = None
) -> Method:
    """Reconstruction (L1, L1 of differences, L2) from slightly noisy latents.

    The noise makes the latent space smooth, which is what a diffusion model needs of it. Latents of its own are
    pulled towards N(0, 1) (zero mean and unit variance per channel), which makes `scaling_factor` 1; with `smaller`,
    the encoder learns that one's latents and the decoder learns from them.
    """
    model = build_autoencoder(recipe).to(device, memory_format=torch.channels_last)
    autocast = autocast_dtype(recipe.precision, device)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "muon":
        optimizer = Muon(model, recipe.lr, weight_decay=0.0, dtype=training_dtype(recipe.precision, device))
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    def images(data: Tensor) -> Tensor:
        x = data.to(device).float() / 127.5 - 1
        return x.contiguous(memory_format=torch.channels_last)

    def encode(net: Any, x: Tensor) -> Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return net.encoder(x).float()

    def decode(net: Any, z: Tensor) -> Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return net.decoder(z).float()

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        x = images(batch.data.images)
        z = encode(model, x)
        noise = recipe.latent_noise * torch.randn(z.shape, generator=batch.generator).to(device)
        if smaller is None:
            y = decode(model, z + noise)
            ours = 0.01 * (z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean())
            logs = {"moments": 100 * ours.detach()}
        else:
            with torch.no_grad():
                wanted = encode(smaller, F.avg_pool2d(x, 2))
            y = decode(model, wanted + noise)
            ours = (z - wanted).square().mean()
            logs = {"latents": ours.detach()}
        error = y - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        total = error.abs().mean() + 0.5 * edges + error.square().mean() + ours
        return total, {"psnr": psnr(error.detach()), **logs}

    @torch.no_grad()
    def sample(ema_model: nn.Module | None) -> Tensor:
        x = images(scenes.batch(24, seed=1, step=0, split="all").images)
        net = ema_model or model
        y = decode(net, encode(net, x))
        rows = torch.cat([x, y.clamp(-1, 1)], dim=2)  # each image above its reconstruction
        return ((rows + 1) * 127.5).round().byte().permute(1, 2, 0, 3).flatten(2)

    @torch.no_grad()
    def score(ema_model: nn.Module | None) -> dict[str, float]:
        x = images(scenes.batch(256, seed=2, step=0, split="held-out").images)
        net = ema_model or model
        z = encode(net, x)
        y = decode(net, z)
        return {"psnr": float(psnr(y.clamp(-1, 1) - x)), "latent_std": float(z.std())}

    def export(ema_model: nn.Module | None, out: Path) -> None:
        net = ema_model or model
        assert isinstance(net, AutoencoderTiny)
        with whole_folder(out / "model") as new:
            save_vae(net, new / "vae", asdict(recipe))
            side, channels = scenes.size, recipe.latent_channels
            latents = f"{side // recipe.factor}×{side // recipe.factor}×{channels} latents"
            text = f"The embedded model's autoencoder, an AutoencoderTiny: {side}×{side} pixels to {latents}."
            atomic_text(new / "README.md", model_card("VAE", LICENCE, text, recipe))

    return Method(
        phases=[Phase("autoencoder", 1, model, optimizer, loss)],
        data=lambda step: scenes.batch(recipe.loop.batch_size, seed=recipe.loop.seed, step=step, split="every"),
        ema_model=model,
        sample=sample,
        score=score,
        export=export,
    )


def psnr(error: Tensor) -> Tensor:
    """Mean peak signal-to-noise ratio in dB of (B, 3, H, W) errors of images in [−1, 1]."""
    return (10 * torch.log10(4 / error.square().mean((1, 2, 3)).clamp_min(1e-10))).mean()
