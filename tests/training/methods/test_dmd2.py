"""DMD2: one-step students of a mixture of Gaussians, backward simulation, and who trains whom."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Denoiser
from dmd2.diffusion.noise import sample_sigma, sd_sigmas
from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.training.discriminators.head import ClassifierHead
from dmd2.training.loop import Batch, Logs, LoopSettings, Phase, training_step
from dmd2.training.losses import denoising
from dmd2.training.methods.common import Networks, Samples, SharedImages, generate, rollout
from dmd2.training.methods.dmd2 import Dmd2Recipe, dmd2_phases

MODES, RADIUS, SPREAD = 6, math.sqrt(2), 0.12  # unit variance in each of the two dimensions
SHAPE = (16, 2, 4, 4)  # 16 images of 16 points


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(values: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, 1)"""
    return values[:, None, None, None]


def points(x: Tensor) -> Tensor:
    """(B, 2, H, W) → (B·H·W, 2): every pixel of an image is a point of its own."""
    return x.movedim(1, -1).flatten(0, 2)


def unpoints(flat: Tensor, like: Tensor) -> Tensor:
    """(B·H·W, C) → (B, C, H, W)"""
    return flat.unflatten(0, (like.shape[0], *like.shape[2:])).movedim(-1, 1)


def levels_of_points(sigma: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B·H·W, 1)"""
    return sigma.repeat_interleave(x.shape[2] * x.shape[3])[:, None]


class Ring:
    """The exact denoiser of MODES equal Gaussians on a circle.

    An image is (B, 2, H, W): independent points. So the normalisation of DMD's gradient is a mean over points, as it
    is a mean over pixels in practice; for single points it would be as noisy as the gradient itself.
    """

    def __init__(self) -> None:
        self.sigmas = sd_sigmas().float()
        angles = torch.arange(MODES) * (2 * math.pi / MODES)
        self.means = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        flat, s2, sigma2 = points(x), SPREAD**2, levels_of_points(sigma, x) ** 2
        posterior = (-(flat[:, None] - self.means).square().sum(-1) / (2 * (s2 + sigma2))).softmax(1)
        return unpoints((s2 * flat + sigma2 * (posterior @ self.means)) / (s2 + sigma2), x)

    def features(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise * (1 + images(sigma) ** 2).sqrt()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2) / sigma**2

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        chosen = self.means[torch.randint(MODES, (noise[:, 0].numel(),), generator=generator)]
        return unpoints(chosen, noise) + SPREAD * noise


class Net(nn.Module):
    """A small denoiser of points, v-predicting like the emoji teacher; its last hidden layer are its features."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(16, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )
        self.out = nn.Linear(width, 2)
        self.sigmas = sd_sigmas().float()
        self.calls_with_gradient = 0

    def forward(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self.features(x, sigma, cond)[0]

    def features(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        self.calls_with_gradient += torch.is_grad_enabled()
        variance = 1 + images(sigma) ** 2
        level = levels_of_points(sigma, x).log()
        place = points(x / variance.sqrt())
        waves = [wave(scale * place) for scale in (2, 4, 8) for wave in (torch.sin, torch.cos)]
        hidden = self.body(torch.cat([place, *waves, level / 4, level.sin()], dim=1))
        v = unpoints(self.out(hidden), x)
        return x / variance - images(sigma) / variance.sqrt() * v, unpoints(hidden, x)

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise * (1 + images(sigma) ** 2).sqrt()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2) / sigma**2


def adam(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)


def imitate(ring: Ring, net: Net, seed: int, steps: int = 600) -> None:
    """Denoising training: in practice student and fake score start as the teacher."""
    loop = LoopSettings(iterations=steps, batch_size=16, warmup=20)

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        x0 = ring.sample(SHAPE, batch.generator)
        sigma = sample_sigma(net.sigmas, len(x0), batch.generator)
        return denoising(net, x0, sigma, torch.randn(x0.shape, generator=batch.generator), None)[0], {}

    phase = Phase("denoising", 1, net, adam(net, 3e-3), loss)
    for step in range(steps):
        training_step([phase], Batch(step, None, generator(1000 * seed + step)), loop)


def distilled(ring: Ring, seed: int, timestep: int, iterations: int) -> tuple[Tensor, Tensor]:
    """4,000 samples (B, 2) of the one-step student before and after DMD2 without a GAN."""
    torch.manual_seed(seed)
    teacher = Net()
    imitate(ring, teacher, seed)
    student, fake = deepcopy(teacher), deepcopy(teacher)
    sigmas = (float(ring.sigmas[timestep]),)
    samples = Samples(SHAPE, None, None)
    phases = dmd2_phases(
        Networks(student, ring, fake),
        (student, fake),
        (adam(student, 5e-3), adam(fake, 5e-3)),
        sigmas,
        generator_every=2,
    )

    @torch.no_grad()
    def generate() -> Tensor:
        noise = torch.randn(1, 250, 2, 4, 4, generator=generator(12345))
        return points(sample_few_step(conditioned(student, None), student.scale_initial_noise, noise, sigmas))

    before = generate()
    loop = LoopSettings(iterations=iterations, batch_size=16, warmup=20)
    for step in range(iterations):
        training_step(phases, Batch(step, samples, generator(10**6 + 10**5 * seed + step)), loop)
    return before, generate()


def coverage(ring: Ring, x: Tensor) -> tuple[float, float]:
    """The share of samples within four spreads of some mode, and of the mode with the fewest of these."""
    distance, mode = (x[:, None] - ring.means).norm(dim=-1).min(1)
    near = distance < 4 * SPREAD
    counts = torch.bincount(mode[near], minlength=MODES)
    return float(near.float().mean()), float(counts.min()) / len(x)


@pytest.mark.slow
def test_one_step_without_a_gan_covers_every_mode() -> None:
    ring = Ring()
    before, after = distilled(ring, seed=0, timestep=399, iterations=5000)
    near_before, _ = coverage(ring, before)
    near, least = coverage(ring, after)
    assert near_before < 0.5  # an undistilled denoiser leaves its samples between the modes; a ring would be 0.68
    assert near >= 0.9, near
    assert least >= 0.04, least


# Backward simulation


@dataclass
class Recorder:
    """A student of one weight that remembers what it was given and what it answered."""

    weight: Tensor
    sigmas: Tensor
    calls: list[tuple[Tensor, Tensor, Tensor, bool]]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        x0 = self.weight * x / (1 + images(sigma))
        self.calls.append((x.detach(), sigma, x0.detach(), torch.is_grad_enabled()))
        return x0

    def features(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise * (1 + images(sigma) ** 2).sqrt()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError


LEVELS = (14.6, 5.0, 1.5, 0.4)


def recorder() -> Recorder:
    return Recorder(torch.tensor(0.9, requires_grad=True), sd_sigmas().float(), [])


def test_the_student_is_rolled_out_to_a_random_step_from_pure_noise() -> None:
    exits = []
    for seed in range(40):
        student = recorder()
        out, level = rollout(student, Samples((64, 2, 4, 4), None, None), LEVELS, generator(seed), True)
        exits.append(len(student.calls) - 1)
        assert level == LEVELS[exits[-1]]
        assert torch.equal(out.detach(), student.calls[-1][2])
        for step, (x, sigma, _, _) in enumerate(student.calls):
            assert sigma.shape == (64,) and bool((sigma == LEVELS[step]).all())  # one exit step for the batch
            if step == 0:
                noise = x / (1 + LEVELS[0] ** 2) ** 0.5
            else:
                noise = (x - student.calls[step - 1][2]) / LEVELS[step]
            assert abs(float(noise.mean())) < 0.1 and float(noise.std()) == pytest.approx(1, abs=0.1)
    assert set(exits) == {0, 1, 2, 3}


def test_gradients_flow_through_the_last_step_alone() -> None:
    for seed in range(12):
        student = recorder()
        out = generate(student, Samples((4, 2, 4, 4), None, None), LEVELS, generator(seed))
        assert [with_gradient for *_, with_gradient in student.calls] == [False] * (len(student.calls) - 1) + [True]
        out.sum().backward()
        x, sigma, _, _ = student.calls[-1]
        assert student.weight.grad is not None
        # Through the rollout too it would be more: each earlier step multiplies by the weight as well.
        assert float(student.weight.grad) == pytest.approx(float((x / (1 + images(sigma))).sum()), rel=1e-4)


def test_without_backward_simulation_later_steps_start_from_noised_real_images() -> None:
    real = Ring().sample((64, 2, 4, 4), generator(7))
    exits = set()
    for seed in range(20):
        student = recorder()
        generate(student, Samples((64, 2, 4, 4), None, None, real), LEVELS, generator(seed), simulated=False)
        ((x, sigma, _, with_gradient),) = student.calls  # no rollout
        step = LEVELS.index(pytest.approx(float(sigma[0])))
        exits.add(step)
        noise = x / (1 + LEVELS[0] ** 2) ** 0.5 if step == 0 else (x - real) / LEVELS[step]
        assert with_gradient and abs(float(noise.mean())) < 0.1 and float(noise.std()) == pytest.approx(1, abs=0.1)
    assert exits == {0, 1, 2, 3}


def test_recipes_without_backward_simulation_ask_for_images_with_their_conditions() -> None:
    recipe = Dmd2Recipe(LoopSettings(1, 1), lr=1e-3, lr_critic=1e-3, generator_every=2)
    assert (recipe.needs_images, recipe.paired) == (False, False)
    recipe = replace(recipe, backward_simulation=False)
    assert (recipe.needs_images, recipe.paired) == (True, True)


def test_one_step_students_are_fed_as_when_sampling() -> None:
    student = recorder()
    generate(student, Samples((8, 2, 4, 4), None, None), (0.93,), generator(0))
    assert len(student.calls) == 1
    assert float(student.calls[0][0].std()) == pytest.approx((1 + 0.93**2) ** 0.5, rel=0.15)


# Who trains whom


@dataclass(frozen=True)
class Label:
    """A condition of one number for each image."""

    values: Tensor

    def cat(self, *others: Label) -> Label:
        return Label(torch.cat([self.values, *(other.values for other in others)]))


class Sized:
    """A denoiser that remembers batch sizes and levels, and hands on."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.sigmas = inner, inner.sigmas
        self.batches: list[int] = []
        self.levels: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        self.batches.append(len(x))
        self.levels.append(sigma)
        assert not torch.is_grad_enabled()
        return self.inner(x, sigma, cond)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Setting:
    student: Net
    fake: Net
    head: nn.Module | None
    critic: nn.ModuleDict
    teacher: Sized
    phases: list[Phase]
    samples: Samples
    loop: LoopSettings


def setting(*, gan: float = 0.0, every: int = 2, scale: float = 1.0, n: int = 16) -> Setting:
    torch.manual_seed(0)
    net = Net(128)
    student, fake = deepcopy(net), deepcopy(net)
    with torch.no_grad():  # not where they start from, or there is nothing to learn
        fake.out.bias += 0.3
    head = ClassifierHead(128, 4) if gan else None
    critic = nn.ModuleDict({"unet": fake} | ({"head": head} if head else {}))
    teacher = Sized(Ring())
    cond, uncond = Label(torch.ones(n)), Label(torch.zeros(n))
    real = Ring().sample((n, 2, 4, 4), generator(9)) if gan else None
    phases = dmd2_phases(
        Networks(student, teacher, fake, head),
        (student, critic),
        (adam(student, 1e-3), adam(critic, 1e-3)),
        (5.0, 0.9),
        guidance_scale=scale,
        generator_every=every,
        gan_weights=(gan, gan),
    )
    samples = Samples((n, 2, 4, 4), cond, uncond, real, cond)
    return Setting(student, fake, head, critic, teacher, phases, samples, LoopSettings(iterations=1000, batch_size=n))


def weights_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def changed(module: nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True)]


def train_one(s: Setting, step: int) -> Logs:
    return training_step(s.phases, Batch(step, s.samples, generator(step)), s.loop)


@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_the_critic_s_turn_leaves_the_student_alone(gan: float) -> None:
    s = setting(gan=gan)
    student, critic = weights_of(s.student), weights_of(s.critic)
    logs = train_one(s, 1)  # the generator's turn is at even steps
    assert not any(changed(s.student, student)) and all(changed(s.critic, critic))
    assert "critic" in logs and "generator" not in logs
    assert s.student.calls_with_gradient == 0 and s.teacher.batches == []
    assert all(p.grad is None for p in s.student.parameters())


def test_on_disjoint_steps_the_critic_rests_when_the_student_learns() -> None:
    s = setting(gan=0.1)
    generator_phase, critic = s.phases
    s.phases[1] = replace(critic, rests=generator_phase.every)
    turns = []
    for step in range(4):
        before = weights_of(s.student), weights_of(s.critic)
        logs = train_one(s, step)
        turns.append((any(changed(s.student, before[0])), any(changed(s.critic, before[1]))))
        assert ("generator" in logs, "critic" in logs) == turns[-1]
    assert turns == [(True, False), (False, True)] * 2


@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_the_generator_s_turn_leaves_the_critic_alone(gan: float) -> None:
    s = setting(gan=gan)
    student, critic = weights_of(s.student), weights_of(s.critic)
    seen = []
    phase = s.phases[1]

    def loss(batch: Batch) -> tuple[Tensor, Logs]:  # the critic's turn begins: look at what the generator's left
        seen.append((changed(s.student, student), changed(s.critic, critic)))
        seen.append(([p.grad is not None for p in (*s.student.parameters(), *s.critic.parameters())], []))
        return phase.loss(batch)

    s.phases[1] = Phase(phase.name, phase.every, phase.module, phase.optimizer, loss)
    logs = train_one(s, 0)
    assert len(seen) == 2
    assert all(seen[0][0]) and not any(seen[0][1])
    assert not any(seen[1][0])
    assert {"generator", "critic", "dm_gradient", "fake_score"} <= logs.keys()
    assert ("gan_generator" in logs) == ("gan_critic" in logs) == (gan > 0)


def test_generated_images_are_shared_by_both_updates_of_the_same_part_of_the_same_step() -> None:
    """As in the published runs: what the generator was judged by is what the critic learns from."""
    s = setting(every=2)
    shared = SharedImages(s.student, (5.0, 0.9))
    one, two, later = (Batch(step, s.samples, generator(step)) for step in (1, 1, 2))

    def is_shared(part: Batch, x0: Tensor) -> bool:
        """Whether the critic gets these very images; others are generated for it, without gradient, too."""
        seen = shared.for_critic(part)
        assert not seen.requires_grad and seen.shape == x0.shape
        return seen.data_ptr() == x0.data_ptr()

    x0, level = shared.for_generator(one)
    assert x0.requires_grad and level in (5.0, 0.9)
    assert not is_shared(two, x0) and is_shared(one, x0) and not is_shared(one, x0)
    again, _ = shared.for_generator(one)
    shared.for_generator(later)
    assert not is_shared(one, again)  # of a step that is over
    alone = SharedImages(s.student, (5.0, 0.9), share=False)
    x0, _ = alone.for_generator(one)
    assert not torch.equal(alone.for_critic(one), x0)  # of new noise

    calls: list[Any] = []
    s.student.register_forward_hook(lambda *given: calls.append(given))
    passes = []
    for step in range(2):
        before = len(calls)
        train_one(s, step)
        passes.append(len(calls) - before)
    rollouts = [int(torch.randint(2, (1,), generator=generator(step))) + 1 for step in range(2)]
    assert passes == rollouts  # one a step, whether both learn from it or the critic alone


def test_the_critic_learns_to_denoise_and_to_tell_real_from_fake() -> None:
    s = setting(gan=0.1, n=64)
    assert s.head is not None
    fake, head = weights_of(s.fake), weights_of(s.head)
    first = train_one(s, 1)
    assert all(changed(s.fake, fake)) and all(changed(s.head, head))
    logs = [train_one(s, step) for step in range(3, 400, 2)]  # odd steps: the student stands still
    last = {name: sum(float(log[name]) for log in logs[-20:]) / 20 for name in first}
    assert last["fake_score"] < 0.8 * float(first["fake_score"])
    assert last["gan_critic"] < 1.3  # 2·ln 2 = 1.39 is a guess
    assert last["gan_accuracy"] > 0.55


def test_the_classifier_reaches_the_student_s_gradient() -> None:
    def gradients(gan: float) -> list[Tensor]:
        s = setting(gan=gan)
        loss, _ = s.phases[0].loss(Batch(0, s.samples, generator(0)))
        loss.backward()
        return [p.grad for p in s.student.parameters() if p.grad is not None]

    without, with_it = gradients(1e-9), gradients(1.0)
    assert len(without) == len(with_it) > 0
    assert any(float((a - b).abs().max()) > 1e-4 for a, b in zip(without, with_it, strict=True))


def test_a_teacher_that_equals_the_fake_moves_nothing() -> None:
    torch.manual_seed(0)
    student, ring = Net(32), Ring()
    phases = dmd2_phases(
        Networks(student, ring, ring),
        (student, nn.Module()),
        (adam(student, 1e-3), adam(Net(8), 1e-3)),
        (5.0, 0.9),
    )
    loss, logs = phases[0].loss(Batch(0, Samples((16, 2, 4, 4), None, None), generator(0)))
    loss.backward()
    assert float(logs["dm_gradient"]) == 0
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


def test_the_teacher_is_guided_the_fake_is_not() -> None:
    s = setting(scale=3.0, every=1, n=16)
    fake_batches: list[int] = []
    s.fake.register_forward_hook(lambda module, inputs, output: fake_batches.append(len(inputs[0])))
    s.phases[0].loss(Batch(0, s.samples, generator(0)))
    assert s.teacher.batches == [32]
    assert fake_batches == [16]


def test_distribution_matching_draws_from_the_middle_of_the_table() -> None:
    s = setting(every=1, n=512)
    for step in range(10):
        s.phases[0].loss(Batch(step, s.samples, generator(step)))
    levels, table = torch.cat(s.teacher.levels), s.teacher.sigmas
    assert float(levels.min()) >= float(table[20]) and float(levels.max()) <= float(table[980])
    assert float(levels.min()) < float(table[30]) and float(levels.max()) > float(table[970])
