"""Keeps Cog's server alive: starts it, watches its `/health-check`, replaces it when it has died, stops it well.

When the worker of Cog's server dies, the server itself lives on, unhealthy for ever; and a killed server may leave
its worker behind. So both run in a process group of their own, which is cleared away whenever the server ends, and
on a leash (leash.py), which does the same should the supervisor itself be killed. Their temporary files have a folder
of their own, since Cog leaves there what it downloaded for predictions that failed or were cancelled.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dmd2.runtime.errors import UserError
from dmd2.service.cog.schema import max_concurrency

LEASH = Path(__file__).with_name("leash.py")


@dataclass(frozen=True)
class Limits:
    """Times (in seconds) and numbers of health checks in a row after which a server is replaced."""

    poll: float = 0.5  # between health checks
    answer: float = 8.0  # for one; Cog itself gives the predictor's healthcheck() 5
    unhealthy: int = 2  # that say so: one may be a healthcheck() that was late
    silent: int = 6  # without an answer, of a server that had answered
    orphaned: int = 6  # that say "starting" though there is no worker
    start: float = 120.0  # until the first answer
    drain: float = 5.0  # for the predictions under way in a server that is to be replaced
    pauses: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    """before a restart, by starts in a row that did not lead to READY; then give up"""
    leftover: float = 3600.0  # a temporary file so old belongs to no prediction


class Watch:
    """Decides from a server's health checks whether to replace it. Knows nothing of processes."""

    def __init__(self, limits: Limits, began: float) -> None:
        self._limits = limits
        self._began = began
        self._answered = False
        self._silent = self._unhealthy = self._orphaned = 0
        self.ready_since: float | None = None

    def fault(self, status: str | None, has_worker: bool, now: float) -> str | None:
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


class Restarts:
    """Decides whether a server that ended is followed by another. Knows nothing of processes.

    Only starts that never became ready count: a worker that is killed after that, however soon and however often,
    says nothing about whether the next one will work.
    """

    def __init__(self, pauses: Sequence[float]) -> None:
        self._pauses = pauses
        self._ever_ready = False
        self.failed = 0  # starts in a row

    def after(self, was_ready: bool, setup_failed: bool) -> float | None:
        """Seconds to wait before the next start; None: give up.

        Args:
            was_ready: whether the server that ended had been ready.
            setup_failed: whether it ended because the predictor's setup() raised. If none was ever ready, that is
                final; later it may be a dead worker's memory, not yet free.
        """
        self._ever_ready = self._ever_ready or was_ready
        self.failed = 0 if was_ready else self.failed + 1
        if self.failed > len(self._pauses) or (setup_failed and not self._ever_ready):
            return None
        return self._pauses[max(0, self.failed - 1)]


class Supervisor:
    """Runs `command` in `folder` until a signal stops it, or it is beyond repair.

    Args:
        host, port: where the server will answer. Port 0: on another free one after each start, told to it by PORT.

    Other threads may read `address`, where the server of now is asked (None: there is none), and `health`, its last
    answer to a health check.
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
        self._host, self._port = local_address(host), port
        self._limits = limits or Limits()
        self.address: tuple[str, int] | None = None
        self.health: dict[str, Any] = {"status": "STARTING"}
        self._server: subprocess.Popen[bytes] | None = None
        self._stops = 0  # signals received
        self._setup_log = ""
        self.noted_ready = False

    def run(self) -> int:
        """Runs until the end. Must be called on the main thread, for its signals.

        SIGTERM or SIGINT lets the server finish its predictions, a second one does not.

        Returns:
            The exit status: the server's own after a signal; 1 if setup fails at first or the server keeps crashing.

        Raises:
            UserError: there is no place for temporary files.
        """
        self._temporary = private_folder()
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._keep_alive()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            remove_old(self._temporary)
            with contextlib.suppress(OSError):  # what could not be deleted was said
                self._temporary.rmdir()

    def _keep_alive(self) -> int:
        restarts = Restarts(self._limits.pauses)
        while True:
            reason, was_ready, status = self._serve()
            if self.stopping():
                return status
            remove_old(self._temporary)
            if self._setup_log:
                say(f"SETUP FAILED\n{self._setup_log.rstrip()}")
            pause = restarts.after(was_ready, bool(self._setup_log))
            if pause is None and restarts.failed > len(self._limits.pauses):
                say(f"the server {reason}; {restarts.failed} times in a row, giving up")
                return 1
            if pause is None:
                say("the predictor's setup() failed at its first run; not trying again")
                return 1
            say(f"the server {reason}; starting it again" + (f" in {pause:.0f} s" if pause else ""))
            self._sleep(pause)
            if self.stopping():
                return 0

    def _serve(self) -> tuple[str, bool, int]:
        """Runs one server from start to end: why it ended, whether it ever was ready, its exit status."""
        self._setup_log = ""
        address = self._host, self._port or free_port(self._host)
        if not is_private(self._temporary):  # a cleaner of temporary files may have taken it
            self._temporary = private_folder()
        own = {"TMPDIR": str(self._temporary), "PORT": str(address[1])}
        server = subprocess.Popen(
            [sys.executable, "-I", "-S", str(LEASH), str(self._temporary), *self._command],
            cwd=self._folder,
            env=self._environment | own,
            stdin=subprocess.PIPE,  # never written to: its end says that this process has ended
            start_new_session=True,
        )
        self.health, self.noted_ready = {"status": "STARTING"}, False
        self._server, self.address = server, address
        try:
            watch = Watch(self._limits, time.monotonic())
            reason = self._watch(server, address, watch)
            self.health = {"status": "STARTING"}
            if not self.stopping():
                self._put_down(server)
            return reason, watch.ready_since is not None or self.noted_ready, exit_status(server.wait())
        finally:
            clear_group(server.pid)
            if server.stdin is not None:
                server.stdin.close()
            self._server = self.address = None

    def _watch(self, server: subprocess.Popen[bytes], address: tuple[str, int], watch: Watch) -> str:
        if self.stopping():  # a signal that came just before there was a server to pass it to
            server.send_signal(signal.SIGTERM)
        swept = time.monotonic()
        while True:
            self._sleep(self._limits.poll)
            if self.stopping():
                server.wait()  # while it drains it answers nobody
            if server.poll() is not None:
                return f"exited with status {exit_status(server.returncode)}"
            health = ask_health(address, self._limits.answer) or {}
            status, now = health.get("status"), time.monotonic()
            has_worker = status != "STARTING" or has_grandchild(server.pid)
            reason = watch.fault(status, has_worker, now)
            if status is not None:
                self.health = health
            if now - swept > self._limits.leftover / 60:
                swept = now
                remove_old(self._temporary, self._limits.leftover)
            if reason is not None and not self.stopping():
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
        while not self.stopping() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def note(self, address: tuple[str, int], health: dict[str, Any]) -> None:
        """Takes a status that another thread was told: the server may have been ready between two checks."""
        if address == self.address:
            self.health = health
            self.noted_ready = self.noted_ready or health.get("status") in ("READY", "BUSY")

    def stopping(self) -> bool:
        """Whether a signal has come: predictions under way are finished, new ones not begun."""
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
    """Raises UserError unless a server could listen there now.

    Raises:
        UserError: it could not.
    """
    listen(host, port).close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: that cannot be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends what is small at once (TCP_NODELAY); without, each answer takes 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # without it another could bind as well
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"port {port} on {host}: cannot listen there ({reason}); choose another") from error
    return listener


def local_address(host: str) -> str:
    """Where to reach a server on this machine that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def ask_health(address: tuple[str, int], timeout: float) -> dict[str, Any] | None:
    """The status from `/health-check` within `timeout` seconds; None: no answer, or none that makes sense."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        connection.request("GET", "/health-check")
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else None


def free_port(host: str) -> int:
    """A port on which nobody listens now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def private_folder() -> Path:
    """A new temporary folder that only this user may enter.

    Raises:
        UserError: there is no place for it.
    """
    try:
        return Path(tempfile.mkdtemp(prefix="dmd2-server-"))  # 0700
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"no folder for temporary files ({reason}); set TMPDIR to one") from error


def is_private(folder: Path) -> bool:
    """Whether a folder is still what `private_folder` made, and no link or another user's."""
    try:
        seen = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid() and not seen.st_mode & 0o077


def remove_old(folder: Path, seconds: float | None = None) -> None:
    """Deletes the plain files in the private `folder` that are older than so many seconds; None: everything in it."""
    for entry in list(os.scandir(folder)) if is_private(folder) else []:
        try:
            if seconds is None and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif seconds is None or (
                entry.is_file(follow_symlinks=False)
                and time.time() - entry.stat(follow_symlinks=False).st_mtime > seconds
            ):
                Path(entry.path).unlink()
        except FileNotFoundError:
            continue  # its owner was faster
        except OSError as error:
            say(f"{entry.path}: cannot be deleted ({error.strerror or error})")


def has_grandchild(pid: int) -> bool:
    """Whether a child of process `pid` has a child that runs. True where there is no /proc to look it up in."""
    if not Path("/proc/self").exists():
        return True
    living = list(_living())
    children = {child for child, parent, _ in living if parent == pid}
    return any(parent in children for _, parent, _ in living)


def clear_group(pid: int, seconds: float = 5.0) -> None:
    """Kills whatever is left of the process group that `pid` led; waits until it has ended, but at most so long."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(group == pid for _, _, group in _living()):
        time.sleep(0.02)


def _living() -> Iterator[tuple[int, int, int]]:
    """(id, parent, process group) of every process that runs; a zombie, whose end nobody asked for yet, does not."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group, *_ = file.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue  # it has just ended
        if state not in (b"Z", b"X"):
            yield int(file.parent.name), int(parent), int(group)


def exit_status(returncode: int) -> int:
    """A shell's view of `Popen.returncode`: 128 + signal for a process that a signal ended."""
    return 128 - returncode if returncode < 0 else returncode


def say(message: str) -> None:
    """A line in the log, beside the server's own."""
    print(f"entrypoint: {message}", file=sys.stderr, flush=True)
