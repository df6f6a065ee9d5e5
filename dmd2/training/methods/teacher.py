"""Training a text-to-image teacher from scratch: one phase, denoising."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.diffusion.noise import sample_sigma, seeded_noise
from dmd2.diffusion.sampling import conditioned, sample_dpm_solver_2m, teacher_sigmas
from dmd2.emoji.architecture import build_models
from dmd2.emoji.scenes import EmojiScenes, Scenes, vocabulary
from dmd2.emoji.scores import EmojiClassifier
from dmd2.models.stable_diffusion.codec import LatentCodec
from dmd2.models.stable_diffusion.folder import LICENCE, load_text_to_image, load_vae, save_text_to_image
from dmd2.models.stable_diffusion.text import TextEncoder
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.precision import autocast_dtype
from dmd2.training.loop import Batch, Logs, Method, Phase
from dmd2.training.losses import denoising
from dmd2.training.muon import Muon
from dmd2.training.preview import Preview
from dmd2.training.recipes.kinds import TeacherRecipe
from dmd2.training.run.card import model_card, name_of
from dmd2.weights.manifest import MANIFEST, Teacher, read_manifest


def train_teacher(
    recipe: TeacherRecipe, scenes: EmojiScenes, init: Path, judge: EmojiClassifier | None, device: torch.device
) -> Method:
    """The embedded model's teacher: UNet and both text encoders together, on latents of `init`/vae.

    Empty captions become SDXL's all-zero condition, which is what guidance later takes as unconditional.
    """
    autocast = autocast_dtype(recipe.precision, device)
    codec = LatentCodec(load_vae(init / "vae", device, autocast or torch.float32))
    tokenizer, models = build_models(vocabulary(scenes), recipe.loop.seed)
    if recipe.warm_start:
        loaded = load_text_to_image(init, ["unet_teacher"], device, torch.float32)
        models["unet"].load_state_dict(loaded.denoisers["unet_teacher"].unet.state_dict())
        for name, encoder in zip(("text_encoder", "text_encoder_2"), loaded.encode_text.encoders, strict=True):
            models[name].load_state_dict(encoder.state_dict())
    models.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = Muon(models, recipe.lr, recipe.weight_decay, dtype=autocast or torch.float32)
    size = (scenes.size, scenes.size)

    def parts(modules: Any, compile: bool) -> tuple[StableDiffusion, TextEncoder]:
        unet = StableDiffusion(modules["unet"], recipe.prediction_type, autocast=autocast, compile=compile)
        return unet, TextEncoder([tokenizer, tokenizer], [modules["text_encoder"], modules["text_encoder_2"]])

    denoiser, encode_text = parts(models, recipe.compile)
    preview = Preview(scenes, judge)

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        x0 = codec.encode(batch.data.images)
        sigma = sample_sigma(denoiser.sigmas, len(x0), batch.generator)
        noise = torch.randn(x0.shape, generator=batch.generator).to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            cond = encode_text(batch.data.captions, size)
        return denoising(denoiser, x0, sigma, noise, cond)[0], {}

    def data(step: int) -> Scenes:
        freedom = (step - recipe.still_until) / max(1, recipe.free_from - recipe.still_until)
        return scenes.batch(
            recipe.loop.batch_size, seed=recipe.loop.seed, step=step, freedom=min(1.0, max(0.0, freedom))
        )

    @torch.no_grad()
    def generate(modules: nn.Module | None, captions: list[str], seeds: list[int]) -> Tensor:
        net, encode = parts(modules or models, False)
        cond = encode(captions, size)
        denoise = conditioned(net, cond, cond.unconditional(), recipe.guidance_scale)
        sigmas = teacher_sigmas(net, recipe.sample_steps)
        noise = seeded_noise(seeds, (4, size[0] // codec.factor, size[1] // codec.factor), device)
        x = net.scale_initial_noise(noise, torch.full((len(noise),), sigmas[0], device=device))
        return codec.decode(sample_dpm_solver_2m(denoise, x, sigmas))

    def export(ema_model: nn.Module | None, out: Path) -> None:
        modules: Any = ema_model or models
        save_text_to_image(
            out / "model",
            init,
            unet_subfolder="unet_teacher",
            unet=modules["unet"],
            text=(tokenizer, modules["text_encoder"], modules["text_encoder_2"]),
            prediction_type=recipe.prediction_type,
            recipe=asdict(recipe),
            teacher=Teacher(steps=recipe.sample_steps, guidance_scale=recipe.guidance_scale),
            native_size=size,
            card=model_card(
                "teacher",
                read_manifest(init).licence if (init / MANIFEST).exists() else LICENCE,
                f"A text-to-image teacher: {recipe.sample_steps} steps, guidance {recipe.guidance_scale:g}. "
                f"Its VAE is that of {name_of(init)}.",
                recipe,
            ),
        )

    return Method(
        phases=[Phase("denoising", 1, models, optimizer, loss)],
        data=data,
        ema_model=models,
        sample=lambda ema_model: preview.grid(lambda captions, seeds: generate(ema_model, captions, seeds)),
        score=lambda ema_model: preview.score(lambda captions, seeds: generate(ema_model, captions, seeds)),
        export=export,
    )
