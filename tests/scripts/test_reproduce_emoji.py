"""scripts/reproduce-emoji: every stage once, in order, on from where it was stopped; a card of what was measured."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2.emoji.card import MODES, model_card
from dmd2.emoji.scenes import EmojiScenes
from dmd2.runtime.errors import UserError
from dmd2.training.recipes import RECIPES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch) -> Any:
    loader = SourceFileLoader("reproduce_emoji", str(ROOT / "scripts" / "reproduce-emoji"))
    spec = spec_from_loader("reproduce_emoji", loader)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "reproduce_emoji", module)
    spec.loader.exec_module(module)
    return module


def test_every_stage_takes_what_an_earlier_one_makes(reproduce: Any, tmp_path: Path) -> None:
    made: set[Path] = set()
    for stage in reproduce.stages(tmp_path, "cpu", 8, False):
        words = [Path(word) for word in stage.command if word.startswith(str(tmp_path))]
        for path in words:
            own = path in (stage.run, stage.made, tmp_path / "weights", tmp_path / "second-opinion.safetensors")
            assert own or any(one == path or path in one.parents for one in made), (stage.name, path)
        if stage.run is not None:
            assert stage.command[4] in RECIPES
            assert [word for word in stage.command if "=" in word] == ["precision=auto"], "the committed recipe"
        made.add(stage.made)
    assert len(made) == 8 + len(MODES)


def test_it_goes_on_at_the_stage_that_was_stopped(
    reproduce: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = reproduce.stages(tmp_path, "cpu", 8, False)
    ran: list[str] = []
    stopped = ["teacher"]

    def run(stage: Any) -> None:
        ran.append(stage.name)
        if stage.name in stopped:
            raise KeyboardInterrupt
        stage.made.parent.mkdir(parents=True, exist_ok=True)
        stage.made.write_text("made")

    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(stages, tmp_path, run)
    assert ran == ["data", "vae", "classifier", "second-opinion", "teacher"]
    spent = json.loads((tmp_path / "seconds.json").read_text())
    assert set(spent) == {"data", "vae", "classifier", "second-opinion", "teacher, begun"}
    ran.clear()
    stopped.clear()
    times = reproduce.reproduce(stages, tmp_path, run)
    assert ran == [stage.name for stage in stages[4:]] and set(times) == {stage.name for stage in stages}
    assert times["teacher"] >= spent["teacher, begun"], "what it took before counts"
    assert "[5/15] teacher: " in capsys.readouterr().out
    commits = json.loads((tmp_path / "commits.json").read_text())
    assert set(commits) == {stage.name for stage in stages} and all(len(found) == 1 for found in commits.values())


def test_a_stage_that_went_on_with_other_code_says_so(
    reproduce: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = reproduce.stages(tmp_path, "cpu", 8, False)[:1]

    def stopped(_: Any) -> None:
        raise KeyboardInterrupt

    for code, run in (("one", stopped), ("one", stopped), ("two", lambda stage: stage.made.write_text("made"))):
        monkeypatch.setattr(reproduce, "commit", lambda code=code: code)
        with suppress(KeyboardInterrupt):
            reproduce.reproduce([stage], tmp_path, run)
    assert json.loads((tmp_path / "commits.json").read_text()) == {stage.name: ["one", "two"]}


def test_precision_and_threads_are_chosen_once(
    reproduce: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmd2.runtime.precision.resolve_precision", lambda *_: "bf16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    chosen = reproduce.Machine.of(tmp_path, "cpu")
    monkeypatch.setattr("dmd2.runtime.precision.resolve_precision", lambda *_: "fp32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert reproduce.Machine.of(tmp_path, "cpu") == chosen == reproduce.Machine("bf16", 3)
    seen: list[tuple[list[str], str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        seen.append((command, env["OMP_NUM_THREADS"]))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    vae = reproduce.stages(tmp_path, "cpu", 8, True, chosen.precision)[1]
    reproduce.do(vae, chosen.threads)
    ((command, threads),) = seen
    assert "precision=bf16" in command and "iterations=2" in command and threads == "3"


def test_progress_is_told_while_a_stage_runs(reproduce: Any, capsys: pytest.CaptureFixture[str]) -> None:
    told, third = list[str](), threading.Event()

    def view() -> str:
        told.append(f"view {len(told)}")
        if len(told) == 3:
            third.set()
        return told[-1]

    with reproduce.again_and_again(view, 0.01):
        assert third.wait(60)
    count = len(told)
    assert capsys.readouterr().out.splitlines()[:3] == ["view 0", "view 1", "view 2"]
    assert len(told) == count, "not after it"


def test_a_training_that_was_stopped_is_resumed_and_a_failure_is_named(
    reproduce: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return type("Done", (), {"returncode": 3 * (len(commands) > 3)})

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    teacher = next(stage for stage in reproduce.stages(tmp_path, "cpu", 8, False) if stage.name == "teacher")
    reproduce.do(teacher)
    assert "--resume" not in commands[-1]
    teacher.run.mkdir()
    (teacher.run / "recipe.json").write_text("{}")
    reproduce.do(teacher)
    assert "--resume" not in commands[-1], "it was stopped before its first checkpoint"
    (teacher.run / "checkpoint.pt").write_text("")
    reproduce.do(teacher)
    assert commands[-1][3:7] == ["train", "--resume", "--out", str(teacher.run)]
    with pytest.raises(UserError, match="teacher: ended with status 3"):
        reproduce.do(teacher)
    score = reproduce.stages(tmp_path, "cpu", 8, False)[-1]
    with pytest.raises(UserError, match="scores of vae"):
        reproduce.do(score)
    assert not score.made.exists(), "half an answer is none"


def test_what_is_left_goes_by_the_pace_so_far(reproduce: Any, tmp_path: Path) -> None:
    stages = reproduce.stages(tmp_path, "cpu", 8, False)
    hours = sum(stage.hours for stage in stages)
    assert reproduce.left(stages, {}) == pytest.approx(3600 * hours)
    vae = stages[1].hours
    times = {"data": 0.0, "vae": 2 * 3600 * vae}
    rest = hours - vae - stages[0].hours
    assert reproduce.left(stages, times) == pytest.approx(2 * 3600 * rest)


def test_the_card_says_what_was_measured(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    shutil.copyfile(ROOT / "weights" / "emoji" / "emoji.zip", tmp_path / "weights" / "emoji.zip")
    shares = {"all": 0.5, "seen": 0.875, "held_out": 0.125}
    score = {
        "n": 123,
        "top1": shares,
        "right": shares,
        "likeness": 0.75,
        "background": shares,
        "fd": 2.25,
        "diversity": 0.99,
    }
    scores = {mode: dict(score, second_fd=4.5) if mode == "4" else score for mode in MODES}
    text = model_card(tmp_path, scores, {"vae": 600.0, "data": 0.0}, "a machine, today")
    assert "| **student, 4 steps** | 0.875 / 0.125 | 0.750 | 0.500 | 0.500 | 2.25 | 4.50 | 0.99 |" in text
    assert "| real scenes | 0.875 / 0.125 | 0.750 | 0.500 | 0.500 | 2.25 |  | 0.99 |" in text
    assert "3 steps of DPM-Solver++(2M), guidance 3 |" in text  # as the manifest says
    assert "| vae | 10 min |" in text and "| data |" not in text
    side = EmojiScenes(tmp_path / "weights" / "emoji.zip").size
    assert f"{side}×{side} pixels" in text and "123 captions" in text and "a machine, today" in text
