"""The losses: what each one is, by autograd and on distributions whose densities are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd2.diffusion.noise import add_noise, karras_sigmas
from dmd2.models.edm.network import ClassCondition, Edm, EdmConfig, EdmNetwork
from dmd2.training.discriminators.head import ClassifierHead, GanJudge, noised_logits
from dmd2.training.loop import Logs
from dmd2.training.losses import (
    denoising,
    distribution_matching,
    distribution_matching_gradient,
    gan_critic,
    gan_generator,
)
from dmd2.training.methods.common import Networks


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one spread in D dimensions: density and posterior mean in closed form, at every noise level."""

    weights: Tensor
    means: Tensor
    """(K, D)"""
    spread: float

    def _log_terms(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(B, K) log of each weighted component at x (B, D), noised to `sigma` (B,)."""
        variance = self.spread**2 + sigma[:, None] ** 2
        distance2 = (x[:, None] - self.means).square().sum(-1)
        normal = -distance2 / (2 * variance) - x.shape[1] / 2 * (2 * math.pi * variance).log()
        return self.weights.log() + normal

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self._log_terms(x, sigma).logsumexp(1)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] by Bayes, without the score."""
        posterior = self._log_terms(x, sigma).softmax(1)
        s2, sigma2 = self.spread**2, sigma[:, None, None] ** 2
        means = (s2 * x[:, None] + sigma2 * self.means) / (s2 + sigma2)  # (B, K, D)
        return (posterior[..., None] * means).sum(1)


def mixture(k: int, dimensions: int, spread: float, seed: int) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(k, generator=generator, dtype=torch.float64) + 0.2
    means = 2 * torch.randn(k, dimensions, generator=generator, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, spread)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Distribution matching


@pytest.mark.parametrize("dimensions", [1, 2, 7])
@pytest.mark.parametrize("level", [0.05, 0.5, 2.0, 10.0])
def test_difference_of_denoisers_is_the_gradient_of_the_kl(dimensions: int, level: float) -> None:
    real, fake = mixture(5, dimensions, 0.3, seed=1), mixture(3, dimensions, 0.5, seed=2)
    n = 64
    sigma = torch.full((n,), level, dtype=torch.float64)
    x0 = randn(n, dimensions, seed=3) * 2
    x = add_noise(x0, sigma, randn(n, dimensions, seed=4)).requires_grad_()
    log_ratio = fake.log_density(x, sigma) - real.log_density(x, sigma)
    (expected,) = torch.autograd.grad(log_ratio.sum(), x)
    expected = level**2 * expected

    x = x.detach()
    mu_real, mu_fake = real.denoise(x, sigma), fake.denoise(x, sigma)
    assert float(expected.abs().max()) > 1e-3
    assert float((mu_fake - mu_real - expected).abs().max()) < 1e-9

    # What the loss divides by: for each sample, how far the teacher moves it.
    gradient = distribution_matching_gradient(x0, mu_real, mu_fake)
    scale = (x0 - mu_real).abs().mean(1, keepdim=True)
    assert float((gradient * scale - expected).abs().max()) < 1e-9


def test_gradient_is_exactly_zero_when_teacher_equals_fake() -> None:
    x = randn(4, 4, 16, 16, dtype=torch.float32)
    mu = randn(4, 4, 16, 16, seed=1, dtype=torch.float32)
    assert not distribution_matching_gradient(x, mu, mu.clone()).any()
    assert not distribution_matching_gradient(x, x, x).any()  # 0/0


def test_gradient_leads_from_the_fake_to_the_real_distribution() -> None:
    """Following it must move the samples of one Gaussian onto another."""
    real, one = mixture(1, 16, 0.5, seed=0), torch.ones(1, dtype=torch.float64)
    x = real.means + 3 + 0.5 * randn(256, 16)
    sigma = torch.full((256,), 0.5, dtype=torch.float64)
    for step in range(200):
        mean = x.mean(0, keepdim=True)
        fake = Mixture(one, mean, float((x - mean).std()))  # the perfect fake score
        noisy = add_noise(x, sigma, randn(256, 16, seed=step + 10))
        gradient = distribution_matching_gradient(x, real.denoise(noisy, sigma), fake.denoise(noisy, sigma))
        x = x - 0.05 * gradient
    assert float((x.mean(0) - real.means[0]).abs().max()) < 0.1
    assert float((x - x.mean(0)).std()) == pytest.approx(0.5, abs=0.1)


def test_scale_is_each_image_s_own() -> None:
    x, mu_real, mu_fake = (randn(3, 4, 8, 8, seed=seed) for seed in range(3))
    gradient = distribution_matching_gradient(x, mu_real, mu_fake)
    for i in range(3):
        expected = (mu_fake[i] - mu_real[i]) / (x[i] - mu_real[i]).abs().mean()
        assert torch.allclose(gradient[i], expected)
    alone = distribution_matching_gradient(x[1:2], mu_real[1:2], mu_fake[1:2])
    assert torch.allclose(gradient[1:2], alone)
    # Scaling all three by one number leaves it as it is.
    assert torch.allclose(distribution_matching_gradient(5 * x, 5 * mu_real, 5 * mu_fake), gradient)


def test_what_is_not_a_number_becomes_zero_and_stays_in_its_image() -> None:
    x, mu_real, mu_fake = (randn(3, 4, 8, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    mu_real[0] = x[0]  # divides by zero
    mu_fake[1, 0, 0, 0] = float("nan")
    mu_fake[1, 0, 0, 1] = float("inf")
    gradient = distribution_matching_gradient(x, mu_real, mu_fake)
    assert bool(torch.isfinite(gradient).all())
    assert not gradient[0].any()
    assert gradient[1].flatten()[:2].tolist() == [0, 0] and bool(gradient[1].flatten()[2:].all())
    assert bool(gradient[2].all())


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 4, 8, 8)])
def test_loss_hands_its_gradient_over(shape: tuple[int, ...]) -> None:
    x, gradient = randn(*shape).requires_grad_(), randn(*shape, seed=1)
    loss = distribution_matching(x, gradient)
    loss.backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, gradient / x.numel(), rtol=1e-12, atol=1e-15)
    assert float(loss.detach()) == pytest.approx(0.5 * float(gradient.square().mean()))


def test_loss_hands_it_through_the_generator_only() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    noise = randn(4, 2, dtype=torch.float32)
    gradient = randn(4, 2, seed=1, dtype=torch.float32).requires_grad_()
    distribution_matching(weight * noise, gradient).backward()
    assert weight.grad is not None and gradient.grad is None
    assert float(weight.grad) == pytest.approx(float((gradient.detach() * noise).mean()), rel=1e-5)


# GAN


def test_gan_losses_are_softplus() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])

    def softplus(*values: float) -> float:
        return sum(math.log1p(math.exp(v)) for v in values) / len(values)

    assert float(gan_generator(fake)) == pytest.approx(softplus(-0.5, -3.0))
    assert float(gan_critic(real, fake)) == pytest.approx(softplus(0.5, 3.0) + softplus(-2.0, 1.0))
    assert float(gan_critic(torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))) == pytest.approx(2 * math.log(2))


def test_critic_raises_real_logits_and_lowers_fake_ones_and_the_generator_raises_its_own() -> None:
    real, fake = (torch.randn(6, requires_grad=True) for _ in range(2))
    gan_critic(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert bool((real.grad < 0).all()) and bool((fake.grad > 0).all())  # descent goes the other way
    fake.grad = None
    gan_generator(fake).backward()
    assert fake.grad is not None and bool((fake.grad < 0).all())
    # No saturation: a generator that is found out with certainty still learns.
    lost = torch.tensor([-50.0], requires_grad=True)
    gan_generator(lost).backward()
    assert lost.grad is not None and float(lost.grad) == pytest.approx(-1)


# Denoising


class Linear(nn.Module):
    """A denoiser of one weight: x0 = weight · x, with features and a loss weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.sigmas = karras_sigmas(100, 0.1, 10.0).float()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: None) -> Tensor:
        return self.features(x, sigma, cond)[0]

    def features(self, x: Tensor, sigma: Tensor, cond: None) -> tuple[Tensor, Tensor]:
        self.seen.append((x, sigma))
        return self.weight * x, (self.weight * x).repeat(1, 32, 1, 1)

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise * sigma[:, None, None, None]

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return sigma**-2 + 4


def test_denoising_is_the_weighted_error_of_x0() -> None:
    net = Linear()
    x0, noise = (randn(3, 4, 4, 4, seed=seed, dtype=torch.float32) for seed in range(2))
    sigma = torch.tensor([0.2, 1.0, 7.0])
    loss, features = denoising(net, x0, sigma, noise, None)
    s = sigma[:, None, None, None]
    expected = ((s**-2 + 4) * (0.5 * (x0 + s * noise) - x0) ** 2).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert features.shape == (3, 128, 4, 4)
    loss.backward()
    assert net.weight.grad is not None and float(net.weight.grad) != 0


def test_critic_loss_is_denoising_and_classification_in_two_passes() -> None:
    net = Linear()
    head = ClassifierHead(128, 4)
    fake, real = (randn(3, 4, 4, 4, seed=seed, dtype=torch.float32) for seed in range(2))
    seeded = torch.Generator().manual_seed
    loss, logs = GanJudge().critic_loss(Networks(net, net, net, head), fake, None, real, None, 0.25, seeded(0))
    assert len(net.seen) == 2  # the generated samples' pass serves both
    (x, sigma), (x_real, sigma_real) = net.seen
    noise = (x - fake) / sigma[:, None, None, None]
    denoised, features = denoising(net, fake, sigma, noise, None)
    logits_real = head((net.weight * x_real).repeat(1, 32, 1, 1))
    classification = gan_critic(logits_real, head(features))
    assert float(loss.detach()) == pytest.approx(float((denoised + 0.25 * classification).detach()), rel=1e-4)
    assert float(logs["fake_score"]) == pytest.approx(float(denoised.detach()), rel=1e-4)
    assert float(logs["gan_critic"]) == pytest.approx(float(classification.detach()), rel=1e-4)
    assert 0 <= float(logs["gan_accuracy"]) <= 1
    assert not torch.equal(sigma, sigma_real)

    without, logs = GanJudge().critic_loss(Networks(net, net, net), fake, None, None, None, 0.25, seeded(0))
    assert set(logs) == {"fake_score"}
    assert float(without.detach()) == pytest.approx(float(denoised.detach()), rel=1e-4)


@pytest.mark.parametrize("r1", [0.0, 0.5])
def test_real_images_beside_the_generated_ones_change_no_loss(r1: float) -> None:
    """Of a real network: one batch for two, the same draws, the same gradients."""
    torch.manual_seed(0)
    shape: Any = {"resolution": 8, "classes": 3, "model_channels": 32, "channel_mult": (1, 2), "blocks": 1}
    network = EdmNetwork(EdmConfig(architecture="ddpmpp", attention=(), **shape))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)  # a new one gives nothing, whatever it is given
    net, head = Edm(network), ClassifierHead(64, 4)
    fake, real = (randn(3, 3, 8, 8, seed=seed, dtype=torch.float32) for seed in range(2))
    conds = ClassCondition.of(torch.tensor([0, 1, 2]), 3), ClassCondition.of(torch.tensor([2, -1, 0]), 3)
    batches: list[int] = []
    network.model.enc["8x8_conv"].register_forward_hook(lambda _, given, out: batches.append(len(out)))

    def told(together: bool) -> tuple[Tensor, Logs, list[Tensor]]:
        judge, n = GanJudge(r1=r1, together=together), Networks(net, net, net, head)
        loss, logs = judge.critic_loss(n, fake, conds[0], real, conds[1], 0.25, torch.Generator().manual_seed(0))
        return (
            loss,
            logs,
            list(torch.autograd.grad(loss, [*network.parameters(), *head.parameters()], allow_unused=True)),
        )

    (apart, logs, expected), (joint, also, found) = told(False), told(True)
    assert batches == ([3, 3, 3, 6, 3] if r1 else [3, 3, 6])
    torch.testing.assert_close(joint, apart, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(also, logs, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_classifier_judges_noisy_samples_at_levels_from_the_whole_table() -> None:
    net, head = Linear(), ClassifierHead(128, 4)
    x0 = torch.zeros(2000, 4, 4, 4, requires_grad=True)
    logits = noised_logits(net, head, x0, None, torch.Generator().manual_seed(0))
    assert logits.shape == (2000, 1, 1, 1)
    (x, sigma) = net.seen[0]
    assert float(sigma.min()) == pytest.approx(0.1) and float(sigma.max()) == pytest.approx(10)
    assert torch.allclose(x.std((1, 2, 3)) / sigma, torch.ones(2000), atol=0.5)
    gan_generator(logits).backward()
    assert x0.grad is not None and float(x0.grad.abs().max()) > 0


@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_head_gives_one_logit_an_image_that_depends_on_it(side: int) -> None:
    torch.manual_seed(0)
    logits = ClassifierHead(128, side)(randn(4, 128, side, side, dtype=torch.float32))
    assert logits.shape == (4, 1, 1, 1)
    assert float(logits.detach().std()) > 1e-3


@pytest.mark.parametrize("channels", [32, 80])
def test_head_refuses_channels_that_it_would_be_blind_to(channels: int) -> None:
    with pytest.raises(ValueError, match="channels"):
        ClassifierHead(channels, 4)
