"""What strangers wrote is quoted briefly, wherever it comes back."""

from __future__ import annotations

import ast
import asyncio
import io
import logging
import re
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.runtime.errors import (
    MOST,
    MOST_TRACE,
    BriefFormatter,
    DataError,
    InvalidInput,
    UserError,
    WeightsError,
    one_line,
    told_briefly,
)
from dmd2.runtime.paths import ROOT
from dmd2.service.cog.bridge import begun, in_this_context


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(st.characters(categories=None), max_size=50), st.integers(1, 100))
def test_a_message_is_one_short_line_that_can_be_written(text: str, times: int) -> None:
    message = str(UserError(text * times))
    assert len(message) <= MOST and message.isprintable()
    message.encode("utf-8")  # lone surrogates cannot be


def test_a_message_keeps_what_it_begins_and_ends_with() -> None:
    message = str(UserError(f"LoRA: {'x' * 9_000_000}; expected a file"))
    assert message.startswith("LoRA: xxx") and " … " in message and message.endswith("xx; expected a file")
    assert len(message) == MOST
    short = "seed: -1; expected 0 to 4294967295"
    assert str(UserError(short)) == short == one_line(short)


def test_errors_of_others_are_brief_at_the_edge() -> None:
    for error in (ValueError("short"), UserError("short"), KeyError("short")):
        with pytest.raises(type(error)) as found, told_briefly():
            raise error
        assert found.value is error
    for error in (KeyError("k" * 9_000_000), RuntimeError("two\nlines"), OSError(2, "x" * 9_000_000)):
        with pytest.raises(RuntimeError, match=f"^{type(error).__name__}: ") as found, told_briefly():
            raise error
        assert len(str(found.value)) <= MOST and str(found.value).isprintable()


async def items(count: int) -> AsyncGenerator[int, None]:
    for i in range(count):
        yield i
    raise KeyError("k" * 9_000_000)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_cog_is_told_is_brief(count: int) -> None:
    """Whether it comes before the first output or after it."""

    async def main() -> list[int]:
        found: Iterator[int] = in_this_context(await begun(items(count)))
        got: list[int] = []
        await asyncio.to_thread(lambda: got.extend(found))
        return got

    with pytest.raises(RuntimeError, match=r"^KeyError: 'kkk") as error:
        asyncio.run(main())
    assert len(str(error.value)) <= MOST


def test_log_lines_are_brief() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(BriefFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("LoRA %s: skipped", "k\n" * 9_000_000)
    line = stream.getvalue()
    assert line.startswith("WARNING LoRA k k") and line.endswith(": skipped\n") and len(line) < MOST + 20
    assert line.count("\n") == 1
    try:
        raise KeyError("k" * 9_000_000)
    except KeyError:
        logger.exception("failed")
    assert len(stream.getvalue()) < len(line) + MOST_TRACE + 100 and "Traceback" in stream.getvalue()


def test_an_invalid_input_knows_its_field_and_takes_the_name_that_the_edge_gives_it() -> None:
    error = InvalidInput("num_outputs", "expected 1 to 4", 9)
    assert (error.field, str(error)) == ("num_outputs", "num_outputs 9: expected 1 to 4")
    assert str(error.named("--num-outputs")) == "--num-outputs 9: expected 1 to 4"
    assert str(InvalidInput("prompt", "empty")) == "prompt: empty"


def test_errors_about_files_say_which() -> None:
    for kind in (WeightsError, DataError):
        error = kind("missing", Path("a/b"))
        assert (error.path, str(error)) == (Path("a/b"), "a/b: missing") and isinstance(error, UserError)
        assert (kind("none").path, str(kind("none"))) == (None, "none")


def test_the_library_names_no_flags() -> None:
    """Flags belong to the command line: elsewhere an error names a field, and whoever shows it knows the flag."""
    edges = ("cli", "training", "service")
    for file in (ROOT / "dmd2").rglob("*.py"):
        if file.relative_to(ROOT / "dmd2").parts[0] in edges or file.name == "engine.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                assert not [t for t in texts if re.match(r"-{1,2}[a-z][a-z-]* ?\Z|-{1,2}[a-z][a-z-]*[: ]", t)], file
