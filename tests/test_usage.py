"""How the library is used, from prompts to images to a student of one's own: start reading here.

    pytest tests/test_usage.py

The embedded emoji model is used throughout; SDXL's folders are used in the same way.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmd2.inference.engine import Engine
from dmd2.inference.inputs import InputImages
from dmd2.inference.request import ImageRequest
from dmd2.runtime.paths import ROOT
from dmd2.service.images import ImageService
from dmd2.training.loop import train
from dmd2.training.recipes import build_method, resolve
from dmd2.weights.manifest import read_manifest

EMOJI = ROOT / "weights" / "emoji"
SIZE = read_manifest(EMOJI).native_size  # width and height
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EMOJI, "cpu", modes=("4", "1"))


def pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) → Pillow's image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_generate(engine: Engine) -> None:
    images = engine.generate(["an owl", "a slice of pizza"], seeds=[0, 1], mode="4")  # in four steps
    assert images.shape == (2, 3, *SIZE[::-1]) and images.dtype == torch.uint8
    apple = engine.generate(["a red apple on a blue background"], seeds=[7], mode="1")[0]  # in one
    red, _, blue = apple[:, 2, 2].tolist()
    assert blue > red  # the corner shows the background that was asked for


def test_generate_from_an_image(engine: Engine, tmp_path: Path) -> None:
    lion = engine.generate(["a lion on a white background"], seeds=[7])[0]
    pil(lion).save(tmp_path / "lion.png")
    upper_half = numpy.zeros(SIZE[::-1], numpy.uint8)
    half = SIZE[1] // 2
    upper_half[:half] = 255
    Image.fromarray(upper_half).save(tmp_path / "mask.png")

    given = InputImages.read(tmp_path / "lion.png", tmp_path / "mask.png", 1.0, None, 1.0)
    painted = engine.generate(["a tiger on a white background"], seeds=[7], edit=given.edit(SIZE))[0]

    change = (painted.int() - lion.int()).abs().float().mean(dim=(0, 2))  # of each row
    assert change[:half].mean() > 4 * change[half:].mean()


def test_from_a_request_to_files(tmp_path: Path) -> None:
    """What a server does; `predict.py` is Cog's."""
    service = ImageService(EMOJI, "cpu", safety=tmp_path / "none", environ={})
    request = ImageRequest(prompt="a honeybee", num_outputs=2, num_inference_steps=1, seed=3, output_format="png")

    async def sizes() -> list[tuple[int, tuple[int, int]]]:
        found = []
        async for output in service.generate(request):  # each as soon as it is encoded
            assert output.path is not None  # the safety checker withheld nothing
            with Image.open(output.path) as image:  # the file is deleted within a minute
                found.append((output.seed, image.size))
        return found

    try:
        assert asyncio.run(sizes()) == [(3, SIZE), (4, SIZE)]
    finally:
        service.close()


def test_train_a_student_and_generate_with_it(weights: Path, emoji_zip: Path, tmp_path: Path) -> None:
    """A recipe of the project in small: three steps, on four emoji, with an untrained teacher."""
    recipe = resolve("emoji-dmd2-1step", ["iterations=3", "batch_size=2", "generator_every=1", "precision=fp32"])
    method = build_method(recipe, {"data": emoji_zip, "init": weights, "classifier": tmp_path / "none"}, CPU)
    assert train(method, recipe.loop, tmp_path / "run", recipe=dataclasses.asdict(recipe))
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 1

    student = Engine(tmp_path / "run" / "model", "cpu", modes=("1",))
    before = Engine(weights, "cpu", modes=("1",))
    after = student.generate(["an owl"], seeds=[0], mode="1")
    assert after.shape == (1, 3, 64, 64)
    assert not torch.equal(after, before.generate(["an owl"], seeds=[0], mode="1"))
