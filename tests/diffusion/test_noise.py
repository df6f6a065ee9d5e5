"""Noise levels: both tables against their sources, the part of a table that is drawn from, noise by seed."""

from collections import Counter

import pytest
import torch
from diffusers import DDPMScheduler

from dmd2.diffusion.noise import add_noise, karras_sigmas, per_image, sample_sigma, sd_sigmas, seeded_noise


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sd_table_is_that_of_diffusers() -> None:
    sigmas = sd_sigmas()
    assert sigmas.shape == (1000,) and sigmas.dtype == torch.float64
    assert float(sigmas[0]) == pytest.approx(0.0292, abs=5e-5)
    assert float(sigmas[-1]) == pytest.approx(14.6146, abs=5e-4)
    assert bool((sigmas.diff() > 0).all())
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alpha_bar = scheduler.alphas_cumprod.double()  # computed in float32
    assert torch.allclose(1 / (1 + sigmas**2), alpha_bar, rtol=2e-5, atol=0)
    assert torch.allclose(sigmas, ((1 - alpha_bar) / alpha_bar).sqrt(), rtol=2e-5, atol=0)


def test_karras_table_is_equation_5() -> None:
    sigmas = karras_sigmas()
    assert sigmas.shape == (1000,) and sigmas.dtype == torch.float64
    assert float(sigmas[0]) == pytest.approx(0.002, rel=1e-12)
    assert float(sigmas[-1]) == pytest.approx(80, rel=1e-12)
    evenly = sigmas ** (1 / 7)  # rho = 7: even steps in the seventh root
    assert torch.allclose(evenly.diff(), torch.full((999,), float(evenly[1] - evenly[0]), dtype=torch.float64))
    other = karras_sigmas(3, 1.0, 9.0, rho=2.0)
    assert torch.allclose(other, torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))


@pytest.mark.parametrize(("part", "first", "last"), [((0.02, 0.98), 20, 980), ((0.0, 1.0), 0, 999)])
def test_draws_are_uniform_over_the_part_of_the_table_and_reach_both_ends(
    part: tuple[float, float], first: int, last: int
) -> None:
    table = torch.arange(1000.0)
    n = 100_000
    drawn = sample_sigma(table, n, generator(0), *part)
    assert drawn.shape == (n,) and drawn.dtype == torch.float32
    counts = Counter(drawn.long().tolist())
    assert min(counts) == first and max(counts) == last
    assert len(counts) == last - first + 1
    expected = n / len(counts)
    assert max(abs(count - expected) for count in counts.values()) < 6 * expected**0.5


def test_draws_come_from_the_generator_alone() -> None:
    table = sd_sigmas()
    first = sample_sigma(table, 8, generator(3))
    torch.manual_seed(0)
    assert torch.equal(first, sample_sigma(table, 8, generator(3)))
    assert not torch.equal(first, sample_sigma(table, 8, generator(4)))
    assert bool(torch.isin(first, table.float()).all())


def test_a_part_may_be_one_entry_and_must_be_within_the_table() -> None:
    table = torch.arange(10.0)
    assert sample_sigma(table, 3, generator(0), 1.0, 1.0).tolist() == [9, 9, 9]
    assert sample_sigma(table, 3, generator(0), 0.0, 0.0).tolist() == [0, 0, 0]
    assert sample_sigma(table[:1], 2, generator(0)).tolist() == [0, 0]
    for part in ((-0.1, 0.5), (0.6, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="lowest"):
            sample_sigma(table, 3, generator(0), *part)


def test_noise_is_added_image_by_image() -> None:
    x0, noise = torch.randn(2, 3, 4, 5, generator=generator(0)), torch.ones(3, 4, 5)
    noisy = add_noise(x0, torch.tensor([2.0, 0.5]), noise.expand(2, -1, -1, -1))
    assert torch.equal(noisy[0], x0[0] + 2) and torch.equal(noisy[1], x0[1] + 0.5)
    assert per_image(torch.tensor([1.0, 2.0]), x0).shape == (2, 1, 1, 1)


def test_a_seed_gives_the_same_noise_in_any_batch() -> None:
    shape = (4, 4, 16, 16)
    together = seeded_noise([5, 6, 7], shape)
    assert together.shape == (3, *shape) and together.dtype == torch.float32
    assert torch.equal(together[1:2], seeded_noise([6], shape))
    assert torch.equal(together.flip(0), seeded_noise([7, 6, 5], shape))
    assert not torch.equal(together[0], together[1])
    assert abs(float(together.mean())) < 0.05 and float(together.std()) == pytest.approx(1, abs=0.05)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    seeded_noise([2**63 - 1], shape)  # the largest that the command line lets through, and more
    assert torch.equal(state, torch.get_rng_state())
