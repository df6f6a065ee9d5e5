"""cog.yaml, and `dmd2 cog`, which serves without Docker."""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import dmd2.cli
from dmd2.service.cog.schema import schema_is_current
from dmd2.service.images import ImageService, OutputImage

ROOT = Path(__file__).resolve().parents[3]

# What Cog 0.23 knows; anything else is an error there.
KEYS = {"build", "image", "model", "run", "predict", "train", "concurrency", "environment", "weights"}
BUILD_KEYS = {"cuda", "gpu", "python_version", "python_requirements", "pre_install", "run", "sdk_version"}
DEPRECATED = {"predict", "concurrency", "pre_install"}


@pytest.fixture
def config() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_cog_knows_every_key(config: dict[str, Any]) -> None:
    assert set(config) <= KEYS - DEPRECATED
    assert set(config["build"]) <= (BUILD_KEYS | {"system_packages"}) - DEPRECATED
    assert isinstance(config["build"]["python_version"], str)  # 3.10 without quotes would be 3.1


def test_the_files_and_the_class_exist(config: dict[str, Any]) -> None:
    assert (ROOT / config["build"]["python_requirements"]).is_file()
    file, name = config["run"].split(":")
    tree = ast.parse((ROOT / file).read_text())
    assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_the_image_gets_a_torch_that_cog_pairs_with_cuda(config: dict[str, Any]) -> None:
    lines = (ROOT / config["build"]["python_requirements"]).read_text().splitlines()
    assert config["build"]["gpu"] is True and "cuda" not in config["build"]
    assert "torch==2.11.0" in lines
    pinned = [line.split("#")[0].strip() for line in lines]
    assert all("==" in line for line in pinned if line)


def test_the_image_holds_the_embedded_weights_and_the_schema() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines.index("!weights/emoji") > lines.index("weights/*")
    assert not any(line.strip("/*") in (".cog", "dmd2", "predict.py", "scripts") for line in lines)


# dmd2 cog


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with predict.py, for `dmd2 cog` to work on."""
    (tmp_path / "predict.py").write_text((ROOT / "predict.py").read_text())
    monkeypatch.setattr(dmd2.cli.serve, "ROOT", tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> tuple[int, list[Any]]:
    """Status of `dmd2 cog …`, and what it would have replaced itself by."""
    replaced: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *call: replaced.extend(call))
    monkeypatch.setattr(sys, "argv", ["dmd2", "cog", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        dmd2.cli.main()
    return int(end.value.code or 0), replaced


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_it_writes_the_schema_and_becomes_the_entrypoint(
    monkeypatch: pytest.MonkeyPatch, clone: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "dmd2.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", "1")
    monkeypatch.delenv("DMD2_WEIGHTS", raising=False)
    port = free_port()
    given = "--port", str(port), "--weights", "weights", "--device", "cuda:1"
    status, (python, arguments, environment) = run(monkeypatch, *given)
    assert status == 0 and python == sys.executable
    assert arguments == [sys.executable, str(clone / "scripts" / "entrypoint"), "--host", "127.0.0.1"]
    assert environment["PORT"] == str(port) and environment["MINE"] == "1"
    assert environment["DMD2_WEIGHTS"] == str(weights)  # absolute: the server runs in another folder
    assert environment["DMD2_DEVICE"] == "cuda:1"
    assert schema_is_current(clone)

    _, (_, arguments, environment) = run(monkeypatch, "--port", str(port), "--host", "0.0.0.0")
    assert arguments[2:] == ["--host", "0.0.0.0"] and "DMD2_WEIGHTS" not in environment


def test_it_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clone: Path, tmp_path: Path
) -> None:
    def refused(*arguments: str | Path) -> str:
        assert run(monkeypatch, *arguments) == (2, [])
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("dmd2: ") and err.count("\n") == 1
        return err

    assert "--port 0: expected 1 to 65535" in refused("--port", "0")
    assert "--port 65536: expected 1 to 65535" in refused("--port", "65536")
    assert f"--weights {tmp_path}: expected a folder with a dmd2.json" in refused("--weights", tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} on 127.0.0.1: cannot listen there (Address already in use)" in refused("--port", port)
    assert not (clone / ".cog").exists()

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "cog" else found(name, *rest)
    )
    assert "Cog's Python package is not installed; pip install 'dmd2[serve]'" in refused()
    (clone / "predict.py").unlink()
    assert "works from a clone of the repository only" in refused()


def test_dmd2_weights_comes_before_cog_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cog hands COG_WEIGHTS to setup; `dmd2 cog --weights` sets DMD2_WEIGHTS."""
    import predict

    chosen: list[object] = []
    service = SimpleNamespace(uncompiled={})
    monkeypatch.setattr(predict, "ImageService", lambda weights: chosen.append(weights) or service)
    predict.Predictor().setup("cogs")
    monkeypatch.setenv("DMD2_WEIGHTS", "mine")
    predict.Predictor().setup("cogs")
    monkeypatch.setenv("DMD2_WEIGHTS", "")
    predict.Predictor().setup(None)
    assert chosen == ["cogs", "mine", None]


@pytest.mark.parametrize("failures", [0, 2])
def test_what_is_not_compiled_is_a_warning_and_in_the_metrics(
    failures: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import predict

    compiler = SimpleNamespace(failures=failures, unprepared=0)
    service = ImageService.__new__(ImageService)
    service.engine = SimpleNamespace(model=SimpleNamespace(placement=SimpleNamespace(compiler=compiler)))  # type: ignore[assignment]
    monkeypatch.setattr(predict, "ImageService", lambda _: service)
    predictor, told = predict.Predictor(), {}
    predictor.record_metric = told.__setitem__
    predictor.setup(None)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["set-up: not all of it runs compiled: compile_failures 2, unprepared_calls 0"] * (
        failures > 0
    )
    compiler.unprepared = 3
    assert len(list(predictor._files(iter([OutputImage(tmp_path / "image.png", 5)])))) == 1
    assert (told["compile_failures"], told["unprepared_calls"]) == (failures, 3)
    service.engine.model.placement.compiler = None  # type: ignore[misc]
    assert service.uncompiled == {}
