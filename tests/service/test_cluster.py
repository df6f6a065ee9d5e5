"""Ray: what it is told, and what a replica and a worker do, without it; with it, all of it, killed meanwhile."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import dmd2.service.http.server as server
import dmd2.service.images as images
from dmd2.cli import app
from dmd2.data.shards import read_index
from dmd2.runtime.errors import UserError
from dmd2.service.batch import Requests, bulk_index
from dmd2.service.cluster import LONGEST_LORA, Replica, _Maker, build
from tests.service.http.fake import FakeService
from tests.service.test_batch import content, fake, make, write_rows

ROOT = Path(__file__).resolve().parents[2]
HAS_RAY = importlib.util.find_spec("ray") is not None


class FakeServe:
    """Of `ray.serve`, what a replica uses."""

    def __init__(self) -> None:
        self.lora, self.held = "", list[str]()

    def multiplexed(self, max_num_models_per_replica: int) -> Any:
        assert max_num_models_per_replica > 0

        def decorate(load: Any) -> Any:
            async def loaded(name: str) -> Any:
                self.held.append(name)
                return await load(name)

            return loaded

        return decorate

    def get_multiplexed_model_id(self) -> str:
        return self.lora


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "api_key_file: anybody could ask"),
        ({"insecure_public": "perhaps"}, "api_key_file: anybody could ask"),
        ({"x" * 1000: "1"}, "expected some of api_key_file, cpus"),
        ({"replicas": "0"}, "replicas 0: expected a number from 1 to 10000"),
        ({"replicas": "²"}, "replicas ²: expected a number"),
        ({"replicas": "4", "most": "2"}, "most 2: expected at least replicas, which is 4"),
        ({"gpus": "-1"}, "gpus -1: expected a number from 0 to 64"),
        ({"queue": "9" * 5000}, "queue 9"),
    ],
)
def test_arguments_that_are_wrong_are_one_line(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(arguments)
    said = str(error.value).replace("=", " ")
    assert message in said and "\n" not in said and len(said) < 500


def test_a_replica_is_the_application_of_dmd2_serve_and_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    service, serve = FakeService(), FakeServe()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setattr(server, "loaders", lambda folders: {"fake": lambda: service})
    monkeypatch.setattr(server, "log", lambda: None)
    replica = Replica(["weights"], None, 64)
    assert not hasattr(replica, "app")  # Ray's wrapper has a property of that name, which cannot be set

    async def run() -> None:
        application: Any = replica.__serve_build_asgi_app__()
        async with replica._application.router.lifespan_context(replica._application):
            await asyncio.wait_for(replica.check_health(), 120)
            transport = httpx.ASGITransport(application)
            async with httpx.AsyncClient(transport=transport, base_url="http://cluster") as client:
                for serve.lora in ("", "style", "x" * (LONGEST_LORA + 1)):
                    answer = await client.post("/v1/images/generations", json={"prompt": "an owl"})
                    assert answer.status_code == 200
            assert serve.held == ["style"]
            service.alive = False
            with pytest.raises(RuntimeError, match="gone"):
                await replica.check_health()

    asyncio.run(run())


def test_a_worker_makes_the_files_that_it_is_given_as_one_process_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, loaded = write_rows(tmp_path / "rows.jsonl"), list[Any]()

    def service(*arguments: Any, **_: Any) -> Any:
        loaded.append(arguments)
        return SimpleNamespace(generate_all=fake)

    monkeypatch.setattr(images, "ImageService", service)
    make(path, tmp_path / "alone")
    requests = Requests(path, {"output_quality": 90})
    index = bulk_index(requests, {"weights": "w"}, "webdataset", 4)
    worker = _Maker(path, requests.defaults, tmp_path, "cpu", tmp_path / "out", index.model_dump(), False)
    for name in reversed(list(index.shards())):
        assert worker({"name": [name]}) == {"name": [name]}
    assert read_index(tmp_path / "out").whole and len(loaded) == 1
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_bulk_on_ray_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ["an owl"])
    command = ["batch", str(path), "--out", str(tmp_path / "out"), "--ray"]
    monkeypatch.setitem(sys.modules, "ray", None)
    for more, message in (([], "Ray is not installed; pip install 'dmd2[ray]'"), (["--part", "1/2"], "part")):
        result = CliRunner().invoke(app, [*command, *more])
        assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
def test_replicas_and_bulk_on_ray_survive_kills() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "soak-cluster")]
    command += ["--requests", "60", "--kills", "1", "--rows", "24", "--shard", "3", "--bulk-kills", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    assert said["serve"]["not_served"] == [] and said["serve"]["answers"]["200"] == 60
    assert said["serve"]["killed"] == len(said["serve"]["seconds_until_replaced"]) == 1
    assert said["batch"]["killed"] == said["batch"]["workers_killed"] == 1
    assert (said["batch"]["missing"], said["batch"]["twice"], said["batch"]["unexpected"]) == (0, 0, 0)
    assert said["batch"]["left_over"] == []
