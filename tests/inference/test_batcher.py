"""The batcher: what rides together, whose error is whose, and that nobody waits for ever."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.inference.batcher import Batcher, Busy, Cancelled, Check, PendingJob, Stopped


class Bench:
    """A `generate` that can be held back, and remembers its batches. A job "x3" has key "x" and result "x3!"."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def generate(self, jobs: list[str], check: Check) -> list[str]:
        self.threads.add(threading.get_ident())
        self.batches.append(jobs)
        for _ in range(1000):
            check()
            if self.gate.wait(0.005):
                break
        if "bad" in "".join(jobs):
            raise ValueError("a bad job")
        return [f"{job}!" for job in jobs]

    def hold(self, batcher: Batcher[str, str], job: str = "hold") -> PendingJob[str, str]:
        """The thread is in `generate` when this returns, and stays there until `gate` is set."""
        self.gate.clear()
        ticket = batcher.submit(job)
        for _ in range(1000):
            if self.batches[-1:] == [[job]]:
                return ticket
            time.sleep(0.005)
        raise TimeoutError


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def batcher(bench: Bench) -> Iterator[Batcher[str, str]]:
    batcher = Batcher[str, str](bench.generate, lambda job: job[0], max_batch=3, max_waiting=5)
    yield batcher
    bench.gate.set()
    batcher.close()


def test_an_idle_batcher_starts_at_once_and_says_how_long_a_job_waited(batcher: Batcher[str, str]) -> None:
    drawn = batcher.submit("a1").future.result(300)
    assert drawn.result == "a1!"
    assert drawn.batch_size == 1
    assert 0 <= drawn.queue_seconds < 1


def test_what_came_in_meanwhile_rides_together_by_key_oldest_first(bench: Bench, batcher: Batcher[str, str]) -> None:
    bench.hold(batcher)
    tickets = [batcher.submit(job) for job in ("a1", "b1", "a2", "b2", "a3")]
    bench.gate.set()
    assert [ticket.future.result(300).result for ticket in tickets] == ["a1!", "b1!", "a2!", "b2!", "a3!"]
    assert bench.batches == [["hold"], ["a1", "a2", "a3"], ["b1", "b2"]]
    assert len(bench.threads) == 1


def test_no_batch_is_larger_than_allowed(bench: Bench, batcher: Batcher[str, str]) -> None:
    bench.hold(batcher)
    tickets = [batcher.submit(f"a{i}") for i in range(5)]
    bench.gate.set()
    assert [ticket.future.result(300).batch_size for ticket in tickets] == [3, 3, 3, 2, 2]


def test_jobs_that_are_queued_in_one_go_ride_together_or_not_at_all(bench: Bench, batcher: Batcher[str, str]) -> None:
    tickets = batcher.submit_all(["a1", "a2", "a3", "a4"])
    assert [ticket.future.result(300).result for ticket in tickets] == ["a1!", "a2!", "a3!", "a4!"]
    assert bench.batches == [["a1", "a2", "a3"], ["a4"]]  # though the thread was idle when the first one came
    bench.hold(batcher)
    batcher.submit_all(["b"] * 3)
    with pytest.raises(Busy, match="3 images are waiting"):
        batcher.submit_all(["c"] * 3)
    assert len(batcher.submit_all(["c"] * 2)) == 2


def test_a_full_queue_says_so_and_takes_jobs_again_later(bench: Bench, batcher: Batcher[str, str]) -> None:
    bench.hold(batcher)
    tickets = [batcher.submit("a") for _ in range(5)]
    with pytest.raises(Busy, match="5 images are waiting"):
        batcher.submit("a")
    bench.gate.set()
    for ticket in tickets:
        ticket.future.result(300)
    assert batcher.submit("a").future.result(300).result == "a!"


def test_a_stream_of_others_starves_nobody(bench: Bench) -> None:
    """Whoever is oldest says what is drawn next, however many of another key keep coming."""
    later: list[PendingJob[str, str]] = []

    def generate(jobs: list[str], check: Check) -> list[str]:
        if not later or not other.future.done():
            later.append(batcher.submit("a"))
        return bench.generate(jobs, check)

    batcher = Batcher[str, str](generate, lambda job: job[0], max_batch=3, max_waiting=5)
    with batcher._changed:  # so that both are queued before the first is drawn
        batcher.submit("a")
        other = batcher.submit("b")
    assert other.future.result(120).result == "b!"
    batcher.close()
    assert ["b"] in bench.batches[:3]


def test_an_error_hits_only_the_job_that_it_belongs_to(bench: Bench, batcher: Batcher[str, str]) -> None:
    bench.hold(batcher)
    tickets = [batcher.submit(job) for job in ("a1", "a bad", "a2")]
    bench.gate.set()
    assert tickets[0].future.result(300).result == "a1!"
    with pytest.raises(ValueError, match="a bad job"):
        tickets[1].future.result(300)
    assert tickets[2].future.result(300).result == "a2!"
    assert bench.batches[1:] == [["a1", "a bad", "a2"], ["a1"], ["a bad", "a2"], ["a bad"], ["a2"]]
    assert batcher.alive


def test_out_of_memory_with_eight_is_four_and_four() -> None:
    recovered, gate = [], threading.Event()

    def generate(jobs: list[int], check: Check) -> list[int]:
        gate.wait(300)
        if len(jobs) > 4:
            raise MemoryError
        return jobs

    batcher = Batcher[int, int](generate, lambda job: job < 0, max_batch=8, recover=lambda: recovered.append(True))
    batcher.submit(-1)
    tickets = [batcher.submit(i) for i in range(8)]
    gate.set()
    assert [ticket.future.result(300).result for ticket in tickets] == list(range(8))
    assert [ticket.future.result().batch_size for ticket in tickets] == [4] * 8
    assert recovered == [True]
    batcher.close()


def test_an_abandoned_job_that_waits_is_never_drawn(bench: Bench, batcher: Batcher[str, str]) -> None:
    bench.hold(batcher)
    dropped, kept = batcher.submit("a1"), batcher.submit("a2")
    dropped.cancel()
    bench.gate.set()
    assert kept.future.result(300).result == "a2!"
    with pytest.raises(CancelledError):
        dropped.future.result(300)
    assert bench.batches == [["hold"], ["a2"]]


def test_a_running_batch_stops_once_all_of_its_jobs_are_abandoned(bench: Bench, batcher: Batcher[str, str]) -> None:
    alone = bench.hold(batcher)
    alone.cancel()
    with pytest.raises(Cancelled):  # though nobody opens the gate
        alone.future.result(300)
    assert batcher.alive


def test_one_of_two_that_is_abandoned_does_not_stop_the_other(bench: Bench, batcher: Batcher[str, str]) -> None:
    bench.hold(batcher)
    first, second = batcher.submit("a1"), batcher.submit("a2")
    held = threading.Event()
    original = bench.generate

    def generate(jobs: list[str], check: Check) -> list[str]:
        if jobs == ["a1", "a2"]:
            held.wait(300)
            check()
        return original(jobs, check)

    batcher._generate = generate
    bench.gate.set()
    while not first.future.running():
        time.sleep(0.001)
    first.cancel()
    held.set()
    assert second.future.result(300).result == "a2!"


def test_a_device_that_does_not_recover_ends_everything_at_once(caplog: pytest.LogCaptureFixture) -> None:
    entered, gate = threading.Event(), threading.Event()

    def generate(jobs: list[str], check: Check) -> list[str]:
        entered.set()
        gate.wait(300)
        raise RuntimeError("illegal memory access")

    def recover() -> None:
        raise OSError("no device")

    batcher = Batcher[str, str](generate, lambda job: job, recover=recover)
    tickets = [batcher.submit("a")]
    entered.wait(300)
    tickets += [batcher.submit(job) for job in "bc"]
    assert batcher.alive
    alive_when_told: list[bool] = []
    for ticket in tickets:
        ticket.future.add_done_callback(lambda _: alive_when_told.append(batcher.alive))
    with caplog.at_level(logging.CRITICAL):
        gate.set()
        for ticket in tickets:
            with pytest.raises(Stopped, match="the device is gone: OSError: no device"):
                ticket.future.result(300)
        batcher._thread.join(300)
    assert alive_when_told == [False] * 3  # whoever hears of it can rely on `alive`
    assert not batcher.alive
    assert "no more images until a restart" in caplog.text
    with pytest.raises(Stopped, match="no device"):
        batcher.submit("a")


def test_a_draw_of_the_wrong_length_is_an_error_not_a_mix_up() -> None:
    batcher = Batcher[int, int](lambda jobs, check: [*jobs, 0], lambda job: 0)
    with pytest.raises(RuntimeError, match="2 results for 1 jobs"):
        batcher.submit(7).future.result(300)
    batcher.close()


def test_closing_draws_what_is_queued_and_takes_no_more(bench: Bench, batcher: Batcher[str, str]) -> None:
    bench.hold(batcher)
    ticket = batcher.submit("a1")
    threading.Timer(0.05, bench.gate.set).start()
    batcher.close()
    assert ticket.future.result(0).result == "a1!"
    assert not batcher.alive
    with pytest.raises(Stopped, match="closed"):
        batcher.submit("a2")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 99)), max_size=30), st.integers(1, 8))
def test_every_job_gets_its_own_result(jobs: list[tuple[str, int]], max_batch: int) -> None:
    sizes = []

    def generate(batch: list[tuple[str, int]], check: Check) -> list[tuple[str, int]]:
        assert len({key for key, _ in batch}) == 1
        sizes.append(len(batch))
        return batch

    batcher = Batcher[tuple[str, int], tuple[str, int]](generate, lambda job: job[0], max_batch=max_batch)
    tickets = [batcher.submit(job) for job in jobs]
    assert [ticket.future.result(300).result for ticket in tickets] == jobs
    assert sum(sizes) == len(jobs) and all(size <= max_batch for size in sizes)
    batcher.close()


def test_preparation_comes_first_in_the_same_thread_and_its_errors_are_the_callers() -> None:
    threads: list[int] = []

    def generate(jobs: list[int], check: Check) -> list[int]:
        threads.append(threading.get_ident())
        return jobs

    batcher = Batcher[int, int](generate, lambda job: 0, prepare=lambda: threads.append(threading.get_ident()))
    assert len(threads) == 1
    batcher.submit(1).future.result(300)
    assert threads == [threads[0]] * 2 and threads[0] != threading.get_ident()
    batcher.close()

    def broken() -> None:
        raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        Batcher[int, int](generate, lambda job: 0, prepare=broken)


def test_a_queue_of_nothing_but_abandoned_jobs_is_no_end() -> None:
    started, release = threading.Event(), threading.Event()

    def generate(jobs: list[str], check: object) -> list[str]:
        started.set()
        assert release.wait(300)
        return jobs

    batcher: Batcher[str, str] = Batcher(generate, lambda job: None, max_batch=1, max_waiting=2)
    first = batcher.submit("a")
    assert started.wait(300)
    for _ in range(5):  # more than may wait: who is gone takes no place
        batcher.submit("b").cancel()
    release.set()
    assert first.future.result(300).result == "a"
    assert batcher.submit("c").future.result(300).result == "c" and batcher.alive
    batcher.close()
    assert not batcher.alive
