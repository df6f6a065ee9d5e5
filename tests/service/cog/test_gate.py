"""In order of arrival, never too many inside, and when to come again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.service.cog.gate import Full, Gate
from tests.service.cog.test_front import run, until


def test_retry_after_follows_the_measured_rate() -> None:
    async def test() -> None:
        now = 0.0
        gate = Gate(1, 5, lambda: now)
        await gate.enter()
        waiting = [asyncio.create_task(gate.enter()) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Full):
            gate.check()
        now = 2.0
        assert gate.retry_after() == 10  # nobody has left yet: not faster than 2 s each
        for _ in range(3):
            gate.leave()
            now += 2.0
            await asyncio.sleep(0)
        assert gate.waiting == 2 and gate.retry_after() == 6  # 8 s for three, two to come
        now += 10_000
        assert gate.retry_after() == 300
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(test())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(["enter", "leave", "refuse", "hang up"]), st.integers(0, 9)), max_size=40),
)
def test_the_gate_keeps_its_promises(slots: int, most: int, steps: list[tuple[str, int]]) -> None:
    async def test() -> None:
        gate = Gate(slots, most)
        tasks: dict[asyncio.Task[Any], int] = {}  # those that wait, and their numbers
        inside: list[int] = []
        begun = 0

        async def settle() -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            await until(lambda: gate.waiting == sum(not task.done() for task in tasks))
            ended = {task: tasks.pop(task) for task in list(tasks) if task.done()}
            let_in = [number for task, number in ended.items() if not task.cancelled()]
            assert all(number < other for number in let_in for other in tasks.values())  # who came first goes first
            inside.extend(sorted(let_in))
            assert len(inside) == gate.inside <= slots

        for step, which in steps:
            if step == "enter":
                try:
                    gate.check()
                except Full:
                    assert gate.waiting >= most
                    continue
                tasks[asyncio.create_task(gate.enter())] = begun
                begun += 1
                await asyncio.sleep(0)
            elif step == "leave" and inside:
                inside.pop(which % len(inside))
                gate.leave()
            elif step == "refuse" and inside:
                number = inside.pop(which % len(inside))
                tasks[asyncio.create_task(gate.again(number))] = number
            elif step == "hang up" and tasks:
                list(tasks)[which % len(tasks)].cancel()
            await settle()
        while tasks or inside:
            if inside:
                inside.pop(0)
                gate.leave()
            await asyncio.sleep(0 if inside else 0.001)
            await settle()
        assert (gate.inside, gate.waiting) == (0, 0)

    run(test())
