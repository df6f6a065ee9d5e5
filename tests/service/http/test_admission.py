"""The queue, on a clock that tests turn by hand: bounds, order, shares, deadlines, what the refused are promised."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

import dmd2.service.http.admission as admission_module
from dmd2.service.http.admission import GRACE, LONGEST_WAIT, SHARE, SPREAD, Admission, Draining, Full, Ticket

SLOTS, WAITING = 6, 8


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Machine(RuleBasedStateMachine):
    """Requests come, are let in, leave, give up and time out in any order; a plain model keeps the books.

    Some have names, and are kept places when they were refused; the model knows between what bounds only.
    """

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.admission = Admission(SLOTS, WAITING, self.clock)
        self.queued: list[Ticket] = []
        self.inside: list[Ticket] = []
        self.interactive_in_a_row = 0
        self.named = False  # somebody with a name was refused

    @rule(
        target=tickets,
        cost=st.integers(1, 10),
        bulk=st.booleans(),
        timeout=st.sampled_from([1.0, 5.0, math.inf]),
        name=st.sampled_from([None, "a", "b", "c"]),
    )
    def offer(self, cost: int, bulk: bool, timeout: float, name: str | None) -> Ticket | None:
        self.expire()

        def room(places: int) -> bool:
            return len(self.queued) < places and (not bulk or sum(t.bulk for t in self.queued) < places // 2)

        free = not self.queued and (not self.inside or sum(t.cost for t in self.inside) + cost <= SLOTS)
        try:
            ticket = self.admission.offer(cost, bulk, timeout, None if name is None else lambda: name)
        except Full as full:
            assert not free and not room(WAITING // 4 if self.named else WAITING)
            assert 1 <= full.retry_after <= LONGEST_WAIT
            self.named = self.named or name is not None
            return None
        assert free or room(2 * WAITING if self.named else WAITING)
        self.queued.append(ticket)
        return ticket

    @rule()
    def admit(self) -> None:
        self.expire()
        for ticket in self.admission.admit():
            assert ticket in self.queued and ticket.deadline > self.clock.now
            same = [other for other in self.queued if other.bulk == ticket.bulk]
            assert same[0] is ticket, "overtaken within its class"
            assert not self.inside or sum(t.cost for t in self.inside) + ticket.cost <= SLOTS
            bulk_waits = any(other.bulk for other in self.queued)
            self.interactive_in_a_row = 0 if ticket.bulk else self.interactive_in_a_row + 1
            assert not (bulk_waits and self.interactive_in_a_row > SHARE) or ticket.bulk or not self.queued
            self.queued.remove(ticket)
            self.inside.append(ticket)
        if self.queued and not self.inside:
            raise AssertionError("somebody waits for nobody")

    @rule(ticket=consumes(tickets), served=st.booleans())
    def leave(self, ticket: Ticket | None, served: bool) -> None:
        if ticket is not None:
            self.admission.leave(ticket, served)
            for books in (self.queued, self.inside):
                if ticket in books:
                    books.remove(ticket)

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def expire(self) -> None:
        self.queued = [ticket for ticket in self.queued if ticket.deadline > self.clock.now]

    @invariant()
    def books_agree(self) -> None:
        assert self.admission.running == sum(ticket.cost for ticket in self.inside)
        assert self.admission.waiting >= len(self.queued)  # the late are taken out at the next call
        each = self.admission.seconds_each()
        assert each is None or each >= 0
        assert all(1 <= self.admission.position(t) <= self.admission.waiting for t in self.queued)
        assert all(self.admission.position(t) == 0 for t in self.inside)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


def filled(clock: Clock, waiting: int = WAITING) -> tuple[Admission, list[Ticket]]:
    """One that runs `SLOTS` images, and `waiting` of one image that wait."""
    admission = Admission(SLOTS, WAITING, clock)
    running = admission.offer(SLOTS)
    assert admission.admit() == [running]
    return admission, [running, *(admission.offer() for _ in range(waiting))]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=WAITING), st.integers(0, 5))
def test_a_position_is_how_many_are_let_in_until_then(kinds: list[bool], before: int) -> None:
    """Whatever waits, and whatever was let in before: the promise is kept if nobody else comes."""
    admission = Admission(1, 4 * WAITING, Clock())
    for _ in range(before):
        ticket = admission.offer()
        admission.admit()
        admission.leave(ticket)
    running = admission.offer()
    admission.admit()
    tickets = [admission.offer(bulk=bulk) for bulk in kinds]
    promised = {ticket: admission.position(ticket) for ticket in tickets}
    assert sorted(promised.values()) == list(range(1, len(tickets) + 1))
    for turn in range(1, len(tickets) + 1):
        admission.leave(running)
        (running,) = admission.admit()
        assert promised[running] == turn


def test_bulk_gets_its_share_and_no_more() -> None:
    admission = Admission(1, 40, Clock())
    running = admission.offer()
    admission.admit()
    waiting = [admission.offer(bulk=bulk) for bulk in [True] * 8 + [False] * 24]
    order = []
    for _ in waiting:
        admission.leave(running)
        (running,) = admission.admit()
        order.append(running.bulk)
    assert all(sum(order[i : i + SHARE]) == 1 for i in range(0, len(order), SHARE))


def test_a_flood_of_bulk_leaves_room_for_others() -> None:
    admission, _ = filled(Clock(), 0)
    for _ in range(WAITING // 2):
        admission.offer(bulk=True)
    with pytest.raises(Full):
        admission.offer(bulk=True)
    for _ in range(WAITING // 2):
        admission.offer()
    with pytest.raises(Full):
        admission.offer()


def test_the_refused_are_told_by_the_measured_rate() -> None:
    clock = Clock()
    admission = Admission(SLOTS, WAITING, clock)
    for _ in range(10):  # half a second an image
        ticket = admission.offer(2)
        admission.admit()
        clock.now += 1.0
        admission.leave(ticket)
    assert admission.seconds_each() == pytest.approx(0.5)
    admission.offer(SLOTS)
    admission.admit()
    for _ in range(WAITING):
        admission.offer(2)
    told = [refused(admission, name, cost=4) for name in range(10)]
    assert told[0] == WAITING * 2 * 0.5 and told == sorted(told)
    assert told[9] - told[0] == 9 * 4 * 0.5 * SPREAD  # not all at once, but by twice what each takes


def refused(admission: Admission, name: object, cost: int = 1) -> int:
    """What one who comes too many is told."""
    with pytest.raises(Full) as full:
        admission.offer(cost, who=lambda: name)
    return full.value.retry_after


def measured(clock: Clock) -> tuple[Admission, list[Ticket]]:
    """As `filled`, after it has measured one second an image."""
    admission = Admission(SLOTS, WAITING, clock)
    ticket = admission.offer()
    admission.admit()
    clock.now += 1.0
    admission.leave(ticket)
    running = admission.offer(SLOTS)
    admission.admit()
    return admission, [running, *(admission.offer() for _ in range(WAITING))]


def test_who_asks_too_often_delays_the_others_by_little() -> None:
    admission, _ = measured(Clock())
    for _ in range(500):
        refused(admission, "impatient")
    assert refused(admission, "patient") <= WAITING + WAITING * SPREAD
    assert len(admission._promises[False]) == WAITING + 1


def test_a_place_is_kept_from_the_time_told_and_not_for_ever() -> None:
    clock = Clock()
    admission, (running, *_) = measured(clock)
    clock.now += refused(admission, "patient")
    admission.leave(running)
    admission.admit()
    for _ in range(SLOTS - 1):  # all but one of the places that are free now
        admission.offer()
    refused(admission, "newcomer")
    admission.offer(who=lambda: "patient")
    refused(admission, "patient")  # it was for once
    clock.now += LONGEST_WAIT + GRACE
    assert admission.waiting == WAITING and admission._promises[False]._order
    refused(admission, "another")
    assert not admission._promises[False]._of.keys() & {"patient", "newcomer"}


def test_those_who_do_not_return_take_half_of_the_queue_at_most() -> None:
    clock = Clock()
    admission, tickets = measured(clock)
    for name in range(100):
        refused(admission, name)
    for ticket in tickets[1:]:
        admission.leave(ticket, served=False)
    clock.now += WAITING + GRACE
    for _ in range(WAITING // 2):
        admission.offer()
    refused(admission, "another")
    clock.now += LONGEST_WAIT + GRACE
    for _ in range(WAITING // 2):
        admission.offer()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "MOST_PROMISED", 5)
    admission = filled(Clock())[0]  # nothing is measured: all are told a time soon
    assert all(1 <= refused(admission, name) <= LONGEST_WAIT for name in range(100))
    assert len(admission._promises[False]) == len(admission._promises[False]._of) == 5


@dataclass
class Crowd:
    """Clients at a device that makes batches of `SLOTS` / 2 images, `each` seconds an image in a full one.

    Args:
        jitter: a batch takes up to so many times as long, or as short.
        latency: seconds by which a client comes later than it was told, at most.
    """

    queue: int
    each: float
    jitter: float
    latency: float
    random: random.Random

    def run(self, patient: list[float], flood: list[float], again: int) -> None:
        """Until all `patient` are served, who come back when they are told to, and ask `again` so many times; of the
        `flood` nobody comes back. Times of arrival."""
        self.clock = Clock()
        self.admission = Admission(SLOTS, self.queue, self.clock)
        ticket = self.admission.offer()
        self.admission.admit()
        self.clock.now += self.each * SLOTS / 2
        self.admission.leave(ticket)
        self.tries: Counter[tuple[int, int]] = Counter()
        self.refused: dict[tuple[int, int], float] = {}
        """in this order → when they were told to come first"""
        self._names: dict[Ticket, tuple[int, int] | None] = {}
        self._device: list[Ticket] = []
        self._busy, self._again, self._events, count = False, again, list[Any](), itertools.count()
        self.at = lambda when, what, *of: heapq.heappush(self._events, (when, next(count), what, of))
        began = self.clock.now
        for name, when in enumerate(patient):
            self.at(began + when, self._ask, (name, 0))
        for when in flood:
            self.at(began + when, self._ask, None)
        while self._events:
            self.clock.now, _, what, of = heapq.heappop(self._events)
            what(*of)

    def _ask(self, name: tuple[int, int] | None) -> None:
        if name is not None:
            self.tries[name] += 1
        try:
            ticket = self.admission.offer(who=lambda: name or object())
        except Full as full:
            if name is not None:
                when = self.clock.now + full.retry_after
                self.refused.setdefault(name, when)
                self.at(when + self.random.uniform(0, self.latency), self._ask, name)
            return
        self._names[ticket] = name
        self._go_on()

    def _go_on(self) -> None:
        self._device += self.admission.admit()
        if self._device and not self._busy:
            batch, self._device = self._device[: SLOTS // 2], self._device[SLOTS // 2 :]
            seconds = self.each * (SLOTS / 2 + len(batch)) / 2 * self.jitter ** self.random.uniform(-1, 1)
            self._busy = True
            self.at(self.clock.now + seconds, self._done, batch)

    def _done(self, batch: list[Ticket]) -> None:
        self._busy = False
        for ticket in batch:
            self.admission.leave(ticket)
            name = self._names.pop(ticket)
            if name is not None and name[1] < self._again:
                self.at(self.clock.now + self.random.uniform(0, 0.01), self._ask, (name[0], name[1] + 1))
        self._go_on()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queue=st.integers(SLOTS, 40),
    each=st.sampled_from([0.02, 0.1, 0.5]),
    jitter=st.sampled_from([1.0, 1.5]),
    latency=st.sampled_from([0.0, 0.3, 2.0]),
    patient=st.lists(st.floats(0, 20), min_size=1, max_size=100) | st.integers(1, 100).map(lambda n: [0.0] * n),
    flood=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    again=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_who_comes_back_when_told_is_served_whatever_others_do(
    queue: int, each: float, jitter: float, latency: float, patient: list[float], flood: float, again: int, seed: int
) -> None:
    """At the first or second return, and told to come in order; newcomers too, for those refused are told a time."""
    crowd = Crowd(queue, each, jitter, latency, random.Random(seed))
    crowd.run(patient, [i * each / flood for i in range(300)] if flood else [], again)
    assert len(crowd.tries) == len(patient) * (1 + again)
    assert max(crowd.tries.values()) <= 3
    latest = -math.inf
    for when in crowd.refused.values():
        assert when > latest - 1.0
        latest = max(latest, when)


def test_who_is_late_is_never_let_in() -> None:
    clock = Clock()
    admission, (running, *_) = filled(clock, 0)
    late, patient = admission.offer(timeout=2.0), admission.offer(timeout=60.0)
    clock.now += 3.0
    admission.leave(running)
    assert admission.admit() == [patient]
    assert late.state == "expired"
    admission.leave(late)
    assert admission.running == 1 and admission.waiting == 0


def test_a_drained_one_finishes_what_waits_and_takes_no_more() -> None:
    admission, (running, *waiting) = filled(Clock(), 3)
    admission.draining = True
    with pytest.raises(Draining):
        admission.offer()
    admission.leave(running)
    assert admission.admit() == waiting


def test_a_batch_under_way_does_not_look_like_a_slow_device() -> None:
    clock = Clock()
    admission, (running, *_) = measured(clock)  # one second an image
    admission.leave(running, served=False)
    one, *others = admission.admit()
    clock.now += 1.0
    admission.leave(one)
    clock.now += 5.0  # for the batch of the others
    assert admission.seconds_each() == pytest.approx((6.0 + SLOTS - 1) / SLOTS)
    for ticket in others:
        admission.leave(ticket)
    assert admission.seconds_each() == pytest.approx(1.0)


def test_idle_time_says_nothing_about_the_rate() -> None:
    clock = Clock()
    admission = Admission(SLOTS, WAITING, clock)
    for pause in (0.0, 10_000.0):
        clock.now += pause
        ticket = admission.offer()
        admission.admit()
        clock.now += 2.0
        admission.leave(ticket)
        clock.now += 500.0
        assert admission.seconds_each() == pytest.approx(2.0)
