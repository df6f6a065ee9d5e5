"""Keeps Cog's server alive: starts it, watches its `/health-check`, replaces it when it has died, stops it well.

When the worker of Cog's server dies, the server itself lives on, unhealthy for ever; and a killed server may leave
its worker behind. So both run in a process group of their own, which is cleared away whenever the server ends.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dmd2.errors import UserError
from dmd2.service.schema import max_concurrency


@dataclass(frozen=True)
class Limits:
    """All times in seconds; counts are of health checks in a row."""

    poll: float = 0.5  # between health checks
    answer: float = 8.0  # for one; Cog itself gives the predictor's healthcheck() 5
    unhealthy: int = 2  # that say so: one may be a healthcheck() that was late
    silent: int = 6  # without an answer, of a server that had answered
    orphaned: int = 6  # that say "starting" though there is no worker
    start: float = 120.0  # until the first answer
    drain: float = 5.0  # for the predictions under way in a server that is to be replaced
    stable: float = 10.0  # ready for so long: its end does not count as a crash at once
    pauses: tuple[float, ...] = (
        0.0,
        1.0,
        2.0,
        4.0,
        8.0,
    )  # before a restart, by crashes at once in a row; then give up


class Watch:
    """Judges one server by its health checks. Knows nothing of processes."""

    def __init__(self, limits: Limits, began: float) -> None:
        self._limits = limits
        self._began = began
        self._answered = False
        self._silent = self._unhealthy = self._orphaned = 0
        self.ready_since: float | None = None

    def judge(self, status: str | None, has_worker: bool, now: float) -> str | None:
        """Why the server must be replaced, None as long as it need not.

        Args:
            status: what `/health-check` says; None is no answer.
            has_worker: whether the server has a living child.
            now: on the same clock as `began`, in seconds.
        """
        if status is None:
            self._silent += 1
            if self._answered and self._silent >= self._limits.silent:
                return f"gave no answer to {self._silent} health checks in a row"
            if not self._answered and now - self._began > self._limits.start:
                return f"gave no answer within {self._limits.start:.0f} s"
            return None
        self._answered, self._silent = True, 0
        self._unhealthy = self._unhealthy + 1 if status in ("UNHEALTHY", "DEFUNCT") else 0
        self._orphaned = self._orphaned + 1 if status == "STARTING" and not has_worker else 0
        if status in ("READY", "BUSY") and self.ready_since is None:
            self.ready_since = now
        if status == "SETUP_FAILED":
            return "setup failed"
        if self._unhealthy >= self._limits.unhealthy:
            return "is unhealthy: its worker died, or the predictor's healthcheck() failed"
        if self._orphaned >= self._limits.orphaned:
            return "lost its worker before it was set up"
        return None


class Supervisor:
    """Runs `command` in `folder` until a signal stops it, or it is beyond repair.

    Args:
        host, port: where the server will answer.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        host: str,
        port: int,
        limits: Limits | None = None,
    ) -> None:
        self._command, self._folder, self._environment = list(command), folder, dict(environment)
        self._address = (local_address(host), port)
        self._limits = limits or Limits()
        self._server: subprocess.Popen[bytes] | None = None
        self._stops = 0  # signals received
        self._setup_log = ""

    def run(self) -> int:
        """Blocks. Must be called on the main thread, for its signals.

        SIGTERM or SIGINT lets the server finish its predictions, a second one does not.

        Returns:
            The exit status: the server's own after a signal; 1 if setup fails at first or the server keeps crashing.
        """
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._keep_alive()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _keep_alive(self) -> int:
        crashes, was_ready = 0, False
        while True:
            reason, ready_seconds, status = self._serve()
            if self._interrupted():
                return status
            was_ready = was_ready or ready_seconds is not None
            if self._setup_log:
                say(f"SETUP FAILED\n{self._setup_log.rstrip()}")
                if not was_ready:  # later it may be the dead worker's memory, not yet free
                    say("the predictor's setup() failed at its first run; not trying again")
                    return 1
            crashes = 1 if ready_seconds is not None and ready_seconds >= self._limits.stable else crashes + 1
            if crashes > len(self._limits.pauses):
                say(f"the server {reason}; {crashes} times in a row, giving up")
                return 1
            pause = self._limits.pauses[crashes - 1]
            say(f"the server {reason}; starting it again" + (f" in {pause:.0f} s" if pause else ""))
            self._sleep(pause)
            if self._interrupted():
                return 0

    def _serve(self) -> tuple[str, float | None, int]:
        """One server from start to end: why it ended, for how many seconds it was ready (None: never), its status."""
        self._setup_log = ""
        server = subprocess.Popen(
            self._command, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._server = server
        try:
            watch = Watch(self._limits, time.monotonic())
            reason = self._watch(server, watch)
            ready = None if watch.ready_since is None else time.monotonic() - watch.ready_since
            if not self._interrupted():
                self._put_down(server)
            return reason, ready, exit_status(server.wait())
        finally:
            clear_group(server.pid)
            self._server = None

    def _watch(self, server: subprocess.Popen[bytes], watch: Watch) -> str:
        if self._interrupted():  # a signal that came just before there was a server to pass it to
            server.send_signal(signal.SIGTERM)
        while True:
            self._sleep(self._limits.poll)
            if self._interrupted():
                server.wait()  # while it drains it answers nobody
            if server.poll() is not None:
                return f"exited with status {exit_status(server.returncode)}"
            health = ask_health(self._address, self._limits.answer) or {}
            status = health.get("status")
            has_worker = status != "STARTING" or has_living_child(server.pid)
            reason = watch.judge(status, has_worker, time.monotonic())
            if reason is not None and not self._interrupted():
                if status == "SETUP_FAILED":
                    self._setup_log = str(health.get("setup", {}).get("logs") or "(no log)")
                return reason

    def _put_down(self, server: subprocess.Popen[bytes]) -> None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(self._limits.drain)
        except subprocess.TimeoutExpired:
            server.kill()

    def _sleep(self, seconds: float) -> None:
        """Sleeps, but not on when a signal comes."""
        until = time.monotonic() + seconds
        while not self._interrupted() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _interrupted(self) -> bool:
        return self._stops > 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM if self._stops == 1 else signal.SIGKILL)


def server_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with what Cog's server needs outside an image that `cog build` made.

    Raises:
        UserError: no predict.py in `folder`, or Cog could not read it.
    """
    added = dict(environment)
    file, _, target = added.setdefault("COG_PREDICT_TYPE_STUB", "predict.py:Predictor").partition(":")
    if not (folder / file).is_file():
        raise UserError(f"{folder / file}: no such file; expected Cog's predictor there")
    if "COG_MAX_CONCURRENCY" not in added:
        source = (folder / file).read_text(encoding="utf-8")
        added["COG_MAX_CONCURRENCY"] = str(max_concurrency(source, file, target))
    # The server starts its worker as `python`, whichever PATH finds: without cog in it, it says "starting" for ever.
    added["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), added.get("PATH", os.defpath)])
    return added


def check_port(host: str, port: int) -> None:
    """Does nothing if a server could listen there now.

    Raises:
        UserError: it could not.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"port {port} on {host}: cannot listen there ({reason}); choose another") from error


def local_address(host: str) -> str:
    """Where to reach a server on this machine that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def ask_health(address: tuple[str, int], timeout: float) -> dict[str, Any] | None:
    """What `/health-check` answers within `timeout` seconds; None is no answer, or none that makes sense."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        connection.request("GET", "/health-check")
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else None


def has_living_child(pid: int) -> bool:
    """Whether process `pid` has a child that runs. True where the system has no /proc to look it up in."""
    return not Path("/proc/self").exists() or any(parent == pid for parent, _ in _living())


def clear_group(pid: int, seconds: float = 5.0) -> None:
    """Kills whatever is left of the process group that `pid` led; waits until it has ended, but at most so long."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(group == pid for _, group in _living()):
        time.sleep(0.02)


def _living() -> Iterator[tuple[int, int]]:
    """(parent, process group) of every process that runs. A zombie, for whose end nobody has asked yet, does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group, *_ = stat.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue  # it has just ended
        if state not in (b"Z", b"X"):
            yield int(parent), int(group)


def exit_status(returncode: int) -> int:
    """A shell's view of `Popen.returncode`: 128 + signal for a process that a signal ended."""
    return 128 - returncode if returncode < 0 else returncode


def say(message: str) -> None:
    """A line in the log, beside the server's own."""
    print(f"entrypoint: {message}", file=sys.stderr, flush=True)
