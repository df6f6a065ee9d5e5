"""Bulk: a file of requests → shards of images. Each row exactly once, whatever is killed; any shard is made alone."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

from dmd2.data.prompts import parquet_file, parquet_of
from dmd2.data.shards import Index, Part, make_files
from dmd2.inference.request import ImageRequest
from dmd2.runtime.errors import InvalidInput, UserError, first_line, shown
from dmd2.runtime.files import atomic_path, read_bounded, sha256_file, text_of
from dmd2.service.images import OutputImage

MOST_BYTES = 4 * 10**9
"""of the file of requests"""
MOST_OUTPUTS = 4
"""images of one row: the step between rows' seeds"""
SUFFIXES = (".txt", ".jsonl", ".parquet")
Format = Literal["webdataset", "parquet"]
Generate = Callable[[Iterable[tuple[int, ImageRequest]]], Iterator[tuple[int, "Sequence[OutputImage] | Exception"]]]
"""`ImageService.generate_all`"""

logger = logging.getLogger(__name__)


def row_seed(row: int) -> int:
    """The seed of a row that names none. No two images of a file have the same, as image i of a row adds i."""
    return row * MOST_OUTPUTS % 2**32


class Requests:
    """The rows of a file: a line of text is a prompt; one of JSON, or a row of Parquet, has fields of `ImageRequest`.

    Blank lines are no rows. A field that is null is not given.

    Args:
        defaults: fields of whatever row does not give them.

    Raises:
        UserError: the file cannot be read, has no rows, or columns that are no fields.
    """

    def __init__(self, path: Path, defaults: Mapping[str, Any]) -> None:
        self.path, self.defaults = path, {k: v for k, v in defaults.items() if v is not None}
        ImageRequest(prompt="checks the defaults", **self.defaults)
        kind = path.suffix.lower()
        if kind not in SUFFIXES:
            raise InvalidInput("prompts", f"expected a file that ends in {', '.join(SUFFIXES)}", shown(path))
        self._table: Any = None
        self._lines: list[str] = []
        try:
            if kind == ".parquet":
                self._table = _table(path)
            else:
                lines = text_of(read_bounded(path, MOST_BYTES, shown(path, 300)), path).split("\n")
                self._lines = [line.strip() for line in lines if line.strip()]
            self.sha256 = sha256_file(path)
        except OSError as error:
            raise InvalidInput("prompts", f"cannot be read ({error.strerror})", shown(path)) from error
        except UserError as error:
            raise InvalidInput("prompts", str(error)) from error
        self._read = json.loads if kind == ".jsonl" else lambda line: line
        if not len(self):
            raise InvalidInput("prompts", "is empty; expected one request a row", shown(path))

    def __len__(self) -> int:
        return len(self._lines) if self._table is None else self._table.num_rows

    def __getitem__(self, row: int) -> ImageRequest:
        """Raises UserError: this row is no request; names it and the field."""
        try:
            request = ImageRequest(**self.defaults | self._fields(row))
        except UserError as error:
            raise UserError(f"row {row}: {error}") from None
        return request if request.seed is not None else request.model_copy(update={"seed": row_seed(row)})

    def _fields(self, row: int) -> dict[str, Any]:
        if self._table is not None:
            entry = self._table.slice(row, 1).to_pylist()[0]
        else:
            try:
                entry = self._read(self._lines[row])
            except (ValueError, RecursionError) as error:
                raise UserError(f"no JSON ({shown(first_line(error))})") from None
        if isinstance(entry, str):
            return {"prompt": entry}
        if not isinstance(entry, dict):
            raise UserError(f"of type {type(entry).__name__}; expected a text or an object")
        given = {str(name): value for name, value in entry.items() if value is not None}
        if "prompt" not in given:
            raise InvalidInput("prompt", "missing; expected what to generate")
        return given


def _table(path: Path) -> Any:
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: larger than {MOST_BYTES // 10**9} GB; expected a smaller file")
    with parquet_file(path) as file:
        names = file.schema_arrow.names
        for name in names:
            if name not in ImageRequest.model_fields:
                valid = ", ".join(ImageRequest.model_fields)
                raise UserError(f"{path}: column {shown(name, 50)}: expected some of {valid}")
        if "prompt" not in names:
            raise UserError(f"{path}: has no column prompt")
        return file.read()


class _Shard(Protocol):
    """A file that is being written, a row at a time. Its bytes depend on the rows alone."""

    def add(self, facts: dict[str, Any], images: list[bytes], ending: str) -> None: ...

    def close(self) -> None: ...


class _Tar:
    """A WebDataset: `000000007.webp` (or .0.webp, .1.webp, … of a row with several) and `000000007.json`."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  # closed by `close`

    def add(self, facts: dict[str, Any], images: list[bytes], ending: str) -> None:
        key = f"{facts['row']:09d}"
        for place, image in enumerate(images):
            self._file(f"{key}.{ending}" if len(images) == 1 else f"{key}.{place}.{ending}", image)
        self._file(f"{key}.json", json.dumps(facts, ensure_ascii=False).encode())

    def _file(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # of no time and nobody: the same file each time
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self._tar.close()


class _Parquet:
    """Columns row, prompt, seed, width, height, num_inference_steps, images, error, and all of the facts as JSON."""

    def __init__(self, path: Path) -> None:
        parquet = parquet_of(path)
        import pyarrow

        whole = dict.fromkeys(("row", "seed", "width", "height", "num_inference_steps"), pyarrow.int64())
        texts = dict.fromkeys(("prompt", "error", "facts"), pyarrow.string())
        self._schema = pyarrow.schema({**whole, **texts, "images": pyarrow.list_(pyarrow.binary())})
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._table, self._rows = pyarrow.Table.from_pylist, list[dict[str, Any]]()

    def add(self, facts: dict[str, Any], images: list[bytes], ending: str) -> None:
        known = {name: facts.get(name) for name in self._schema.names}
        self._rows.append(known | {"images": images, "facts": json.dumps(facts, ensure_ascii=False)})
        if len(self._rows) == 64:  # bounds the memory
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._table(self._rows, schema=self._schema))
            self._rows.clear()

    def close(self) -> None:
        self._flush()
        self._writer.close()


def bulk_index(requests: Requests, made: Mapping[str, Any], format: Format, shard: int) -> Index:
    """The index of all that the requests make.

    Args:
        made: what images depend on besides the requests, such as the weights' checksums.
        shard: rows in each file but the last.
    """
    defaults = {name: str(value) if isinstance(value, Path) else value for name, value in requests.defaults.items()}
    return Index(
        kind="images",
        count=len(requests),
        shard=shard,
        columns={},
        made={"requests": requests.sha256, "defaults": defaults, **made},
        ending="tar" if format == "webdataset" else "parquet",
    )


def make_images(
    requests: Requests,
    out: Path,
    index: Index,
    generate: Generate,
    *,
    part: Part | None = None,
    retry: bool = False,
    only: Sequence[str] | None = None,
) -> Index:
    """Makes the shards of `part` that `out` lacks; see `dmd2.data.shards.make_files`.

    A row that cannot be generated is in its shard with its error and without images.
    """

    def write(path: Path, rows: range, done: Callable[[int], object]) -> int:
        failed = 0
        kind: Callable[[Path], _Shard] = _Tar if index.ending == "tar" else _Parquet
        with atomic_path(path) as temporary, closing(kind(temporary)) as file:
            for row, request, images in _generated(requests, rows, generate):
                facts: dict[str, Any] = {"row": row, **_said(request)}
                if isinstance(images, Exception):
                    failed += 1
                    facts["error"] = _why(row, images)
                    logger.error("%s", facts["error"])
                    images = []
                else:
                    first = images[0]
                    facts |= {"width": first.size[0], "height": first.size[1], "num_inference_steps": first.steps}
                contents = [image.data for image in images if image.data is not None]
                file.add(facts, contents, "" if request is None else request.output_format)
                done(1)
        return failed

    return make_files(out, index, write, part=part, retry=retry, only=only)


def _generated(
    requests: Requests, rows: range, generate: Generate
) -> Iterator[tuple[int, ImageRequest | None, Sequence[OutputImage] | Exception]]:
    """Those first that are no requests, then those that share batches side by side."""
    valid: dict[int, ImageRequest] = {}
    for row in rows:
        try:
            valid[row] = requests[row]
        except UserError as error:
            yield row, None, error
    for row, images in generate(sorted(valid.items(), key=lambda item: _alike(item[1]))):
        withheld = not isinstance(images, Exception) and any(image.data is None for image in images)
        yield row, valid[row], UserError("withheld by the safety checker") if withheld else images


def _alike(request: ImageRequest) -> str:
    """The same for requests that may share a batch."""
    own = {"prompt", "negative_prompt", "seed", "num_outputs", "output_format", "output_quality", "guidance_scale"}
    return repr([(k, v) for k, v in request if k not in own and not isinstance(v, bytes)])


def _said(request: ImageRequest | None) -> dict[str, Any]:
    """What a row asked for, but for files' contents."""
    said = {} if request is None else request.model_dump(exclude_defaults=True)
    return {k: str(v) if isinstance(v, Path) else v for k, v in said.items() if not isinstance(v, bytes)}


def _why(row: int, error: Exception) -> str:
    text = shown(error, 400) if isinstance(error, UserError) else f"{type(error).__name__}: {shown(error, 400)}"
    return text if text.startswith(f"row {row}: ") else f"row {row}: {text}"
