"""Prompts, from the files that people keep them in: text, JSON lines, Parquet, the pickled lists of DMD2's release.

A pickle is parsed, never run (`dmd2.weights.pickles`): a list of strings needs a few harmless operations, and any
other is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmd2.runtime.errors import InvalidInput, UserError, first_line, shown
from dmd2.runtime.files import read_bounded, text_of
from dmd2.weights.pickles import PickleReader

MOST_BYTES = 4 * 10**9
"""of a file; the release's list of 3 million is of 300 MB"""
MOST_PROMPTS = 50_000_000
MOST_CHARACTERS = 10_000
"""of one prompt"""
COLUMNS = ("prompt", "caption", "text")
REFUSED = "holds something else than one list of texts: refused"


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """The prompts in a file, without those that are empty.

    Args:
        path: `.jsonl` (strings, or objects with a `column`), `.parquet`, `.pkl` (a list of strings); or text in UTF-8
            or, with a byte-order mark, UTF-16, one a line.
        column: what prompts are called there; None for the first of `COLUMNS` that there is.

    Raises:
        UserError: it cannot be read, is too large, or holds no prompts.
    """
    readers: dict[str, Callable[[Path, str | None], Iterator[Any]]] = {
        ".jsonl": _json_lines,
        ".parquet": _parquet,
        ".pkl": _pickle,
    }
    read = readers.get(path.suffix.lower(), _lines)
    prompts: list[str] = []
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: larger than {MOST_BYTES // 10**9} GB; expected a smaller file")
        for place, prompt in enumerate(read(path, column), 1):
            if type(prompt) is not str:
                found = "nothing" if prompt is None else f"of type {type(prompt).__name__}"
                raise UserError(f"{path}: prompt {place} is {found}; expected a text")
            if len(prompt) > MOST_CHARACTERS:
                told = f"prompt {place} has {len(prompt)} characters; expected {MOST_CHARACTERS} at most"
                raise UserError(f"{path}: {told}")
            if len(prompts) >= MOST_PROMPTS:
                raise UserError(f"{path}: holds more than {MOST_PROMPTS} prompts")
            if prompt.strip():
                prompts.append(prompt.strip())
    except UserError as error:
        raise InvalidInput("prompts", str(error)) from error
    except OSError as error:
        raise InvalidInput("prompts", f"cannot be read ({error.strerror or shown(error)})", path) from error
    if not prompts:
        raise InvalidInput("prompts", "is empty; expected one prompt a line", path)
    return prompts


def _lines(path: Path, _: str | None) -> Iterator[str]:
    yield from text_of(read_bounded(path, MOST_BYTES, shown(path, 500)), path).split("\n")
    # not splitlines(), which cuts within some prompts


def _json_lines(path: Path, column: str | None) -> Iterator[Any]:
    for number, line in enumerate(_lines(path, None), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except RecursionError:
            raise UserError(f"{path}: line {number}: nested too deeply; expected an object with a prompt") from None
        except ValueError as error:
            raise UserError(f"{path}: line {number}: no JSON ({shown(error)})") from None
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield entry[_chosen(list(entry), column, f"{path}: line {number}")]
        else:
            raise UserError(f"{path}: line {number}: of type {type(entry).__name__}; expected a text or an object")


def _parquet(path: Path, column: str | None) -> Iterator[Any]:
    with parquet_file(path) as file:
        chosen = _chosen(file.schema_arrow.names, column, str(path))
        for batch in file.iter_batches(columns=[chosen]):
            yield from batch.column(0).to_pylist()


def parquet_of(path: Path) -> Any:
    """`pyarrow.parquet`. Raises UserError if it is not installed, for the sake of `path`."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what is wrong with it is a UserError."""
    parquet = parquet_of(path)
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not Parquet, or damaged ({shown(first_line(error))})") from None


def _chosen(names: list[str], column: str | None, where: str) -> str:
    wanted = COLUMNS if column is None else (column,)
    found = next((name for name in wanted if name in names), None)
    if found is None:
        there = shown(", ".join(map(str, names))) or "none"
        raise UserError(f"{where}: has no {' or '.join(map(shown, wanted))}; columns: {there}")
    return found


def _pickle(path: Path, _: str | None) -> Iterator[Any]:
    if not path.stat().st_size:
        raise UserError(f"{path}: is empty; expected a pickled list of prompts")
    texts = _TextsReader().read_file(path)
    if type(texts) is not list:
        raise UserError(f"{path}: {REFUSED}")
    yield from texts


class _TextsReader(PickleReader):
    """A list of strings, of any protocol."""

    kind = "pickled lists of texts"
    operations = re.compile(
        "PROTO|FRAME|STOP|MARK|EMPTY_LIST|LIST|APPENDS?|MEMOIZE|((LONG_)?BIN)?(PUT|GET)|(SHORT_)?(BIN)?UNICODE8?"
    )
    most_operations = 3 * MOST_PROMPTS

    def _extended(self, target: Any, items: list[Any]) -> Any:
        if type(target) is not list or any(type(item) is not str for item in items):
            raise UserError(REFUSED)
        return super()._extended(target, items)
