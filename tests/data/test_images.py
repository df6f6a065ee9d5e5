"""Image sets: what is read, batches as a function of (seed, step), and one clear line for each broken set."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dmd2.data.images
from dmd2.data.images import ImageSet
from dmd2.runtime.errors import UserError


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def samples(n: int = 10, side: int = 8) -> list[np.ndarray[Any, Any]]:
    return list(np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def write_zip(path: Path, images: list[np.ndarray[Any, Any]], labels: Any = "by number") -> Path:
    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, png(image))
        if labels == "by number":
            labels = [[name, i % 3] for i, name in enumerate(names)]
        if labels != "no file":
            archive.writestr("dataset.json", labels if isinstance(labels, str) else json.dumps({"labels": labels}))
    return path


def test_a_zip_holds_its_images_and_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    images = samples()
    dataset = ImageSet(write_zip(tmp_path / "set.zip", images), 8, 3)
    assert len(dataset) == 10 and dataset.resolution == 8
    expected = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert torch.equal(dataset.images(torch.arange(10)), expected)
    assert torch.equal(dataset.images(torch.tensor([7, 2])), expected[[7, 2]])
    assert dataset.labels is not None and dataset.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    one_hot = dataset.one_hot(torch.tensor([5, 0]), 3)
    assert torch.equal(one_hot, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert dataset.one_hot(torch.tensor([5, 0]), 0).shape == (2, 0)


def test_a_folder_is_read_like_a_zip(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "set.zip", samples())
    with zipfile.ZipFile(archive) as z:
        z.extractall(tmp_path / "set")
    rows = torch.arange(10)
    one, other = ImageSet(archive, 8, 3), ImageSet(tmp_path / "set", 8, 3)
    assert torch.equal(one.images(rows), other.images(rows))
    assert one.labels is not None and other.labels is not None and torch.equal(one.labels, other.labels)


def test_a_set_too_large_for_memory_is_decoded_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_zip(tmp_path / "set.zip", samples())
    whole = ImageSet(archive, 8)
    monkeypatch.setattr(dmd2.data.images, "IN_MEMORY_BYTES", 10)
    lazy = ImageSet(archive, 8)
    assert lazy._memory is None and whole._memory is not None
    rows = torch.tensor([3, 9, 0])
    assert torch.equal(lazy.images(rows), whole.images(rows))


def test_batches_depend_on_seed_and_step_alone_and_every_epoch_shows_every_image_once(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "set.zip", samples())
    dataset, again = ImageSet(archive), ImageSet(archive)
    steps = [dataset.batch(4, 7, step) for step in range(10)]
    assert torch.equal(again.batch(4, 7, 6), steps[6])  # without the ones before
    assert not torch.equal(again.batch(4, 8, 6), steps[6])
    epochs = torch.cat(steps).split(10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert torch.equal(dataset.batch(25, 7, 0)[:20], torch.cat(steps)[:20])  # batches over several epochs


def test_labels_are_optional_only_where_the_model_has_no_classes(tmp_path: Path) -> None:
    for labels in (None, "no file"):
        archive = write_zip(tmp_path / "set.zip", samples(), labels)
        assert ImageSet(archive, 8).labels is None
        with pytest.raises(UserError, match=r"dataset\.json: .*a model of 3 classes needs the class of every image"):
            ImageSet(archive, 8, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("{", "not JSON"),
        ([["00000/img00000000.png", 1]], "no label for 00000/img00000001.png"),
        ([["00000/img00000000.png"]], "labels: expected"),
        ([[f"{i // 4:05d}/img{i:08d}.png", i] for i in range(10)], "is of class 3; expected a whole number, 0 to 2"),
        *(
            ([[f"{i // 4:05d}/img{i:08d}.png", label] for i in range(10)], "is of class .*; expected a whole number")
            for label in (1.7, -1, "1", True, None, [1], float("nan"), float("inf"), 10**30, 1e300, "x" * 10**6)
        ),
        ("[" * 100_000, "nested too deeply|not JSON"),
    ],
)
def test_wrong_labels_are_one_clear_line(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        ImageSet(write_zip(tmp_path / "set.zip", samples(), labels), 8, 3)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("label", [1.7, -3, 10**30])
def test_labels_are_whole_numbers_also_without_a_model(tmp_path: Path, label: float) -> None:
    labels = [[f"{i // 4:05d}/img{i:08d}.png", label] for i in range(10)]
    with pytest.raises(UserError, match="expected a whole number"):
        ImageSet(write_zip(tmp_path / "set.zip", samples(), labels), 8)


LITTER = {
    "__MACOSX/._img0.png": b"\0\5\x16\7",
    "__MACOSX/set/._dataset.json": b"\0\5\x16\7",
    "._img1.png": b"\0\5\x16\7",
    "sub/._img1.png": b"\0\5\x16\7",
    ".DS_Store": b"\0",
    "Thumbs.db": b"\0",
    "sub/Thumbs.db": b"\0",
    "desktop.ini": b"",
    ".ipynb_checkpoints/img0-checkpoint.png": b"",
}


@pytest.mark.parametrize("top", ["", "set/", "a/b/"])
@pytest.mark.parametrize("slash", ["/", "\\"])
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_sets_as_people_pack_them(tmp_path: Path, top: str, slash: str, form: str) -> None:
    """By Finder and Explorer, with a top folder, back slashes and a byte-order mark."""
    images = samples(4)
    names = ["img0.png", "sub/img1.png", "sub/img2.PNG", "sub/deep/img3.png"]
    labels = json.dumps({"labels": [[name.replace("/", slash), i] for i, name in enumerate(names)]})
    content = dict(LITTER)
    content |= {top + name: png(image) for name, image in zip(names, images, strict=True)}
    content[f"{top}dataset.json"] = b"\xef\xbb\xbf" + labels.encode()
    path = tmp_path / "set.zip"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("sub.png/", b"")  # a folder
            for name, data in content.items():
                info = zipfile.ZipInfo("x")
                info.filename = name.replace("/", slash)
                archive.writestr(info, data)
    else:
        path = tmp_path / "set"
        for name, data in content.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    dataset = ImageSet(path, 8, 4)
    assert len(dataset) == 4 and dataset.labels is not None and dataset.labels.tolist() == [0, 3, 1, 2]
    for row, image in enumerate([images[0], images[3], images[1], images[2]]):
        assert np.array_equal(dataset.images(torch.tensor([row]))[0].permute(1, 2, 0).numpy(), image)


def test_labels_of_a_part_are_not_those_of_the_set(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_zip(tmp_path / "set.zip", samples(1))
        (tmp_path / "set" / part).mkdir(parents=True)
        (tmp_path / "set" / part / "a.png").write_bytes(png(samples(1)[0]))
    (tmp_path / "set" / "test" / "dataset.json").write_text('{"labels": [["a.png", 0]]}')
    assert ImageSet(tmp_path / "set", 8).labels is None
    with pytest.raises(UserError, match="missing; a model of 3 classes"):
        ImageSet(tmp_path / "set", 8, 3)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_labels_in_any_unicode(tmp_path: Path, encoding: str) -> None:
    labels = json.dumps({"labels": [["ü.png", 2]]}, ensure_ascii=False)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("ü.png", png(samples(1)[0]))
        archive.writestr("dataset.json", labels.encode(encoding))
    found = ImageSet(tmp_path / "set.zip", 8, 3).labels
    assert found is not None and found.tolist() == [2]


def test_training_images_are_turned_and_lie_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 8, 4))  # its upper half is blue
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "b.png")
    first, second = ImageSet(tmp_path, 8).images(torch.arange(2))
    assert first[:, 0, 0].tolist() == [255, 255, 255] and first[:, 7, 7].tolist() == [0, 0, 255]
    assert second.unique().tolist() == [128]


def test_an_entry_that_unpacks_without_end_and_an_encrypted_one_are_one_clear_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(samples(1)[0]) + bytes(40_000_000))
    with pytest.raises(UserError, match=r"bomb\.zip: a\.png: larger than 32 MB"):
        ImageSet(tmp_path / "bomb.zip")
    data = bytearray(write_zip(tmp_path / "set.zip", samples(1)).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flags
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"locked\.zip: .*encrypted"):
        ImageSet(tmp_path / "locked.zip")


def test_broken_sets_are_one_clear_line(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "set.zip", samples())
    content = archive.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.zip: not a whole zip file"):
        ImageSet(tmp_path / "cut.zip")
    start = content.index(b"IDAT")
    (tmp_path / "flipped.zip").write_bytes(content[:start] + b"XXXXXX" + content[start + 6 :])
    with pytest.raises(UserError, match=r"img00000000\.png: unreadable"):
        ImageSet(tmp_path / "flipped.zip")
    with pytest.raises(UserError, match=r"^data .*: no such file or folder"):
        ImageSet(tmp_path / "absent.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        ImageSet(tmp_path / "empty")


def test_resolutions_must_fit(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "set.zip", samples())
    with pytest.raises(UserError, match="is 8x8 pixels; expected 16x16"):
        ImageSet(archive, 16)
    mixed = write_zip(tmp_path / "mixed.zip", [*samples(3), *samples(1, 12)])
    with pytest.raises(UserError, match=r"img00000003\.png is 12x12 pixels; expected 8x8"):
        ImageSet(mixed)
    oblong = write_zip(tmp_path / "oblong.zip", [np.zeros((8, 6, 3), np.uint8)])
    with pytest.raises(UserError, match="is 6x8 pixels; expected square"):
        ImageSet(oblong)


def test_an_image_of_absurd_size_is_one_clear_line(tmp_path: Path) -> None:
    """20,000 pixels a side, of which there is no more than the header."""
    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, "PNG")
    head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data.getvalue()[24:29]
    broken = data.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + data.getvalue()[33:]
    (tmp_path / "huge.png").write_bytes(broken)
    with pytest.raises(UserError, match=r"huge\.png: .*expected at most 50 million pixels"):
        ImageSet(tmp_path)
