"""Score identity distillation: SiD (Zhou et al. 2024, 2404.04057) and SiDA, its adversarial kin (2410.14919).

The student minimises how far teacher's and fake score's predictions are apart (Fisher divergence), in a form whose
estimate stays good where the fake score lags behind (SiD, eq. 23). SiDA adds a GAN whose discriminator is the fake
score's own encoder, its activations averaged over channels (SiDA, sec. 3): no head, no parameters of its own. As in
its published runs, the generator's images are judged at the very sample where scores are compared, each image's loss
is divided by what SiD divides its own by, both updates have images of their own, the fake score learns at the levels
that teachers are trained at, and the student begins once there is a fake score to learn from.

Weights: there the losses are sums over the N numbers of an image, SiD's times 100, and the adversarial one is 0.01·N;
so beside means it weighs 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.diffusion.denoiser import cfg_denoise
from dmd2.diffusion.noise import per_image
from dmd2.models.family import Family
from dmd2.training.discriminators.head import GanJudge
from dmd2.training.loop import Batch, Logs
from dmd2.training.methods.common import Kit, Networks, Samples
from dmd2.training.methods.dmd2 import Dmd2Recipe, Objective, noised
from dmd2.training.ranges import Part, Steps, Weight


@dataclass(frozen=True)
class SidRecipe(Dmd2Recipe):
    """A student by SiD; with a GAN's weights by SiDA."""

    fisher: Weight = 1.2
    """α of SiD, eq. 23"""
    match_range: tuple[Part, Part] = (0.0, 0.8)
    """part of the σ table; on EDM's SiD leaves its highest levels out (t_max = 800)"""
    student_begins: Steps = 0
    """the step from which on the student learns, too: at first fake score and teacher are the same"""
    shares_images = False
    own_adversary = True

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "sida" if self.gan_critic > 0 else "sid"

    def conflict(self) -> str | None:
        if self.match_range[0] >= self.match_range[1]:
            return f"match_range={list(self.match_range)}: expected two parts of the σ table, the lower one first"
        if self.student_begins >= self.loop.iterations > 1:
            return f"student_begins={self.student_begins}: expected less than iterations, {self.loop.iterations}"
        return super().conflict()

    def new_head(self, family: Family) -> nn.Module:
        return ChannelMean()

    def objective(self, networks: Networks) -> Objective:
        return score_identity(networks, self.guidance_scale, self.fisher, self.match_range, self.gan_generator)

    def judge(self, kit: Kit) -> GanJudge:
        return replace(super().judge(kit), levels=kit.family.sample_sigma)


class ChannelMean(nn.Module):
    """Activations (B, C, h, w) → logits (B, 1, h, w): SiDA's discriminator. It has no parameters."""

    def forward(self, activations: Tensor) -> Tensor:
        return activations.mean(1, keepdim=True)


def score_identity(
    n: Networks, guidance_scale: float, alpha: float, part: tuple[float, float], gan_weight: float = 0.0
) -> Objective:
    """SiD's loss of the generator. Gradients reach it through x and through both networks' input.

    Args:
        guidance_scale: the teacher's.
        alpha: 1 leaves the squared distance out, 0 has it once; above 1 it is taken off.
        part: of the σ table.
        gan_weight: of SiDA's adversarial loss, for which there is a head.
    """

    def objective(x: Tensor, batch: Batch, _: float) -> tuple[Tensor, Logs]:
        samples: Samples = batch.data
        noisy, sigma = noised(n.teacher, x, batch.generator, part)
        mu_real = cfg_denoise(n.teacher, noisy, sigma, samples.cond, samples.uncond, guidance_scale)
        mu_fake, seen = n.fake_score.features(noisy, sigma, samples.cond)
        loss = score_identity_loss(x, mu_real, mu_fake, alpha)
        apart = (mu_real - mu_fake).detach().square().mean((1, 2, 3)).sqrt().mean()
        logs: Logs = {"score_distance": apart}
        if n.head is not None and gan_weight > 0:
            adversarial = F.softplus(-n.head(seen)).flatten(1).mean(1)
            logs["gan_generator"] = adversarial.detach().mean()
            loss = loss + gan_weight * (adversarial / normaliser(x, mu_real)).mean()
        return loss, logs

    return objective


def normaliser(x: Tensor, mu_real: Tensor) -> Tensor:
    """sg(mean|x − f_φ|) (SiD, eq. 24) of each image, (B,)."""
    return (x - mu_real).detach().abs().mean((1, 2, 3)).clamp_min(1e-6)


def score_identity_loss(x: Tensor, mu_real: Tensor, mu_fake: Tensor, alpha: float) -> Tensor:
    """(1 − α)·‖f_φ − f_ψ‖² + (f_φ − f_ψ)ᵀ(f_ψ − x) (SiD, eq. 23), over sg(mean|x − f_φ|) (eq. 24), mean over pixels.

    Args:
        x: (B, C, h, w) generated samples.
        mu_real, mu_fake: f_φ and f_ψ, x0 predictions of teacher and fake score from the same noisy version of x.
        alpha: α.
    """
    difference = mu_real - mu_fake
    loss = (1 - alpha) * difference.square() + difference * (mu_fake - x)
    return (loss / per_image(normaliser(x, mu_real), x)).mean()
