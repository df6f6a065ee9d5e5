"""Unpacks weights from a tar, on this machine or over http(s), once, into a cache."""

from __future__ import annotations

import hashlib
import logging
import lzma
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Self

from dmd2.runtime.errors import UserError, first_line, shown
from dmd2.runtime.files import sha256_file

SILENCE = 60.0
"""seconds without a byte after which a download has failed"""
MOST_MEMBERS = 10_000
"""files and folders in a tar, at most"""
MOST_DEPTH = 32
"""folders within one another, at most"""

MOST_HEADER = 1_000_000
"""bytes of a member's name and attributes, at most"""

_EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # of POSIX, Solaris and GNU
_DAMAGED = (EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, ValueError, OverflowError, RecursionError)

logger = logging.getLogger(__name__)


def is_url(source: str) -> bool:
    return re.match(r"https?://", source) is not None


def unpacked(source: str, cache: Path, marker: str, check: Callable[[Path], None]) -> Path:
    """The folder that a tar holds, unpacked at the first call and found in the cache ever after.

    A local tar is known by its content. One at a URL is known by the URL: for new weights, use a new URL.

    Args:
        source: path or http(s) URL of a tar; gzip, bzip2 and xz will do.
        cache: where unpacked folders lie. A process that is killed may leave a hidden folder there.
        marker: a file that the wanted folder has. The folder is the tar's top or the only one at its top.
        check: raises UserError if a folder is not what it should be; such a one is not kept.

    Raises:
        UserError: a bad answer, none, or one that was cut; no tar, or a dangerous one; no room. Nothing stays behind.
    """
    name = _without_secrets(source) if is_url(source) else source
    try:
        key = hashlib.sha256(source.encode()).hexdigest() if is_url(source) else sha256_file(Path(source))
        folder = cache / key
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".") as temporary:
            tar = Path(source)
            if is_url(source):
                tar = Path(temporary) / "tar"
                logger.info("downloading %s", name)
                download_file(source, tar)
            top = Path(temporary) / "unpacked"
            _unpack(tar, name, top)
            if not (top / marker).is_file():
                inner = [path.parent for path in top.glob(f"*/{marker}")]
                if len(inner) != 1:
                    raise UserError(f"{name}: has no {marker} at its top or in one folder there")
                top = inner[0]
            try:
                check(top)
            except UserError as error:  # says where in the tar, not where it was unpacked to for a moment
                raise UserError(f"{name}: {str(error).replace(f'{top}/', '')}") from None
            try:
                top.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        return folder
    except UserError:
        raise
    except _DAMAGED as error:
        raise UserError(f"{name}: no tar, or a damaged one: {shown(str(error).partition(':')[0])}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be unpacked into {cache}: {shown(error, 500)}") from error


def _without_secrets(url: str) -> str:
    """A URL for messages: without its password and query, which may be a signature."""
    return re.sub(r"//[^/@]*@", "//", re.split(r"[?#]", url)[0])


def download_file(url: str, path: Path, advance: Callable[[int, int], object] = lambda done, size: None) -> None:
    """Writes what the server sends; httpx2 itself raises if it is less than Content-Length promised.

    Args:
        advance: is told after each block how many bytes have come, and how many will; the latter is 0 if unknown.

    Raises:
        UserError: a bad answer, none, or one that was cut. What has come by then stays at `path`.
    """
    import httpx2

    name = _without_secrets(url)
    timeout = httpx2.Timeout(SILENCE, connect=10.0)
    plain = {"Accept-Encoding": "identity"}
    try:
        with httpx2.stream("GET", url, headers=plain, timeout=timeout, follow_redirects=True) as response:
            if response.status_code != httpx2.codes.OK:
                raise UserError(f"{name}: the server answered {response.status_code} {response.reason_phrase}")
            size = int(response.headers.get("Content-Length", 0))
            _check_room(name, size, shutil.disk_usage(path.parent).free)
            with path.open("wb") as file:
                for block in response.iter_raw():
                    file.write(block)
                    advance(response.num_bytes_downloaded, size)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise UserError(f"{name}: the download failed: {first_line(error)}") from error


class _WholeTar(tarfile.TarInfo):
    """A tar's end is two blocks of zeros. tarfile takes a header that is cut or damaged for the end, too."""

    @classmethod
    def frombuf(cls, *args: Any) -> Self:
        header = super().frombuf(*args)
        if header.type in _EXTENDED and header.size > MOST_HEADER:  # is read into memory
            raise tarfile.ReadError("a header of more than 1 MB")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error) or "cut") from error


def _unpack(tar: Path, name: str, folder: Path) -> None:
    """Files and folders only, and only below `folder`, as far as the disk has room."""
    folder.mkdir()
    size, members, free = 0, 0, shutil.disk_usage(folder).free
    # Python 3.11.3 and older know no filter. What it refuses is refused below too.
    safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(tar, tarinfo=_WholeTar) as archive:
        for member in archive:
            path, members = PurePosixPath(member.name), members + 1
            refused = f"{name}: {shown(member.name)}: refused, because"
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"{refused} it leads out of the folder")
            if not (member.isfile() or member.isdir()):
                raise UserError(f"{refused} it is neither a file nor a folder")
            if len(path.parts) > MOST_DEPTH:
                raise UserError(f"{refused} it lies {len(path.parts)} folders deep; expected at most {MOST_DEPTH}")
            if members > MOST_MEMBERS:
                raise UserError(f"{name}: more than {MOST_MEMBERS} files and folders; expected fewer")
            size += member.size
            _check_room(name, size, free)
            archive.extract(member, folder, set_attrs=False, **safely)  # modes and owners are our own


def _check_room(name: str, size: int, free: int) -> None:
    """Raises UserError if there is less room than needed. Both in bytes."""
    if size > free:
        raise UserError(
            f"{name}: needs {size / 1e9:.1f} GB or more, but the cache's disk has {free / 1e9:.1f} GB free"
        )
