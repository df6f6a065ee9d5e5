"""LoRAs by what users call them: a path, a name in the weights' own folder, a URL, a repository of the hub."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx2  # huggingface_hub's own client, whose errors it lets through

from dmd2.errors import UserError, shown
from dmd2.fileio import atomic_path, sha256_file
from dmd2.guard import SILENCE, Guard, Patience
from dmd2.lora import LARGEST_SCALE, Lora, read_lora

GUARD = Guard(most_bytes=1_000_000_000, seconds=300)
KEPT_FILES = 10_000_000_000
"""bytes of downloads in the cache, at most"""
KEPT_LORAS = 4
"""in memory, at most"""
MOST_AT_ONCE = 5
READ_AT_ONCE = 4
"""by all threads: a file is as large in memory as on the disk"""
MOST_LISTED = 20_000
"""files of a repository"""

EXPECTED = "expected an https URL, a repository of the Hugging Face hub (owner/name or owner/name/file.safetensors)"


@dataclass
class LoraFiles:
    """Finds LoRAs, fetches and remembers them. For several threads.

    A URL is fetched once: for another file, use another URL. The hub is asked for the newest commit each time.

    Args:
        folder: of weights; a plain name is a file in its `lora`.
        cache: for downloads; the oldest go when there are too many.
        paths: whether any file of this machine may be named. Not for strangers.
        token: for the hub; None is the user's own (HF_TOKEN), False none.
        guard: limits of what is fetched: bytes of each file, seconds for all files of one call.
    """

    folder: Path
    cache: Path
    paths: bool = False
    token: str | bool | None = False
    guard: Guard = GUARD
    _read: OrderedDict[tuple[Path, int, int], Lora] = field(default_factory=OrderedDict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _readers: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(READ_AT_ONCE), init=False)

    def find(self, source: str, patience: Patience | None = None) -> Lora:
        """One LoRA.

        Raises:
            UserError: it cannot be found, fetched or read, or is none; it took longer than `patience` lasts.
        """
        patience = patience or Patience(self.guard.seconds)
        name = "data URL" if source[:5].lower() == "data:" else shown(re.split(r"[?#]", source)[0])
        if re.match(r"https?://", source, re.IGNORECASE):
            return self._load(self._fetched(source, patience), name)
        if name == "data URL":
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / "lora"
                with path.open("wb") as file:
                    self.guard.fetch(source, file, "LoRA")
                return self._read_file(path, name)
        own = self.folder / "lora" / (source if source.endswith(".safetensors") else f"{source}.safetensors")
        if re.fullmatch(r"\w[\w.-]*", source) and _is_file(own):
            return self._load(own, name)
        if self.paths and _is_file(Path(os.path.expanduser(source))):  # noqa: PTH111  # which raises at "~nobody"
            return self._load(Path(source).expanduser(), name)
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w./-]+\.safetensors))?", source)
        if match is None or ".." in source:
            here = sorted(path.stem for path in (self.folder / "lora").glob("*.safetensors"))
            names = f", or one of these weights' own: {', '.join(here)}" if here else ""
            raise UserError(f"LoRA {shown(source)}: {EXPECTED}{', a file' if self.paths else ''}{names}")
        return self._load(self._from_hub(match[1], match[2], patience), name)

    def find_all(
        self, text: str, scale: float = 1.0, gone: threading.Event | None = None
    ) -> tuple[tuple[Lora, float], ...]:
        """LoRAs and scales of "SOURCE[:SCALE] SOURCE[:SCALE] …"; `scale` is that of all that name none.

        Args:
            gone: set, from another thread, once nobody waits for them: downloads end then.

        Raises:
            UserError: as `find`; too many, a scale out of bounds.
        """
        found = [split_scale(part, scale) for part in text.split()]
        if len(found) > MOST_AT_ONCE:
            raise UserError(f"LoRA: {len(found)} at once; expected at most {MOST_AT_ONCE}")
        patience = Patience(self.guard.seconds, gone)
        return tuple((self.find(source, patience), own) for source, own in found)

    def _load(self, path: Path, name: str) -> Lora:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"LoRA {name}: {error.strerror}") from error
        key = (path, status.st_mtime_ns, status.st_size)
        with self._lock:
            if key in self._read:
                self._read.move_to_end(key)
                return self._read[key]
        lora = self._read_file(path, name)
        with self._lock:
            self._read[key] = lora
            while len(self._read) > KEPT_LORAS:
                self._read.popitem(last=False)
        return lora

    def _read_file(self, path: Path, name: str) -> Lora:
        with self._readers:
            return read_lora(path, name)

    def _fetched(self, url: str, patience: Patience) -> Path:
        path = self._place(url)
        if not path.is_file():
            with self._room(), atomic_path(path) as temporary, temporary.open("wb") as file:
                self.guard.fetch(url, file, "LoRA", patience)
        return path

    def _from_hub(self, repository: str, filename: str | None, patience: Patience) -> Path:
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented

        what = f"LoRA {shown(repository)}"
        try:
            api = HfApi(token=self.token)
            commit = str(api.model_info(repository, timeout=SILENCE).sha)
            tree = _patiently(api.list_repo_tree(repository, recursive=True, revision=commit), what, patience)
            files = {e.path: e for e in tree if isinstance(e, RepoFile) and e.path.endswith(".safetensors")}
            filename = filename or _only(what, sorted(files))
            if filename not in files:
                raise UserError(
                    f"{what}: has no {shown(filename)}; expected one of {', '.join(sorted(files)) or 'none'}"
                )
            size, lfs = files[filename].size, files[filename].lfs
            if size > self.guard.most_bytes:
                raise UserError(f"{what}: {filename}: larger than {self.guard.most_bytes / 1e6:.0f} MB")
            path = self._place(f"{repository}@{commit}/{filename}")
            if not path.is_file():
                url = hf_hub_url(repository, filename, revision=commit)
                headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"}
                with self._room(), atomic_path(path) as temporary:
                    with temporary.open("wb") as file:
                        _download(url, file, headers, size, what, patience)
                    if lfs is not None and sha256_file(temporary) != lfs.sha256:
                        raise UserError(f"{what}: {filename}: came damaged; try again")
            return path
        except HFValidationError as error:
            raise UserError(f"{what}: is no name of a repository; {EXPECTED}") from error
        except HfHubHTTPError as error:
            code = error.response.status_code
            raise UserError(f"{what}: the hub answers {code}; expected a public repository with a LoRA") from error
        except (OSError, httpx2.HTTPError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{what}: {reason}; check the network, HF_ENDPOINT and HF_HUB_OFFLINE") from error

    def _place(self, key: str) -> Path:
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _room(self) -> _Room:
        self.cache.mkdir(parents=True, exist_ok=True)
        return _Room(self.cache)


class _Room:
    """After a download: the oldest files go until what is left is within `KEPT_FILES`."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        files = sorted(self._cache.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > KEPT_FILES:
                path.unlink(missing_ok=True)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be read
        return False


def _patiently(entries: Iterable[Any], what: str, patience: Patience) -> Iterator[Any]:
    for count, entry in enumerate(entries):
        if count >= MOST_LISTED:
            raise UserError(f"{what}: more than {MOST_LISTED} files; expected a repository of a LoRA")
        patience.left(what)
        yield entry


def _download(url: str, file: BinaryIO, headers: Mapping[str, str], size: int, what: str, patience: Patience) -> None:
    """From the hub. Its own client's function asks nobody before 10 MB have come whether to go on."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]  # documented

    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # of each read: that long it may take until `patience` is asked
    got = 0
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for block in response.iter_raw():
            patience.left(what)
            got += len(block)
            if got > size:
                break
            file.write(block)
    if got != size:
        raise UserError(f"{what}: came cut or too long; try again")


def split_scale(text: str, scale: float = 1.0) -> tuple[str, float]:
    """ "SOURCE:0.8" → SOURCE, 0.8; without a scale, `scale`.

    Raises:
        UserError: the scale is out of bounds.
    """
    match = re.fullmatch(r"(.*[^:/]):(-?\d+(?:\.\d*)?|-?\.\d+)", text)
    if match and not re.fullmatch(r"https?://[^/]*", match[1]):
        text, scale = match[1], float(match[2])
    if not abs(scale) <= LARGEST_SCALE:
        raise UserError(f"LoRA {shown(text)}: scale {scale}; expected {-LARGEST_SCALE:g} to {LARGEST_SCALE:g}")
    return text, scale


def _only(what: str, names: list[str]) -> str:
    usual = "pytorch_lora_weights.safetensors"
    if usual in names:
        return usual
    if len(names) != 1:
        told = ", ".join(names[:5]) or "none"
        raise UserError(f"{what}: has {len(names)} safetensors files ({told}); expected owner/name/file.safetensors")
    return names[0]


def cache_folder(environ: Any = os.environ) -> Path:
    """Where LoRAs are kept: `loras` in `$DMD2_CACHE` (`~/.cache/dmd2`)."""
    return Path(environ.get("DMD2_CACHE") or "~/.cache/dmd2").expanduser() / "loras"
