"""Bulk: every row exactly once whatever is killed, the same bytes by any processes, errors kept beside images."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from annotated_types import Le
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import dmd2.data.shards as shards
import dmd2.service.batch as module
from dmd2.cli import app
from dmd2.data.shards import Index, Part, read_index
from dmd2.inference.batcher import Stopped
from dmd2.inference.request import ImageRequest
from dmd2.runtime.errors import UserError
from dmd2.service.batch import MOST_OUTPUTS, Requests, bulk_index, make_images
from dmd2.service.images import ImageService, OutputImage
from tests.data.kills import Killed, killer

ROWS: list[Any] = [
    {"prompt": "an owl", "seed": 7},
    "a lion",
    {"prompt": "a tiger", "num_outputs": 3, "width": 32, "output_format": "png"},
    {"prompt": "a wolf", "width": "wide"},
    {"prompt": "fails"},
    {"prompt": "two", "num_outputs": 2},
    {"prompt": "withheld"},
    ["no request"],
    {"prompt": "a fox", "width": 32, "seed": None},
]
BAD = {3, 4, 6, 7}


def fake(rows: Iterable[tuple[int, ImageRequest]]) -> Iterator[tuple[int, list[OutputImage] | Exception]]:
    """Images that say what they were made of."""
    for row, request in rows:
        if request.prompt == "fails":
            yield row, RuntimeError("no memory")
            continue
        assert request.seed is not None
        texts = [f"{request.prompt} {request.seed + i}".encode() for i in range(request.num_outputs)]
        data = [None if request.prompt == "withheld" else text for text in texts]
        size = request.width or 64, request.height or 64
        yield row, [OutputImage(None, request.seed + i, data=d, size=size, steps=4) for i, d in enumerate(data)]


def write_rows(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def make(path: Path, out: Path, format: Any = "webdataset", generate: Any = fake, **more: Any) -> Index:
    requests = Requests(path, {"output_quality": 90})
    return make_images(requests, out, bulk_index(requests, {"weights": "w"}, format, 4), generate, **more)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def samples(folder: Path) -> tuple[dict[int, dict[str, Any]], Counter[str]]:
    """Of tars: each row's facts; how often there is which file."""
    facts, files = {}, Counter[str]()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                files[member.name] += 1
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found = json.loads(file.read())
                    facts[found["row"]] = found
    return facts, files


def killed_at(point: int | None, out: Path) -> Any:
    """Raises `Killed` at the `point`-th event: at any row, or around any write, which leaves half a file behind."""
    event = killer(point, out)

    def generate(rows: Any) -> Any:
        for made in fake(rows):
            event(None)
            yield made

    atomic_path, atomic_text = module.atomic_path, shards.atomic_text

    @contextmanager
    def place(path: Path) -> Iterator[Path]:
        event(path)
        with atomic_path(path) as temporary:
            yield temporary
            event(path)
        event(None)

    def write(path: Path, text: str) -> None:
        event(path)
        atomic_text(path, text)
        event(None)

    @contextmanager
    def patched() -> Iterator[Any]:
        with mock.patch.object(module, "atomic_path", place), mock.patch.object(shards, "atomic_text", write):
            yield generate

    return patched()


@given(
    parts=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
    kills=st.lists(st.integers(0, 24), max_size=5),
    format=st.sampled_from(["webdataset", "parquet"]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_split_and_any_kills_make_the_same_bytes(parts: int, order: Any, kills: list[int], format: str) -> None:
    waiting = [Part(k + 1, parts) for k in range(parts)]
    order.shuffle(waiting)
    with tempfile.TemporaryDirectory() as folder:
        path, out = write_rows(Path(folder) / "rows.jsonl"), Path(folder) / "out"
        assert make(path, Path(folder) / "whole", format).whole
        while waiting:
            with killed_at(kills.pop() if kills else None, out) as generate:
                try:
                    make(path, out, format, generate, part=waiting[0])
                except Killed:
                    continue
            waiting.pop(0)
        assert content(out) == content(Path(folder) / "whole")


def test_every_row_is_there_once_with_its_images_or_its_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    index = make(path, tmp_path / "out")
    assert index.whole and index.failed == {"images-00000.tar": 1, "images-00001.tar": 3}
    facts, files = samples(tmp_path / "out")
    assert sorted(facts) == list(range(len(ROWS))) and set(files.values()) == {1}
    assert {row for row, found in facts.items() if "error" in found} == BAD
    images = {name for name in files if not name.endswith(".json")}
    assert images == {
        *("000000000.webp", "000000001.webp", "000000008.webp"),
        *(f"000000002.{i}.png" for i in range(3)),
        *(f"000000005.{i}.webp" for i in range(2)),
    }
    assert facts[3]["error"].startswith("row 3: width wide: ") and facts[4]["error"] == (
        "row 4: RuntimeError: no memory"
    )
    assert "safety checker" in facts[6]["error"] and facts[7]["error"].startswith("row 7: of type list")
    assert facts[1]["seed"] == MOST_OUTPUTS and facts[0]["seed"] == 7 and facts[2]["width"] == 32


def test_no_two_images_have_one_seed() -> None:
    bounds = [bound for bound in ImageRequest.model_fields["num_outputs"].metadata if isinstance(bound, Le)]
    assert [bound.le for bound in bounds] == [MOST_OUTPUTS]
    seeds = [module.row_seed(row) + i for row in range(100) for i in range(MOST_OUTPUTS)]
    assert len(set(seeds)) == len(seeds) and module.row_seed(2**31 - 1) < 2**32


def test_files_with_errors_are_made_again_when_asked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "fails"}, "an owl", "a", "b", "c"])
    assert make(path, tmp_path / "out").failed == {"images-00000.tar": 1}
    before = content(tmp_path / "out")
    asked: list[int] = []

    def mended(rows: Any) -> Any:
        rows = list(rows)
        asked.extend(row for row, _ in rows)
        return fake((row, request.model_copy(update={"prompt": "an owl"})) for row, request in rows)

    make(path, tmp_path / "out", generate=mended)
    assert not asked and content(tmp_path / "out") == before
    assert make(path, tmp_path / "out", generate=mended, retry=True).failed == {}
    assert asked == [0, 1, 2, 3] and read_index(tmp_path / "out").failed == {}


def test_a_device_that_is_gone_is_no_rows_error(tmp_path: Path) -> None:
    def gone(rows: Any) -> Any:
        yield next(fake(rows))
        raise Stopped("the device is gone")

    path = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(Stopped):
        make(path, tmp_path / "out", generate=gone)
    assert list(content(tmp_path / "out")) == ["index.json"]


def test_parquet_text_and_json_lines_say_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": "an owl", "seed": 3, "width": None}, {"prompt": "a lion", "seed": None, "width": 32}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_bytes("\ufeffan owl\r\n\r\n  a lion\r\n".encode())
    lines, table = Requests(write_rows(tmp_path / "rows.jsonl", rows), {}), Requests(tmp_path / "rows.parquet", {})
    text = Requests(tmp_path / "rows.txt", {"width": 32})
    assert [lines[i] for i in range(2)] == [table[i] for i in range(2)] and len(table) == 2
    assert text[1] == lines[1] and (text[0].prompt, text[0].seed, text[0].width) == ("an owl", 0, 32)

    make(tmp_path / "rows.parquet", tmp_path / "out", "parquet")
    made = pyarrow.parquet.read_table(tmp_path / "out" / "images-00000.parquet").to_pylist()
    assert {row["row"]: row["images"] for row in made} == {0: [b"an owl 3"], 1: [b"a lion 4"]}
    assert all(row["error"] is None and json.loads(row["facts"])["seed"] == row["seed"] for row in made)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.txt", b" \n\n", "empty"),
        ("a.csv", b"x", "expected a file that ends in .txt, .jsonl, .parquet"),
        ("a.parquet", b"x", "not Parquet"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot be read as text"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, data: bytes | None, told: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=told) as raised:
        Requests(tmp_path / name, {})
    assert str(raised.value).startswith("prompts") and "\n" not in str(raised.value)


def test_columns_that_are_no_fields_and_other_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for columns, told in (
        ({"prompt": ["x"], "colour": ["red"]}, "column colour"),
        ({"seed": [1]}, "no column prompt"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(UserError, match=told):
            Requests(path, {})
    with pytest.raises(UserError, match="num_outputs 9"):
        Requests(write_rows(tmp_path / "rows.jsonl"), {"num_outputs": 9})
    make(tmp_path / "rows.jsonl", tmp_path / "out")
    write_rows(tmp_path / "rows.jsonl", ["something else"] * len(ROWS))
    with pytest.raises(UserError, match="holds other rows, whose requests"):
        make(tmp_path / "rows.jsonl", tmp_path / "out")


@given(
    line=st.one_of(
        st.text(max_size=40), st.recursive(st.none() | st.integers() | st.text(max_size=9), st.lists).map(json.dumps)
    )
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_whatever_a_line_holds_is_a_request_or_one_line(line: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text(f'"an owl"\n{line}'.encode("utf-8", "replace").decode(), encoding="utf-8", newline="")
        requests = Requests(path, {})
        for row in range(len(requests)):
            try:
                assert requests[row].seed is not None
            except UserError as error:
                assert str(error).startswith(f"row {row}: ") and "\n" not in str(error)


def test_neighbours_of_equal_key_share_the_same_batches_each_time(weights: Path, tmp_path: Path) -> None:
    service = ImageService(weights, "cpu", tmp_path / "none", {"DMD2_MAX_BATCH": "4"}, files=False)
    try:
        owls = [ImageRequest(prompt="an owl", seed=i, num_inference_steps=1) for i in range(9)]
        small = [ImageRequest(prompt="an owl", seed=1, num_outputs=2, width=32, num_inference_steps=1)]
        bad = [ImageRequest(prompt="an owl", seed=1, lora_weights="none")]
        made = [dict(service.generate_all(enumerate([*owls, *bad, *small]))) for _ in range(2)]
        images = [made[0][row] for row in range(9)]
        sizes = [image.batch_size for row in images if isinstance(row, list) for image in row]
        assert sizes == [4, 4, 4, 4, 4, 4, 4, 4, 1]
        assert isinstance(made[0][9], UserError) and isinstance(made[0][10], list)
        assert [(image.seed, image.size, image.steps) for image in made[0][10]] == [
            (1, (32, 64), 1),
            (2, (32, 64), 1),
        ]
        data = [[[i.data for i in row] for row in once.values() if isinstance(row, list)] for once in made]
        assert data[0] == data[1] and all(None not in row for row in data[0])
    finally:
        service.close()


def test_the_command_makes_images_and_any_shard_alone_again(weights: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "an owl", "num_inference_steps": 1, "seed": 5},
        "a lion",
        "a tiger",
        {"prompt": "x", "width": 9},
    ]
    path, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    command = ["batch", str(path), "--out", str(out), "--weights", str(weights), "--device", "cpu", "--shard", "2"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 1, ended.output
    facts, files = samples(out)
    assert sorted(facts) == [0, 1, 2, 3] and "row 3: width 9" in facts[3]["error"]
    assert sum(name.endswith(".webp") for name in files) == 3
    with tarfile.open(out / "images-00000.tar") as tar:
        member = tar.extractfile("000000000.webp")
        assert member is not None and Image.open(io.BytesIO(member.read())).size == (64, 64)
    sums = read_index(out).files
    (out / "images-00000.tar").unlink()
    assert CliRunner().invoke(app, command).exit_code == 1
    assert sums == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sums}
    assert CliRunner().invoke(app, [*command, "--part", "1/2"]).exit_code == 0  # its own files hold no errors
