"""Runs a command that ends with the process that started this one, even after `kill -9`.

`python leash.py FOLDER COMMAND …`, in a session of its own, with stdin a pipe that the starter holds open. When the
pipe ends, the whole process group is killed and FOLDER deleted. A SIGTERM is passed on; the exit status is the
command's own. Needs nothing but the standard library, and no system call that only Linux has.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from types import FrameType


def main() -> int:
    folder, *command = sys.argv[1:]
    asked = False
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.send_signal(signal.SIGTERM)

    wake, waker = os.pipe()
    for end in (wake, waker):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake `select`
    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's: the starter decides what it means
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    if asked:
        child.send_signal(signal.SIGTERM)
    while child.poll() is None:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        if 0 in ready and not os.read(0, 4096):
            end_all(folder)
    return 128 - child.returncode if child.returncode < 0 else child.returncode


def end_all(folder: str) -> None:
    """Kills the process group with this process in it; what is left to do falls to a child that has left it."""
    group = os.getpgrp()
    if os.fork() == 0:
        os.setsid()
        os.killpg(group, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)  # nobody is left to tell
        os._exit(0)
    signal.pause()


if __name__ == "__main__":
    sys.exit(main())
