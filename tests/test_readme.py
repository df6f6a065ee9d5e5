"""Every code block of the README: run as written, or, where a comment above it says why not, its options checked.

The only word that is changed is the port of the server, which may be taken. Commands in the other pages are checked
like those that are not run; files that any page names must be there.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer.main
from PIL import Image

from dmd2.cli import app
from dmd2.training.loop import LoopSettings, train
from dmd2.training.recipes import RECIPES, build_method, resolve
from dmd2.weights.manifest import DEFAULT, read_manifest
from tests.service.cog.cog_server import CogServer
from tests.service.cog.test_supervisor import free_port
from tests.service.http.serve_process import ServeProcess
from tests.training.pixels import same_weights, write_teacher

ROOT = Path(__file__).resolve().parents[1]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / name / "README.md" for name in ("tests", "weights", "weights/emoji")]
DOWNLOADED = (
    "weights/sdxl",
    "weights/safety",
    "weights/cifar10",
    "weights/edm",
    "weights/metrics",
    "weights/mine",
    "weights/theirs",
)
"""folders that the commands of these pages make"""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    is_run: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    pattern = r"(?m)^(<!-- not run by a test: \S[^\n]* -->\n)?```(\w*)\n(.*?)^```$"
    return [
        Block(name, text[: match.start(2)].count("\n") + 1, match[2], match[3], match[1] is None)
        for match in re.finditer(pattern, text, re.DOTALL)
    ]


BLOCKS = blocks(ROOT / "README.md")
SHELL = [block for page in PAGES for block in blocks(page) if block.language == "sh"]
TREE = next(block for block in BLOCKS if not block.language)
SERVED = [block for block in BLOCKS if "localhost:5000" in block.code]
ASKED = [block for block in BLOCKS if "localhost:8000/v1" in block.code and "kill $!" not in block.code]
"""what `dmd2 serve` is asked"""
SERVERS = ("dmd2 cog", "dmd2 serve ")
OWN = [block for block in BLOCKS if "kill $!" in block.code]
"""that start a server, ask it and end it"""
ALONE = [
    b
    for b in BLOCKS
    if b.is_run
    and b.language
    and (b in OWN or (b not in SERVED + ASKED and not any(name in b.code for name in SERVERS)))
]


def commands(code: str) -> Iterator[list[str]]:
    """Each command's words: comments, line breaks and variables of the shell are taken out."""
    variables: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and "=" in words[0]:
            variables |= [words[0].split("=", 1)]
        elif words:
            yield words[:-1] if words[-1] == "&" else words


def run(block: Block, folder: Path, port: int = 5000) -> str:
    """Runs a block as a user would who stands in `folder`, with the environment activated."""
    code = re.sub("localhost:(5000|8000/v1)", lambda found: found[0].replace(found[1][:4], str(port)), block.code)
    code = code.replace("--port 8000 ", f"--port {port} ")
    command = {"sh": ["bash", "-euo", "pipefail", "-c", code], "python": [sys.executable, "-c", code]}[block.language]
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"README.md, line {block.line}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the README is read: `weights` is there, and what is written stays out of the repository."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    return tmp_path


def test_every_block_is_found() -> None:
    fences = (ROOT / "README.md").read_text(encoding="utf-8").count("\n```")
    assert fences == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} == {"sh", "python", ""}


@pytest.mark.slow
@pytest.mark.parametrize("block", ALONE, ids=lambda block: f"line {block.line}")
def test_a_block_runs_as_written(block: Block, folder: Path) -> None:
    said = run(block, folder, free_port())
    if block in OWN:  # the student that the block has trained was asked for an image, and gave one
        answer = re.search(r'"b64_json": ?"([^"]+)"', said)
        assert answer is not None, said
        with Image.open(io.BytesIO(base64.b64decode(answer[1]))) as image:
            assert image.size == read_manifest(DEFAULT).native_size
    if "--num-outputs 4 --out images" in block.code:  # what the text promises: two prompts, four seeds each
        names = [path.stem.split("_")[-2:] for path in (folder / "images").glob("*.png")]
        assert sorted(names) == sorted([["1", seed] for seed in ("7", "8", "9", "10")] * 2)


@pytest.mark.slow
def test_what_the_service_is_asked_runs_as_written(folder: Path) -> None:
    (folder / "server").mkdir()
    server = CogServer(folder / "server")
    try:
        server.wait_until_ready()
        said = [run(block, folder, server.port) for block in SERVED]
    finally:
        server.close()
    assert len(said) >= 4
    for name in ("apple.png", "owl-0.webp", "owl-1.webp"):
        with Image.open(folder / name) as image:
            assert image.size == read_manifest(DEFAULT).native_size
    assert any("event: output" in text for text in said)


@pytest.mark.slow
def test_what_dmd2_serve_is_asked_runs_as_written(folder: Path) -> None:
    (folder / "server").mkdir()
    server = ServeProcess(folder / "server", "--weights", str(ROOT / "weights" / "emoji"))
    try:
        server.wait_until_ready()
        said = [run(block, folder, server.port) for block in ASKED]
    finally:
        server.close()
    (curl, python) = said
    assert [image["seed"] for image in json.loads(curl)["data"]] == [7, 8]
    assert python.split() == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    with Image.open(folder / "lion-7.png") as image:
        assert image.size == read_manifest(DEFAULT).native_size


def parsed(words: list[str]) -> None:
    """Has the command line's own parser read a command; it raises what a user would see."""
    command, context = typer.main.get_command(app), None
    name, rest = words[0], words[1:]
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, list(rest), parent=context, resilient_parsing=True)
        name, command, rest = command.resolve_command(context, list(rest))
    context = command.make_context(name, list(rest), parent=context)
    if name == "train" and context.params["recipe"]:  # none beside --resume
        resolve(context.params["recipe"], [])


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}, line {block.line}")
def test_commands_and_options_are_there(block: Block) -> None:
    for words in commands(block.code):
        if words[0] == "dmd2":
            parsed(words)
        elif words[0].startswith("scripts/"):
            script = ROOT / words[0]
            assert os.access(script, os.X_OK), words[0]
            text = script.read_text(encoding="utf-8")
            for option in (word for word in words[1:] if word.startswith("--")):
                assert option in text or option[2:].replace("-", "_") in text, f"{words[0]} knows no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {page.parent / link.partition("#")[0] for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)}
    prose = "".join(re.split(r"(?ms)^```.*?^```$", text))
    named = set(re.findall(r"`((?:dmd2|scripts|tests|docs|weights)/[\w./-]+)`", prose))
    paths = links | {ROOT / name for name in named if not name.startswith(DOWNLOADED)}
    assert [str(path) for path in paths if not path.exists()] == []


def test_tests_that_ci_runs_again_are_there() -> None:
    named = re.findall(r"tests/\S+\.py", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_sections_that_the_readme_links_to_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", text)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= sections


def tree() -> dict[str, set[str]]:
    """Folder → files that the README's tree names in it."""
    found: dict[str, set[str]] = {"": set()}
    folders: list[tuple[int, str]] = [(-1, "")]
    for line in TREE.code.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent < 20:  # otherwise the line goes on with what is in the last folder
            while folders[-1][0] >= indent:
                folders.pop()
            if (first := line.split()[0]).endswith("/"):
                folders.append((indent, folders[-1][1] + first))
        found.setdefault(folders[-1][1], set()).update(re.findall(r"[\w-]+\.(?:py|md)\b", line))
    return found


def test_the_tree_names_what_is_there() -> None:
    top = {name.rstrip("/") for name in re.findall(r"^(\S+)", TREE.code, re.MULTILINE)}
    assert {name for name in top if not (ROOT / name).exists()} == set()
    named = {folder + name for folder, names in tree().items() for name in names}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_tree_names_every_module() -> None:
    named = tree()
    for path in sorted((ROOT / "dmd2").rglob("*.py")):
        folder = path.parent.relative_to(ROOT).as_posix() + "/"
        if not path.name.startswith("__"):
            assert path.name in named.get(folder, set()), f"the tree does not name {folder}{path.name}"


def test_the_method_in_extending_md_trains_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in blocks(ROOT / "docs" / "extending.md") if block.language == "python")
    (tmp_path / "mine.py").write_text(block.code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("mine")
    monkeypatch.setitem(
        RECIPES, "mine", mine.ScoreDistillationRecipe(LoopSettings(iterations=1, batch_size=2), lr=1e-4)
    )
    recipe = resolve("mine", ["precision=fp32", "iterations=2"])
    method = build_method(recipe, {"init": write_teacher(tmp_path / "teacher")}, torch.device("cpu"))
    assert train(method, recipe.loop, tmp_path / "run")
    assert not same_weights(tmp_path / "teacher", tmp_path / "run" / "model")
