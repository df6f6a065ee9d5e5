"""Files of the Hugging Face hub: what they must be, resumable downloads, errors in one line."""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import httpx2  # huggingface_hub's own client, whose errors it lets through
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError, RevisionResolutionError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not "exported"
from safetensors import SafetensorError

from dmd2 import __version__
from dmd2.runtime.errors import UserError, first_line
from dmd2.runtime.files import sha256_file
from dmd2.weights.manifest import Source

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
        right = self.sha256 in (None, found) and (self.git_id is None or self.git_id == git_id(path))
        return found if right else None


def look_up(repository: str, files: Iterable[File], known: Source | None, asked: str | None) -> str:
    """Asks the hub what it has of one repository, fills in the files and returns the commit.

    Args:
        known: what was recorded at an earlier download, and must not change.
        asked: a branch, tag or commit; None for what is recorded, the first time `main`.

    Raises:
        UserError: the hub does not know them, or serves something else than what is recorded.
    """
    revision = asked or (known.revision if known else constants.DEFAULT_REVISION)
    api = HfApi(library_name="dmd2", library_version=__version__)
    listing: dict[str, RepoFile] = {}
    offline = constants.is_offline_mode()
    with plain_errors(repository):
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
            f"{repository}: {revision} is now {commit}, recorded is {known.revision}; `update` takes the new one"
        )
    for file in files:
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
            raise UserError(other_bytes(file, entry.lfs.sha256))
    return commit


def other_bytes(file: File, served: str) -> str:
    return (
        f"{file.name}: the hub serves sha256 {served} at {file.commit}, recorded is {file.sha256}; "
        "`update` takes the new one"
    )


def load(file: File, stream: BinaryIO, bar: Any) -> None:
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
        raise UserError(f"{file.name}: Xet: {first_line(error)}; {AGAIN}; or try HF_HUB_DISABLE_XET=1") from error


class _FileBar:
    """What huggingface_hub takes for one file's progress bar: it moves the bar of the whole download."""

    def __init__(self, bar: Any, counted: int, *, initial: int = 0, **_: object) -> None:
        self.update = bar.update
        self.update(initial - counted)  # not 0 if the server could not begin in the middle

    def __enter__(self) -> _FileBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def git_id(path: Path) -> str:
    """Git's name for a file's content. For small files: it is read whole."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


@contextmanager
def plain_errors(what: str) -> Iterator[None]:
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
        hint = f"check the network, HF_ENDPOINT and proxies, then {AGAIN}"
        raise UserError(f"{what}: {constants.ENDPOINT}: {first_line(error)}; {hint}") from error
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(f"{what}: the disk is full; make room, then {AGAIN}") from error
        where = getattr(error, "filename", None) or what
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or first_line(error)}") from error
