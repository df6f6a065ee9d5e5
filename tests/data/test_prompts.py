"""Prompts from every kind of file; what is no list of prompts, or too much, is one line and runs nothing."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmd2.data.prompts as module
from dmd2.data.prompts import read_prompts
from dmd2.runtime.errors import UserError

PROMPTS = ["a red apple", "ein Bär", "an owl, “at night”", "a red apple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_kind_of_file_gives_the_same_prompts(folder: Path) -> None:
    (folder / "a.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (folder / "b.jsonl").write_text("".join(json.dumps({"id": 1, "caption": p}) + "\n" for p in PROMPTS))
    (folder / "c.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    parquet(folder / "d.parquet", {"url": ["x"] * 4, "prompt": PROMPTS})
    (folder / "e.pkl").write_bytes(pickle.dumps(PROMPTS))
    for name in ("a.txt", "b.jsonl", "c.jsonl", "d.parquet", "e.pkl"):
        assert read_prompts(folder / name) == PROMPTS, name


def test_a_column_is_chosen_by_name(folder: Path) -> None:
    path = parquet(folder / "two.parquet", {"text": ["no"], "alt": ["yes"]})
    assert read_prompts(path, "alt") == ["yes"] and read_prompts(path) == ["no"]
    (folder / "two.jsonl").write_text('{"text": "no", "alt": "yes"}\n')
    assert read_prompts(folder / "two.jsonl", "alt") == ["yes"]
    with pytest.raises(UserError, match=r"^prompts: .*has no other; columns: text, alt"):
        read_prompts(path, "other")


@given(
    prompts=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=300), max_size=30),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_pickled_list_is_read_as_pickle_would(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "list.pkl"
    path.write_bytes(pickle.dumps(prompts * 2, protocol))
    expected = [prompt.strip() for prompt in prompts * 2 if prompt.strip()]
    if expected:
        assert read_prompts(path) == expected
    else:
        with pytest.raises(UserError, match="is empty"):
            read_prompts(path)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("content", [Hostile(), ["a", Hostile()], {"a": "b"}, "a", [["a"]], [1], ["a", None], ("a",)])
def test_another_pickle_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 4):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=r"^prompts: .*x\.pkl: .*(refused|expected a text)"):
            read_prompts(tmp_path / "x.pkl")
    assert not (tmp_path / "ran").exists()


@given(data=st.binary(max_size=60), start=st.sampled_from([b"", pickle.dumps(PROMPTS), pickle.dumps(PROMPTS, 0)]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_damage_is_one_line_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
) -> None:
    for suffix in (".pkl", ".jsonl", ".txt"):
        path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
        path.write_bytes(start[: len(data)] + data + start[2 * len(data) :])
        try:
            assert all(isinstance(prompt, str) for prompt in read_prompts(path))
        except UserError as error:
            assert str(error).startswith("prompts") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", "line 1: no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: nested too deeply"),
        ("a.jsonl", b"3", "line 1: of type int; expected a text or an object"),
        ("a.jsonl", b'{"url": "x"}', "line 1: has no prompt or caption or text; columns: url"),
        ("a.jsonl", b'{"prompt": 3}', "prompt 1 is of type int; expected a text"),
        ("a.parquet", b"PAR1", "not Parquet, or damaged"),
        ("a.parquet", b"", "not Parquet, or damaged"),
        ("a.pkl", b"", "is empty"),
        ("a.pkl", b"\x80\x04]\x94(", "truncated or damaged"),
        ("a.pkl", b"\x8d" + b"\xff" * 8, "truncated or damaged"),
        ("a.txt", b"a" * 20_000, "prompt 1 has 20000 characters; expected 10000 at most"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_prompts(tmp_path / name)
    assert str(raised.value).startswith("prompts") and len(str(raised.value)) <= 500


def test_sizes_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "many.pkl").write_bytes(pickle.dumps(list(map(str, range(50)))))
    (folder / "many.txt").write_text("\n".join(map(str, range(50))))
    for name in ("many.pkl", "many.txt"):
        with monkeypatch.context() as patched:
            patched.setattr(module, "MOST_PROMPTS", 20)
            with pytest.raises(UserError, match="holds more than 20 prompts"):
                read_prompts(folder / name)
            patched.setattr(module, "MOST_BYTES", 20)
            with pytest.raises(UserError, match="larger than"):
                read_prompts(folder / name)
