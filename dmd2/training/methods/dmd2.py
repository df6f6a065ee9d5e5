"""DMD2 (Yin et al. 2405.14867): distribution matching on two time scales, GAN, backward simulation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dmd2.diffusion.denoiser import cfg_denoise
from dmd2.diffusion.noise import add_noise, sample_sigma
from dmd2.runtime.precision import Precision
from dmd2.training.discriminators.head import critic_loss, new_head, noised_logits
from dmd2.training.distil import DISTILLATION_INPUTS, distil
from dmd2.training.loop import Batch, Logs, LoopSettings, Method, Phase
from dmd2.training.losses import distribution_matching, distribution_matching_gradient, gan_generator
from dmd2.training.methods.common import Kit, Networks, OptimizerName, Samples, SharedImages, generate
from dmd2.training.ranges import (
    Count,
    DataName,
    Decay,
    Folder,
    Levels,
    Rate,
    Timesteps,
    Weight,
    gan_conflict,
    levels_conflict,
)
from dmd2.training.sources import Inputs


@dataclass(frozen=True)
class Dmd2Recipe:
    """A student of one step or several by DMD2."""

    loop: LoopSettings
    lr: Rate
    lr_critic: Rate
    generator_every: Count
    """k of the two time scales"""
    gan_generator: Weight = 0.0
    gan_critic: Weight = 0.0
    """weights of the GAN losses; 0 and 0 is no GAN"""
    resumed: bool = False
    """whether student and fake score go on from the run of --student instead of from the teacher's weights"""
    sigmas: Levels = (80.0,)
    timesteps: Timesteps = ()
    """of the student's steps, descending; σ for EDM's teachers, timesteps for Stable Diffusion's, the other empty"""
    guidance_scale: Weight = 1.0
    """the teacher's"""
    student_init: Folder | None = None
    """subfolder of the weights that the student starts from; None: the teacher's"""
    optimizer: OptimizerName = "adamw"
    beta2: Decay = 0.999
    data: DataName = "images"
    precision: Precision = "auto"
    compile: bool = False
    inputs: ClassVar = DISTILLATION_INPUTS
    kind = "dmd2"
    pairs_batch: ClassVar = 0
    paired: ClassVar = False
    keeps_fake_score: ClassVar = True

    @property
    def needs_images(self) -> bool:
        return self.gan_critic > 0

    def conflict(self) -> str | None:
        return levels_conflict(self) or gan_conflict(self.gan_generator, self.gan_critic)

    def method(self, inputs: Inputs) -> Method:
        return distil(self, inputs)

    def phases(self, kit: Kit) -> list[Phase]:
        head = new_head(kit.family).to(kit.inputs.device) if self.gan_critic > 0 else None
        critic = nn.ModuleDict({"network": kit.fake_score} | ({"head": head} if head else {}))
        return dmd2_phases(
            replace(kit.networks, head=head),
            Dmd2Settings(kit.sigmas, self.guidance_scale, self.generator_every, self.gan_generator, self.gan_critic),
            (kit.student, critic),
            (
                kit.optimizer(self.optimizer, kit.student, self.lr, self.beta2),
                kit.optimizer(self.optimizer, critic, self.lr_critic, self.beta2),
            ),
        )


@dataclass(frozen=True)
class Dmd2Settings:
    """DMD2's own numbers (see `dmd2.training.recipes` for the papers' values)."""

    student_sigmas: tuple[float, ...]
    """descending: one level for a one-step student"""
    guidance_scale: float
    """the teacher's; the fake score is never guided"""
    generator_every: int
    """k of the two time scales: critic updates for one of the generator's"""
    gan_generator: float = 0.0
    gan_critic: float = 0.0
    dm_range: tuple[float, float] = (0.02, 0.98)
    """the part of the σ table that the distribution-matching gradient draws from"""


def dmd2_phases(
    networks: Networks,
    settings: Dmd2Settings,
    modules: tuple[nn.Module, nn.Module],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
) -> list[Phase]:
    """Generator and critic phases.

    Args:
        networks: student, teacher, fake score, classifier head.
        settings: DMD2's numbers.
        modules: what the two phases train: the student's; the fake score's (with head).
        optimizers: theirs.
    """
    n, shared = networks, SharedImages()

    def generator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples: Samples = batch.data
        x = generate(n.student, samples, settings.student_sigmas, batch.generator)
        shared.put(batch, x)
        with torch.no_grad():
            sigma = sample_sigma(n.teacher.sigmas, len(x), batch.generator, *settings.dm_range)
            noisy = add_noise(x, sigma, torch.randn(x.shape, generator=batch.generator).to(x.device))
            mu_real = cfg_denoise(n.teacher, noisy, sigma, samples.cond, samples.uncond, settings.guidance_scale)
            mu_fake = n.fake_score(noisy, sigma, samples.cond)
            gradient = distribution_matching_gradient(x, mu_real, mu_fake)
        loss = distribution_matching(x, gradient)
        logs: Logs = {"dm_gradient": gradient.square().mean().sqrt()}
        if n.head is not None and settings.gan_generator > 0:
            adversarial = gan_generator(noised_logits(n.fake_score, n.head, x, samples.cond, batch.generator))
            logs["gan_generator"] = adversarial.detach()
            loss = loss + settings.gan_generator * adversarial
        return loss, logs

    def fake_loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples: Samples = batch.data
        fake = shared.take(batch)
        if fake is None:
            with torch.no_grad():
                fake = generate(n.student, samples, settings.student_sigmas, batch.generator)
        loss, logs = critic_loss(
            n.fake_score,
            n.head,
            fake,
            samples.cond,
            samples.real,
            samples.real_cond,
            settings.gan_critic,
            batch.generator,
        )
        return loss, dict(logs)

    return [
        Phase("generator", settings.generator_every, modules[0], optimizers[0], generator_loss),
        Phase("critic", 1, modules[1], optimizers[1], fake_loss),
    ]
