"""Generators' gradients on Gaussians, where teacher, fake score and expectation are known in closed form.

Data N(μ, s²), a student x = a·z + b, and networks that are the exact denoisers of both. An image has many pixels, so
that its own mean |x − μ_real|, which losses are divided by, is the expectation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Condition
from dmd2.diffusion.noise import per_image
from dmd2.training.discriminators.head import GanJudge
from dmd2.training.loop import Batch, LoopSettings
from dmd2.training.losses import approximate_r1, gan_generator, r1
from dmd2.training.methods.common import Networks, Samples
from dmd2.training.methods.dmd2 import Dmd2Recipe, Objective, dmd2_phases, matching
from dmd2.training.methods.matching.decoupled import DecoupledRecipe, decoupled_matching
from dmd2.training.methods.matching.f_distill import WEIGHTS, FDistillRecipe, density_weight, weighted_matching
from dmd2.training.methods.matching.sid import ChannelMean, SidRecipe, score_identity

MU, S = 0.4, 0.9  # of the data
A, B = 0.6, -0.3  # of the student
SIGMA = 0.8
SHAPE = (24, 3, 64, 64)


@dataclass(frozen=True)
class Mean(Condition):
    """What a Gaussian is conditioned on: its mean, (B,)."""

    values: Tensor


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, std²); its activations are the noisy sample itself."""

    def __init__(self, mean: float, std: float, sigmas: tuple[float, ...] = (SIGMA,)) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(float(mean))), std
        self.sigmas = torch.tensor(sigmas)

    def forward(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        noise = per_image(sigma, x) ** 2
        mean = self.mean if cond is None else per_image(cond.values, x)
        return (self.std**2 * x + noise * mean) / (self.std**2 + noise)

    def features(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        return self(x, sigma, cond), x

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


def networks(head: nn.Module | None = None, sigmas: tuple[float, ...] = (SIGMA,)) -> Networks:
    fake = Gaussian(B, A, sigmas).requires_grad_(False)
    return Networks(Gaussian(0, 1), Gaussian(MU, S, sigmas).requires_grad_(False), fake, head)


def gradient(
    objective: Objective, cond: Any = None, uncond: Any = None, times: int = 4, level: float = 80.0
) -> tuple[float, float]:
    """With respect to a and b, the mean of a few batches. `level`: where the student's step begins."""
    a, b = torch.tensor(A, requires_grad=True), torch.tensor(B, requires_grad=True)
    for step in range(times):
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + step))
        samples = Samples(SHAPE, cond, uncond)
        loss, _ = objective(a * z + b, Batch(step, samples, torch.Generator().manual_seed(step)), level)
        (loss / times).backward()
    assert a.grad is not None and b.grad is not None
    return float(a.grad), float(b.grad)


@dataclass(frozen=True)
class Expected:
    """At one level: f_φ − f_ψ is c1·x_t + c0, f_ψ is k·x_t + …; `scale` is E|x − f_φ|."""

    c1: float
    c0: float
    k: float
    scale: float

    @classmethod
    def at(cls, sigma: float, mu: float = MU) -> Expected:
        real, fake = S**2 / (S**2 + sigma**2), A**2 / (A**2 + sigma**2)
        c0 = (1 - real) * mu - (1 - fake) * B
        m, v = (1 - real) * (B - mu), (1 - real) ** 2 * A**2 + real**2 * sigma**2
        scale = math.sqrt(2 * v / math.pi) * math.exp(-(m**2) / (2 * v)) + m * math.erf(m / math.sqrt(2 * v))
        return cls(real - fake, c0, fake, scale)


def test_dmd_s_gradient() -> None:
    e = Expected.at(SIGMA)
    by_a, by_b = gradient(matching(networks(), 1.0))
    assert by_a == pytest.approx(-e.c1 * A / e.scale, rel=0.02)
    assert by_b == pytest.approx(-(e.c1 * B + e.c0) / e.scale, rel=0.02)


# SiD


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_sid_s_gradient(alpha: float) -> None:
    e = Expected.at(SIGMA)
    apart = e.c1 * B + e.c0  # E[f_φ − f_ψ]
    by_a, by_b = gradient(score_identity(networks(), 1.0, alpha, (0.0, 1.0)), times=8)
    assert by_b == pytest.approx((2 * (1 - alpha) * e.c1 + e.k - 1) * apart / e.scale, rel=0.02)
    assert by_a == pytest.approx((2 * (1 - alpha) * e.c1 + 2 * (e.k - 1)) * e.c1 * A / e.scale, rel=0.02)


def test_sid_s_gradient_vanishes_where_student_and_data_agree() -> None:
    n = replace(networks(), fake_score=Gaussian(MU, S).requires_grad_(False))
    assert gradient(score_identity(n, 1.0, 1.2, (0.0, 1.0)), times=1) == (0.0, 0.0)


def test_sida_s_gradient_adds_the_adversary_s() -> None:
    """A logit of one pixel is the mean of its channels at x_t: N(b, (a² + σ²) / 3)."""
    weight, e = 0.7, Expected.at(SIGMA)
    logits, variance = line(), (A**2 + SIGMA**2) / 3
    share = torch.exp(-((logits - B) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    share *= float(logits[1] - logits[0])
    fooled = -float((share * torch.sigmoid(-logits)).sum())  # E of softplus(−l)'s derivative
    curved = float((share * torch.sigmoid(-logits) * torch.sigmoid(logits)).sum())  # of its second one
    with_it, without = (
        gradient(score_identity(networks(ChannelMean()), 1.0, 1.0, (0.0, 1.0), gan_weight), times=8)
        for gan_weight in (weight, 0.0)
    )
    assert with_it[1] - without[1] == pytest.approx(weight * fooled / e.scale, rel=0.02)
    assert with_it[0] - without[0] == pytest.approx(weight * curved * A / 3 / e.scale, rel=0.02)  # Stein's lemma


def test_sida_s_adversary_is_in_its_objective_and_its_images_are_not_shared() -> None:
    """The generator's logits are those of the pass that compares scores: there is no other."""
    n = networks(ChannelMean())
    calls: list[str] = []
    n.student.register_forward_hook(lambda *_: calls.append("student"))  # type: ignore[attr-defined]
    recipe = SidRecipe(LOOP, **RATES, **GAN, student_begins=3)
    phases = dmd2_phases(
        n,
        (n.student, n.fake_score),  # type: ignore[arg-type]
        (torch.optim.SGD([torch.zeros(1)]), torch.optim.SGD([torch.zeros(1)])),
        (80.0,),
        gan_weights=(0.0 if recipe.own_adversary else 0.1, 0.1),
        shares_images=recipe.shares_images,
        student_begins=recipe.student_begins,
        objective=recipe.objective(n),
    )
    assert [[phase.name for phase in phases if phase.is_due(step)] for step in (0, 2, 3)] == [
        ["critic"],
        ["critic"],
        ["generator", "critic"],
    ]
    images = torch.zeros(SHAPE)
    batch = Batch(3, Samples(SHAPE, None, None, images, None), torch.Generator().manual_seed(0))
    _, logs = phases[0].loss(batch)
    assert {"score_distance", "gan_generator"} <= set(logs) and calls == ["student"]
    phases[1].loss(batch)
    assert calls == ["student"] * 2


def test_the_fake_score_of_sid_learns_at_the_levels_of_teachers() -> None:
    seen: list[Tensor] = []

    def levels(n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n,), 0.123)

    class Seen(Gaussian):
        def features(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
            seen.append(sigma)
            return super().features(x, sigma, cond)

    n = replace(networks(ChannelMean()), fake_score=Seen(B, A))
    images = torch.zeros(4, 3, 8, 8)
    GanJudge(levels=levels).critic_loss(n, images, None, images, None, 0.5, torch.Generator().manual_seed(0))
    assert len(seen) == 2 and all(bool((sigma == 0.123).all()) for sigma in seen)


def test_sida_s_discriminator_is_the_mean_over_channels() -> None:
    x = torch.randn(2, 5, 3, 4)
    logits = ChannelMean()(x)
    assert logits.shape == (2, 1, 3, 4) and torch.allclose(logits[:, 0], x.sum(1) / 5)
    assert list(ChannelMean().parameters()) == []


# f-distill


F: dict[str, Callable[[Tensor], Tensor]] = {
    "forward-kl": lambda r: r * r.log(),
    "reverse-kl": lambda r: -r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "softened-reverse-kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
}
"""f of D_f(p ‖ q) = E_q f(p/q)"""


def line() -> Tensor:
    return torch.linspace(-14, 14, 20001, dtype=torch.float64)


def density(mean: float, variance: float) -> Tensor:
    return torch.exp(-((line() - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("divergence", list(WEIGHTS))
def test_weighted_scores_are_the_divergence_s_gradient(divergence: str) -> None:
    """Theorem 1, by quadrature: E_q[h(r)·(∇log q − ∇log p)·dx/dθ] is d/dθ of D_f(p ‖ q)."""
    p, step = density(MU, S**2 + SIGMA**2), float(line()[1] - line()[0])

    def divergence_of(a: float, b: float) -> float:
        q = density(b, a**2 + SIGMA**2)
        return float((q * F[divergence](p / q)).sum()) * step

    q, variance = density(B, A**2 + SIGMA**2), A**2 + SIGMA**2
    scores = (line() - MU) / (S**2 + SIGMA**2) - (line() - B) / variance  # ∇log q − ∇log p
    weighted = q * WEIGHTS[divergence](p / q) * scores
    by_a = float((weighted * (line() - B) * A / variance).sum()) * step  # dx/da = z, whose mean is this at x_t
    by_b = float(weighted.sum()) * step
    h = 1e-5
    assert by_a == pytest.approx((divergence_of(A + h, B) - divergence_of(A - h, B)) / (2 * h), rel=1e-4)
    assert by_b == pytest.approx((divergence_of(A, B + h) - divergence_of(A, B - h)) / (2 * h), rel=1e-4)


def test_forward_kl_s_gradient_is_that_of_gaussians() -> None:
    p, q, variance = density(MU, S**2 + SIGMA**2), density(B, A**2 + SIGMA**2), A**2 + SIGMA**2
    scores = (line() - MU) / (S**2 + SIGMA**2) - (line() - B) / variance
    by_b = float((q * WEIGHTS["forward-kl"](p / q) * scores).sum()) * float(line()[1] - line()[0])
    assert by_b == pytest.approx((B - MU) / variance, rel=1e-6)  # d/db of KL(p ‖ q)


class Known(nn.Module):
    """A head that knows log p/q of the first pixel."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0, 0, :1]
        return -((first - MU) ** 2) / (2 * (S**2 + SIGMA**2)) + (first - B) ** 2 / (2 * (A**2 + SIGMA**2))


@pytest.mark.parametrize("divergence", list(WEIGHTS))
def test_images_weigh_as_the_head_says(divergence: str) -> None:
    """Each image's gradient is DMD's, times h of its ratio, over the batch's mean h."""
    n, bounds = networks(Known()), (0.65, 2.0)
    samples = Samples(SHAPE, None, None)

    def of(objective: Objective) -> Tensor:
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        x = (A * z + B).requires_grad_()
        loss, _ = objective(x, Batch(0, samples, torch.Generator().manual_seed(0)), 80.0)
        (found,) = torch.autograd.grad(loss, x)
        return found

    drawn = torch.Generator().manual_seed(0)
    torch.randint(0, 1, SHAPE[:1], generator=drawn)  # the levels
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    noisy = A * z + B + SIGMA * torch.randn(SHAPE, generator=drawn)
    ratio = Known()(noisy).exp().clamp(*bounds)[:, 0]
    h = WEIGHTS[divergence](ratio)
    plain, weighted = of(matching(n, 1.0)), of(weighted_matching(n, 1.0, divergence, bounds))
    torch.testing.assert_close(weighted, per_image(h / h.mean(), plain) * plain, rtol=1e-4, atol=1e-9)
    assert (ratio == bounds[0]).any() and (ratio == bounds[1]).any()


def test_the_ratio_is_told_by_what_the_head_was_trained_on() -> None:
    class Doubled(Gaussian):
        def features(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
            return self(x, sigma, cond), 2 * x

    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1).mean(1, keepdim=True)

    n = replace(networks(Watching()), teacher=Doubled(MU, S))
    for by_teacher in (False, True):
        gradient(weighted_matching(n, 1.0, "js", (0.1, 10.0), by_teacher=by_teacher), times=1)
    torch.testing.assert_close(seen[1], 2 * seen[0])


def test_weights_are_one_on_average_and_bounded() -> None:
    logits = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])[:, None, None, None]
    for divergence in WEIGHTS:
        weight = density_weight(logits, divergence, (0.1, 10.0))
        assert weight.shape == (5,) and bool(weight.isfinite().all()) and float(weight.mean()) == pytest.approx(1)
    assert density_weight(logits, "reverse-kl", (0.1, 10.0)).tolist() == [1.0] * 5


# Decoupled DMD


def test_decoupled_gradient_has_each_term_at_its_own_level() -> None:
    low, high, scale, away = 0.5, 3.0, 2.5, -0.2
    n = networks(sigmas=(low, high))
    cond, uncond = Mean(torch.full(SHAPE[:1], MU)), Mean(torch.full(SHAPE[:1], away))

    class Unguided(Gaussian):
        def forward(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            return super().forward(x, sigma, None)  # a fake score of one Gaussian

    n = replace(n, fake_score=Unguided(B, A, (low, high)).requires_grad_(False))
    by_a, by_b = gradient(decoupled_matching(n, scale, (0.0, 0.2), (0.6, 1.0)), cond, uncond, times=8)
    e, above = Expected.at(low), Expected.at(high)
    guided = (scale - 1) * (1 - S**2 / (S**2 + high**2)) * (MU - away) / above.scale
    assert by_b == pytest.approx(-(e.c1 * B + e.c0) / e.scale - guided, rel=0.02)
    assert by_a == pytest.approx(-e.c1 * A / e.scale, rel=0.03)  # what leads away from u is the same everywhere


@pytest.mark.parametrize(("level", "part"), [(0.5, 0.23), (0.85, 0.41), (80.0, 0.98)])
def test_guidance_has_less_noise_than_the_student_s_step(level: float, part: float) -> None:
    """Decoupled DMD: τ of the guidance on the clean side of the step's own t; matching everywhere."""
    table = tuple(0.02 * (n + 1) for n in range(100))
    n = networks(sigmas=table)
    sigmas: list[Tensor] = []

    class Seen(Gaussian):
        def forward(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            sigmas.append(sigma)
            return x

    n = replace(n, teacher=Seen(MU, S, table))
    cond = Mean(torch.zeros(4))
    for step in range(40):
        batch = Batch(step, Samples((4, 1, 2, 2), cond, cond), torch.Generator().manual_seed(step))
        x = torch.zeros(4, 1, 2, 2, requires_grad=True)
        decoupled_matching(n, 2.0, (0.02, 0.98), (0.02, 0.98))(x, batch, level)
    matched, guided = torch.cat(sigmas[::2]), torch.cat(sigmas[1::2])
    highest = table[round(part * 100)]
    assert 0.9 * highest < float(guided.max()) <= highest + 1e-6 and float(guided.min()) < 0.15
    assert float(matched.max()) > 1.85


# The GAN on the teacher's activations, and approximate R1


class Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).flatten(1).sum(1)[:, None]


def test_the_generator_s_gradient_through_the_teacher() -> None:
    """Logits of x_t are N(b·Σw, |w|²·(a² + σ²)); d/db of E softplus(−l) is −Σw·E sigmoid(−l)."""
    weight = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).abs() / 6
    n, judge = networks(Linear(weight).requires_grad_(False)), GanJudge(by_teacher=True)
    b, generator = torch.tensor(B, requires_grad=True), torch.Generator().manual_seed(0)
    z = torch.randn(40_000, 1, 4, 4, generator=generator)
    gan_generator(judge.logits(n, A * z + b, None, generator)).backward()
    total, variance = float(weight.sum()), float(weight.square().sum()) * (A**2 + SIGMA**2)
    logits = line()
    share = torch.exp(-((logits - B * total) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    expected = -total * float((share * torch.sigmoid(-logits)).sum()) * float(logits[1] - logits[0])
    assert b.grad is not None and float(b.grad) == pytest.approx(expected, rel=0.01)


def test_the_teacher_s_head_leaves_the_fake_score_to_denoising() -> None:
    def gradients(judge: GanJudge, head: bool) -> tuple[Tensor | None, Tensor | None]:
        n = networks(Linear(torch.ones(1, 1, 4, 4)) if head else None)
        n.fake_score.requires_grad_(True)  # type: ignore[attr-defined]
        fake, real = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4)
        judge.critic_loss(n, fake, None, real, None, 0.5, torch.Generator().manual_seed(0))[0].backward()
        return n.fake_score.mean.grad, n.head.weight.grad if n.head else None  # type: ignore[attr-defined,union-attr]

    def seeded(judge: GanJudge, head: bool) -> tuple[Tensor | None, Tensor | None]:
        torch.manual_seed(0)
        return gradients(judge, head)

    alone, _ = seeded(GanJudge(), head=False)
    by_teacher, of_head = seeded(GanJudge(by_teacher=True), head=True)
    assert alone is not None and by_teacher is not None and of_head is not None
    torch.testing.assert_close(by_teacher, alone)
    assert float(of_head.abs().sum()) > 0


def test_approximate_r1_is_r1_s_value_and_gradient() -> None:
    """Of a linear D it is |w|² for any step: then so is the gradient, 2w."""
    head = Linear(torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)))
    images = torch.randn(60_000, 1, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for noise in (0.01, 0.5):
        step = noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
        penalty = approximate_r1(head(images), head(images + step), noise)
        exact = r1(head(images), images)
        assert float(penalty.detach()) == pytest.approx(float(exact.detach()), rel=0.03)
        (found,) = torch.autograd.grad(penalty, head.weight)
        torch.testing.assert_close(found, 2 * head.weight.detach(), rtol=0.1, atol=0.1)


def test_approximate_r1_weighs_half_as_r1_does() -> None:
    weight = torch.full((1, 1, 3, 3), 0.5)
    real = torch.randn(40_000, 1, 3, 3, generator=torch.Generator().manual_seed(1))

    def loss(penalised: float) -> tuple[Tensor, Any]:
        n = networks(Linear(weight))
        judge = GanJudge(by_teacher=True, r1=penalised, noise=0.1)
        return judge.critic_loss(n, real, None, real, None, 0.5, torch.Generator().manual_seed(0))

    (with_it, logs), (without, _) = loss(0.7), loss(0.0)
    assert float((with_it - without).detach()) == pytest.approx(0.7 / 2 * float(logs["r1"]), rel=1e-3)
    assert float(logs["r1"]) == pytest.approx(float(weight.square().sum()), rel=0.03)


# Recipes


LOOP = LoopSettings(1, 1)
RATES: Any = {"lr": 1e-3, "lr_critic": 1e-3, "generator_every": 1}
GAN: Any = {"gan_generator": 0.1, "gan_critic": 0.1}


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (FDistillRecipe(LOOP, **RATES), "gan_critic=0: expected a GAN"),
        (FDistillRecipe(LOOP, **RATES, **GAN, lowest_ratio=10.0), "lowest_ratio=10: expected less"),
        (DecoupledRecipe(LOOP, **RATES), "guidance_scale=1: expected more"),
        (DecoupledRecipe(LOOP, **RATES, guidance_scale=2.0, match_range=(0.5, 0.5)), "match_range=[0.5, 0.5]"),
        (SidRecipe(LOOP, **RATES, match_range=(0.8, 0.1)), "match_range=[0.8, 0.1]"),
        (
            SidRecipe(LoopSettings(9, 1), **RATES, student_begins=9),
            "student_begins=9: expected less than iterations, 9",
        ),
        (Dmd2Recipe(LOOP, **RATES, r1=1.0), "expected gan_generator and gan_critic above 0"),
        (Dmd2Recipe(LOOP, **RATES, gan_features="teacher"), "expected gan_generator and gan_critic above 0"),
    ],
)
def test_what_does_not_go_together_is_told(recipe: Dmd2Recipe, told: str) -> None:
    assert told in (recipe.conflict() or "")


def test_a_sid_with_a_gan_is_called_sida() -> None:
    assert (SidRecipe(LOOP, **RATES).kind, SidRecipe(LOOP, **RATES, **GAN).kind) == ("sid", "sida")
