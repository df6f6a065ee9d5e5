"""DMD2 (Yin et al. 2405.14867): distribution matching on two time scales, GAN, backward simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Cond, Denoiser, cfg_denoise
from dmd2.diffusion.noise import add_noise, sample_sigma
from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.training.discriminators.head import critic_loss, noised_logits
from dmd2.training.loop import Batch, Logs, Phase
from dmd2.training.losses import distribution_matching, distribution_matching_gradient, gan_generator


@dataclass(frozen=True)
class Networks:
    """The three networks of DMD2, as denoisers over modules of their own; `head` is None without a GAN."""

    student: Denoiser
    teacher: Denoiser
    fake: Denoiser
    head: nn.Module | None = None


@dataclass(frozen=True)
class Dmd2Settings:
    """DMD2's own numbers (see `dmd2.training.recipes.kinds` for the papers' values)."""

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


@dataclass(frozen=True)
class Samples:
    """What a step works on: conditions for generated samples, and real ones with theirs (None without a GAN)."""

    shape: tuple[int, ...]
    cond: Cond
    uncond: Cond
    real: Tensor | None = None
    real_cond: Cond = None


def generate(student: Denoiser, samples: Samples, sigmas: Sequence[float], generator: torch.Generator) -> Tensor:
    """The student's x0 at a random exit step, whose input is its own rollout from pure noise.

    DMD2's backward simulation (sec. 4.5): the student sees in training what it will see when sampling.
    Gradients flow through the last step only. One exit step for the whole batch.
    """
    device = student.sigmas.device
    last = int(torch.randint(len(sigmas), (1,), generator=generator))
    noise = [torch.randn(samples.shape, generator=generator).to(device) for _ in range(last + 1)]
    denoise = conditioned(student, samples.cond)
    sigma = torch.full((samples.shape[0],), sigmas[last], device=device)
    if last == 0:
        return denoise(student.scale_initial_noise(noise[0], sigma), sigma)
    with torch.no_grad():
        x0 = sample_few_step(denoise, student.scale_initial_noise, noise[:last], sigmas[:last])
    return denoise(add_noise(x0, sigma, noise[last]), sigma)


class SharedImages:
    """What the student generates in a step, once for both updates.

    As in the published runs, the critic learns from the very images that the generator was just judged by, and
    generates its own only in steps without the generator's update.
    """

    def __init__(self) -> None:
        self._step, self._images = -1, dict[int, tuple[Batch, Tensor]]()

    def put(self, batch: Batch, x0: Tensor) -> None:
        """By the generator's loss, for each part of a step."""
        if batch.step != self._step:
            self._step, self._images = batch.step, {}
        self._images[id(batch)] = batch, x0.detach()

    def take(self, batch: Batch) -> Tensor | None:
        """By the critic's: the images, without gradient. None: this step has none."""
        owner, x0 = self._images.pop(id(batch), (None, None))
        return x0 if owner is batch else None


def dmd2_phases(
    networks: Networks,
    settings: Dmd2Settings,
    modules: tuple[nn.Module, nn.Module],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    samples_of: Callable[[Batch], Samples],
) -> list[Phase]:
    """Generator and critic phases.

    Args:
        networks: student, teacher, fake score, classifier head.
        settings: DMD2's numbers.
        modules: what the two phases train: the student's; the fake score's (with head).
        optimizers: theirs.
        samples_of: what a batch of the loop holds, on the networks' device.
    """
    n, shared = networks, SharedImages()

    def generator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples = samples_of(batch)
        x = generate(n.student, samples, settings.student_sigmas, batch.generator)
        shared.put(batch, x)
        with torch.no_grad():
            sigma = sample_sigma(n.teacher.sigmas, len(x), batch.generator, *settings.dm_range)
            noisy = add_noise(x, sigma, torch.randn(x.shape, generator=batch.generator).to(x.device))
            mu_real = cfg_denoise(n.teacher, noisy, sigma, samples.cond, samples.uncond, settings.guidance_scale)
            mu_fake = n.fake(noisy, sigma, samples.cond)
            gradient = distribution_matching_gradient(x, mu_real, mu_fake)
        loss = distribution_matching(x, gradient)
        logs: Logs = {"dm_gradient": gradient.square().mean().sqrt()}
        if n.head is not None and settings.gan_generator > 0:
            adversarial = gan_generator(noised_logits(n.fake, n.head, x, samples.cond, batch.generator))
            logs["gan_generator"] = adversarial.detach()
            loss = loss + settings.gan_generator * adversarial
        return loss, logs

    def fake_loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples = samples_of(batch)
        fake = shared.take(batch)
        if fake is None:
            with torch.no_grad():
                fake = generate(n.student, samples, settings.student_sigmas, batch.generator)
        loss, logs = critic_loss(
            n.fake,
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


def copies(teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Student and fake score both start as the teacher."""
    return deepcopy(teacher), deepcopy(teacher)
