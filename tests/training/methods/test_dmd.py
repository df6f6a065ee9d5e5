"""DMD: what its two losses are made of, and that each leads where it should."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dmd2.models.edm.network import ClassCondition, Edm, EdmConfig, EdmNetwork
from dmd2.training.loop import Batch, LoopSettings, Phase, training_step
from dmd2.training.losses import l2
from dmd2.training.methods.common import Networks, Samples
from dmd2.training.methods.dmd import RegressionPairs, dmd_phases
from dmd2.training.methods.dmd2 import dmd2_phases

CONFIG = EdmConfig(
    architecture="ddpmpp",
    resolution=8,
    classes=3,
    model_channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention=(4,),
)
SIGMA = 80.0
SAMPLES, PAIRS = 6, 4  # not alike: they are independent


def network(seed: int) -> EdmNetwork:
    """Untrained, but none of its layers is next to zero."""
    torch.manual_seed(seed)
    made = EdmNetwork(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return made


def labels(n: int) -> ClassCondition:
    return ClassCondition.of(torch.arange(n) % CONFIG.classes, CONFIG.classes)


def randn(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@dataclass
class Setting:
    student: EdmNetwork
    fake: EdmNetwork
    samples: Samples
    phases: list[Phase]
    matching: list[Phase]
    """DMD2's phases on the same networks"""

    @property
    def pairs(self) -> RegressionPairs:
        assert self.samples.pairs is not None
        return self.samples.pairs

    def batch(self, step: int = 0) -> Batch:
        return Batch(step, self.samples, torch.Generator().manual_seed(step))

    def generate(self) -> Tensor:
        level = torch.full((PAIRS,), SIGMA)
        return Edm(self.student)(SIGMA * self.pairs.noise, level, self.pairs.cond)


def setting(*, weight: float = 0.25, fake_seed: int = 1, lr: float = 1e-3) -> Setting:
    teacher, fake = network(0).requires_grad_(False), network(fake_seed)
    student = deepcopy(teacher).requires_grad_(True)
    pairs = RegressionPairs(randn(PAIRS, 5), randn(PAIRS, 6).clamp(-1, 1), labels(PAIRS))
    samples = Samples((SAMPLES, 3, 8, 8), labels(SAMPLES), labels(SAMPLES).unconditional(), pairs=pairs)
    networks = Networks(Edm(student), Edm(teacher), Edm(fake))
    optimizers = torch.optim.Adam(student.parameters(), lr), torch.optim.Adam(fake.parameters(), lr)
    phases = dmd_phases(networks, (student, fake), optimizers, SIGMA, l2, weight)
    matching = dmd2_phases(networks, (student, fake), optimizers, (SIGMA,))
    return Setting(student, fake, samples, phases, matching)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def test_nothing_is_matched_when_the_teacher_equals_the_fake() -> None:
    s = setting(weight=0.0, fake_seed=0)
    loss, _ = s.phases[0].loss(s.batch())
    loss.backward()
    assert all(not gradient.any() for gradient in gradients(s.student))
    other = setting(weight=0.0, fake_seed=1)
    loss, _ = other.phases[0].loss(other.batch())
    loss.backward()
    assert any(bool(gradient.any()) for gradient in gradients(other.student))


def test_regression_is_zero_on_the_student_s_own_images() -> None:
    s = setting()
    assert float(s.phases[0].loss(s.batch())[1]["regression"]) > 0.01
    with torch.no_grad():
        object.__setattr__(s.pairs, "target", s.generate())
    assert float(s.phases[0].loss(s.batch())[1]["regression"]) == 0


@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
def test_generator_s_loss_is_matching_and_weighted_regression(weight: float) -> None:
    s = setting(weight=weight)
    loss, logs = s.phases[0].loss(s.batch())
    matching, _ = s.matching[0].loss(s.batch())
    with torch.no_grad():
        regression = (s.generate() - s.pairs.target).square().mean()
    assert float(logs["regression"]) == pytest.approx(float(regression), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(matching.detach() + weight * regression), rel=1e-5)
    assert "dm_gradient" in logs


def test_critic_is_dmd2_s_without_a_gan() -> None:
    s = setting()
    loss, logs = s.phases[1].loss(s.batch(3))
    same, _ = s.matching[1].loss(s.batch(3))
    assert torch.equal(loss, same) and set(logs) == {"fake_score"}


def test_both_networks_learn_at_every_step() -> None:
    s = setting()
    assert [(phase.name, phase.every) for phase in s.phases] == [("generator", 1), ("critic", 1)]
    loop = LoopSettings(iterations=10, batch_size=SAMPLES)
    for step in (0, 1):
        before = deepcopy(s.student.state_dict()), deepcopy(s.fake.state_dict())
        logs = training_step(s.phases, s.batch(step), loop)
        for module, old in zip((s.student, s.fake), before, strict=True):
            assert any(not torch.equal(value, old[name]) for name, value in module.state_dict().items())
        assert {"generator", "critic", "regression", "dm_gradient", "fake_score"} <= logs.keys()


def test_regression_leads_to_the_teacher_s_images() -> None:
    s = setting(weight=100.0, lr=1e-2)  # drowns the matching
    loop = LoopSettings(iterations=1000, batch_size=SAMPLES)
    first = float(training_step(s.phases[:1], s.batch(0), loop)["regression"])
    for step in range(1, 30):
        last = float(training_step(s.phases[:1], s.batch(step), loop)["regression"])
    assert last < 0.5 * first
