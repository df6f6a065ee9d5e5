"""The server that dies is replaced, one that is only slow is not; nothing is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.runtime.errors import UserError
from dmd2.service.cog.supervisor import (
    Limits,
    Restarts,
    Supervisor,
    Watch,
    check_port,
    clear_group,
    has_grandchild,
    local_address,
    remove_old,
    server_environment,
)

ROOT = Path(__file__).resolve().parents[3]

# Says which process answers, and fails where the test leaves a file of that name.
PREDICT = """
import asyncio, os
from pathlib import Path
from cog import BaseRunner, concurrent

class Busy(Exception):
    pass

class Predictor(BaseRunner):
    async def setup(self) -> None:
        if Path("bad-setup").exists():
            raise RuntimeError("the weights are not there")
        while Path("wait").exists():
            await asyncio.sleep(0.05)

    async def healthcheck(self) -> bool:
        return not Path(f"sick-{os.getpid()}").exists()

    @concurrent(max=3)
    async def run(self, seconds: float = 0.0) -> int:
        if seconds < 0:
            raise Busy("128 images are waiting already")
        if seconds:
            Path("began").touch()
        await asyncio.sleep(seconds)
        return os.getpid()
"""

quietly = settings(deadline=None, derandomize=True)
FAST = Limits(poll=0.02, orphaned=3, drain=0.2, pauses=(0.0, 0.01))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# Judging


def faults(*statuses: str | None, has_worker: bool = True, limits: Limits | None = None) -> list[str | None]:
    watch = Watch(limits or Limits(), 0.0)
    return [watch.fault(status, has_worker, 0.5 * i) for i, status in enumerate(statuses)]


@pytest.mark.parametrize(
    ("statuses", "reason"),
    [
        (["READY", "UNHEALTHY", "UNHEALTHY"], "is unhealthy"),
        (["READY", "DEFUNCT", "UNHEALTHY"], "is unhealthy"),
        (["STARTING", "SETUP_FAILED"], "setup failed"),
        (["READY", *[None] * 6], "gave no answer to 6 health checks in a row"),
        ([None] * 242, "gave no answer within 120 s"),
    ],
)
def test_what_makes_a_server_be_replaced(statuses: list[str | None], reason: str) -> None:
    *before, last = faults(*statuses)
    assert before == [None] * len(before)
    assert last is not None and last.startswith(reason)


@pytest.mark.parametrize(
    "statuses",
    [
        ["UNHEALTHY", "READY"] * 5,
        ["READY", *[None] * 5, "READY", *[None] * 5],
        [None] * 200,  # so long may importing take
        ["STARTING"] * 10_000,  # and setup
        ["BUSY"] * 1000,
        ["READY", "UNHEALTHY", None, None, "READY"],
    ],
)
def test_what_gives_no_reason_to_replace_a_server(statuses: list[str | None]) -> None:
    assert set(faults(*statuses)) == {None}


@quietly
@given(st.lists(st.sampled_from(["READY", "BUSY", "UNHEALTHY", None]), max_size=60))
def test_one_bad_answer_is_never_enough(statuses: list[str | None]) -> None:
    kept: list[str | None] = []
    for status in statuses:
        kept += [status, "READY"]
    assert set(faults(*kept)) <= {None}


def test_starting_for_ever_without_a_worker_is_noticed() -> None:
    assert faults(*["STARTING"] * 6, has_worker=False)[5] == "lost its worker before it was set up"
    watch = Watch(Limits(), 0.0)
    assert {watch.fault("STARTING", i % 5 != 0, float(i)) for i in range(100)} == {None}


def test_ready_counts_from_the_first_time() -> None:
    watch = Watch(Limits(), 0.0)
    for now, status in enumerate(["STARTING", "READY", "BUSY", "READY"]):
        watch.fault(status, True, float(now))
    assert watch.ready_since == 1.0


@quietly
@given(st.lists(st.sampled_from(["READY", "BUSY", "STARTING", "UNHEALTHY", "DEFUNCT", None]), max_size=40))
def test_a_server_is_replaced_by_what_it_said_in_a_row_and_nothing_else(statuses: list[str | None]) -> None:
    watch, limits = Watch(Limits(), 0.0), Limits()
    for i, status in enumerate(statuses):
        said = [other for other in statuses[: i + 1] if other is not None]
        sick = list(itertools.takewhile(lambda other: other in ("UNHEALTHY", "DEFUNCT"), reversed(said)))
        silent = list(itertools.takewhile(lambda other: other is None, reversed(statuses[: i + 1])))
        reason = watch.fault(status, True, 0.5 * i)
        if status is None:
            assert (reason is not None) == (bool(said) and len(silent) >= limits.silent)
        else:
            assert (reason is not None) == (len(sick) >= limits.unhealthy)
        if reason is not None:
            return


ENDS = st.tuples(st.booleans(), st.booleans()).filter(lambda end: not all(end))  # was ready, setup failed


@quietly
@given(st.lists(ENDS, max_size=40), st.integers(1, 5))
def test_only_starts_in_a_row_that_never_became_ready_end_it(ends: list[tuple[bool, bool]], most: int) -> None:
    restarts = Restarts([float(i) for i in range(most)])
    ever_ready, failed = False, 0
    for was_ready, setup_failed in ends:
        ever_ready = ever_ready or was_ready
        failed = 0 if was_ready else failed + 1
        pause = restarts.after(was_ready, setup_failed)
        if failed > most or (setup_failed and not ever_ready):
            assert pause is None
            return
        assert pause == max(0, failed - 1)


def test_a_server_that_was_seen_ready_between_two_checks_was_ready(tmp_path: Path) -> None:
    """As by a client who asks more often than the supervisor, and then kills it."""
    supervisor = Supervisor(["unused"], tmp_path, {}, "127.0.0.1", 0)
    supervisor.address = ("127.0.0.1", 5)
    supervisor.note(("127.0.0.1", 4), {"status": "READY"})  # of the server before
    supervisor.note(("127.0.0.1", 5), {"status": "STARTING"})
    assert not supervisor.noted_ready
    supervisor.note(("127.0.0.1", 5), {"status": "READY"})
    supervisor.note(("127.0.0.1", 5), {"status": "UNHEALTHY"})
    assert supervisor.noted_ready and supervisor.health == {"status": "UNHEALTHY"}


# Servers that are only commands


def supervise(tmp_path: Path, code: str, port: int, limits: Limits = FAST) -> int:
    """Runs Python `code` as the server, in this process."""
    command = [sys.executable, "-c", code, str(port)]
    return Supervisor(command, tmp_path, os.environ, "127.0.0.1", port, limits).run()


def test_a_server_that_keeps_ending_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; open('starts', 'a').write('x'); sys.exit(3)"
    assert supervise(tmp_path, code, free_port()) == 1
    assert (tmp_path / "starts").read_text() == "xxx"
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "entrypoint: the server exited with status 3; starting it again"
    assert lines[-1] == "entrypoint: the server exited with status 3; 3 times in a row, giving up"


def test_pauses_between_restarts_grow(tmp_path: Path) -> None:
    code = "import time; print(time.time(), file=open('starts', 'a'))"
    assert supervise(tmp_path, code, free_port(), Limits(poll=0.01, pauses=(0.0, 0.5, 1.0))) == 1
    starts = [float(line) for line in (tmp_path / "starts").read_text().split()]
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    assert len(pauses) == 3 and pauses[0] < pauses[1] and pauses[1] >= 0.5 and pauses[2] >= 1.0


ANSWERS = """
import http.server, json, pathlib, sys
statuses = {statuses!r}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        body = json.dumps({{"status": status, "setup": {{"logs": "no memory"}}}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
open("starts", "a").write("x")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_whose_worker_never_came_is_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(tmp_path, ANSWERS.format(statuses=["STARTING"]), free_port()) == 1
    assert (tmp_path / "starts").read_text() == "xxx"
    assert "the server lost its worker before it was set up; starting it again" in capfd.readouterr().err


def test_a_setup_that_fails_after_it_once_worked_is_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import pathlib\nfirst = not pathlib.Path('starts').exists()\n" + ANSWERS.format(
        statuses=["READY"]
    ).replace("statuses = ['READY']", "statuses = ['READY', 'UNHEALTHY'] if first else ['SETUP_FAILED']")
    assert supervise(tmp_path, code, free_port()) == 1
    assert (tmp_path / "starts").read_text() == "xxxx"  # the first does not count: it had been ready
    assert "entrypoint: SETUP FAILED\nno memory\n" in capfd.readouterr().err


def test_a_server_that_dies_soon_after_it_was_ready_is_started_again_and_again(tmp_path: Path) -> None:
    code = """
import pathlib, sys
starts = pathlib.Path("starts")
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if len(starts.read_text()) > 8:
    sys.exit(1)
""" + ANSWERS.format(statuses=["READY"]).replace('open("starts"', 'open("answering"').replace(
        ".serve_forever()", ".handle_request()"
    )
    assert supervise(tmp_path, code, free_port()) == 1
    assert (tmp_path / "starts").read_text() == "x" * 11  # eight that were ready, three that were not


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    code = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("asked").touch())
pathlib.Path("up").touch()
while True:
    time.sleep(0.05)
"""

    def interrupt() -> None:
        wait_for((tmp_path / "up").exists)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for((tmp_path / "asked").exists)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert supervise(tmp_path, code, free_port(), Limits()) == 128 + signal.SIGKILL
    finally:
        thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_worker_that_outlives_its_server_is_cleared_away(tmp_path: Path) -> None:
    code = """
import signal, subprocess, sys
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
worker = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, file=open("workers", "a"))
"""
    supervise(tmp_path, code, free_port())
    pids = [int(line) for line in (tmp_path / "workers").read_text().split()]
    assert len(pids) == 3 and not any(is_running(pid) for pid in pids)


def test_a_worker_is_a_grandchild() -> None:
    family = """
import subprocess, sys
server = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()']).pid, flush=True); input()"
print(subprocess.Popen([sys.executable, "-c", server]).pid, flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", family],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        worker = max(int(process.stdout.readline()), int(process.stdout.readline()))
        assert has_grandchild(process.pid)
        os.kill(worker, signal.SIGKILL)  # nobody waits for it: a zombie
        wait_for(lambda: not is_running(worker))
        assert not has_grandchild(process.pid)
    finally:
        process.kill()
        process.communicate()
        clear_group(process.pid)


# What is left

FAMILY = """
import os, pathlib, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(os.environ["TMPDIR"], "left").write_text("by a prediction that failed")
pathlib.Path("family.new").write_text(f"{os.getppid()} {os.getpid()} {worker.pid} {os.environ['TMPDIR']}")
os.replace("family.new", "family")
time.sleep(600)
"""
RUN = """
import os, pathlib, sys
from dmd2.service.cog.supervisor import Supervisor
command = [sys.executable, "-c", sys.argv[1]]
sys.exit(Supervisor(command, pathlib.Path.cwd(), os.environ, "127.0.0.1", 0).run())
"""


def test_a_killed_supervisor_or_leash_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    family = tmp_path / "family"
    supervisor = subprocess.Popen([sys.executable, "-c", RUN, FAMILY], cwd=tmp_path, env=environment)
    try:
        wait_for(family.exists)
        leash, *before, _ = family.read_text().split()
        family.unlink()
        os.kill(int(leash), signal.SIGKILL)
        wait_for(family.exists)  # a new one
        assert not any(is_running(int(pid)) for pid in before)
    finally:
        supervisor.kill()
        supervisor.wait()
    *pids, temporary = family.read_text().split()
    assert Path(temporary).parent == tmp_path
    wait_for(lambda: not any(is_running(int(pid)) for pid in pids))
    wait_for(lambda: not Path(temporary).exists())


def test_a_servers_temporary_files_are_private_and_gone_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """
import os, pathlib
folder = pathlib.Path(os.environ["TMPDIR"])
print(oct(folder.stat().st_mode & 0o777), sorted(path.name for path in folder.iterdir()), file=open("seen", "a"))
(folder / "file").write_text("x")
(folder / "folder").mkdir()
(folder / "folder" / "link").symlink_to(pathlib.Path.cwd())
"""
    assert supervise(tmp_path, code, free_port()) == 1
    assert (tmp_path / "seen").read_text() == "0o700 []\n" * 3
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]


def test_old_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir(mode=0o700)
    outside.mkdir(mode=0o700)
    (outside / "letter").write_text("mine")
    (folder / "link").symlink_to(outside)
    (folder / "inner").mkdir()
    for path in (folder / "old", folder / "new", folder / "inner" / "old", outside / "letter"):
        path.write_text("x")
        if path.name != "new":
            os.utime(path, (0, 0))
    remove_old(folder, 3600)
    assert sorted(path.name for path in folder.iterdir()) == ["inner", "link", "new"]
    assert (folder / "inner" / "old").exists() and (outside / "letter").exists()
    remove_old(folder)
    assert not list(folder.iterdir()) and (outside / "letter").exists()
    folder.rmdir()
    folder.symlink_to(outside)  # put in the place of one that was lost
    remove_old(folder)
    assert (outside / "letter").exists()


# Cog's own server, through the script


class Service:
    """scripts/entrypoint over the predict.py above."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.port = folder, free_port()
        (folder / "predict.py").write_text(PREDICT)
        self.log = folder / "log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COG_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "scripts" / "entrypoint", "--host", "127.0.0.1", "--folder", folder],
                env=kept | {"PORT": str(self.port)} | environment,
                stdout=log,
                stderr=log,
            )
        self.url = f"http://127.0.0.1:{self.port}"

    def status(self) -> str | None:
        try:
            return str(httpx.get(f"{self.url}/health-check", timeout=120).json()["status"])
        except httpx.TransportError:
            return None

    def worker(self, seconds: float = 0.0) -> int:
        """The process that answers, after so long."""
        answer = httpx.post(f"{self.url}/predictions", json={"input": {"seconds": seconds}}, timeout=300).json()
        assert answer["status"] == "succeeded", answer
        return int(answer["output"])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(300)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path)
    try:
        wait_for(lambda: running.status() == "READY")
        yield running
    finally:
        running.stop()


def test_a_killed_worker_is_replaced(service: Service) -> None:
    killed = service.worker()
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: service.status() not in ("READY", "BUSY"))
    wait_for(lambda: service.status() == "READY")
    assert service.worker() != killed
    assert not is_running(killed)
    assert '"num_slots":3' in service.log.read_text()  # from @concurrent


def test_a_killed_server_is_replaced_and_leaves_nothing(service: Service) -> None:
    worker = service.worker()
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not is_running(server) and not is_running(worker))
    wait_for(lambda: service.status() == "READY")
    assert service.worker() != worker
    assert "entrypoint: the server exited with status 137; starting it again" in service.log.read_text()


def test_a_failing_healthcheck_brings_a_new_worker(service: Service) -> None:
    sick = service.worker()
    (service.folder / f"sick-{sick}").touch()
    wait_for(lambda: not is_running(sick))
    wait_for(lambda: service.status() == "READY")
    assert service.worker() != sick


def test_predictions_under_way_are_answered_before_the_end(service: Service) -> None:
    worker = service.worker()
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(service.worker(seconds=1.5)))
    thread.start()
    wait_for((service.folder / "began").exists)
    assert service.stop() == 0
    thread.join()
    assert answers == [worker] and not is_running(worker)
    assert "starting it again" not in service.log.read_text()


def test_the_front_before_cogs_own_server(service: Service) -> None:
    def ask(method: str, path: str, **more: Any) -> httpx.Response:
        return httpx.request(method, service.url + path, timeout=300, **more)

    assert ask("POST", "/shutdown").status_code == 404
    nulls = ask("POST", "/predictions", json={"input": {"seconds": None}, "webhook_events_filter": None}).json()
    assert nulls["status"] == "succeeded"
    assert ask("GET", "/").json()["predictions_url"] == "/predictions"
    busy = ask("POST", "/predictions", json={"input": {"seconds": -1}})  # what the batcher raises when it is full
    assert busy.status_code == 429 and int(busy.headers["retry-after"]) >= 1
    assert busy.json() == {"status": "failed", "error": "128 images are waiting already"}

    # Three slots. Nobody is refused, whether the slots are held by those who wait for an answer or by others.
    accepted = [
        ask("PUT", f"/predictions/a{i}", json={"input": {"seconds": 0.5}}, headers={"Prefer": "respond-async"})
        for i in range(3)
    ]
    assert [response.status_code for response in accepted] == [202] * 3
    assert ask("PUT", "/predictions/a2", json={"input": {}}).status_code == 202  # is known, and takes no slot
    with ThreadPoolExecutor(12) as clients:
        assert len(set(clients.map(lambda _: service.worker(0.05), range(24)))) == 1

    url = httpx.URL(service.url)
    with socket.create_connection((url.host, url.port)) as client:  # hangs up, which cancels
        body = b'{"input": {"seconds": 500}, "id": "gone"}'
        head = (
            f"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_for(lambda: '"message":"Starting prediction","prediction_id":"gone"' in service.log.read_text())
    wait_for(lambda: '"message":"Prediction cancelled","prediction_id":"gone"' in service.log.read_text())


def test_who_comes_during_setup_is_told_to_come_again(tmp_path: Path) -> None:
    (tmp_path / "wait").touch()
    service = Service(tmp_path)
    try:
        wait_for(lambda: service.status() == "STARTING")
        for accept in ("application/json", "text/event-stream"):
            early = httpx.post(f"{service.url}/predictions", json={"input": {}}, headers={"accept": accept})
            assert early.status_code == 503 and int(early.headers["retry-after"]) >= 1
        (tmp_path / "wait").unlink()
        wait_for(lambda: service.status() == "READY")
        assert service.worker()
    finally:
        service.stop()


def test_without_the_front_it_is_cogs_own_server(tmp_path: Path) -> None:
    service = Service(tmp_path, DMD2_FRONT="off")
    try:
        wait_for(lambda: service.status() == "READY")
        assert httpx.post(f"{service.url}/predictions", json={"input": {}, "id": "a b"}).status_code == 200
    finally:
        assert service.stop() == 0


def test_a_signal_under_load_leaves_nobody_without_an_answer(service: Service) -> None:
    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{service.url}/predictions", json={"input": {"seconds": 0.5}}, timeout=300)

    with ThreadPoolExecutor(9) as clients:
        answers = [clients.submit(ask, i) for i in range(9)]
        wait_for((service.folder / "began").exists)
        wait_for(lambda: sum(answer.running() for answer in answers) == 9 or any(map(Future.done, answers)))
        assert service.stop() == 0
        for answer in answers:
            try:
                response = answer.result()
            except httpx.ConnectError:  # came after the end
                continue
            if response.status_code == 200:
                assert response.json()["status"] == "succeeded"
            else:
                assert response.status_code == 503 and response.headers["retry-after"]


def test_a_setup_that_fails_ends_it_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad-setup").touch()
    service = Service(tmp_path)
    assert service.process.wait(300) == 1
    log = service.log.read_text()
    assert "entrypoint: SETUP FAILED" in log and "RuntimeError: the weights are not there" in log
    assert "starting it again" not in log


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"PORT": "x"}, "PORT=x: expected a number"),
        ({"PORT": "70000"}, "port 70000 on "),
        ({"PORT": "70000", "DMD2_FRONT": "off"}, "port 70000 on "),
        ({"DMD2_FRONT": "maybe"}, "DMD2_FRONT=maybe: expected on or off"),
        ({"DMD2_QUEUE": "many"}, "DMD2_QUEUE=many: expected a number from 0 to "),
    ],
)
def test_a_wrong_port_is_one_line(tmp_path: Path, environment: dict[str, str], named: str) -> None:
    service = Service(tmp_path, **environment)
    assert service.process.wait(300) == 2
    log = service.log.read_text()
    assert log.startswith(f"entrypoint: {named}") and log.count("\n") == 1


# Parts


def test_the_environment_that_cog_build_would_have_made(tmp_path: Path) -> None:
    (tmp_path / "predict.py").write_text(PREDICT)
    environment = server_environment(tmp_path, {"PATH": "/bin", "MINE": "1"})
    assert environment["COG_PREDICT_TYPE_STUB"] == "predict.py:Predictor"
    assert environment["COG_MAX_CONCURRENCY"] == "3"
    assert environment["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/bin"
    assert environment["MINE"] == "1"
    assert server_environment(tmp_path, {"COG_MAX_CONCURRENCY": "7"})["COG_MAX_CONCURRENCY"] == "7"
    with pytest.raises(UserError, match=r"other\.py: no such file"):
        server_environment(tmp_path, {"COG_PREDICT_TYPE_STUB": "other.py:Predictor"})


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(UserError, match=rf"port {port} on 127\.0\.0\.1: cannot listen there \(.*in use\)"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_server_that_listens_everywhere_is_asked_on_the_loopback() -> None:
    assert [local_address(host) for host in ("0.0.0.0", "::", "10.0.0.1")] == ["127.0.0.1", "::1", "10.0.0.1"]
