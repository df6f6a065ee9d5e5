"""Distilling the embedded model: loads a teacher, wires DMD2's phases, shows and exports the student."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.emoji.architecture import trainable_attention
from dmd2.emoji.scenes import EmojiScenes
from dmd2.emoji.scores import EmojiClassifier
from dmd2.models.stable_diffusion.folder import load_text_to_image, save_text_to_image
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.errors import UserError
from dmd2.runtime.precision import autocast_dtype
from dmd2.training.discriminators.head import ClassifierHead
from dmd2.training.loop import Method
from dmd2.training.methods.dmd2 import Dmd2Settings, Networks, Samples, dmd2_phases
from dmd2.training.preview import Preview
from dmd2.training.recipes.kinds import Dmd2Recipe
from dmd2.training.run.card import model_card, name_of
from dmd2.weights.manifest import Student, read_manifest


def distil(
    recipe: Dmd2Recipe, scenes: EmojiScenes, init: Path, judge: EmojiClassifier | None, device: torch.device
) -> Method:
    """DMD2 on the teacher in `init`. Student and fake score start from it, or the student from `recipe.student_init`.

    Raises:
        UserError: `init` has no teacher.
    """
    manifest = read_manifest(init)
    if manifest.teacher is None:
        raise UserError(f"--init {init}: holds no teacher; `dmd2 train emoji-teacher` makes one")
    teacher_folder = manifest.teacher.subfolder
    student_folder = recipe.student_init or teacher_folder
    loaded = load_text_to_image(init, list({teacher_folder, student_folder}), device, torch.float32)
    autocast = autocast_dtype(recipe.precision, device)

    def denoiser(module: nn.Module, compile: bool = recipe.compile) -> StableDiffusion:
        like = loaded.denoisers[teacher_folder]
        return StableDiffusion(module, like.prediction_type, like.table, autocast=autocast, compile=compile)

    teacher = loaded.denoisers[teacher_folder].unet
    for loaded_denoiser in loaded.denoisers.values():
        trainable_attention(loaded_denoiser.unet)
    student = deepcopy(loaded.denoisers[student_folder].unet).train()
    fake = deepcopy(teacher).train()
    torch.manual_seed(recipe.loop.seed)
    side = scenes.size // loaded.codec.factor
    channels = fake.config.block_out_channels[-1]
    bottleneck = side // 2 ** (len(fake.config.block_out_channels) - 1)
    head = ClassifierHead(channels, bottleneck).to(device) if recipe.gan_critic > 0 else None
    critic = nn.ModuleDict({"unet": fake} | ({"head": head} if head else {}))

    table = loaded.denoisers[teacher_folder].sigmas
    sigmas = tuple(float(table[t]) for t in recipe.timesteps)
    settings = Dmd2Settings(
        student_sigmas=sigmas,
        guidance_scale=recipe.guidance_scale,
        generator_every=recipe.generator_every,
        gan_generator=recipe.gan_generator,
        gan_critic=recipe.gan_critic,
    )
    optimizers = tuple(
        torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        for module, lr in ((student, recipe.lr), (critic, recipe.lr_critic))
    )
    size = (scenes.size, scenes.size)
    n = recipe.loop.batch_size

    @torch.no_grad()
    def data(step: int) -> Samples:
        # One caption in ten is empty: a student is never asked for "no text", so more are drawn than are kept.
        batch = scenes.batch(n + n // 2, seed=recipe.loop.seed + 1, step=step)
        kept = [i for i, caption in enumerate(batch.captions) if caption][:n]
        cond = loaded.encode_text([batch.captions[i] for i in kept], size)
        real = loaded.codec.encode(batch.images[kept]) if head else None
        return Samples((len(kept), 4, side, side), cond, cond.unconditional(), real, cond)

    @torch.no_grad()
    def generate(module: nn.Module | None, captions: list[str], seeds: list[int]) -> Tensor:
        net = denoiser(module or student, compile=False)
        noise = seeded_noise(seeds, (len(sigmas), 4, side, side), device)
        denoise = conditioned(net, loaded.encode_text(captions, size))
        return loaded.codec.decode(sample_few_step(denoise, net.scale_initial_noise, noise.unbind(1), sigmas))

    def export(ema_model: nn.Module | None, out: Path) -> None:
        subfolder = "unet" if len(sigmas) == 4 else f"unet_{len(sigmas)}step"
        save_text_to_image(
            out / "model",
            init,
            unet_subfolder=subfolder,
            unet=ema_model or student,
            prediction_type=loaded.denoisers[teacher_folder].prediction_type,
            recipe=asdict(recipe),
            student=(len(sigmas), Student(subfolder=subfolder, timesteps=list(recipe.timesteps))),
            native_size=size,
            card=model_card(
                f"{len(sigmas)}-step student",
                manifest.licence,
                f"Distilled by DMD2 from the teacher of {name_of(init)}, which is in `{teacher_folder}`. The student "
                f"is in `{subfolder}`, for the timesteps {', '.join(map(str, recipe.timesteps))}; it began as "
                f"`{student_folder}`.",
                recipe,
            ),
        )

    preview = Preview(scenes, judge)
    networks = Networks(denoiser(student), denoiser(teacher), denoiser(fake), head)
    return Method(
        phases=dmd2_phases(networks, settings, (student, critic), (optimizers[0], optimizers[1]), lambda b: b.data),
        data=data,
        ema_model=student,
        sample=lambda ema_model: preview.grid(lambda captions, seeds: generate(ema_model, captions, seeds)),
        score=lambda ema_model: preview.score(lambda captions, seeds: generate(ema_model, captions, seeds)),
        export=export,
    )
