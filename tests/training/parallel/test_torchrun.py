"""Runs of two processes on a tiny SDXL: what comes out depends neither on their number nor on kills."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dmd2.diffusion.draws import Ranks
from dmd2.runtime.errors import UserError
from dmd2.training.parallel.group import Parallel
from dmd2.training.recipes import build_method, resolve
from dmd2.training.run.checkpoints import Checkpoints
from tests.training.parallel.runs import (
    ITERATIONS,
    LONG,
    Paths,
    command,
    finish,
    inputs_of,
    job,
    largest_difference,
    log,
    on_two_machines,
    results,
    torchrun,
    weights_of,
)
from tests.training.parallel.worker import CPU, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paths(weights: Path, emoji_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return inputs_of(weights, emoji_zip, tmp_path_factory.mktemp("nothing"))


CHANGES = [("one", "ddp"), ("one", "fsdp2"), ("ddp", "fsdp2"), ("fsdp2", "ddp")]
"""from one process to two, and between the two ways; from two to one elsewhere in this file"""


@pytest.fixture(scope="module")
def runs(paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run(job(paths, folder / "one"))
    begun = {"resumed": "fsdp2", **{f"{one}-to-{other}": one for one, other in CHANGES}}
    goes_on = {"resumed": "fsdp2", **{f"{one}-to-{other}": other for one, other in CHANGES}}
    jobs = [job(paths, folder / name, strategy=name) for name in ("ddp", "fsdp2")]
    for name, one in begun.items():
        jobs.append(job(paths, folder / name, strategy=goes_on[name], resume=True, **{"from": str(folder / one)}))
    text = on_two_machines("-m", "tests.training.parallel.worker", json.dumps(jobs))
    assert text.count("step 0: ") == 2, text  # one process speaks
    return folder


@pytest.mark.parametrize(("one", "other"), CHANGES)
def test_a_run_goes_on_by_other_processes(one: str, other: str, runs: Path) -> None:
    first, second = log(runs / one), log(runs / f"{one}-to-{other}")
    assert [line["step"] for line in second] == list(range(1, ITERATIONS + 1))
    for a, b in zip(first, second, strict=True):
        assert all(abs(a[k] - b[k]) <= 1e-5 * max(1, abs(a[k])) for k in a if "norm" not in k), (a, b)
    assert largest_difference(weights_of(runs / one), weights_of(runs / f"{one}-to-{other}")) <= 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(strategy: str, runs: Path, paths: Paths) -> None:
    one, two = log(runs / "one"), log(runs / strategy)
    assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, ITERATIONS + 1))
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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_run_which_goes_on_with_any_number(
    strategy: str, runs: Path, paths: Paths, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    started = torchrun(*command(job(paths, killed), "--parallel", strategy))
    deadline = time.monotonic() + LONG
    while not Checkpoints(killed).exist() or len(log(killed)) < 4:
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()[0]
        time.sleep(0.02)
    children = psutil.Process(started.pid).children(recursive=True)
    ranks = {p.environ()["RANK"]: p for p in children if "RANK" in p.environ()}
    ranks["1"].send_signal(signal.SIGKILL)
    text, _ = started.communicate(timeout=LONG)
    assert started.returncode != 0, text
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks.values())
    alone = shutil.copytree(killed, tmp_path / "alone")
    kept = int(Checkpoints(killed).all()[0].name)
    text = finish(torchrun(*command(job(paths, killed), "--resume", "--parallel", strategy)))
    assert text.count("done: ") == 1
    recipe = json.loads((alone / "recipe.json").read_text())
    assert recipe["loop"]["iterations"] == ITERATIONS
    finish(
        subprocess.Popen(
            [sys.executable, *command(job(paths, alone), "--resume")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    whole = runs / strategy
    assert log(killed) == log(whole)
    assert largest_difference(weights_of(killed), weights_of(whole)) == 0
    assert [line["step"] for line in log(alone)] == list(range(1, ITERATIONS + 1))
    assert log(alone)[:kept] == log(whole)[:kept]
    assert largest_difference(weights_of(alone), weights_of(whole)) <= 1e-5
    assert not [path for out in (killed, alone) for path in out.rglob(".*") if path.name != ".lock"]


def test_what_goes_wrong_is_told_once(paths: Paths, tmp_path: Path) -> None:
    run = torchrun(*command(job(paths, tmp_path / "no"), "--set", "batch_size=3"))
    text, _ = run.communicate(timeout=LONG)
    assert run.returncode != 0
    assert text.count("--set batch_size=3: expected a multiple of the 2 processes") == 1, text


def test_a_second_run_is_refused_before_any_network_is_loaded(paths: Paths, tmp_path: Path) -> None:
    """Its teacher could not even be read."""
    out, teacher = tmp_path / "run", Path(shutil.copytree(paths["init"], tmp_path / "teacher"))
    (teacher / "unet_teacher" / "diffusion_pytorch_model.safetensors").unlink()
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = torchrun(*command(job(paths | {"init": str(teacher)}, out)))
        text, _ = second.communicate(timeout=LONG)
    assert second.returncode != 0 and text.count("is at work there; wait for it") == 1, text
    assert [path.name for path in out.iterdir()] == [".lock"] and "Traceback" not in text.split("torch/dist")[0]


def test_what_cannot_be_shared_is_refused(paths: Paths) -> None:
    two = Parallel(Ranks(0, 2))
    for name, expected in (("emoji-vae", "whole batch"), ("emoji-classifier", "whole batch")):
        with pytest.raises(UserError, match=expected):
            build_method(resolve(name, []), {}, CPU, two)
    two.collective = True
    recipe = resolve("emoji-dmd2-4step", ["optimizer=adamw8bit"])
    with pytest.raises(UserError, match="expected adamw or muon, or `parallel` ddp"):
        build_method(recipe, {name: Path(path) for name, path in paths.items()}, CPU, two)


def test_parallel_needs_torchrun(tmp_path: Path) -> None:
    words = ["-m", "dmd2.cli", "train", "emoji-dmd2-4step", "--parallel", "ddp", "--out", str(tmp_path)]
    alone = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LONG)
    assert alone.returncode == 2 and "--parallel ddp: expected a start by torchrun" in alone.stderr
