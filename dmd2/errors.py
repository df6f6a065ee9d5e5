"""Errors meant for the user's eyes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """Bad input. The message is one clear line saying what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """


def shown(text: object, most: int = 200) -> str:
    """What a file or a stranger says, for a message: printable, on one line, `most` characters at most."""
    start = str(text)[: most + 1]
    line = "".join(c if c.isprintable() else " " for c in start)
    return line if len(line) <= most else line[: most - 1] + "…"


def first_error(error: ValidationError) -> str:
    """The first of pydantic's complaints, as part of a line: "FIELD: what is wrong"."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where, what = shown(".".join(map(str, first["loc"]))), shown(first["msg"])
    return f"{where}: {what}" if where else what.removeprefix("Value error, ")
