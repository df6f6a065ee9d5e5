"""GDD and GDD-I (Zheng & Yang 2405.20750): a diffusion model's weights become a one-step GAN, and no score is left.

The generator starts as the teacher, at one high noise level, and learns from a discriminator of real images alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.training.loop import Batch, Logs, Phase
from dmd2.training.losses import gan_critic, gan_generator, r1
from dmd2.training.methods.dmd2 import Samples, SharedImages, generate

FROZEN_IN_GDD_I = re.compile(r"\.(conv\d+|proj)\.(weight|bias)$")
"""EDM's names: convolutions and attention's last layer within blocks, not the network's first and last convolution"""


@dataclass(frozen=True)
class GddSettings:
    """GDD's own numbers (see `dmd2.training.recipes.kinds` for the paper's values)."""

    sigma: float = 80.0
    """the level that the one-step student starts from"""
    r1_gamma: float = 1e-4 / 128
    """beside losses that are means; the paper's 1e-4 is beside sums (see `dmd2.training.recipes.edm`). 0: no R1"""
    r1_every: int = 16
    """lazy regularisation: R1 takes an update of its own at every n-th step, n times as strong"""


def gdd_phases(
    student: Denoiser,
    discriminator: Callable[[Tensor, Cond], Tensor],
    settings: GddSettings,
    modules: tuple[nn.Module, nn.Module],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    samples_of: Callable[[Batch], Samples],
) -> list[Phase]:
    """Generator and discriminator phases, one update each a step, and R1's at every n-th step.

    Args:
        student: starts from the teacher's weights.
        discriminator: (x0 (B, C, H, W), cond) → logits (B, n); see `dmd2.training.discriminators.projected`.
        settings: GDD's numbers.
        modules: what the phases train: the student's (for GDD-I what `freeze_for_gdd_i` returns); the
            discriminator's.
        optimizers: theirs; see `lazy_adam` for the discriminator's.
        samples_of: what a batch of the loop holds, real images too, on the networks' device.
    """
    shared = SharedImages()

    def reals(samples: Samples) -> Tensor:
        if samples.real is None:
            raise ValueError("samples: GDD learns from real images; there are none")
        return samples.real

    def generator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples = samples_of(batch)
        fake = generate(student, samples, (settings.sigma,), batch.generator)
        shared.put(batch, fake)
        return gan_generator(discriminator(fake, samples.cond)), {}

    def r1_loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples = samples_of(batch)
        real = reals(samples).detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            penalty = r1(discriminator(real, samples.real_cond), real)
        # Karras et al. 2020 (StyleGAN2), app. B: as strong on average as it would be at every step
        return settings.r1_every * settings.r1_gamma / 2 * penalty, {"r1_penalty": penalty.detach()}

    def discriminator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples = samples_of(batch)
        fake = shared.take(batch)
        if fake is None:
            with torch.no_grad():
                fake = generate(student, samples, (settings.sigma,), batch.generator)
        logits_fake = discriminator(fake, samples.cond)
        logits_real = discriminator(reals(samples), samples.real_cond)
        accuracy = ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean()) / 2
        return gan_critic(logits_real, logits_fake), {"gan_accuracy": accuracy}

    phases = [
        Phase("generator", 1, modules[0], optimizers[0], generator_loss),
        Phase("discriminator", 1, modules[1], optimizers[1], discriminator_loss),
    ]
    if settings.r1_gamma > 0:  # after the discriminator's own update, and not at step 0, as in the published runs
        phases.append(Phase("r1", settings.r1_every, modules[1], optimizers[1], r1_loss, first=1))
    return phases


def freeze_for_gdd_i(network: nn.Module) -> nn.ParameterList:
    """Freezes what GDD-I leaves as the teacher has it: 84 to 85 % of DDPM++ and NCSN++, 79 % of ADM.

    Norms, `affine`, `qkv` and `skip` stay trainable, and what is outside of blocks (GDD, sec. 4).

    Returns:
        The parameters that stay trainable: the generator phase's module. A checkpoint then holds these alone; the
        others are the teacher's.

    Raises:
        ValueError: `network` has no such layers.
    """
    trainable: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        frozen = FROZEN_IN_GDD_I.search(name) is not None
        parameter.requires_grad_(not frozen)
        if not frozen:
            trainable.append(parameter)
    if len(trainable) == len(list(network.parameters())):
        raise ValueError("network: expected convolutions with EDM's names (conv0, conv1, proj) to freeze")
    return nn.ParameterList(trainable)


def lazy_adam(
    parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], every: int
) -> torch.optim.Adam:
    """Adam for a network that is regularised in an extra update at every `every`-th step.

    In n steps it makes n + 1 updates, so lr·c and β^c with c = n / (n + 1) do what lr and β do without (Karras et
    al. 2020, StyleGAN2, app. B).
    """
    c = every / (every + 1)
    return torch.optim.Adam(parameters, lr=lr * c, betas=(betas[0] ** c, betas[1] ** c))
