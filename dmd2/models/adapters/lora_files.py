"""Finds LoRAs by what users call them: a path, a name in the weights' own folder, a URL, a repository of the hub."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urljoin, urlsplit

import httpx2  # huggingface_hub's own client, whose errors it lets through

from dmd2.models.adapters.lora import LARGEST_SCALE, PEFTS_FILE, SETTINGS_FILE, Lora, read_lora, settings_beside
from dmd2.runtime import paths
from dmd2.runtime.errors import UserError, first_line, shown
from dmd2.runtime.files import atomic_path, sha256_file
from dmd2.weights.guard import SILENCE, Guard, Missing, Patience

logger = logging.getLogger(__name__)

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
LARGEST_SETTINGS = 1_000_000
"""bytes of an adapter_config.json"""

HUBS = ("huggingface.co", "hf.co")
CIVITAI = ("civitai.com", "civitai.green")
EXPECTED = "expected an https URL, a repository of the Hugging Face hub (owner/name or owner/name/file.safetensors)"


@dataclass(frozen=True)
class OnHub:
    """A file or repository of the Hugging Face hub that a user named."""

    repository: str
    filename: str | None = None
    """None: the only one, or the usual one, in `folder`"""
    folder: str = ""
    revision: str | None = None


@dataclass
class LoraFiles:
    """Finds, downloads and caches LoRAs. Safe for several threads.

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
    _readers: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(READ_AT_ONCE), init=False)

    def find(self, source: str, patience: Patience | None = None) -> Lora:
        """Finds and reads one LoRA.

        Raises:
            UserError: it cannot be found, fetched or read, or is none; it took longer than `patience` lasts.
        """
        patience = patience or Patience(self.guard.seconds)
        name = "data URL" if source[:5].lower() == "data:" else shown(re.split(r"[?#]", source)[0])
        if re.match(rf"(?:{'|'.join(map(re.escape, (*HUBS, *CIVITAI)))})/", source, re.IGNORECASE):
            source = f"https://{source}"
        if re.match(r"https?://", source, re.IGNORECASE):
            try:
                urlsplit(source)
            except ValueError as error:
                raise UserError(f"LoRA {name}: is no URL ({shown(error)})") from error
            source = _of_civitai(source, name)
            on_hub = _page_of_hub(source, name)
            return self._from_hub(on_hub, patience) if on_hub else self._from_url(source, name, patience)
        if name == "data URL":
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / "lora"
                with path.open("wb") as file:
                    self.guard.fetch(source, file, "LoRA")
                return self._read_file(path, name)
        if re.fullmatch(r"\w[\w.-]*", source):
            own = self.folder / "lora" / source
            for path in (own if own.suffix == ".safetensors" else own.with_name(f"{own.name}.safetensors"), own):
                if found := _in_folder(path, name):
                    return self._load(found, name)
        if self.paths and source and (found := _in_folder(Path(os.path.expanduser(source)), name)):  # noqa: PTH111  # "~nobody"
            return self._load(found, name)
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w./-]+\.safetensors))?", source)
        if match is None or ".." in source:
            here = sorted(path.stem for path in (self.folder / "lora").glob("*.safetensors"))
            names = f", or one of these weights' own: {', '.join(here)}" if here else ""
            raise UserError(f"LoRA {shown(source)}: {EXPECTED}{', a file' if self.paths else ''}{names}")
        return self._from_hub(OnHub(match[1], match[2]), patience)

    def find_all(
        self, text: str, scale: float = 1.0, gone: threading.Event | None = None
    ) -> tuple[tuple[Lora, float], ...]:
        """Finds the LoRAs and scales of "SOURCE[:SCALE] SOURCE[:SCALE] …"; `scale` is for those that name none.

        Commas part them as spaces do (a URL has %2C for one of its own).

        Args:
            gone: set, from another thread, once nobody waits for them: downloads end then.

        Raises:
            UserError: as `find`; too many, a scale out of bounds.
        """
        found = [split_scale(part, scale) for part in split_list(text)]
        if len(found) > MOST_AT_ONCE:
            raise UserError(f"LoRA: {len(found)} at once; expected at most {MOST_AT_ONCE}")
        patience = Patience(self.guard.seconds, gone)
        return tuple((self.find(source, patience), own) for source, own in found)

    def __post_init__(self) -> None:
        self._read = lru_cache(KEPT_LORAS)(self._read_file)

    def _load(self, path: Path, name: str) -> Lora:
        return self._read(path, name, *map(_stamp, (path, *settings_beside(path))))

    def _read_file(self, path: Path, name: str, *_stamps: object) -> Lora:
        """Reads a LoRA; `_stamps` tell the cache when it has to be read again."""
        with self._readers:
            return read_lora(path, name)

    def _cached(self, place: Path, name: str, fetch: Callable[[], None]) -> Lora:
        """Reads the LoRA cached at `place`. If it is missing or cannot be read, `fetch` gets it, once."""
        if place.is_file():
            try:
                return self._load(place, name)
            except UserError as error:
                logger.warning("%s; it is fetched again", error)
                _drop(place)
        self.cache.mkdir(parents=True, exist_ok=True)
        try:
            fetch()
        finally:
            self._tidy()
        try:
            return self._load(place, name)
        except UserError:
            _drop(place)
            raise

    def _from_url(self, url: str, name: str, patience: Patience) -> Lora:
        place = self._place(url)

        def fetch() -> None:
            if urlsplit(url).path.endswith(f"/{PEFTS_FILE}"):
                settings = place.with_suffix(f".{SETTINGS_FILE}")
                query = f"?{urlsplit(url).query}" if urlsplit(url).query else ""
                try:
                    with atomic_path(settings) as temporary, temporary.open("wb") as file:
                        small = replace(self.guard, most_bytes=LARGEST_SETTINGS)
                        small.fetch(urljoin(url, SETTINGS_FILE) + query, file, f"LoRA: {SETTINGS_FILE}", patience)
                except Missing:
                    logger.info("%s: has no %s beside it", name, SETTINGS_FILE)
            with atomic_path(place) as temporary:
                with temporary.open("wb") as file:
                    self.guard.fetch(url, file, "LoRA", patience)
                with temporary.open("rb") as file:
                    if file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
                        raise UserError(
                            f"LoRA {name}: a web page is there, no safetensors (to log in, or about the file); "
                            "expected the address of the file itself, if need be with a token"
                        )

        return self._cached(place, name, fetch)

    def _from_hub(self, wanted: OnHub, patience: Patience) -> Lora:
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented

        repository = wanted.repository
        what = f"LoRA {shown(repository)}"

        def download(entry: RepoFile, target: Path) -> None:
            url = hf_hub_url(repository, entry.path, revision=commit)
            headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"}
            with atomic_path(target) as temporary:
                with temporary.open("wb") as file:
                    _download(url, file, headers, entry.size, what, patience)
                if entry.lfs is not None and sha256_file(temporary) != entry.lfs.sha256:
                    raise UserError(f"{what}: {shown(entry.path)}: came damaged; try again")

        try:
            api = HfApi(token=self.token)
            commit = str(api.model_info(repository, revision=wanted.revision, timeout=SILENCE).sha)
            tree = _patiently(api.list_repo_tree(repository, recursive=True, revision=commit), what, patience)
            files = {e.path: e for e in tree if isinstance(e, RepoFile) and e.path.startswith(wanted.folder)}
            names = sorted(name for name in files if name.endswith(".safetensors"))
            filename = wanted.filename or _only(what, names, wanted.folder)
            if filename not in names:
                there = shown(", ".join(names) or "none", 300)
                raise UserError(f"{what}: has no {shown(filename)}; expected one of {there}")
            if files[filename].size > self.guard.most_bytes:
                raise UserError(f"{what}: {shown(filename)}: larger than {self.guard.most_bytes / 1e6:.0f} MB")
            place = self._place(f"{repository}@{commit}/{filename}")
            settings = files.get(f"{filename.rpartition('/')[0]}/{SETTINGS_FILE}".lstrip("/"))

            def fetch() -> None:
                if settings is not None:
                    if settings.size > LARGEST_SETTINGS:
                        raise UserError(f"{what}: {SETTINGS_FILE}: larger than {LARGEST_SETTINGS / 1e6:.0f} MB")
                    download(settings, place.with_suffix(f".{SETTINGS_FILE}"))
                download(files[filename], place)

            return self._cached(place, f"{shown(repository)}/{shown(filename)}", fetch)
        except HFValidationError as error:
            raise UserError(f"{what}: is no name of a repository; {EXPECTED}") from error
        except HfHubHTTPError as error:
            code = error.response.status_code
            raise UserError(f"{what}: the hub answers {code}; expected a public repository with a LoRA") from error
        except (OSError, httpx2.HTTPError) as error:
            raise UserError(
                f"{what}: {first_line(error)}; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
            ) from error

    def _place(self, key: str) -> Path:
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _tidy(self) -> None:
        """Deletes the oldest cached files, until the rest is within `KEPT_FILES`."""
        files = sorted(self.cache.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > KEPT_FILES:
                _drop(path)


def _drop(place: Path) -> None:
    place.unlink(missing_ok=True)
    place.with_suffix(f".{SETTINGS_FILE}").unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int] | None:
    """A file's time of change (in ns) and size, to tell whether it changed. None: there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _in_folder(path: Path, name: str) -> Path | None:
    """The LoRA's file: `path` itself, or a folder's file of the usual name, or its only one."""
    try:
        if path.is_dir() and (files := sorted(file.name for file in path.glob("*.safetensors"))):
            return path / _only(f"LoRA {name}", files)
        return path if path.is_file() else None
    except (OSError, ValueError):  # a name too long, a folder that may not be read
        return None


def _of_civitai(url: str, name: str) -> str:
    """The address of the file that a page of CivitAI is about, if it says which. Other addresses as they are."""
    parts = urlsplit(url)
    if (parts.hostname or "").removeprefix("www.") not in CIVITAI or not parts.path.startswith("/models/"):
        return url
    version = parse_qs(parts.query).get("modelVersionId", [""])[0]
    if version.isascii() and version.isdigit():
        return f"https://{parts.hostname}/api/download/models/{version[:20]}"
    raise UserError(
        f"LoRA {name}: is a page about a LoRA; expected the address behind its download button, "
        "https://civitai.com/api/download/models/NUMBER"
    )


def _page_of_hub(url: str, name: str) -> OnHub | None:
    """What a page of the Hugging Face hub is about. None: another server, or the address of a file."""
    from huggingface_hub import constants

    parts = urlsplit(url)
    host = parts.netloc.lower().removeprefix("www.")
    if host not in (*HUBS, urlsplit(constants.ENDPOINT).netloc.lower()):
        return None
    owner, repository, kind, revision, *rest = [*map(unquote, filter(None, parts.path.split("/"))), *[""] * 4]
    path = "/".join(filter(None, rest))
    if kind == "resolve" or (host not in HUBS and kind not in ("", "blob", "tree")):
        return None
    if ".." in path or not repository or owner in ("api", "datasets", "spaces", "docs", "papers", "collections"):
        raise UserError(f"LoRA {name}: is no page of a model; {EXPECTED}")
    if not kind:
        return OnHub(f"{owner}/{repository}", parse_qs(parts.query).get("show_file_info", [None])[0])
    if kind in ("blob", "raw") and path:
        return OnHub(f"{owner}/{repository}", path, revision=revision)
    if kind == "tree" and revision:
        return OnHub(f"{owner}/{repository}", folder=f"{path}/" if path else "", revision=revision)
    raise UserError(f"LoRA {name}: is no page of a file; {EXPECTED}")


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


def split_list(text: str) -> list[str]:
    """The sources in a text, parted by spaces and commas. A data URL has a comma of its own."""
    parts = text.split()
    return [one for part in parts for one in ([part] if part[:5].lower() == "data:" else part.split(",")) if one]


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


def _only(what: str, names: list[str], folder: str = "") -> str:
    for usual in ("pytorch_lora_weights.safetensors", PEFTS_FILE):
        if folder + usual in names:
            return folder + usual
    if len(names) != 1:
        told = shown(", ".join(names[:5]) or "none")
        raise UserError(f"{what}: has {len(names)} safetensors files ({told}); expected owner/name/file.safetensors")
    return names[0]


def cache_folder(environ: Any = os.environ) -> Path:
    """The folder where LoRAs are cached: `loras` in `$DMD2_CACHE` (`~/.cache/dmd2`)."""
    return paths.cache_folder(environ) / "loras"
