"""Who is served next: a bounded queue before a model, as a state machine without threads, event loop or HTTP.

Who finds the queue full is told when to come back and is kept a place for that time, so that nobody who comes later
can take it. Its clock is injected, so the code that serves is the code that a simulation runs.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

SHARE = 4
"""while both wait, one of so many that are let in is bulk"""
LONGEST_WAIT = 300
"""seconds that anybody is told to wait"""
GRACE = 5.0
"""seconds for which a place is kept for somebody who was told to come back"""
SPREAD = 2
"""those told to come back are this many times as far apart as the rate would allow: the rest is the newcomers'"""
REMEMBERED = 64
"""departures that the rate is measured over, and promises that the part of those who return is"""
MOST_PROMISED = 10_000
"""of each class, that a place is kept for"""


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


@dataclass(eq=False)
class _Promise:
    """To somebody who was refused."""

    turn: float
    """in the order of refusals, on the admission's clock"""
    who: Hashable
    due: float
    """when to come back: whole seconds after the refusal, at the turn or within a second after it"""


class _Promises:
    """Those of one class, of which `most` may wait."""

    def __init__(self, most: int) -> None:
        self._most = max(1, most)
        self._order: list[_Promise] = []
        self._of: dict[Hashable, list[_Promise]] = {}
        self._last = -math.inf  # turn
        self._kept_by = 1.0  # the part of those who were told lately that came

    def __len__(self) -> int:
        return len(self._order)

    def places(self, until: float) -> int:
        """How many are kept for those who are due until then: half of all, at most."""
        return min(max(1, self._most // 2), bisect_right(self._order, until, key=_due))

    def claimed(self, who: Hashable, now: float) -> _Promise | None:
        """The promise that somebody who comes now has, if it is due."""
        first = self._of.get(who, [None])[0]
        return first if first is not None and first.due <= now else None

    def next_turn(self, earliest: float, apart: float) -> float:
        """When one more may come back: after those who were refused before and will come, each so many seconds
        `apart`, and no more than `most` in a second, in which all of them may come at once."""
        return max(earliest, self._last + max(apart, 1 / self._most) * self._kept_by)

    def rank(self, promise: _Promise) -> int:
        """How many were refused before."""
        return sum(other.turn < promise.turn for other in self._order)

    def add(self, who: Hashable, turn: float, due: float) -> None:
        """Nothing where there are too many, or too many of one name."""
        if len(self) < MOST_PROMISED and len(self._of.get(who, ())) < self._most:
            self._last = turn
            self._insert(_Promise(turn, who, due))

    def keep(self, promise: _Promise) -> None:
        """Somebody came when told to."""
        self._remove(promise)
        self._kept_by += (1 - self._kept_by) / REMEMBERED

    def put_off(self, promise: _Promise, due: float) -> None:
        """As `keep`, and another time is promised."""
        self.keep(promise)
        promise.due = due
        self._insert(promise)

    def expire(self, now: float) -> None:
        """Forgets those who did not come."""
        while self._order and self._order[0].due + GRACE < now:
            self._remove(self._order[0])
            self._kept_by = max(1 / REMEMBERED, self._kept_by - self._kept_by / REMEMBERED)

    def _insert(self, promise: _Promise) -> None:
        insort(self._order, promise, key=_due)
        insort(self._of.setdefault(promise.who, []), promise, key=_due)

    def _remove(self, promise: _Promise) -> None:
        i = bisect_left(self._order, promise.due, key=_due)
        while self._order[i] is not promise:
            i += 1
        del self._order[i]
        own = self._of[promise.who]
        own.remove(promise)
        if not own:
            del self._of[promise.who]


def _due(promise: _Promise) -> float:
    return promise.due


class Admission:
    """Lets in requests of at most `slots` images together; at most `waiting` more requests wait.

    Each class is let in by order of arrival. Interactive requests go before bulk ones, which get every `SHARE`-th
    turn and at most half of the queue. Nobody is overtaken within a class; who costs more than `slots` runs alone.

    Who is refused and gave a name is promised a place from the moment told to them, for `GRACE` seconds: then they
    are let in even where `waiting` wait already, up to twice as many. They are told to come in the order of their
    refusals, but for less than a second. Half of the queue, at most, is kept free for them; the rest, and an idle
    device, are for whoever comes first.

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
        self._before: float | None = None  # seconds an image, until the device was idle last
        self._promises = {False: _Promises(waiting), True: _Promises(waiting // 2)}  # by `bulk`
        self.running = 0
        """images"""
        self.draining = False

    @property
    def waiting(self) -> int:
        """requests"""
        return sum(map(len, self._queues.values()))

    def offer(
        self,
        cost: int = 1,
        bulk: bool = False,
        timeout: float = math.inf,
        who: Callable[[], Hashable] | None = None,
    ) -> Ticket:
        """A place at the end of the queue for `cost` images that are of no use after `timeout` seconds.

        Args:
            who: the name by which somebody who comes back is known; asked only where it matters. None: nobody is.

        Raises:
            Full: there is none.
            Draining: nor will there be.
        """
        if self.draining:
            raise Draining
        now = self._clock()
        self._drop(now)
        promises = self._promises[bulk]
        for each in self._promises.values():
            each.expire(now)
        promise = promises.claimed(who(), now) if who is not None and len(promises) else None
        if self._is_full(bulk, now, promise is not None) and (self.waiting or not self._fits(cost)):
            raise Full(self._refuse(cost, bulk, now, who, promise))
        if promise is not None:
            promises.keep(promise)
        if not self.running and not self.waiting:  # idle until now
            self._before = self.seconds_each()
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
        """Seconds an image, over the last departures; None: nothing was measured yet.

        They leave by the batch, so that the first few say little: what was measured before makes them up to `slots`.
        """
        done = sum(cost for _, cost in self._left)
        if not done:
            return self._before
        seconds = (self._clock() if self.running else self._left[-1][0]) - self._left[0][0]
        if self._before is not None and done < self._slots:
            return (seconds + self._before * (self._slots - done)) / self._slots
        return seconds / done

    def _is_full(self, bulk: bool, now: float, promised: bool) -> bool:
        """Whether all places are taken or kept, or those of bulk requests."""
        most, kept = self._most, {False: 0, True: 0}
        if promised:
            most *= 2
        elif any(map(len, self._promises.values())):
            until = now + self._ahead()
            kept = {kind: promises.places(until) for kind, promises in self._promises.items()}
        if bulk and len(self._queues[True]) + kept[True] >= most // 2:
            return True
        return self.waiting + sum(kept.values()) >= most

    def _ahead(self) -> float:
        """Seconds until those who wait now are let in."""
        each = self.seconds_each() or 0.0
        return each * (sum(ticket.cost for queue in self._queues.values() for ticket in queue) or self.running)

    def _refuse(
        self, cost: int, bulk: bool, now: float, who: Callable[[], Hashable] | None, promise: _Promise | None
    ) -> int:
        """Whole seconds after which to come back, which is promised."""
        each, promises = self.seconds_each(), self._promises[bulk]
        apart = (each or 0.0) * cost * SPREAD * (SHARE if bulk and self._queues[False] else 1)
        if promise is None:
            turn = promises.next_turn(now + self._ahead(), apart)
        else:  # the device is slower than it was, or nothing was measured yet
            turn = now + (self._ahead() / 2 if each else now - self._left[0][0]) + promises.rank(promise) * apart
        wait = min(LONGEST_WAIT, max(1, math.ceil(turn - now)))
        if promise is not None:
            promises.put_off(promise, now + wait)
        elif who is not None and turn <= now + wait:
            promises.add(who(), turn, now + wait)
        return wait

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
