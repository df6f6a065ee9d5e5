"""One bounded queue, one thread that owns the device, batches of jobs of equal shape.

Knows nothing of images: a job is whatever `generate` takes, and jobs of equal `key` may share a batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Check = Callable[[], None]
MAX_QUEUE_DELAY = 0.003
"""seconds"""


class Keyed(Protocol):
    """What may share a batch with what has an equal key."""

    @property
    def key(self) -> Hashable: ...


K = TypeVar("K", bound=Keyed)

logger = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The batcher generates no more: it was closed, or its device is gone."""


class Cancelled(Exception):
    """Every job of the running batch was cancelled."""


@dataclass(frozen=True)
class JobResult(Generic[Result]):
    """The result of a job, and how it got there."""

    result: Result
    queue_seconds: float
    """from `submit` to the start of its batch"""
    batch_size: int
    """how many jobs were in its batch"""


def choose(waiting: Iterable[K], most: int, company: K | None = None) -> tuple[list[K], deque[K]]:
    """Who of those who wait, oldest first, are in the next batch: at most `most`, with the key of `company`, or else
    of the oldest. Returns them, and who is left, both in order."""
    taken: list[K] = []
    left: deque[K] = deque()
    for pending in waiting:
        company = company or pending
        (taken if pending.key == company.key and len(taken) < most else left).append(pending)
    return taken, left


class PendingJob(Generic[Job, Result]):
    """A job in the queue: `future` gives its `JobResult`; `cancel()` says that nobody waits for it any more."""

    def __init__(self, job: Job, key: Hashable = None) -> None:
        self.job, self.key = job, key
        self.future: Future[JobResult[Result]] = Future()
        self.submitted = time.perf_counter()
        self.cancelled = False
        self._lock = threading.RLock()  # a future's callback may cancel again

    def cancel(self) -> None:
        """A job that waits is dropped; a running batch stops at its next step once all of its jobs are cancelled."""
        with self._lock:
            self.cancelled = True
            if not self.future.cancelled() and self.future.cancel():
                self.future.set_running_or_notify_cancel()  # without this `concurrent.futures.wait` waits for ever

    def begin(self) -> bool:
        """Called by the batcher when it starts on the job. False if it was cancelled before."""
        with self._lock:
            return not self.future.cancelled() and self.future.set_running_or_notify_cancel()


class Batcher(Generic[Job, Result]):
    """Runs `generate` on batches of jobs, in one thread of its own.

    An idle batcher starts at once. Under load, whatever came in meanwhile forms the next batch; the oldest job
    says which key it has. If a batch fails, its halves are tried, down to single jobs, so that an error (or a
    memory that is too small for all of them) hits only the job that it belongs to.

    Args:
        generate: (jobs of one key, check) → their results, in order. It should call `check` now and then: that raises
            `Cancelled` once all of the jobs are cancelled.
        key: of a job; asked by `submit`, which raises what it raises.
        max_batch: jobs in one batch, at most.
        max_waiting: jobs in the queue, at most.
        prepare: called first of all. The constructor waits for it, and raises what it raises. What loads and warms up
            belongs here: each thread that uses torch on a CPU gets a pool of workers, and two pools on the same
            cores slow each other down.
        recover: called after an error, before the next `generate`. If it raises, the device is given up: `alive` is
            false from then on and every job fails with `Stopped`.
        max_queue_delay: seconds that a batch which is not full waits for more jobs, if one ran just before.
    """

    def __init__(
        self,
        generate: Callable[[list[Job], Check], list[Result]],
        key: Callable[[Job], Hashable],
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        prepare: Check = lambda: None,
        recover: Check = lambda: None,
        max_queue_delay: float = MAX_QUEUE_DELAY,
    ) -> None:
        self._generate, self._key, self._recover = generate, key, recover
        self._max_batch, self._max_waiting, self._max_queue_delay = max_batch, max_waiting, max_queue_delay
        self._waiting: deque[PendingJob[Job, Result]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended: str | None = None
        prepared: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(prepare, prepared), name="device", daemon=True)
        self._thread.start()
        prepared.result()

    @property
    def alive(self) -> bool:
        """Whether jobs are still taken."""
        return self._thread.is_alive() and not self._closing and self._ended is None

    def submit(self, job: Job) -> PendingJob[Job, Result]:
        """Queues a job. From any thread. Raises as `submit_all`."""
        return self.submit_all([job])[0]

    def submit_all(self, jobs: Sequence[Job]) -> list[PendingJob[Job, Result]]:
        """Queues jobs in one go, so that they share a batch where they can. From any thread.

        Raises:
            Busy: the queue has not room for all of them; none is queued.
            Stopped: closed, or the device is gone.
        """
        added: list[PendingJob[Job, Result]] = [PendingJob(job, self._key(job)) for job in jobs]
        with self._changed:
            if not self.alive:
                raise Stopped(self._ended or "closed")
            # Who is gone takes no place, and holds nothing in memory however long the present batch takes.
            self._waiting = deque(pending for pending in self._waiting if not pending.future.cancelled())
            if len(self._waiting) + len(added) > self._max_waiting:
                raise Busy(f"{len(self._waiting)} images are waiting already; try again later")
            self._waiting.extend(added)
            self._changed.notify()
        return added

    def close(self) -> None:
        """Finishes what is queued, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self, prepare: Check, prepared: Future[None]) -> None:
        try:
            prepare()
        except BaseException as error:
            prepared.set_exception(error)
            return
        prepared.set_result(None)
        why = "closed"
        batch: list[PendingJob[Job, Result]] | None = None
        try:
            while (batch := self._next_batch()) is not None:
                self._attempt([pending for pending in batch if pending.begin()])
        except BaseException as error:
            why = f"the device is gone: {type(error).__name__}: {error}"
            logger.critical("%s; no more images until a restart", why, exc_info=error)
        finally:
            with self._changed:  # `alive` is false before anybody hears of it
                self._ended = why
                left = [*(batch or ()), *self._waiting]
                self._waiting.clear()
            for pending in left:
                _fail(pending, Stopped(why))

    def _next_batch(self) -> list[PendingJob[Job, Result]] | None:
        """Waits for jobs. None when there will be no more."""
        with self._changed:
            idle = not self._waiting
            while not (batch := self._take(self._max_batch)):  # the queue is empty, or all in it were cancelled
                if self._closing:
                    return None
                self._changed.wait()
            if not idle and self._max_queue_delay > 0:
                until = time.perf_counter() + self._max_queue_delay
                while len(batch) < self._max_batch and (left := until - time.perf_counter()) > 0:
                    if not self._changed.wait(left):
                        break
                    batch += self._take(self._max_batch - len(batch), company=batch[0])
            return batch

    def _take(self, most: int, company: PendingJob[Job, Result] | None = None) -> list[PendingJob[Job, Result]]:
        """As `choose`, out of the queue; who is gone is dropped."""
        present = (pending for pending in self._waiting if not pending.future.cancelled())
        taken, self._waiting = choose(present, most, company)
        return taken

    def _attempt(self, batch: list[PendingJob[Job, Result]]) -> None:
        if not batch:
            return
        began = time.perf_counter()

        def check() -> None:
            if all(pending.cancelled for pending in batch):
                raise Cancelled

        try:
            check()
            results = self._generate([pending.job for pending in batch], check)
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} jobs")
        except Cancelled as error:
            logger.info("nobody waits any more: stopped before the end of a batch of %d", len(batch))
            for pending in batch:
                _fail(pending, error)
        except BaseException as error:  # in this thread even SystemExit is one job's error: all the others wait
            self._after(error, batch)
        else:
            for pending, result in zip(batch, results, strict=True):
                pending.future.set_result(JobResult(result, began - pending.submitted, len(batch)))

    def _after(self, error: BaseException, batch: list[PendingJob[Job, Result]]) -> None:
        # Tracebacks keep the frames of `generate` alive, and with them the memory that there was too little of.
        link: BaseException | None = error
        while link is not None and link.__traceback__ is not None:
            link.__traceback__, link = None, link.__cause__ or link.__context__
        self._recover()
        if len(batch) == 1:
            _fail(batch[0], error)
            return
        half = len(batch) // 2
        self._attempt(batch[:half])
        self._attempt(batch[half:])


def _fail(pending: PendingJob[Job, Result], error: BaseException) -> None:
    if not isinstance(error, Exception) or isinstance(error, StopIteration):  # these would end the waiting coroutine
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not pending.future.done():
        pending.future.set_exception(error)
