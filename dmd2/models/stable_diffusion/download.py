"""SDXL's weights from the Hugging Face hub: only the needed files, each checked, put together in diffusers' layout.

A folder of weights is made in `.NAME.partial` beside it and takes its place at the end, in one step. Until then that
is where a stopped download goes on: each file there is hashed again before it is believed.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import httpx2  # huggingface_hub's own client, whose errors it lets through
import torch
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError, RevisionResolutionError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not "exported"
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dmd2 import __version__
from dmd2.models.stable_diffusion.folder import UNET_FILE, save_pipeline_configs
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.files import atomic_path, atomic_text, sha256_file
from dmd2.runtime.loading import build_network
from dmd2.weights.folders import swap
from dmd2.weights.manifest import MANIFEST, Manifest, Source, Student, read_manifest

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
DMD2 = "tianweiy/DMD2"
SAFETY = "CompVis/stable-diffusion-safety-checker"
VAES = {"kl": "madebyollin/sdxl-vae-fp16-fix", "tiny": "madebyollin/taesdxl"}
LICENCES = {
    BASE: "CreativeML Open RAIL++-M",
    VAES["kl"]: "MIT",
    VAES["tiny"]: "MIT",
    DMD2: "CC BY-NC-SA 4.0: no commercial use",
    SAFETY: "none stated there; it is a part of Stable Diffusion 1, CreativeML OpenRAIL-M",
}
STUDENTS = {4: "dmd2_sdxl_4step_unet_fp16.safetensors", 1: "dmd2_sdxl_1step_unet_fp16.bin"}
TIMESTEPS = {4: [999, 749, 499, 249], 1: [399]}
LORA = "dmd2_sdxl_4step_lora_fp16.safetensors"
OFFICIAL = "https://huggingface.co"
AGAIN = "run this again, it goes on where it stopped"


@dataclass(eq=False)
class File:
    """A file that is wanted, and what is known of it."""

    repository: str
    path: str
    """in the repository"""
    target: str
    """in the folder that is made"""
    commit: str = ""
    size: int | None = None
    """bytes"""
    sha256: str | None = None
    """what it must be: the hub's word for large files, that of an older `dmd2.json` for small ones"""
    git_id: str | None = None
    """what it must be, for small files: git's name for the content"""
    in_xet: bool = False
    """the hub has it in its chunk store, too"""
    there: Path | None = None
    """where its content was found on this machine, checked"""
    served: str = ""
    """sha256 of what the hub serves, known once the content is here"""

    @property
    def name(self) -> str:
        return f"{self.repository}/{self.path}"

    @property
    def is_pickle(self) -> bool:
        return self.path.endswith(".bin")

    @property
    def is_converted(self) -> bool:
        """What was found is not the pickle, but the safetensors file made from it."""
        return self.is_pickle and self.there is not None and self.there.suffix == ".safetensors"

    def sha256_if_right(self, path: Path) -> str | None:
        """The sha256 of `path`, or None if that is not this file's content."""
        if not path.is_file() or self.size not in (None, path.stat().st_size):
            return None
        found = sha256_file(path)
        right = self.sha256 in (None, found) and (self.git_id is None or self.git_id == _git_id(path))
        return found if right else None


@dataclass
class Folder:
    """A folder of weights that is to hold exactly `files`."""

    path: Path
    files: list[File]
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
    """What an SDXL folder needs. The first of `vaes` becomes `vae`, which pipelines load; a second is `vae_NAME`."""
    files = []
    for suffix in ("", "_2"):
        encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
        files.append(File(BASE, f"{encoder}/config.json", f"{encoder}/config.json"))
        files.append(File(BASE, f"{encoder}/model.fp16.safetensors", f"{encoder}/model.safetensors"))
        for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"):
            files.append(File(BASE, f"{tokenizer}/{name}", f"{tokenizer}/{name}"))
    for number, vae in enumerate(vaes):
        folder = "vae" if number == 0 else f"vae_{vae}"
        files += [File(VAES[vae], name, f"{folder}/{name}") for name in ("config.json", UNET_FILE)]
    for step, folder in unet_folders(steps).items():
        files.append(File(BASE, "unet/config.json", f"{folder}/config.json"))
        files.append(File(DMD2, STUDENTS[step], f"{folder}/{UNET_FILE}"))
    return files + ([File(DMD2, LORA, f"lora/{LORA}")] if lora else [])


def unet_folders(steps: Sequence[int]) -> dict[int, str]:
    """Number of steps → subfolder. One of them is always `unet`, which plain diffusers loads."""
    return {n: "unet" if n == max(steps) else f"unet_{n}step" for n in sorted(set(steps), reverse=True)}


def download(
    dest: Path,
    *,
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
        steps: of the students: 1, 4 or both.
        vaes: "kl", "tiny" or both; see `sdxl_files`.
        revisions: repository → branch, tag or commit; others are taken as recorded, the first time at `main`.
        update: take what the hub serves now, whatever is recorded.
        say: prints a line.

    Raises:
        UserError: in one line, whatever goes wrong; the folders are then as they were.
    """
    dest = dest.expanduser().resolve()
    folders = [Folder(dest, sdxl_files(steps, vaes, lora))]
    if safety:
        names = (
            "config.json",
            "preprocessor_config.json",
            "model.safetensors",
        )  # what dmd2/inference/safety.py loads
        folders.append(Folder(dest.with_name("safety"), [File(SAFETY, name, name) for name in names]))
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
    with _plain_errors(str(dest.parent)), _lock(dest.parent):
        for folder in folders:
            folder.old = _existing(folder)
            for repository in dict.fromkeys(file.repository for file in folder.files):
                commit = _look_up(folder, repository, (revisions or {}).get(repository), update)
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


def _look_up(folder: Folder, repository: str, asked: str | None, update: bool) -> str:
    """Asks the hub what it has of one repository, fills in the files and returns the commit.

    Raises:
        UserError: the hub does not know them, or serves something else than what is recorded.
    """
    known = folder.old.sources.get(repository) if folder.old and not update else None
    revision = asked or (known.revision if known else constants.DEFAULT_REVISION)
    api = HfApi(library_name="dmd2", library_version=__version__)
    listing: dict[str, RepoFile] = {}
    offline = constants.is_offline_mode()
    with _plain_errors(repository):
        try:
            if offline:
                commit = api.resolve_revision(repository, revision=revision, local_files_only=True).resolved
            else:
                info = api.model_info(repository, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
                commit = str(info.sha)
                tree = api.list_repo_tree(repository, recursive=True, revision=commit)
                listing = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        except RevisionResolutionError:
            raise UserError(f"{repository}: offline (HF_HUB_OFFLINE), and {revision} is not in the cache") from None
        except RevisionNotFoundError:
            raise UserError(f"{repository}: the hub knows no revision {revision}") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{constants.ENDPOINT}: does not answer like a hub; check HF_ENDPOINT") from error
    if known and commit != known.revision:
        raise UserError(
            f"{repository}: {revision} is now {commit}, recorded is {known.revision}; --update takes the new one"
        )
    for file in (file for file in folder.files if file.repository == repository):
        file.commit = commit
        file.sha256 = known.files.get(file.path) if known else None
        if offline:
            continue
        if file.path not in listing:
            raise UserError(f"{repository}: has no {file.path} at {commit}")
        entry = listing[file.path]
        file.size, file.in_xet = entry.size, entry.xet_hash is not None
        if entry.lfs is None:
            file.git_id = entry.blob_id
        elif file.sha256 in (None, entry.lfs.sha256):
            file.sha256 = entry.lfs.sha256
        else:
            raise UserError(_other_bytes(file, entry.lfs.sha256))
    return commit


def _other_bytes(file: File, served: str) -> str:
    return (
        f"{file.name}: the hub serves sha256 {served} at {file.commit}, recorded is {file.sha256}; "
        "--update takes the new one"
    )


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
            _link_or_copy(file.there, temporary, link=folder.path in file.there.parents)
        return
    part = folder.part(file)
    if file.size is not None and _size(part) > file.size:
        part.unlink()
    with part.open("ab") as stream, _plain_errors(file.name):
        bar.set_description(file.path, refresh=False)
        _load(file, stream, bar)
        stream.flush()
        os.fsync(stream.fileno())
    bar.set_description(f"checking {file.path}", refresh=sys.stderr.isatty())
    sha256 = file.sha256_if_right(part)
    if sha256 is None:
        found = sha256_file(part)
        as_listed = file.git_id is not None and file.git_id == _git_id(part)
        part.unlink()
        if as_listed:  # so it is the record that differs
            raise UserError(_other_bytes(file, found))
        expected = f"sha256 {file.sha256}" if file.sha256 else f"git id {file.git_id}"
        raise UserError(f"{file.name}: came damaged: sha256 {found}, expected {expected}; {AGAIN}")
    part.replace(raw)
    file.served = sha256


def _load(file: File, stream: BinaryIO, bar: Any) -> None:
    """Appends what `stream` lacks, from Xet where the hub offers that and hf_xet is installed, else over HTTP."""
    url = hf_hub_url(file.repository, file.path, revision=file.commit)
    headers = build_hf_headers(library_name="dmd2", library_version=__version__)
    start = stream.tell()
    if start == file.size:
        return
    xet = None
    if file.in_xet and not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet"):
        xet = get_hf_file_metadata(url, headers=headers, retry_on_errors=True).xet_file_data
    if xet is None:
        headers["Accept-Encoding"] = "identity"  # a compressed answer cannot begin in the middle
        own_bar = cast(Any, functools.partial(_FileBar, bar, start))
        http_get(url, stream, resume_size=start, headers=headers, expected_size=file.size, tqdm_class=own_bar)
        return
    hf_xet = importlib.import_module("hf_xet")
    try:  # huggingface_hub begins a Xet file anew each time; a stream can begin anywhere
        with hf_xet.XetSession().new_download_stream_group(
            token_refresh_url=xet.refresh_route,
            token_refresh_headers=headers,
            custom_headers={k: v for k, v in headers.items() if k.lower() != "authorization"},
        ) as group:
            for block in group.download_stream(hf_xet.XetFileInfo(xet.file_hash, file.size), start=start):
                stream.write(block)
                bar.update(len(block))
        if stream.tell() != file.size:  # hf_xet takes some refusals for the end of the file
            raise ConnectionError(f"ended after {stream.tell()} of {file.size} bytes")
    except (RuntimeError, ConnectionError) as error:
        raise UserError(f"{file.name}: Xet: {_first(error)}; {AGAIN}; or try HF_HUB_DISABLE_XET=1") from error


class _FileBar:
    """What huggingface_hub takes for one file's progress bar: it moves the bar of the whole download."""

    def __init__(self, bar: Any, counted: int, *, initial: int = 0, **_: object) -> None:
        self.update = bar.update
        self.update(initial - counted)  # not 0 if the server could not begin in the middle

    def __enter__(self) -> _FileBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass


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
    students = {}
    if BASE in sources:
        for step, subfolder in unet_folders(steps).items():
            students[step] = Student(subfolder=subfolder, timesteps=TIMESTEPS[step])
            name, unet = f"{DMD2}/{STUDENTS[step]}", staging / subfolder
            with _plain_errors(name), safe_open(unet / UNET_FILE, "pt") as opened:
                shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
            _check_unet(shapes, unet / "config.json", name)
        save_pipeline_configs(staging, "epsilon")
        for name in ("model_index.json", "scheduler/scheduler_config.json"):
            sums[name] = sha256_file(staging / name)
    for path in sorted(staging.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif not path.is_dir() and path.relative_to(staging).as_posix() not in sums:
            path.unlink()
    manifest = Manifest(
        name="dmd2-sdxl" if students else SAFETY.partition("/")[2],
        family="sdxl" if students else "safety checker",
        native_size=(1024, 1024) if students else (224, 224),
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
        raise UserError(f"{file.name}: torch.load with weights_only=True refuses it: {_first(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file.name}: expected tensors by name")
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    with atomic_path(target) as temporary:
        # One entry: safetensors writes several in a random order, and the same pickle should give the same bytes.
        save_file(tensors, temporary, metadata={"sha256_of_pickle": file.served})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    pickled.unlink()


def _check_unet(shapes: Mapping[str, Sequence[int]], config: Path, name: str) -> None:
    """Raises UserError unless these are the tensors of the UNet that `config` describes."""
    from diffusers import UNet2DConditionModel

    unet = build_network(UNet2DConditionModel, config)
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


def _git_id(path: Path) -> str:
    """Git's name for a file's content. For small files: it is read whole."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def _made_from(path: Path) -> str | None:
    """The sha256 of the pickle that `_convert` made this file from; None if it is none of those, or damaged."""
    try:
        with safe_open(path, "pt") as opened:
            return (opened.metadata() or {}).get("sha256_of_pickle")
    except (OSError, SafetensorError):
        return None


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    try:
        if link:
            os.link(source, target)
            return
    except OSError as error:
        if error.errno not in (
            errno.EPERM,
            errno.ENOTSUP,
            errno.EMLINK,
            errno.EXDEV,
        ):  # file systems that have no links
            raise
    shutil.copyfile(source, target)


def _first(error: BaseException) -> str:
    """An error in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


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


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Whatever the hub, the network or the disk raises becomes a `UserError` that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        response = error.response
        if response.status_code in (401, 403, 404):
            code = response.status_code
            hub, asked = constants.ENDPOINT, response.request.url
            if code == 404 and hub != OFFICIAL:  # a mirror: no token would help
                hint = f"{hub} has no {asked.path}; check HF_ENDPOINT, or unset it for {OFFICIAL}"
            else:
                hint = "there is none, or it wants a token (HF_TOKEN)"
            raise UserError(f"{what}: the hub answers {code}: {hint}") from error
        wait = response.headers.get("Retry-After", "")
        when = f"in {wait} seconds" if wait.isdigit() else "later"
        reason = f"{response.status_code} {response.reason_phrase}"
        raise UserError(f"{what}: the hub answers {reason}; {when}, {AGAIN}") from error
    except httpx2.HTTPError as error:
        raise UserError(
            f"{what}: {constants.ENDPOINT}: {_first(error)}; check the network, HF_ENDPOINT and proxies, then {AGAIN}"
        ) from error
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(f"{what}: the disk is full; make room, then {AGAIN}") from error
        where = getattr(error, "filename", None) or what
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or _first(error)}") from error
