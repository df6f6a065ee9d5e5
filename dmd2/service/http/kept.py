"""Images that are answered with a URL: in memory, for a stated time, within a bound."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _File:
    data: bytes
    kind: str
    until: float


class Kept:
    """Files by names that nobody can guess. The oldest go when there are too many bytes.

    Args:
        seconds: how long each is kept, unless there are too many.
        most: bytes of all.
    """

    def __init__(
        self, seconds: float = 3600.0, most: int = 256_000_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self._most, self._clock = seconds, most, clock
        self._files: OrderedDict[str, _File] = OrderedDict()
        self.bytes = 0

    def put(self, data: bytes, form: str) -> str:
        """The name of a new file. `form`: png, jpeg or webp."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._files[name] = _File(data, f"image/{form}", self._clock() + self.seconds)
        self.bytes += len(data)
        self._clean()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Content and media type; None once it is gone."""
        self._clean()
        file = self._files.get(name)
        return None if file is None else (file.data, file.kind)

    def _clean(self) -> None:
        now = self._clock()
        while self._files and (self.bytes > self._most or next(iter(self._files.values())).until <= now):
            self.bytes -= len(self._files.popitem(last=False)[1].data)
