"""CIFAR-10's archives into EDM's zips: both kinds, nothing else; pickles cannot run anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2.data.cifar10 import CLASSES, check_md5, convert_cifar10, read_batch
from dmd2.data.images import ImageSet
from dmd2.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def python2_batch(data: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    """A batch as Python 2 wrote those that are published: its strings, opcodes U and T, are bytes."""

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s

    def number(n: int) -> bytes:
        return b"J" + struct.pack("<i", n)

    dtype = b"cnumpy\ndtype\n(" + text(data.dtype.str[1:].encode()) + b"K\x00K\x01tR"
    dtype += b"(K\x03" + text(data.dtype.str[:1].encode()) + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    raw = data.tobytes()
    shape = b"(" + b"".join(map(number, data.shape)) + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    array += b"(K\x01" + shape + dtype + b"I00\nT" + struct.pack("<I", len(raw)) + raw + b"tb"
    values = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + values + b"u."


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_the_published_batches_become_zips_with_the_same_pixels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    batches = {name: random.integers(0, 256, (4, 3072), dtype=np.uint8) for name in NAMES}
    labels = {name: [(i + k) % 10 for k in range(4)] for i, name in enumerate(NAMES)}
    files = {f"cifar-10-batches-py/{name}": python2_batch(batches[name], labels[name]) for name in reversed(NAMES)}
    paths = convert_cifar10(write_tar(tmp_path / "cifar.tar.gz", files), tmp_path / "out")
    train = ImageSet(paths["train"], 32, 10)
    assert paths["train"].name == "cifar10-32x32-train.zip" and len(train) == 20
    expected = np.concatenate([batches[name] for name in NAMES[:5]]).reshape(20, 3, 32, 32)
    assert torch.equal(train.images(torch.arange(20)), torch.from_numpy(expected))
    assert train.labels is not None and train.labels.tolist() == [k for n in NAMES[:5] for k in labels[n]]
    assert len(ImageSet(paths["test"], 32, 10)) == 4
    with zipfile.ZipFile(paths["train"]) as archive:
        assert archive.namelist()[0] == "00000/img00000000.png"
        assert json.loads(archive.read("dataset.json"))["labels"][1] == ["00000/img00000001.png", 1]


def test_a_tar_of_class_folders_keeps_its_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, format="JPEG")
    files = {f"{s}/{c}/{i:04d}.jpg": buffer.getvalue() for s in ("train", "test") for c in CLASSES for i in range(2)}
    paths = convert_cifar10(write_tar(tmp_path / "images.tar.gz", files), tmp_path)
    images = ImageSet(paths["test"], 32, 10)
    assert images.labels is not None and images.labels.tolist() == [*range(10), *range(10)]
    with zipfile.ZipFile(paths["test"]) as archive:
        assert archive.read("00000/img00000019.jpg") == buffer.getvalue()


class _Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, np.load, getattr])
def test_a_pickle_cannot_call_anything(function: Any, tmp_path: Path) -> None:
    content = pickle.dumps({b"data": _Evil(function, f"touch {tmp_path / 'pwned'}"), b"labels": []}, protocol=2)
    with pytest.raises(UserError, match=r"names .*, which CIFAR-10's batches do not need: refused"):
        read_batch(content, "data_batch_1")
    assert not (tmp_path / "pwned").exists()


def test_wrong_batches_are_one_clear_line() -> None:
    good = np.zeros((2, 3072), np.uint8)
    for content, message in (
        (python2_batch(good, [1, 2])[:-9], "not one of CIFAR-10's batches"),
        (python2_batch(good.astype(np.float32), [1, 2]), "not one of CIFAR-10's batches"),
        (python2_batch(good[:, :100], [1, 2]), "expected uint8 images of 3072 values"),
        (python2_batch(good, [1]), "expected uint8 images of 3072 values and a label for each"),
        (python2_batch(good, [1, 10]), "expected labels 0 to 9"),
    ):
        with pytest.raises(UserError, match=message):
            read_batch(content, "data_batch_1")


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        convert_cifar10(write_tar(tmp_path / "other.tar.gz", {"a/b.txt": b"x"}), tmp_path)
    (tmp_path / "no.tar.gz").write_bytes(b"no tar")
    with pytest.raises(UserError, match="not a whole tar"):
        convert_cifar10(tmp_path / "no.tar.gz", tmp_path)
    with pytest.raises(UserError, match="c58f30108f718f92721af3b95e74349a was published"):
        check_md5(tmp_path / "no.tar.gz")
    assert not list(tmp_path.glob("*.zip"))


def test_the_script_checks_the_published_md5_of_pickles(tmp_path: Path) -> None:
    files = {f"cifar-10-batches-py/{name}": python2_batch(np.zeros((2, 3072), np.uint8), [0, 1]) for name in NAMES}
    archive = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    command = [sys.executable, str(ROOT / "scripts" / "download-cifar10"), "--dest", str(tmp_path / "out"), "--from"]
    done = subprocess.run([*command, str(archive)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "was published" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.zip"))
    done = subprocess.run([*command, str(tmp_path / "absent")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no such file" in done.stderr
