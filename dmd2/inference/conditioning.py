"""What images are made from besides prompts: a given image, a mask, a control, LoRAs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.diffusion.denoiser import Codec
from dmd2.diffusion.noise import add_noise
from dmd2.diffusion.sampling import Denoise, image_to_image, inpaint, sample_few_step
from dmd2.models.adapters.control import SCALE
from dmd2.models.adapters.lora import Lora
from dmd2.models.stable_diffusion.codec import LatentCodec
from dmd2.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class ImageConditioning:
    """One for all images of a batch. The default is text-to-image."""

    image: Tensor | None = None
    """uint8 (3, H, W) on the CPU, as large as what is drawn"""
    mask: Tensor | None = None
    """bool (H, W): what is painted anew. Everywhere else the image keeps its pixels, to the bit"""
    strength: float = 1.0
    """in (0, 1]; see `timesteps_for_strength`. 1 begins with noise alone: without a mask nothing of it is left"""
    control: Path | None = None
    """folder of a ControlNet or T2I-Adapter"""
    control_image: Tensor | None = None
    """uint8 (3, H, W) on the CPU, as large as what is drawn"""
    control_scale: float = SCALE
    loras: tuple[tuple[Lora, float], ...] = ()
    """with the scale of each"""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"prompt_strength: {self.strength}; expected more than 0, at most 1")
        if self.strength < 1 and self.image is None:
            raise UserError("prompt_strength: given without an image; expected the image that it is about")
        if self.mask is not None and self.image is None:
            raise UserError("mask: given without an image; expected the image that it is a mask of")
        if (self.control is None) != (self.control_image is None):
            raise UserError("control_image: expected both a control and its image, or neither")

    @property
    def images(self) -> list[Tensor]:
        return [image for image in (self.image, self.control_image) if image is not None]

    @property
    def key(self) -> Hashable:
        """Only images with equal keys may ride in one batch. While one lives, no other has its `id`."""
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
        """Raises ValueError unless what is given is as large as what is drawn, `size` (width, height)."""
        for image in (*self.images, *(() if self.mask is None else (self.mask,))):
            if tuple(image.shape[-2:]) != (size[1], size[0]):
                raise ValueError(f"expected {size[0]}x{size[1]}, not a picture of shape {tuple(image.shape)}")

    def sample(
        self,
        denoise: Denoise,
        start: Callable[[Tensor, Tensor], Tensor],
        codec: Codec,
        noise: Iterable[Tensor],
        sigmas: Sequence[float],
        device: torch.device,
        *,
        inpaints: bool = False,
    ) -> Tensor:
        """x0 (B, C, h, w) by the sampler that fits. Arguments as of `dmd2.diffusion.sampling.sample_few_step`.

        A network that `inpaints` is told what is known at each step (see `known`), and nothing is put back between.
        """
        free = self.mask is None or inpaints
        if self.image is None or (free and self.strength == 1):
            return sample_few_step(denoise, start, noise, sigmas)
        image = codec.encode(self.image[None]).to(device)
        if free:
            return image_to_image(denoise, image, noise, sigmas)
        if self.strength < 1:
            return inpaint(denoise, lambda n, s: add_noise(image, s, n), image, self._cells(image), noise, sigmas)
        return inpaint(denoise, start, image, self._cells(image), noise, sigmas)

    def known(self, codec: LatentCodec, size: tuple[int, int]) -> Tensor:
        """(1, 5, h, w) what a network that inpaints is told of a picture of `size`: see `StableDiffusion.features`.

        Without a mask all is masked: the image then counts through what is denoised, or not at all.
        """
        width, height = size
        mask = torch.ones(height, width, dtype=torch.bool) if self.mask is None else self.mask
        image = torch.zeros(3, height, width, dtype=torch.uint8) if self.image is None else self.image
        latents = codec.encode(image[None], ~mask)
        # Nearest neighbours, as these networks were trained and as diffusers does.
        return torch.cat([F.interpolate(mask[None, None].to(latents), latents.shape[-2:]), latents], dim=1)

    def _cells(self, image: Tensor) -> Tensor:
        """bool (1, 1, h, w): the latents of which any pixel is painted anew."""
        assert self.mask is not None
        mask = self.mask[None, None].to(image.device, torch.float32)
        return F.adaptive_max_pool2d(mask, [*image.shape[-2:]]) > 0

    def finish(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) with the given pixels put back where nothing was to be painted."""
        if self.image is None or self.mask is None:
            return images
        return torch.where(self.mask, images, self.image)


def _sha256(pixels: Tensor) -> str:
    """Of the pixels as they were used, not of the file that they came in."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


TEXT_TO_IMAGE = ImageConditioning()
