"""diffusers' VAEs as a `Codec`: images to latents and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmd2.runtime.compiled import Compiler
from dmd2.runtime.offload import upload

LATENT_CHANNELS = 4
"""of SD 1.5 and SDXL"""
MORE_CHANNELS = 8
"""of small models whose `AutoencoderTiny` packs more pixels into a latent"""


class LatentCodec:
    """A diffusers VAE (`AutoencoderKL`, `AutoencoderTiny`) as a `Codec`: uint8 images to latents and back."""

    def __init__(self, vae: Any, *, compiler: Compiler | None = None, device: torch.device | None = None) -> None:
        self.vae = vae
        parameter = next(vae.parameters())
        self.device, self.dtype = device or parameter.device, parameter.dtype
        self._decode: Callable[[Tensor], Tensor] = lambda z: vae.decode(z).sample
        if compiler is not None:  # one image fills a GPU, and takes gigabytes on the way
            self._decode = compiler(self._decode, most=1)
        config = vae.config
        channels = config.get("decoder_block_out_channels", config.get("block_out_channels"))
        self.factor: int = 2 ** (len(channels) - 1)
        """pixels per latent, along each side"""
        self.channels: int = config.get("latent_channels", LATENT_CHANNELS)
        # x = (z - mean) / std, of each channel. Most VAEs have one scaling factor, Playground 2.5's the others, too.
        mean, std = config.get("latents_mean"), config.get("latents_std")
        normalised = mean is not None and std is not None
        self._mean = torch.tensor(mean if normalised else [0.0], device=self.device).float().view(1, -1, 1, 1)
        self._std = torch.tensor(std if normalised else [1.0], device=self.device).float().view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor, shown: Tensor | None = None) -> Tensor:
        """uint8 (B, 3, H, W) → fp32 (B, C, H/f, W/f), scaled to about unit variance.

        Where bool (H, W) `shown` is false, images are taken to be mid-grey.
        """
        x = upload(images, self.device).float() / 127.5 - 1
        if shown is not None:
            x = x * shown.to(x)
        x = x.contiguous(memory_format=torch.channels_last)
        encoded = self.vae.encode(x.to(self.dtype))
        z = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (z.float() - self._mean) * self.vae.config.scaling_factor / self._std

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """fp32 (B, C, h, w) → uint8 (B, 3, h·f, w·f).

        Raises:
            ArithmeticError: the images, or the latents, are not finite; in bytes they would be black.
        """
        images = self.decoded(x)
        finite, pixels = images.isfinite().all(), ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        if not finite:  # asked for when all of the work is queued
            raise ArithmeticError(f"the decoded image is not finite ({self.dtype}): a number was too large for it")
        return pixels

    def decoded(self, x: Tensor) -> Tensor:
        """fp32 (B, C, h, w) → fp32 (B, 3, h·f, w·f) in about [−1, 1], differentiable."""
        z = (x.to(self.device) * self._std / self.vae.config.scaling_factor + self._mean).to(self.dtype)
        return self._decode(z.contiguous(memory_format=torch.channels_last)).float()
