"""setup-venv and demo, run with a Python that only notes what it is asked; bench-server, a false service; grid."""

import http.server
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dmd2.emoji.scenes import EmojiScenes
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.paths import EMOJI

ROOT = Path(__file__).parents[2]

# `-m venv --clear DIR` copies this file to DIR/bin/python and makes DIR/bin/dmd2.
# Every call of `pip install` and of dmd2 goes to calls.txt.
FAKE_PYTHON = """#!/usr/bin/env bash
here="$(dirname -- "$0")"
case "$*" in
    --version) echo "Python $FAKE_VERSION" ;;
    *version_info*) [[ $FAKE_VERSION != 3.10.* ]] ;;
    *ensurepip,*) [[ $FAKE_VENV == yes ]] ;;
    "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp -- "$0" "$4/bin/python"
        printf '#!/bin/sh\\necho "dmd2 $*" >> "%s/calls.txt"\\n' "$PWD" > "$4/bin/dmd2"
        chmod +x "$4/bin/dmd2" ;;
    "-m pip --version" | "-m compileall"*) ;;
    "-m pip install"*) echo "$*" >> "$here/../../calls.txt"; exit "$FAKE_PIP_STATUS" ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Tree:
    """A copy of what the scripts need, in a folder whose name has a space."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a tree"
        (self.root / "scripts").mkdir(parents=True)
        names = ["scripts/setup-venv", "scripts/demo"]
        for name in [*names, "pyproject.toml", "requirements-cpu.txt", "requirements-dev.txt"]:
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "fake-python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def run(
        self,
        *command: str,
        version: str = "3.12.0",
        venv: str = "yes",
        pip_status: int = 0,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        fake = {"PYTHON": str(self.python), "FAKE_VERSION": version, "FAKE_VENV": venv}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DMD2_", "PIP_"))}
        return subprocess.run(
            [str(self.root / "scripts" / command[0]), *command[1:]],
            env=kept | fake | {"FAKE_PIP_STATUS": str(pip_status)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        """What was called since the last time, in order."""
        path = self.root / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_old_python_is_one_clear_line(tree: Tree) -> None:
    done = tree.run("demo", version="3.10.12")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer" in done.stderr and "3.10.12" in done.stderr


def test_missing_venv_module_is_one_clear_line(tree: Tree) -> None:
    done = tree.run("demo", venv="no")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "python3-venv" in done.stderr


def test_second_set_up_does_nothing_until_a_pin_changes(tree: Tree) -> None:
    assert tree.run("setup-venv").returncode == 0
    first = tree.calls()
    assert len(first) == 2 and first[0].endswith("-r requirements-cpu.txt") and first[1].endswith("-e .")

    assert tree.run("setup-venv").returncode == 0
    assert tree.calls() == []

    with (tree.root / "requirements-cpu.txt").open("a") as file:
        file.write("# changed\n")
    assert tree.run("setup-venv").returncode == 0
    assert len(tree.calls()) == 2


def test_development_set_up_includes_the_plain_one(tree: Tree) -> None:
    assert tree.run("setup-venv").returncode == 0
    tree.calls()
    assert tree.run("setup-venv", "--dev").returncode == 0
    assert tree.calls()[0].endswith("-r requirements-dev.txt")
    for arguments in (["setup-venv"], ["setup-venv", "--dev"]):
        assert tree.run(*arguments).returncode == 0
    assert tree.calls() == []


def test_failed_set_up_is_repeated_in_full(tree: Tree) -> None:
    assert tree.run("demo", pip_status=7).returncode == 7
    assert len(tree.calls()) == 1  # neither the package nor dmd2 after a failed install
    assert tree.run("setup-venv").returncode == 0
    assert "--ignore-installed" in tree.calls()[0]
    assert tree.run("setup-venv").returncode == 0
    assert tree.calls() == []


def test_moved_tree_is_set_up_again(tree: Tree) -> None:
    assert tree.run("setup-venv").returncode == 0
    tree.calls()
    tree.root = tree.root.rename(tree.root.with_name("elsewhere"))
    assert tree.run("setup-venv").returncode == 0
    assert tree.calls()[-1].endswith("-e .")


def test_environment_whose_python_is_gone_is_made_anew(tree: Tree) -> None:
    assert tree.run("setup-venv").returncode == 0
    tree.calls()
    python = tree.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    assert tree.run("setup-venv").returncode == 0
    assert len(tree.calls()) == 2
    assert not python.is_symlink()


def test_torch_index_is_handed_to_pip(tree: Tree) -> None:
    assert tree.run("setup-venv", DMD2_TORCH_INDEX="file:///wheels").returncode == 0
    assert "--extra-index-url file:///wheels" in tree.calls()[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "a red apple on a blue background --steps 4 --steps 1"),
        (["a cat", "--seed", "7"], "a cat --seed 7 --steps 4 --steps 1"),
        (["a cat", "--steps", "1"], "a cat --steps 1"),
        (["a cat", "--steps=4", "--seed", "7"], "a cat --steps=4 --seed 7"),
    ],
)
def test_demo_draws_with_four_steps_and_with_one(tree: Tree, arguments: list[str], expected: str) -> None:
    assert tree.run("demo", *arguments).returncode == 0
    assert tree.calls()[2:] == [f"dmd2 generate {expected}"]


class Service(NamedTuple):
    address: str
    answered: Counter[int]
    """how often with which status"""


@pytest.fixture
def service() -> Iterator[Service]:
    """What answers as Cog's server does, but refuses every third request and fails every tenth."""
    count, answered, lock = itertools.count(1), Counter[int](), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            inputs = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            well = self.path == "/predictions" and inputs["num_inference_steps"] == 4
            body = b'{"status": "succeeded"}' if well else b'{"status": "failed", "error": "asked wrongly"}'
            number = next(count)
            status = 409 if number % 3 == 0 else 500 if number % 10 == 0 else 200
            with lock:
                answered[status] += 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield Service(f"http://127.0.0.1:{server.server_port}", answered)
    server.shutdown()
    server.server_close()


def test_bench_server_counts_images_and_errors(service: Service) -> None:
    load = runpy.run_path(str(ROOT / "scripts/bench-server"))["load"]
    for clients in (1, 3):
        service.answered.clear()
        found = load(service.address, clients, 0.3, 4)
        assert found["images"] == service.answered[200] >= 1
        assert found["asked_again"] == service.answered[409]
        assert sum(found["errors"].values()) == service.answered[500] and set(found["errors"]) <= {"HTTP 500"}
        assert 0 < found["p50_ms"] <= found["p95_ms"]


def test_bench_server_compares_one_client_with_many(service: Service) -> None:
    command = [sys.executable, ROOT / "scripts/bench-server", "--url", service.address, "--seconds", "0.5"]
    done = subprocess.run([*command, "--clients", "3", "--steps", "4"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    rates = [report[name]["images_per_second"] for name in ("3 clients", "one client")]
    assert report["ratio"] == pytest.approx(rates[0] / rates[1], abs=0.01)
    assert report["steps"] == 4 and report["torch"]
    assert report["resident_mb_start_middle_end"] == [None] * 3  # of a service that it did not start


def test_captions_by_chance_are_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    drawn, scenes = runpy.run_path(str(ROOT / "scripts/grid"))["drawn"], EmojiScenes(EMOJI / "emoji.zip")
    captions = drawn(scenes, 40, 0)
    assert len(captions) == 40 and all(captions)
    assert captions == drawn(scenes, 40, 0) != drawn(scenes, 40, 1)
    with pytest.raises(InvalidInput, match="drawn 9999: expected at most"):
        drawn(scenes, 9999, 0)
