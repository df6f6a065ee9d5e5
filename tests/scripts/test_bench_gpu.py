"""`scripts/bench gpu` with a tiny model on the CPU: its table, not its figures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_gpu.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPES", ((64, 1), (32, 2)))
    monkeypatch.setattr(module, "UNET", {64: 0.001, 32: 0.0003})
    monkeypatch.setattr(module, "VAE", {64: 0.001, 32: 0.0003})
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return module


def test_rows_compare_with_diffusers_and_with_bf16(bench: Any, weights: Path) -> None:
    result: dict[str, Any] = {"starts": [], "rows": [], "skipped": []}
    bench.compare(weights, result, lambda *_: True, 3, "cpu")
    found = [
        (row["size"], row["batch"], row["steps"], sorted(k for k in row if k.endswith("p50")))
        for row in result["rows"]
    ]
    eager, bf16, compiled = (
        ["diffusers_p50", "dmd2_p50"],
        ["dmd2_bf16_p50", "dmd2_p50"],
        ["diffusers_compiled_p50", "dmd2_p50"],
    )
    assert found == [
        (64, 1, 1, eager),
        (64, 1, 4, eager),
        (32, 2, 1, eager),
        (32, 2, 4, eager),
        (64, 1, 1, bf16),
        (64, 1, 4, bf16),
        (64, 1, 1, compiled),
        (64, 1, 4, compiled),
    ]
    for row in result["rows"]:
        assert 0 < row["dmd2_p50"] <= row["dmd2_p95"]
        other = next(k for k in row if k.endswith("p50") and k != "dmd2_p50")
        assert row["ratio"] == pytest.approx(row[other] / row["dmd2_p50"], abs=0.01)
    assert result["rows"][0]["stages_s"].keys() == {"text", "denoise", "decode"}
    assert bench.table(result | {"skipped": ["x: 9 s, more than was left"]}).count("\n") == len(result["rows"])


def test_what_does_not_fit_is_left_out(bench: Any, weights: Path) -> None:
    result: dict[str, Any] = {"starts": [], "rows": [], "skipped": []}
    bench.compare(weights, result, lambda what, _: what.startswith("64"), 1, "cpu")
    assert [(row["size"], row["steps"]) for row in result["rows"]] == [(64, 1), (64, 4)]


def test_floor_is_arithmetic_over_rate(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    # shared facts: 48 ms for four steps at 1024², 22 ms for one
    assert bench.floor_ms(1024, 4, 1) == pytest.approx(48, abs=1)
    assert bench.floor_ms(1024, 1, 1) == pytest.approx(22, abs=1)


@pytest.mark.parametrize("system", ["dmd2", "diffusers"])
def test_a_start_is_split_into_its_stages(bench: Any, weights: Path, system: str) -> None:
    found = bench.start(weights, system, "cpu", 64, 1, 1)
    assert {"imports", "load", "image 1", "image 2"} <= found.keys()
    assert all(found[name]["s"] >= 0 for name in ("imports", "load", "image 1"))
    assert found["peak_gb"] > 0
