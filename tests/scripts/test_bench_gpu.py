"""`scripts/bench gpu` with a tiny model on the CPU: its table, not its figures."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmd2.runtime.compiled import Compiler
from dmd2.runtime.placement import Placement

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
    variants = {"fp32": {"dtype": "float32"}, "none": {"vae": "no such"}, "bf16": {"dtype": "bfloat16"}}
    monkeypatch.setattr(module, "VARIANTS", variants)
    for name in ("DMD2_GO_FAST", "DMD2_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # given back as they were
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return module


def test_rows_are_of_every_variant_and_of_diffusers(bench: Any, weights: Path) -> None:
    result: dict[str, Any] = {"starts": [], "rows": [], "skipped": []}
    bench.compare(weights, result, lambda *_: True, 3, "cpu")
    found = [(row["system"], row["size"], row["batch"], row["steps"]) for row in result["rows"]]
    systems = ["dmd2, fp32", "diffusers", "dmd2, bf16"]
    shapes = [(system, 64, 1) for system in systems]
    shapes += [("dmd2, fp32", 32, 2), ("diffusers", 32, 2), ("diffusers, compiled", 64, 1)]
    assert found == [(*shape, steps) for shape in shapes for steps in (1, 4)]
    assert len(result["skipped"]) == 1 and "no such" in result["skipped"][0]  # one that these weights have not
    for row in result["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["times_floor"] > 0
    assert result["rows"][0]["stages_s"].keys() == {"text", "denoise", "decode"}
    assert {row["system"]: row.get("memory") for row in result["rows"]} == {
        "dmd2, fp32": "cpu",
        "dmd2, bf16": "cpu",
        "diffusers": None,
        "diffusers, compiled": None,
    }
    lines = bench.table(result | {"wheels": bench.wheels()}).splitlines()
    assert len(lines) == len(result["rows"]) + 2 and f"torch {torch.__version__}" in lines[-1]


def test_what_does_not_fit_is_left_out(bench: Any, weights: Path) -> None:
    result: dict[str, Any] = {"starts": [], "rows": [], "skipped": []}
    bench.compare(weights, result, lambda what, _: what == "diffusers", 1, "cpu")
    assert [(row["system"], row["steps"]) for row in result["rows"]] == [("diffusers", 1), ("diffusers", 4)]


def test_rows_say_what_was_not_compiled(bench: Any) -> None:
    compiler = Compiler(torch.device("cpu"), backend="eager")
    compiler.failures, compiler.unprepared = 1, 7
    engine = SimpleNamespace(model=SimpleNamespace(placement=Placement(compiler=compiler)))

    def call() -> None:
        compiler.unprepared += 1

    result: dict[str, Any] = {"rows": []}
    bench.row(result, "dmd2", 64, 1, 1, call, 3, engine)
    found = result["rows"][0]
    assert (found["memory"], found["compile_failures"], found["unprepared"]) == ("full", 1, 5)  # two do not count


def test_8_bits_are_those_of_their_variant_alone(bench: Any, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def engine(*_: Any, **__: Any) -> Any:
        seen.append(os.environ["DMD2_GO_FAST"])
        raise RuntimeError("none")

    monkeypatch.setattr("dmd2.inference.engine.Engine", engine)
    monkeypatch.setattr(bench, "load_pipeline", engine)
    monkeypatch.setattr(bench, "VARIANTS", {"fp16": {"dtype": "float16"}, "fp8": {"go_fast": True}})
    result: dict[str, Any] = {"starts": [], "rows": [], "skipped": []}
    for before in ("", "false"):
        monkeypatch.setenv("DMD2_GO_FAST", before)
        seen.clear()
        bench.compare(weights, result, lambda *_: True, 1, "cpu")
        assert seen == ["false", before, "true", before] and os.environ["DMD2_GO_FAST"] == before
    monkeypatch.delenv("DMD2_GO_FAST")
    with bench.variable("DMD2_GO_FAST", "true"):
        assert os.environ["DMD2_GO_FAST"] == "true"
    assert "DMD2_GO_FAST" not in os.environ


def test_what_fails_is_named_and_what_there_is_is_kept(
    bench: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("no pipeline")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "load_pipeline", fails)
        result: dict[str, Any] = {"starts": [], "rows": [], "skipped": []}
        bench.compare(weights, result, lambda *_: True, 1, "cpu")
        assert {row["system"] for row in result["rows"]} == {"dmd2, fp32", "dmd2, bf16"}
        assert "diffusers: OSError: no pipeline" in result["skipped"]

    def child(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(returncode=len(children) == 1, stdout=children.pop())

    children = [b"", b"not JSON", b'{"system": "dmd2"}', b"{"]
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=child, PIPE=None))  # others run some, too
    monkeypatch.setattr("full_size.write_full_size", lambda *_, **__: None)
    monkeypatch.setattr(bench, "BEGAN", time.perf_counter())
    result = bench.gpu("cpu", 10.0, 64, 1, tmp_path / "found.json")
    assert result["starts"] == [{"system": "dmd2"}]
    assert [what.split(": ")[:2] for what in result["skipped"]] == [
        ["start dmd2, converting", "JSONDecodeError"],
        ["start dmd2 tiny", "JSONDecodeError"],
        ["start diffusers", "RuntimeError"],
    ]
    monkeypatch.setattr("full_size.write_full_size", fails)
    result = bench.gpu("cpu", 10.0, 64, 1, tmp_path / "found.json")
    assert result["skipped"] == ["the rest: OSError: no pipeline"]
    assert json.loads((tmp_path / "found.json").read_text()) == result


@pytest.mark.parametrize("how", ["deadline", "SIGTERM"])
def test_what_there_is_when_time_is_up_is_kept(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def slow(weights: Path, result: dict[str, Any], fits: Any, rounds: int) -> None:
        result["rows"].append({"system": "dmd2", "p50_ms": 1.0})
        assert fits("more", 0)
        assert json.loads((tmp_path / "found.json").read_text())["rows"]
        if how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("what catches errors goes on")

    monkeypatch.setattr(bench, "compare", slow)
    monkeypatch.setattr(bench, "BEGAN", time.perf_counter())
    monkeypatch.setattr("full_size.write_full_size", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    minutes = 0.01 if how == "deadline" else 1.0
    result = bench.gpu("auto", minutes, 64, 1, tmp_path / "found.json")
    assert result["rows"] and any("time was up" in what for what in result["skipped"])
    assert json.loads((tmp_path / "found.json").read_text()) == result
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM))


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
