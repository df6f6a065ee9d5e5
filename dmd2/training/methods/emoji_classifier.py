"""The judge of the embedded model: which emoji, and on which background, a 64×64 image shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.emoji.classifier import Classifier
from dmd2.emoji.scenes import BACKGROUNDS, EmojiScenes
from dmd2.evaluation.classifiers import save_classifier_file
from dmd2.runtime.precision import autocast_dtype
from dmd2.training.loop import Batch, Logs, Method, Phase
from dmd2.training.methods.common import Recipe
from dmd2.training.ranges import Blur, Part, Width
from dmd2.training.sources import EmojiSource, Inputs


@dataclass(frozen=True)
class EmojiClassifierRecipe(Recipe):
    """The judge that scores the embedded model. See `dmd2/training/methods/emoji_classifier.py`."""

    weight_decay: Part
    widths: tuple[Width, Width, Width, Width]
    """channels at 1/2, 1/4, 1/8 and 1/16 of the image's side"""
    features: Width
    contrast: Part
    brightness: Part
    noise: Part
    """contrast: largest relative change; the other two: in units of images in [−1, 1], at most"""
    blur_pixels: Blur
    """largest standard deviation of the blur"""
    kind = "classifier"
    data = "emoji"

    def method(self, inputs: Inputs) -> Method:
        return train_classifier(
            self, EmojiScenes(inputs.with_defaults(EmojiSource.defaults).need("data")), inputs.device
        )


def build_classifier(recipe: EmojiClassifierRecipe, emoji: int) -> Classifier:
    """An untrained classifier of `emoji` emoji and the backgrounds, initialised from `recipe.loop.seed`."""
    torch.manual_seed(recipe.loop.seed)
    return Classifier(emoji, len(BACKGROUNDS), recipe.widths, recipe.features)


def train_classifier(recipe: EmojiClassifierRecipe, scenes: EmojiScenes, device: torch.device) -> Method:
    """Cross-entropy of both heads, on blurred, dimmed and noisy scenes of every pair, held out or not.

    A judge must know the pairs that the judged has never seen, and must not stumble over the slight blur and
    noise of generated images. `export` writes `classifier.safetensors` in fp16.
    """
    model = build_classifier(recipe, len(scenes)).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )

    def images(data: Tensor) -> Tensor:
        return data.to(device).float() / 127.5 - 1

    autocast = autocast_dtype(recipe.precision, device)

    def logits(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            emoji, background = net(x)
        return emoji.float(), background.float()

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        x = augment(images(batch.data.images), recipe, batch.generator)
        truth, ground = batch.data.emoji.to(device), batch.data.background.to(device)
        emoji, background = logits(model, x)
        first, second = F.cross_entropy(emoji, truth), F.cross_entropy(background, ground)
        right = (emoji.detach().argmax(1) == truth).float().mean()
        return first + second, {"emoji": first.detach(), "background": second.detach(), "top1": right}

    @torch.no_grad()
    def score(ema_model: nn.Module | None) -> dict[str, float]:
        net = ema_model or model
        before = net.training
        net.eval()
        fresh = [scenes.batch(256, seed=recipe.loop.seed + 1, step=step, split="every") for step in range(4)]
        answers = [logits(net, images(batch.images)) for batch in fresh]
        net.train(before)
        emoji, background = (torch.cat(parts).argmax(1).cpu() for parts in zip(*answers, strict=True))
        return {
            "top1": float((emoji == torch.cat([batch.emoji for batch in fresh])).float().mean()),
            "background": float((background == torch.cat([batch.background for batch in fresh])).float().mean()),
        }

    def export(ema_model: nn.Module | None, out: Path) -> None:
        net = ema_model or model
        assert isinstance(net, Classifier)
        save_classifier(net, recipe, scenes, out / "classifier.safetensors")

    return Method(
        phases=[Phase("classifier", 1, model, optimizer, loss)],
        data=lambda step: scenes.batch(recipe.loop.batch_size, seed=recipe.loop.seed, step=step, split="every"),
        ema_model=model,
        score=score,
        export=export,
    )


def save_classifier(model: Classifier, recipe: EmojiClassifierRecipe, scenes: EmojiScenes, path: Path) -> None:
    """See `dmd2.evaluation.classifiers`."""
    config = {
        "emoji": scenes.names,
        "backgrounds": list(BACKGROUNDS),
        "widths": recipe.widths,
        "features": recipe.features,
        "size": scenes.size,
    }
    save_classifier_file(model, "emoji", config, path)


def augment(x: Tensor, recipe: EmojiClassifierRecipe, generator: torch.Generator) -> Tensor:
    """Images, float (B, 3, H, W) in [−1, 1]: half of them blurred, each dimmed and noisy in its own way."""
    n = len(x)
    u_contrast, u_brightness, u_noise, u_blur = torch.rand(4, n, 1, 1, 1, generator=generator).to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    half = n // 2
    x = torch.cat([blur(x[:half], recipe.blur_pixels * u_blur[:half]), x[half:]])
    x = x * (1 + recipe.contrast * (2 * u_contrast - 1)) + recipe.brightness * (2 * u_brightness - 1)
    return x + recipe.noise * u_noise * noise


def blur(x: Tensor, sigma_pixels: Tensor) -> Tensor:
    """Gaussian blur of (B, C, H, W) images, each with its own standard deviation (B, 1, 1, 1); 7 taps."""
    n, _, height, width = x.shape
    taps = torch.arange(-3, 4, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma_pixels.view(n, 1).clamp_min(1e-3)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    weights = kernel[:, :, None, None, None].unbind(1)
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")
    x = torch.stack([weight * x[..., i : i + width] for i, weight in enumerate(weights)]).sum(0)
    return torch.stack([weight * x[..., i : i + height, :] for i, weight in enumerate(weights)]).sum(0)
