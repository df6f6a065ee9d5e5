"""Weights from the Hugging Face hub: only the needed files, each checked, put together in diffusers' layout.

A folder of weights is made in `.NAME.partial` beside it and takes its place at the end, in one step. Until then that
is where a stopped download goes on: each file there is hashed again before it is believed.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dmd2.models.stable_diffusion.configs import TIMESTEPS
from dmd2.models.stable_diffusion.folder import UNET_FILE, save_pipeline_configs
from dmd2.runtime.errors import InvalidInput, UserError, first_line
from dmd2.runtime.files import atomic_path, atomic_text, sha256_file
from dmd2.runtime.loading import build_network
from dmd2.weights.folders import swap
from dmd2.weights.hub import AGAIN, File, git_id, load, look_up, other_bytes, plain_errors
from dmd2.weights.manifest import MANIFEST, Manifest, Source, Student, Teacher, read_manifest

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
DMD2 = "tianweiy/DMD2"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SAFETY = "CompVis/stable-diffusion-safety-checker"
VAES = {"kl": "madebyollin/sdxl-vae-fp16-fix", "tiny": "madebyollin/taesdxl"}
TAESD = "madebyollin/taesd"
LICENCES = {
    BASE: "CreativeML Open RAIL++-M",
    SD15: "CreativeML OpenRAIL-M",
    TAESD: "MIT",
    VAES["kl"]: "MIT",
    VAES["tiny"]: "MIT",
    DMD2: "CC BY-NC-SA 4.0: no commercial use",
    SAFETY: "none stated there; it is a part of Stable Diffusion 1, CreativeML OpenRAIL-M",
}
STUDENTS = {4: "dmd2_sdxl_4step_unet_fp16.safetensors", 1: "dmd2_sdxl_1step_unet_fp16.bin"}
LORA = "dmd2_sdxl_4step_lora_fp16.safetensors"


@dataclass(frozen=True)
class Undistilled:
    """A model on the hub that students are distilled from."""

    repository: str
    family: str
    side: int
    """of its images, in pixels"""
    guidance_scale: float
    """that it is sampled with"""
    encoders: tuple[str, ...]
    """what the names of its text encoders and tokenizers end in"""
    vaes: Mapping[str, tuple[str, str]]
    """name → repository, and the path of its weights there but for the ending"""


TEACHERS = {
    "sdxl-teacher": Undistilled(
        BASE, "sdxl", 1024, 8.0, ("", "_2"), {n: (of, "diffusion_pytorch_model") for n, of in VAES.items()}
    ),
    "sd15": Undistilled(
        SD15,
        "sd15",
        512,
        7.5,
        ("",),
        {"kl": (SD15, "vae/diffusion_pytorch_model.fp16"), "tiny": (TAESD, "diffusion_pytorch_model")},
    ),
}
MODELS = ("sdxl", *TEACHERS)
CHECKER = "safety checker"


@dataclass
class Folder:
    """A folder of weights that is to hold exactly `files`."""

    path: Path
    files: list[File]
    model: str
    """one of `MODELS`, or `CHECKER`"""
    old: Manifest | None = None
    """of what it holds now"""

    @property
    def staging(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def aside(self) -> Path:
        """Where the old content is for a moment, on systems that cannot exchange two folders."""
        return self.path.with_name(f".{self.path.name}.old")

    def raw(self, file: File) -> Path:
        """Where a file lies in the staging folder as the hub serves it."""
        target = self.staging / file.target
        return target.with_name(Path(file.path).name) if file.is_pickle else target

    def part(self, file: File) -> Path:
        """Where it grows. The name tells its content: what the hub has replaced meanwhile is not gone on with."""
        raw = self.raw(file)
        return raw.with_name(f"{raw.name}.{(file.sha256 or file.git_id or '')[:16]}.part")


def sdxl_files(steps: Sequence[int], vaes: Sequence[str], lora: bool) -> list[File]:
    """What a folder of SDXL's students needs. See `_surroundings` for `vaes`."""
    files = _surroundings(TEACHERS["sdxl-teacher"], vaes)
    for step, folder in unet_folders(steps).items():
        files.append(File(BASE, "unet/config.json", f"{folder}/config.json"))
        files.append(File(DMD2, STUDENTS[step], f"{folder}/{UNET_FILE}"))
    return files + ([File(DMD2, LORA, f"lora/{LORA}")] if lora else [])


def teacher_files(model: str, vaes: Sequence[str]) -> list[File]:
    """What a teacher's folder needs: its own UNet, in fp16, is `unet`."""
    about = TEACHERS[model]
    unet = [("config.json", "config.json"), ("diffusion_pytorch_model.fp16.safetensors", UNET_FILE)]
    files = [File(about.repository, f"unet/{name}", f"unet/{target}") for name, target in unet]
    return _surroundings(about, vaes) + files


def _surroundings(about: Undistilled, vaes: Sequence[str]) -> list[File]:
    """All but UNets. The first of `vaes` becomes `vae`, which pipelines load; a second is `vae_NAME`."""
    files = []
    for suffix in about.encoders:
        encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
        files.append(File(about.repository, f"{encoder}/config.json", f"{encoder}/config.json"))
        files.append(File(about.repository, f"{encoder}/model.fp16.safetensors", f"{encoder}/model.safetensors"))
        for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"):
            files.append(File(about.repository, f"{tokenizer}/{name}", f"{tokenizer}/{name}"))
    for number, vae in enumerate(vaes):
        folder = "vae" if number == 0 else f"vae_{vae}"
        repository, path = about.vaes[vae]
        config = f"{path.rpartition('/')[0]}/config.json".removeprefix("/")
        files.append(File(repository, config, f"{folder}/config.json"))
        files.append(File(repository, f"{path}.safetensors", f"{folder}/{UNET_FILE}"))
    return files


def unet_folders(steps: Sequence[int]) -> dict[int, str]:
    """Number of steps → subfolder. One of them is always `unet`, which plain diffusers loads."""
    return {n: "unet" if n == max(steps) else f"unet_{n}step" for n in sorted(set(steps), reverse=True)}


def download(
    dest: Path,
    *,
    model: str = "sdxl",
    steps: Sequence[int] = (1, 4),
    vaes: Sequence[str] = ("kl",),
    lora: bool = False,
    safety: bool = False,
    revisions: Mapping[str, str] | None = None,
    update: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Makes `dest`, and with `safety` the folder `safety` beside it, hold exactly the parts that are asked for.

    What the hub serves is recorded in `dmd2.json`. Later calls keep to the recorded commits and bytes.

    Args:
        model: one of `MODELS`: SDXL's students, or a teacher, of which neither `steps` nor `lora` count.
        steps: of the students: 1, 4 or both.
        vaes: "kl", "tiny" or both: the first becomes the folder's `vae`.
        revisions: repository → branch, tag or commit; others are taken as recorded, the first time at `main`.
        update: take what the hub serves now, whatever is recorded.
        say: prints a line.

    Raises:
        UserError: in one line, whatever goes wrong; the folders are then as they were.
    """
    dest = dest.expanduser().resolve()
    files = sdxl_files(steps, vaes, lora) if model == "sdxl" else teacher_files(model, vaes)
    folders = [Folder(dest, files, model)]
    if safety:
        # What dmd2/inference/safety.py loads.
        names = ("config.json", "preprocessor_config.json", "model.safetensors")
        files = [File(SAFETY, name, name) for name in names]
        folders.append(Folder(dest.with_name("safety"), files, CHECKER))
        if dest.name == "safety":
            raise InvalidInput("dest", "is where the safety checker goes; choose another name", dest)
    files = [file for folder in folders for file in folder.files]
    repositories = list(dict.fromkeys(file.repository for file in files))
    for repository in revisions or {}:
        if repository not in repositories:
            raise InvalidInput("revision", f"expected one of {', '.join(repositories)}", f"{repository}=…")
    for folder in folders:
        if folder.path.is_mount():
            raise UserError(f"{folder.path}: a mount point cannot be replaced; choose a folder in it")
    with plain_errors(str(dest.parent)), _lock(dest.parent):
        for folder in folders:
            folder.old = _existing(folder)
            for repository in dict.fromkeys(file.repository for file in folder.files):
                known = folder.old.sources.get(repository) if folder.old and not update else None
                wanted = [file for file in folder.files if file.repository == repository]
                commit = look_up(repository, wanted, known, (revisions or {}).get(repository))
                say(f"{repository} at {commit}\n    licence: {LICENCES[repository]}")
        if any(folder.old or folder.staging.exists() for folder in folders):
            say("checking what is there already")
        for folder in folders:
            _find(folder)
        _check_room(folders)
        with _progress(folders) as bar:
            for folder in folders:
                for file in folder.files:
                    _obtain(folder, file, bar)
        for folder in folders:
            _finish(folder, steps)
        for folder in folders:  # all are whole now: what is left is a matter of names
            swap(folder.staging, folder.path, folder.aside)
        for folder in folders:
            for path in (folder.staging, folder.aside):
                if path.exists():  # what there was before
                    shutil.rmtree(path)
            size = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
            say(f"{folder.path}: {size / 1e9:.1f} GB, every file checked")


# What is wanted, and what is there


def _existing(folder: Folder) -> Manifest | None:
    """The manifest of what a folder holds now. Raises UserError if replacing it would lose something else."""
    path = folder.path
    if folder.aside.exists():  # the last run was killed between the two steps of its swap, or soon after
        if path.exists():
            shutil.rmtree(folder.aside)
        else:
            folder.aside.rename(path)
    if path.exists() and not path.is_dir():
        raise InvalidInput("dest", "is a file; expected a folder", path)
    if not path.exists() or not any(path.iterdir()):
        return None
    old = read_manifest(path) if (path / MANIFEST).is_file() else None
    if old is None or not old.sources:
        raise InvalidInput("dest", "holds something else, which would be lost; choose another folder", path)
    for found in path.rglob("*"):
        name = found.relative_to(path).as_posix()
        if name != MANIFEST and name not in old.files and not found.is_dir():
            raise UserError(f"{found}: is not from the hub and would be lost; move it elsewhere first")
    return old


def _find(folder: Folder) -> None:
    """Looks for each file in the staging folder, in the folder that will be replaced and in the hub's own cache."""
    old = {sha256: folder.path / name for name, sha256 in folder.old.files.items()} if folder.old else {}
    for file in folder.files:
        cached = try_to_load_from_cache(file.repository, file.path, revision=file.commit)
        candidates = [Path(cached)] if isinstance(cached, str) else []
        if file.sha256 or file.git_id:  # else nothing but the cache's own word tells what it should be
            candidates += [folder.raw(file), folder.path / file.target, old.get(file.sha256 or "", folder.raw(file))]
        for path in candidates:
            if not file.there and (sha256 := file.sha256_if_right(path)):
                file.there, file.served = path, sha256
        if file.is_pickle and file.sha256:
            students = [path for path in old.values() if path.name == UNET_FILE]
            for path in (folder.staging / file.target, *students):
                # A file in the staging folder is whole. One in use may have been damaged.
                if _made_from(path) == file.sha256 and (path not in students or old.get(sha256_file(path)) == path):
                    file.there, file.served = path, file.sha256
        if not file.there and constants.is_offline_mode():
            raise UserError(f"{file.name}: offline (HF_HUB_OFFLINE), and neither here nor in the cache")


def _check_room(folders: list[Folder]) -> None:
    """Raises UserError unless the disk has room for what is still to be loaded, copied and converted."""
    needed = 0
    for folder in folders:
        for file in folder.files:
            if file.there is None:
                needed += (file.size or 0) - _size(folder.part(file))
            elif not {folder.path, folder.staging} & set(file.there.parents):
                needed += _size(file.there)  # copied from the hub's cache
            if file.is_pickle and not file.is_converted:
                needed += file.size or _size(folder.raw(file))
    free = shutil.disk_usage(folders[0].path.parent).free
    if needed > free:
        raise UserError(
            f"{folders[0].path.parent}: needs {needed / 1e9:.1f} GB more, but the disk has {free / 1e9:.1f} GB free"
        )


# From the hub to the staging folder


def _progress(folders: list[Folder]) -> Any:
    """One bar for all that is still to be loaded: bytes, speed, time left."""
    missing = [(folder, file) for folder in folders for file in folder.files if not file.there]
    return tqdm(
        total=sum(file.size or 0 for _, file in missing),
        initial=sum(_size(folder.part(file)) for folder, file in missing),
        unit="B",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # seconds: a log needs fewer lines
        disable=not missing or are_progress_bars_disabled(),
    )


def _obtain(folder: Folder, file: File, bar: Any) -> None:
    """Brings one file into the staging folder; one that is in use now costs no room."""
    raw = folder.staging / file.target if file.is_converted else folder.raw(file)
    if file.there == raw:
        return
    raw.parent.mkdir(parents=True, exist_ok=True)
    if file.there is not None:
        with atomic_path(raw) as temporary:
            linked = False
            if folder.path in file.there.parents:
                with suppress(OSError):  # some file systems have no links
                    os.link(file.there, temporary)
                    linked = True
            if not linked:
                shutil.copyfile(file.there, temporary)
        return
    part = folder.part(file)
    if file.size is not None and _size(part) > file.size:
        part.unlink()
    with part.open("ab") as stream, plain_errors(file.name):
        bar.set_description(file.path, refresh=False)
        load(file, stream, bar)
        stream.flush()
        os.fsync(stream.fileno())
    bar.set_description(f"checking {file.path}", refresh=sys.stderr.isatty())
    sha256 = file.sha256_if_right(part)
    if sha256 is None:
        found = sha256_file(part)
        as_listed = file.git_id is not None and file.git_id == git_id(part)
        part.unlink()
        if as_listed:  # so it is the record that differs
            raise UserError(other_bytes(file, found))
        expected = f"sha256 {file.sha256}" if file.sha256 else f"git id {file.git_id}"
        raise UserError(f"{file.name}: came damaged: sha256 {found}, expected {expected}; {AGAIN}")
    part.replace(raw)
    file.served = sha256


# From the staging folder to its place


def _finish(folder: Folder, steps: Sequence[int]) -> None:
    """Converts, checks and describes what lies in the staging folder, and clears away the rest."""
    staging, sums = folder.staging, {}
    sources: dict[str, Source] = {}
    for file in folder.files:
        if file.is_pickle and not file.is_converted:
            _convert(folder.raw(file), staging / file.target, file)
        sums[file.target] = sha256_file(staging / file.target) if file.is_pickle else file.served
        licence = LICENCES[file.repository]
        source = sources.setdefault(file.repository, Source(revision=file.commit, licence=licence))
        source.files[file.path] = file.served
    students, about = {}, TEACHERS.get(folder.model)
    if folder.model == "sdxl":
        for step, subfolder in unet_folders(steps).items():
            students[step] = Student(subfolder=subfolder, timesteps=TIMESTEPS[step])
            _check_unet(staging / subfolder, f"{DMD2}/{STUDENTS[step]}")
    elif about is not None:
        _check_unet(staging / "unet", f"{about.repository}/unet")
    if folder.model in MODELS:
        save_pipeline_configs(staging, "epsilon", family=about.family if about else "sdxl")
        for name in ("model_index.json", "scheduler/scheduler_config.json"):
            sums[name] = sha256_file(staging / name)
    for path in sorted(staging.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif not path.is_dir() and path.relative_to(staging).as_posix() not in sums:
            path.unlink()
    names = {"sdxl": "dmd2-sdxl", CHECKER: SAFETY.partition("/")[2]}
    side = about.side if about else 1024 if students else 224
    manifest = Manifest(
        name=names.get(folder.model, folder.model),
        family=about.family if about else folder.model,
        native_size=(side, side),
        teacher=Teacher(subfolder="unet", steps=25, guidance_scale=about.guidance_scale) if about else None,
        licence="; ".join(f"{repository}: {source.licence}" for repository, source in sources.items()),
        students=students,
        files=dict(sorted(sums.items())),
        sources=sources,
    )
    atomic_text(staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def _convert(pickled: Path, target: Path, file: File) -> None:
    """torch's pickle → fp16 safetensors. The pickle is mapped into memory, not read, so this needs little of it."""
    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{file.name}: torch.load with weights_only=True refuses it: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file.name}: expected tensors by name")
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    with atomic_path(target) as temporary:
        # One entry: safetensors writes several in a random order, and the same pickle should give the same bytes.
        save_file(tensors, temporary, metadata={"sha256_of_pickle": file.served})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    pickled.unlink()


def _check_unet(folder: Path, name: str) -> None:
    """Raises UserError, about what has that `name` on the hub, unless its tensors are what its config describes."""
    from diffusers import UNet2DConditionModel

    with plain_errors(name), safe_open(folder / UNET_FILE, "pt") as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    unet = build_network(UNet2DConditionModel, folder / "config.json")
    expected = {key: list(value.shape) for key, value in unet.state_dict().items()}
    wrong = {
        "missing": expected.keys() - shapes.keys(),
        "unexpected": shapes.keys() - expected.keys(),
        "of another shape": {k for k in expected.keys() & shapes.keys() if expected[k] != list(shapes[k])},
    }
    told = [f"{what}: {', '.join(sorted(keys)[:3])} ({len(keys)} in all)" for what, keys in wrong.items() if keys]
    if told:
        raise UserError(f"{name}: not the UNet that unet/config.json describes; {'; '.join(told)}")


# Small things


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _made_from(path: Path) -> str | None:
    """The sha256 of the pickle that `_convert` made this file from; None if it is none of those, or damaged."""
    try:
        with safe_open(path, "pt") as opened:
            return (opened.metadata() or {}).get("sha256_of_pickle")
    except (OSError, SafetensorError):
        return None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held as long as this process lives. Raises UserError if another one has it, OSError if it cannot be had."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".download-weights.lock").open("a")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInput(
            "dest", f"cannot be written to ({reason}); choose another folder", f"in {folder}"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another download-weights is at work there; let it finish") from None
        yield
