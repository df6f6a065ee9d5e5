"""GDD and GDD-I (Zheng & Yang 2405.20750): a diffusion model's weights become a one-step GAN, and no score is left.

The generator starts as the teacher, at one high noise level, and learns from a discriminator of real images alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.models.family import Family
from dmd2.training.discriminators.projected import Backbone, DenoiserFeatures, ProjectedDiscriminator, TimmFeatures
from dmd2.training.discriminators.published import PublishedDiscriminator, class_embeddings
from dmd2.training.distil import Distillation
from dmd2.training.loop import Batch, Logs, Phase
from dmd2.training.losses import gan_critic, gan_generator, r1
from dmd2.training.methods.common import Kit, Samples, generate
from dmd2.training.ranges import Count, Name, Part, Rate, Weight
from dmd2.training.sources import Inputs


@dataclass(frozen=True)
class GddRecipe(Distillation):
    """A one-step student by GDD, or GDD-I, which freezes most convolutions."""

    lr_critic: Rate
    freeze: bool
    """GDD-I"""
    backbones: Annotated[tuple[Name, ...], Field(max_length=8)] = ()
    """timm's names of the discriminator's feature networks; none: the teacher's own features"""
    discriminator: Literal["published", "small"] = "small"
    """GDD's, or one of our own; each is a file in `dmd2/training/discriminators`"""
    r1_gamma: Weight = 1e-4 / 128
    """beside losses that are means; the paper's is beside sums (see `dmd2.training.recipes.edm`)"""
    r1_every: Count = 16
    boundary: Part = 0.002
    """ε of the preconditioning (GDD, app. C), for EDM's networks alone; 0 is EDM's own"""
    needs_images = True
    paired = True
    whole_teacher = True
    """shards do not bear that R1 differentiates the discriminator twice, whose features are the teacher's"""

    @property
    def kind(self) -> str:
        return "gdd-i" if self.freeze else "gdd"

    def conflict(self) -> str | None:
        if problem := super().conflict():
            return problem
        if self.sigmas and self.boundary >= self.sigmas[-1]:
            return f"boundary={self.boundary:g}: expected less than the level in sigmas, {self.sigmas[-1]:g}"
        if self.discriminator == "published" and not self.backbones:
            return "discriminator=published with backbones=[]: expected timm's networks, or discriminator=small"
        if self.freeze and self.adapter == "lora":
            return "freeze=true with adapter=lora: expected adapter=full; a LoRA leaves all of the teacher as it is"
        return None

    def start(self, family: Family, inputs: Inputs, **_: Any) -> tuple[Any, Any]:
        """No score is learned."""
        self.refuse_student(inputs)
        return self.new_student(family, None, boundary=self.boundary), None

    def phases(self, kit: Kit) -> list[Phase]:
        student, family, parallel = kit.student, kit.family, kit.inputs.parallel
        trained = freeze_for_gdd_i(student, family.frozen_in_gdd_i) if self.freeze else student
        discriminator = self._discriminator(family, kit.inputs.device)
        parallel.prepare(discriminator)
        optimizers = (
            torch.optim.Adam(trained.parameters(), lr=self.lr, betas=(0.0, 0.99)),
            lazy_adam(discriminator.parameters(), self.lr_critic, (0.0, 0.99), self.r1_every),
        )
        modules, r1_numbers = (trained, discriminator), (self.r1_gamma, self.r1_every)
        return gdd_phases(kit.networks.student, discriminator, modules, optimizers, kit.sigmas[0], *r1_numbers)

    def _discriminator(self, family: Family, device: torch.device) -> nn.Module:
        backbones: list[Backbone] = [TimmFeatures(name, device, family.to_rgb) for name in self.backbones]
        if not backbones:
            backbones = [DenoiserFeatures(family.teacher, family.encoder_levels())]
        example, cond = torch.zeros(1, *family.shape, device=device), family.condition(family.any_labels(1))
        classes, labels_of = family.classes, (lambda c: c.labels) if family.classes else None
        if self.discriminator == "published":
            rows = class_embeddings(classes) if classes else None
            return PublishedDiscriminator(backbones, example, cond, embeddings=rows, labels_of=labels_of).to(device)
        return ProjectedDiscriminator(backbones, example, cond, classes=classes, labels_of=labels_of).to(device)


def gdd_phases(
    student: Denoiser,
    discriminator: Callable[[Tensor, Cond], Tensor],
    modules: tuple[nn.Module, nn.Module],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    sigma: float,
    r1_gamma: float,
    r1_every: int,
) -> list[Phase]:
    """Generator and discriminator phases, one update each a step, and R1's at every n-th step.

    Args:
        student: starts from the teacher's weights.
        discriminator: (x0 (B, C, H, W), cond) → logits (B, n); see `dmd2.training.discriminators.projected`.
        modules: what the phases train: the student's (for GDD-I what `freeze_for_gdd_i` returns); the
            discriminator's.
        optimizers: theirs; see `lazy_adam` for the discriminator's.
        sigma: the level that the student starts from.
        r1_gamma: R1's weight beside losses that are means; 0 for no R1.
        r1_every: lazy regularisation: R1 takes an update of its own at every n-th step, n times as strong.
    """

    def generated(batch: Batch) -> Tensor:
        return generate(student, batch.data, (sigma,), batch.generator)

    def generator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        return gan_generator(discriminator(generated(batch), batch.data.cond)), {}

    def r1_loss(batch: Batch) -> tuple[Tensor, Logs]:
        real = batch.data.real.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            penalty = r1(discriminator(real, batch.data.real_cond), real)
        # Karras et al. 2020 (StyleGAN2), app. B: as strong on average as it would be at every step
        return r1_every * r1_gamma / 2 * penalty, {"r1_penalty": penalty.detach()}

    def discriminator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        samples: Samples = batch.data
        assert samples.real is not None, "GDD learns from real images"
        # Of new noise, as in StyleGAN's trainer: with the images that the generator has just learned from, students
        # of the small CIFAR-10 teacher lost half of their recall (docs/cifar10.md).
        with torch.no_grad():
            fake = generated(batch)
        logits_fake = discriminator(fake, samples.cond)
        logits_real = discriminator(samples.real, samples.real_cond)
        accuracy = ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean()) / 2
        return gan_critic(logits_real, logits_fake), {"gan_accuracy": accuracy}

    phases = [
        Phase("generator", 1, modules[0], optimizers[0], generator_loss),
        Phase("discriminator", 1, modules[1], optimizers[1], discriminator_loss),
    ]
    if r1_gamma > 0:  # after the discriminator's own update, and not at step 0, as in the published runs
        phases.append(Phase("r1", r1_every, modules[1], optimizers[1], r1_loss, first=1))
    return phases


def freeze_for_gdd_i(network: nn.Module, frozen: re.Pattern[str]) -> nn.ParameterList:
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
        parameter.requires_grad_(frozen.search(name) is None)
        if parameter.requires_grad:
            trainable.append(parameter)
    if len(trainable) == len(list(network.parameters())):
        raise ValueError(f"network: has no parameters called {frozen.pattern} to freeze")
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
