"""DMD2 (Yin et al. 2405.14867): distribution matching on two time scales, GAN, backward simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmd2.diffusion import draws
from dmd2.diffusion.denoiser import Denoiser, cfg_denoise
from dmd2.diffusion.noise import add_noise, sample_sigma
from dmd2.models.family import Family
from dmd2.runtime.errors import InvalidInput
from dmd2.training.discriminators.head import HEAD_FILE, GanJudge, load_head, new_head
from dmd2.training.distil import FAKE_SCORE, Distillation
from dmd2.training.loop import Batch, Logs, Phase
from dmd2.training.losses import distribution_matching, distribution_matching_gradient, gan_generator
from dmd2.training.methods.common import Kit, Networks, OptimizerName, Samples, SharedImages
from dmd2.training.ranges import Count, Decay, Folder, Part, Rate, Weight
from dmd2.training.sources import Inputs

Objective = Callable[[Tensor, Batch, float], tuple[Tensor, Logs]]
"""(x (B, C, h, w) with gradient, the step, the student's σ) → a loss that leads the student, and what to log"""

DM_RANGE = 0.02, 0.98
"""the part of the σ table that the distribution-matching gradient draws from"""

SMALL = 32 * 32
"""elements of a channel of x0, at most, of images that the critic sees in one batch, real and generated"""


@dataclass(frozen=True)
class Dmd2Recipe(Distillation):
    """A student of one step or several by DMD2."""

    lr_critic: Rate
    generator_every: Count
    """k of the two time scales"""
    disjoint: bool = False
    """whether the fake score rests in the steps of the student, as in NVIDIA's FastGen; or learns in every step"""
    gan_generator: Weight = 0.0
    gan_critic: Weight = 0.0
    """weights of the GAN losses; 0 and 0 is no GAN"""
    gan_features: Literal["fake_score", "teacher"] = "fake_score"
    """whose activations the GAN's head sees: the fake score's, which learns with it; or the frozen teacher's"""
    r1: Weight = 0.0
    """weight of the approximate R1"""
    r1_noise: Part = 0.1
    """standard deviation of its step, in units of x0"""
    backward_simulation: bool = True
    """whether later steps learn from the student's own rollout, as they sample; or from noised real images"""
    resumed: bool = False
    """whether student and fake score go on from the run of --student instead of from the teacher's weights"""
    resumed_head: bool = False
    """whether the GAN's head goes on, too"""
    pretrained: bool = False
    """whether the student alone is that of --student; the fake score begins as the teacher"""
    guidance_scale: Weight = 1.0
    """the teacher's"""
    student_init: Folder | None = None
    """subfolder of the weights that the student starts from; None: the teacher's"""
    optimizer: OptimizerName = "adamw"
    beta2: Decay = 0.999
    kind = "dmd2"
    most_steps = 1000
    keeps_fake_score = True
    shares_images = True
    """whether a step's images serve both updates; see `SharedImages`"""
    own_adversary = False
    """whether the objective has the GAN's loss of the generator already"""
    student_begins = 0
    """the step from which on the student learns, too"""

    @property
    def needs_images(self) -> bool:
        return self.gan_critic > 0 or not self.backward_simulation

    @property
    def paired(self) -> bool:  # type: ignore[override]
        """A noised real image is continued under its own condition."""
        return not self.backward_simulation

    def conflict(self) -> str | None:
        """A generator must not follow a classifier that nothing trains, nor a classifier be trained for nothing."""
        problem = super().conflict()
        if not problem and self.disjoint and self.generator_every == 1:
            return "disjoint=true with generator_every=1: expected 2 or more; the fake score would never learn"
        if not problem and self.adapter == "lora" and self.student_init is not None:
            return f"student_init={self.student_init} with adapter=lora: expected null; a LoRA begins as the teacher"
        if not problem and self.pretrained and (self.resumed or self.student_init is not None):
            return "pretrained=true with resumed or student_init: expected one of the three"
        if not problem and self.resumed_head and not (self.resumed and self.gan_critic > 0):
            return "resumed_head=true: expected resumed=true and a GAN with it"
        if not problem and self.gan_critic == 0 and (self.r1 > 0 or self.gan_features == "teacher"):
            return "gan_critic=0 with r1 or gan_features=teacher: expected gan_generator and gan_critic above 0"
        if problem or (self.gan_generator > 0) == (self.gan_critic > 0):
            return problem
        given = f"gan_generator={self.gan_generator:g} with gan_critic={self.gan_critic:g}"
        return f"{given}: expected both above 0, or both 0 for no GAN"

    def start(self, family: Family, inputs: Inputs, **_: Any) -> tuple[Any, Any]:
        """Also both of a run, for only together they give its gradient; or a pretrained student alone."""
        if self.pretrained:
            given = inputs.need("student", "this recipe goes on from a pretrained student")
            return self.new_student(family, given), self.new_fake_score(family, None)
        if not self.resumed:
            return super().start(family, inputs, subfolder=self.student_init)
        given = inputs.need("student", "this recipe goes on from a student that was trained without GAN")
        student = self.new_student(family, given, subfolder=self.student_init)
        fake = given.parent / FAKE_SCORE
        if not fake.is_dir():
            expected = "expected the model/ of a run of DMD2"
            raise InvalidInput("student", f"has no fake score beside it ({fake}); {expected}", given)
        return student, self.new_fake_score(family, fake)

    def new_head(self, family: Family) -> nn.Module:
        """What tells real from fake, by activations (B, C, h, w) → logits (B, 1, …)."""
        return new_head(family)

    def objective(self, networks: Networks) -> Objective | None:
        """What the generator minimises beside the GAN's loss; None is DMD's matching."""
        return None

    def _together(self, kit: Kit) -> bool:
        """Small images keep a device busy in large batches alone; of large ones a block's batch must fit into it.

        Where networks are in shards or blocks run again in backward, memory is short, too.
        """
        _, height, width = kit.family.shape
        return height * width <= SMALL and not self.checkpointing and not kit.inputs.parallel.collective

    def phases(self, kit: Kit) -> list[Phase]:
        head = self.new_head(kit.family).to(kit.inputs.device) if self.gan_critic > 0 else None
        if head is not None and self.resumed_head:
            load_head(head, kit.inputs.need("student").parent / FAKE_SCORE / HEAD_FILE)
        if head is not None:
            kit.inputs.parallel.prepare(head, [head] if self.networks == "separate" else [])  # as the fake score
        critic = nn.ModuleDict({"network": kit.fake_score} | ({"head": head} if head else {}))
        networks = replace(kit.networks, head=head)
        return dmd2_phases(
            networks,
            (kit.student, critic),
            (
                kit.optimizer(self.optimizer, kit.student, self.lr, self.beta2),
                kit.optimizer(self.optimizer, critic, self.lr_critic, self.beta2),
            ),
            kit.sigmas,
            guidance_scale=self.guidance_scale,
            generator_every=self.generator_every,
            disjoint=self.disjoint,
            gan_weights=(0.0 if self.own_adversary else self.gan_generator, self.gan_critic),
            simulated=self.backward_simulation,
            shares_images=self.shares_images,
            student_begins=self.student_begins,
            objective=self.objective(networks),
            judge=self.judge(kit),
        )

    def judge(self, kit: Kit) -> GanJudge:
        """How generated images are denoised and judged."""
        return GanJudge(self.gan_features == "teacher", self.r1, self.r1_noise, self._together(kit))


def dmd2_phases(
    networks: Networks,
    modules: tuple[nn.Module, nn.Module],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    sigmas: tuple[float, ...],
    *,
    guidance_scale: float = 1.0,
    generator_every: int = 1,
    disjoint: bool = False,
    gan_weights: tuple[float, float] = (0.0, 0.0),
    dm_range: Callable[[int], tuple[float, float]] = lambda step: DM_RANGE,
    simulated: bool = True,
    shares_images: bool = True,
    student_begins: int = 0,
    objective: Objective | None = None,
    judge: GanJudge = GanJudge(),  # noqa: B008
) -> list[Phase]:
    """Generator and critic phases.

    Args:
        networks: student, teacher, fake score, classifier head.
        modules: what the two phases train: the student's; the fake score's (with head).
        optimizers: theirs.
        sigmas: of the student's steps, descending.
        guidance_scale: the teacher's; the fake score is never guided.
        generator_every: k of the two time scales: steps of which one updates the generator.
        disjoint: whether the critic is updated in the others alone; or in all.
        gan_weights: of the generator's GAN loss and of the critic's.
        dm_range: step → the part of the σ table that the generator's levels are drawn from.
        simulated: see `generate`.
        shares_images: see `SharedImages`.
        student_begins: the first step with an update of the generator.
        objective: what the generator minimises beside the GAN's loss; None: DMD's matching with these two.
        judge: how the GAN judges.
    """
    n, shared = networks, SharedImages(networks.student, sigmas, simulated, shares_images)
    gan_of_generator, gan_of_critic = gan_weights

    minimised = objective or matching(n, guidance_scale, dm_range)

    def generator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        x, level = shared.for_generator(batch)
        loss, logs = minimised(x, batch, level)
        if n.head is not None and gan_of_generator > 0:
            adversarial = gan_generator(judge.logits(n, x, batch.data.cond, batch.generator))
            logs["gan_generator"] = adversarial.detach()
            loss = loss + gan_of_generator * adversarial
        return loss, logs

    def critic(batch: Batch) -> tuple[Tensor, Logs]:
        s: Samples = batch.data
        fake = shared.for_critic(batch)
        return judge.critic_loss(n, fake, s.cond, s.real, s.real_cond, gan_of_critic, batch.generator)

    return [
        Phase("generator", generator_every, modules[0], optimizers[0], generator_loss, first=student_begins),
        Phase("critic", 1, modules[1], optimizers[1], critic, rests=generator_every if disjoint else 0),
    ]


def matching(
    n: Networks, guidance_scale: float, dm_range: Callable[[int], tuple[float, float]] = lambda step: DM_RANGE
) -> Objective:
    """DMD's distribution matching: teacher, guided, and fake score at one noisy version of x."""

    def objective(x: Tensor, batch: Batch, _: float) -> tuple[Tensor, Logs]:
        samples: Samples = batch.data
        with torch.no_grad():
            noisy, sigma = noised(n.teacher, x, batch.generator, dm_range(batch.step))
            mu_real = cfg_denoise(n.teacher, noisy, sigma, samples.cond, samples.uncond, guidance_scale)
            mu_fake = n.fake_score(noisy, sigma, samples.cond)
            gradient = distribution_matching_gradient(x, mu_real, mu_fake)
        return follow(x, gradient)

    return objective


def noised(
    denoiser: Denoiser, x: Tensor, generator: torch.Generator, part: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """x (B, C, h, w) with noise, and its σ (B,) from that part of the denoiser's table."""
    sigma = sample_sigma(denoiser.sigmas, len(x), generator, *part)
    return add_noise(x, sigma, draws.randn(x.shape, generator).to(x.device)), sigma


def follow(x: Tensor, gradient: Tensor) -> tuple[Tensor, Logs]:
    """The loss whose gradient at x is `gradient`, and how large that is."""
    return distribution_matching(x, gradient), {"dm_gradient": gradient.square().mean((1, 2, 3)).sqrt().mean()}
