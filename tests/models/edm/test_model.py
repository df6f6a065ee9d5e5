"""Class-conditional networks behind the same engine, command line and service as text-to-image ones."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import dmd2.cli
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import Churn, sample_heun, teacher_sigmas
from dmd2.inference.conditioning import ImageConditioning
from dmd2.inference.engine import Engine
from dmd2.inference.mode import default_mode, modes_of
from dmd2.inference.request import ImageRequest
from dmd2.models.edm.folder import load_edm, save_edm
from dmd2.models.edm.model import ClassEncoder
from dmd2.models.edm.network import ClassCondition, EdmConfig, EdmNetwork, RgbCodec
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import sha256_file
from dmd2.service.images import ImageService, OutputImage
from dmd2.weights.manifest import read_manifest

NAMES = ("airplane", "cat", "dog")
CPU = torch.device("cpu")


def network(sigmas: tuple[float, ...] = ()) -> EdmNetwork:
    config = EdmConfig(
        architecture="ddpmpp",
        resolution=16,
        classes=3,
        model_channels=16,
        channel_mult=(1, 2),
        blocks=1,
        attention=(8,),
        sigmas=sigmas,
    )
    torch.manual_seed(0)
    net = EdmNetwork(config)
    for parameter in net.parameters():  # EDM starts with zeros that would make all classes alike
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return net


def saved(folder: Path, sigmas: tuple[float, ...]) -> Path:
    save_edm(folder, network(sigmas), name="tiny", licence="none", recipe={}, class_names=NAMES)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("edm") / "student", (80.0,))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("edm") / "teacher", ())


def one_hot(*classes: int) -> ClassCondition:
    return ClassCondition.of(torch.tensor(classes), 3)


@pytest.mark.parametrize("prompt", ["1", " 1 ", "cat", "Cat", "a photo of a cat", "two CATS, please"])
def test_a_prompt_names_a_class(prompt: str) -> None:
    assert ClassEncoder(NAMES, 3, CPU)([prompt], (16, 16)).labels.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("3", "prompt: class 3; expected 0 to 2"),
        ("a catalogue", "names no class; expected one of airplane, cat, dog, or a number from 0 to 2"),
        ("a cat and a dog", "names more than one class; expected one of"),
    ],
)
def test_another_prompt_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClassEncoder(NAMES, 3, CPU)([prompt], (16, 16))


def test_without_classes_every_prompt_will_do_and_without_names_numbers() -> None:
    assert ClassEncoder((), 0, CPU)(["anything", "3"], (16, 16)).labels.shape == (2, 0)
    assert ClassEncoder((), 3, CPU)(["2", ""], (16, 16)).labels.tolist() == [[0, 0, 1], [0, 0, 0]]
    with pytest.raises(UserError, match="names no class; expected a number from 0 to 2"):
        ClassEncoder((), 3, CPU)(["cat"], (16, 16))


def test_the_student_draws_in_one_step(student: Path) -> None:
    manifest = read_manifest(student)
    assert modes_of(manifest) == ["1"] and default_mode(manifest) == "1"
    denoiser = load_edm(student, "cpu")
    noise = seeded_noise([5, 6], (1, 3, 16, 16))[:, 0]
    with torch.inference_mode():
        x0 = denoiser(80 * noise, torch.tensor([80.0, 80.0]), one_hot(1, 2))
    found = Engine(student, "cpu").generate(["cat", "2"], [5, 6], "1")
    assert torch.equal(found, RgbCodec().decode(x0))
    assert found[0].float().std() > 5


def test_an_image_names_the_checksum_of_its_weights(student: Path, teacher: Path) -> None:
    for folder, mode in ((student, "1"), (teacher, "teacher")):
        assert Engine(folder, "cpu").sha256(mode) == sha256_file(folder / "model.safetensors")


def test_what_is_given_beside_a_class_is_refused(student: Path) -> None:
    engine = Engine(student, "cpu")
    edit = ImageConditioning(image=torch.zeros(3, 16, 16, dtype=torch.uint8), strength=0.5)
    with pytest.raises(UserError, match="image, control_image, lora_weights: these weights generate classes"):
        engine.generate(["cat"], [0], "1", edit=edit)
    with pytest.raises(UserError, match="these weights generate classes"):
        engine.model.control(student)


def test_fp16_is_bf16(student: Path) -> None:
    """In fp16 these networks overflow."""
    assert Engine(student, "cpu", torch.float16).dtype == torch.bfloat16


def test_the_teacher_draws_by_heun(teacher: Path) -> None:
    manifest = read_manifest(teacher)
    assert modes_of(manifest) == ["teacher"] and default_mode(manifest) == "teacher"
    denoiser = load_edm(teacher, "cpu")
    sigmas = teacher_sigmas(denoiser, 18)
    noise = seeded_noise([7], (1, 3, 16, 16))[:, 0]
    with torch.inference_mode():
        x0 = sample_heun(lambda x, sigma: denoiser(x, sigma, one_hot(0)), sigmas[0] * noise, sigmas)
    assert torch.equal(Engine(teacher, "cpu").generate(["an airplane"], [7], "teacher"), RgbCodec().decode(x0))


def test_the_teacher_s_sampler_may_add_noise_by_the_same_seeds(teacher: Path, student: Path) -> None:
    churn = Churn(40, 0.05, 50, 1.003)
    denoiser = load_edm(teacher, "cpu")
    sigmas = teacher_sigmas(denoiser, 18)
    noise = seeded_noise([7], (19, 3, 16, 16))
    with torch.inference_mode():
        one = one_hot(0)
        x0 = sample_heun(
            lambda x, s: denoiser(x, s, one), sigmas[0] * noise[:, 0], sigmas, noise[:, 1:].unbind(1), churn
        )
    engine = Engine(teacher, "cpu", churn=churn)
    assert torch.equal(engine.generate(["an airplane"], [7], "teacher"), RgbCodec().decode(x0))
    with pytest.raises(UserError, match="churn: only of an EDM teacher's sampler"):
        Engine(student, "cpu", modes=("1",), churn=churn)


def test_churn_is_checked_and_written_into_the_image(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--weights", teacher, "--seed", "7", "--out", tmp_path]
    assert run(monkeypatch, "generate", "cat", *options, "--churn", "40,0.05,50,1.003") == 0
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert image.info["churn"] == "40,0.05,50,1.003"
    capsys.readouterr()
    assert run(monkeypatch, "generate", "cat", *options, "--churn", "nan") == 2
    assert "--churn nan: expected S_churn" in capsys.readouterr().err


def test_class_models_refuse_another_size_than_their_own(student: Path) -> None:
    with pytest.raises(
        UserError, match="width, height: 32x16; these weights generate 16x16 pixels and no other size"
    ):
        Engine(student, "cpu").generate(["cat"], [0], "1", (32, 16))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["dmd2", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        dmd2.cli.main()
    return int(end.value.code or 0)


def test_generate_classes_writes_an_image_each_and_a_labelled_grid(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--weights", student, "--num-outputs", "4", "--seed", "3", "--out", out, "--json")
    assert run(monkeypatch, "generate", "--classes", "0,1-2", *options) == 0
    *lines, grid = capsys.readouterr().out.splitlines()
    metadata = [json.loads(line) for line in lines]
    assert [(f["prompt"], f["seed"], f["steps"]) for f in metadata] == [
        (str(c), 3 + i, "1") for c in range(3) for i in range(4)
    ]
    engine = Engine(student, "cpu")
    with Image.open(json.loads(grid)["grid"]) as image:
        assert image.height == 3 * 16
        row, column = 2, 3
        box = (image.width - 16, row * 16, image.width, (row + 1) * 16)
        shown = torch.tensor(list(image.crop(box).tobytes())).view(16, 16, 3).permute(2, 0, 1)
    assert torch.equal(shown, engine.generate(["dog"], [3 + column], "1")[0])
    assert len(list(out.iterdir())) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "0-x"], "--classes 0-x: expected numbers and ranges, such as 0,3-5"),
        (["--classes", "5-3"], "--classes 5-3: expected numbers and ranges"),
        (["--classes", "2-3"], "PROMPT: class 3; expected 0 to 2"),
        (["--classes", "0", "a cat"], "--classes: given beside PROMPT"),
        ([], "PROMPT: missing; expected what to generate, or --classes"),
        (["a horse"], "names no class"),
        (["cat", "--steps", "4"], "--steps 4: these weights have 1"),
        (["cat", "--size", "32x32"], "width, height: 32x32"),
    ],
)
def test_generate_refuses_what_a_class_model_cannot_do_in_one_line(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "generate", *arguments, "--weights", student, "--out", out) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("dmd2: ") and message in said.err and said.err.count("\n") == 1
    assert not out.exists()


def test_classes_are_nothing_to_a_text_to_image_model(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "generate", "--classes", "0-9", "--weights", weights) == 2
    assert "--classes 0-9:" in capsys.readouterr().err


def collected(service: ImageService, request: ImageRequest) -> list[OutputImage]:
    async def collect() -> list[OutputImage]:
        return [image async for image in service.generate(request)]

    return asyncio.run(collect())


def pixels(pixels: OutputImage) -> Tensor:
    assert pixels.path is not None
    with Image.open(pixels.path) as image:
        return torch.tensor(list(image.tobytes())).view(16, 16, 3).permute(2, 0, 1)


def test_one_service_for_either_family(student: Path, teacher: Path, tmp_path: Path) -> None:
    service = ImageService(student, "cpu", safety=tmp_path / "none", environ={})
    images = collected(service, ImageRequest(prompt="a photo of a cat", seed=5, num_outputs=2, output_format="png"))
    expected = Engine(student, "cpu").generate(["1", "1"], [5, 6], "1")
    for shown, image in zip(images, expected, strict=True):
        assert (pixels(shown).int() - image.int()).abs().max() <= 2
    with pytest.raises(UserError, match="names no class"):
        collected(service, ImageRequest(prompt="a horse"))
    service.close()
    with pytest.raises(UserError, match="hold no few-step student"):
        ImageService(teacher, "cpu", safety=tmp_path / "none", environ={})
