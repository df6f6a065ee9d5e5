"""Images that people give: one reader for all of them, by role, within bounds."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps, PngImagePlugin

import dmd2.inference.image_input
from dmd2.inference.image_input import MOST_BYTES, Budget, ImageFile, Role, read_image, resized
from dmd2.inference.inputs import InputImages, fitted, fitted_mask
from dmd2.runtime.errors import UserError

EVERY_ROLE = list(Role)


def png(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of many black pixels in few bytes; only its head is whole."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_000, 8_000), (30_000, 30_000), (1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_an_error_before_it_is_unpacked(width: int, height: int) -> None:
    with pytest.raises(UserError, match=r"image: .*expected at most 50 million pixels"):
        read_image(bomb(width, height), "image")


def test_what_is_no_image_or_a_damaged_one() -> None:
    whole = png(Image.effect_noise((64, 64), 50).convert("RGB"))
    with pytest.raises(UserError, match="mask: a damaged image"):
        read_image(whole[: len(whole) // 2], "mask")
    for data in (b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", png(Image.new("L", (8, 8)), "TIFF")):
        with pytest.raises(UserError, match="image: no image; expected PNG, JPEG, WEBP"):
            read_image(data, "image")
    with pytest.raises(UserError, match="image: larger than 32 MB"):
        read_image(bytes(MOST_BYTES + 1), "image")


def test_images_are_upright_opaque_and_of_three_channels() -> None:
    half = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 4, 4))
    found = read_image(png(half), "image")
    assert found.mode == "RGB" and found.getpixel((0, 0)) == (0, 0, 255) and found.getpixel((7, 0)) == (255,) * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = read_image(png(Image.new("RGB", (8, 4)), "JPEG", exif=exif), "image")
    assert turned.size == (4, 8)
    for mode in ("L", "P", "1", "LA", "I;16"):
        assert read_image(png(Image.new(mode, (8, 8))), "image").mode == "RGB"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    first = read_image(png(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), "image")
    assert first.getpixel((0, 0)) == (255, 0, 0)


def test_images_are_scaled_and_cut_not_stretched() -> None:
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (16, 0, 48, 32))
    square = fitted(wide, (16, 16))
    assert square.shape == (3, 16, 16) and square[2].min() > 200  # the blue square in the middle
    assert fitted(wide, (64, 32)).tolist() == fitted(wide.copy(), (64, 32)).tolist()
    mask = Image.new("L", (64, 32))
    mask.paste(255, (16, 0, 32, 32))
    cut = fitted_mask(mask, (16, 16))
    assert cut.shape == (16, 16) and cut[:, :8].all() and not cut[:, 8:].any()
    assert fitted_mask(Image.new("L", (4, 4), 127), (4, 4)).any().item() is False
    assert fitted_mask(Image.new("L", (4, 4), 128), (4, 4)).all().item() is True


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


# 16 bits


@pytest.mark.parametrize("role", EVERY_ROLE)
def test_greys_of_16_bits_are_scaled_not_clipped(role: Role) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(4, 0)
    found = pixels(read_image(png(Image.fromarray(ramp)), "image", role))
    grey = found if role is Role.MASK else found[..., 0]
    assert np.abs(grey - ramp / 257).max() <= 0.5
    assert grey.min() == 0 and grey.max() == 255 and len(np.unique(grey)) == 64


def test_a_clear_grey_of_16_bits_is_clear() -> None:
    grey = np.full((4, 4), 40_000, np.uint16)
    grey[:2] = 1000
    found = read_image(png(Image.fromarray(grey), transparency=1000), "image")
    assert found.getpixel((0, 0)) == (255,) * 3 and found.getpixel((0, 3)) == (156,) * 3


# EXIF


def oriented(form: str, orientation: object) -> bytes:
    image = Image.new("RGB", (16, 8), "blue")
    image.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return png(image, form, exif=exif)


@pytest.mark.parametrize("role", EVERY_ROLE)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_every_role_is_turned_upright(form: str, role: Role) -> None:
    file = ImageFile.read(oriented(form, 6), "image", role)  # its left side is the top
    assert file.size == (8, 16)
    for image in (file.decode(), file.decode((8, 16)), resized(file.decode((4, 8)), (8, 16))):
        found = image.convert("RGB")
        assert found.size == (8, 16)
        top, bottom = found.getpixel((4, 2)), found.getpixel((4, 13))
        assert isinstance(top, tuple) and isinstance(bottom, tuple)
        if role is Role.MASK:
            assert top[0] > bottom[0] + 30  # red is lighter than blue
        else:
            assert top[0] > 180 > 80 > top[2] and bottom[2] > 180 > 80 > bottom[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_those_of_pillow(orientation: int) -> None:
    noise = Image.effect_noise((13, 7), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(noise, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image)
    assert np.array_equal(pixels(read_image(data, "image")), pixels(expected))
    scaled = ImageFile.read(data, "image").decode((6, 6))
    assert np.abs(pixels(scaled) - pixels(resized(expected.convert("RGB"), (6, 6)))).max() <= 1


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    data = oriented("PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert ImageFile.read(moved, "image").size == (8, 16) == read_image(moved, "image").size


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0garbage, but long enough to be looked at",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # an orientation that is a text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0",  # … a fraction nowhere
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    ],
)
def test_broken_exif_is_ignored(form: str, block: bytes) -> None:
    data = png(Image.new("RGB", (8, 4), "red"), form, exif=block)
    found = read_image(data, "image")
    assert found.size == (8, 4) and pixels(found)[0, 0, 0] > 240


# An orientation, and one more value of the wrong type: Pillow's exif_transpose() raises at these.
HALF_BROKEN = [
    b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    + tag
    + b"\0\0\0\x26\0\0\0\0\0\0\0\x48\0\0\0\x01"
    for tag in (b"\x01\x1a\0\x01\0\0\0\x01", b"\x01\x41\0\x05\0\0\0\x01", b"\x01\x4d\0\x05\0\0\0\x01")
]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("block", HALF_BROKEN)
def test_an_orientation_beside_broken_values_counts(form: str, block: bytes) -> None:
    data = png(Image.new("RGB", (8, 4), "red"), form, exif=block)
    assert read_image(data, "image").size == (4, 8)


# Transparency


def photo(side: int = 64) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).convert("RGBA")


HOLE = (20, 20, 40, 40)


def holed(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), HOLE)
    return image


def strokes(colour: str) -> Image.Image:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste(colour, HOLE)
    return image


def expected_mask() -> np.ndarray[Any, Any]:
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        holed(photo()),
        holed(Image.new("RGB", (64, 64), "black")),
        holed(Image.new("RGB", (64, 64), "white")),
        holed(Image.new("RGB", (64, 64), (250, 240, 230))),
        holed(Image.new("L", (64, 64), 90)).convert("LA"),
        strokes("white"),
        strokes("#ffffff60"),  # faint
        strokes("#ffffc0"),
        strokes("white").convert("LA"),
        strokes("white").convert("RGB"),
        strokes("white").convert("L"),
        strokes("white").convert("1"),
        strokes("white").convert("RGB").convert("P"),
        Image.fromarray(np.asarray(strokes("white").convert("L")).astype(np.uint16) * 257),
    ],
    ids=lambda image: image.mode,
)
def test_masks_as_people_make_them_mark_the_same_part(mask: Image.Image) -> None:
    for size in ((64, 64), (32, 32)):
        found = fitted_mask(ImageFile.read(png(mask), "mask", Role.MASK).decode(size), size)
        expected = expected_mask()[:: 64 // size[0], :: 64 // size[0]]
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("part", [(0, 0, 64, 40), (0, 0, 40, 64), (0, 0, 64, 60), (1, 1, 63, 63), (30, 0, 64, 64)])
def test_white_strokes_may_reach_the_edge(part: tuple[int, int, int, int]) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste("white", part)
    found = fitted_mask(read_image(png(mask), "mask", Role.MASK), (64, 64)).numpy()
    assert np.array_equal(found, np.asarray(mask.getchannel("A")) == 255)


def test_a_hole_at_the_edge_of_a_bright_image() -> None:
    mask = Image.fromarray(np.random.default_rng(0).integers(180, 246, (64, 64, 3), dtype=np.uint8)).convert("RGBA")
    mask.paste((0, 0, 0, 0), (20, 40, 40, 64))
    found = fitted_mask(read_image(png(mask), "mask", Role.MASK), (64, 64)).numpy()
    assert np.array_equal(found, np.asarray(mask.getchannel("A")) == 0)


def test_what_surrounds_an_image_on_a_larger_canvas_is_painted_anew() -> None:
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste(photo(20), HOLE)
    found = fitted_mask(read_image(png(mask), "mask", Role.MASK), (64, 64)).numpy()
    assert np.array_equal(found, ~expected_mask())


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_mask_that_is_equally_opaque_everywhere(alpha: int) -> None:
    mask = strokes("white").convert("RGB").convert("RGBA")
    mask.putalpha(alpha)
    found = fitted_mask(read_image(png(mask), "mask", Role.MASK), (64, 64)).numpy()
    assert np.array_equal(found, expected_mask() if alpha else np.ones((64, 64), bool))


def test_transparency_of_images_lies_on_white_and_of_controls_where_it_is_seen() -> None:
    for role in (Role.IMAGE, Role.TRAINING):
        found = read_image(png(strokes("red")), "image", role)
        assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((30, 30)) == (255, 0, 0)
    for colour, ground in (("white", 0), ("red", 0), ("black", 255)):
        found = read_image(png(strokes(colour)), "control_image", Role.CONTROL)
        assert found.getpixel((0, 0)) == (ground,) * 3
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert read_image(png(half), "image").getpixel((0, 0)) == (255, 127, 127)
    colours = strokes("red").convert("RGB").quantize(4)
    clear = colours.getpixel((0, 0))
    assert read_image(png(colours, transparency=clear), "image").getpixel((0, 0)) == (255, 255, 255)


# A request's images


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (64, 16)])
def test_a_mask_of_another_size_is_resized(size: tuple[int, int]) -> None:
    """Not cut: (64, 16) is stretched."""
    mask = strokes("white").convert("L").resize(size, Image.Resampling.NEAREST)
    edit = InputImages.read(png(photo()), png(mask), 1.0, None, 1.0).edit((64, 64))
    assert edit.image is not None and edit.mask is not None and edit.mask.shape == (64, 64)
    assert torch.equal(edit.image, fitted(photo().convert("RGB"), (64, 64)))
    assert (edit.mask.numpy() != expected_mask()).sum() <= 4 * 20 * 4
    assert edit.mask[28:32, 28:32].all() and not edit.mask[:16].any() and not edit.mask[:, :16].any()


def test_image_and_mask_are_cut_alike_also_where_only_one_is_turned() -> None:
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (16, 0, 48, 32))
    marks = wide.getchannel("B")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = png(marks.transpose(Image.Transpose.ROTATE_90), exif=exif)
    for mask in (png(marks), png(marks.resize((16, 8))), turned):
        edit = InputImages.read(png(wide), mask, 1.0, None, 1.0).edit((32, 32))
        assert edit.mask is not None and edit.mask.all()
        edit = InputImages.read(png(wide), mask, 1.0, None, 1.0).edit((64, 32))
        assert edit.mask is not None and edit.mask[:, 17:47].all() and not edit.mask[:, :15].any()


def test_all_headers_are_looked_at_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(ImageFile, "decode", lambda self, *_, **__: decoded.append(self.field))
    good = png(photo())
    for which, field in enumerate(("image", "mask", "control_image")):
        files = [good] * 3
        files[which] = bomb(20_000, 20_000)
        with pytest.raises(UserError, match=f"{field}: .*million pixels"):
            InputImages.read(files[0], files[1], 1.0, files[2], 1.0)
    with pytest.raises(UserError, match="control_image: no image"):
        InputImages.read(good, good, 1.0, b"<html>", 1.0)
    assert not decoded


def test_reading_a_header_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert ImageFile.read(bomb(7000, 7000), "image").size == (7000, 7000)


# Bounds


def test_a_large_jpeg_is_decoded_small(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(Image.effect_noise((2048, 1024), 80).convert("RGB").filter(ImageFilter.GaussianBlur(16)), "JPEG")
    costs: list[int] = []

    class Seen(Budget):
        def part(self, cost: int) -> AbstractContextManager[None]:
            costs.append(cost)
            return super().part(cost)

    monkeypatch.setattr(dmd2.inference.image_input, "BUDGET", Seen(10**9))
    small = ImageFile.read(data, "image").decode((64, 64))
    whole = ImageFile.read(data, "image", Role.TRAINING).decode((64, 64))
    assert costs == [256 * 128, 2048 * 1024]
    assert small.size == (64, 64) and np.abs(pixels(small) - pixels(whole)).mean() < 4


def test_what_is_decoded_at_one_time_has_a_budget() -> None:
    budget, inside, most = Budget(100), [0], [0]
    lock = threading.Lock()

    def work(cost: int) -> None:
        with budget.part(cost):
            with lock:
                inside[0] += min(cost, 100)
                most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            with lock:
                inside[0] -= min(cost, 100)

    threads = [threading.Thread(target=work, args=(cost,)) for cost in (30, 60, 1000, 1, 100, 50, 50, 99) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] <= 100 and budget._free == 100
    with pytest.raises(RuntimeError), budget.part(70):
        raise RuntimeError
    assert budget._free == 100


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = png(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    many = data[:scan] + data[scan:-2] * 200 + data[-2:]
    with pytest.raises(UserError, match=r"image: a JPEG of .* scans; expected fewer"):
        read_image(many, "image")
    assert read_image(data, "image").size == (4000, 4000)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
    role=st.sampled_from(EVERY_ROLE),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    wanted=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    like=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    orientation=st.integers(0, 9),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
)
def test_any_file_is_an_image_of_the_wanted_size_or_one_clear_line(
    form: str,
    mode: str,
    role: Role,
    size: tuple[int, int],
    wanted: tuple[int, int] | None,
    like: tuple[int, int] | None,
    orientation: int,
    damage: list[tuple[float, int]],
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    try:
        data = bytearray(png(Image.new(mode, size), form, exif=exif))
    except OSError:  # no such mode in this format
        return
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    try:
        file = ImageFile.read(bytes(data), "image", role)
        found = file.decode(wanted, like)
    except UserError as error:
        assert damage and str(error).startswith("image: ") and "\n" not in str(error) and len(str(error)) < 500
    else:
        assert found.size == (wanted or file.size) and found.mode == ("L" if role is Role.MASK else "RGB")
