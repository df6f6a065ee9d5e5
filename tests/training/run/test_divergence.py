"""NaNs and infinities in training: what is skipped, what is said, and when a run ends with an error."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dmd2.runtime.errors import UserError
from dmd2.runtime.tensors import os_errors, save_tensors
from dmd2.training.loop import Batch, Logs, LoopSettings, Method, Phase, train, training_step
from dmd2.training.run.checkpoints import Checkpoints
from dmd2.training.run.divergence import IN_A_ROW, WINDOW, Guard, TrainingDiverged
from tests.training.run.test_runs import SHORT, one_line
from tests.training.test_loop import TOY, checkpoint, differences, toy


def poisoned(settings: LoopSettings, bad: Callable[[int], bool], value: float = math.nan) -> Method:
    method = toy(settings)
    return replace(method, data=lambda part: method.data(part) * (value if bad(part) else 1))


def strict(line: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_is_skipped_counted_and_said(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(TOY, iterations=9, log_every=3)
    assert train(poisoned(settings, lambda step: step == 3, value), settings, tmp_path / "run")
    text = capsys.readouterr().out
    assert "step 4: generator: loss or gradient is not finite, update skipped (1 so far)" in text
    assert "critic: loss" not in text
    lines = [strict(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "generator" in line]
    assert [line["generator/skipped"] for line in lines] == [0, 1, 0]
    assert lines[1]["generator"] is None and lines[1]["critic"] > 0


def norms() -> tuple[nn.Module, nn.Module, list[Phase]]:
    first, second = (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)) for _ in range(2))

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        out = second(first(batch.data))
        return (out if batch.step < 2 else torch.ones(1, requires_grad=True) + 0 * first[1].weight).sum(), {}

    return first, second, [Phase("only", 1, first, torch.optim.Adam(first.parameters(), 0.1), loss)]


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("zero_nans", [False, True])
def test_batch_normalisation_forgets_a_bad_batch(step: int, value: float, zero_nans: bool) -> None:
    """Its averages are what they were, of every network that the loss ran through, even if the loss is finite."""
    first, second, phases = norms()
    settings = replace(TOY, zero_nans=zero_nans)
    good = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    training_step(phases, Batch(0, good, torch.Generator()), settings, networks=[second])
    before = [{k: v.clone() for k, v in network.state_dict().items()} for network in (first, second)]
    bad = torch.cat([torch.full((1, 3), value), good])
    figures = training_step(phases, Batch(step, bad, torch.Generator()), settings, [], [second])
    assert figures["only/skipped"] == 1
    assert differences(before, [first.state_dict(), second.state_dict()]) == []
    assert training_step(phases, Batch(0, good, torch.Generator()), settings, networks=[second])["only/skipped"] == 0
    assert differences(before, [first.state_dict(), second.state_dict()]) != []


def test_zeroed_gradients_of_a_loss_that_is_not_finite_count_as_skipped() -> None:
    module = nn.Linear(2, 1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    phase = Phase(
        "only",
        1,
        module,
        torch.optim.Adam(module.parameters()),
        lambda batch: (module(torch.full((1, 2), math.nan)).sum(), {}),
    )
    for _ in range(2):
        figures = training_step([phase], Batch(0, None, torch.Generator()), replace(TOY, zero_nans=True))
        assert figures["only/skipped"] == 1 and math.isfinite(figures["only/gradient_norm"])
    assert differences(before, module.state_dict()) == []


def test_any_of_the_parts_of_a_step_may_be_the_bad_one() -> None:
    for where in range(3):
        module = nn.Linear(2, 1)
        phase = Phase(
            "only", 1, module, torch.optim.Adam(module.parameters()), lambda b, m=module: (m(b.data).sum(), {})
        )
        data = [torch.full((1, 2), math.nan if i == where else 1.0) for i in range(3)]
        first, *rest = (Batch(0, part, torch.Generator()) for part in data)
        assert training_step([phase], first, TOY, rest)["only/skipped"] == 1


@pytest.mark.parametrize("iterations", [20, 400])
def test_a_run_that_no_longer_learns_ends_with_an_error_and_keeps_its_checkpoint(
    iterations: int, tmp_path: Path
) -> None:
    settings = replace(TOY, iterations=iterations)
    with pytest.raises(TrainingDiverged, match="updates were skipped") as error:
        train(poisoned(settings, lambda step: step >= 3), settings, tmp_path / "run")
    one_line(error)
    stopped = int(str(error.value).split(":")[0].removeprefix("step "))
    assert checkpoint(tmp_path / "run")["step"] == stopped < 200 and not (tmp_path / "run" / "exported.pt").exists()
    if iterations == 400:  # going on helps where the trouble is over
        mended = Path(shutil.copytree(tmp_path / "run", tmp_path / "mended"))
        assert train(poisoned(settings, lambda step: False), settings, mended, resume=True)
    with pytest.raises(TrainingDiverged):  # and not where it is not
        train(poisoned(settings, lambda step: step >= 3), settings, tmp_path / "run", resume=True)


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path) -> None:
    method = toy(SHORT)
    phases = [method.phases[0], replace(method.phases[1], optimizer=torch.optim.SGD(
        method.phases[1].module.parameters(), lr=math.inf
    ))]  # fmt: skip
    with pytest.raises(TrainingDiverged, match=r"step 2: weights are no longer finite \(critic: ") as error:
        train(replace(method, phases=phases), SHORT, tmp_path / "run")
    one_line(error)
    assert not Checkpoints(tmp_path / "run").exist()


@given(st.lists(st.booleans(), max_size=260), st.integers(0, 260))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_guard_is_what_it_says_wherever_the_run_was_resumed(updates: list[bool], cut: int) -> None:
    guard, failed = Guard(), None
    for step, skipped in enumerate(updates):
        if step == cut:
            guard = Guard.of(json.loads(json.dumps(guard.state())))
        guard.note(step + 1, {"a": float(skipped), "b": None})
        try:
            guard.check(step + 1)
        except TrainingDiverged:
            failed = step
            break
    assert "b" not in guard.recent and len(guard.recent.get("a", [])) <= WINDOW

    def diverged(upto: int) -> bool:
        row = upto >= IN_A_ROW and all(updates[upto - IN_A_ROW : upto])
        return row or (upto >= WINDOW and 2 * sum(updates[upto - WINDOW : upto]) > WINDOW)

    assert failed == next((step for step in range(len(updates)) if diverged(step + 1)), None)


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, torch.float32), (-math.inf, torch.bfloat16)])
def test_weights_that_are_not_finite_are_not_written(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"model\.safetensors: not written, for b has values") as error:
        save_tensors({"a": torch.ones(2), "b": torch.tensor([1, value], dtype=dtype)}, path)
    one_line(error)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="not finite in float16"):
        save_tensors({"too-large": torch.tensor([1e5]).half()}, path)
    save_tensors({"a": torch.ones(2), "n": torch.tensor([3])}, path)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_the_same_error_whoever_meets_it(tmp_path: Path) -> None:
    code = """
import resource, sys, torch
from pathlib import Path
from dmd2.runtime.tensors import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_tensors({"a": torch.zeros(1000)}, Path(sys.argv[1]))
except OSError as error:
    print(error.errno, error.strerror)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model.safetensors")]
    done = subprocess.run(
        command, check=False, cwd=Path(__file__).parents[3], timeout=600, capture_output=True, text=True
    )
    assert done.stdout == f"{errno.EFBIG} {os.strerror(errno.EFBIG)}\n", done.stderr
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No space left") as error, os_errors(tmp_path):
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)
    with pytest.raises(KeyError), os_errors(tmp_path):
        raise KeyError("something else")
