"""When OpenVINO runs networks, and that they run without it where it would not be safe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dmd2.models.openvino.choice import describe, is_enabled, is_installed


@pytest.mark.parametrize(
    ("environ", "enabled", "told"),
    [
        ({}, True, "OpenVINO"),
        ({"ONEDNN_MAX_CPU_ISA": "all"}, True, "OpenVINO"),
        ({"DMD2_COMPILE": "off"}, False, "torch (OpenVINO: off by DMD2_COMPILE)"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, False, "torch (OpenVINO: off by ONEDNN_MAX_CPU_ISA)"),
    ],
)
def test_what_runs_networks_is_said(environ: dict[str, str], enabled: bool, told: str) -> None:
    assert is_enabled(environ) == (enabled and is_installed())
    assert describe(environ).startswith(told if is_installed() else "torch (OpenVINO: not installed)")


def test_instructions_may_be_limited(tmp_path: Path) -> None:
    """OpenVINO, which obeys this in part, crashed at such sizes."""
    command = [sys.executable, "-m", "dmd2.cli", "generate", "an owl", "--steps", "1", "--size", "32x64"]
    command += ["--seed", "0", "--out", str(tmp_path)]
    limits = {"DMD2_COMPILE": "auto", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.png")
    with Image.open(made) as image:
        assert image.size == (32, 64)
