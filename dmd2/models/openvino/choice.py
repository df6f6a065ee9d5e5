"""Whether OpenVINO runs an engine's networks. Imports nothing of it, nor torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from importlib.metadata import version
from importlib.util import find_spec


def is_installed() -> bool:
    """Whether there is OpenVINO."""
    return find_spec("openvino") is not None


def is_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether it runs networks on a CPU: where it is installed, unless `DMD2_COMPILE` asks for something else."""
    return (environ.get("DMD2_COMPILE", "").strip().lower() or "auto") == "auto" and is_installed()


def give_way(environ: MutableMapping[str, str] = os.environ) -> None:
    """Has torch's threads give way to other processes while they wait. Call it before torch is loaded.

    By GNU's OpenMP they wait in a loop, for milliseconds. Where OpenVINO runs networks, torch does little and loses
    nothing by it; where torch does, it would be slower alone (see docs/benchmarks.md), so nothing is changed.
    """
    if is_enabled(environ) and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environ.keys():
        environ["GOMP_SPINCOUNT"] = "1000"


def describe(environ: Mapping[str, str] = os.environ) -> str:
    """For people: what runs students' networks on a CPU."""
    if is_enabled(environ):
        return f"OpenVINO {version('openvino')}"
    return f"torch (OpenVINO: {'off by DMD2_COMPILE' if is_installed() else 'not installed'})"
