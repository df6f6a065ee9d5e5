"""What a run was made from: hashes of its inputs, and the record by which it goes on without being told again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dmd2.data.shards import INDEX
from dmd2.runtime.errors import InvalidInput, UserError, first_error
from dmd2.runtime.files import read_object, sha256_file
from dmd2.training.methods.common import Recipe
from dmd2.training.recipes import resolve
from dmd2.weights.manifest import MANIFEST, read_manifest

RECORD = "recipe.json"


def hashes(paths: Mapping[str, Path]) -> dict[str, str]:
    """Option → sha256 of what is at its path."""
    return {name: sha256(path) for name, path in paths.items()}


def sha256(path: Path) -> str:
    """Of a file's content; of a folder of weights, what its manifest lists; of one of `dmd2 data`, its index, which
    has the sums of its files; of another, names and contents.

    Hidden files, such as a lock, do not count.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.is_file():
            return sha256_file(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such file or folder")
        files = read_manifest(path).files if (path / MANIFEST).is_file() else {}
        if next(path.glob("*-00000.safetensors"), None) and (path / INDEX).is_file():
            files = {INDEX: sha256_file(path / INDEX)}
        if not files:
            names = {p.relative_to(path): p for p in sorted(path.rglob("*")) if p.is_file()}
            visible = {name: p for name, p in names.items() if not any(part.startswith(".") for part in name.parts)}
            files = {name.as_posix(): sha256_file(p) for name, p in visible.items()}
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from error
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


class Record(BaseModel):
    """What `recipe.json` says about where a run came from; the rest of it are the recipe's numbers."""

    model_config = ConfigDict(extra="allow")
    name: str
    set: list[str] = []
    """`--set`, in order"""
    paths: dict[str, str] = {}
    """options that were given; absolute"""


def origin(overrides: list[str], paths: Mapping[str, Path | None]) -> dict[str, Any]:
    """What a `Record` is made from, beside the recipe."""
    return {"set": overrides, "paths": {name: str(path.resolve()) for name, path in paths.items() if path}}


def read_record(out: Path) -> Record:
    """
    Raises:
        UserError: there is no `recipe.json`, or it is damaged.
    """
    try:
        return Record.model_validate(read_object(out / RECORD))
    except ValidationError as error:
        raise UserError(f"{out / RECORD}: {first_error(error)}; name the recipe") from None


def continued(record: Record, overrides: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe as it was when the run began, even if that of the name has changed since; and every `--set` of it.

    Keys that the recipe has gained since have their value of today. "auto" (of precision) stays for the caller to
    resolve.
    """
    settings = list(record.set)
    now, then = (_flat(values) for values in (asdict(resolve(record.name, settings)), record.model_extra or {}))
    changed = [key for key in now.keys() & then.keys() if now[key] != then[key] and now[key] != "auto"]
    settings += [f"{key}={json.dumps(then[key])}" for key in sorted(changed)] + overrides
    last = {text.partition("=")[0].removeprefix("loop."): i for i, text in enumerate(settings)}
    settings = [text for i, text in enumerate(settings) if i in last.values()]  # else they would grow with each part
    return resolve(record.name, settings), settings


def begun(recipe: str | None, out: Path) -> Record:
    """The record of the run in `out`, which is to go on, as `recipe` if one is named.

    Raises:
        UserError: it is a run of another recipe; or there is no record, and no name either.
    """
    try:
        record = read_record(out)
    except UserError:
        if recipe is None:
            raise
        record = Record(name=recipe)  # the checkpoint says whether it is that
    if recipe not in (None, record.name):
        raise InvalidInput("out", f"holds a run of {record.name}, not of {recipe}", out)
    return record


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the loop's settings beside the others, and tuples as lists."""
    loop = values.get("loop")
    flat = {**{k: v for k, v in values.items() if k != "loop"}, **(loop if isinstance(loop, dict) else {})}
    return json.loads(json.dumps(flat))
