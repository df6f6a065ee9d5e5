"""What the methods share: their networks, a step's samples, a student's rollout, optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd2.data.pairs import RegressionPairs
from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.diffusion.noise import add_noise
from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.models.family import Family
from dmd2.runtime.precision import Precision
from dmd2.training.loop import Batch, LoopSettings, Method, Phase
from dmd2.training.muon import Muon
from dmd2.training.sources import Inputs

OptimizerName = Literal["adamw", "muon"]


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
        if name == "muon":
            return Muon(module, lr, dtype=self.dtype)
        return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.01, fused=True)


class Recipe(Protocol):
    """What can be trained: a frozen dataclass with every number that changes the result."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kind(self) -> str:
        """The method's name."""
        ...

    @property
    def loop(self) -> LoopSettings: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def data(self) -> str:
        """Of `SOURCES`: where its batches come from."""
        ...

    @property
    def inputs(self) -> Sequence[str]:
        """Options that name what the result depends on."""
        ...

    def conflict(self) -> str | None:
        """Which fields do not go together, and what would; None if all do."""
        ...

    def method(self, inputs: Inputs) -> Method:
        """Raises UserError: something that it needs is not given, or is not what it should be."""
        ...


class Distillation(Recipe, Protocol):
    """A recipe that makes a student of a teacher: what the wiring in `training/distil.py` asks of a method."""

    @property
    def timesteps(self) -> tuple[int, ...]: ...

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Of the student's steps; this or `timesteps` is empty."""
        ...

    @property
    def compile(self) -> bool: ...

    @property
    def needs_images(self) -> bool: ...

    @property
    def pairs_batch(self) -> int:
        """Noise-image pairs in a step."""
        ...

    paired: ClassVar[bool]
    """whether images are generated with the labels of the real ones"""
    keeps_fake_score: ClassVar[bool]

    def phases(self, kit: Kit) -> list[Phase]: ...


def generate(student: Denoiser, samples: Samples, sigmas: Sequence[float], generator: torch.Generator) -> Tensor:
    """The student's x0 at a random exit step, whose input is its own rollout from pure noise.

    DMD2's backward simulation (sec. 4.5): the student sees in training what it will see when sampling.
    Gradients flow through the last step only. One exit step for the whole batch.
    """
    device = student.sigmas.device
    last = int(torch.randint(len(sigmas), (1,), generator=generator))
    noise = [torch.randn(samples.shape, generator=generator).to(device) for _ in range(last + 1)]
    denoise = conditioned(student, samples.cond)
    sigma = torch.full((samples.shape[0],), sigmas[last], device=device)
    if last == 0:
        return denoise(student.scale_initial_noise(noise[0], sigma), sigma)
    with torch.no_grad():
        x0 = sample_few_step(denoise, student.scale_initial_noise, noise[:last], sigmas[:last])
    return denoise(add_noise(x0, sigma, noise[last]), sigma)


class SharedImages:
    """What the student generates in a step, once for both updates.

    As in the published runs, the critic learns from the very images that the generator was just judged by, and
    generates its own only in steps without the generator's update.
    """

    def __init__(self) -> None:
        self._step, self._images = -1, dict[int, tuple[Batch, Tensor]]()

    def put(self, batch: Batch, x0: Tensor) -> None:
        """By the generator's loss, for each part of a step."""
        if batch.step != self._step:
            self._step, self._images = batch.step, {}
        self._images[id(batch)] = batch, x0.detach()

    def take(self, batch: Batch) -> Tensor | None:
        """By the critic's: the images, without gradient. None: this step has none."""
        owner, x0 = self._images.pop(id(batch), (None, None))
        return x0 if owner is batch else None
