"""Checkpoints of a run: each process writes its own part, beside the steps; read with distrust, or not at all.

`checkpoints/0000500/` holds the tensors as torch.distributed.checkpoint (DCP) lays them out in safetensors, so that
any number of processes reads them, and `state.json`: everything that is no tensor, and the checksum of every file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dmd2.runtime.errors import UserError
from dmd2.runtime.files import atomic_text, flush_folder, read_object, sha256_file
from dmd2.runtime.terminal import say
from dmd2.training.parallel.group import ALONE, Parallel, fitted, local

FORMAT = 3
KEEP = 2
MOST_BYTES = 1_000_000_000
"""of a file, about: a process has one of its own in memory twice while it writes it"""
NAME = re.compile(r"\d{7,}")
STATE = "state.json"
State = dict[str, Any]
Tensors = dict[str, Tensor]
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is no mistake


class Unreadable(UserError):
    """What is no whole checkpoint."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is whole."""

    path: Path
    about: State
    """everything that is no tensor"""
    tensors: Tensors
    """their types and shapes (on "meta"); of a file of format 2, themselves"""

    def fill(self, targets: Tensors, parallel: Parallel = ALONE) -> None:
        """Brings some of the tensors, by name, into others of their shapes, perhaps in shards; in all processes."""
        if self.path.is_dir():
            return load(targets, storage_reader=_reader(self.path), **_group(parallel))
        for name, target in targets.items():
            local(target).copy_(local(fitted(self.tensors[name], target)))

    def whole(self) -> Tensors:
        """All of the tensors, on the host."""
        tensors = {name: torch.zeros_like(value, device="cpu") for name, value in self.tensors.items()}
        self.fill(tensors)
        return tensors


class Checkpoints:
    """The newest `keep` checkpoints in the folder of a run. All processes call the same methods in the same order.

    As a context, it ends when nothing is being written any more.
    """

    def __init__(self, out: Path, keep: int = KEEP, parallel: Parallel = ALONE) -> None:
        self.folder, self.keep, self.parallel = out / "checkpoints", keep, parallel
        self.old = [out / "checkpoint.pt", out / "checkpoint.previous.pt"]
        self._damaged: set[Path] = set()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            say(f"{self.folder}: nor could the last checkpoint be written ({' '.join(str(error).split())[:300]})")
        finally:
            self._thread.shutdown()

    def all(self) -> list[Path]:
        """Newest first."""
        folders = [path for path in self.folder.glob("[0-9]*") if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(folders, key=lambda path: int(path.name), reverse=True) + [p for p in self.old if p.exists()]

    def exist(self) -> bool:
        return bool(self.all())

    def load(self) -> Stored:
        """The newest that is whole.

        Raises:
            UserError: there is none; or the processes do not see the same folder.
        """
        found, errors = self.all(), list[Unreadable]()
        if self.parallel.any(found != self.parallel.told(found)):
            raise UserError(f"{self.folder}: not the same in every process; expected one folder for all")
        for path in found:
            try:
                stored = read(path, self.parallel)
            except Unreadable as error:
                errors.append(error)
                self._damaged.add(path)
                continue
            if errors:
                say(f"{errors[0]}; going on from the one before it, of step {stored.about['step']}")
            return stored
        first, *others = errors or [Unreadable(f"{self.folder}: not a readable checkpoint (it is missing)")]
        raise UserError(f"{first}; nor is there an older one ({others[0]})" if others else str(first)) from first

    def save(self, about: State, tensors: Tensors) -> None:
        """Copies everything to the host, and has it written while the steps go on; waits for the one before it.

        Args:
            about: JSON's types, with the "step".
            tensors: by names that are the same in every process; those in shards as they are.

        Raises:
            OSError: the one before it could not be written; the older ones stay. Or the run's folder is no longer
                where it was: a new one there would not be locked.
        """
        self.wait()
        if self.parallel.any(not self.folder.parent.is_dir()):
            raise FileNotFoundError(errno.ENOENT, "moved or removed", str(self.folder.parent))
        staged = {name: self.parallel.staged(tensor) for name, tensor in tensors.items()}
        about = json.loads(json.dumps({**about, "format": FORMAT}))  # as it is now
        self._writing = self._thread.submit(self._write, about, staged)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: it could not be.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, about: State, tensors: Tensors) -> None:
        target = self.folder / f"{about['step']:07d}"
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            sums = self._write_files(tensors, temporary)
            if self.parallel.leads:
                about["files"] = sums
                atomic_text(temporary / STATE, json.dumps(about | {"sha256": _sum(about)}))
                if target.exists():  # a damaged one, or this run would not be here again
                    self._remove(target)
                temporary.replace(target)
                flush_folder(self.folder)
                self._damaged.discard(target)
                self._tidy(target)
        except BaseException:
            if self.parallel.leads:
                shutil.rmtree(temporary, ignore_errors=True)  # the first error is the one to tell
            raise

    def _write_files(self, tensors: Tensors, folder: Path) -> dict[str, str]:
        """Each process its part; the checksums of all."""
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, fqn_to_index_mapping=_files(tensors))
        try:
            save(tensors, storage_writer=writer, **_group(self.parallel))
        except CheckpointException as failure:
            reasons = [reason for reason, _ in failure.failures.values()]
            raise next((e for e in reasons if isinstance(e, OSError)), OSError(str(reasons[0])[:300])) from None
        sums: dict[str, str] | OSError
        try:
            mine = sorted(folder.glob(f"shard-{self.parallel.ranks.rank + 1:05d}-*"))
            sums = {path.name: sha256_file(path) for path in mine}
            flush_folder(folder)
        except OSError as error:
            sums = error
        whole = dict[str, str]()
        for each in self.parallel.each(sums):
            if isinstance(each, OSError):
                raise each
            whole |= each
        return whole

    def _tidy(self, newest: Path) -> None:
        """Removes what is older than the newest ones, and what was found damaged or of another past."""
        whole = [path for path in self.all() if path not in self._damaged]
        kept = whole[whole.index(newest) :][: self.keep]
        for path in self.all():
            if path not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """At once: what is half there has a hidden name."""
        if not path.is_dir():
            return path.unlink()
        hidden = path.with_name(f".{path.name}.old.tmp")
        path.replace(hidden)
        shutil.rmtree(hidden)


def read(path: Path, parallel: Parallel = ALONE) -> Stored:
    """A checkpoint whose checksums are right, each looked at by one of the processes.

    Raises:
        Unreadable: it is missing, damaged, or something else.
    """
    try:
        found: Stored | Unreadable = _read(path, parallel)
    except Unreadable as error:
        found = error
    for each in parallel.each(found if isinstance(found, Unreadable) else None):
        if each is not None:
            raise each
    assert isinstance(found, Stored)
    return found


def _read(path: Path, parallel: Parallel) -> Stored:
    if not path.is_dir():
        return _read_old(path)
    try:
        about = read_object(path / STATE)
    except UserError as error:
        raise Unreadable(f"{path}: not a readable checkpoint (damaged: {error})") from error
    if about.get("format") != FORMAT:
        raise Unreadable(f"{path}: not a checkpoint that this version of dmd2 reads; start the run anew")
    whole = about.pop("sha256", None) == _sum(about)
    try:
        there = {file.name for file in path.glob("*.safetensors")}
        if whole and there == about["files"].keys():
            mine = sorted(there)[parallel.ranks.rank :: parallel.ranks.world]
            if all(sha256_file(path / name) == about["files"][name] for name in mine):
                known: dict[str, Any] = _reader(path).read_metadata().state_dict_metadata
                kinds = {name: (each.size, each.properties.dtype) for name, each in known.items()}
                shapes = {k: torch.empty(size, dtype=dtype, device="meta") for k, (size, dtype) in kinds.items()}
                return Stored(path, about, shapes)
    except Exception as error:  # what safetensors and DCP raise for a file that is something else has many kinds
        raise Unreadable(f"{path}: not a readable checkpoint (damaged: {type(error).__name__})") from error
    raise Unreadable(f"{path}: not a readable checkpoint (damaged: its content and its checksums differ)")


def _reader(path: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(path))


def _group(parallel: Parallel) -> dict[str, Any]:
    return {"process_group": parallel.writers, "no_dist": parallel.writers is None}


def _files(tensors: Tensors) -> dict[str, int]:
    """Name → number of its file."""
    numbers, size = dict[str, int](), 0
    for name, tensor in tensors.items():
        size += local(tensor).nbytes
        numbers[name] = 1 + size // MOST_BYTES
    return numbers


def _sum(about: State) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


# What runs wrote before: one file by torch.save


def _read_old(path: Path) -> Stored:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        phases = state["phases"]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Unreadable(f"{path}: not a readable checkpoint (damaged: {type(error).__name__})") from error
    if state.get("format") != 2:
        raise Unreadable(f"{path}: not a checkpoint that this version of dmd2 reads; start the run anew")
    if state.pop("sha256", None) != digest(state):
        raise Unreadable(f"{path}: not a readable checkpoint (damaged: its content and its checksum differ)")
    numbers, tensors = dict[str, Any](), dict[str, Tensor]()
    for name, phase in phases.items():
        numbers[name] = packed_optimizer(phase["optimizer"], name, tensors)
        tensors |= {f"{name}/module/{k}": v for k, v in phase["module"].items()}
    tensors |= {f"average/{k}": v for k, v in (state.pop("average") or {}).items()}
    return Stored(path, {**state, "phases": numbers}, tensors)


def packed_optimizer(state: Mapping[str, Any], name: str, tensors: Tensors) -> State:
    """Puts the tensors of an optimizer's state beside others; returns the rest."""
    values = dict[str, Any]()
    for i, nested in state["state"].items():
        each = dict[str, Any]()
        for key, value in nested.items():  # bitsandbytes' tensors lie one level deeper, and come back from either
            each |= value if isinstance(value, Mapping) else {key: value}
        tensors |= {f"{name}/optimizer/{i}/{k}": v for k, v in each.items() if isinstance(v, Tensor)}
        if rest := {k: v for k, v in each.items() if not isinstance(v, Tensor)}:
            values[str(i)] = rest
    return {"groups": state["param_groups"], "values": values}


def digest(state: object) -> str:
    """The sha256 of nested dicts, lists, numbers, strings and tensors: of every bit that counts, in order."""
    sha256 = hashlib.sha256()
    _feed(sha256, state)
    return sha256.hexdigest()


def _feed(sha256: Any, value: object) -> None:
    if isinstance(value, Tensor):
        sha256.update(f"{value.dtype}{tuple(value.shape)};".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        sha256.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _feed(sha256, key)
            _feed(sha256, item)
    elif isinstance(value, list | tuple):
        sha256.update(f"{type(value).__name__} {len(value)};".encode())
        for item in value:
            _feed(sha256, item)
    else:
        sha256.update(f"{type(value).__name__} {value!r};".encode())
