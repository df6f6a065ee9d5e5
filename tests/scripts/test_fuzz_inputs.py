"""scripts/fuzz-inputs in small, and that it notices what it is for."""

from __future__ import annotations

import gc
import importlib.util
import random
import time
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from dmd2.runtime.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz-inputs"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    loader = SourceFileLoader("fuzz_inputs", str(SCRIPT))
    spec = importlib.util.spec_from_loader("fuzz_inputs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_damaged_inputs_end_in_a_result_or_one_clear_line(fuzz: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about damaged EXIF
        outcomes = {number: fuzz.outcome_of(random.Random(f"7 {number}"))[1] for number in range(150)}
    assert {number: what for number, what in outcomes.items() if what.isupper()} == {}
    assert set(outcomes.values()) == {"a result", "one clear line", "a refusal"}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KeyError("x"), "A TRACEBACK"),
        (RecursionError(), "A TRACEBACK"),
        (UserError("x" * 300), "NOT ONE CLEAR LINE"),
        (UserError("image: damaged"), "one clear line"),
    ],
)
def test_errors_that_may_not_be_are_noticed(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str
) -> None:
    def reader(dice: random.Random, folder: Path) -> object:
        raise error

    monkeypatch.setattr(fuzz, "KINDS", {"image": (1, reader)})
    monkeypatch.setattr(fuzz, "LONGEST", 200)
    assert fuzz.outcome_of(random.Random(0))[:2] == ("image", outcome)


def test_it_notices_what_takes_long_or_much(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "KINDS", {"image": (1, lambda dice, folder: time.sleep(0.01))})
    monkeypatch.setattr(fuzz, "SECONDS", 0.001)
    assert fuzz.one(0, 0, None)[1] == "TOO SLOW"
    monkeypatch.setattr(fuzz, "KINDS", {"image": (1, lambda dice, folder: bytearray(b"x") * 200_000_000)})
    monkeypatch.setattr(fuzz, "SECONDS", 600.0)
    monkeypatch.setattr(fuzz, "MEGABYTES", 20.0)
    gc.collect()  # what other tests have left must not go meanwhile
    assert fuzz.one(0, 0, None)[1] == "TOO LARGE"
