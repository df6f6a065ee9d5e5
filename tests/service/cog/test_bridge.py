"""Async on one side, a thread on the other: items arrive one by one, errors arrive, nothing is left running."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Iterator

import pytest

from dmd2.service.cog.bridge import begun, in_this_context


class Source:
    """Yields 0, 1, 2, each only once it is released."""

    def __init__(self, error: Exception | None = None) -> None:
        self.release = asyncio.Semaphore(0)
        self.error, self.closed = error, False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for i in range(3):
                await self.release.acquire()
                yield i
            if self.error:
                raise self.error
        finally:
            self.closed = True


def test_items_arrive_one_by_one_in_another_thread() -> None:
    async def main() -> None:
        source = Source()
        source.release.release()
        items = await begun(source.items())
        assert await asyncio.to_thread(next, items) == 0
        later = asyncio.create_task(asyncio.to_thread(next, items))
        await asyncio.sleep(0.05)
        assert not later.done()
        source.release.release()
        assert await later == 1
        source.release.release()
        assert await asyncio.to_thread(list, items) == [2]
        await asyncio.sleep(0)
        assert source.closed

    asyncio.run(main())


def test_a_task_that_is_cancelled_before_it_begins_keeps_no_thread_waiting() -> None:
    """As when the loop ends: a worker whose thread waits for ever never ends."""
    got: list[BaseException] = []

    def iterate(items: Iterator[int]) -> None:
        try:
            list(items)
        except asyncio.CancelledError as error:
            got.append(error)

    async def main() -> None:
        source = Source()
        source.release.release()
        items = await begun(source.items())
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        thread = threading.Thread(target=iterate, args=(items,), daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, 120)
        assert not thread.is_alive() and len(got) == 1

    asyncio.run(main())


def test_cancelled_while_it_waits_for_the_first_item_it_closes_the_source() -> None:
    async def main() -> None:
        source = Source()
        waiting = asyncio.create_task(begun(source.items()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert source.closed

    asyncio.run(main())


def test_a_generator_that_is_closed_early_closes_the_source() -> None:
    async def main() -> None:
        source = Source()
        source.release.release()
        items = await begun(source.items())
        assert await asyncio.to_thread(next, items) == 0
        await asyncio.to_thread(items.close)  # type: ignore[attr-defined]
        for _ in range(100):
            if source.closed:
                break
            await asyncio.sleep(0.01)
        assert source.closed
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_errors_arrive_where_the_items_do() -> None:
    async def main() -> None:
        source = Source(ValueError("no more"))
        for _ in range(3):
            source.release.release()
        items = await begun(source.items())
        with pytest.raises(ValueError, match="no more"):
            await asyncio.to_thread(list, items)

        async def wrong() -> AsyncGenerator[int, None]:
            raise KeyError("at once")
            yield 0

        with pytest.raises(KeyError, match="at once"):
            await begun(wrong())

        async def nothing() -> AsyncGenerator[int, None]:
            for i in ():
                yield i

        assert list(await begun(nothing())) == []

    asyncio.run(main())


def test_steps_run_in_the_context_of_the_call() -> None:
    whose = contextvars.ContextVar("whose", default="nobody")

    def items() -> Iterator[str]:
        for _ in range(3):
            yield whose.get()
            whose.set(whose.get() + "!")

    whose.set("mine")
    bound = in_this_context(items())
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(bound))
    thread.start()
    thread.join()
    assert found == ["mine", "mine!", "mine!!"]
    assert whose.get() == "mine"
