"""Prints to a terminal or pipe that may be closed at any time, without failing."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


class Terminal:
    """A text stream that drops what it cannot write, so that a closed terminal or pipe never ends a run.

    After an error its file descriptor leads to the null device, so that nothing else stumbles over it either,
    Python's own flush at the end included.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream  # None: Python was started with this stream closed
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            if self.stream is not None:
                self.stream.write(text)
                self.stream.flush()
        except (OSError, ValueError) as error:  # a broken pipe, a terminal that hung up; a closed stream
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        self.write("")

    def fileno(self) -> int:
        """For tqdm, which asks it how wide the terminal is. Raises OSError or ValueError if there is none."""
        if self.stream is None:
            raise OSError("no such stream")
        return self.stream.fileno()

    def isatty(self) -> bool:
        try:
            return os.isatty(self.fileno())
        except (OSError, ValueError, AttributeError):
            return False

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, OSError) or isinstance(error, BlockingIOError) or self.stream is None:
            return
        with suppress(OSError, ValueError, AttributeError):  # it has no descriptor: then there is nothing to mend
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def __eq__(self, other: object) -> bool:
        """All alike: output and errors share a terminal as a rule, so tqdm clears its bar before other text."""
        return isinstance(other, Terminal)

    __hash__ = object.__hash__


_hushed = False


def hush() -> None:
    """From now on `say` says nothing: another process of the same run says it."""
    global _hushed
    _hushed = True


def say(text: str) -> None:
    """Prints a line on standard output, above the progress bar. Never fails (see `Terminal`)."""
    if _hushed:
        return
    from tqdm import tqdm

    tqdm.write(text, file=Terminal(sys.stdout))


def occupy_standard_streams() -> None:
    """Opens the null device for descriptors 0 to 2 that are closed (`2>&-`): the next files would get them.

    What a library in C writes to standard error would then end up in a checkpoint.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
