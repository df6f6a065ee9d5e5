"""Whether OpenVINO runs an engine's networks. Imports nothing of it, nor torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from importlib.metadata import version
from importlib.util import find_spec


def is_installed() -> bool:
    """Whether there is OpenVINO."""
    return find_spec("openvino") is not None


def is_limited(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `ONEDNN_MAX_CPU_ISA` forbids instructions that the CPU may have.

    OpenVINO 2026.4 obeys it in part: under AVX2 it mixed kernels of both kinds and crashed on images of 32x64.
    """
    return environ.get("ONEDNN_MAX_CPU_ISA", "").strip().upper() not in ("", "ALL", "DEFAULT")


def is_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether it runs networks on a CPU: where it is installed and not limited, unless `DMD2_COMPILE` forbids it."""
    wanted = (environ.get("DMD2_COMPILE", "").strip().lower() or "auto") == "auto"
    return wanted and is_installed() and not is_limited(environ)


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
    off = "off by ONEDNN_MAX_CPU_ISA" if is_limited(environ) else "off by DMD2_COMPILE"
    return f"torch (OpenVINO: {off if is_installed() else 'not installed'})"
