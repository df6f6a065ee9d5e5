"""Precision "auto": measured, the same for a run that goes on elsewhere, and obeyed by everything that computes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dmd2.runtime import precision
from dmd2.runtime.precision import Throughput, measure_cpu, recorded_precision, resolve_precision, training_dtype
from dmd2.training.methods.muon import Muon
from dmd2.training.recipes import RECIPES
from dmd2.training.recipes.edm import EDM_RECIPES

CPU = torch.device("cpu")
EMULATED = Throughput(bf16=0.7, fp32=31.0)  # an EPYC without AVX-512
NATIVE = Throughput(bf16=400.0, fp32=180.0)


def test_what_is_measured_is_a_throughput() -> None:
    speeds = measure_cpu()
    assert speeds.bf16 > 0 and speeds.fp32 > 0 and speeds is measure_cpu()  # once a process
    assert speeds.fastest == ("bf16" if speeds.bf16 > speeds.fp32 else "fp32")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_a_gpus_peak_is_that_of_its_whole_name(name: str, peak: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    found, told = precision.peak_flops(torch.device("cuda"), torch.bfloat16)
    assert found == 1e12 * peak and name in told


def test_a_busy_machine_does_not_decide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: bf16 takes half of fp32's time, but four of its rounds meet other work."""
    now, calls = 0.0, {torch.bfloat16: 0, torch.float32: 0}

    def work(dtype: torch.dtype) -> Callable[[], object]:
        def run() -> None:
            nonlocal now
            calls[dtype] += 1
            disturbed = dtype == torch.bfloat16 and calls[dtype] <= 5  # the first is not measured
            now += (1 if dtype == torch.bfloat16 else 2) + 4 * disturbed

        return run

    monkeypatch.setattr(precision, "_work", work)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now)
    measured = measure_cpu.__wrapped__()
    assert measured.fastest == "bf16" and measured.bf16 == pytest.approx(2 * measured.fp32)
    assert calls[torch.bfloat16] == precision.MOST_ROUNDS + 1

    monkeypatch.setattr(precision, "MOST_ROUNDS", precision.ROUNDS)
    calls.update({torch.bfloat16: 0})
    assert measure_cpu.__wrapped__().fastest == "fp32"  # what three rounds alone would have said


def test_a_cpu_without_avx512_computes_in_fp32() -> None:
    """Emulated: oneDNN and ATen then have no bf16 kernels, whatever this CPU can do."""
    code = "import torch, dmd2.runtime.precision as p; print(p.fastest(torch.device('cpu')))"
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | limits, capture_output=True, text=True)
    assert done.stdout == "fp32\n", done.stderr


def test_every_recipe_leaves_it_to_the_machine_or_says_fp32() -> None:
    assert {recipe.precision for recipe in (RECIPES | EDM_RECIPES).values()} <= {"auto", "fp32"}


@pytest.mark.parametrize(("speeds", "dtype"), [(EMULATED, torch.float32), (NATIVE, torch.bfloat16)])
def test_auto_is_what_is_faster_and_is_said(
    speeds: Throughput, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "measure_cpu", lambda: speeds)
    assert training_dtype("auto", CPU) == dtype
    assert (training_dtype("bf16", CPU), training_dtype("fp32", CPU)) == (torch.bfloat16, torch.float32)
    with caplog.at_level(logging.INFO, logger="dmd2"):
        name = resolve_precision("auto", CPU)
    assert precision.DTYPES[name] == dtype
    assert caplog.messages == [f"precision: {name} ({speeds})"] and "GFLOP/s" in caplog.text


def test_a_run_that_goes_on_elsewhere_keeps_its_precision_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(precision, "measure_cpu", lambda: EMULATED)
    (tmp_path / "recipe.json").write_text(json.dumps({"precision": "bf16"}))
    assert resolve_precision("auto", CPU, recorded_precision(tmp_path)) == "bf16"
    assert "bf16, as the run began; on this machine fp32 is faster" in caplog.text
    assert resolve_precision("fp32", CPU, "bf16") == "fp32"  # what is asked for is another recipe
    for text in ("", "[]", "{}", '{"precision": "fp8"}'):
        (tmp_path / "recipe.json").write_text(text)
        assert recorded_precision(tmp_path) is None
    assert recorded_precision(tmp_path / "nowhere") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_orthogonalises_in_the_precision_it_is_told(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
        seen.append(matrices.dtype)
        return matrices

    monkeypatch.setattr("dmd2.training.methods.muon.orthogonalised", orthogonalised)
    layer = nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    Muon(layer, 0.1, dtype=dtype).step()
    assert seen == [dtype] and layer.weight.dtype == torch.float32
