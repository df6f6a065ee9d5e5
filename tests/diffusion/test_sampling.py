"""Samplers: few-step against diffusers' own pipeline, the teacher's solver against exact solutions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from dmd2.diffusion.noise import karras_sigmas, sd_sigmas, seeded_noise
from dmd2.diffusion.sampling import (
    Churn,
    conditioned,
    inpaint,
    leading_sigmas,
    noised,
    sample_dpm_solver_2m,
    sample_euler,
    sample_few_step,
    sample_heun,
    sample_plms,
    teacher_sigmas,
    trailing_sigmas,
)
from dmd2.emoji.architecture import build_unet
from dmd2.models.stable_diffusion.text import TextEncoder
from dmd2.models.stable_diffusion.unet import PredictionType, StableDiffusion
from dmd2.runtime.errors import UserError

PROMPTS = ["a red apple on a blue background", "an owl"]
SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(3)
    return build_unet((32, 32, 32)).eval().requires_grad_(False)


# The students' sampler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [399]], ids=["4-step", "1-step"])
@torch.no_grad()
def test_few_step_gives_the_latents_of_diffusers_pipeline(
    unet: Any,
    text_models: tuple[Any, Any, Any],
    tiny_vae: Any,
    monkeypatch: pytest.MonkeyPatch,
    prediction_type: PredictionType,
    timesteps: list[int],
) -> None:
    tokenizer, first, second = text_models
    scheduler = LCMScheduler(prediction_type=prediction_type, clip_sample=False, **SCHEDULE)
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise([1, 2], (len(timesteps), 4, 16, 16)).unbind(1)
    rest = list(noise[1:])  # what the scheduler is going to draw, in turn
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *args, **kwargs: rest.pop(0))
    theirs = pipeline(
        PROMPTS,
        timesteps=timesteps,
        guidance_scale=1.0,
        latents=noise[0].clone(),
        width=64,
        height=64,
        output_type="latent",
    ).images
    assert not rest

    denoiser = StableDiffusion(unet, prediction_type)
    cond = TextEncoder([tokenizer, tokenizer], [first, second])(PROMPTS, (64, 64))
    sigmas = [float(denoiser.sigmas[t]) for t in timesteps]
    ours = sample_few_step(conditioned(denoiser, cond), denoiser.scale_initial_noise, noise, sigmas)
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    assert float(theirs.std()) > 0.1  # there is something to compare
    assert float((ours - theirs).abs().max()) < 1e-3


def test_few_step_starts_denoises_and_noises_anew() -> None:
    seen: list[tuple[float, Tensor]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (2,) and sigma.dtype == torch.float32
        seen.append((float(sigma[0]), x))
        return torch.full_like(x, float(len(seen)))

    noise = seeded_noise([0, 1], (3, 4, 8, 8)).unbind(1)
    x0 = sample_few_step(denoise, lambda n, sigma: 100 * n, noise, [9.0, 2.0, 0.5])
    assert [sigma for sigma, _ in seen] == [9, 2, 0.5]
    assert torch.equal(seen[0][1], 100 * noise[0])
    assert torch.allclose(seen[1][1], 1 + 2 * noise[1])  # the first x0, noised to the second level
    assert torch.allclose(seen[2][1], 2 + 0.5 * noise[2])
    assert torch.equal(x0, torch.full_like(x0, 3.0))  # x0 itself comes out, no noise on it


def test_few_step_reads_its_noise_lazily_and_wants_as_many_as_levels() -> None:
    class Stop(Exception):
        pass

    calls = 0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    def start(n: Tensor, sigma: Tensor) -> Tensor:
        return n

    def noise() -> Any:
        yield torch.zeros(1, 4, 2, 2)
        raise Stop

    with pytest.raises(Stop):
        sample_few_step(denoise, start, noise(), [3.0, 2.0, 1.0])
    assert calls == 1
    with pytest.raises(ValueError, match="shorter"):
        sample_few_step(denoise, start, [torch.zeros(1, 4, 2, 2)], [3.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        sample_few_step(denoise, start, [], [])


# The teacher's sampler

MEAN, SPREAD = 0.4, 0.7


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of data N(MEAN, SPREAD²)."""
    s2, sigma2 = SPREAD**2, sigma.double()[:, None, None, None] ** 2
    return (s2 * x + sigma2 * MEAN) / (s2 + sigma2)


def exact(x: Tensor, sigma: float, target: float) -> Tensor:
    """Where the probability-flow ODE brings x, from level `sigma` to level `target`."""
    ratio = ((SPREAD**2 + target**2) / (SPREAD**2 + sigma**2)) ** 0.5
    return MEAN + (x - MEAN) * ratio


class Table:
    """Enough of a denoiser to have levels."""

    sigmas = sd_sigmas().float()


def test_solver_converges_at_second_order_on_a_gaussian() -> None:
    x = 14 * torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (8, 16, 32, 64, 128):
        sigmas = teacher_sigmas(Table(), steps)  # type: ignore[arg-type]
        last = exact(x, sigmas[0], sigmas[-1])
        truth = gaussian(last, torch.full((2,), sigmas[-1]))
        errors.append(float((sample_dpm_solver_2m(gaussian, x, sigmas) - truth).abs().max()))
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(ratio > 3 for ratio in ratios[1:]), ratios  # 2 would be first order
    assert ratios[-1] == pytest.approx(4, abs=0.6)
    assert errors[-1] < 2e-3
    # What comes out is distributed as the data, but for the noise of the last level.
    assert float(sample_dpm_solver_2m(gaussian, x, sigmas).std()) == pytest.approx(SPREAD * 14 / sigmas[0], rel=0.1)


def test_first_step_is_ddim_and_one_level_is_one_call() -> None:
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1)
    assert torch.equal(sample_dpm_solver_2m(gaussian, x, [3.0]), gaussian(x, 3 * one))
    between = x / 3 + (2 / 3) * gaussian(x, 3 * one)  # DDIM: x0 + (σ'/σ)·(x − x0)
    assert torch.allclose(sample_dpm_solver_2m(gaussian, x, [3.0, 1.0]), gaussian(between, one))
    with pytest.raises(ValueError, match="at least one"):
        sample_dpm_solver_2m(gaussian, x, [])


def test_a_denoiser_that_knows_the_answer_is_followed_exactly() -> None:
    answer = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    calls = 0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return answer

    x = 14.6 * torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(sample_dpm_solver_2m(denoise, x, teacher_sigmas(Table(), 10)), answer)  # type: ignore[arg-type]
    assert calls == 10


def test_teacher_levels_fall_between_the_table_s_ends() -> None:
    sigmas = teacher_sigmas(Table(), 25)  # type: ignore[arg-type]
    assert len(sigmas) == 25 and all(a > b for a, b in pairwise(sigmas))
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-3) and sigmas[-1] == pytest.approx(0.0292, abs=1e-4)


@torch.no_grad()
def test_solver_agrees_with_diffusers_own(unet: Any) -> None:
    """DPM-Solver++(2M) on the same Karras levels; diffusers rounds their timesteps, so a smooth denoiser is used."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="sample",
        use_karras_sigmas=True,
        final_sigmas_type="zero",
        **SCHEDULE,
    )
    scheduler.set_timesteps(12)
    levels = scheduler.sigmas.double()
    assert len(levels) == 13 and float(levels[-1]) == 0
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    ours = sample_dpm_solver_2m(gaussian, noise * float(levels[0]), levels[:-1].tolist())
    # diffusers works on x_t = x / √(1+σ²).
    x_t = noise * float(levels[0] / (1 + levels[0] ** 2).sqrt())
    for sigma, t in zip(levels[:-1], scheduler.timesteps, strict=True):
        x0 = gaussian(x_t * (1 + sigma**2).sqrt(), sigma.reshape(1))
        x_t = scheduler.step(x0, t, x_t, return_dict=False)[0]
    assert float((ours - x_t).abs().max()) < 1e-4


# EDM's sampler


def edm_levels(steps: int) -> list[float]:
    return list(karras_sigmas(steps).flip(0).tolist())


def test_heun_converges_at_second_order_on_a_gaussian() -> None:
    x = 80 * torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = exact(x, 80.0, 0.0)
    errors = [float((sample_heun(gaussian, x, edm_levels(n)) - truth).abs().max()) for n in (9, 18, 36, 72)]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(ratio > 3 for ratio in ratios), ratios  # 2 would be first order
    assert ratios[-1] == pytest.approx(4, abs=0.8)
    assert errors[-1] < 0.01


def test_heun_is_algorithm_1_and_asks_twice_a_step() -> None:
    x = 3 * torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1)
    asked: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (1,) and sigma.dtype == torch.float32
        asked.append(float(sigma[0]))
        return gaussian(x, sigma)

    d = (x - gaussian(x, 3 * one)) / 3
    euler = x + (1 - 3) * d
    second = (euler - gaussian(euler, one)) / 1
    between = x + (1 - 3) * (d + second) / 2
    assert torch.allclose(
        sample_heun(denoise, x, [3.0, 1.0]), gaussian(between, one)
    )  # the step to 0 gives x0 itself
    assert asked == [3, 1, 1]
    assert torch.allclose(sample_heun(gaussian, x, [3.0]), gaussian(x, 3 * one))
    # Noise that is not asked for is not read.
    assert torch.equal(sample_heun(denoise, x, [3.0, 1.0], iter([])), sample_heun(gaussian, x, [3.0, 1.0]))
    single = sample_heun(denoise, x.float(), [3.0, 1.0])
    assert single.dtype == torch.float32
    with pytest.raises(ValueError, match="at least one"):
        sample_heun(gaussian, x, [])


def test_stochastic_heun_is_algorithm_2() -> None:
    levels = [4.0, 2.0, 1.0, 0.5]
    x = 4 * torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = [n.double() for n in seeded_noise([3, 4], (4, 3, 2, 2)).unbind(1)]
    churn = Churn(1.2, 0.7, 3.0, 1.1)
    given = x
    for i, t in enumerate(levels):  # Karras et al. 2022, algorithm 2, line by line
        t_next = [*levels, 0.0][i + 1]
        gamma = min(1.2 / 4, 2**0.5 - 1) if 0.7 <= t <= 3 else 0.0
        t_hat = t + gamma * t
        x_hat = x + (t_hat**2 - t**2) ** 0.5 * 1.1 * noise[i]
        d = (x_hat - gaussian(x_hat, torch.full((2,), t_hat))) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next:
            d_next = (x - gaussian(x, torch.full((2,), t_next))) / t_next
            x = x_hat + (t_next - t_hat) * (d / 2 + d_next / 2)
    assert torch.allclose(sample_heun(gaussian, given, levels, noise, churn), x, atol=1e-6)
    assert not torch.allclose(sample_heun(gaussian, given, levels), x, atol=0.1)
    # γ is never above √2 − 1, which doubles the variance.
    much = sample_heun(gaussian, given, levels, noise, Churn(99.0))
    assert torch.allclose(much, sample_heun(gaussian, given, levels, noise, Churn(4 * (2**0.5 - 1))))
    with pytest.raises(ValueError, match="noise: expected unit noise"):
        sample_heun(gaussian, given, levels, churn=Churn(1.0))
    with pytest.raises(ValueError, match="shorter"):
        sample_heun(gaussian, given, levels, noise[:2], Churn(1.0))


def test_stochastic_heun_keeps_the_distribution() -> None:
    shape, steps = (64, 3, 8, 8), 40
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=generator) for _ in range(steps + 1)]
    x0 = sample_heun(gaussian, 80 * noise[0], edm_levels(steps), noise[1:], Churn(20.0))
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.03) and float(x0.std()) == pytest.approx(SPREAD, abs=0.03)
    # What it started from is forgotten in part: deterministic sampling keeps it to the bit.
    plain = sample_heun(gaussian, 80 * noise[0], edm_levels(steps))
    assert abs(float(torch.corrcoef(torch.stack([x0.flatten(), noise[0].flatten()]))[0, 1])) < 0.3
    assert float(torch.corrcoef(torch.stack([plain.flatten(), noise[0].flatten()]))[0, 1]) > 0.999


def test_churn_is_one_number_or_four() -> None:
    assert Churn.parse("40") == Churn(40.0)
    assert Churn.parse("40,0.05,50,1.003") == Churn(40.0, 0.05, 50.0, 1.003)
    for text in ("", "x", "-1", "nan", "inf", "1,2", "1,3,2,1", "1,0,50,nan", "1,0,50,1,1"):
        with pytest.raises(UserError, match=r"^churn .*: expected S_churn or S_churn,S_tmin,S_tmax,S_noise"):
            Churn.parse(text)


SAMPLERS: dict[str, Any] = {
    "few-step": lambda denoise, noise, sigmas, call: sample_few_step(denoise, start, noise, sigmas, call),
    "image": lambda denoise, noise, sigmas, call: sample_few_step(denoise, noised(noise[1]), noise, sigmas, call),
    "inpaint": lambda denoise, noise, sigmas, call: inpaint(
        denoise, start, 1 + noise[0], torch.ones(1, 1, 4, 4, dtype=torch.bool), noise, sigmas, call
    ),
    "dpm": lambda denoise, noise, sigmas, call: sample_dpm_solver_2m(denoise, noise[0], sigmas, call),
    "heun": lambda denoise, noise, sigmas, call: sample_heun(denoise, noise[0], sigmas, callback=call),
    "churn": lambda denoise, noise, sigmas, call: sample_heun(denoise, noise[0], sigmas, noise, Churn(2.0), call),
}


def start(n: Tensor, sigma: Tensor) -> Tensor:
    return 3 * n


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_callback_sees_each_step_s_x0_changes_nothing_and_may_end_it(name: str) -> None:
    noise, sigmas = list(seeded_noise([0, 1], (3, 2, 4, 4)).unbind(1)), [3.0, 1.0, 0.5]
    answers: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        answers.append((x / 2).tanh())
        return answers[-1]

    told: list[tuple[int, Tensor]] = []
    found = SAMPLERS[name](denoise, noise, sigmas, lambda *step: told.append((len(answers), *step)))
    assert [step for _, step, _ in told] == [1, 2, 3]
    assert all(torch.equal(x0, answers[calls - 1]) for calls, _, x0 in told)
    assert torch.allclose(told[-1][2], found, atol=1e-6)
    assert torch.equal(SAMPLERS[name](denoise, noise, sigmas, None), found)
    calls = told[1][0]
    answers.clear()

    def stop(done: int, x0: Tensor) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        SAMPLERS[name](denoise, noise, sigmas, stop)
    assert len(answers) == calls  # nothing is computed after that


def predicted_noise(x: torch.Tensor, t: int) -> torch.Tensor:
    """Any smooth function of the input, scaled to unit variance, and the timestep."""
    return torch.tanh(1.3 * x + t / 500) * 0.8


def x0_of_it(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    table = sd_sigmas()
    t = int((table - float(sigma[0])).abs().argmin())
    assert abs(float(table[t]) / float(sigma[0]) - 1) < 1e-6  # the table's own levels, as the networks were trained
    return x - sigma[0] * predicted_noise(x / float(1 + sigma[0].double() ** 2) ** 0.5, t)


@pytest.mark.parametrize("steps", [50, 18, 7])
def test_the_solvers_of_published_pairs_are_diffusers(steps: int) -> None:
    """SD 1.5's by PNDM (PLMS), SDXL's by Euler on trailing timesteps."""
    from diffusers import EulerDiscreteScheduler, PNDMScheduler

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    plms = PNDMScheduler(**levels, skip_prk_steps=True, steps_offset=1)
    euler = EulerDiscreteScheduler(**levels, timestep_spacing="trailing")
    for scheduler in (plms, euler):
        scheduler.set_timesteps(steps)
        theirs = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = predicted_noise(scheduler.scale_model_input(theirs, t), int(t))
            theirs = scheduler.step(output, t, theirs).prev_sample
        if scheduler is plms:
            sigmas = leading_sigmas(sd_sigmas(), steps)
            ours = sample_plms(x0_of_it, noise * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
        else:
            sigmas = trailing_sigmas(sd_sigmas(), steps)
            ours = sample_euler(x0_of_it, noise * sigmas[0], sigmas)
        assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))
