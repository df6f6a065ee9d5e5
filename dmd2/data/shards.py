"""Rows in shards: what is computed once, by many processes; tensors that are then trained on, or images.

A folder holds `index.json` and files with as many rows each, but the last. The index says what the rows
are and what they were made from; a file is in it, with its checksum, once it is whole. A file's content depends on
its own rows alone, not on who made it or when: a process that was killed goes on, parts may be given to as many
processes as there are, and any file may be made again. The set is whole when all of its files are in the index.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from dmd2.runtime.errors import DataError, InvalidInput, first_error, shown
from dmd2.runtime.files import atomic_text, read_object, sha256_file
from dmd2.runtime.locks import LOCK, UNSUPPORTED, warn_of_no_locks
from dmd2.runtime.tensors import save_tensors
from dmd2.runtime.terminal import Terminal, say

INDEX = "index.json"
MOST_ROWS = 2**31
MOST_FILES = 100_000
DTYPES = {"float16": torch.float16, "float32": torch.float32, "int64": torch.int64}

Rows = Mapping[str, Tensor]
"""columns by name, with rows along dimension 0"""


class Column(BaseModel):
    """One tensor of a row."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    dtype: Annotated[str, Field(pattern="^(float16|float32|int64)$")]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**24)]], Field(max_length=8)]


class Index(BaseModel):
    """`index.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: Annotated[str, Field(pattern="^[a-z]{1,20}$")]
    count: Annotated[int, Field(ge=1, le=MOST_ROWS)]
    shard: Annotated[int, Field(ge=1, le=MOST_ROWS)]
    """rows in each file but the last"""
    columns: dict[str, Column]
    made: dict[str, JsonValue]
    """whatever the rows depend on: networks by checksum, prompts, steps, seeds"""
    ending: Literal["safetensors", "tar", "parquet"] = "safetensors"
    """of the files' names"""
    files: dict[str, str] = {}
    """name → sha256 of those that are whole"""
    failed: dict[str, Annotated[int, Field(ge=1)]] = {}
    """name → how many of its rows hold an error instead of what was asked for, where there are any"""

    def shards(self) -> dict[str, range]:
        """Each file's name and its rows."""
        starts = range(0, self.count, self.shard)
        return {f"{self.kind}-{k:05d}.{self.ending}": self._rows(start) for k, start in enumerate(starts)}

    def _rows(self, start: int) -> range:
        return range(start, min(start + self.shard, self.count))

    @property
    def whole(self) -> bool:
        return self.files.keys() == self.shards().keys()


@dataclass(frozen=True)
class Part:
    """Which of the files a process makes: every `of`-th, beginning with the `number`-th (from 1)."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Part:
        """ "2/8"; or, without a text, torchrun's RANK and WORLD_SIZE; or all of them.

        Raises:
            UserError: it is none of these.
        """
        said = text if text is not None else _of_torchrun(environment)
        match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", said)
        part = cls(*map(int, match.groups())) if match else None
        if part is None or part.number > part.of:
            raise InvalidInput("part", "expected I/N with 1 <= I <= N, such as 2/8", shown(said, 50))
        return part

    def names(self, index: Index) -> list[str]:
        return list(index.shards())[self.number - 1 :: self.of]


def _of_torchrun(environment: Mapping[str, str]) -> str:
    rank, size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    return f"{int(rank) + 1}/{size}" if re.fullmatch(r"\d{1,5}", rank) else f"{rank}/{size}"


def make_shards(
    out: Path,
    index: Index,
    make: Callable[[range], Rows],
    batch: int,
    *,
    part: Part | None = None,
) -> bool:
    """Makes the files of `part` that `out` lacks, with a progress bar; says whether the whole set is there now.

    It may be stopped at any time, and goes on where it stopped. A file that is no longer what the index says is made
    again.

    Args:
        out: folder, new or begun with the same index.
        index: of the set; without files.
        make: rows → their columns, on any device; called with at most `batch` rows of one file.
        batch: how many rows at once. It changes nothing but rounding.

    Raises:
        UserError: `out` holds something else; another process makes the same file; a value is not finite.
    """
    if batch < 1:
        raise InvalidInput("batch", "expected at least 1", batch)

    def write(path: Path, rows: range, done: Callable[[int], object]) -> int:
        made = []
        for start in range(rows.start, rows.stop, batch):
            some = range(start, min(start + batch, rows.stop))
            made.append(make(some))
            done(len(some))
        tensors = {column: torch.cat([one[column].cpu() for one in made]) for column in index.columns}
        _check(path, index, rows, tensors)
        save_tensors({c: t.contiguous() for c, t in tensors.items()}, path)
        return 0

    return make_files(out, index, write, part=part).whole


def make_files(
    out: Path,
    index: Index,
    write: Callable[[Path, range, Callable[[int], object]], int],
    *,
    part: Part | None = None,
    retry: bool = False,
    only: Sequence[str] | None = None,
) -> Index:
    """As `make_shards`, for files of any kind. Returns the index of what is there now.

    Args:
        write: makes a file of these rows, whole or not at all; tells how many are done as it goes, and returns how
            many hold an error.
        retry: whether files with such rows are made again.
        only: names of the part's files that are made now; None for all.

    Raises:
        UserError: `out` holds something else; another process makes the same file.
    """
    if len(index.shards()) > MOST_FILES:
        raise InvalidInput("shard", f"makes {len(index.shards())} files; expected {MOST_FILES} at most", index.shard)
    try:
        with _folder(out) as locks:
            names = [name for name in (part or Part()).names(index) if only is None or name in only]
            _make(out, index, write, names, retry, locks)
            return read_index(out)
    except OSError as error:
        raise DataError(f"cannot be written to ({shown(error.strerror or error)})", out) from error


@contextmanager
def _folder(out: Path) -> Iterator[_Locks]:
    # Hidden: what a process that was killed at its very beginning may have left, or one that begins now.
    seen = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
    if (out.exists() and not out.is_dir()) or (seen and INDEX not in seen):
        raise DataError(f"exists already and has no {INDEX}; expected a new or empty folder", out)
    out.mkdir(parents=True, exist_ok=True)
    with _Locks(out) as locks:
        yield locks


def _make(
    out: Path,
    index: Index,
    write: Callable[[Path, range, Callable[[int], object]], int],
    names: list[str],
    retry: bool,
    locks: _Locks,
) -> None:
    """See `make_files`."""
    with locks(0):
        there = _begin(out, index)
    rows = index.shards()
    places = {name: place for place, name in enumerate(rows, 1)}
    missing = [name for name in names if (retry and name in there.failed) or not _is_whole(out, name, there)]
    total, left = (sum(len(rows[name]) for name in which) for which in (names, missing))
    terminal = Terminal(sys.stderr)
    interval = 0.5 if terminal.isatty() else 30
    with tqdm(total=total, initial=total - left, unit="row", mininterval=interval, file=terminal) as bar:
        for name in missing:
            with locks(places[name], f"{out / name}: another process makes it now"):
                _tidy(out, name)
                failed = write(out / name, rows[name], bar.update)
                _enter(out, name, failed, locks)


def _begin(out: Path, index: Index) -> Index:
    """Writes the index, or compares it with the one that is there. Returns what `out` has of it."""
    _tidy(out, INDEX)
    if not (out / INDEX).exists():
        _write(out, index)
        return index
    there = read_index(out)
    for field in ("kind", "count", "shard", "columns", "ending"):
        _compare(out, field, getattr(there, field), getattr(index, field))
    for field in sorted(there.made.keys() | index.made.keys()):
        _compare(out, field, there.made.get(field), index.made.get(field))
    return there


def _compare(out: Path, field: str, old: object, new: object) -> None:
    if old != new:
        told = f"holds other rows, whose {field} is {shown(old, 80)}, not {shown(new, 80)}; name another folder"
        raise DataError(told, out)


def read_index(folder: Path) -> Index:
    """
    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"has no {INDEX}; `dmd2 data` makes such folders", folder)
    try:
        index = Index.model_validate(read_object(path))
    except ValidationError as error:
        raise DataError(first_error(error), path) from None
    if -(-index.count // index.shard) > MOST_FILES:
        raise DataError(f"count: {index.count} rows in files of {index.shard}; expected {MOST_FILES} at most", path)
    if strange := sorted((index.files.keys() | index.failed.keys()) - index.shards().keys()):
        raise DataError(f"files: {shown(strange[0])} is none of the set", path)
    return index


def _write(out: Path, index: Index) -> None:
    atomic_text(out / INDEX, index.model_dump_json(indent=1) + "\n")


def _enter(out: Path, name: str, failed: int, locks: _Locks) -> None:
    """Puts a file that is whole into the index, as one process of many."""
    checksum = sha256_file(out / name)
    with locks(0):
        there = read_index(out)
        files = there.files | {name: checksum}
        failures = {n: count for n, count in (there.failed | {name: failed}).items() if count}
        sums = {"files": dict(sorted(files.items())), "failed": dict(sorted(failures.items()))}
        _write(out, there.model_copy(update=sums))


def _is_whole(out: Path, name: str, index: Index) -> bool:
    """Whether the file is there as the index says, or made again."""
    if name not in index.files:
        return False
    if (out / name).is_file() and sha256_file(out / name) == index.files[name]:
        return True
    say(f"{out / name}: missing or damaged; it is made again")
    return False


def _check(path: Path, index: Index, rows: range, tensors: Rows) -> None:
    expected = {c: (DTYPES[kind.dtype], (len(rows), *kind.shape)) for c, kind in index.columns.items()}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise DataError(f"holds {_said(found)}; expected {_said(expected)}", path)


def _said(columns: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    said = (
        f"{shown(name, 30)} {str(kind).removeprefix('torch.')} {shape}" for name, (kind, shape) in columns.items()
    )
    return ", ".join(sorted(said))


def _tidy(out: Path, name: str) -> None:
    """Removes what killed processes left of a file; nobody else is making it now."""
    stale = re.compile(rf"\.{re.escape(name)[:200]}\.[0-9a-f]{{8}}\.tmp")
    for path in out.iterdir():
        if stale.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


class _Locks:
    """Locks bytes of the folder's lock file: 0 for the index, 1 + k for the k-th file.

    Locks of byte ranges are those that network file systems know, too, and they end with their process. They belong
    to it, and closing any descriptor of the file ends them all: one descriptor serves for everything.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.known = out, True
        self.descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> _Locks:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    @contextmanager
    def __call__(self, byte: int, busy: str | None = None) -> Iterator[None]:
        """
        Args:
            busy: what to raise where another process has it; None: wait for that.
        """
        try:
            if self.known:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0), 1, byte)
        except OSError as error:
            if busy and error.errno in (errno.EAGAIN, errno.EACCES):
                raise DataError(f"{busy}; wait for it, or name another folder") from None
            if error.errno not in UNSUPPORTED:
                raise
            self.known = False
            warn_of_no_locks(self.out)
        yield
        if self.known:  # else, or after an error, it ends with the descriptor
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, byte)


class Shards:
    """A set of rows, to read. Files are mapped into memory, each checked against its sum when it is first read.

    Raises:
        UserError: the set is not whole, or of another kind.
    """

    def __init__(self, folder: Path, *kinds: str) -> None:
        self.folder, self.index = folder, read_index(folder)
        if self.index.kind not in kinds:
            raise DataError(f"holds {self.index.kind}; expected {' or '.join(kinds)}", folder)
        names = self.index.shards()
        lacking = [name for name in names if name not in self.index.files or not (folder / name).is_file()]
        if lacking:
            told = f"lacks {len(lacking)} of {len(names)} files, such as {lacking[0]}"
            raise DataError(f"{told}; the command that made the others makes them", folder)
        self._names = list(names)
        self._open: dict[str, Rows] = {}

    def __len__(self) -> int:
        return self.index.count

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """The columns of int64 (B,) rows: each (B, …), in memory of its own.

        Raises:
            UserError: a file is damaged.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} of {len(self)}")
        file, row = indices // self.index.shard, indices % self.index.shard
        found = {
            name: torch.empty(len(indices), *column.shape, dtype=DTYPES[column.dtype])
            for name, column in self.index.columns.items()
        }
        for k in file.unique().tolist():
            chosen = (file == k).nonzero()[:, 0]
            for name, tensor in self._file(self._names[k]).items():
                found[name][chosen] = tensor[row[chosen]]
        return found

    def _file(self, name: str) -> Rows:
        if name not in self._open:
            path = self.folder / name
            try:
                checksum = sha256_file(path)
                if checksum != self.index.files[name]:
                    told = f"sha256 is {checksum}, not {self.index.files[name]}: damaged or changed"
                    raise DataError(f"{told}; the command that made it makes it again", path)
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise DataError(f"cannot be read ({shown(error)})", path) from error
            _check(path, self.index, self.index.shards()[name], tensors)
            self._open[name] = tensors
        return self._open[name]


def batch_rows(count: int, size: int, seed: int, step: int) -> Tensor:
    """The rows (size,) of a step's batch: a pure function of (seed, step). Each epoch has its own order."""
    places = torch.arange(step * size, (step + 1) * size)
    epochs = places // count
    return torch.cat([_order(count, seed, int(e))[places[epochs == e] % count] for e in epochs.unique()])


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
