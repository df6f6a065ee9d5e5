"""Downloads whose network, disk or process fails: they go on where they stopped, and nothing is half replaced."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
from huggingface_hub import constants

import dmd2.weights.hub
from dmd2.models.stable_diffusion.download import BASE, DMD2, download
from dmd2.weights.manifest import MANIFEST, read_manifest, verify
from tests.hub import Hub, sha256
from tests.models.stable_diffusion.downloads import (
    FOUR,
    ONE,
    contents,
    environment,
    left_beside,
    refused,
)

# The network


def test_cut_connection_goes_on_in_the_middle(hub: Hub, dest: Path, waits: list[float]) -> None:
    hub.on("GET /cdn/", times=1, cut=200_000)
    download(dest, steps=(4,))
    assert waits == [1]
    ranges = [request.headers.get("range") for request in hub.requests if "range" in request.headers]
    begun = {int(value.removeprefix("bytes=").removesuffix("-")) for value in ranges}
    assert len(begun) == 1 and 0 < begun.pop() <= 200_000
    verify(dest, read_manifest(dest))


@pytest.mark.parametrize("server", ["goes on", "begins anew", "has less now"])
def test_later_call_goes_on_where_a_dead_connection_stopped(
    hub: Hub, dest: Path, waits: list[float], repositories: Mapping[str, Mapping[str, bytes]], server: str
) -> None:
    large = sha256(repositories[DMD2][FOUR])
    hub.on(f"GET /cdn/{large}", times=1, cut=300_000)
    hub.on(f"GET /cdn/{large}", cut=0)
    message = refused(dest, steps=(4,))
    assert f"{DMD2}/{FOUR}" in message and "run this again" in message and not dest.exists()
    assert len(waits) == 5  # the client has tried again

    hub.heal()
    hub.requests.clear()
    if server == "begins anew":
        hub.on(f"GET /cdn/{large}", whole=True)
    if server == "has less now":  # as it were: there is more than the file has
        (part,) = dest.parent.rglob("*.part")
        part.write_bytes(bytes(len(repositories[DMD2][FOUR]) + 1))
    download(dest, steps=(4,))
    (request,) = [request for request in hub.requests if request.line == f"GET /cdn/{large}"]
    begun = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    assert begun == 0 if server == "has less now" else 0 < begun <= 300_000
    assert len(hub.lines("GET /cdn/")) == 1  # the other files were complete
    verify(dest, read_manifest(dest))


@pytest.mark.parametrize("path", [f"{DMD2}/{FOUR}", f"{BASE}/tokenizer/vocab.json"])
def test_wrong_bytes_are_not_kept(hub: Hub, dest: Path, path: str) -> None:
    owner, name, inner = path.split("/", 2)
    content = hub.commits[hub.branches[f"{owner}/{name}"]["main"]][inner]
    line = f"GET /cdn/{sha256(content)}" if path.endswith(".safetensors") else f"GET .*/{inner}"
    hub.on(line, times=1, damage=True)
    message = refused(dest, steps=(4,))
    assert path in message and "came damaged" in message and not dest.exists()
    damaged = bytes([content[0] ^ 1]) + content[1:]
    assert sha256(damaged) in message and sha256(damaged) not in contents(dest.parent).values()
    download(dest, steps=(4,))
    verify(dest, read_manifest(dest))


@pytest.mark.parametrize(
    ("line", "fault", "told"),
    [
        (f"GET /api/models/{BASE}/revision", {"status": 401}, f"{BASE}: the hub answers 401"),
        (f"GET /api/models/{DMD2}/revision", {"status": 404}, f"{DMD2}: the hub answers 404"),
        (
            f"GET /api/models/{BASE}/revision",
            {"status": 429, "headers": {"Retry-After": "7"}},
            f"{BASE}: the hub answers 429 Too Many Requests; in 7 seconds, run this again",
        ),
        (f"GET /api/models/{BASE}/revision", {"status": 503}, f"{BASE}: the hub answers 503"),
        (f"GET /{DMD2}/resolve", {"status": 403}, f"{DMD2}/{FOUR}: the hub answers 403"),
        (f"GET /{DMD2}/resolve", {"status": 404}, f"{DMD2}/{FOUR}: the hub answers 404"),
        (f"GET /{DMD2}/resolve", {"status": 429}, f"{DMD2}/{FOUR}: the hub answers 429"),
        ("GET /cdn", {"status": 500}, f"{BASE}/text_encoder/model.fp16.safetensors: the hub answers 500"),
        ("GET /api", {"status": 200}, "does not answer like a hub; check HF_ENDPOINT"),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    hub: Hub, dest: Path, waits: list[float], line: str, fault: dict[str, Any], told: str
) -> None:
    hub.on(line, **fault)
    assert told in refused(dest, steps=(4,))
    assert not dest.exists()


def test_rate_limit_is_waited_for_as_long_as_the_hub_says(hub: Hub, dest: Path, waits: list[float]) -> None:
    hub.on("GET .*/tree/", times=1, status=429, headers={"Retry-After": "3"})
    hub.on("GET /cdn/", times=1, status=429, headers={"Retry-After": "5"})
    download(dest, steps=(4,))
    assert waits == [4, 6]  # the client adds a second
    verify(dest, read_manifest(dest))


def test_missing_things_are_named(hub: Hub, dest: Path, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
    hub.push(DMD2, {name: content for name, content in repositories[DMD2].items() if name != ONE})
    assert f"{DMD2}: has no {ONE} at {hub.branches[DMD2]['main']}" in refused(dest)
    del hub.branches[DMD2]
    told = refused(dest)
    assert f"{DMD2}: the hub answers 404: {hub.endpoint} has no /api/models/{DMD2}" in told
    assert "HF_ENDPOINT" in told and "HF_TOKEN" not in told  # a mirror that lacks it: no token would help
    hub.close()
    huggingface_hub.close_session()
    assert hub.endpoint in refused(dest) and not dest.exists()


def test_a_dest_that_cannot_be_written_to_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told = refused(tmp_path / "file" / "sdxl", steps=(4,))
    assert told.startswith(f"dest in {tmp_path / 'file'}: cannot be written to") and "another folder" in told
    assert hub.lines("/resolve/") == []


def test_token_goes_to_the_hub_alone(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    assert "HF_TOKEN" in refused(dest, steps=(4,))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.requests.clear()
    download(dest, steps=(4,))
    sent = {request.line: request.headers.get("authorization") for request in hub.requests}
    assert {token for line, token in sent.items() if "/cdn/" in line} == {None}
    assert {token for line, token in sent.items() if "/cdn/" not in line} == {"Bearer hf_secret"}
    assert "hf_secret" not in (dest / MANIFEST).read_text()


# Xet


def test_xet_is_used_where_it_is_offered_and_goes_on_in_the_middle(
    hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.on("GET /cdn/", times=1, cut=400_000)  # so that there is something to go on with
    hub.on("GET /cdn/", cut=0)
    assert "text_encoder/model.fp16.safetensors" in refused(dest, steps=(4,))
    (part,) = dest.parent.rglob("*.part")
    had = part.stat().st_size
    assert had > 0
    hub.heal()
    hub.requests.clear()
    hub.xet = True
    download(dest, steps=(4,))
    verify(dest, read_manifest(dest))
    plans = [request for request in hub.requests if "/v1/reconstructions/" in request.line]
    assert len(plans) == 4  # two encoders, VAE, student
    assert plans[0].headers["range"].startswith(f"bytes={had}-") and plans[1].headers["range"].startswith("bytes=0-")
    assert {request.headers["authorization"] for request in plans} == {"Bearer for Xet only"}
    assert not [line for line in hub.lines("GET .*/resolve/") if line.endswith(".safetensors")]


def test_xet_can_be_switched_off(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.xet = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    download(dest, steps=(4,))
    assert hub.lines("reconstructions|xet-read-token") == [] and len(hub.lines("GET /cdn/")) == 4


def test_failure_of_xet_says_how_to_do_without(hub: Hub, dest: Path) -> None:
    hub.xet = True
    hub.on("reconstructions", status=404)
    message = refused(dest, steps=(4,))
    assert "text_encoder/model.fp16.safetensors: Xet:" in message and "HF_HUB_DISABLE_XET=1" in message


# The disk


def test_room_is_checked_before_anything_is_loaded(
    hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch, repositories: Mapping[str, Mapping[str, bytes]]
) -> None:
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    assert "the disk has 0.0 GB free" in refused(dest)
    assert hub.lines("/resolve/") == []

    # What it takes: every file that is loaded, and the pickle once more as safetensors.
    free = 10**9
    download(dest)
    loaded = [repositories[name][path] for name, s in read_manifest(dest).sources.items() for path in s.files]
    config = repositories[BASE]["unet/config.json"]
    free = sum(map(len, loaded)) + len(config) + len(repositories[DMD2][ONE]) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    other = dest.with_name("other")
    refused(other)
    free += 1
    download(other)
    free = 0
    download(other)  # everything is there, and links take no room


def test_disk_that_fills_up_loses_nothing(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(dest, steps=(4,))
    before = contents(dest)
    real = dmd2.weights.hub.http_get

    class Full(io.FileIO):
        """A file on a disk that has room for 100 kB."""

        def write(self, block: Any) -> int:
            if self.tell() + len(block) > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    def on_full_disk(url: str, stream: io.BufferedWriter, **options: Any) -> None:
        with Full(stream.fileno(), "ab", closefd=False) as file:
            real(url, file, **options)

    monkeypatch.setattr(dmd2.weights.hub, "http_get", on_full_disk)
    message = refused(dest)
    assert f"{DMD2}/{ONE}: the disk is full" in message and contents(dest) == before
    monkeypatch.setattr(dmd2.weights.hub, "http_get", real)
    hub.requests.clear()
    download(dest)
    (request,) = [request for request in hub.requests if "/cdn/" in request.line]
    assert request.headers["range"] == "bytes=65536-"
    verify(dest, read_manifest(dest))


def test_folder_that_cannot_be_written_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(tmp_path / "file" / "sdxl")
    opened = Path.open

    def no_writing(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "a" in mode:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", no_writing)
    assert "Permission denied" in refused(tmp_path / "weights" / "sdxl")
    assert hub.requests == []


def test_second_process_is_told_of_the_first(hub: Hub, dest: Path) -> None:
    dest.parent.mkdir()
    with (dest.parent / ".download-weights.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another download-weights is at work" in refused(dest)
    assert hub.requests == []
    download(dest, steps=(4,))


# Killed

CRASHES = """
import json, os, shutil, signal, sys
from pathlib import Path
from huggingface_hub import constants
from diffusers import LCMScheduler, UNet2DConditionModel  # once, not in each child
from dmd2.models.stable_diffusion.download import download
from dmd2.weights.manifest import read_manifest, verify
from tqdm import tqdm

os.fsync = lambda _: None
constants.DOWNLOAD_CHUNK_SIZE = 65536
parent = Path(sys.argv[1])
dest, old, new = parent / "sdxl", dict(steps=(4,)), dict(steps=(1,), vaes=("tiny",))
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree"}

def run(kill_at, choice):
    # In a child: download; before the kill_at-th change of a file or folder, SIGKILL. Returns status and changes.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        def hook(event, arguments):
            nonlocal count
            changes = event in WRITES or (event == "open" and arguments[1] and set(arguments[1]) & set("wax+"))
            if changes and str(parent) in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        download(dest, **choice, say=lambda line: None)
        os.write(writer, str(count).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        count = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(count or 0)

def state():
    verify(dest, read_manifest(dest))
    names = {p.relative_to(dest).as_posix() for p in dest.rglob("*") if p.is_file()} - {"dmd2.json"}
    assert names == set(read_manifest(dest).files), names
    return dict(read_manifest(dest).files)

assert run(0, old)[0] == 0
before = state()
shutil.copytree(dest, parent / "kept")
status, changes = run(0, new)
assert status == 0
after = state()
seen = []
for kill_at in sorted({*range(1, changes + 1, 16), *range(changes - 7, changes + 1)}):
    for name in ("sdxl", ".sdxl.partial", ".sdxl.old"):
        shutil.rmtree(parent / name, ignore_errors=True)
    shutil.copytree(parent / "kept", dest)
    assert run(kill_at, new)[0] == -signal.SIGKILL, kill_at
    found = state()
    assert found in (before, after), kill_at
    seen.append("new" if found == after else "old")
    if kill_at % 3 == 1:
        assert run(0, new)[0] == 0 and state() == after
        assert not list(parent.glob(".sdxl.*")), kill_at
shutil.rmtree(dest)
print(json.dumps({"changes": changes, "seen": seen}), flush=True)

# At last, in the middle of a file's bytes.
real = tqdm.update
def update(bar, number=1):
    real(bar, number)
    if number > 0 and bar.n > 600_000:
        os.kill(os.getpid(), signal.SIGKILL)
tqdm.update = update
download(dest, **old)
"""


def test_kill_at_any_point_leaves_the_old_state_or_the_new_one(hub: Hub, tmp_path: Path) -> None:
    parent = tmp_path / "weights"
    parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(parent)],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    result = json.loads(done.stdout.splitlines()[0])
    assert result["changes"] > 60 and {"old", "new"} == set(result["seen"])

    (part,) = (parent / ".sdxl.partial").rglob("*.part")
    had = part.stat().st_size
    assert had > 0 and not (parent / "sdxl").exists()
    hub.requests.clear()
    download(parent / "sdxl", steps=(4,))
    first = next(request for request in hub.requests if "/cdn/" in request.line)
    assert first.headers["range"] == f"bytes={had}-"
    verify(parent / "sdxl", read_manifest(parent / "sdxl"))


def test_swap_cut_between_its_two_steps_is_undone(hub: Hub, dest: Path) -> None:
    """Where the system cannot exchange two folders, it takes two renames."""
    download(dest, steps=(4,))
    before = contents(dest)
    dest.rename(dest.with_name(".sdxl.old"))
    hub.on("GET /api", status=503)
    refused(dest, steps=(4,))
    assert contents(dest) == before
    shutil.copytree(dest, dest.with_name(".sdxl.old"))
    refused(dest, steps=(4,))
    assert contents(dest) == before and left_beside(dest) == set()
