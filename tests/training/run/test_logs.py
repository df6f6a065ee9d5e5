"""What a run's log says of its speed and memory, and what it tells Weights & Biases."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmd2.runtime import precision
from dmd2.runtime.precision import peak_flops
from dmd2.training.loop import train
from dmd2.training.run import logs
from dmd2.training.run.logs import Watch
from tests.training.test_loop import TOY, log, toy

SHORT = replace(TOY, iterations=4, log_every=2, checkpoint_every=2, sample_every=2)


def test_the_log_holds_throughput_utilisation_and_peak_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))  # between two lines 8 seconds, of 2 steps
    monkeypatch.setattr(logs, "peak_memory", lambda device: 3_000_000_000)
    watch = Watch(flops=100.0, peak=50.0)
    assert watch.per_step(4.0) == {"flop_utilisation": 0.5, "peak_memory_gb": 3.0}
    assert train(toy(SHORT), SHORT, tmp_path / "run", watch=watch)
    lines = [line for line in log(tmp_path / "run") if "critic" in line]
    assert len(lines) == 2
    for line in lines:  # the step's images over its seconds, and the part of what was possible
        seconds = SHORT.batch_size / line["images_per_second"]
        assert line["flop_utilisation"] == pytest.approx(2 / seconds, rel=1e-4) and line["peak_memory_gb"] == 3


def test_without_a_count_there_is_no_utilisation(tmp_path: Path) -> None:
    assert train(toy(SHORT), SHORT, tmp_path / "run")
    for line in log(tmp_path / "run"):
        assert "flop_utilisation" not in line and ("critic" not in line or line["peak_memory_gb"] > 0.01)


def test_weights_and_biases_is_told_what_the_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, Any]] = []
    begun: list[dict[str, Any]] = []
    run = SimpleNamespace(
        log=lambda figures, step: told.append((step, figures)), finish=lambda: told.append(("end", {}))
    )

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda path: path))
    watch = Watch(wandb="students")
    out = tmp_path / "run"
    assert train(toy(SHORT), SHORT, out, watch=watch)
    longer = replace(SHORT, iterations=6)
    assert train(toy(longer), longer, out, resume=True, watch=watch)
    assert begun[0]["project"] == "students" and begun[0]["id"] == begun[1]["id"]
    assert [step for step, _ in told].count("end") == 2
    written = [(line.pop("step"), line) for line in log(out)]
    figures = [(step, found) for step, found in told if step != "end" and "samples" not in found]
    assert [(step, found.keys()) for step, found in figures] == [(step, line.keys()) for step, line in written]
    images = [found["samples"] for _, found in told if "samples" in found]
    assert images and all(Path(image).is_file() for image in images)


def test_a_devices_peak_is_its_data_sheets_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, found in ((torch.float32, 2e9), (torch.bfloat16, 3e9)):
        monkeypatch.setattr(precision, "measure_cpu", lambda: precision.Throughput(bf16=3.0, fp32=2.0))
        assert peak_flops(torch.device("cpu"), dtype)[0] == found
    for name, teraflops in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak, told = peak_flops(torch.device("cuda"), torch.bfloat16)
        assert peak == teraflops * 1e12 and name in told
