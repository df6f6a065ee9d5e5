"""EDM's training of a teacher in pixel space (Karras et al. 2022, sec. 5 and app. F.3): one phase, denoising."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.data.augment import AUGMENT_DIM, augment
from dmd2.data.images import ImageSet
from dmd2.diffusion.noise import add_noise, per_image
from dmd2.diffusion.sampling import conditioned, sample_heun, teacher_sigmas
from dmd2.models.edm.folder import heun_steps, save_edm
from dmd2.models.edm.network import Edm, EdmNetwork, RgbCodec
from dmd2.runtime.errors import UserError
from dmd2.runtime.precision import training_dtype
from dmd2.training.loop import Batch, Logs, Method, Phase
from dmd2.training.muon import Muon
from dmd2.training.preview import ClassPreview
from dmd2.training.recipes.kinds import NETWORKS, EdmTeacherRecipe
from dmd2.training.run.card import model_card

P_MEAN, P_STD = -1.2, 1.2  # ln σ ~ N(P_mean, P_std²) (Karras et al. 2022, table 1)
LICENCE = "not stated: trained on data of your own choice"


def edm_loss(
    network: Any, x0: Tensor, labels: Tensor, augment_labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    """λ(σ)·‖D(x0 + σ·n; σ) − x0‖² per pixel, mean over the batch (Karras et al. 2022, eq. 2, with table 1's λ and σ).

    Args:
        network: an `EdmNetwork`, perhaps compiled.
        x0: (B, C, R, R) images in [−1, 1].
        labels: (B, classes) one-hot.
        augment_labels: (B, augment_dim), or None.
    """
    sigma = (torch.randn(len(x0), generator=generator) * P_STD + P_MEAN).exp().to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    prediction, _ = network(add_noise(x0, sigma, noise), sigma, labels, augment_labels)
    weight = sigma**-2 + network.config.sigma_data**-2  # (σ² + σ_data²) / (σ·σ_data)²
    return (per_image(weight, x0) * (prediction - x0) ** 2).mean()


def train_edm_teacher(recipe: EdmTeacherRecipe, images: ImageSet, device: torch.device) -> Method:
    """An EDM network from scratch on `images`, of its resolution and classes.

    Augmented images come with labels that say what was done to them. Samples, here and later, are made without any,
    which means "nothing was done", so that augmentation never shows in them.

    Raises:
        UserError: the recipe augments, and its network cannot be told.
    """
    config = NETWORKS[recipe.network]
    if recipe.augment > 0 and config.augment_dim != AUGMENT_DIM:
        raise UserError(f"--set augment={recipe.augment}: {recipe.network} has no {AUGMENT_DIM} inputs to be told by")
    torch.manual_seed(recipe.loop.seed)
    dtype = training_dtype(recipe.precision, device)
    network = EdmNetwork(config, dtype).to(device)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "muon":
        optimizer = Muon(network, recipe.lr, weight_decay=0.0, dtype=dtype)
    else:
        optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr, betas=(0.9, 0.999), fused=True)
    codec, preview = RgbCodec(), ClassPreview(config, recipe.class_names)
    compiled = torch.compile(network) if recipe.compile else network

    def data(step: int) -> tuple[Tensor, Tensor]:
        rows = images.batch(recipe.loop.batch_size, recipe.loop.seed, step)
        return images.images(rows), images.one_hot(rows, config.classes)

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples, labels = (part.to(device) for part in batch.data)
        x0, augment_labels = codec.encode(samples), None
        if recipe.augment > 0:
            x0, augment_labels = augment(x0, recipe.augment, batch.generator)
        return edm_loss(compiled, x0, labels, augment_labels, batch.generator), {}

    @torch.no_grad()
    def sample(ema_model: nn.Module | None) -> Tensor:
        denoiser = Edm(_edm(ema_model or network))
        noise, cond = preview.inputs(device)
        sigmas = teacher_sigmas(denoiser, heun_steps(config))
        x = denoiser.scale_initial_noise(noise[:, 0], torch.full((len(noise),), sigmas[0], device=device))
        return preview.grid(codec.decode(sample_heun(conditioned(denoiser, cond), x, sigmas)))

    def export(ema_model: nn.Module | None, out: Path) -> None:
        save_edm(
            out / "model",
            _edm(ema_model or network),
            name=recipe.network,
            licence=LICENCE,
            recipe=asdict(recipe),
            class_names=recipe.class_names,
            card=model_card("teacher", LICENCE, f"EDM's network {recipe.network}, trained from scratch.", recipe),
        )

    network.train()
    return Method([Phase("denoising", 1, network, optimizer, loss)], data, network, sample, None, export)


def _edm(module: nn.Module) -> EdmNetwork:
    assert isinstance(module, EdmNetwork)
    return module
