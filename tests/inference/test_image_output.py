"""Image files: readable by Pillow, true to the pixels, and with how they were made inside."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dmd2.inference.image_output import IMAGE_DESCRIPTION, encode_image, save_png

FACTS = {
    "prompt": "Ünïcode: ein „Apfel“, 林檎 🍎\nsecond line",
    "seed": 4294967295,
    "steps": 4,
    "weights_sha256": "ab" * 32,
}


@pytest.fixture
def image() -> Tensor:
    """A smooth image in colour, higher than wide: uint8 (3, 96, 64)."""
    coarse = torch.rand((1, 3, 6, 4), generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (96, 64), mode="bilinear")[0].mul(255).byte()


def decoded(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(96, 64, 3).permute(2, 0, 1)


def facts_of(data: bytes) -> dict[str, str]:
    """Read as any other program would: with Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            return {str(name): str(text) for name, text in image.info.items()}
        found: dict[str, str] = json.loads(image.getexif()[IMAGE_DESCRIPTION])
        return found


def error(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference in grey levels (0 … 255)."""
    return float((one.float() - other.float()).abs().mean())


@pytest.mark.parametrize(("format", "name"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_round_trip_keeps_pixels_and_facts(image: Tensor, format: str, name: str) -> None:
    data = encode_image(image, format, 90, FACTS)
    with Image.open(io.BytesIO(data)) as pixels:
        assert (pixels.format, pixels.mode, pixels.size) == (name, "RGB", (64, 96))
    assert facts_of(data) == {key: str(value) for key, value in FACTS.items()}
    assert error(decoded(data), image) < (4 if format != "png" else 1e-9)


@pytest.mark.parametrize("format", ["webp", "jpg"])
def test_quality_is_heeded_up_to_its_bounds(image: Tensor, format: str) -> None:
    lowest, middle, highest = (encode_image(image, format, quality, {}) for quality in (0, 60, 100))
    assert len(lowest) < len(middle) < len(highest)
    assert error(decoded(lowest), image) > error(decoded(middle), image) > error(decoded(highest), image)


def test_quality_is_of_no_matter_to_a_png(image: Tensor) -> None:
    assert encode_image(image, "png", 0, FACTS) == encode_image(image, "png", 100, FACTS)


@pytest.mark.parametrize("format", ["webp", "jpg", "png"])
@pytest.mark.parametrize("quality", [-1, 101])
def test_quality_out_of_bounds_is_refused(image: Tensor, format: str, quality: int) -> None:
    with pytest.raises(ValueError, match=f"quality {quality}: expected 0 to 100"):
        encode_image(image, format, quality, {})


@pytest.mark.parametrize("format", ["gif", "jpeg", "PNG", ""])
def test_other_formats_are_refused(image: Tensor, format: str) -> None:
    with pytest.raises(ValueError, match="expected webp, jpg or png"):
        encode_image(image, format, 80, {})


def test_the_image_of_a_batch_is_the_one_given(image: Tensor) -> None:
    batch = torch.stack([image, 255 - image])  # views of a batch, as the service hands them over
    assert torch.equal(decoded(encode_image(batch[1], "png", 80, {})), 255 - image)


def test_saved_png_has_the_same_pixels_and_facts(image: Tensor, tmp_path: Path) -> None:
    path = save_png(image, tmp_path, FACTS)
    assert path.name.endswith("_4_4294967295.png") and list(tmp_path.iterdir()) == [path]
    assert torch.equal(decoded(path.read_bytes()), image)
    assert facts_of(path.read_bytes()) == {key: str(value) for key, value in FACTS.items()}
