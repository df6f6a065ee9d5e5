"""Writes tensors as safetensors files: whole, and only if they are finite."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dmd2.runtime.errors import UserError
from dmd2.runtime.files import atomic_path


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous CPU `tensors` to `path`, readable for everybody.

    Raises:
        UserError: a value is infinite or no number, perhaps because it is too large for the tensor's dtype.
        OSError: the disk is full, the folder does not exist, ...
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: not written, for {name} has values that are not finite in {kind}")
    with atomic_path(path) as temporary:
        with os_errors(path):
            save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


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
