"""Signals that ask a run to stop, and what is done about them: a flag is set, nothing else."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECOND = 1.0
"""Seconds after which another Ctrl-C is meant: `timeout`, shells and other parents send one twice at once."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block a stop request makes the yielded function true.

    Only a second Ctrl-C, a while after the first, ends the process at once. A signal that was ignored before stays
    so (`nohup`). In a thread that is not the main one, where Python allows no handlers, there are none.
    """
    asked: list[float] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT and time.monotonic() - asked[0] > SECOND:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked.append(time.monotonic())

    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, ask) for number in wanted}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
