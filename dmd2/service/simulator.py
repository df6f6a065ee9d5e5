"""A fleet on a virtual clock: the queue and the choice of batches that serve, with measured service times.

What is real: `Admission` before each replica, two batches' worth of images with its device, `choose` and the
batcher's short wait for company. What is a model: a batch takes what the table says, HTTP and encoding take nothing,
a batch that has begun runs to its end, a router knows at once what each replica holds, and how each client behaves.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from dmd2.inference.batcher import MAX_QUEUE_DELAY, choose
from dmd2.runtime.errors import InvalidInput, one_line
from dmd2.runtime.files import read_bounded
from dmd2.service.http.admission import Admission, Full, Ticket

Floats = NDArray[np.float64]
Ending = Literal["served", "late", "gave_up", "lost"]
"""in time; too late in a queue or on a device; told to come back too late; with a replica, and no time was left"""
Routing = Literal["random", "two-choices", "least-loaded", "affine"]
Arrivals = Literal["poisson", "bursty"]

RETRY = 1.0
"""seconds after which a client comes back whose connection broke"""
ON, OFF = 10.0, 40.0
"""mean seconds of a burst, and between two"""
BURST = 4.0
"""times as many arrivals in a burst as outside"""


class Shape(BaseModel):
    """What costs alike."""

    model_config = ConfigDict(extra="forbid")
    seconds: Annotated[list[PositiveFloat], Field(min_length=1, max_length=128)]
    """of a batch of 1, 2, 3 … images"""
    share: PositiveFloat = 1.0
    """of the requests, beside the other shapes'"""

    @model_validator(mode="after")
    def grows(self) -> Shape:
        if not all(math.isfinite(value) for value in (*self.seconds, self.share)):
            raise ValueError("expected finite numbers")
        return self


class Table(BaseModel):
    """Measured service times."""

    model_config = ConfigDict(extra="forbid")
    about: dict[str, Any] = {}
    """where, when and how they were measured"""
    shapes: Annotated[dict[str, Shape], Field(min_length=1, max_length=100)]
    lora_switch: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """seconds more for a batch with other LoRAs than the one before it"""

    @model_validator(mode="after")
    def sizes_agree(self) -> Table:
        if len({len(shape.seconds) for shape in self.shapes.values()}) > 1:
            raise ValueError("expected seconds for the same batch sizes in every shape")
        return self

    @property
    def max_batch(self) -> int:
        return len(next(iter(self.shapes.values())).seconds)

    @staticmethod
    def read(path: Path) -> Table:
        """Raises UserError: it is no such table."""
        try:
            return Table(**json.loads(read_bounded(path, 1_000_000, "table")))
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidInput("table", f"{'.'.join(map(str, first['loc']))}: {one_line(first['msg'])}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidInput("table", f"no table in JSON: {one_line(error)}") from None


@dataclass(frozen=True)
class Scenario:
    """Everything that, with the table, says how a run ends."""

    replicas: int = 64
    requests: int = 1_000_000
    load: float = 0.8
    """arriving work as a part of what all replicas could do in batches of the best size without a LoRA switch"""
    arrivals: Arrivals = "poisson"
    routing: Routing = "least-loaded"
    queue: int = 64
    """requests that wait at each replica"""
    max_batch: int = 8
    patience: float = 30.0
    """seconds in which a client wants its images, however often it must ask"""
    images: tuple[tuple[int, float], ...] = ((1, 0.8), (4, 0.2))
    """of a request; each with its share of the requests"""
    bulk: float = 0.1
    """part of the requests that say they are bulk"""
    loras: int = 0
    """how many there are; the k-th is asked for in proportion to 1/k (Zipf)"""
    lora_share: float = 0.3
    """part of the requests that want one"""
    slack: int = 16
    """images by which a LoRA's own replica may be ahead of the least loaded one (routing "affine")"""
    mtbf: float = math.inf
    """mean seconds until a replica fails"""
    repair: float = 60.0
    """seconds until it is back, empty"""
    detect: float = 5.0
    """seconds for which the router goes on sending it requests, whose connections break; those that see connections
    break (all but "random", which is how Kubernetes' own services route) take it out at the first that does"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("load", "patience", "mtbf"):
            if not getattr(self, name) > 0:
                raise InvalidInput(name, "expected more than 0", getattr(self, name))
        for name in ("replicas", "requests", "max_batch"):
            if getattr(self, name) < 1:
                raise InvalidInput(name, "expected at least 1", getattr(self, name))
        for name in ("queue", "loras", "slack", "repair", "detect"):
            if not getattr(self, name) >= 0:
                raise InvalidInput(name, "expected at least 0", getattr(self, name))
        for name in ("bulk", "lora_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(name, "expected 0 to 1", getattr(self, name))


@dataclass(eq=False, slots=True)
class Request:
    """A client's wish. `lora` 0: none."""

    arrival: float
    shape: int
    images: int
    bulk: bool
    lora: int
    ending: Ending | None = None
    ended: float = math.inf
    ticket: Ticket | None = None
    replica: int = 0
    left: int = 0
    """images that are not there yet"""
    broken: bool = False
    """the last that it heard was a connection that broke"""
    attempts: int = 0
    key: tuple[int, int] = field(default=(0, 0))

    def __post_init__(self) -> None:
        self.key = self.shape, self.lora


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    requests: list[Request]
    down: list[tuple[float, float]]
    """when a replica was away: from, to; one entry each time"""
    batches: Counter[int]
    """by their size"""
    switches: int
    """of LoRAs"""
    refusals: int
    """answers 429"""
    end: float


class Replica:
    """One `dmd2 serve` with one model."""

    def __init__(self, scenario: Scenario, clock: Callable[[], float]) -> None:
        self._slots, self._queue, self._clock = 2 * scenario.max_batch, scenario.queue, clock
        self.starts = 0
        self.alive, self.listed = True, True
        self.start()

    def start(self) -> None:
        self.admission = Admission(self._slots, self._queue, self._clock)
        self.holds: dict[Ticket, Request] = {}
        self.waiting: deque[Request] = deque()  # the batcher's queue, one entry an image
        self.batch: list[Request] = []
        self.running = self.gathering = False
        self.lora = 0
        self.starts += 1  # events of an earlier life, or of a batch that has begun since, mean nothing


class Fleet:
    """Replicas, a router, clients. `run` may be called once."""

    def __init__(self, table: Table, scenario: Scenario, requests: Sequence[Request] | None = None) -> None:
        if scenario.max_batch > table.max_batch:
            raise InvalidInput("max_batch", f"the table ends at {table.max_batch}", scenario.max_batch)
        self.scenario, self.now = scenario, 0.0
        self._seconds = [shape.seconds for shape in table.shapes.values()]
        self._lora_switch = table.lora_switch
        self.requests = draw(table, scenario) if requests is None else list(requests)
        self._random = random.Random(f"{scenario.seed} routing and failures")
        self.replicas = [Replica(scenario, lambda: self.now) for _ in range(scenario.replicas)]
        self._load = [0] * scenario.replicas  # images that each holds
        self._listed = list(range(scenario.replicas))
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._open = len(self.requests)
        self._down: list[tuple[float, float]] = []
        self._batches: Counter[int] = Counter()
        self._switches = self._refusals = 0

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what, arguments))

    def run(self) -> Outcome:
        """Until every request has ended."""
        for i in range(len(self.replicas)):
            self._fail_later(i)
        events, patience, coming, deadlines = self._events, self.scenario.patience, 0, 0
        requests, total = self.requests, len(self.requests)
        while self._open:
            event = events[0][0] if events else math.inf
            arrival = requests[coming].arrival if coming < total else math.inf
            deadline = requests[deadlines].arrival + patience  # all are equally patient: in the order of arrival
            self.now = min(event, arrival, deadline)
            if event == self.now:  # what is done in the last moment is done in time
                _, _, what, arguments = heapq.heappop(events)
                what(*arguments)
            elif deadline == self.now:
                self._give_up(requests[deadlines])
                deadlines += 1
            else:
                self._ask(requests[coming])
                coming += 1
        return Outcome(requests, self._down, self._batches, self._switches, self._refusals, self.now)

    # Clients

    def _ask(self, request: Request) -> None:
        if request.ending is not None:
            return
        request.attempts += 1
        i = self._route(request)
        if i is None or not self.replicas[i].alive:
            self._broke(i)
            self._retry(request, RETRY, broken=True)
            return
        replica = self.replicas[i]
        try:
            timeout = request.arrival + self.scenario.patience - self.now
            request.ticket = replica.admission.offer(request.images, request.bulk, timeout, lambda: id(request))
        except Full as full:
            self._refusals += 1
            self._retry(request, full.retry_after, broken=False)
            return
        request.replica, request.left, request.broken = i, request.images, False
        replica.holds[request.ticket] = request
        self._load[i] += request.images
        self._admit(replica, i)

    def _retry(self, request: Request, seconds: float, *, broken: bool) -> None:
        request.broken = broken
        if self.now + seconds < request.arrival + self.scenario.patience:
            self.at(self.now + seconds, self._ask, request)
        else:
            self._end(request, "lost" if broken else "gave_up")

    def _give_up(self, request: Request) -> None:
        if request.ending is None:
            if request.ticket is not None:
                self._leave(request, served=False)
                self._end(request, "late")
            else:
                self._end(request, "lost" if request.broken else "gave_up")

    def _end(self, request: Request, ending: Ending) -> None:
        assert request.ending is None
        request.ending, request.ended = ending, self.now
        self._open -= 1

    # The router

    def _route(self, request: Request) -> int | None:
        listed, load, routing = self._listed, self._load, self.scenario.routing
        if not listed:
            return None
        if routing == "random":
            return listed[int(self._random.random() * len(listed))]
        if routing == "two-choices":
            first, second = (listed[int(self._random.random() * len(listed))] for _ in range(2))
            return first if load[first] <= load[second] else second
        start = int(self._random.random() * len(listed))  # of equal ones the next: none is always the first
        least = min(listed[start:] + listed[:start], key=load.__getitem__)
        if routing == "affine" and request.lora:
            own = listed[request.lora * 2654435761 % 2**32 % len(listed)]  # Knuth's multiplicative hash
            if load[own] <= load[least] + self.scenario.slack:
                return own
        return least

    # A replica

    def _leave(self, request: Request, served: bool) -> None:
        assert request.ticket is not None
        replica = self.replicas[request.replica]
        replica.admission.leave(request.ticket, served)
        del replica.holds[request.ticket]
        self._load[request.replica] -= request.images
        request.ticket = None
        if not served and request.left:
            replica.waiting = deque(other for other in replica.waiting if other is not request)
        self._admit(replica, request.replica)

    def _admit(self, replica: Replica, i: int) -> None:
        for ticket in replica.admission.admit():
            request = replica.holds[ticket]
            replica.waiting.extend([request] * request.images)
        if replica.gathering:  # the batcher is told of every job that comes
            self._join(replica)
            if len(replica.batch) == self.scenario.max_batch:
                self._begin(i, replica.starts)
        elif not replica.running and replica.waiting:
            replica.batch, replica.waiting = choose(replica.waiting, self.scenario.max_batch)
            self._begin(i, replica.starts)

    def _join(self, replica: Replica) -> None:
        more, replica.waiting = choose(
            replica.waiting, self.scenario.max_batch - len(replica.batch), company=replica.batch[0]
        )
        replica.batch += more

    def _begin(self, i: int, starts: int) -> None:
        replica = self.replicas[i]
        if starts != replica.starts:
            return
        replica.running, replica.gathering = True, False
        replica.starts += 1
        # Whoever gave up while the batch gathered is not in it.
        replica.batch = [request for request in replica.batch if request.ending is None]
        if not replica.batch:
            self._next(replica, i)
            return
        shape, lora = replica.batch[0].key
        seconds = self._seconds[shape][len(replica.batch) - 1]
        if lora != replica.lora:
            replica.lora, self._switches = lora, self._switches + 1
            seconds += self._lora_switch
        self._batches[len(replica.batch)] += 1
        self.at(self.now + seconds, self._finish, i, replica.starts)

    def _finish(self, i: int, starts: int) -> None:
        replica = self.replicas[i]
        if starts != replica.starts:
            return
        done = replica.batch
        for request in done:
            request.left -= 1
        self._next(replica, i)  # the device goes on before anybody hears of its images
        for request in dict.fromkeys(done):
            if request.left == 0 and request.ending is None:
                self._end(request, "served")
                self._leave(request, served=True)

    def _next(self, replica: Replica, i: int) -> None:
        replica.running, replica.batch = False, []
        if replica.waiting:
            replica.batch, replica.waiting = choose(replica.waiting, self.scenario.max_batch)
            if len(replica.batch) == self.scenario.max_batch:
                self._begin(i, replica.starts)
            else:
                replica.gathering = True
                self.at(self.now + MAX_QUEUE_DELAY, self._begin, i, replica.starts)

    def _fail(self, i: int) -> None:
        replica, scenario = self.replicas[i], self.scenario
        replica.alive = False
        lost = list(replica.holds.values())
        replica.start()
        self._load[i] = 0
        if lost:
            self._broke(i)
        for request in lost:
            request.ticket = None
            self._retry(request, RETRY, broken=True)
        self._down.append((self.now, self.now + scenario.repair))
        if scenario.detect < scenario.repair:
            self.at(self.now + scenario.detect, self._unlist, i)
        self.at(self.now + scenario.repair, self._repair, i)

    def _broke(self, i: int | None) -> None:
        """A connection to a replica, which its router sees. Else a dead one, that is idle, attracts requests."""
        if i is not None and self.scenario.routing != "random":
            self._unlist(i)

    def _unlist(self, i: int) -> None:
        self._listed = [j for j in self._listed if j != i]

    def _repair(self, i: int) -> None:
        self.replicas[i].alive = True
        self._listed = sorted({*self._listed, i})
        self._fail_later(i)

    def _fail_later(self, i: int) -> None:
        if math.isfinite(self.scenario.mtbf):
            self.at(self.now + self._random.expovariate(1 / self.scenario.mtbf), self._fail, i)


def cheapest(table: Table, max_batch: int) -> list[float]:
    """Of each shape: the fewest seconds of a device that an image can take, in a batch of the best size."""
    return [min(s / n for n, s in enumerate(x.seconds[:max_batch], 1)) for x in table.shapes.values()]


def draw(table: Table, scenario: Scenario) -> list[Request]:
    """The requests, in order of arrival."""
    rng, n = np.random.default_rng(scenario.seed), scenario.requests
    shares = np.array([shape.share for shape in table.shapes.values()])
    shapes = rng.choice(len(shares), n, p=shares / shares.sum())
    counts = np.array([share for _, share in scenario.images])
    images = np.array([count for count, _ in scenario.images])[rng.choice(len(counts), n, p=counts / counts.sum())]
    loras = np.zeros(n, dtype=int)
    if scenario.loras:
        popular = 1 / np.arange(1, scenario.loras + 1)
        chosen = rng.choice(scenario.loras, n, p=popular / popular.sum()) + 1
        loras = np.where(rng.random(n) < scenario.lora_share, chosen, 0)
    bulk = rng.random(n) < scenario.bulk
    work = (np.array(cheapest(table, scenario.max_batch)) * shares).sum() / shares.sum() * images.mean()
    arrivals = arrive(scenario.arrivals, n, scenario.load * scenario.replicas / work, rng)
    rows = zip(arrivals.tolist(), shapes.tolist(), images.tolist(), bulk.tolist(), loras.tolist(), strict=True)
    return [Request(*row) for row in rows]


def arrive(kind: Arrivals, n: int, rate: float, rng: np.random.Generator) -> Floats:
    """When `n` requests come, in order: a Poisson process, or one with bursts; its mean rate is `rate` a second."""
    units = rng.exponential(1.0, n).cumsum()
    if kind == "poisson":
        return units / rate
    quiet = rate * (ON + OFF) / (BURST * ON + OFF)
    times, expected = [0.0], [0.0]
    while expected[-1] < units[-1]:  # a Poisson process on a clock that runs faster in bursts
        for mean, factor in ((OFF, 1.0), (ON, BURST)):
            seconds = rng.exponential(mean)
            times.append(times[-1] + seconds)
            expected.append(expected[-1] + seconds * quiet * factor)
    return np.interp(units, expected, times)


class Oracle:
    """Bounds that no policy passes, with the same requests, service times and failures.

    It knows all of the future, and is let off nearly everything: work is fluid and may be spread over all devices
    that are alive, a failure loses nothing, LoRAs and waiting for company cost nothing, and each image costs the
    seconds that it costs in a batch of the best size. Left are: nothing is served before it came; no more seconds are
    spent than living devices have; no request takes less than the shortest batch of its shape; and a request of which
    only a part is done in time counts as that part.

    Then the work that can be done in time of the classes of requests, of which all windows (arrival, arrival + L)
    are equally long, is a polymatroid's rank, and the greatest number of requests comes of taking classes by cost,
    cheapest first (Edmonds, 1970); the rank of a set of classes is what one device does that takes the earliest
    first and drops what is late.
    """

    def __init__(self, table: Table, scenario: Scenario, outcome: Outcome) -> None:
        cost, shortest = cheapest(table, scenario.max_batch), [min(s.seconds) for s in table.shapes.values()]
        self._arrivals = np.array([request.arrival for request in outcome.requests])
        self._work = np.array([cost[request.shape] * request.images for request in outcome.requests])
        self._shortest = np.array([shortest[request.shape] for request in outcome.requests])
        steps = sorted([(0.0, 0)] + [step for a, b in outcome.down for step in ((a, -1), (b, 1))])
        times, seconds, alive = [0.0], [0.0], scenario.replicas
        for when, change in steps:
            seconds.append(seconds[-1] + alive * (when - times[-1]))
            times.append(when)
            alive += change
        self._times, self._seconds, self._replicas = np.array(times), np.array(seconds), scenario.replicas

    def _until(self, times: Floats) -> Floats:
        """Seconds that all devices have together until then."""
        after = np.maximum(0.0, times - self._times[-1]) * self._replicas
        return np.interp(times, self._times, self._seconds) + after

    def served(self, within: float) -> float:
        """How many requests can be done within so many seconds of their arrival, at most."""
        possible = self._shortest <= within
        work, arrivals = self._work[possible], self._arrivals[possible]
        opens, closes = self._until(arrivals), self._until(arrivals + within)
        count = before = 0.0
        for cost in np.unique(work):
            chosen = work <= cost
            total = _fluid(opens[chosen].tolist(), work[chosen].tolist(), closes[chosen].tolist())
            count += max(0.0, total - before) / float(cost)
            before = max(before, total)
        return min(count, float(possible.sum()))

    def latency(self, requests: float) -> float:
        """Seconds within which so many requests can be done, at least (to 1 %, rounded down)."""
        low, high = 0.0, float(self._shortest.min())
        while self.served(high) < requests * (1 - 1e-9):
            low, high = high, 2 * high
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.served(middle) >= requests * (1 - 1e-9) else (middle, high)
        return low


def _fluid(opens: list[float], work: list[float], closes: list[float]) -> float:
    """Work that one device of speed 1 does, if it takes the earliest first and drops what is late."""
    at = total = 0.0
    for open_, seconds, close in zip(opens, work, closes, strict=True):
        begin = at if at > open_ else open_
        at = begin + seconds
        if at > close:
            at = close
        total += at - begin
    return total


def report(table: Table, scenario: Scenario, outcome: Outcome) -> dict[str, Any]:
    """The figures of a run, beside the oracle's."""
    endings = Counter(str(request.ending) for request in outcome.requests)
    latencies = np.array([r.ended - r.arrival for r in outcome.requests if r.ending == "served"])
    span = outcome.requests[-1].arrival
    oracle = Oracle(table, scenario, outcome)
    best = oracle.served(scenario.patience)

    def seconds(percent: int) -> dict[str, float | None]:
        if not len(latencies):
            return {"fleet": None, "oracle": None}
        rank = math.ceil(len(latencies) * percent / 100)
        return {
            "fleet": float(f"{np.partition(latencies, rank - 1)[rank - 1]:.4g}"),
            "oracle": float(f"{oracle.latency(rank):.4g}"),
        }

    images = sum(size * count for size, count in outcome.batches.items())
    return {
        "endings": {name: endings[name] for name in ("served", "late", "gave_up", "lost")},
        "requests_per_second": round(len(outcome.requests) / span, 1) if span else None,
        "goodput": {
            "fleet": round(len(latencies) / len(outcome.requests), 4),
            "oracle": round(best / len(outcome.requests), 4),
        },
        "p50_seconds": seconds(50),
        "p99_seconds": seconds(99),
        "mean_batch": round(images / max(1, outcome.batches.total()), 2),
        "lora_switches_per_batch": round(outcome.switches / max(1, outcome.batches.total()), 3),
        "refusals_per_request": round(outcome.refusals / len(outcome.requests), 3),
        "failures": len(outcome.down),
        "simulated_seconds": round(outcome.end, 1),
    }
