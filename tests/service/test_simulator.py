"""The simulated fleet: every request ends once, a seed says it all, nobody beats the oracle, small cases by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.inference.batcher import MAX_QUEUE_DELAY
from dmd2.runtime.errors import UserError
from dmd2.service.simulator import Fleet, Oracle, Outcome, Request, Scenario, Table, draw, report

TABLE = Table(
    shapes={
        "1 step": {"seconds": [1.0, 1.2, 1.4, 1.6], "share": 0.7},
        "4 steps": {"seconds": [3.0, 4.0, 5.0, 6.0], "share": 0.3},
    },
    lora_switch=0.5,
)
SMALL = Scenario(replicas=1, requests=1, max_batch=4, queue=2, patience=60.0)


def wish(arrival: float, *, shape: int = 0, images: int = 1, bulk: bool = False, lora: int = 0) -> Request:
    return Request(arrival, shape, images, bulk, lora)


def run(scenario: Scenario, *requests: Request) -> Outcome:
    return Fleet(TABLE, scenario, requests or None).run()


def ends(outcome: Outcome) -> list[tuple[str | None, float]]:
    return [(request.ending, pytest.approx(request.ended)) for request in outcome.requests]


scenarios = st.builds(
    Scenario,
    replicas=st.integers(1, 5),
    requests=st.integers(1, 150),
    load=st.floats(0.1, 3.0),
    arrivals=st.sampled_from(["poisson", "bursty"]),
    routing=st.sampled_from(["random", "two-choices", "least-loaded", "affine"]),
    queue=st.integers(0, 8),
    max_batch=st.integers(1, 4),
    patience=st.floats(0.5, 60.0),
    bulk=st.floats(0, 1),
    loras=st.integers(0, 4),
    slack=st.integers(0, 8),
    mtbf=st.one_of(st.just(math.inf), st.floats(5.0, 100.0)),
    repair=st.floats(0.5, 30.0),
    detect=st.floats(0.0, 10.0),
    seed=st.integers(0, 9),
)


@settings(max_examples=60, deadline=None)
@given(scenarios)
def test_every_request_ends_in_exactly_one_way_and_none_beats_the_oracle(scenario: Scenario) -> None:
    fleet = Fleet(TABLE, scenario)
    outcome = fleet.run()
    assert len(outcome.requests) == scenario.requests
    assert {request.ending for request in outcome.requests} <= {"served", "late", "gave_up", "lost"}
    for request in outcome.requests:
        assert request.ticket is None
        assert request.arrival <= request.ended <= request.arrival + scenario.patience + 1e-9
        assert (request.left == 0) or request.ending != "served"
    for replica, load in zip(fleet.replicas, fleet._load, strict=True):
        assert not replica.holds and not replica.waiting and load == 0
        assert replica.admission.running == replica.admission.waiting == 0
    images = sum(request.images for request in outcome.requests if request.ending == "served")
    assert sum(size * count for size, count in outcome.batches.items()) >= images
    assert all(1 <= size <= scenario.max_batch for size in outcome.batches)

    oracle = Oracle(TABLE, scenario, outcome)
    latencies = sorted(r.ended - r.arrival for r in outcome.requests if r.ending == "served")
    assert len(latencies) <= oracle.served(scenario.patience) + 1e-6 <= scenario.requests + 1e-5
    for rank in {1, (len(latencies) + 1) // 2, len(latencies)} - {0} if latencies else ():
        assert oracle.latency(rank) <= latencies[rank - 1] + 1e-6


@settings(max_examples=15, deadline=None)
@given(scenarios)
def test_a_seed_says_how_it_ends(scenario: Scenario) -> None:
    first, second = (Fleet(TABLE, scenario).run() for _ in range(2))
    assert report(TABLE, scenario, first) == report(TABLE, scenario, second)
    assert ends(first) == ends(second)


def test_another_seed_is_another_run() -> None:
    scenario = Scenario(replicas=2, requests=100, max_batch=4)
    assert ends(run(scenario)) != ends(run(replace(scenario, seed=1)))


def test_an_idle_replica_begins_at_once_and_who_came_meanwhile_shares_a_batch() -> None:
    outcome = run(SMALL, wish(0.0), wish(0.1), wish(0.2))
    gathered = 1.0 + MAX_QUEUE_DELAY  # one ran just before, and the batch is not full
    assert ends(outcome) == [("served", 1.0), ("served", gathered + 1.2), ("served", gathered + 1.2)]
    assert outcome.batches == Counter({1: 1, 2: 1})


def test_a_full_batch_waits_for_nobody() -> None:
    outcome = run(SMALL, wish(0.0), wish(0.1, images=4))
    assert ends(outcome) == [("served", 1.0), ("served", 2.6)]


def test_other_shapes_and_loras_do_not_share_a_batch_and_a_switch_costs() -> None:
    outcome = run(SMALL, wish(0.0), wish(0.1, shape=1), wish(0.2, lora=1), wish(0.3, lora=1))
    delay = MAX_QUEUE_DELAY
    assert ends(outcome) == [
        ("served", 1.0),
        ("served", 4.0 + delay),
        *[("served", 4.0 + 2 * delay + 0.5 + 1.2)] * 2,
    ]
    assert outcome.switches == 1


def test_the_refused_come_back_when_told_and_are_served() -> None:
    """Eight images with the device, two requests wait, the next is told by the rate: none was measured, so 1 s."""
    requests = [wish(0.0, images=4), wish(0.1, images=4), wish(0.2), wish(0.3), wish(0.4)]
    outcome = run(SMALL, *requests)
    assert outcome.refusals >= 1 and [r.attempts > 1 for r in outcome.requests] == [False] * 4 + [True]
    assert {request.ending for request in outcome.requests} == {"served"}
    assert outcome.requests[4].ended >= outcome.requests[3].ended


def test_who_is_impatient_ends_late_or_gives_up() -> None:
    requests = [wish(0.0, shape=1, images=4), wish(0.1, shape=1, images=4), wish(0.2), wish(0.3), wish(0.4)]
    outcome = run(replace(SMALL, patience=6.0), *requests)
    # The second is on the device when its client leaves; who waits is let in once the first is done, yet comes after.
    assert ends(outcome)[:4] == [("served", 6.0), ("late", 6.1), ("late", 6.2), ("late", 6.3)]
    assert outcome.requests[4].ending in ("gave_up", "late") and outcome.refusals >= 1
    again = [wish(r.arrival, shape=r.shape, images=r.images) for r in requests]
    outcome = run(replace(SMALL, patience=0.5), *again)
    assert [request.ending for request in outcome.requests] == ["late"] * 4 + ["gave_up"]


class FailsOnce(Fleet):
    """Replica 0 dies half a second in."""

    def run(self) -> Outcome:
        self.at(0.5, self._fail, 0)
        return super().run()


def test_what_dies_with_a_replica_is_asked_for_again() -> None:
    scenario = replace(SMALL, replicas=2, repair=10.0, detect=0.0, routing="least-loaded")
    for seed in range(4):  # whichever replica gets it
        outcome = FailsOnce(TABLE, replace(scenario, seed=seed), [wish(0.0)]).run()
        request = outcome.requests[0]
        assert (request.attempts, request.ended) in ((1, 1.0), (2, 2.5))
        assert outcome.down == [(0.5, 10.5)] or request.attempts == 1
    alone = replace(SMALL, repair=10.0, detect=0.0)
    assert ends(FailsOnce(TABLE, alone, [wish(0.0)]).run()) == [("served", 11.5)]  # asks every second, back at 10.5
    assert FailsOnce(TABLE, replace(alone, patience=5.0), [wish(0.0)]).run().requests[0].ending == "lost"


def test_a_dead_replica_that_is_still_listed_breaks_connections() -> None:
    scenario = replace(SMALL, repair=10.0, detect=20.0, patience=3.0, routing="random")
    outcome = FailsOnce(TABLE, scenario, [wish(0.0), wish(1.0)]).run()
    assert [(request.ending, request.attempts) for request in outcome.requests] == [("lost", 3), ("lost", 3)]


@pytest.mark.parametrize("routing", ["least-loaded", "two-choices", "affine"])
def test_a_dead_replica_that_looks_idle_attracts_nobody(routing: Any) -> None:
    """The router takes it out at the first connection that breaks, long before anything else tells it."""
    scenario = replace(SMALL, replicas=2, repair=1000.0, detect=900.0, routing=routing)
    outcome = FailsOnce(TABLE, scenario, [wish(0.5 * i) for i in range(20)]).run()
    assert all(request.ending == "served" for request in outcome.requests)
    assert sum(request.attempts - 1 for request in outcome.requests) == 1  # the one that it broke with


def test_affine_routing_keeps_a_lora_where_it_is() -> None:
    scenario = Scenario(replicas=4, requests=2000, max_batch=4, loras=8, lora_share=1.0, load=0.5)
    switches = {kind: run(replace(scenario, routing=kind)).switches for kind in ("least-loaded", "affine")}
    assert switches["affine"] < 0.75 * switches["least-loaded"]


@pytest.mark.parametrize("kind", ["poisson", "bursty"])
def test_requests_come_in_order_at_the_rate_that_was_asked_for(kind: str) -> None:
    scenario = Scenario(replicas=4, requests=50_000, max_batch=4, load=0.5, arrivals=kind)  # type: ignore[arg-type]
    requests = draw(TABLE, scenario)
    times = [request.arrival for request in requests]
    assert times == sorted(times)
    work = sum((0.4, 1.5)[request.shape] * request.images for request in requests)  # 1.6 / 4, 6.0 / 4 s an image
    assert work / (4 * times[-1]) == pytest.approx(0.5, rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variation = sum((gap - mean) ** 2 for gap in gaps) / len(gaps) / mean**2
    assert variation == pytest.approx(1.0, abs=0.1) if kind == "poisson" else variation > 1.15


def test_the_oracle_by_hand() -> None:
    """One device; an image costs 0.4 s at best (1.6 / 4), and no batch of its shape is shorter than 1 s."""
    scenario = replace(SMALL, patience=1.0)
    outcome = Outcome([wish(0.0) for _ in range(5)], [], Counter(), 0, 0, 0.0)
    oracle = Oracle(TABLE, scenario, outcome)
    assert oracle.served(0.99) == 0
    assert oracle.served(1.0) == pytest.approx(2.5)
    assert oracle.served(2.0) == pytest.approx(5.0)
    assert oracle.latency(5) == pytest.approx(2.0, rel=0.02)
    assert oracle.latency(2) == pytest.approx(1.0, rel=0.02)
    # Cheap ones first: 1.5 s each for the others, of which one second is left after two of 0.4 s.
    mixed = Outcome([wish(0.0, shape=1), wish(0.0), wish(0.0)], [], Counter(), 0, 0, 0.0)
    assert Oracle(TABLE, scenario, mixed).served(3.0) == pytest.approx(3.0)
    assert Oracle(TABLE, scenario, mixed).served(1.5) == pytest.approx(2.0)  # no batch of four steps is so short
    # A device that is away from 0.5 to 2.5 s.
    broken = Outcome([wish(0.0) for _ in range(5)], [(0.5, 2.5)], Counter(), 0, 0, 0.0)
    assert Oracle(TABLE, scenario, broken).served(2.0) == pytest.approx(1.25)
    assert Oracle(TABLE, scenario, broken).served(4.0) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "table: no table in JSON"),
        ("[1]", "table: no table in JSON"),
        ("{}", "table: shapes: Field required"),
        ('{"shapes": {}}', "table: shapes: .* at least 1"),
        ('{"shapes": {"a": {"seconds": [0]}}}', r"table: shapes.a.seconds.0: .* greater than 0"),
        ('{"shapes": {"a": {"seconds": [1e999]}}}', "table: .*finite"),
        ('{"shapes": {"a": {"seconds": [1]}, "b": {"seconds": [1, 2]}}}', "table: .*the same batch sizes"),
        ('{"shapes": {"a": {"seconds": [1], "x": 1}}}', "table: shapes.a.x: Extra inputs"),
        ('{"shapes": {"a": {"seconds": [1]}}, "lora_switch": -1}', "table: lora_switch"),
        ('{"shapes": {"a": {"seconds": ["quick"]}}}', "table: shapes.a.seconds.0"),
    ],
)
def test_a_table_that_is_none_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Table.read(path)
    assert "\n" not in str(error.value)


def test_bad_scenarios_are_refused() -> None:
    for change in ({"load": 0.0}, {"load": math.nan}, {"replicas": 0}, {"queue": -1}, {"bulk": 1.5}, {"mtbf": 0.0}):
        with pytest.raises(UserError, match=next(iter(change))):
            Scenario(**change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_batch 5: the table ends at 4"):
        run(Scenario(max_batch=5))


def test_a_report_is_json() -> None:
    scenario = Scenario(replicas=2, requests=300, max_batch=4, load=2.0, patience=20.0)
    figures = json.loads(json.dumps(report(TABLE, scenario, run(scenario))))
    assert sum(figures["endings"].values()) == 300
    assert figures["goodput"]["fleet"] == pytest.approx(figures["endings"]["served"] / 300, abs=1e-4)
    assert figures["goodput"]["fleet"] <= figures["goodput"]["oracle"] <= 1
    assert figures["p99_seconds"]["fleet"] >= figures["p99_seconds"]["oracle"]
