"""Classifiers as single files: weights in fp16, and in the metadata what it takes to build the network again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import nn

from dmd2.runtime.errors import WeightsError, shown
from dmd2.runtime.tensors import save_tensors

Model = TypeVar("Model", bound=nn.Module)


def save_classifier_file(model: nn.Module, kind: str, config: Mapping[str, Any], path: Path) -> None:
    """Writes a safetensors file. `kind`, such as "emoji", keeps the files of different classifiers apart."""
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    metadata = {"format": _format(kind), "config": json.dumps(config)}
    save_tensors(tensors, path, metadata)


def load_classifier_file(
    path: Path, kind: str, build: Callable[[dict[str, Any]], Model]
) -> tuple[Model, dict[str, Any]]:
    """The network that `build` makes of the config, with the file's weights; and the config.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"not a readable {kind} classifier ({error})", path) from error
    if metadata.get("format") != _format(kind):
        raise WeightsError(f"not an {kind} classifier (no {_format(kind)!r} in its metadata)", path)
    try:
        config = json.loads(metadata["config"])
        model = build(config)
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, MemoryError) as error:
        why = " ".join(str(error).split())  # torch lists tensors that do not fit line by line
        raise WeightsError(f"not a readable {kind} classifier ({shown(why)})", path) from error
    return model, config


def _format(kind: str) -> str:
    return f"dmd2 {kind} classifier 1"
