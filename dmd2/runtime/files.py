"""Files that are either whole or not there: write beside the target, flush to disk, rename over it."""

import codecs
import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from dmd2.runtime.errors import InvalidInput, UserError, shown

MOST_JSON = 16_000_000
"""bytes of a JSON file that is read, at most"""
_SHAPES_ALONE = ContextVar("shapes alone", default=False)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it networks are what their `config.json` describes, and files of weights need not be there."""
    token = _SHAPES_ALONE.set(True)
    try:
        yield
    finally:
        _SHAPES_ALONE.reset(token)


def only_shapes() -> bool:
    """Whether this is called within `shapes_alone`."""
    return _SHAPES_ALONE.get()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well, what it wrote there becomes `path`.

    The block must create the file and close it. If it raises, `path` keeps its old content and the
    temporary file is removed; if the process is killed, `path` keeps its old content and a hidden `*.tmp`
    file may stay behind. As the temporary name ends in `.tmp`, a half-written file never matches
    `*.safetensors` or the like; a library that guesses the format from the suffix must be told it.

    Raises:
        OSError: the folder does not exist, `path` is a folder, the block made no file, the disk is full, ...
    """
    # 40 characters are at most 160 bytes: the name stays within the usual limit of 255.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell; a read-only folder has a second one here
            temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def atomic_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` with `content`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def atomic_text(path: Path, content: str) -> None:
    """Replace the content of `path` with `content` in UTF-8, whole or not at all."""
    atomic_bytes(path, content.encode())


def expect_place(path: Path, name: str) -> None:
    """Makes the folder of a file that is going to be written, so that long work does not fail at its end.

    Args:
        name: the field that says so, such as "out".

    Raises:
        UserError: `path` is a folder, its folder cannot be made, or nothing can be written there.
    """
    if path.is_dir():
        raise InvalidInput(name, "is a folder; expected the name of a file", shown(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidInput(name, f"cannot be written ({error.strerror})", shown(path)) from error


def read_bounded(file: Path | bytes, most: int, name: str) -> bytes:
    """The content of a file, or what was its content already, of at most so many bytes. `name`: for messages.

    Raises:
        UserError: no such file, or a larger one.
    """
    if isinstance(file, Path):
        try:
            with file.open("rb") as opened:
                file = opened.read(most + 1)
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(file) > most:
        raise UserError(f"{name}: larger than {most // 1_000_000} MB; expected a smaller file")
    return file


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file (UTF-8, with or without a byte-order mark).

    Raises:
        UserError: no such file, larger than `MOST_JSON`, no JSON or nested too deeply, or no object.
    """
    data = read_bounded(path, MOST_JSON, shown(path, 500))
    try:
        content = json.loads(data.decode("utf-8-sig"), parse_int=_int)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected a JSON object") from None
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({shown(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


def _int(digits: str) -> int:
    """Reads an integer of a JSON file. Refuses those too large for a float."""
    if len(digits) > 100:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def text_of(data: bytes, path: Path) -> str:
    """The content of a text file in UTF-8, with or without a byte-order mark, or in UTF-16 with one (Windows').

    Raises:
        UserError: it is no such text.
    """
    try:
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text in UTF-8 ({error.reason} at byte {error.start})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 lower-case hex digits. Reads in blocks: any size will do."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Make a rename in this folder survive a power cut, where the file system can."""
    try:
        _flush(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
