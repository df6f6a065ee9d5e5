"""`/trainings`: the real server in training mode, on the embedded model; and what is refused before anything runs."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load

from dmd2.models.adapters.lora import read_lora
from dmd2.runtime.errors import UserError
from dmd2.service.cog import trainings
from dmd2.service.cog.trainings import TrainingRequest, train_student
from dmd2.training.recipes import resolve
from dmd2.weights.manifest import read_manifest
from tests.service.cog.cog_server import ROOT, START, wait_for
from tests.tiny_sdxl import photograph

PROMPTS = "an owl\na red apple on a blue background\n"


def data_url(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def images() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for k in range(2):
            image = io.BytesIO()
            photograph(k).save(image, "PNG")
            archive.writestr(f"{k}.png", image.getvalue())
            archive.writestr(f"{k}.txt", "an owl")
    return data.getvalue()


class TrainingServer:
    """Cog's server, as it serves `/trainings`; its temporary files are in `temporary`."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DMD2_", "COG_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"TMPDIR": str(self.temporary), "PORT": str(port), "PATH": path, "PYTHONPATH": str(ROOT)}
        own |= {"COG_TRAIN_TYPE_STUB": "train.py:train", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "cog.server.http", "--x-mode", "train", "--host", "127.0.0.1"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=kept | own, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=1200)

    def ready(self) -> bool:
        assert self.process.poll() is None
        try:
            return self.client.get("/health-check").json()["status"] == "READY"
        except httpx.TransportError:
            return False

    def train(self, **inputs: Any) -> dict[str, Any]:
        return dict(self.client.post("/trainings", json={"input": inputs}).json())

    def begin(self, name: str, **inputs: Any) -> None:
        """A training that goes on; returns once its own process writes into its folder."""
        headers = {"Prefer": "respond-async"}
        assert self.client.put(f"/trainings/{name}", json={"input": inputs}, headers=headers).status_code == 202
        wait_for(lambda: list(self.temporary.glob("dmd2-training-*/run/samples/*.png")), "a run", START)

    def nothing_left(self) -> bool:
        """Neither folders of a training nor its processes."""
        trainers = [p for p in psutil.process_iter(["cmdline"]) if self._is_ours(p)]
        return not trainers and not list(self.temporary.glob("dmd2-training-*"))

    def _is_ours(self, process: psutil.Process) -> bool:
        return str(self.temporary) in " ".join(process.info["cmdline"] or [])

    def close(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    made = TrainingServer(tmp_path_factory.mktemp("training"))
    try:
        wait_for(made.ready, "READY", START)
        yield made
    finally:
        made.close()


def test_prompts_in_a_lora_student_out(server: TrainingServer, tmp_path: Path) -> None:
    """With captioned images, too; its progress is in the log; what it wrote on the way is gone."""
    given = {"prompts": PROMPTS, "images": data_url(images()), "num_inference_steps": 1, "rank": 2}
    answer = server.train(iterations=1, batch_size=1, **given)
    assert answer["status"] == "succeeded", answer
    assert "done: 2 prompts" in answer["logs"] and "step 1:" in answer["logs"] and "100%" in answer["logs"]
    head, _, content = answer["output"]["weights"].partition(",")
    assert head.startswith("data:") and head.endswith("base64")
    student = base64.b64decode(content)
    assert {value.shape[0] for name, value in load(student).items() if "lora_down" in name} == {2}
    (tmp_path / "student.safetensors").write_bytes(student)
    assert not read_lora(tmp_path / "student.safetensors").changes_text
    assert server.nothing_left()


def test_a_cancelled_training_leaves_nothing_and_the_server_ready(server: TrainingServer) -> None:
    server.begin("cancelled", prompts=PROMPTS, iterations=100_000, batch_size=1)
    assert server.client.post("/trainings/cancelled/cancel").status_code == 200
    wait_for(server.nothing_left, "the end of the training")
    wait_for(server.ready, "READY")


def test_what_is_out_of_bounds_is_one_line(server: TrainingServer) -> None:
    for inputs, message in (
        ({"prompts": PROMPTS, "batch_size": 100_000}, "batch_size"),
        ({"prompts": PROMPTS, "prompts_file": "/etc/hostname"}, "prompts_file"),
        ({"prompts": " \n"}, "prompts: missing; expected prompts, prompts_file or images"),
    ):
        answer = server.client.post("/trainings", json={"input": inputs})
        told = json.dumps(answer.json())
        assert answer.status_code == 422 or answer.json()["status"] == "failed"
        assert message in told and "Traceback" not in told


def test_a_server_that_is_killed_leaves_nothing(server: TrainingServer) -> None:
    """The last of this file: the worker does not come back."""
    server.begin("killed", prompts=PROMPTS, iterations=100_000, batch_size=1)
    for process in psutil.Process(server.process.pid).children():
        process.kill()
    wait_for(server.nothing_left, "the end of the training")


# Without a server


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "prompts: missing"),
        ({"prompts": PROMPTS, "prompts_file": "data:,a"}, "prompts_file: given beside prompts"),
        ({"prompts_file": "file:///etc/hostname"}, "prompts_file: "),
        ({"prompts_file": "http://example.com/a.txt"}, "prompts_file: "),
        ({"images": "/etc/hostname"}, "images: "),
        ({"prompts": PROMPTS, "iterations": 0}, "iterations: "),
        ({"prompts": PROMPTS, "learning_rate": float("nan")}, "learning_rate: "),
        ({"prompts": PROMPTS, "num_inference_steps": 2}, "num_inference_steps: "),
        ({"prompts": PROMPTS, "minutes": 10**9}, "minutes: "),
        ({"prompts": PROMPTS, "surprise": 1}, "surprise: "),
        ({"prompts": 3}, "prompts: "),
    ],
)
def test_a_wrong_request_is_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingRequest.of(given)


def test_what_cog_leaves_out_is_none_and_has_its_default() -> None:
    assert TrainingRequest.of({"prompts": PROMPTS, "images": None, "seed": None}).seed == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": data_url(b"no zip")}, "images: no zip"),
        ({"prompts_file": data_url(b"PAR1")}, "prompts: .*not Parquet"),
        ({"prompts_file": data_url(b"\x80\x04cos\nsystem\n.")}, "prompts: .*refused, not run"),
        ({"prompts_file": "data:;base64,!"}, "prompts_file: is no whole data URL"),
        ({"prompts_file": "https://127.0.0.1/a.txt"}, "prompts_file: .*refused, because 127.0.0.1 is no public"),
        ({"prompts": "a" * 20_000}, "prompts: prompt 1 has 20000 characters"),
    ],
)
def test_hostile_files_are_one_line_and_nothing_is_left(
    given: dict[str, Any], message: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match=message) as raised:
        train_student(given, {"DMD2_WEIGHTS": str(weights)})
    assert str(tmp_path) not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_many_prompts_or_images_are_refused(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(trainings, "MOST_PROMPTS", 1)
    monkeypatch.setattr(trainings, "MOST_IMAGES", 1)
    for given, message in (
        ({"prompts": PROMPTS}, "prompts: 2 prompts; expected 1 at most"),
        ({"images": data_url(images())}, "images: 4 files; expected at most 1 images"),
    ):
        with pytest.raises(UserError, match=message):
            train_student(given, {"DMD2_WEIGHTS": str(weights)})


def test_out_of_time_is_told_and_leaves_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still until the first process runs, and is a day later then."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = trainings._run
    monkeypatch.setattr(trainings, "_run", lambda arguments, folder, until: run(arguments, folder, until - 86_400))
    with pytest.raises(UserError, match="minutes: the training is not done in time"):
        train_student({"prompts": PROMPTS}, {"DMD2_WEIGHTS": str(weights)})
    assert list(tmp_path.iterdir()) == []


def test_weights_without_a_teacher_are_told(weights: Path, tmp_path: Path) -> None:
    manifest = read_manifest(weights).model_copy(update={"teacher": None})
    (tmp_path / "dmd2.json").write_text(manifest.model_copy(update={"files": {}}).model_dump_json())
    with pytest.raises(UserError, match="these weights hold no teacher to distil"):
        train_student({"prompts": PROMPTS}, {"DMD2_WEIGHTS": str(tmp_path)})


def test_a_request_s_numbers_reach_the_recipe(weights: Path) -> None:
    request = TrainingRequest.of({"prompts": PROMPTS, "iterations": 7, "learning_rate": 1e-3, "rank": 3})
    recipe: Any = resolve(trainings.RECIPE, trainings._settings(request, read_manifest(weights)))
    assert (recipe.loop.iterations, recipe.lr, recipe.rank, recipe.guidance_scale) == (7, 1e-3, 3, 3.0)
    assert recipe.adapter == "lora" and recipe.networks == "adapters" and recipe.timesteps == (999, 749, 499, 249)


def test_large_images_are_trained_in_the_memory_of_one_card(weights: Path) -> None:
    request = TrainingRequest.of({"prompts": PROMPTS, "batch_size": 6})
    manifest = read_manifest(weights).model_copy(update={"native_size": (1024, 1024)})
    recipe: Any = resolve(trainings.RECIPE, trainings._settings(request, manifest))
    assert (recipe.loop.batch_size, recipe.loop.grad_accum_steps, recipe.checkpointing) == (1, 6, True)
    recipe = resolve(trainings.RECIPE, trainings._settings(request, read_manifest(weights)))
    assert (recipe.loop.batch_size, recipe.loop.grad_accum_steps, recipe.checkpointing) == (6, 1, False)
