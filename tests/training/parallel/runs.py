"""Runs of a tiny SDXL by one process or two: how they are started, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dmd2.training.run.logs import SPEED
from tests.service.cog.test_supervisor import free_port
from tests.training.test_loop import checkpoint

ROOT = Path(__file__).resolve().parents[3]
ITERATIONS = int(os.environ.get("TORCHRUN_ITERATIONS", "12"))
SETTINGS = {
    "iterations": ITERATIONS,
    "batch_size": 4,
    "generator_every": 2,
    "timesteps": "[999,499]",
    "optimizer": "adamw",
    "lr": 2e-6,
    "lr_critic": 2e-6,
    "warmup": 0,
    "checkpoint_every": 3,
    "sample_every": 1000,
    "log_every": 1,
    "precision": "fp32",
    "compile": "false",
}
LONG = 1800  # seconds; far more than anything here takes
Paths = dict[str, str]


def job(paths: Paths, out: Path, **more: Any) -> dict[str, Any]:
    return {"out": str(out), "paths": paths, "set": sets(SETTINGS), **more}


def torchrun(*words: str, nodes: Sequence[str] = ("--standalone", "--nproc-per-node", "2")) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *nodes]
    # Should a process die of a signal, its text says where it was.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*launcher, *words], env=environment, text=True, **both)  # type: ignore[call-overload]


def on_two_machines(*words: str) -> str:
    """As two machines would, with a process on each: a torchrun for each of them. What the first one prints."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    first, second = (torchrun(*words, nodes=[*meet, "--node-rank", str(rank)]) for rank in range(2))
    try:
        text = finish(first)
        finish(second)
    finally:
        for run in (first, second):
            run.kill()
    return text


def command(job: dict[str, Any], *more: str) -> list[str]:
    named = [word for name, path in job["paths"].items() for word in (f"--{name}", path)]
    given = [word for text in job["set"] for word in ("--set", text)]
    words = ["-m", "dmd2.cli", "train", "emoji-dmd2-4step", "--out", job["out"], "--device", "cpu"]
    return [*words, *named, *given, *more]


def finish(run: subprocess.Popen[str]) -> str:
    text, _ = run.communicate(timeout=LONG)
    assert run.returncode == 0, text
    return text


def log(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def results(out: Path) -> dict[str, torch.Tensor]:
    student = load_file(out / "model" / "unet_2step" / "diffusion_pytorch_model.safetensors")
    return student | {f"fake {k}": v for k, v in load_file(next((out / "fake_score").glob("*.safetensors"))).items()}


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """In full, with every optimizer state."""
    state = checkpoint(out)
    assert state["step"] == ITERATIONS
    return state["tensors"]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


def sets(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def inputs_of(weights: Path, emoji_zip: Path, nothing: Path) -> Paths:
    """Of a run without a classifier."""
    return {"data": str(emoji_zip), "init": str(weights), "classifier": str(nothing / "none")}
