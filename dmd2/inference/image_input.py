"""Images in files that people give, to every part of the project: read by what they are for, within bounds.

What a file's header says is believed before anything is decoded, and what is decoded at one time in the whole process
has a budget. 16-bit greys are scaled to 8 bits, EXIF's orientation is applied (a broken EXIF block is ignored), of an
animation the first frame counts. What transparency means depends on the role:

- an image, and one to train on, lies on white;
- a control lies on black, as lines, poses and depths are drawn, or on white where all that is visible is dark;
- a mask is light where the image is to be painted anew. One with transparency is read by its alpha channel alone:
  what is transparent is painted anew (a photograph with a hole erased into it; a canvas larger than the photograph),
  unless what is visible is light and the mask's edge mostly transparent, or not wholly opaque where it is white: then
  somebody drew strokes on an empty layer, and the strokes are painted anew.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from dmd2.runtime.errors import UserError, shown
from dmd2.runtime.files import read_bounded

MOST_BYTES = 32_000_000
MOST_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
BUDGET_PIXELS = 64_000_000
"""decoded at one time, in the whole process; each takes up to 9 bytes until the image is scaled down"""
MOST_WORK = 40 * MOST_PIXELS
"""pixels times scans of a JPEG: each scan of a progressive one goes over all of them"""
WEBP_COST = 2
"""a WebP's pixels count so often: libwebp's decoder of animations, which Pillow uses for all, keeps two copies"""
LIGHT, WHITE = 128, 250
"""a mask is light, and purely white, from here on"""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""what makes an image upright, by EXIF's orientation; from 5 on, width and height change places"""


class Role(Enum):
    """What an image is for."""

    IMAGE = "image"
    MASK = "mask"
    CONTROL = "control"
    TRAINING = "training"


class Budget:
    """Lets work begin as long as its parts together cost at most `total`; who asks for more than that, alone."""

    def __init__(self, total: int) -> None:
        self._total, self._free = total, total
        self._turn = threading.Lock()  # a large part is not overtaken by small ones for ever
        self._room = threading.Condition()

    @contextmanager
    def part(self, cost: int) -> Iterator[None]:
        cost = min(cost, self._total)
        with self._turn, self._room:
            self._room.wait_for(lambda: self._free >= cost)
            self._free -= cost
        try:
            yield
        finally:
            with self._room:
                self._free += cost
                self._room.notify_all()


BUDGET = Budget(BUDGET_PIXELS)


@dataclass(frozen=True)
class ImageFile:
    """An image whose header was read: what is missing is to decode it."""

    data: bytes
    field: str
    """what messages call it"""
    role: Role
    size: tuple[int, int]
    """width and height, upright"""
    orientation: int
    formats: tuple[str, ...]

    @classmethod
    def read(
        cls, file: bytes | Path, field: str, role: Role = Role.IMAGE, formats: Collection[str] = FORMATS
    ) -> ImageFile:
        """From a file or its content.

        Raises:
            UserError: it cannot be read, has none of the formats, or too many bytes or pixels.
        """
        file = read_bounded(file, MOST_BYTES, field)
        formats = tuple(formats)
        with _opened(file, field, formats) as image:
            width, height = image.size
            if not 0 < width * height <= MOST_PIXELS:
                raise UserError(
                    f"{field}: {width}x{height}; expected at most {MOST_PIXELS // 1_000_000} million pixels"
                )
            scans = file.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
            if width * height * scans > MOST_WORK:
                raise UserError(f"{field}: a JPEG of {scans} scans; expected fewer, or fewer pixels")
            orientation = _orientation(image, file)
        size = (height, width) if orientation >= 5 else (width, height)
        return cls(file, field, role, size, orientation, formats)

    def decode(self, wanted: tuple[int, int] | None = None, like: tuple[int, int] | None = None) -> Image.Image:
        """Upright, without transparency; mode RGB, a mask's L.

        Args:
            wanted: width and height: scaled to cover them, and what juts out cut off evenly. None: as it is.
            like: the size of the image that this mask belongs to: first of all it is stretched to that.

        Raises:
            UserError: it is damaged.
        """
        turned = self.orientation >= 5
        if wanted is not None and turned:
            wanted = wanted[1], wanted[0]
        if like is not None and turned:
            like = like[1], like[0]
        with _opened(self.data, self.field, self.formats) as image:
            cost = image.width * image.height * (WEBP_COST if image.format == "WEBP" else 1)
            if wanted is not None and self.role is not Role.TRAINING:  # metrics compare their pixels
                _draft(image, wanted)
                # A progressive JPEG is kept whole however small its image is made.
                cost = cost if "progressive" in image.info else image.width * image.height
            with BUDGET.part(cost):
                image.load()
                found = _flat(image, self.role, wanted, like or image.size)
        return found if self.orientation not in _TURNS else found.transpose(_TURNS[self.orientation])


def read_image(
    file: bytes | Path, field: str, role: Role = Role.IMAGE, formats: Collection[str] = FORMATS
) -> Image.Image:
    """The whole image in a file or its content. See `ImageFile.read` and `ImageFile.decode`."""
    return ImageFile.read(file, field, role, formats).decode()


def resized(
    image: Image.Image,
    size: tuple[int, int],
    like: tuple[int, int] | None = None,
    method: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """`image` scaled to cover `size`, and what juts out cut off evenly, as if it had the proportions of `like`."""
    width, height = like or image.size
    if (width, height) == size == image.size:
        return image
    scale = max(size[0] / width, size[1] / height)
    part = size[0] / scale / width, size[1] / scale / height  # of each side, that stays
    left, top = (1 - part[0]) / 2 * image.width, (1 - part[1]) / 2 * image.height
    return image.resize(size, method, (max(0.0, left), max(0.0, top), image.width - left, image.height - top))


@contextmanager
def _opened(data: bytes, field: str, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """The image, not yet decoded. Whatever Pillow raises at it in the block becomes a UserError."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            yield image
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{field}: expected at most {MOST_PIXELS // 1_000_000} million pixels") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{field}: no image; expected {', '.join(formats)}") from error
    except Exception as error:  # its decoders, in C and Python, know no bounds in what they raise at damaged files
        raise UserError(f"{field}: a damaged image ({shown(str(error) or type(error).__name__)})") from error


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF's, 1 … 8; 1 is upright, and so is what has none or a broken block."""
    if image.format == "PNG" and "exif" not in image.info:
        image.info["exif"] = _png_exif(data)  # else Pillow decodes all pixels to look behind them
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above; and cameras and editors leave all kinds of broken blocks in good images
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _png_exif(data: bytes) -> bytes:
    """The EXIF block of a PNG, wherever it lies; without its chunk's checksum being looked at."""
    at = 8
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"eXIf":
            return b"Exif\0\0" + data[at + 8 : at + 8 + length]
        at += 12 + length
    return b""


def _draft(image: Image.Image, wanted: tuple[int, int]) -> None:
    """Has a JPEG decoded at 1/2, 1/4 or 1/8 of its size, at least twice as large as wanted. Others stay."""
    scale = 2 * max(wanted[0] / image.width, wanted[1] / image.height)
    if scale < 1:
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _flat(image: Image.Image, role: Role, wanted: tuple[int, int] | None, like: tuple[int, int]) -> Image.Image:
    """`image`, decoded, without transparency, cut and scaled; not yet turned."""
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # which copies
    elif image.mode != "RGB" and role is not Role.MASK:
        image = image.convert("RGB")
    if role is Role.MASK:
        image = _mask(image)
        return image if wanted is None else resized(image, wanted, like, Image.Resampling.BILINEAR)
    if wanted is not None:
        image = resized(image, wanted)
    if image.mode != "RGBA":
        return image
    background = Image.new("RGBA", image.size, "white" if role is not Role.CONTROL else _contrast(image))
    background.alpha_composite(image)
    return background.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey → 8-bit grey, L or LA, scaled; Pillow itself would cut off at 255. Others stay."""
    if image.mode not in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return image
    clear = image.info.get("transparency")  # a grey, in a PNG
    grey = np.empty((image.height, image.width), np.uint8)
    alpha = np.full_like(grey, 255) if isinstance(clear, int) else None
    for top in range(0, image.height, 256):  # by strips, for the memory's sake
        strip = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height)))).astype(np.int64)
        grey[top : top + 256] = (strip.clip(0, 65535) * 255 + 32767) // 65535
        if alpha is not None:
            alpha[top : top + 256][strip == clear] = 0
    bands = [Image.fromarray(band) for band in (grey, alpha) if band is not None]
    return bands[0] if alpha is None else Image.merge("LA", bands)


def _mask(image: Image.Image) -> Image.Image:
    """Mode L, light where to paint anew. See the module."""
    if image.mode != "RGBA":
        return image.convert("L")
    alpha = image.getchannel("A")
    low, high = (int(value) for value in alpha.getextrema())  # type: ignore[arg-type] # of one band
    if low == high:
        return image.convert("L") if high else Image.new("L", image.size, 255)
    alpha = alpha.point([min(255, value * 255 // high) for value in range(256)])  # strokes may be faint
    visible = alpha.point([255 * (value >= 128) for value in range(256)])
    seen, edge = image.convert("L").histogram(visible), _share(_edge(visible), 128)
    if _share(seen, LIGHT) > 0.95 and edge < (0.9 if _share(seen, WHITE) > 0.95 else 0.5):
        return alpha
    return ImageChops.invert(alpha)


def _contrast(image: Image.Image) -> str:
    """The background on which something of a control is seen."""
    visible = image.getchannel("A").point([255 * (value >= 128) for value in range(256)])
    return "white" if _share(image.convert("RGB").convert("L").histogram(visible), 64) < 0.05 else "black"


def _share(histogram: list[int], least: int) -> float:
    """Of the pixels counted, how many are at least so light. 1 if there are none."""
    total = sum(histogram)
    return sum(histogram[least:]) / total if total else 1.0


def _edge(image: Image.Image) -> list[int]:
    """The histogram of its outermost pixels."""
    width, height = image.size
    sides = ((0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height))
    return [sum(counts) for counts in zip(*(image.crop(side).histogram() for side in sides), strict=True)]
