"""What the tests of downloads share. Their fixtures are in conftest.py."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2.models.stable_diffusion.download import STUDENTS, download
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import sha256_file
from tests.hub import Hub

ROOT = Path(__file__).parents[3]
FOUR, ONE = STUDENTS[4], STUDENTS[1]


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def refused(dest: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        download(dest, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def left_beside(dest: Path) -> set[str]:
    return {path.name for path in dest.parent.iterdir()} - {dest.name, ".download-weights.lock"}


def environment(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return kept | ours | {"PYTHONPATH": str(ROOT)} | more
