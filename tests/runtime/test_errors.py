"""What strangers wrote is quoted briefly, wherever it comes back."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncGenerator, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.runtime.errors import MOST, MOST_TRACE, BriefFormatter, UserError, one_line, told_briefly
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
