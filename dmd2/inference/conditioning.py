"""What a batch of images is made from besides prompts: an image, a mask, a control, LoRAs."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.diffusion.denoiser import Codec
from dmd2.diffusion.sampling import Callback, Denoise, inpaint, noised, sample_few_step
from dmd2.inference.request import check_together
from dmd2.models.adapters.control import SCALE
from dmd2.models.adapters.lora import Lora
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.offload import upload


@dataclass(frozen=True, eq=False)
class ImageConditioning:
    """An image to begin with, its mask, a control and LoRAs: the same for each image of a batch.

    The default is text-to-image.
    """

    image: Tensor | None = None
    """uint8 (3, H, W) on the CPU, of the size that is generated"""
    mask: Tensor | None = None
    """bool (H, W): what is generated anew. Everywhere else the image keeps its pixels, to the bit"""
    strength: float = 1.0
    """in (0, 1]; see `timesteps_for_strength`. 1 begins with noise alone: without a mask `image` is of no matter"""
    control: Path | None = None
    """folder of a ControlNet or T2I-Adapter"""
    control_image: Tensor | None = None
    """uint8 (3, H, W) on the CPU, of the size that is generated"""
    control_scale: float = SCALE
    loras: tuple[tuple[Lora, float], ...] = ()
    """with the scale of each"""

    def __post_init__(self) -> None:
        check_together(self.image, self.mask, self.strength, self.control, self.control_image)
        if self.strength < 1 and self.image is None:
            raise InvalidInput("prompt_strength", "given without an image; expected the image that it is about")

    @property
    def images(self) -> list[Tensor]:
        return [image for image in (self.image, self.control_image) if image is not None]

    @property
    def key(self) -> Hashable:
        """Only images with equal keys may share a batch. While this object lives, no other has its `id`."""
        loras = tuple((lora.sha256, scale) for lora, scale in self.loras)
        return (loras, id(self) if self.images else 0)

    @property
    def metadata(self) -> dict[str, object]:
        """What a file says of how it was made, besides prompt, seed and steps."""
        metadata: dict[str, object] = {}
        if self.loras:
            metadata["loras"] = " ".join(f"{lora.name}:{scale:g}" for lora, scale in self.loras)
        if self.image is not None:
            metadata["prompt_strength"] = self.strength
            metadata["image_sha256"] = _sha256(self.image)
        if self.mask is not None:
            metadata["mask_sha256"] = _sha256(self.mask)
        if self.control is not None and self.control_image is not None:
            metadata["control"] = f"{self.control.name}:{self.control_scale:g}"
            metadata["control_image_sha256"] = _sha256(self.control_image)
        return metadata

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError unless image, mask and control image are of `size` (width, height)."""
        for image in (*self.images, *(() if self.mask is None else (self.mask,))):
            if tuple(image.shape[-2:]) != (size[1], size[0]):
                raise ValueError(f"expected {size[0]}x{size[1]}, not an image of shape {tuple(image.shape)}")

    def sample(
        self,
        denoise: Denoise,
        denoiser: Any,
        codec: Codec,
        noise: Tensor,
        sigmas: Sequence[float],
        callback: Callback | None = None,
    ) -> Tensor:
        """x0 (B, C, h, w) by the few-step sampler that fits; see `dmd2.diffusion.sampling`.

        Where the denoiser `inpaints`, it is told what is `known` of the image: nothing is put back between steps.

        Args:
            denoise: `denoiser` with its condition.
            noise: unit noise (B, N, C, h, w), one for each of the N `sigmas`.
        """
        start, steps = denoiser.scale_initial_noise, noise.unbind(1)
        masked = self.mask is not None and not denoiser.inpaints
        if self.image is None or not (masked or self.strength < 1):
            return sample_few_step(denoise, start, steps, sigmas, callback)
        image = codec.encode(self.image[None]).to(noise.device)
        start = noised(image) if self.strength < 1 else start
        if masked:
            return inpaint(denoise, start, image, self._cells(image), steps, sigmas, callback)
        return sample_few_step(denoise, start, steps, sigmas, callback)

    def known(self, codec: Any, size: tuple[int, int]) -> Tensor:
        """(1, 5, h, w): mask and latents of `size` for a network that inpaints, see `StableDiffusion.features`.

        Without a mask all is masked: the image then counts through what is denoised, or not at all.
        """
        width, height = size
        mask = torch.ones(height, width, dtype=torch.bool) if self.mask is None else self.mask
        image = torch.zeros(3, height, width, dtype=torch.uint8) if self.image is None else self.image
        latents = codec.encode(image[None], ~mask)
        # Nearest neighbours, as these networks were trained and as diffusers does.
        mask = upload(mask[None, None], latents.device).to(latents.dtype)
        return torch.cat([F.interpolate(mask, latents.shape[-2:]), latents], dim=1)

    def _cells(self, image: Tensor) -> Tensor:
        """bool (1, 1, h, w): the latents of which any pixel is generated anew."""
        assert self.mask is not None
        mask = upload(self.mask[None, None], image.device).float()
        return F.adaptive_max_pool2d(mask, [*image.shape[-2:]]) > 0

    def finish(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) with the given pixels put back where the mask is false."""
        if self.image is None or self.mask is None:
            return images
        return torch.where(self.mask, images, self.image)


def _sha256(pixels: Tensor) -> str:
    """The checksum of pixels as they were used, not of the file that they came in."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


TEXT_TO_IMAGE = ImageConditioning()
