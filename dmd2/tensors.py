"""Tensors as safetensors files: written whole, and only if there is nothing in them that poisons what they meet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dmd2.errors import UserError
from dmd2.fileio import write_atomically


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

    def write(temporary: Path) -> None:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else None, str(error), str(path)) from error
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read

    write_atomically(path, write)
