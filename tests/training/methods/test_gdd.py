"""GDD: R1 by hand, who learns when, what GDD-I freezes, and a generator that finds the data."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Cond
from dmd2.models.edm.family import EdmFamily, encoder_levels
from dmd2.models.edm.network import PUBLISHED, ClassCondition, Edm, EdmConfig, EdmNetwork
from dmd2.training.discriminators.projected import DenoiserFeatures, ProjectedDiscriminator
from dmd2.training.loop import Batch, Logs, LoopSettings, Method, Phase, train, training_step
from dmd2.training.losses import gan_critic, gan_generator, r1
from dmd2.training.methods.common import Samples
from dmd2.training.methods.gdd import GddRecipe, freeze_for_gdd_i, gdd_phases, lazy_adam
from dmd2.training.recipes.edm import EDM_RECIPES

N, SIDE = 4, 8
CONFIG = EdmConfig(
    architecture="ddpmpp",
    resolution=SIDE,
    classes=3,
    model_channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention=(4,),
    boundary=0.002,
)
LOOP = LoopSettings(iterations=100, batch_size=N, max_grad_norm=float("inf"), decay=False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(step: int, samples: Samples | None = None) -> Batch:
    return Batch(step, samples, generator(step))


# R1


def test_r1_is_the_mean_squared_gradient_of_each_image_s_logits() -> None:
    torch.manual_seed(0)
    d = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64).requires_grad_()
    penalty = r1(d(images), images)

    def logit(flat: Tensor) -> float:
        return float(d(flat.reshape(1, 3, 2, 2)).sum().detach())

    h, expected = 1e-6, 0.0
    for image in images.detach():
        flat = image.flatten()
        for i in range(12):
            step = torch.zeros(12, dtype=torch.float64)
            step[i] = h
            expected += ((logit(flat + step) - logit(flat - step)) / (2 * h)) ** 2 / 5
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-7)


def test_r1_of_a_quadratic_is_known_and_trains() -> None:
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    images = torch.randn(4, 3, 2, 2, dtype=torch.float64).requires_grad_()
    penalty = r1(a * images.square().flatten(1).sum(1), images)  # gradient 2·a·x
    per_image = images.detach().square().flatten(1).sum(1)
    assert float(penalty.detach()) == pytest.approx(float((4 * a.detach() ** 2 * per_image).mean()))
    penalty.backward()
    assert a.grad is not None and float(a.grad) == pytest.approx(float((8 * a.detach() * per_image).mean()))


def test_lazy_adam_does_in_17_updates_what_adam_does_in_16() -> None:
    group = lazy_adam([nn.Parameter(torch.zeros(1))], 3.4e-4, (0.0, 0.99), 16).param_groups[0]
    assert group["lr"] == pytest.approx(3.2e-4)
    assert group["betas"] == (0.0, pytest.approx(0.99 ** (16 / 17)))
    assert group["betas"][1] ** 17 == pytest.approx(0.99**16) and group["weight_decay"] == 0


# Phases


@dataclass
class Setting:
    student: EdmNetwork
    teacher: EdmNetwork
    discriminator: ProjectedDiscriminator
    samples: Samples
    phases: list[Phase]


def setting(*, improved: bool = False, gamma: float = 1e-4, every: int = 16) -> Setting:
    """`improved`: GDD-I."""
    torch.manual_seed(0)
    teacher = EdmNetwork(CONFIG)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    student = deepcopy(teacher)
    trained = freeze_for_gdd_i(student, EdmFamily.frozen_in_gdd_i) if improved else student
    teacher.requires_grad_(False)
    cond = ClassCondition.of(torch.arange(N) % 3, 3)
    real = torch.rand(N, 3, SIDE, SIDE, generator=generator(1)) * 2 - 1
    samples = Samples((N, 3, SIDE, SIDE), cond, cond.unconditional(), real, cond)
    backbone = DenoiserFeatures(Edm(teacher), [*encoder_levels(teacher), teacher.model.dec["4x4_in0"]])
    d = ProjectedDiscriminator([backbone], real, cond, channels=8)
    phases = gdd_phases(
        Edm(student),
        d,
        (trained, d),
        (
            torch.optim.Adam(trained.parameters(), 1e-3, betas=(0.0, 0.99)),
            lazy_adam(d.parameters(), 1e-3, (0.0, 0.99), every),
        ),
        80.0,
        gamma,
        every,
    )
    return Setting(student, teacher, d, samples, phases)


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def phase_of(s: Setting, name: str) -> Phase:
    return next(phase for phase in s.phases if phase.name == name)


def test_generator_and_discriminator_take_turns_and_r1_comes_now_and_then() -> None:
    s = setting(every=3)
    seen = []
    for step in range(7):
        student, d = weights(s.student), weights(s.discriminator)
        logs = training_step(s.phases, batch(step, s.samples), LOOP)
        assert changed(s.student, student) and changed(s.discriminator, d)
        seen.append("r1" in logs)
        assert {"generator", "discriminator", "gan_accuracy"} <= logs.keys()
    assert seen == [False, False, False, True, False, False, True]  # not at step 0
    assert changed(s.teacher, weights(s.teacher)) == set()


@pytest.mark.parametrize("name", ["generator", "r1", "discriminator"])
def test_each_phase_trains_its_own_network_only(name: str) -> None:
    s = setting(gamma=1.0)
    student, d = weights(s.student), weights(s.discriminator)

    def nothing(phase: Phase) -> tuple[Tensor, Logs]:
        zero = torch.zeros((), requires_grad=True)
        return sum((0 * p.sum() for p in phase.module.parameters() if p.requires_grad), zero), {}

    # The others get gradients of zero, with which Adam moves nothing.
    others = {p.name: replace(p, loss=lambda _, p=p: nothing(p)) for p in s.phases if p.name != name}
    training_step([others.get(p.name, p) for p in s.phases], batch(16, s.samples), LOOP)
    assert bool(changed(s.student, student)) == (name == "generator")
    assert bool(changed(s.discriminator, d)) == (name != "generator")


def test_losses_are_softplus_of_the_logits() -> None:
    s = setting()
    s.discriminator.eval()  # spectral norm's estimate stands still
    b = batch(0, s.samples)
    loss, _ = phase_of(s, "generator").loss(b)
    noise = torch.randn(s.samples.shape, generator=again())
    level = torch.full((N,), 80.0)
    fake = Edm(s.student)(80 * noise, level, s.samples.cond)
    logits_fake = s.discriminator(fake, s.samples.cond)
    assert float(loss.detach()) == pytest.approx(float(gan_generator(logits_fake).detach()), rel=1e-4)
    real = s.samples.real
    assert real is not None
    logits_real = s.discriminator(real, s.samples.real_cond)
    loss, logs = phase_of(s, "discriminator").loss(batch(0, s.samples))
    assert float(loss.detach()) == pytest.approx(float(gan_critic(logits_real, logits_fake).detach()), rel=1e-4)
    assert 0 <= float(logs["gan_accuracy"]) <= 1


def again() -> torch.Generator:
    """As the generator of step 0 is once the exit step is drawn."""
    g = generator(0)
    torch.randint(1, (1,), generator=g)
    return g


def test_r1_is_as_strong_as_if_it_came_at_every_step() -> None:
    s = setting(gamma=0.5, every=8)
    loss, logs = phase_of(s, "r1").loss(batch(0, s.samples))
    assert float(logs["r1_penalty"]) > 0
    assert float(loss.detach()) == pytest.approx(8 * 0.5 / 2 * float(logs["r1_penalty"]), rel=1e-5)
    loss.backward()  # a second derivative, through the teacher's attention
    assert all(p.grad is not None for name, p in s.discriminator.named_parameters() if name.endswith("original"))


def test_without_gamma_there_is_no_r1() -> None:
    assert [phase.name for phase in setting(gamma=0.0).phases] == ["generator", "discriminator"]


# GDD-I


def frozen_share(network: nn.Module) -> float:
    total = sum(p.numel() for p in network.parameters())
    return 1 - sum(p.numel() for p in freeze_for_gdd_i(network, EdmFamily.frozen_in_gdd_i)) / total


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("edm-cifar10-32x32-uncond-ve", 0.844),
        ("edm-cifar10-32x32-cond-vp", 0.854),
        ("edm-ffhq-64x64-uncond-ve", 0.838),
        ("edm-imagenet-64x64-cond-adm", 0.788),
    ],
)
def test_gdd_i_freezes_most_of_a_published_network(name: str, share: float) -> None:
    with torch.device("meta"):
        network = EdmNetwork(PUBLISHED[name])
    assert frozen_share(network) == pytest.approx(share, abs=0.001)


def test_gdd_i_freezes_convolutions_of_blocks_alone() -> None:
    network = EdmNetwork(CONFIG)
    trainable = freeze_for_gdd_i(network, EdmFamily.frozen_in_gdd_i)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in trainable}
    assert {name.split(".")[-2] for name in frozen} == {"conv0", "conv1", "proj"}
    kept = {name.split(".")[-2] for name, p in network.named_parameters() if p.requires_grad}
    assert {"norm0", "norm1", "norm2", "affine", "qkv", "skip", "8x8_conv", "8x8_aux_conv", "map_layer0"} <= kept
    with pytest.raises(ValueError, match="has no parameters called"):
        freeze_for_gdd_i(nn.Linear(2, 2), EdmFamily.frozen_in_gdd_i)


def test_frozen_parameters_do_not_change_and_the_others_do() -> None:
    s = setting(improved=True)
    frozen = {name for name, p in s.student.named_parameters() if not p.requires_grad}
    before = weights(s.student)
    for step in range(3):
        training_step(s.phases, batch(step, s.samples), LOOP)
    moved = changed(s.student, before)
    assert frozen and not moved & frozen
    assert moved == before.keys() - frozen


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """R1 shares its network and optimizer with another phase, and GDD-I's checkpoint holds a part of the student."""

    def run(out: Path, *parts: int) -> dict[str, Tensor]:
        for i, iterations in enumerate(parts):
            s = setting(improved=True, every=2)
            method = Method(s.phases, data=lambda step, data=s.samples: data, ema_model=s.student)
            loop = LoopSettings(iterations, N, max_grad_norm=float("inf"), decay=False, checkpoint_every=1000)
            assert train(method, loop, out, resume=i > 0, recipe={"name": "gdd-i"})
        return s.student.state_dict() | s.discriminator.state_dict()

    whole, parts = run(tmp_path / "whole", 5), run(tmp_path / "parts", 3, 5)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 5


# The whole


class Shift(nn.Module):
    """A generator of one number for each channel: images of noise around it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([-0.6, 0.5, 0.0])[:, None, None])
        self.sigmas = torch.tensor([0.002, 80.0])

    def forward(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self.mean + 0.2 * x / sigma[:, None, None, None]

    def features(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise * sigma[:, None, None, None]

    def loss_weight(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError


class Colours:
    """A frozen random network of one 4×4 map."""

    def __init__(self) -> None:
        self.weight = torch.randn(16, 3, 2, 2, generator=generator(0)) / 12**0.5

    def __call__(self, images: Tensor, cond: Cond) -> list[Tensor]:
        return [torch.conv2d(images, self.weight, stride=2).tanh()]


def test_the_generator_s_mean_moves_to_the_data_s() -> None:
    torch.manual_seed(0)
    student, target = Shift(), torch.tensor([0.4, -0.3, 0.2])
    d = ProjectedDiscriminator([Colours()], torch.zeros(1, 3, 8, 8), None, channels=8)

    def samples(step: int) -> Samples:
        noise = torch.randn(16, 3, 8, 8, generator=generator(10**6 + step))
        return Samples((16, 3, 8, 8), None, None, target[:, None, None] + 0.2 * noise)

    phases = gdd_phases(
        student,
        d,
        (student, d),
        (
            torch.optim.Adam(student.parameters(), 2e-2, betas=(0.0, 0.99)),
            lazy_adam(d.parameters(), 4e-3, (0.0, 0.99), 16),
        ),
        80.0,
        1e-2,
        16,
    )
    first = float((student.mean.detach().flatten() - target).abs().max())
    loop = LoopSettings(iterations=1000, batch_size=16, max_grad_norm=float("inf"), decay=False)
    path = []
    for step in range(240):
        training_step(phases, batch(step, samples(step)), loop)
        path.append(student.mean.detach().flatten().clone())
    last = float((torch.stack(path[-40:]).mean(0) - target).abs().max())  # it circles around where it should be
    assert first == pytest.approx(1.0) and last < 0.1, last


def test_the_discriminator_learns_from_images_of_new_noise() -> None:
    s = setting()
    seen: list[Tensor] = []
    discriminator = s.discriminator.forward
    s.discriminator.forward = lambda x, cond: (seen.append(x.detach().clone()), discriminator(x, cond))[1]
    training_step(s.phases, batch(1, s.samples), LOOP)
    assert len(seen) == 3 and s.samples.real is not None and torch.equal(seen[2], s.samples.real)
    others = (seen[0] - seen[1]).flatten(1).square().mean(1)
    assert float(others.min()) > 0.1 * float(seen[0].var())


def test_published_recipes_weigh_r1_as_the_published_runs() -> None:
    """1e-4 beside sums over 64 (ImageNet: 128) images and two feature networks is this beside means."""
    weights = {name: recipe.r1_gamma for name, recipe in EDM_RECIPES.items() if isinstance(recipe, GddRecipe)}
    for name, gamma in weights.items():
        sums = 1 if "small" in name else 256 if "imagenet" in name else 128
        assert gamma == pytest.approx(1e-4 / sums)
