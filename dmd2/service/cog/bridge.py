"""Turns an async generator into a plain one that another thread may iterate.

Cog 0.23 collects an async generator's outputs and hands them over only when all are there; those of a plain generator
it hands over one by one, and it iterates one that a coroutine returns in a thread of its own. So a predictor that
generates for many clients at once and streams is a coroutine that returns a plain generator.

The price: once the first item is out, Cog has nothing left that it could cancel. The other images of a request,
which share a batch if that has room for them, are generated even if nobody waits for them any more.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import TypeVar

from dmd2.runtime.errors import told_briefly

T = TypeVar("T")


async def begun(items: AsyncGenerator[T, None]) -> Iterator[T]:
    """Waits for the first item, then returns a plain generator of all of them, whose `next` waits for the others.

    `items` goes on in the running event loop, so that generator must be iterated in another thread. Until the first
    item is there, cancelling this coroutine closes `items`; after that, closing the generator does.
    """
    try:
        with told_briefly():
            first = await anext(items)
    except StopAsyncIteration:
        return iter(())
    loop = asyncio.get_running_loop()
    arrived: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    async def forward() -> None:
        try:
            async for item in items:
                arrived.put((item, None))
        finally:
            await items.aclose()

    def ended(task: asyncio.Task[None]) -> None:  # also if it was cancelled before it began
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        arrived.put((None, error or StopAsyncIteration()))  # it is raised in the other thread

    task = loop.create_task(forward())
    task.add_done_callback(ended)

    def generator() -> Generator[T, None, None]:
        try:
            yield first
            while True:
                item, error = arrived.get()
                if isinstance(error, StopAsyncIteration):
                    return
                if error is not None:
                    raise error
                assert item is not None
                yield item
        finally:
            loop.call_soon_threadsafe(task.cancel)

    return generator()


def in_this_context(items: Iterator[T]) -> Iterator[T]:
    """`items`, each made in the context of this call, by which Cog knows whose log and metrics they are.

    Their errors are told briefly, because they are what the client is told.
    """
    context = contextvars.copy_context()

    def generator() -> Generator[T, None, None]:
        end = object()
        while True:
            with told_briefly():
                item = context.run(next, items, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    return generator()
