"""CIFAR-10 (Krizhevsky 2009), as published or as a tar of JPEGs, into EDM's data set format.

The published batches are pickles. They are read without being able to name anything but NumPy's arrays.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmd2.runtime.errors import DataError, UserError, first_line
from dmd2.runtime.files import atomic_path
from dmd2.weights.assets import Asset

SERVER = "https://www.cs.toronto.edu"
ARCHIVE = Asset("~kriz/cifar-10-python.tar.gz", "none stated; cite Krizhevsky 2009")
MD5 = "c58f30108f718f92721af3b95e74349a"  # as published beside it
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}

Item = tuple[bytes, str, int]
"""an encoded image, its suffix and its class"""


def convert_cifar10(archive: Path, out: Path) -> dict[str, Path]:
    """Writes `cifar10-32x32-train.zip` and `-test.zip` into `out`, each whole or not at all.

    Args:
        archive: the published tar of Python pickles, whose images become PNGs in their order; or a tar with
            `train/CLASS/NAME.jpg` and `test/CLASS/NAME.jpg`, whose files are kept as they are, in the order of names.

    Raises:
        UserError: it is neither, or damaged.
    """
    try:
        with tarfile.open(archive) as tar:
            # In one pass: to go back in a compressed tar is to begin again.
            opened = ((m.name.removeprefix("./"), tar.extractfile(m)) for m in tar if m.isfile())
            files = {name: file.read() for name, file in opened if file}
        if any(name.endswith("/data_batch_1") for name in files):
            splits = {split: _from_pickles(files, names) for split, names in BATCHES.items()}
        else:
            splits = _from_files(files)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"not a whole tar ({first_line(error)})", archive) from error
    except UserError as error:
        raise DataError(f"{error}", archive) from None
    out.mkdir(parents=True, exist_ok=True)
    paths = {split: out / f"cifar10-32x32-{split}.zip" for split in splits}
    for split, items in splits.items():
        with atomic_path(paths[split]) as temporary:
            _write(temporary, items)
    return paths


def check_md5(archive: Path) -> None:
    """Raises UserError if `archive` is not the published file."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != MD5:
        raise DataError(f"md5 is {found}, but {MD5} was published: damaged, or another file", archive)


def _from_pickles(files: dict[str, bytes], names: list[str]) -> list[Item]:
    items: list[Item] = []
    for name in names:
        content = next((content for path, content in files.items() if path.endswith("/" + name)), None)
        if content is None:
            raise UserError(f"holds no {name}")
        pixels, labels = read_batch(content, name)
        for image, label in zip(pixels, labels, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
            items.append((buffer.getvalue(), ".png", label))
    return items


def read_batch(content: bytes, name: str) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[int]]:
    """uint8 (N, 32, 32, 3) and the classes of one pickled batch.

    Raises:
        UserError: it is not such a batch, or names anything that such a batch does not need.
    """
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        data, labels = batch[b"data"], batch[b"labels"]
    except UserError:
        raise
    except Exception as error:  # of any kind: unpickling raises many for bytes that it does not understand
        raise DataError(f"not one of CIFAR-10's batches ({type(error).__name__}: {error})", name) from error
    fits = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (len(data), 3 * SIDE * SIDE)
    if not fits or not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"expected uint8 images of {3 * SIDE * SIDE} values and a label for each", name)
    if any(type(label) is not int or not 0 <= label < len(CLASSES) for label in labels):
        raise DataError(f"expected labels 0 to {len(CLASSES) - 1}", name)
    return np.ascontiguousarray(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)), labels


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can make NumPy arrays of numbers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if re.fullmatch(r"numpy\.(_?core\.)?multiarray", module) and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        raise UserError(f"names {module}.{name}, which CIFAR-10's batches do not need: refused")


def _dtype(code: bytes | str, *flags: bool) -> np.dtype[Any]:
    text = code.decode() if isinstance(code, bytes) else code
    if text not in ("u1", "|u1"):
        raise ValueError(f"an array of {text!r}")
    return np.dtype(text)


def _from_files(files: dict[str, bytes]) -> dict[str, list[Item]]:
    found: dict[str, list[tuple[str, int, str]]] = {"train": [], "test": []}
    for path in files:
        parts = path.split("/")[-3:]
        if len(parts) == 3 and parts[0] in found and parts[1] in CLASSES:
            found[parts[0]].append((parts[2], CLASSES.index(parts[1]), path))
    if not all(found.values()):
        raise UserError("holds neither CIFAR-10's batches nor files train/CLASS/NAME and test/CLASS/NAME")
    return {  # sorted by name first, so that classes alternate
        split: [(files[path], Path(path).suffix.lower(), label) for _, label, path in sorted(items)]
        for split, items in found.items()
    }


def _write(path: Path, items: Iterable[Item]) -> None:
    labels: list[tuple[str, int]] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, (content, suffix, label) in enumerate(items):
            name = f"{i // 1000:05d}/img{i:08d}{suffix}"
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time: the same bytes each time
            labels.append((name, label))
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": labels}))
