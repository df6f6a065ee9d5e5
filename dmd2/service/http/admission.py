"""Who is served next: a bounded queue before a model, as a state machine without threads, event loop or HTTP.

Its clock is injected, so the code that serves is the code that a simulation runs.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SHARE = 4
"""while both wait, one of so many that are let in is bulk"""
LONGEST_WAIT = 300
"""seconds that anybody is told to wait"""
REMEMBERED = 64
"""departures that the rate is measured over"""


class Full(Exception):
    """The queue has no room. `retry_after`: whole seconds after which it is worth to ask again."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Draining(Exception):
    """Nobody is let in any more."""


@dataclass(eq=False)
class Ticket:
    """A request's place."""

    cost: int
    """images"""
    bulk: bool
    deadline: float
    """on the admission's clock; who still waits then is never let in"""
    state: Literal["waiting", "running", "expired", "gone"] = "waiting"


class Admission:
    """Lets in requests of at most `slots` images together; at most `waiting` more requests wait.

    Each class is let in by order of arrival. Interactive requests go before bulk ones, which get every `SHARE`-th
    turn and at most half of the queue. Nobody is overtaken within a class; who costs more than `slots` runs alone.

    Use: `offer`, then `admit` whenever something changed; whoever has a ticket must `leave` with it.

    Args:
        slots: images that are generated or about to be. Two batches keep a batcher busy.
        clock: seconds.
    """

    def __init__(self, slots: int, waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots, self._most, self._clock = slots, waiting, clock
        self._queues: dict[bool, deque[Ticket]] = {False: deque(), True: deque()}  # by `bulk`
        self._since_bulk = 0
        self._left: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)  # when and how many; first: when work began
        self._each: float | None = None  # seconds an image, as last measured
        self._told = -math.inf  # when the one refused last was told to come back
        self.running = 0
        """images"""
        self.draining = False

    @property
    def waiting(self) -> int:
        """requests"""
        return sum(map(len, self._queues.values()))

    def offer(self, cost: int = 1, bulk: bool = False, timeout: float = math.inf) -> Ticket:
        """A place at the end of the queue for `cost` images that are of no use after `timeout` seconds.

        Raises:
            Full: there is none.
            Draining: nor will there be.
        """
        if self.draining:
            raise Draining
        now = self._clock()
        self._drop(now)
        most = self._most // 2 if bulk else self._most
        waiting = len(self._queues[True]) if bulk else self.waiting
        if (waiting >= most or self.waiting >= self._most) and (self.waiting or not self._fits(cost)):
            raise Full(self._refuse(cost, now))
        if not self.running and not self.waiting:  # idle until now
            self._left.clear()
            self._left.append((now, 0))
        ticket = Ticket(cost, bulk, now + timeout)
        self._queues[bulk].append(ticket)
        return ticket

    def admit(self) -> list[Ticket]:
        """Lets in whom there is room for: these are running from now on."""
        self._drop(self._clock())
        admitted = []
        while (queue := self._next()) and self._fits(queue[0].cost):
            ticket = queue.popleft()
            self._since_bulk = 0 if ticket.bulk else self._since_bulk + 1
            ticket.state = "running"
            self.running += ticket.cost
            admitted.append(ticket)
        return admitted

    def leave(self, ticket: Ticket, served: bool = True) -> None:
        """Gives up a place, whatever state it is in. `served`: its images were generated; else they say no rate."""
        if ticket.state == "running":
            self.running -= ticket.cost
            if served:
                self._left.append((self._clock(), ticket.cost))
        elif ticket.state == "waiting":
            self._queues[ticket.bulk].remove(ticket)
        ticket.state = "gone"

    def position(self, ticket: Ticket) -> int:
        """How many requests are let in before this one, if no more come, and itself; 0 once it is running."""
        if ticket.state != "waiting":
            return 0
        own, other = self._queues[ticket.bulk].index(ticket) + 1, len(self._queues[not ticket.bulk])
        first = max(0, SHARE - 1 - self._since_bulk)  # interactive ones before the next that is bulk
        if ticket.bulk:
            return own + min(other, first + (own - 1) * (SHARE - 1))
        return own + min(other, max(0, own - 1 - first) // (SHARE - 1) + (own > first))

    def seconds_each(self) -> float | None:
        """Seconds an image, over the last departures; None: nothing was measured yet."""
        done = sum(cost for _, cost in self._left)
        if done:
            end = self._clock() if self.running else self._left[-1][0]
            self._each = (end - self._left[0][0]) / done
        return self._each

    def _refuse(self, cost: int, now: float) -> int:
        """Whole seconds after which those who wait now are served, and those who were told so before."""
        each = self.seconds_each() or 0.0
        ahead = each * (sum(ticket.cost for queue in self._queues.values() for ticket in queue) or self.running)
        self._told = max(now + ahead, self._told + each * cost)
        if self._told > now + 2 * ahead:  # not all come back; nor shall one who asks too often delay the others
            self._told = now + ahead
        return min(LONGEST_WAIT, max(1, math.ceil(self._told - now)))

    def _fits(self, cost: int) -> bool:
        return not self.running or self.running + cost <= self._slots

    def _next(self) -> deque[Ticket]:
        """The queue whose turn it is."""
        bulk = bool(self._queues[True]) and (not self._queues[False] or self._since_bulk >= SHARE - 1)
        return self._queues[bulk]

    def _drop(self, now: float) -> None:
        """Takes those out who waited too long."""
        for queue in self._queues.values():
            late = [ticket for ticket in queue if ticket.deadline <= now]
            for ticket in late:
                ticket.state = "expired"
                queue.remove(ticket)
