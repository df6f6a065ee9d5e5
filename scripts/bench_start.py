"""`scripts/bench start`: seconds from a process's start to what was asked of it, beside diffusers' own pipeline."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from environment import ROOT

from dmd2.models.openvino.choice import describe
from dmd2.weights.manifest import DEFAULT, read_manifest

PROMPT = "apple"
WIDTH, HEIGHT = read_manifest(DEFAULT).native_size
DIFFUSERS = f"""
import sys
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained("{DEFAULT}/unet_1step")
pipeline = StableDiffusionXLPipeline.from_pretrained("{DEFAULT}", unet=unet)
pipeline.set_progress_bar_config(disable=True)
image = pipeline("{PROMPT}", width={WIDTH}, height={HEIGHT}, timesteps=[399], guidance_scale=0.0).images[0]
image.save(sys.argv[1])
"""


def start(rounds: int) -> dict[str, Any]:
    """Medians, and all values, in seconds; one after the other in each round, with a cache of their own."""
    with tempfile.TemporaryDirectory(prefix="dmd2-bench-") as folder:
        environment = os.environ | {"DMD2_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        dmd2 = [sys.executable, "-m", "dmd2.cli"]
        image = [*dmd2, "generate", PROMPT, "--steps", "1", "--out", f"{folder}/images"]
        calls: dict[str, Callable[[], float]] = {
            "dmd2 --help": lambda: _run([*dmd2, "--help"], environment),
            "an input error": lambda: _run([*dmd2, "generate", PROMPT, "--steps", "7"], environment, status=2),
            "dmd2 generate": lambda: _run(image, environment),
            "diffusers": lambda: _run([sys.executable, "-c", DIFFUSERS, f"{folder}/theirs.png"], environment),
            "scripts/demo": lambda: _run([str(ROOT / "scripts" / "demo"), PROMPT, "--out", folder], environment),
        }
        if not (ROOT / ".venv").exists():
            del calls["scripts/demo"]  # it would install
        if find_spec("cog") and find_spec("httpx"):
            calls["dmd2 cog to READY"] = lambda: _ready(Path(folder), environment)
        first = {name: round(calls[name](), 2) for name in ("dmd2 generate", "diffusers")}  # files come into memory
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                taken[name].append(round(call(), 2))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    ours, longer = medians["dmd2 generate"], [name for name in medians if name.startswith(("scripts", "dmd2 cog"))]
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "networks run by": describe(),
        "rounds": rounds,
        "first": first,
        "median_s": medians,
        "dmd2 generate / diffusers": round(ours / medians["diffusers"], 3),
        "of dmd2 generate": {name: round(medians[name] / ours, 2) for name in longer},
        "all_s": taken,
    }


def _run(command: list[str], environment: dict[str, str], status: int = 0) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    taken = time.perf_counter() - began
    if done.returncode != status:
        sys.exit(f"bench start: {' '.join(command)}: exit status {done.returncode}:\n{done.stderr[-2000:]}")
    return taken


def _ready(folder: Path, environment: dict[str, str]) -> float:
    from server import running

    began = time.perf_counter()
    with running(folder, **environment):
        return time.perf_counter() - began
