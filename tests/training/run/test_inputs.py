"""A run knows what it was made from: `--resume` alone goes on, and nothing else than before comes in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2.cli import main
from dmd2.data.shards import Column, Index, make_shards
from dmd2.runtime.errors import UserError
from dmd2.training import recipes
from dmd2.training.recipes import inputs_of
from dmd2.training.run.inputs import Record, continued, origin, read_record, sha256
from tests.training.run.test_runs import stop_at
from tests.training.test_loop import assert_same_runs, checkpoint, log, toy

Command = Callable[..., tuple[int, str]]
SETS = ("--set", "iterations=4", "--set", "loop.checkpoint_every=2", "--set", "log_every=1", "--set", "lr=0.5")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """`dmd2 train` with the given words, for the toy method: (status, what it said)."""
    (tmp_path / "data.zip").write_bytes(b"images")

    def run(*words: object, stop: int | None = None) -> tuple[int, str]:
        def build(recipe: Any, paths: Any, device: Any, group: Any) -> Any:
            if recipe.loop.seed == 99:
                raise AssertionError("something was made before the folder was looked at")
            return toy(recipe.loop) if stop is None else stop_at(toy(recipe.loop), stop)

        monkeypatch.setattr(recipes, "build_method", build)
        monkeypatch.setattr(sys, "argv", ["dmd2", "train", *map(str, words), "--device", "cpu"])
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out + err.replace("\r", "\n")

    return run


def begin(command: Command, tmp_path: Path, out: str, *more: object, stop: int | None = None) -> Path:
    words = ("emoji-vae", "--data", tmp_path / "data.zip", "--out", tmp_path / out, *SETS, *more)
    status, text = command(*words, stop=stop)
    assert status == (0 if stop is None else 130), text
    return tmp_path / out


def test_resume_alone_goes_on_as_the_run_began(command: Command, tmp_path: Path) -> None:
    whole = begin(command, tmp_path, "whole")
    out = begin(command, tmp_path, "run", stop=0)
    record = json.loads((out / "recipe.json").read_text())
    assert record["set"] == list(SETS[1::2]) and record["paths"] == {"data": str(tmp_path / "data.zip")}
    assert record["inputs"] == {"data": sha256(tmp_path / "data.zip")} == checkpoint(out)["inputs"]
    assert record["name"] == "emoji-vae" and record["lr"] == 0.5
    status, text = command("--resume", "--out", out)
    assert status == 0 and f"done: {out}" in text
    assert_same_runs(whole, out)
    assert command("emoji-vae", "--resume", "--out", out)[0] == 0  # and again, by name: it is finished
    assert json.loads((out / "recipe.json").read_text()) == record


def test_what_changes_no_result_may_change(command: Command, tmp_path: Path) -> None:
    out = begin(command, tmp_path, "run", stop=1)
    free = ("iterations=6", "log_every=2", "sample_every=3", "checkpoint_every=5")
    status, text = command("--resume", "--out", out, *(word for key in free for word in ("--set", key)))
    assert status == 0, text
    assert [line["step"] for line in log(out) if "critic" in line] == [1, 2, 4, 6]
    assert json.loads((out / "recipe.json").read_text())["set"] == ["lr=0.5", *free]
    status, text = command("--resume", "--out", out, "--set", "lr=0.25")
    assert status == 2 and "made by another recipe (different: lr)" in text


def test_other_data_is_refused_by_name_and_moved_data_is_not(command: Command, tmp_path: Path) -> None:
    out = begin(command, tmp_path, "run", stop=1)
    (tmp_path / "data.zip").rename(tmp_path / "moved.zip")
    status, text = command("--resume", "--out", out)
    assert status == 2 and "data.zip" in text and "Traceback" not in text
    (tmp_path / "data.zip").write_bytes(b"other images")
    status, text = command("--resume", "--out", out)
    assert status == 2 and "--data: not what this run began with" in text
    status, text = command("--resume", "--out", out, "--data", tmp_path / "moved.zip")
    assert status == 0, text


def test_another_recipe_s_name_is_refused(command: Command, tmp_path: Path) -> None:
    out = begin(command, tmp_path, "run", stop=1)
    status, text = command("emoji-classifier", "--resume", "--out", out)
    assert status == 2 and f"--out {out}: holds a run of emoji-vae" in text


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"name": 3}', b'{"name": "emoji-vae", "set": 5}', b"\xff"])
def test_a_record_that_is_lost_is_one_line_and_the_name_does_instead(
    content: bytes | None, command: Command, tmp_path: Path
) -> None:
    out = begin(command, tmp_path, "run", stop=1)
    (out / "recipe.json").unlink()
    if content is not None:
        (out / "recipe.json").write_bytes(content)
    status, text = command("--resume", "--out", out)
    assert status == 2 and "recipe.json" in text and text.count("\n") == 1
    status, text = command("emoji-vae", "--resume", "--out", out, "--data", tmp_path / "data.zip", *SETS)
    assert status == 0, text


def test_a_recipe_that_changed_or_gained_keys_since_goes_on_as_it_began(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begin(command, tmp_path, "run", stop=1)
    record = json.loads((out / "recipe.json").read_text())
    del record["latent_noise"]  # as if it had come later
    (out / "recipe.json").write_text(json.dumps(record))
    vae = recipes.RECIPES["emoji-vae"]
    changed = replace(vae, channels=8, loop=replace(vae.loop, warmup=7))  # type: ignore[call-arg]
    monkeypatch.setitem(recipes.RECIPES, "emoji-vae", changed)
    settled, settings = continued(read_record(out), ["seed=5"])
    assert settled.loop.warmup == vae.loop.warmup and settled.loop.seed == 5
    assert {"channels=32", "warmup=100", "seed=5"} <= set(settings)
    assert continued(Record(name="emoji-vae"), [])[0] == changed
    status, text = command("--resume", "--out", out)
    assert status == 0, text


def test_the_folder_is_looked_at_before_anything_is_made(command: Command, tmp_path: Path) -> None:
    out = begin(command, tmp_path, "run", stop=1)
    early = ("--data", tmp_path / "data.zip", "--set", "seed=99")
    cases = {
        ("--out", out): "holds a run already",
        ("--out", tmp_path / "new", "--resume"): "holds no checkpoint to resume from",
        ("--out", tmp_path / "data.zip"): "is a file; expected a folder",
        ("--out", tmp_path / "data.zip" / "run"): "is a file; expected a folder",
    }
    for words, expected in cases.items():
        status, text = command("emoji-vae", *early, *words)
        assert status == 2 and expected in text and text.count("\n") == 1
    assert not (tmp_path / "new").exists()
    for words in ((), ("--resume",)):
        status, text = command(*words)
        assert status == 2 and "RECIPE: missing" in text


def test_hashes_are_of_content(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").write_bytes(b"1")
    first = sha256(folder)
    assert first == sha256(folder) and len(first) == 64
    (folder / ".lock").write_text("7")
    assert first == sha256(folder)
    (folder / "a" / "1.png").rename(folder / "a" / "2.png")
    second = sha256(folder)
    (folder / "a" / "2.png").write_bytes(b"2")
    assert len({first, second, sha256(folder)}) == 3
    copy = tmp_path / "weights"
    copy.mkdir()
    manifest = json.loads((weights / "dmd2.json").read_text())
    (copy / "dmd2.json").write_text(json.dumps(manifest, indent=7))
    (copy / "README.md").write_text("a card")
    assert sha256(copy) == sha256(weights)
    manifest["files"]["unet/config.json"] = "0" * 64
    (copy / "dmd2.json").write_text(json.dumps(manifest))
    assert sha256(copy) != sha256(weights)
    manifest["files"] = {}  # one that lists nothing says nothing
    (copy / "dmd2.json").write_text(json.dumps(manifest))
    before = sha256(copy)
    (copy / "more").write_text("")
    assert sha256(copy) != before
    with pytest.raises(UserError):
        sha256(weights / "dmd2.json" / "none")


def test_each_recipe_names_what_it_depends_on(tmp_path: Path) -> None:
    given = {name: tmp_path / name for name in ("data", "init", "classifier", "student", "pairs", "lpips")}
    found = {name: set(inputs_of(recipe, given)) for name, recipe in recipes.RECIPES.items()}
    assert found["emoji-vae"] == found["cifar10-classifier"] == found["cifar10-small-teacher"] == {"data"}
    assert found["emoji-teacher"] == {"data", "init"}
    assert found["emoji-dmd2-1step"] == found["cifar10-small-dmd"] == {"data", "init", "student", "pairs", "lpips"}
    resumed = inputs_of(recipes.RECIPES["imagenet64-dmd2-gan-resumed"], given)
    assert resumed["student (its fake score)"] == tmp_path / "fake_score"
    defaults = inputs_of(recipes.RECIPES["emoji-dmd2-1step"], {})
    assert defaults["data"].name == "emoji.zip" and defaults["init"].name == "emoji"
    assert inputs_of(recipes.RECIPES["cifar10-small-teacher"], {}) == {}
    assert origin(["a=1"], {"data": Path("x"), "init": None}) == {
        "set": ["a=1"],
        "paths": {"data": str(Path("x").resolve())},
    }


def test_a_set_of_rows_is_known_by_its_index(tmp_path: Path) -> None:
    """Which has the sums of its files: gigabytes are not read again before every run."""
    column = Column(dtype="int64", shape=[])
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        index = Index(kind="rows", count=3, shard=2, columns={"n": column}, made={"seed": seed})
        make_shards(tmp_path / name, index, lambda rows: {"n": torch.tensor(list(rows))}, 2)
    (tmp_path / "b" / "rows-00001.safetensors").write_bytes(b"not read")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b") != sha256(tmp_path / "c")
