"""The guard: updates that had to be skipped are counted and said, and a run that no longer learns is ended."""

from __future__ import annotations

from typing import Any

from dmd2.runtime.errors import TrainingDiverged
from dmd2.runtime.terminal import say

IN_A_ROW = 50
WINDOW = 100


class Guard:
    """By phase, which of the last `WINDOW` updates were skipped because something was not finite."""

    def __init__(self) -> None:
        self.recent: dict[str, list[int]] = {}
        self.skipped: dict[str, int] = {}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Guard:
        """The guard that has this `state`."""
        guard = cls()
        guard.recent = {name: list(values) for name, values in state["recent"].items()}
        guard.skipped = dict(state["skipped"])
        return guard

    def state(self) -> dict[str, Any]:
        return {"recent": {k: list(v) for k, v in self.recent.items()}, "skipped": dict(self.skipped)}

    def note(self, done: int, skipped: dict[str, Any]) -> None:
        """Takes in step `done`: phase → whether its update was skipped; None if it was not its turn."""
        for name, value in skipped.items():
            if value is None:
                continue
            recent = self.recent.setdefault(name, [])
            recent.append(int(bool(value)))
            del recent[:-WINDOW]
            if value:
                total = self.skipped[name] = self.skipped.get(name, 0) + 1
                if total & (total - 1) == 0:  # the first, the second, the fourth, …
                    say(f"step {done}: {name}: loss or gradient is not finite, update skipped ({total} so far)")

    def check(self, done: int, finished: bool = False) -> None:
        """
        Raises:
            TrainingDiverged: a phase skipped its last `IN_A_ROW` updates, or most of its last `WINDOW`; at the end,
                most of however few there were.
        """
        for name, recent in self.recent.items():
            row = len(recent) >= IN_A_ROW and all(recent[-IN_A_ROW:])
            most = (finished or len(recent) == WINDOW) and 2 * sum(recent) > len(recent)
            if row or most:
                raise TrainingDiverged(
                    f"step {done}: {name}: {sum(recent)} of the last {len(recent)} updates were skipped, as loss or "
                    "gradient was not finite; look at the data, or begin anew with a lower lr or a longer warmup"
                )
