"""What the methods share: their networks, a step's samples, a student's rollout, optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd2.data.pairs import RegressionPairs
from dmd2.diffusion import draws
from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.diffusion.noise import add_noise
from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.models.family import Family
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.precision import Precision
from dmd2.training.loop import Batch, LoopSettings, Method
from dmd2.training.methods.muon import Muon
from dmd2.training.ranges import Rate
from dmd2.training.sources import Inputs

OptimizerName = Literal["adamw", "muon", "adamw8bit", "paged_adamw8bit"]
"""the last two are bitsandbytes': Adam's averages in 8 bits (Dettmers et al. 2021), paged out where memory ends"""


@dataclass(frozen=True)
class Networks:
    """The networks of distribution matching, as denoisers over modules of their own; `head` is None without a GAN."""

    student: Denoiser
    teacher: Denoiser
    fake_score: Denoiser
    head: nn.Module | None = None


@dataclass(frozen=True)
class Samples:
    """A step's data: conditions of images to generate, and real images with theirs (None without a GAN)."""

    shape: tuple[int, ...]
    cond: Cond
    uncond: Cond
    real: Tensor | None = None
    real_cond: Cond = None
    pairs: RegressionPairs | None = None


@dataclass(frozen=True)
class Kit:
    """What a method makes its phases from."""

    family: Family
    student: nn.Module
    fake_score: nn.Module
    networks: Networks
    """over these modules, and the frozen teacher"""
    sigmas: tuple[float, ...]
    """of the student's steps, descending"""
    inputs: Inputs
    dtype: torch.dtype
    """what networks run in"""

    def optimizer(self, name: OptimizerName, module: nn.Module, lr: float, beta2: float) -> Optimizer:
        if name == "adamw":
            return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.01, fused=True)
        if name == "muon":
            return Muon(module, lr, dtype=self.dtype)
        if self.inputs.parallel.collective:
            expected = "expected adamw or muon, or `parallel` ddp: its states cannot be sharded"
            raise InvalidInput("set", expected, f"optimizer={name}")
        try:
            from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
        except ImportError as error:
            told = f"optimizer={name}: needs bitsandbytes, which is not installed; or optimizer=adamw"
            raise UserError(told) from error
        kind = AdamW8bit if name == "adamw8bit" else PagedAdamW8bit
        return kind(module.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.01)


@dataclass(frozen=True)
class Recipe:
    """What can be trained: every number that changes the result, and what it makes of them.

    `kind` is the method's name, `data` one of `SOURCES`: where batches come from.
    """

    loop: LoopSettings
    lr: Rate
    _: KW_ONLY
    precision: Precision = "auto"
    shared = True
    """whether its loss is a mean over the images of a batch, which then may lie on several processes"""

    @property
    def kind(self) -> str:
        raise NotImplementedError

    @property
    def data(self) -> str:
        raise NotImplementedError

    @property
    def inputs(self) -> tuple[str, ...]:
        """Options that name what the result depends on."""
        return ("data",)

    def conflict(self) -> str | None:
        """Which fields do not go together, and what would; None if all do."""
        return None

    def method(self, inputs: Inputs) -> Method:
        """Raises UserError: something that it needs is not given, or is not what it should be."""
        raise NotImplementedError


def generate(
    student: Denoiser,
    samples: Samples,
    sigmas: Sequence[float],
    generator: torch.Generator,
    simulated: bool = True,
) -> Tensor:
    """The student's x0 (B, C, h, w) at a random exit step, whose input is its own rollout from pure noise.

    DMD2's backward simulation (sec. 4.5): the student sees in training what it will see when sampling.
    Gradients flow through the last step only. One exit step for the whole batch. Without `simulated` later steps
    start from noised real images, as students of several steps did before.
    """
    return rollout(student, samples, sigmas, generator, simulated)[0]


def rollout(
    student: Denoiser, samples: Samples, sigmas: Sequence[float], generator: torch.Generator, simulated: bool
) -> tuple[Tensor, float]:
    """As `generate`, and the exit step's σ."""
    device = student.sigmas.device
    last = int(torch.randint(len(sigmas), (1,), generator=generator))
    noise = [draws.randn(samples.shape, generator).to(device) for _ in range(last + 1)]
    denoise = conditioned(student, samples.cond)
    sigma = torch.full((samples.shape[0],), sigmas[last], device=device)
    if last == 0:
        return denoise(student.scale_initial_noise(noise[0], sigma), sigma), sigmas[last]
    if simulated:
        with torch.no_grad():
            x0 = sample_few_step(denoise, student.scale_initial_noise, noise[:last], sigmas[:last])
    else:
        assert samples.real is not None, "without backward simulation later steps start from real images"
        x0 = samples.real
    return denoise(add_noise(x0, sigma, noise[last]), sigma), sigmas[last]


class SharedImages:
    """What the student generates in a step, once for both updates.

    As in DMD2's published runs, the critic learns from the very images that the generator was just judged by, and
    generates its own only in steps without the generator's update. SiDA's and NVIDIA's FastGen's `share` nothing.
    """

    def __init__(
        self, student: Denoiser, sigmas: Sequence[float], simulated: bool = True, share: bool = True
    ) -> None:
        self._student, self._sigmas, self._simulated, self._share = student, sigmas, simulated, share
        self._step, self._images = -1, dict[int, tuple[Batch, Tensor]]()

    def for_generator(self, batch: Batch) -> tuple[Tensor, float]:
        """x0 (B, C, h, w) with gradient, for a part of a step, and the σ that it was made at."""
        if batch.step != self._step:
            self._step, self._images = batch.step, {}
        x0, level = self._generate(batch)
        if self._share:
            self._images[id(batch)] = batch, x0.detach()
        return x0, level

    def for_critic(self, batch: Batch) -> Tensor:
        """The same without gradient; new ones if the step has none."""
        owner, x0 = self._images.pop(id(batch), (None, None))
        if owner is batch and x0 is not None:
            return x0
        with torch.no_grad():
            return self._generate(batch)[0]

    def _generate(self, batch: Batch) -> tuple[Tensor, float]:
        return rollout(self._student, batch.data, self._sigmas, batch.generator, self._simulated)
