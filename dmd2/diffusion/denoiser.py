"""The two interfaces between networks and methods, and classifier-free guidance.

Every network predicts x0 at a noise level σ. eps, v, ᾱ and integer timesteps never leave an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor

# What a denoiser is conditioned on. Each family has its own frozen dataclass; samplers and losses pass it through.
Cond = Any

Predict = Callable[[Tensor, Tensor, Cond], Tensor]
"""x (B, C, H, W), sigma (B,), condition → x0: what a sampler needs of a `Denoiser`."""


@dataclass(frozen=True)
class Condition:
    """The base of families' conditions: fields are tensors of a batch of B, dimension 0, or None."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if value is None else function(value) for name, value in values.items()})

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: Any) -> Self:
        return self.map(lambda value: value[index])

    def to(self, device: torch.device | str) -> Self:
        return self.map(lambda value: value.to(device))

    def detach(self) -> Self:
        return self.map(Tensor.detach)

    def cat(self, *others: Self) -> Self:
        """The conditions one after another in one batch."""
        columns = ([getattr(one, field.name) for one in (self, *others)] for field in fields(self))
        return type(self)(*(None if column[0] is None else torch.cat(column) for column in columns))


class Denoiser(Protocol):
    """A network seen as x0(x, σ, cond), with x = x0 + σ·n."""

    sigmas: Tensor
    """(T,) ascending training noise levels, fp32, on the network's device."""

    table: Tensor
    """`sigmas` on the CPU, fp64: reading a level there makes no GPU wait."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x (B, C, H, W) fp32, sigma (B,) → x0 (B, C, H, W), fp32."""

    def features(self, x: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """As a call, and beside x0 the bottleneck activations (B, C', h, w) of the same forward pass.

        A denoiser that says `takes_first = True` takes `first=`, too: x0 is then of that many rows only, the first
        ones, and the others end at the bottleneck.
        """

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """What a generator is given at its first step, from unit noise (B, C, H, W)."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,) weight of the squared x0 error in the denoising loss."""


class Codec(Protocol):
    """Pixels to the space that the denoiser works in, and back."""

    channels: int
    """of x0"""
    factor: int
    """pixels per element of x0, along each side"""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → x0 space, fp32."""

    def decode(self, x: Tensor) -> Tensor:
        """x0 space → uint8 (B, 3, H, W)."""


def cfg_denoise(denoiser: Predict, x: Tensor, sigma: Tensor, cond: Cond, uncond: Cond, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) on x0: u + scale·(c − u), in one batch of 2B.

    Args:
        x: (B, C, H, W) noisy input.
        sigma: (B,).
        cond, uncond: conditions of the denoiser's family; `uncond` for the same batch size.
        scale: 1 is no guidance (and then one batch of B is enough).

    Returns:
        x0 (B, C, H, W), fp32.
    """
    if scale == 1.0:
        return denoiser(x, sigma, cond)
    both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond.cat(uncond))
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)
