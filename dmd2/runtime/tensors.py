"""Tensors by name in one file: written whole, and only if they are finite; read without running anything."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd2.runtime.errors import InvalidInput, UserError, first_line, shown
from dmd2.runtime.files import atomic_path, expect_place


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous CPU `tensors` to `path`, readable for everybody.

    Raises:
        UserError: a value is infinite or no number, perhaps because it is too large for the tensor's dtype.
        OSError: the disk is full, the folder does not exist, ...
    """
    check_finite(tensors, path)
    with atomic_path(path) as temporary:
        with os_errors(path):
            save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError, as for a file `path` that is not written, if a value is infinite or no number."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: not written, for {name} has values that are not finite in {kind}")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As `save_tensors`, into a new file: `.safetensors`, or `.bin` as torch writes it.

    Raises:
        UserError: another suffix; there is such a file; a value is not finite; it cannot be written.
    """
    if path.suffix not in (".safetensors", ".bin"):
        raise InvalidInput("out", "expected a name that ends in .safetensors or .bin", path)
    if path.exists():
        raise InvalidInput("out", "exists already; expected a new file", path)
    expect_place(path, "out")
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        if path.suffix == ".safetensors":
            save_tensors(tensors, path, {"format": "pt"})
        else:
            check_finite(tensors, path)
            with atomic_path(path) as temporary:
                torch.save(tensors, temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name in a `.safetensors` or `.bin` file, on the CPU, mapped into memory.

    A `.bin` is torch's zip. Its pickle is read with `weights_only`, which runs nothing.

    Raises:
        UserError: it is missing, damaged, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with zipfile.ZipFile(path) as archive:  # torch packs nothing: such a file could unpack to any size
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{path}: a compressed archive; expected torch's, which is not")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or shown(error)})") from error
    except Exception as error:  # of any kind: torch has many for bytes that it does not understand
        why = shown(first_line(error))
        raise UserError(f"{path}: no tensors by name, truncated or damaged ({why})") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path}: expected tensors by name and nothing else")
    return dict(state)


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turns what safetensors and tokenizers raise for a full disk ("… (os error 28)") into an `OSError`."""
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, OSError) else re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
