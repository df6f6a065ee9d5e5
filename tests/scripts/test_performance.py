"""docs/performance.md says what the operators of the code are; the plan of memory has room for what they take."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from dmd2.runtime.offload import POOL, WORK

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "performance"


@pytest.fixture(scope="module")
def performance() -> Any:
    loader = SourceFileLoader("performance", str(SCRIPT))
    spec = spec_from_loader("performance", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stages(performance: Any) -> dict[str, Any]:
    return {stage.name: stage for stage in performance.stages()}


def test_the_page_is_what_the_script_makes_of_the_code(performance: Any, stages: dict[str, Any]) -> None:
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page(list(stages.values()))


def test_operations_are_those_that_the_bench_measures_against(stages: dict[str, Any]) -> None:
    import bench_gpu

    for size in (512, 1024):
        for name, expected in (("UNet", bench_gpu.UNET), ("KL decoder", bench_gpu.VAE)):
            found = sum(stages[f"{name}, {size}²"].flops.values()) / 1e12
            assert found == pytest.approx(expected[size], rel=0.01)


def test_the_plan_of_memory_has_room_for_them(stages: dict[str, Any]) -> None:
    """At 1024²: four images go through the UNet at once, one through the decoder, whose scores are there twice."""
    scores = 2 * 2 * 16384**2
    largest = max(4 * stages["UNet, 1024²"].peak, stages["KL decoder, 1024²"].peak + scores)
    assert largest <= POOL and largest <= WORK["full"]
