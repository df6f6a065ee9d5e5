"""Errors meant for the user's eyes, and how much of what strangers wrote they may hold.

UserError (a ValueError)    bad input, of whatever kind
  · InvalidInput            of one field: the command line says which flag that is, a service answers 422
  · WeightsError            weights are missing, damaged or not what they say
  · DataError               so are images, pairs or captions
  · TrainingDiverged        a run no longer learns
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


MOST = 500
"""characters of a message: Cog loses a slot for good to one of some megabytes"""
MOST_TRACE = 20_000
"""characters of a traceback in the log"""


class UserError(ValueError):
    """Bad input. The message is one clear line saying what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 2. Whatever it is made from, it is one line
    of `MOST` characters at most.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class InvalidInput(UserError):
    """What a caller gave for `field` is not valid: "FIELD: message", or "FIELD given: message" if that is told."""

    def __init__(self, field: str, message: str, given: object = None) -> None:
        self.field = field
        super().__init__(f"{field}: {message}" if given is None else f"{field} {given}: {message}")

    def named(self, name: str) -> UserError:
        """The same, with the name that the field has for whoever is told."""
        return UserError(name + str(self).removeprefix(self.field))


class _AtPath(UserError):
    """What is wrong with a file or folder: "PATH: message"."""

    def __init__(self, message: str, path: Path | str | None = None) -> None:
        self.path = path
        super().__init__(message if path is None else f"{path}: {message}")


class WeightsError(_AtPath):
    """Weights are missing, damaged or not what they say."""


class DataError(_AtPath):
    """Training data, references or pairs are missing, damaged or not what they say."""


class TrainingDiverged(UserError):
    """A run that no longer learns. What it had learned until its last checkpoint is kept."""


def one_line(text: object, most: int = MOST) -> str:
    """A text as one printable line. What is too long loses its middle: the end says what would be valid."""
    text = str(text)
    if len(text) > most:
        end = most // 3
        text = f"{text[: most - end - 3]} … {text[-end:]}"
    return "".join(c if c.isprintable() else " " for c in text)


@contextmanager
def told_briefly() -> Iterator[None]:
    """At the edge, where errors become answers: whatever is raised within has a message of one line, not too long."""
    try:
        yield
    except Exception as error:
        brief = one_line(error)
        if brief == str(error):
            raise
        raise RuntimeError(one_line(f"{type(error).__name__}: {brief}")) from None


class BriefFormatter(logging.Formatter):
    """Log lines with the same limit; tracebacks with their own."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = one_line(record.getMessage()), None
        text = super().format(record)
        return text if len(text) <= MOST_TRACE else f"{text[: MOST_TRACE // 2]}\n…\n{text[-MOST_TRACE // 2 :]}"


def shown(text: object, most: int = 200) -> str:
    """What a file or a stranger says, for a message: printable, on one line, its first `most` characters at most."""
    start = str(text)[: most + 1]
    return one_line(start if len(start) <= most else start[: most - 1] + "…", most)


def first_line(error: BaseException) -> str:
    """What a library says went wrong, as part of a line; the kind of error where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


_PATTERNS: dict[str, str] = {}


def pattern(regular: str, words: str) -> str:
    """A regular expression for a field of pydantic's, whose complaints then say these words instead of it."""
    _PATTERNS[regular] = words
    return regular


def complaint(found: Mapping[str, Any]) -> str:
    """What is wrong, of one of pydantic's `errors()`."""
    words = _PATTERNS.get(found.get("ctx", {}).get("pattern", ""))
    return f"expected {words}" if words else str(found["msg"])


def first_error(error: ValidationError) -> str:
    """The first of pydantic's complaints, as part of a line: "FIELD: what is wrong"."""
    first = error.errors(include_url=False, include_input=False)[0]
    where, what = shown(".".join(map(str, first["loc"]))), shown(complaint(first))
    return f"{where}: {what}" if where else what.removeprefix("Value error, ")
