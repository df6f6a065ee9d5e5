"""Pictures that callers give: read with limits, made as large as what is drawn, turned into an `Edit`."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dmd2.edit import PLAIN, Edit
from dmd2.errors import UserError
from dmd2.lora import Lora

MOST_BYTES = 32_000_000
MOST_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(data: bytes, field: str) -> Image.Image:
    """The picture in a file, upright (EXIF) and without transparency, in mode RGB; of an animation the first frame.

    Args:
        field: what messages call it.

    Raises:
        UserError: no PNG, JPEG or WebP, a damaged one, or one with too many bytes or pixels. What its header says is
            believed before anything is unpacked.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"{field}: larger than {MOST_BYTES // 1_000_000} MB; expected a smaller file")
    too_large = f"expected at most {MOST_PIXELS // 1_000_000} million pixels"
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise UserError(f"{field}: {width}x{height}; {too_large}")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            on_white = Image.new("RGBA", image.size, "white")
            on_white.alpha_composite(image.convert("RGBA"))
            image = on_white
        return image.convert("RGB")
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{field}: {too_large}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{field}: no picture; expected {', '.join(FORMATS)}") from error
    # Pillow's decoders raise all of these at damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, MemoryError) as error:
        raise UserError(f"{field}: a damaged picture ({str(error) or type(error).__name__})") from error


def read_picture_file(file: bytes | Path, field: str) -> Image.Image:
    """As `read_picture`, of a file or its content."""
    if isinstance(file, bytes):
        return read_picture(file, field)
    try:
        with file.open("rb") as stream:
            return read_picture(stream.read(MOST_BYTES + 1), field)
    except OSError as error:
        raise UserError(f"{field}: cannot be read ({error.strerror})") from error


def fitted(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W): scaled to cover `size` (width, height), and what juts out cut off evenly."""
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def fitted_mask(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """bool (H, W), true where the mask is light: that is painted anew. Fitted as the picture it belongs to."""
    grey = image.convert("L")
    if grey.size != size:
        grey = ImageOps.fit(grey, size, Image.Resampling.BILINEAR)
    return torch.from_numpy(numpy.array(grey)) >= 128


@dataclass(frozen=True)
class Given:
    """What a caller gives besides the prompt, read but not yet fitted to what is drawn."""

    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float = 1.0
    control_image: Image.Image | None = None
    control_scale: float = 1.0

    @classmethod
    def read(
        cls,
        image: bytes | Path | None,
        mask: bytes | Path | None,
        strength: float,
        control_image: bytes | Path | None,
        control_scale: float,
    ) -> Given:
        """From files or their contents. `strength` is of no matter without an image.

        Raises:
            UserError: one cannot be read, or they do not go together.
        """
        if mask is not None and image is None:
            raise UserError("mask: given without an image; expected the image that it is a mask of")
        read = [
            None if file is None else read_picture_file(file, name)
            for name, file in (("image", image), ("mask", mask), ("control_image", control_image))
        ]
        if read[0] is not None and read[1] is not None and read[0].size != read[1].size:
            sizes = ["x".join(map(str, picture.size)) for picture in read[:2] if picture is not None]
            raise UserError(f"mask: {sizes[1]}, the image {sizes[0]}; expected the mask to be as large as the image")
        if not 0 < strength <= 1:
            raise UserError(f"prompt_strength: {strength}; expected more than 0, at most 1")
        return cls(read[0], read[1], 1.0 if image is None else strength, read[2], control_scale)

    def size(self, asked: tuple[int, int] | None, native: tuple[int, int], unit: int) -> tuple[int, int]:
        """Width and height to draw: what is asked for, else about `native`'s pixels in the given picture's ratio."""
        picture = self.image or self.control_image
        if asked is not None or picture is None:
            return asked or native
        width, height = picture.size  # beyond 4:1, of its middle
        ratio = f"{min(width, 4 * height)}:{min(height, 4 * width)}"
        return aspect_size(ratio, native, max(unit, native[0] // 16))

    def edit(
        self, size: tuple[int, int], control: Path | None = None, loras: tuple[tuple[Lora, float], ...] = ()
    ) -> Edit:
        """For pictures of `size` (width, height)."""
        if (control is None) != (self.control_image is None):
            raise UserError("control, control_image: expected both or neither")
        if self.image is None and self.control_image is None and not loras:
            return PLAIN
        return Edit(
            image=None if self.image is None else fitted(self.image, size),
            mask=None if self.mask is None else fitted_mask(self.mask, size),
            strength=self.strength,
            control=control,
            control_image=None if self.control_image is None else fitted(self.control_image, size),
            control_scale=self.control_scale,
            loras=loras,
        )


def aspect_size(ratio: str, native: tuple[int, int], unit: int) -> tuple[int, int]:
    """Width and height, multiples of `unit`, of about the ratio "W:H" and with about as many pixels as `native`."""
    w, h = (int(part) for part in ratio.split(":"))
    pixels = native[0] * native[1]
    sides = math.sqrt(pixels * w / h), math.sqrt(pixels * h / w)
    width, height = (max(1, round(side / unit)) * unit for side in sides)
    return width, height
