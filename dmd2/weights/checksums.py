"""Files checked against their SHA-256 while others are being loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dmd2.runtime.errors import WeightsError
from dmd2.runtime.files import only_shapes, sha256_file


@contextmanager
def verifying(
    folder: Path, sums: Mapping[str, str], source: str, subfolders: Iterable[str] | None = None
) -> Iterator[Callable[[str | None], None]]:
    """Hashes files in threads of their own: it takes about a second a gigabyte.

    Args:
        folder: where they are.
        sums: path relative to the folder → SHA-256.
        source: of the sums, for error messages.
        subfolders: whose files are to be checked, the first ones first; None for all.

    Gives a function that waits for the files of one subfolder (None: for all) and raises UserError for the first of
    them that is missing or differs, with both checksums. Within `shapes_alone` nothing is checked.
    """
    if only_shapes():
        yield lambda subfolder: None
        return
    order = {name: place for place, name in enumerate(subfolders or ())}
    listed = [name for name in sums if subfolders is None or _subfolder(name) in order]
    listed.sort(key=lambda name: order.get(_subfolder(name), 0))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "sha256") as pool:
        found = {name: pool.submit(sha256_file, folder / name) for name in listed}

        def check(subfolder: str | None) -> None:
            for name in listed:
                if subfolder is None or _subfolder(name) == subfolder:
                    _compare(folder / name, sums[name], found[name], source)

        try:
            yield check
        finally:
            pool.shutdown(cancel_futures=True)


def _subfolder(name: str) -> str:
    return name.split("/")[0]


def _compare(path: Path, expected: str, hashed: Future[str], source: str) -> None:
    try:
        found = hashed.result()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise WeightsError(f"missing; {source} lists it with sha256 {expected}", path) from None
    if found != expected:
        told = f"sha256 is {found}, but {source} says {expected}: the file is damaged or was changed"
        raise WeightsError(told, path)
