"""A queue in order of arrival before a server that has none. Knows nothing of HTTP; lives in one event loop."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from collections import deque
from collections.abc import Callable

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.25
"""seconds between attempts at a server that says it is full"""
LONGEST_WAIT = 300
"""seconds that anybody is told to wait"""


class Full(Exception):
    """The queue is full."""


class Gate:
    """Lets `slots` requests in at once; at most `waiting` more wait, in order of arrival.

    The server behind has the last word: who is refused there goes back to the place in the queue that they had, and
    until somebody leaves, the first in the queue tries again now and then, alone.

    Args:
        clock: seconds; the event loop's pauses do not follow it.
    """

    def __init__(self, slots: int, waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots, self._most, self._clock = slots, waiting, clock
        self._numbers = itertools.count()
        self._queue: list[tuple[int, asyncio.Future[None]]] = []
        self._refusals = 0  # in a row, since somebody left
        self._retry: asyncio.TimerHandle | None = None
        self._left: deque[float] = deque(maxlen=64)  # when; the first entry is when work began
        self.inside = 0

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def check(self) -> None:
        """Raises `Full` if `enter` would."""
        if self.waiting >= self._most and (self._queue or self.inside >= self._slots):
            raise Full

    async def enter(self) -> int:
        """Waits for a place, and gives its number. Whoever has one must `leave`.

        Raises:
            Full: too many wait.
        """
        self.check()
        if not self.inside and not self._queue:  # idle until now: no rate to go by
            self._left.clear()
            self._left.append(self._clock())
        number = next(self._numbers)
        await self._wait(number)
        return number

    async def again(self, number: int) -> None:
        """Gives up a place that the server refused, and waits for another, ahead of all who came later."""
        self.inside -= 1
        self._refusals += 1
        self._pause()
        await self._wait(number)

    def leave(self) -> None:
        """Gives up a place after the server has answered."""
        self.inside -= 1
        self._left.append(self._clock())
        self._refusals = 0
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._admit()

    def retry_after(self) -> int:
        """Whole seconds after which those who wait now will be inside, by the rate at which others left lately."""
        if not self._left:
            return 1
        seconds = (self._clock() - self._left[0]) / max(1, len(self._left) - 1)
        return min(LONGEST_WAIT, max(1, math.ceil(seconds * max(1, self.waiting))))

    async def _wait(self, number: int) -> None:
        future = asyncio.get_running_loop().create_future()
        entry = (number, future)
        bisect.insort(self._queue, entry, key=lambda other: other[0])
        self._admit()
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # let in and gone at the same moment
                self.inside -= 1
            elif entry in self._queue:
                self._queue.remove(entry)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._retry is None and self._queue and self.inside < self._slots:
            _, future = self._queue.pop(0)
            if future.cancelled():  # its owner is about to notice
                continue
            self.inside += 1
            future.set_result(None)
            if self._refusals:
                self._pause()

    def _pause(self) -> None:
        if self._retry is None:
            seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._refusals - 1, 10))
            self._retry = asyncio.get_running_loop().call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._retry = None
        self._admit()
