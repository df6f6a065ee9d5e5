"""Downloads the published files that evaluation needs, and checks their sha256 from the second time on.

The publishers name no checksums. So the sha256 of the first download is recorded in a lock file, `assets.lock.json`
beside the files, and nothing else is accepted from then on. Keep a copy of the lock file to pin what you have used.
"""

from __future__ import annotations

import os
import shutil
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError
from tqdm import tqdm

from dmd2.runtime.errors import UserError, first_line
from dmd2.runtime.files import atomic_path, atomic_text, sha256_file
from dmd2.weights.fetch import download_file

LOCK = "assets.lock.json"
NVIDIA = "https://nvlabs-fi-cdn.nvidia.com"


@dataclass(frozen=True)
class Asset:
    """A published file."""

    path: str
    """on the server, and so the file's name"""
    licence: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


METRICS = {
    "inception": Asset(
        "stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "Inception v3 of 2015 (Szegedy et al.): Apache-2.0",
    ),
    "vgg16": Asset(
        "stylegan2-ada-pytorch/pretrained/metrics/vgg16.pt",
        "VGG-16 (Simonyan & Zisserman): CC BY 4.0; LPIPS's weights (Zhang et al.): BSD-2-Clause",
    ),
}
EDM_LICENCE = "CC BY-NC-SA 4.0: no commercial use"
EDM_SETS = ("cifar10-32x32-cond", "cifar10-32x32-uncond", "ffhq-64x64-uncond", "afhqv2-64x64-uncond")
EDM_TEACHERS = {
    name: Asset(f"edm/pretrained/edm-{name}.pkl", EDM_LICENCE)
    for name in (*(f"{data}-{kind}" for data in EDM_SETS for kind in ("vp", "ve")), "imagenet-64x64-cond-adm")
}
EDM_STATISTICS = {
    name: Asset(f"edm/fid-refs/{name}.npz", EDM_LICENCE)
    for name in ("cifar10-32x32", "ffhq-64x64", "afhqv2-64x64", "imagenet-64x64")
}


class Locked(BaseModel):
    """Source, sha256 and size of a file at its first download."""

    model_config = ConfigDict(extra="forbid")
    url: str
    """or what else it came from"""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int


class Lock(RootModel[dict[str, Locked]]):
    """`assets.lock.json`: file name → what it must be."""


def read_lock(path: Path) -> dict[str, Locked]:
    """Reads `assets.lock.json`; empty if there is none yet. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        return Lock.model_validate_json(path.read_bytes().removeprefix(BOM_UTF8)).root
    except (OSError, ValidationError) as error:
        raise UserError(f"{path}: not a lock file; expected sha256 sums by file name") from error


def obtain(
    asset: Asset,
    folder: Path,
    *,
    source: Path | None = None,
    lock: Path | None = None,
    base: str = NVIDIA,
    say: Callable[[str], object] = print,
) -> Path:
    """The asset in `folder`: what is there already, a copy of `source`, or a download; checked and whole.

    Args:
        source: a copy on this machine, instead of a download.
        lock: the lock file; `assets.lock.json` in `folder` unless given. A first download is recorded there.
        base: of the URL.
        say: prints a line.

    Raises:
        UserError: it cannot be had, or is not what the lock file says; nothing is left behind then.
    """
    lock = lock or folder / LOCK
    known = read_lock(lock)
    expected = known[asset.name].sha256 if asset.name in known else None
    target = folder / asset.name
    say(f"{asset.name}\n    licence: {asset.licence}")
    if target.is_file() and source is None:
        found = sha256_file(target)
        if expected is None:
            raise UserError(f"{target}: is there, but {lock} does not list it; use `from` {target}, or remove it")
        _expect(str(target), found, expected, lock)
        say(f"    there already, sha256 {found}")
        return target
    url = f"{base}/{asset.path}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            if source is not None:
                shutil.copyfile(source, temporary)
            else:
                _download(url, temporary, asset.name)
            found = sha256_file(temporary)
            _expect(str(source or url), found, expected, lock)
            size = temporary.stat().st_size
            if expected is None:  # before the file appears: a file that no lock lists is never there
                known[asset.name] = Locked(url=url if source is None else source.name, sha256=found, bytes=size)
                lock.parent.mkdir(parents=True, exist_ok=True)
                atomic_text(lock, Lock(dict(sorted(known.items()))).model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from error
    say(f"    {target}, {size / 1e6:.1f} MB, sha256 {found} ({'as recorded' if expected else f'recorded in {lock}'})")
    return target


def obtain_clip(repository: str, folder: Path, revision: str | None = None) -> tuple[Path, str]:
    """A CLIP model from the Hugging Face hub in `folder`, by its own client, which checks what it downloads.

    The commit is recorded in the folder and kept to, unless `revision` names another.

    Returns:
        where it is, and its commit.

    Raises:
        UserError: the hub cannot be reached or has no such model.
    """
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    target = folder / repository.replace("/", "--")
    record = target / "commit.txt"
    try:
        wanted = revision or (record.read_text().strip() if record.is_file() else "main")
        commit = str(HfApi().model_info(repository, revision=wanted).sha)
        files = ["*.json", "*.txt", "*.safetensors"]
        snapshot_download(repository, revision=commit, local_dir=target, allow_patterns=files)
        atomic_text(record, commit + "\n")
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
        raise UserError(f"{repository}: {first_line(error)}") from error
    return target, commit


def chosen(names: list[str], table: Mapping[str, Asset]) -> dict[str, Asset]:
    """The assets with these names. Raises UserError for an unknown one."""
    for name in names:
        if name not in table:
            raise UserError(f"{name}: unknown; expected one of {', '.join(table)}")
    return {name: table[name] for name in names}


def _expect(what: str, found: str, expected: str | None, lock: Path) -> None:
    if expected is not None and found != expected:
        raise UserError(f"{what}: sha256 is {found}, but {lock} says {expected}: damaged, or another file")


def _download(url: str, path: Path, name: str) -> None:
    with tqdm(desc=name, unit="B", unit_scale=True, mininterval=0.5 if os.isatty(2) else 30) as bar:

        def advance(done: int, size: int) -> None:
            bar.total = size or None
            bar.update(done - bar.n)

        download_file(url, path, advance)
