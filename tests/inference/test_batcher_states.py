"""Whatever is done to a batcher, in whatever order and from whatever thread, it keeps its promises."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from dmd2.inference.batcher import Batcher, Busy, Cancelled, Check, PendingJob, Stopped

PATIENCE = 120.0  # seconds: nothing that is waited for takes that long, however busy the machine
MAX_BATCH, MAX_WAITING = 4, 6
KEYS: list[Hashable] = [None, "x", 0]  # None and 0: a key may be false, and still be one


@dataclass(eq=False)
class Task:
    key: Hashable
    fails: BaseException | None = None
    drawn: int = 0
    """times that `generate` gave a result for it"""


@dataclass
class Known:
    """A ticket, and what has been done to it."""

    ticket: PendingJob[Task, Task]
    caller: int
    """tickets of one caller are in order"""
    dropped_unseen: bool = False
    """abandoned before `generate` ever saw it"""
    answers: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ticket.future.add_done_callback(self.answers.append)


class Device:
    """What `generate` and `recover` do. It goes no further than it is let."""

    def __init__(self) -> None:
        self.most = MAX_BATCH
        self.gone = False
        self.order: list[Task] = []
        self.seen: list[Task] = []
        self.wrong: list[str] = []
        self._permits = 0
        self._open = False
        self._changed = threading.Condition()

    def let(self, batches: int | None) -> None:
        """As many batches more; None: all there are from now on."""
        with self._changed:
            self._permits += batches or 0
            self._open |= batches is None
            self._changed.notify_all()

    def generate(self, tasks: list[Task], check: Check) -> list[Task]:
        self.seen += tasks
        if len({task.key for task in tasks}) != 1 or len(tasks) > MAX_BATCH:
            self.wrong.append(f"a batch of {[task.key for task in tasks]}")
        with self._changed:
            while not (self._open or self._permits):
                self._changed.wait(0.001)
                check()
            self._permits -= not self._open
        if len(tasks) > self.most:
            raise MemoryError
        for task in tasks:
            if task.fails is not None:
                raise task.fails
        for task in tasks:
            task.drawn += 1
        self.order += tasks
        return tasks

    def recover(self) -> None:
        if self.gone:
            raise OSError("no device")


class BatcherStates(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.batcher: Batcher[Task, Task] = Batcher(
            self.device.generate,
            lambda task: task.key,
            max_batch=MAX_BATCH,
            max_waiting=MAX_WAITING,
            recover=self.device.recover,
            max_queue_delay=0.0005,
        )
        self.known: list[Known] = []
        self.callers = self.steps = 0
        self.closers: list[threading.Thread] = []
        self.lock = threading.Lock()

    def submit(self, tasks: list[Task], caller: int) -> None:
        try:
            tickets = self.batcher.submit_all(tasks)
        except (Busy, Stopped) as error:
            if isinstance(error, Stopped) and not (self.closers or self.device.gone):
                self.device.wrong.append(f"stopped without a reason: {error}")
            return
        with self.lock:
            self.known += [Known(ticket, caller) for ticket in tickets]

    tasks = st.builds(
        Task,
        st.sampled_from(KEYS),
        st.sampled_from([None] * 6 + [ValueError("a bad job"), StopIteration("so"), SystemExit("a bad library")]),
    )

    @rule(tasks=st.lists(tasks, min_size=1, max_size=4))
    def from_the_first_caller(self, tasks: list[Task]) -> None:
        self.steps += 1
        alive, waiting = self.batcher.alive, self.waiting()
        before = len(self.known)
        self.submit(tasks, 0)
        # `waiting` may only have become less meanwhile: who fits must be let in.
        assert not alive or waiting + len(tasks) > MAX_WAITING or len(self.known) > before or self.device.gone

    def waiting(self) -> int:
        return sum(not known.ticket.future.done() and not known.ticket.future.running() for known in self.known)

    @rule(bursts=st.lists(st.lists(tasks, min_size=1, max_size=3), min_size=2, max_size=4), gone=st.booleans())
    def from_several_at_once(self, bursts: list[list[Task]], gone: bool) -> None:
        """`gone`: meanwhile everyone who was there before hangs up."""
        self.steps += 1
        threads = []
        for tasks in bursts:
            self.callers += 1
            threads.append(threading.Thread(target=self.submit, args=(tasks, self.callers)))
        if gone:
            threads += [threading.Thread(target=self.cancel, args=(known,)) for known in list(self.known)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def cancel(self, known: Known) -> None:
        known.ticket.cancel()
        # Only what was cancelled while it waited is known not to be drawn later.
        known.dropped_unseen = known.ticket.future.cancelled()

    @rule(which=st.integers(0, 99))
    def hang_up(self, which: int) -> None:
        if self.known:
            self.cancel(self.known[which % len(self.known)])

    @rule(batches=st.integers(1, 3))
    def let(self, batches: int) -> None:
        self.device.let(batches)

    @rule(most=st.integers(1, MAX_BATCH))
    def memory(self, most: int) -> None:
        self.device.most = most

    @rule()
    def see_one_through(self) -> None:
        """Until the oldest ticket that is open has been answered."""
        oldest = next((known.ticket for known in self.known if not known.ticket.future.done()), None)
        if oldest is not None and (self.batcher.alive or self.device.gone or self.closers):
            until = time.monotonic() + PATIENCE
            while not oldest.future.done():
                assert time.monotonic() < until, "a ticket is never answered"
                self.device.let(1)
                wait([oldest.future], 0.01)

    @precondition(lambda self: self.steps > 5)
    @rule()
    def close(self) -> None:
        thread = threading.Thread(target=self.batcher.close)
        thread.start()
        self.closers.append(thread)

    @precondition(lambda self: self.steps > 5)
    @rule()
    def lose_the_device(self) -> None:
        self.device.gone = True

    def teardown(self) -> None:
        lost, closed = self.device.gone, bool(self.closers)
        self.device.let(None)
        futures = [known.ticket.future for known in self.known]
        assert not wait(futures, PATIENCE).not_done, "a ticket is never answered"
        assert self.batcher.alive or lost or closed
        if self.batcher.alive:  # and it goes on for whoever comes
            last = self.batcher.submit(Task("last")).future.result(PATIENCE)
            assert last.result.key == "last"
        self.batcher.close()
        for thread in self.closers:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not self.batcher.alive and not self.device.wrong, self.device.wrong
        with pytest.raises(Stopped):
            self.batcher.submit(Task(None))
        for known in self.known:
            self.check(known, lost)
        for caller in {known.caller for known in self.known}:
            for key in KEYS:
                asked = [k.ticket.job for k in self.known if k.caller == caller and k.ticket.job.key == key]
                drawn = [task for task in self.device.order if task in asked]
                assert drawn == [task for task in asked if task.drawn], "out of order"

    def check(self, known: Known, lost: bool) -> None:
        ticket, task = known.ticket, known.ticket.job
        assert len(known.answers) == 1 and task.drawn <= 1
        if known.dropped_unseen:
            assert ticket.future.cancelled() and task not in self.device.seen
            return
        try:
            assert ticket.future.result(0).result is task and task.drawn == 1 and task.fails is None
        except (CancelledError, Cancelled):
            assert ticket.cancelled
        except Stopped:
            assert lost
        except Exception as error:
            assert task.fails is not None and str(task.fails) in str(error)
            assert not isinstance(error, StopIteration)  # which no awaiting coroutine can be given


def test_a_batcher_keeps_its_promises() -> None:
    run_state_machine_as_test(
        BatcherStates,
        settings=settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True),
    )
