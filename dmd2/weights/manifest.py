"""`dmd2.json`: what a folder of weights is, and what its files must be."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmd2.runtime.errors import InvalidInput, WeightsError, first_error, shown
from dmd2.runtime.files import atomic_text, read_object, sha256_file
from dmd2.runtime.paths import EMOJI
from dmd2.weights.checksums import verifying

MANIFEST = "dmd2.json"

DEFAULT = EMOJI


def _inside(name: str) -> str:
    """Checks that a path stays within the folder of weights; `read_manifest`, which knows that, checks links."""
    path = PurePosixPath(name)
    if not name or not name.isprintable() or "\\" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{shown(repr(name))}: leads out of the folder; expected a path in it")
    return name


Inside = Annotated[str, AfterValidator(_inside), Field(max_length=1000)]

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1000, le=1000)]

Level = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e6)]

Side = Annotated[int, Field(ge=1, le=16384)]


class Student(BaseModel):
    """A distilled network: where it lies and the timesteps, or for EDM the levels, that it was distilled for."""

    model_config = ConfigDict(extra="forbid")
    subfolder: Inside
    timesteps: Annotated[list[Annotated[int, Field(ge=0, le=999)]], Field(max_length=1000)] = []
    """descending, one a step"""
    sigmas: Annotated[list[Level], Field(max_length=1000)] = []
    """descending, one a step"""
    lora: Annotated[str, AfterValidator(lambda name: name and _inside(name)), Field(max_length=1000)] = ""
    """path of a safetensors file in the folder: what makes the network in `subfolder` this student"""
    lora_scale: Finite = 1.0

    @model_validator(mode="after")
    def _check(self) -> Student:
        if bool(self.timesteps) == bool(self.sigmas):
            raise ValueError("expected either timesteps or sigmas")
        levels = self.timesteps or self.sigmas
        if any(later >= earlier for earlier, later in pairwise(levels)):
            raise ValueError("expected timesteps or sigmas in descending order")
        return self


class Teacher(BaseModel):
    """The undistilled network and how it is sampled on Karras levels: DPM-Solver++(2M), guided, or for EDM Heun."""

    model_config = ConfigDict(extra="forbid")
    subfolder: Inside = "unet_teacher"
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Finite


class Source(BaseModel):
    """A repository of the Hugging Face hub that files came from."""

    model_config = ConfigDict(extra="forbid")
    revision: str
    """commit"""
    licence: str
    files: dict[Inside, str] = {}
    """path in the repository → sha256 of what the hub served"""


class Manifest(BaseModel):
    """`dmd2.json`: what a folder of weights is and what its files must be."""

    model_config = ConfigDict(extra="forbid")
    name: str
    family: str = "sdxl"
    native_size: tuple[Side, Side]
    """width and height in pixels"""
    licence: str
    class_names: list[str] = []
    """what the classes 0, 1, … show, if it is conditioned on classes and they have names"""
    students: dict[Annotated[int, Field(ge=1, le=1000)], Student] = {}
    """by number of steps"""
    teacher: Teacher | None = None
    files: dict[Inside, str] = {}
    """path relative to the folder → sha256"""
    sources: dict[str, Source] = {}
    """by repository, if it was downloaded"""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of weights.

    Raises:
        UserError: there is no such folder, its `dmd2.json` is missing or wrong, or names what is not in the folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InvalidInput("weights", "no such folder", folder)
    if not path.is_file():
        raise WeightsError(f"missing; expected a folder of weights with a {MANIFEST}", path)
    try:
        manifest = Manifest.model_validate(read_object(path))
    except ValidationError as error:
        raise WeightsError(f"{first_error(error)}", path) from None
    _check_links(folder, manifest)
    return manifest


def _check_links(folder: Path, manifest: Manifest) -> None:
    """Raises UserError if what the manifest names leads out of the folder by a symbolic link."""
    named = {f"students.{n}.subfolder": student.subfolder for n, student in manifest.students.items()}
    named |= {f"students.{n}.lora": student.lora for n, student in manifest.students.items() if student.lora}
    if manifest.teacher is not None:
        named["teacher.subfolder"] = manifest.teacher.subfolder
    named |= {f"files.{name}": name for name in manifest.files}
    top = os.path.realpath(folder)
    for field, name in named.items():
        real = os.path.realpath(folder / name)
        if os.path.commonpath([top, real]) != top:
            told = f"{shown(field)}: a link that leads out of the folder, to {shown(real)}"
            raise WeightsError(told, folder / MANIFEST)


def verify(folder: Path, manifest: Manifest, subfolders: set[str] | None = None) -> None:
    """Checks the sha256 of every listed file (or those in the `subfolders`).

    Raises:
        UserError: naming the first file that is missing or differs, with both checksums.
    """
    with verifying(folder, manifest.files, MANIFEST, subfolders) as check:
        check(None)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `dmd2.json` with the sha256 of every file that is in `folder` now, but for the model card."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, "README.md"))
    sums = {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}
    atomic_text(folder / MANIFEST, manifest.model_copy(update={"files": sums}).model_dump_json(indent=2) + "\n")
