"""The queue, on a clock that tests turn by hand: bounds, order, shares, deadlines, what the refused are told."""

from __future__ import annotations

import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dmd2.service.http.admission import LONGEST_WAIT, SHARE, Admission, Draining, Full, Ticket

SLOTS, WAITING = 6, 8


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Machine(RuleBasedStateMachine):
    """Requests come, are let in, leave, give up and time out in any order; a plain model keeps the books."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.admission = Admission(SLOTS, WAITING, self.clock)
        self.queued: list[Ticket] = []
        self.inside: list[Ticket] = []
        self.interactive_in_a_row = 0

    @rule(target=tickets, cost=st.integers(1, 10), bulk=st.booleans(), timeout=st.sampled_from([1.0, 5.0, math.inf]))
    def offer(self, cost: int, bulk: bool, timeout: float) -> Ticket | None:
        self.expire()
        room = len(self.queued) < WAITING and (not bulk or sum(t.bulk for t in self.queued) < WAITING // 2)
        free = not self.queued and (not self.inside or sum(t.cost for t in self.inside) + cost <= SLOTS)
        try:
            ticket = self.admission.offer(cost, bulk, timeout)
        except Full as full:
            assert not room and not free
            assert 1 <= full.retry_after <= LONGEST_WAIT
            return None
        assert room or free
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
    told = []
    for _ in range(4):
        with pytest.raises(Full) as full:
            admission.offer(4)
        told.append(full.value.retry_after)
    assert told[0] == WAITING * 2 * 0.5 and told == sorted(told) and told[-1] > told[0]  # not all at once


def test_who_asks_too_often_does_not_delay_the_others() -> None:
    clock = Clock()
    admission, tickets = filled(clock)
    clock.now += 6.0
    admission.leave(tickets[0])
    admission.admit()
    for _ in range(SLOTS):
        admission.offer()
    told = []
    for _ in range(500):
        with pytest.raises(Full) as full:
            admission.offer()
        told.append(full.value.retry_after)
    assert max(told) <= 2 * WAITING * 1.0 + 1


def test_every_client_that_does_as_it_is_told_is_served() -> None:
    """Hundreds of clients, one place in the queue for each twenty: each comes back when told, until it is served."""
    clock = Clock()
    admission = Admission(SLOTS, 10, clock)
    returns: list[tuple[float, int]] = [(clock.now, client) for client in range(200)]
    inside: deque[tuple[float, Ticket]] = deque()
    served, attempts = 0, 0
    while returns or inside or admission.waiting:
        returns.sort()
        clock.now = min([*(at for at, _ in returns[:1]), *(at for at, _ in list(inside)[:1])])
        while inside and inside[0][0] <= clock.now:
            admission.leave(inside.popleft()[1])
            served += 1
        while returns and returns[0][0] <= clock.now:
            _, client = returns.pop(0)
            attempts += 1
            try:
                admission.offer()
            except Full as full:
                returns.append((clock.now + full.retry_after, client))
        for ticket in admission.admit():  # one after another, 0.3 s each
            inside.append((max(clock.now, inside[-1][0] if inside else 0.0) + 0.3, ticket))
    assert served == 200
    assert attempts < 12 * 200


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
