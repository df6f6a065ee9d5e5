"""LoRA students, and student and fake score as adapters on one frozen network: every method, SD 1.5 and SDXL."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmd2.cli import main
from dmd2.data.pairs import make_pairs
from dmd2.models.adapters.lora_training import LORA_FILE, Adapted
from dmd2.runtime.errors import UserError
from dmd2.training.loop import Batch, training_step
from dmd2.training.preview import CaptionPreview
from dmd2.training.recipes import resolve
from dmd2.training.sources import Inputs
from dmd2.weights.manifest import read_manifest
from tests.training.pixels import write_set, write_teacher
from tests.training.test_product import CPU, METHODS, PROMPTS, equal, run, sd15, tensors

LORA: dict[str, Any] = {"adapter": "lora", "rank": 4, "alpha": 2.0, "lr": 1e-2}
SHARED: dict[str, Any] = {**LORA, "networks": "adapters", "lr_critic": 1e-2}
TEXT: dict[str, Any] = {"data": "emoji", "sigmas": (), "timesteps": (999,), "precision": "fp32"}


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def inputs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    weights: Path,
    emoji_zip: Path,
    text_models: tuple[Any, Any, Any],
) -> Inputs:
    folder = tmp_path_factory.mktemp(request.param)
    teacher = weights if request.param == "sdxl" else sd15(folder / "teacher", text_models)
    make_pairs(teacher, folder / "pairs", 4, 2, 4, CPU, prompts=PROMPTS)
    paths = {"init": teacher, "data": emoji_zip, "pairs": folder / "pairs", "classifier": folder / "none"}
    return Inputs(paths, CPU)


def recipe(method: str, **fields: Any) -> Any:
    made: Any = replace(METHODS[method], **TEXT, **fields)  # type: ignore[type-var]
    assert made.conflict() is None
    return made


@pytest.fixture(autouse=True)
def _small_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CaptionPreview, "grid", lambda self, generate: generate(self.captions[:2], [0, 1])[0])


@pytest.mark.parametrize(
    ("inputs", "method", "fields"),
    [
        ("sdxl", "dmd2-gan", SHARED | {"checkpointing": True}),
        ("sd15", "dmd2-gan", SHARED | {"checkpointing": True}),
        ("sd15", "dmd2-gan", LORA),
        ("sd15", "dmd", SHARED),
        ("sd15", "gdd", LORA),
    ],
    ids=["sdxl-adapters", "sd15-adapters", "sd15-lora", "sd15-dmd-adapters", "sd15-gdd-lora"],
    indirect=["inputs"],
)
def test_trains_resumes_to_the_bit_and_serves_the_lora(
    method: str, fields: dict[str, Any], inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(method, **fields)
    run(made, inputs, tmp_path / "whole", 3)
    run(made, inputs, tmp_path / "parts", 2)
    half = tensors(tmp_path / "parts" / "model")
    run(made, inputs, tmp_path / "parts", 3, resume=True)
    whole, parts = (tensors(tmp_path / name / "model") for name in ("whole", "parts"))
    assert equal(whole, parts) and not equal(whole, half)

    model = tmp_path / "whole" / "model"
    manifest, teacher = read_manifest(model), read_manifest(inputs.need("init")).teacher
    assert manifest.teacher is not None and teacher is not None
    student = manifest.students[1]
    assert student.subfolder == teacher.subfolder and student.lora == f"lora_1step/{LORA_FILE}"
    unet = f"{teacher.subfolder}/diffusion_pytorch_model.safetensors"
    assert equal(load_file(model / unet), load_file(inputs.need("init") / unet))  # the teacher, untouched
    assert (model.parent / "fake_score" / LORA_FILE).is_file() == ("networks" in fields and method != "dmd")

    images = []
    for steps in ("1", "teacher-1"):  # the same network without the LoRA
        words: list[Any] = ["generate", PROMPTS[0], "--weights", model, "--steps", steps, "--seed", 0]
        monkeypatch.setattr(sys, "argv", ["dmd2", *map(str, [*words, "--out", tmp_path / steps, "--device", "cpu"])])
        with pytest.raises(SystemExit, match="0"):
            main()
        (path,) = (tmp_path / steps).glob("*.png")
        with Image.open(path) as image:
            images.append(image.tobytes())
    assert images[0] != images[1]


@pytest.mark.parametrize("inputs", ["sd15"], indirect=True)
def test_only_loras_are_trained_and_averaged(inputs: Inputs) -> None:
    made = recipe("dmd2", **SHARED).method(inputs)
    generator, critic = (phase.module for phase in made.phases)
    assert isinstance(generator, Adapted) and isinstance(critic["network"], Adapted)
    unet = generator.unet
    assert critic["network"].unet is unet and made.ema_model is generator
    frozen = {name: value.clone() for name, value in unet.state_dict().items() if ".lora_" not in name}
    for step in range(3):  # at first, fake score and teacher agree
        batch = Batch(step, made.data(step), torch.Generator().manual_seed(step))
        training_step(made.phases, batch, recipe("dmd2").loop)
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in frozen.items())
    assert all(
        any(value.any() for name, value in each.state_dict().items() if "lora_up" in name)
        for each in (generator, critic["network"])
    )
    trained = [p for phase in made.phases for group in phase.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in trained) < 0.5 * sum(value.numel() for value in frozen.values())


def test_checkpointing_changes_no_step(inputs: Inputs) -> None:
    results = []
    for checkpointing in (False, True):
        made = recipe("dmd2-gan", **SHARED, checkpointing=checkpointing).method(inputs)
        for step in range(2):
            batch = Batch(step, made.data(step), torch.Generator().manual_seed(step))
            figures = training_step(made.phases, batch, recipe("dmd2").loop)
        results.append({name: float(value) for name, value in figures.items()})
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("inputs", ["sd15"], indirect=True)
def test_both_loras_go_on(inputs: Inputs, tmp_path: Path) -> None:
    first = recipe("dmd2", **SHARED)
    run(first, inputs, tmp_path / "first", 1)
    model = tmp_path / "first" / "model"
    onward = Inputs({**inputs.paths, "student": model}, CPU)
    made = recipe("dmd2-gan", **SHARED, resumed=True).method(onward)
    generator, critic = (phase.module for phase in made.phases)
    for network, path in ((generator, model / "lora_1step"), (critic["network"], model.parent / "fake_score")):
        file = load_file(path / LORA_FILE)
        factors = {f"lora_unet_{k.removeprefix('layers.')}": v for k, v in network.state_dict().items()}
        assert equal(factors, {k: v for k, v in file.items() if not k.endswith(".alpha")})
    for fields, words in (
        (SHARED | {"rank": 8}, "another rank or alpha"),
        (LORA, "its fake score is a LoRA; expected networks=adapters"),
        ({}, "is a LoRA; expected adapter=lora"),
    ):
        with pytest.raises(UserError, match=words):
            recipe("dmd2-gan", resumed=True, **fields).method(onward)


def test_what_does_not_go_together_is_one_line(tmp_path: Path) -> None:
    for given, words in (
        (["networks=adapters"], "set networks=adapters with adapter=full: expected adapter=lora"),
        (["adapter=lora"], "set student_init=unet with adapter=lora: expected null"),
        (["rank=0"], "set rank=0: expected a whole number from 1, at most 1024"),
        (["alpha=0"], "set alpha=0: expected a number above 0"),
        (["adapter=dora"], "set adapter=dora: expected full or lora"),
    ):
        with pytest.raises(UserError, match=words):
            resolve("emoji-dmd2-1step", given)
    with pytest.raises(UserError, match="freeze=true with adapter=lora"):
        resolve("cifar10-small-gdd-i", ["adapter=lora"])
    edm = Inputs({"init": write_teacher(tmp_path / "edm"), "data": write_set(tmp_path / "set.zip")}, CPU)
    for fields, words in (
        (LORA, "adapter lora: expected full"),
        ({"checkpointing": True}, "checkpointing true: expected false"),
    ):
        with pytest.raises(UserError, match=words):
            replace(METHODS["dmd2"], **fields).method(edm)  # type: ignore[type-var]
