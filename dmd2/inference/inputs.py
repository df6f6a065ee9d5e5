"""Images that callers give: read with limits, resized, turned into an `ImageConditioning`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from PIL import Image

from dmd2.inference.image_input import LIGHT, ImageFile, Role, resized
from dmd2.inference.request import aspect_size, check_together

if TYPE_CHECKING:  # torch takes a second: what is wrong with a file is told before
    from torch import Tensor

    from dmd2.inference.conditioning import ImageConditioning
    from dmd2.models.adapters.lora import Lora


def fitted(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W): scaled to cover `size` (width, height), and what juts out cut off evenly."""
    import torch

    pixels = numpy.array(resized(image.convert("RGB"), size))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def fitted_mask(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """bool (H, W), true where the mask is light: that is generated anew. Fitted as the image it belongs to."""
    import torch

    grey = resized(image.convert("L"), size, method=Image.Resampling.BILINEAR)
    return torch.from_numpy(numpy.array(grey)) >= LIGHT


@dataclass(frozen=True)
class InputImages:
    """What a caller gives besides the prompt: files whose headers were read, but not yet decoded."""

    image: ImageFile | None = None
    mask: ImageFile | None = None
    strength: float = 1.0
    control_image: ImageFile | None = None
    control_scale: float = 1.0

    @classmethod
    def read(
        cls,
        image: bytes | Path | None,
        mask: bytes | Path | None,
        strength: float,
        control_image: bytes | Path | None,
        control_scale: float,
    ) -> InputImages:
        """From files or their contents. `strength` is of no matter without an image.

        Raises:
            UserError: one cannot be read, or they do not go together.
        """
        check_together(image, mask, strength)

        def opened(file: bytes | Path | None, name: str, role: Role) -> ImageFile | None:
            return None if file is None else ImageFile.read(file, name, role)

        return cls(
            opened(image, "image", Role.IMAGE),
            opened(mask, "mask", Role.MASK),
            1.0 if image is None else strength,
            opened(control_image, "control_image", Role.CONTROL),
            control_scale,
        )

    def size(self, asked: tuple[int, int] | None, native: tuple[int, int], unit: int) -> tuple[int, int]:
        """Width and height: what is asked for, else about `native`'s pixels in the given image's ratio."""
        image = self.image or self.control_image
        if asked is not None or image is None:
            return asked or native
        width, height = image.size  # beyond 4:1, of its middle
        ratio = f"{min(width, 4 * height)}:{min(height, 4 * width)}"
        return aspect_size(ratio, native, max(unit, native[0] // 16))

    def edit(
        self, size: tuple[int, int], control: Path | None = None, loras: tuple[tuple[Lora, float], ...] = ()
    ) -> ImageConditioning:
        """For images of `size` (width, height). A mask of another size is stretched to its image's.

        Raises:
            UserError: a file is damaged, or they do not go together.
        """
        from dmd2.inference.conditioning import TEXT_TO_IMAGE, ImageConditioning

        check_together(self.image, self.mask, self.strength, control, self.control_image)
        if self.image is None and self.control_image is None and not loras:
            return TEXT_TO_IMAGE
        return ImageConditioning(
            image=None if self.image is None else fitted(self.image.decode(size), size),
            mask=None if self.mask is None or self.image is None else self._mask(self.mask, self.image, size),
            strength=self.strength,
            control=control,
            control_image=None if self.control_image is None else fitted(self.control_image.decode(size), size),
            control_scale=self.control_scale,
            loras=loras,
        )

    @staticmethod
    def _mask(mask: ImageFile, image: ImageFile, size: tuple[int, int]) -> Tensor:
        return fitted_mask(mask.decode(size, like=image.size), size)
