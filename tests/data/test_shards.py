"""Sets of rows: the same bytes by whatever processes they were made, killed or not; and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import dmd2.data.shards as module
from dmd2.data.shards import INDEX, Column, Index, Part, Shards, make_shards, read_index
from dmd2.runtime.errors import UserError
from tests.data.kills import Killed, killer

ROOT = Path(__file__).resolve().parents[2]
COUNT, SHARD, BATCH = 11, 4, 3


def index_of(count: int = COUNT, shard: int = SHARD, **made: int) -> Index:
    columns = {"x": Column(dtype="float16", shape=[2, 3]), "n": Column(dtype="int64", shape=[])}
    return Index(kind="rows", count=count, shard=shard, columns=columns, made=dict(made))


def make_rows(rows: range) -> dict[str, Tensor]:
    n = torch.tensor(list(rows))
    return {"x": (n[:, None, None] * torch.ones(2, 3)).half(), "n": n}


def make(out: Path, part: Part | None = None, index: Index | None = None) -> bool:
    return make_shards(out, index or index_of(), make_rows, BATCH, part=part)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set. Not to be changed: copy it."""
    out = tmp_path_factory.mktemp("shards") / "whole"
    assert make(out)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_files_hold_their_rows_and_the_index_their_sums(whole: Path) -> None:
    names = ["rows-00000.safetensors", "rows-00001.safetensors", "rows-00002.safetensors"]
    assert list(content(whole)) == [INDEX, *names]
    assert load_file(whole / names[2])["n"].tolist() == [8, 9, 10]
    index = read_index(whole)
    assert index.whole and index.files == {name: module.sha256_file(whole / name) for name in names}


@given(
    parts=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
    kills=st.lists(st.integers(0, 12), max_size=4),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_split_and_any_kills_make_the_same_bytes(parts: int, order: object, kills: list[int]) -> None:
    """A kill is before or after any call that computes or writes; one that writes leaves half a file behind."""
    expected = _expected()
    waiting = [Part(k + 1, parts) for k in range(parts)]
    order.shuffle(waiting)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        while waiting:
            with _killed_at(kills.pop() if kills else None, out):
                try:
                    make(out, waiting[0])
                except Killed:
                    continue
            waiting.pop(0)
        assert content(out) == expected and read_index(out).whole


def _expected() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        assert make(Path(folder) / "set")
        return content(Path(folder) / "set")


def _killed_at(point: int | None, out: Path) -> Any:
    """Raises `Killed` at the `point`-th event; events lie before and after each write."""
    event = killer(point, out)

    save_tensors, atomic_text = module.save_tensors, module.atomic_text

    def save(tensors: dict[str, Tensor], path: Path) -> None:
        event(path)
        save_tensors(tensors, path)
        event(None)

    def write(path: Path, text: str) -> None:
        event(path)
        atomic_text(path, text)
        event(None)

    return mock.patch.multiple(module, save_tensors=save, atomic_text=write)


def test_a_process_that_is_killed_for_real_goes_on(tmp_path: Path) -> None:
    """SIGKILL while it makes the second file: the first one stays, another process ends with the same bytes."""
    out = tmp_path / "set"
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.data.test_shards import index_of, make_rows
from dmd2.data.shards import make_shards
from pathlib import Path
def make(rows):
    if rows.start >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return make_rows(rows)
make_shards(Path({str(out)!r}), index_of(), make, 3)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=600)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list(read_index(out).files) == ["rows-00000.safetensors"]
    assert make(out) and content(out) == _expected()


def test_one_file_is_made_again_alone_the_same(copy: Path) -> None:
    before = content(copy)
    (copy / "rows-00001.safetensors").unlink()
    made: list[range] = []

    def noted(rows: range) -> dict[str, Tensor]:
        made.append(rows)
        return make_rows(rows)

    assert make_shards(copy, index_of(), noted, BATCH)
    assert made == [range(4, 7), range(7, 8)] and content(copy) == before


def test_a_damaged_file_is_made_again(copy: Path) -> None:
    before = content(copy)
    (copy / "rows-00002.safetensors").write_bytes(b"damaged")
    assert make(copy) and content(copy) == before


def test_a_set_that_is_not_whole_says_what_it_lacks(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert not make(out, Part(2, 2))
    with pytest.raises(UserError, match=r"lacks 2 of 3 files, such as rows-00000.safetensors"):
        Shards(out, "rows")
    assert make(out, Part(1, 2))
    assert len(Shards(out, "rows")) == COUNT


def test_rows_come_in_the_order_asked_for(whole: Path) -> None:
    shards = Shards(whole, "rows")
    chosen = torch.tensor([10, 0, 4, 4, 3])
    rows = shards.rows(chosen)
    assert torch.equal(rows["n"], chosen)
    assert torch.equal(rows["x"], make_rows(range(COUNT))["x"][chosen])
    assert shards.rows(chosen[:0])["x"].shape == (0, 2, 3)
    with pytest.raises(IndexError):
        shards.rows(torch.tensor([COUNT]))


def test_a_changed_file_is_told_when_it_is_read(copy: Path) -> None:
    path = copy / "rows-00001.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "n": tensors["n"] + 1}, path)
    shards = Shards(copy, "rows")
    assert shards.rows(torch.tensor([0]))["n"].tolist() == [0]
    with pytest.raises(UserError, match=r"rows-00001.safetensors: sha256 is .* damaged or changed"):
        shards.rows(torch.tensor([4]))


def test_a_folder_of_another_set_is_refused(copy: Path) -> None:
    for other, field in (
        (index_of(count=12), "count"),
        (index_of(shard=5), "shard"),
        (index_of(seed=1), "seed"),
    ):
        with pytest.raises(UserError, match=f"holds other rows, whose {field} is"):
            make(copy, index=other)
    with pytest.raises(UserError, match="holds rows; expected latents"):
        Shards(copy, "latents")


def test_what_else_is_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match=rf"{name}: exists already and has no index\.json"):
            make(tmp_path / name)
    with pytest.raises(UserError, match=r"has no index\.json"):
        Shards(tmp_path / "full", "rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count: "),
        ({"count": 2**31, "shard": 1}, "count: 2147483648 rows in files of 1"),
        ({"files": {"../other": "0"}}, r"files: \.\./other is none of the set"),
        ({"columns": {"x": {"dtype": "object", "shape": []}}}, "columns.x.dtype"),
        ({"kind": "../x"}, "kind: "),
        ({"surprise": 1}, "surprise: "),
    ],
)
def test_a_wrong_index_is_one_line(copy: Path, change: dict[str, object], message: str) -> None:
    about = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=message):
        Shards(copy, "rows")


def test_two_processes_never_make_the_same_file(tmp_path: Path) -> None:
    out = tmp_path / "set"
    with _other_process_locks(out, 1), pytest.raises(UserError, match=r"rows-00000.safetensors: another process"):
        make(out)
    assert make(out)


@contextmanager
def _other_process_locks(out: Path, byte: int) -> Iterator[None]:
    out.mkdir()
    program = f"""
import fcntl, sys
file = open({str(out / ".lock")!r}, "w")
fcntl.lockf(file, fcntl.LOCK_EX, 1, {byte})
print("locked", flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield
        process.communicate()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "", "1/9999999", "-1/2"])
def test_a_wrong_part_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"part .*: expected I/N"):
        Part.parse(text)


def test_a_part_is_told_or_torchrun_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Part.parse("2/8", {"RANK": "0", "WORLD_SIZE": "4"}) == Part(2, 8)
    assert Part.parse(None, {"RANK": "0", "WORLD_SIZE": "4"}) == Part(1, 4)
    assert Part.parse(None, {}) == Part(1, 1)
    with pytest.raises(UserError, match="part"):
        Part.parse(None, {"RANK": "x", "WORLD_SIZE": "4"})
    assert sorted(name for k in (1, 2, 3) for name in Part(k, 3).names(index_of())) == sorted(index_of().shards())
