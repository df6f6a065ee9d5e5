"""diffusers' VAEs as a `Codec`: images to latents and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.models.openvino.kept import DECODE, ENCODE
from dmd2.runtime.compiled import Compiler
from dmd2.runtime.loading import Deferred
from dmd2.runtime.offload import upload

LATENT_CHANNELS = 4
"""of SD 1.5 and SDXL"""
MORE_CHANNELS = 8
"""of small models whose `AutoencoderTiny` packs more pixels into a latent"""


MOST_SCORES = 2**28
"""of an attention that are there at a time: all of a VAE's at 1024², half a gigabyte in 16 bits"""


class OneHead:
    """A diffusers processor for the attention in a VAE's middle, as two products and a softmax.

    It has one head of 512, over 16,384 tokens at 1024²: fused kernels end at heads of 256, and what takes their place
    reaches a fraction of a product's rate.
    """

    def __call__(
        self,
        attention: Any,
        x: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, C, h, w) → (B, C, h, w).

        The others are not used, but named: diffusers logs a line about each that is not, and there a graph breaks.
        """
        tokens = attention.group_norm(x.flatten(2)).transpose(1, 2)
        query, key, value = (layer(tokens) for layer in (attention.to_q, attention.to_k, attention.to_v))
        query = query * attention.scale  # before the product, which might be too large for fp16
        if x.requires_grad:  # all scores would be kept for the way back
            fused = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)
            found = [fused[:, 0]]
        else:
            found = self._rows(query, key, value)
        out = attention.to_out[0](torch.cat(found, dim=1)).transpose(1, 2).reshape(x.shape)
        return (out + x) / attention.rescale_output_factor

    @staticmethod
    def _rows(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Some rows of scores at a time."""
        rows = max(1, MOST_SCORES // (len(query) * key.shape[1]))
        return [(part @ key.transpose(1, 2)).softmax(-1) @ value for part in query.split(rows, dim=1)]


def attend_by_products(vae: Any) -> None:
    """Has a KL VAE attend by `OneHead`."""
    if hasattr(vae, "set_attn_processor"):
        vae.set_attn_processor(OneHead())


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels along a latent's side, by a VAE's config."""
    channels = config.get("decoder_block_out_channels") or config.get("block_out_channels") or ()
    return int(2 ** max(0, len(channels) - 1))


class LatentCodec:
    """A diffusers VAE (`AutoencoderKL`, `AutoencoderTiny`) as a `Codec`: uint8 images to latents and back.

    Args:
        vae: itself, or a `Deferred` one, with `runs`, `device` and `dtype`.
        runs: "encode" and "decode", if something else than torch runs them: tensors to tuples of one.
    """

    def __init__(
        self,
        vae: Any,
        *,
        compiler: Compiler | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        runs: Mapping[str, Callable[..., tuple[Tensor, ...]]] | None = None,
    ) -> None:
        self._vae = Deferred.of(vae)
        if device is None or dtype is None:
            parameter = next(self.vae.parameters())
            device, dtype = device or parameter.device, parameter.dtype
        self.device, self.dtype, config = device, dtype, self._vae.config
        self._scale: float = config.scaling_factor
        if runs:
            encode, decode = runs[ENCODE], runs[DECODE]
            self._encode: Callable[[Tensor], Tensor] = lambda images: encode(images)[0]
            self._decode: Callable[[Tensor], Tensor] = lambda z: decode(z)[0]
        else:
            self._encode, self._decode = partial(_encoded, self.vae), partial(_decoded, self.vae)
        if compiler is not None:  # one image fills a GPU, and takes gigabytes on the way
            attend_by_products(self.vae)
            self._decode = compiler(self._decode, most=1)
            self._encode = compiler(self._encode, most=1, compile=False)
        self.factor = vae_factor(config)
        """pixels per latent, along each side"""
        self.channels: int = config.get("latent_channels", LATENT_CHANNELS)
        # x = (z - mean) / std, of each channel. Most VAEs have one scaling factor, Playground 2.5's the others, too.
        mean, std = config.get("latents_mean"), config.get("latents_std")
        normalised = mean is not None and std is not None
        self._mean = torch.tensor(mean if normalised else [0.0], device=self.device).float().view(1, -1, 1, 1)
        self._std = torch.tensor(std if normalised else [1.0], device=self.device).float().view(1, -1, 1, 1)

    @property
    def vae(self) -> Any:
        """diffusers' own."""
        return self._vae.network

    @torch.no_grad()
    def encode(self, images: Tensor, shown: Tensor | None = None) -> Tensor:
        """uint8 (B, 3, H, W) → fp32 (B, C, H/f, W/f), scaled to about unit variance.

        Where bool (H, W) `shown` is false, images are taken to be mid-grey.
        """
        x = upload(images, self.device).float() / 127.5 - 1
        if shown is not None:
            x = x * upload(shown, self.device).to(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        z = self._encode(x.to(self.dtype))
        return (z.float() - self._mean) * self._scale / self._std

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
        z = (x.to(self.device) * self._std / self._scale + self._mean).to(self.dtype)
        return self._decode(z.contiguous(memory_format=torch.channels_last)).float()


def _encoded(vae: Any, images: Tensor) -> Tensor:
    encoded = vae.encode(images)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


def _decoded(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z).sample


class OneWay(nn.Module):
    """A VAE's "encode" or "decode" as a network of its own, which can be converted."""

    def __init__(self, vae: Any, way: str) -> None:
        super().__init__()
        self.vae, self._run = vae, {ENCODE: _encoded, DECODE: _decoded}[way]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(B, 3, H, W) in [−1, 1] → (B, C, H/f, W/f), the most likely latents; or back."""
        return (self._run(self.vae, x),)
