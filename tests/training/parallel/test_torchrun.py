"""Runs of two processes on a tiny SDXL: what comes out depends neither on their number nor on kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dmd2.diffusion.draws import Ranks
from dmd2.runtime.errors import UserError
from dmd2.training.parallel.group import Parallel
from dmd2.training.recipes import build_method, resolve
from dmd2.training.run.checkpoints import Checkpoints
from tests.training.parallel.worker import CPU, run
from tests.training.test_loop import checkpoint

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {
    "iterations": 20,
    "batch_size": 4,
    "generator_every": 2,
    "timesteps": "[999,499]",
    "optimizer": "adamw",
    "lr": 2e-6,
    "lr_critic": 2e-6,
    "warmup": 0,
    "checkpoint_every": 5,
    "sample_every": 1000,
    "log_every": 1,
    "precision": "fp32",
    "compile": "false",
}
pytestmark = pytest.mark.slow
LONG = 600  # seconds; far more than anything here takes
Paths = dict[str, str]


@pytest.fixture(scope="module")
def paths(weights: Path, emoji_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    nothing = tmp_path_factory.mktemp("nothing") / "none"
    return {"data": str(emoji_zip), "init": str(weights), "classifier": str(nothing)}


def job(paths: Paths, out: Path, **more: Any) -> dict[str, Any]:
    return {"out": str(out), "paths": paths, "set": [f"{k}={v}" for k, v in SETTINGS.items()], **more}


def torchrun(*words: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*launcher, *words], env=environment, text=True, **both)  # type: ignore[call-overload]


def command(job: dict[str, Any], *more: str) -> list[str]:
    named = [word for name, path in job["paths"].items() for word in (f"--{name}", path)]
    sets = [word for text in job["set"] for word in ("--set", text)]
    words = ["-m", "dmd2.cli", "train", "emoji-dmd2-4step", "--out", job["out"], "--device", "cpu"]
    return [*words, *named, *sets, *more]


def finish(run: subprocess.Popen[str]) -> str:
    text, _ = run.communicate(timeout=LONG)
    assert run.returncode == 0, text
    return text


def log(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def results(out: Path) -> dict[str, torch.Tensor]:
    student = load_file(out / "model" / "unet_2step" / "diffusion_pytorch_model.safetensors")
    return student | {f"fake {k}": v for k, v in load_file(next((out / "fake_score").glob("*.safetensors"))).items()}


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """In full, with every optimizer state."""
    state = checkpoint(out)
    assert state["step"] == SETTINGS["iterations"]
    return state["tensors"]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


@pytest.fixture(scope="module")
def runs(paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    jobs = [
        job(paths, folder / "ddp", strategy="ddp"),
        job(paths, folder / "fsdp2", strategy="fsdp2"),
        job(paths, folder / "resumed", strategy="fsdp2", resume=True, **{"from": str(folder / "fsdp2")}),
    ]
    text = finish(torchrun("-m", "tests.training.parallel.worker", json.dumps(jobs)))
    assert text.count("step 0: ") == 2, text  # one process speaks
    run(job(paths, folder / "one"))
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(strategy: str, runs: Path, paths: Paths) -> None:
    one, two = log(runs / "one"), log(runs / strategy)
    assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, 21))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[k] - b[k]) <= 1e-5 * max(1, abs(a[k])) for k in a if "norm" not in k), (a, b)
    before, after = weights_of(runs / "one"), weights_of(runs / strategy)
    assert largest_difference(before, after) <= 1e-5
    assert largest_difference(results(runs / "one"), results(runs / strategy)) <= 1e-3  # fp16
    # It is no comparison of what stood still: apart are the runs by a small part of what they have moved.
    start = load_file(Path(paths["init"]) / "unet_teacher" / "diffusion_pytorch_model.safetensors")
    trained = [k for k in start if start[k].is_floating_point()]
    moved = torch.stack([(before[f"generator/module/{k}"] - start[k]).norm() for k in trained]).norm()
    apart = torch.stack(
        [(before[f"generator/module/{k}"] - after[f"generator/module/{k}"]).norm() for k in trained]
    ).norm()
    assert apart < 0.05 * moved


def test_shards_go_on_where_they_were(runs: Path) -> None:
    assert log(runs / "resumed") == log(runs / "fsdp2")
    assert largest_difference(weights_of(runs / "resumed"), weights_of(runs / "fsdp2")) == 0


def test_a_killed_process_ends_the_run_which_goes_on_with_any_number(
    runs: Path, paths: Paths, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    started = torchrun(*command(job(paths, killed)))
    deadline = time.monotonic() + LONG
    while not Checkpoints(killed).exist() or len(log(killed)) < 6:
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()[0]
        time.sleep(0.02)
    children = psutil.Process(started.pid).children(recursive=True)
    ranks = {p.environ()["RANK"]: p for p in children if "RANK" in p.environ()}
    ranks["1"].send_signal(signal.SIGKILL)
    text, _ = started.communicate(timeout=LONG)
    assert started.returncode != 0, text
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks.values())
    alone = shutil.copytree(killed, tmp_path / "alone")
    text = finish(torchrun(*command(job(paths, killed), "--resume", "--parallel", "ddp")))
    assert text.count("done: ") == 1
    recipe = json.loads((alone / "recipe.json").read_text())
    assert recipe["loop"]["iterations"] == 20
    finish(
        subprocess.Popen(
            [sys.executable, *command(job(paths, alone), "--resume")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    assert log(killed) == log(runs / "ddp")
    assert largest_difference(weights_of(killed), weights_of(runs / "ddp")) == 0
    assert [line["step"] for line in log(alone)] == list(range(1, 21))
    assert largest_difference(weights_of(alone), weights_of(runs / "ddp")) <= 1e-5


def test_what_goes_wrong_is_told_once(paths: Paths, tmp_path: Path) -> None:
    run = torchrun(*command(job(paths, tmp_path / "no"), "--set", "batch_size=3"))
    text, _ = run.communicate(timeout=LONG)
    assert run.returncode != 0
    assert text.count("--set batch_size=3: expected a multiple of the 2 processes") == 1, text


def test_what_cannot_be_shared_is_refused(paths: Paths) -> None:
    two = Parallel(Ranks(0, 2))
    for name, expected in (("emoji-vae", "whole batch"), ("emoji-classifier", "whole batch")):
        with pytest.raises(UserError, match=expected):
            build_method(resolve(name, []), {}, CPU, two)
    two.collective = True
    recipe = resolve("emoji-dmd2-4step", ["optimizer=muon"])
    with pytest.raises(UserError, match="expected adamw, or `parallel` ddp"):
        build_method(recipe, {name: Path(path) for name, path in paths.items()}, CPU, two)


def test_parallel_needs_torchrun(tmp_path: Path) -> None:
    words = ["-m", "dmd2.cli", "train", "emoji-dmd2-4step", "--parallel", "ddp", "--out", str(tmp_path)]
    alone = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LONG)
    assert alone.returncode == 2 and "--parallel ddp: expected a start by torchrun" in alone.stderr
