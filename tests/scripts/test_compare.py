"""scripts/compare: runs go on where they were stopped, and a page of what is there. Judges have their own tests."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2.runtime.errors import UserError
from tests.training.pixels import write_set, write_teacher

SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a judge that measures how bright a student's weights are."""
    spec = spec_from_loader("compare", SourceFileLoader("compare", str(SCRIPTS / "compare")))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "compare", module)  # where pydantic looks for its types
    monkeypatch.setattr("sys.path", [*sys.path, str(SCRIPTS)])
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "score", lambda table, weights, mode, device: {"fd": float((weights).is_dir())})
    monkeypatch.setattr(module, "quick", lambda *_: 2.5)
    return module


PAGE = """
title = "Students"
text = "What this is."
out = "{out}"
seeds = [0, 1]
[[tables]]
title = "Tiny ones"
reading = "What it shows."
init = "{folder}/teacher"
data = "{folder}/set.zip"
judge = "small"
n = 16
{budget}
set = ["batch_size=4", "warmup=0"]
references = [{{ name = "the teacher", weights = "{folder}/teacher", today = true }}]
variants = [
    {{ name = "DMD2", recipe = "cifar10-small-dmd2" }},
    {{ name = "faster", recipe = "cifar10-small-dmd2", set = ["lr=0.1"] }},
]
"""


def write_page(tmp_path: Path, budget: str = "iterations = 6\nwatch_every = 2", text: str = PAGE) -> Path:
    if not (tmp_path / "teacher").is_dir():
        write_teacher(tmp_path / "teacher")
        write_set(tmp_path / "set.zip")
    path = tmp_path / "page.toml"
    path.write_text(text.format(folder=tmp_path, out=tmp_path / "page.md", budget=budget))
    return path


def runs_of(compare: Any, path: Path, tmp_path: Path) -> list[Any]:
    page = compare.read_page(path)
    table = page.tables[0]
    return [compare.Run(tmp_path / "runs", table, v, s, CPU) for s in page.seeds for v in table.variants]


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_repeated(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(tmp_path)
    run = runs_of(compare, path, tmp_path)[0]
    tick, steps = compare.Clock.tick, []

    def watching(clock: Any, step: int) -> None:
        steps.append(step)
        if step == 3 and len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        tick(clock, step)

    monkeypatch.setattr(compare.Clock, "tick", watching)
    assert not compare.once(run) and run.result() is None
    assert compare.once(run)
    assert steps == [0, 1, 2, 3, 4, 5, 6]  # each trained once; the last is the end
    result = run.result()
    assert result["scores"] == {"fd": 1.0} and result["iterations"] == 6
    assert 0 < result["minutes"] < 60 and result["core_minutes"] > 0
    assert compare.once(run) and len(steps) == 7
    assert compare.Run(tmp_path / "runs", run.table, run.variant, 0, CPU).result() == result


def test_the_page_is_written_from_what_is_there(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(tmp_path)
    first, *_ = runs_of(compare, path, tmp_path)
    about = {"machine": "a machine", "torch": "2", "commit": "abc", "date": "2026-01-02T00:00:00"}
    for seed, minutes in ((0, 1.0), (1, 3.0)):
        run = compare.Run(tmp_path / "runs", first.table, first.variant, seed, CPU)
        watched = [{"step": 1, "minutes": minutes, "fd": 2.0 + seed}]
        figures = {"scores": {"fd": 1.0 + 2 * seed, "accuracy": 0.5}, "watched": watched, "iterations": 6}
        run.out.mkdir(parents=True)
        (run.out / "result.json").write_text(json.dumps(figures | about | {"minutes": minutes, "core_minutes": 1.0}))
    monkeypatch.setattr(os, "nice", lambda n: n)
    compare.main(path, tmp_path / "runs", 1, "cpu", only_page=True)
    text = (tmp_path / "page.md").read_text()
    assert "| DMD2 | 2.000 ± 1.414 | 0.500 ± 0.000 | 6 | 2.0 ± 1.4 | 1.0 ± 0.0 |" in text
    assert "| faster | not run yet |" in text and "What this is." in text and "What it shows." in text
    assert "a machine; PyTorch 2; 2026-01-02; commit abc" in text and "as good as today's" not in text
    compare.referenced(tmp_path / "runs", first.table, first.table.references[0], CPU, True)
    compare.main(path, tmp_path / "runs", 1, "cpu", only_page=True)
    text = (tmp_path / "page.md").read_text()
    assert "| the teacher | 1.000 |" in text and "| 1.0 min (1 of 2) |" in text and "FD at most 2.50" in text


def test_a_table_whose_teacher_is_not_there_is_left_out(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(tmp_path)
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(os, "nice", lambda n: n)
    compare.main(path, tmp_path / "runs", 1, "cpu", only_page=False)
    assert f"(Not run: {tmp_path}/teacher is not there.)" in (tmp_path / "page.md").read_text()


def test_minutes_become_iterations_once_for_all_seeds(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of(compare, write_page(tmp_path, "minutes = 0.5"), tmp_path)
    measured: list[float] = []
    monkeypatch.setattr(compare, "seconds_a_step", lambda *_: measured.append(1) or 2.0 + len(measured))
    assert [run._iterations(run.recipe) for run in runs if run.variant.name == "DMD2"] == [10, 10]
    assert len(measured) == 1
    monkeypatch.undo()
    assert compare.seconds_a_step(runs[0].recipe, runs[0].paths, CPU) > 0


def test_what_changes_a_result_changes_the_folder(compare: Any, tmp_path: Path) -> None:
    def folders(budget: str, text: str = PAGE) -> set[Path]:
        return {run.folder for run in runs_of(compare, write_page(tmp_path, budget, text), tmp_path)}

    first = folders("iterations = 6")
    assert len(first) == 2 and folders("iterations = 6", PAGE.replace("What it shows", "Else")) == first
    assert not first & folders("iterations = 7")
    assert not first & folders("iterations = 6", PAGE.replace("n = 16", "n = 17"))
    assert len(first & folders("iterations = 6", PAGE.replace('"faster",', '"faster", iterations = 1,'))) == 1
    assert not first & folders("iterations = 6", PAGE.replace("warmup=0", "warmup=1"))
    write_set(tmp_path / "set.zip", 26)
    compare.sha256_once.cache_clear()
    assert not first & folders("iterations = 6")


def test_a_run_of_another_process_is_left_to_it(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_of(compare, write_page(tmp_path), tmp_path)[0]
    monkeypatch.setattr(compare.Run, "go", lambda _: pytest.fail("it runs there"))
    with compare.exclusive(run.out / ".compare.lock", wait=False) as mine:
        assert mine and compare.once(run)


def test_scores_do_not_count_as_training(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(compare.Clock, "_now", staticmethod(lambda: (now[0], 2 * now[0])))
    clock = compare.Clock(tmp_path / "clock")

    def scoring(_: Any) -> dict[str, float]:
        now[0] += 100
        return {}

    data = clock.ticking(lambda step: step)
    for step in range(4):
        assert data(step) == step
        now[0] += 1
        if step == 1:
            clock.pausing(scoring)(None)
    assert clock.at(3) == (3.0, 6.0)
    now[0] += 1000  # killed, and started again from a checkpoint of step 2
    later = compare.Clock(tmp_path / "clock")
    later.tick(2)
    now[0] += 5
    later.tick(3)
    assert later.at(3) == (7.0, 14.0) and later.at(2) == (2.0, 4.0)
    assert compare.Clock(tmp_path / "clock").at(3) == (7.0, 14.0)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds: one comes twice"),
        ("seeds = [0, 1]", "seeds = []", "seeds"),
        ("n = 16", "n = 1", "tables.0.n"),
        ("n = 16", "n = 16\nm = 1", "tables.0.m"),
        ('judge = "small"', 'judge = "kind"', "tables.0.judge"),
        ('name = "faster"', 'name = "DMD2"', "a name comes twice"),
        ("iterations = 6", "", "expected one of iterations and minutes"),
        ("iterations = 6", "iterations = 6\nminutes = 1", "expected one of iterations and minutes"),
        ("lr=0.1", "lr=-1", "lr=-1"),
        ("cifar10-small-dmd2", "dmd3", "dmd3"),
        ("[[tables]]", "[[tables", "no TOML"),
    ],
)
def test_a_page_that_cannot_be_is_refused_in_one_line(
    compare: Any, tmp_path: Path, old: str, new: str, told: str
) -> None:
    text = PAGE.format(folder=tmp_path, out="x.md", budget="iterations = 6")
    assert old in text
    path = tmp_path / "page.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError) as error:
        compare.read_page(path)
    assert told in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        compare.read_page(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["ablations", "leaderboard"])
def test_the_committed_tables_are_valid(compare: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS.parent)
    page = compare.read_page(SCRIPTS / f"{name}.toml")
    assert page.out == Path(f"docs/{name}.md") and len(page.seeds) == 3
