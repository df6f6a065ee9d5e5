"""Kills at chosen points, for what must go on after them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Killed(BaseException):
    """Ends a process at a given point."""


def killer(point: int | None, out: Path) -> Callable[[Path | None], None]:
    """What is called at each event and raises `Killed` at the `point`-th (None: never).

    Of the file that was being written a half then lies in `out`.
    """
    left = [point]

    def event(path: Path | None = None) -> None:
        if left[0] == 0:
            if path is not None:
                (out / f".{path.name[:40]}.0123abcd.tmp").write_bytes(b"half")
            raise Killed
        left[0] = None if left[0] is None else left[0] - 1

    return event
