"""What may happen to a run: stop requests, terminals that go away, damaged checkpoints, a second trainer, no room."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmd2.runtime.errors import UserError
from dmd2.runtime.files import atomic_path
from dmd2.training.loop import Batch, Logs, LoopSettings, Method, Phase, train
from dmd2.training.run.belonging import check_inputs, check_recipe
from dmd2.training.run.checkpoints import Checkpoints, _sum, digest, read
from dmd2.training.run.folder import check_out
from dmd2.training.run.signals import stop_signals
from tests.training.test_loop import TOY, assert_same_runs, checkpoint, differences, log, toy

SHORT = replace(TOY, iterations=4, checkpoint_every=2, sample_every=100)
LONG_WAIT = 600  # seconds; far more than anything here takes
RECIPE = {"name": "toy", "lr": 1e-2, "loop": asdict(SHORT)}


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


# Stop requests, terminals


@pytest.fixture(autouse=True)
def _signals_end_a_process() -> Iterator[None]:
    """As they do by default: under nohup, say, the tests would inherit that hang-ups are ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_request_sets_a_flag_and_writes_nothing(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_signals() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # parents that pass signals on send the same one twice
        assert stopped()
    assert capfd.readouterr() == ("", "")


def test_only_a_second_ctrl_c_a_while_later_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ended = [0.0], list[int]()
    monkeypatch.setattr("dmd2.training.run.signals.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    with stop_signals():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        clock[0] = 5.0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        assert ended == []
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_signal_that_was_ignored_stays_so_and_threads_have_no_handlers() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopped()
    finally:
        signal.signal(signal.SIGHUP, before)
    entered = []

    def elsewhere() -> None:
        with stop_signals() as stopped:
            entered.append(stopped())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert entered == [False]


def stop_at(method: Method, step: int, number: signal.Signals = signal.SIGTERM) -> Method:
    def data(part: int) -> Any:
        if part == step:
            os.kill(os.getpid(), number)
        return method.data(part)

    return replace(method, data=data)


class Gone:
    """A stream whose reader has gone away."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stream", [Gone(), None])
def test_a_run_without_a_terminal_stops_after_a_checkpoint_and_goes_on(
    number: signal.Signals, stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert not train(stop_at(toy(SHORT), 2, number), SHORT, tmp_path / "run", recipe=RECIPE)
    assert checkpoint(tmp_path / "run")["step"] == 3
    assert train(toy(SHORT), SHORT, tmp_path / "run", resume=True, recipe=RECIPE)
    assert train(toy(SHORT), SHORT, tmp_path / "whole", recipe=RECIPE)
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


def test_the_checkpoint_comes_before_samples_scores_and_words(tmp_path: Path) -> None:
    """What is missing of a step whose sampling was cut short is made up for by the run that goes on."""
    steps = replace(TOY, sample_every=7)
    generate, calls = toy(steps).sample, itertools.count()
    assert generate is not None

    def cut(ema_model: nn.Module | None) -> Tensor:
        if next(calls):  # the first is of step 0
            raise KeyboardInterrupt
        return generate(ema_model)

    with pytest.raises(KeyboardInterrupt):
        train(replace(toy(steps), sample=cut), steps, tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 7
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines[:-1]))  # nor had that step's line been written
    assert train(toy(steps), steps, tmp_path / "run", resume=True)
    assert train(toy(steps), steps, tmp_path / "whole")
    assert_same_runs(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "samples" / "0000007.png").is_file()


# Checkpoints


def finished(out: Path, iterations: int = 4) -> Path:
    steps = replace(SHORT, iterations=iterations)
    assert train(toy(steps), steps, out, recipe=RECIPE | {"loop": asdict(steps)})
    return out


def resume(out: Path, method: Method | None = None, recipe: dict[str, Any] = RECIPE, **more: Any) -> bool:
    return train(method or toy(SHORT), SHORT, out, resume=True, recipe=recipe, **more)


def test_two_generations_are_kept(tmp_path: Path) -> None:
    finished(tmp_path / "run", 6)
    assert [read(path).about["step"] for path in Checkpoints(tmp_path / "run").all()] == [6, 4]


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_as_many_are_kept_as_asked_for(keep: int, tmp_path: Path) -> None:
    steps = replace(SHORT, iterations=8)
    assert train(toy(steps), steps, tmp_path / "run", keep=keep)
    names = [path.name for path in Checkpoints(tmp_path / "run").all()]
    assert names == [f"{step:07d}" for step in (8, 6, 4, 2)][:keep]


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_never_goes_unseen(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is either refused, or every bit that counts in it is what was written."""
    out = finished(tmp_path / "run")
    newest, before = Checkpoints(out).all()[0], checkpoint(out)
    generator = torch.Generator().manual_seed(seed)
    path = sorted(newest.iterdir())[seed % 2]
    content = bytearray(path.read_bytes())
    place = int(torch.randint(len(content), (1,), generator=generator))
    content[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
    path.write_bytes(content)
    try:
        assert differences(checkpoint(out), before) == []
    except UserError as error:
        assert "\n" not in str(error)
        assert resume(out)
        text = capsys.readouterr().out
        assert "0000004: not a" in text and "going on from the one before it, of step 2" in text
    assert differences(checkpoint(out), before) == []


def test_a_weight_that_was_changed_is_seen(tmp_path: Path) -> None:
    out = finished(tmp_path / "run")
    (path,) = Checkpoints(out).all()[0].glob("*.safetensors")
    tensors = load_file(path)
    tensors["critic/module/0.weight"][0, 0] = -6e37
    with safe_open(path, "pt") as file:
        save_file(tensors, path, file.metadata())
    with pytest.raises(UserError, match="its content and its checksums differ") as error:
        checkpoint(out)
    one_line(error)
    (out / "checkpoints" / "0000002" / "state.json").write_bytes(b"no")
    with pytest.raises(UserError, match="nor is there an older one") as error:
        resume(out)
    one_line(error)


def test_a_file_that_does_not_belong_is_not_read(tmp_path: Path) -> None:
    """DCP's reader would take its tensors."""
    out = finished(tmp_path / "run")
    save_file({"critic/module/0.weight": torch.zeros(8, 4)}, out / "checkpoints" / "0000004" / "more.safetensors")
    with pytest.raises(UserError, match="0000004: not a readable checkpoint"):
        checkpoint(out)


def test_a_damaged_checkpoint_never_replaces_the_good_one_before_it(tmp_path: Path) -> None:
    out = finished(tmp_path / "run")
    (out / "checkpoints" / "0000004" / "state.json").write_bytes(b"damaged")
    assert not resume(out, stop_at(toy(SHORT), 2))
    assert [read(path).about["step"] for path in Checkpoints(out).all()] == [3, 2]
    shutil.rmtree(out / "checkpoints" / "0000003")
    assert resume(out)
    assert_same_runs(out, finished(tmp_path / "whole"))


# Writing beside the steps


def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is held back until the step after it has been made, and the second waits for it."""
    stepped, writing, most = threading.Event(), list[int](), list[int]()
    real = Checkpoints._write

    def held(self: Checkpoints, about: dict[str, Any], tensors: Any) -> None:
        writing.append(about["step"])
        most.append(len(writing))
        assert stepped.wait(LONG_WAIT)
        real(self, about, tensors)
        writing.remove(about["step"])

    def data(step: int) -> Any:
        if step == 3:
            assert writing == [2] and not Checkpoints(tmp_path / "run").exist()
            stepped.set()
        return method.data(step)

    method = toy(SHORT)
    monkeypatch.setattr(Checkpoints, "_write", held)
    assert train(replace(method, data=data), SHORT, tmp_path / "run", recipe=RECIPE)
    assert most == [1, 1]
    monkeypatch.undo()
    finished(tmp_path / "whole")
    for age in (0, 1):
        assert differences(checkpoint(tmp_path / "run", age), checkpoint(tmp_path / "whole", age)) == []


def test_a_stop_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = threading.Event(), Checkpoints._write

    def held(self: Checkpoints, about: dict[str, Any], tensors: Any) -> None:
        assert asked.wait(LONG_WAIT)
        real(self, about, tensors)

    monkeypatch.setattr(Checkpoints, "_write", held)
    waited = Checkpoints.wait
    monkeypatch.setattr(Checkpoints, "wait", lambda self: (asked.set(), waited(self))[1])
    assert not train(stop_at(toy(SHORT), 2), SHORT, tmp_path / "run", recipe=RECIPE)
    assert checkpoint(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("broken", ["rename", "state", "hash"])
def test_whatever_fails_in_writing_is_told_and_the_one_before_stays(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert not train(stop_at(toy(SHORT), 1), SHORT, out, recipe=RECIPE)

    def refuse(*_: object) -> Any:
        raise OSError(5, "Input/output error")

    place = "dmd2.training.run.checkpoints"
    if broken == "rename":
        monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(f"{place}.atomic_text" if broken == "state" else f"{place}.flush_folder", refuse)
    with pytest.raises(UserError, match="Input/output error; its checkpoint is whole") as error:
        resume(out)
    one_line(error)
    monkeypatch.undo()
    assert checkpoint(out)["step"] == 2
    assert resume(out)
    assert_same_runs(out, finished(tmp_path / "whole"))


def test_phases_that_share_a_network_are_kept_once(tmp_path: Path) -> None:
    def shared() -> Method:
        method = toy(SHORT)
        return replace(method, phases=[*method.phases, replace(method.phases[1], name="again", every=2)])

    assert not train(stop_at(shared(), 2), SHORT, tmp_path / "run")
    assert {name.split("/")[0] for name in checkpoint(tmp_path / "run")["tensors"]} == {
        "generator",
        "critic",
        "average",
    }
    assert train(shared(), SHORT, tmp_path / "run", resume=True)
    assert train(shared(), SHORT, tmp_path / "whole")
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


def as_before(out: Path) -> None:
    """The newest checkpoint as runs wrote it with torch.save."""
    state = checkpoint(out)
    tensors, phases = state.pop("tensors"), {}
    for name, numbers in state.pop("phases").items():
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{name}/optimizer/"):
                number, what = key.split("/")[2:]
                optimizer.setdefault(int(number), {})[what] = value
        module = {k.removeprefix(f"{name}/module/"): v for k, v in tensors.items() if k.startswith(f"{name}/module/")}
        phases[name] = {"module": module, "optimizer": {"state": optimizer, "param_groups": numbers["groups"]}}
    average = {k.removeprefix("average/"): v for k, v in tensors.items() if k.startswith("average/")}
    state |= {"phases": phases, "average": average, "format": 2}
    torch.save(state | {"sha256": digest(state)}, out / "checkpoint.pt")
    shutil.rmtree(out / "checkpoints")


def test_what_runs_wrote_before_is_read(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert not train(stop_at(toy(SHORT), 0), SHORT, out, recipe=RECIPE)
    as_before(out)
    with pytest.raises(UserError, match="holds a run already"):
        train(toy(SHORT), SHORT, out)
    assert resume(out)
    assert not (out / "checkpoint.pt").exists()  # two newer ones are there
    assert_same_runs(out, finished(tmp_path / "whole"))


def widened(change: str) -> Method:
    method = toy(SHORT)
    wide = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))
    generator, critic = method.phases
    if change == "width":
        critic = replace(critic, module=wide, optimizer=torch.optim.Adam(wide.parameters()))
    if change == "tensor":
        more = nn.Sequential(critic.module, nn.Linear(4, 4))
        critic = replace(critic, module=more)
    if change == "optimizer":
        critic = replace(critic, optimizer=torch.optim.Adam(list(critic.module.parameters())[:2]))
    if change == "optimizer-shapes":
        critic = replace(critic, optimizer=torch.optim.Adam(reversed(list(critic.module.parameters()))))
    if change == "phase":
        critic = replace(critic, name="discriminator")
    return replace(method, phases=[generator, critic], ema_model=wide if change == "average" else method.ema_model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("width", r"critic: the tensor 0\.weight is \(8, 4\); this run's is \(9, 4\)"),
        ("tensor", r"critic: lacks the tensor 0\.0\.weight"),
        ("optimizer", r"critic: its optimizer has \[6\] parameters; this run's has \[2\]"),
        ("optimizer-shapes", "critic: its optimizer's state does not fit"),
        ("phase", "trains generator, critic; this run generator, discriminator"),
        ("average", "average: the tensor"),
    ],
)
def test_a_checkpoint_of_other_networks_is_one_line_and_loads_nothing(
    change: str, words: str, tmp_path: Path
) -> None:
    out = finished(tmp_path / "run")
    method = widened(change)
    before = [{k: v.clone() for k, v in phase.module.state_dict().items()} for phase in method.phases]
    with pytest.raises(UserError, match=words) as error:
        resume(out, method)
    one_line(error)
    assert differences(before, [phase.module.state_dict() for phase in method.phases]) == []


@pytest.mark.parametrize("name", ["step", "phases", "guard", "log", "recipe"])
@pytest.mark.parametrize("value", [None, "x", [1], {"generator": 3, "critic": None}])
def test_foreign_structures_with_a_right_checksum_are_one_line(name: str, value: Any, tmp_path: Path) -> None:
    out = finished(tmp_path / "run")
    path = Checkpoints(out).all()[0] / "state.json"
    state = json.loads(path.read_text()) | {name: value}
    state.pop("sha256")
    path.write_text(json.dumps(state | {"sha256": _sum(state)}))
    with pytest.raises(UserError) as error:
        resume(out)
    one_line(error)


def test_a_checkpoint_of_an_older_version_is_named(tmp_path: Path) -> None:
    out = finished(tmp_path / "run")
    for path in Checkpoints(out).all():
        (path / "state.json").write_text(json.dumps({"step": 1, "format": 1}))
    with pytest.raises(UserError, match="not a checkpoint that this version of dmd2 reads") as error:
        resume(out)
    one_line(error)


def test_a_recipe_that_gained_a_key_goes_on_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished(tmp_path / "run")
    gained = RECIPE | {"new": 3, "loop": asdict(SHORT) | {"newer": [1]}}
    assert resume(out, recipe=gained)
    assert "says nothing of loop.newer=[1], new=3; going on with that" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"different: lr\)"):
        resume(out, recipe={"name": "toy", "loop": asdict(SHORT)})  # one that lost a key is another


def test_what_may_change_and_what_may_not() -> None:
    then = {"name": "toy", "steps": (1, 2), "loop": {"seed": 1, "iterations": 5, "log_every": 1}}
    free = {"iterations": 9, "log_every": 2, "sample_every": 3, "checkpoint_every": 4}
    check_recipe(Path("c"), {"name": "toy", "steps": [1, 2], "loop": {"seed": 1, **free}}, then)
    for change in ({"name": "other"}, {"steps": (2, 1)}, {"loop": {"seed": 2}}):
        with pytest.raises(UserError, match="another recipe"):
            check_recipe(Path("c"), {**then, **change}, then)


def test_other_inputs_are_refused_by_name() -> None:
    check_inputs({"data": "a"}, {"data": "a"})
    check_inputs(None, {"data": "a"})
    for now in ({"data": "b", "init": "i"}, {"init": "i"}):
        with pytest.raises(UserError, match="data: not what this run began with"):
            check_inputs(now, {"data": "a", "init": "i"})


def test_more_steps_with_decay_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished(tmp_path / "run", 2)
    assert resume(out)
    assert "the learning rate falls to zero at step 4" in capsys.readouterr().out
    fewer = replace(SHORT, iterations=1)
    with pytest.raises(UserError, match="has done 4 steps already"):
        train(toy(fewer), fewer, out, resume=True, recipe=RECIPE)


# The folder


def test_resuming_nothing_is_an_error_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(UserError, match="holds no checkpoint to resume from") as error:
        resume(out)
    one_line(error)
    assert [p.name for p in out.iterdir()] == ["log.jsonl"]
    assert (out / "log.jsonl").read_text() == '{"step": 3}\n'
    finished(out)  # a new run does not wipe it either
    assert (out / "log.previous.jsonl").read_text() == '{"step": 3}\n' and log(out)[0]["step"] == 0


def test_a_second_trainer_is_told_so(tmp_path: Path) -> None:
    out = finished(tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with (out / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=rf"out .*: process {os.getpid()} is at work there") as error:
            train(lambda: pytest.fail("networks were loaded"), SHORT, out, resume=True, recipe=RECIPE)
    one_line(error)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert resume(out)  # the lock is gone with its owner


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "samples").mkdir(parents=True)
    for name in ("model", "fake_score"):
        (out / f".{name}.ab_1cd2e" / name).mkdir(parents=True)
    for name in (".0000004.tmp", ".0000002.old.tmp"):
        (out / "checkpoints" / name).mkdir(parents=True)
    stale = [out / ".recipe.json.0123abcd.tmp", out / "samples" / ".0000020.png.0123abcd.tmp"]
    others = [out / ".checkpoint.pt.tmp", out / "note.tmp", out / ".mine.0123abcd.tmp", out / ".model.txt"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    for path in stale + others:
        path.write_text("x")
    link = out / ".log.jsonl.0123abcd.tmp"
    link.symlink_to(elsewhere)
    finished(out)
    assert not any(path.exists() for path in stale) and not list(out.glob(".*.ab_1cd2e"))
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")] == []
    assert all(path.exists() for path in [*others, link]) and elsewhere.read_text() == "kept"


@pytest.mark.parametrize("name", ["model", "fake_score", "classifier.safetensors"])
def test_a_place_that_is_taken_is_noticed_before_the_first_step(name: str, tmp_path: Path) -> None:
    out, method = tmp_path / "run", replace(toy(SHORT), data=lambda part: pytest.fail("a step was made"))
    (out / name).mkdir(parents=True)
    (out / name / "file").write_text("")
    with pytest.raises(UserError, match=f"holds {name} already|in the way") as error:
        train(method, SHORT, out)
    one_line(error)
    shutil.rmtree(out / name)
    wrong = out / name
    if wrong.suffix:
        wrong.mkdir()
    else:
        wrong.write_text("")
    with pytest.raises(UserError, match="in the way of what the run is going to write") as error:
        train(method, SHORT, out)
    one_line(error)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        train(toy(SHORT), SHORT, tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_written_to_is_noticed_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=f"out .*run: {tmp_path} cannot be written to") as error:
        check_out(tmp_path / "new" / "run", resume=False)
    one_line(error)
    monkeypatch.undo()

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"out .*run: cannot be written to \(Permission denied\)") as error:
        train(toy(SHORT), SHORT, tmp_path / "run")
    one_line(error)


class Full(io.FileIO):
    """A file on a disk that is full after so many bytes."""

    room = 0

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 3000, 6000])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert not train(stop_at(toy(SHORT), 1), SHORT, out, recipe=RECIPE)
    real = Path.open

    def full(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if path.suffix != ".safetensors" or "w" not in mode:
            return real(path, mode, *more, **options)
        file = Full(path, "w")
        file.room = room
        return file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="No space left on device; its checkpoint is whole: `resume`") as error:
        resume(out)
    one_line(error)
    monkeypatch.undo()
    assert checkpoint(out)["step"] == 2
    assert not list(out.rglob("*.tmp"))
    assert resume(out)
    assert_same_runs(out, finished(tmp_path / "whole"))


def test_a_second_error_does_not_hide_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="No space left"), atomic_path(tmp_path / "file"):
        raise OSError(28, "No space left on device")


def test_checkpoints_of_a_folder_without_any(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is missing"):
        Checkpoints(tmp_path).load()


# Dropout


def dropping(settings: LoopSettings) -> Method:
    """Draws from the global generator in its network and in its data."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        return module(batch.data).square().mean(), {}

    return Method(
        [Phase("only", 1, module, torch.optim.Adam(module.parameters(), 1e-2), loss)],
        data=lambda part: torch.randn(8, 4),
        ema_model=module,
    )


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_resuming_with_dropout_is_bit_identical(grad_accum_steps: int, tmp_path: Path) -> None:
    settings = replace(SHORT, iterations=5, grad_accum_steps=grad_accum_steps)
    assert train(dropping(settings), settings, tmp_path / "whole")
    assert not train(stop_at(dropping(settings), 2 * grad_accum_steps), settings, tmp_path / "run")
    method = dropping(settings)
    torch.manual_seed(12345)
    assert train(method, settings, tmp_path / "run", resume=True)
    assert len({tuple(line.values()) for line in log(tmp_path / "run")}) == 5
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


class Crash(Exception):
    pass


def crash_at(method: Method, part: int) -> Method:
    def data(at: int) -> Any:
        if at == part:
            raise Crash
        return method.data(at)

    return replace(method, data=data)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(both(), LONG, out)
    return out


LONG = replace(TOY, iterations=12, checkpoint_every=3, sample_every=4, log_every=2)


def both() -> Method:
    """The toy's two networks and, as a third phase, one with dropout."""
    one, two = toy(LONG), dropping(LONG)
    third = replace(two.phases[0], name="third")
    return replace(one, phases=[*one.phases, third])


@given(st.lists(st.tuples(st.sampled_from(["crash", "stop", "damage", "sample"]), st.integers(0, 13)), max_size=5))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_whatever_befalls_a_run_it_ends_as_the_undisturbed_one(
    undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]]
) -> None:
    out = tmp_path_factory.mktemp("disturbed") / "run"

    def cut(ema_model: nn.Module | None) -> Tensor:
        raise Crash

    def begun() -> bool:
        return Checkpoints(out).exist()

    for kind, step in events:
        method = both()
        if kind == "damage" and len(there := Checkpoints(out).all()) > 1:
            next(there[0].glob("*.safetensors")).write_bytes(b"damaged")
        method = stop_at(method, step) if kind == "stop" else crash_at(method, step)
        if kind == "sample":
            method = replace(method, sample=cut)
        with contextlib.suppress(Crash):
            train(method, LONG, out, resume=begun())
    assert train(both(), LONG, out, resume=begun())
    assert_same_runs(undisturbed, out)
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"{n:07d}.png" for n in (0, 4, 8, 12)]
