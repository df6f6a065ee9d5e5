"""Every recipe of SD 1.5 and SDXL on tiny networks, each going on from the one before where it says so."""

from __future__ import annotations

import io
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dmd2.data.pairs import make_pairs
from dmd2.models.family import open_family
from dmd2.models.stable_diffusion.folder import save_vae
from dmd2.runtime.errors import UserError
from dmd2.training.methods.dmd import DmdRecipe
from dmd2.training.preview import RowsPreview
from dmd2.training.recipes import RECIPES, resolve
from dmd2.training.recipes.stable_diffusion import STABLE_DIFFUSION_RECIPES
from dmd2.training.sources import Inputs, PromptSource
from dmd2.weights.manifest import read_manifest, write_manifest
from tests.training.pixels import write_teacher
from tests.training.test_product import CPU, PROMPTS, run, sd15

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
BEFORE = {"sd15-dmd2-gan": "sd15-dmd2", "sdxl-dmd2-1step": "sdxl-regression"}


class Features(nn.Module):
    """A stand-in for LPIPS' VGG16."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 3, 16, 16, generator=generator) / 1000)

    def forward(self, images: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        return F.conv2d(images, self.weight, stride=16).relu().flatten(1)


@pytest.fixture(scope="module")
def paths(
    tmp_path_factory: pytest.TempPathFactory, weights: Path, text_models: tuple[Any, Any, Any], tiny_vae: Any
) -> dict[str, dict[str, Path]]:
    """By family: what the command line names."""
    folder = tmp_path_factory.mktemp("stable-diffusion")
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "{prompt} {n}"}}\n' for n in range(3) for prompt in PROMPTS)
    )
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for n, colour in enumerate(("red", "green", "blue", "white")):
            data = io.BytesIO()
            Image.new("RGB", (80, 64), colour).save(data, "PNG")
            archive.writestr(f"{n}.png", data.getvalue())
            archive.writestr(f"{n}.txt", f"a {colour} image")
    torch.jit.script(Features()).save(folder / "vgg16.pt")
    found = {}
    sd_15 = sd15(folder / "sd15", text_models)
    save_vae(tiny_vae, sd_15 / "vae_tiny", {})
    write_manifest(sd_15, read_manifest(sd_15))
    for name, teacher in (("sd15", sd_15), ("sdxl", weights)):
        make_pairs(
            teacher, folder / f"pairs-{name}", 4, 3, 4, CPU, prompts=PROMPTS, solver="pndm", guidance_scale=3.0
        )
        found[name] = {
            "init": teacher,
            "prompts": folder / "prompts.jsonl",
            "data": folder / "images.zip",
            "pairs": folder / f"pairs-{name}",
            "lpips": folder / "vgg16.pt",
        }
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each recipe's run, for the one that goes on from it."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _small_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowsPreview, "grid", lambda self, generate: generate(self.cond[:1], [0])[0])


@pytest.mark.parametrize("name", list(STABLE_DIFFUSION_RECIPES))
def test_a_recipe_trains_exports_and_goes_on(name: str, paths: dict[str, dict[str, Path]], runs: Path) -> None:
    recipe: Any = resolve(name, ["batch_size=2", "warmup=0", "iterations=2", "grad_accum_steps=1", "precision=fp32"])
    recipe = replace(recipe, **({"rank": 4} if recipe.adapter == "lora" else {}))
    if isinstance(recipe, DmdRecipe):
        recipe = replace(recipe, pairs_batch=2)
    inputs: dict[str, Path | None] = {**paths[name.split("-")[0]]}
    if name in BEFORE:
        inputs["student"] = runs / BEFORE[name] / "model"
        if not (runs / BEFORE[name]).exists():  # of a test that was not selected
            test_a_recipe_trains_exports_and_goes_on(BEFORE[name], paths, runs)
    if not recipe.needs_images:
        inputs["data"] = None
    if not (runs / name).exists():
        run(recipe, Inputs(inputs, CPU), runs / name, 2)
    manifest = read_manifest(runs / name / "model")
    (student,) = manifest.students.values()
    assert tuple(student.timesteps) == recipe.timesteps and bool(student.lora) == (recipe.adapter == "lora")
    assert (runs / name / "fake_score" / "head.safetensors").is_file() == recipe.needs_images


def test_published_numbers() -> None:
    """Learning rates, batches, guidance, k and iterations as the papers have them."""
    table = {
        "sd15-dmd": (1e-5, 2304, 3.0, 20_000),
        "sd15-dmd2": (1e-5, 2048, 1.75, 39_000),
        "sd15-dmd2-gan": (5e-7, 2048, 1.75, 2_000),
        "sdxl-dmd2-1step": (5e-7, 128, 8.0, 24_000),
        "sdxl-dmd2-4step": (5e-7, 128, 8.0, 19_000),
        "sdxl-dmd2-4step-lora": (5e-5, 128, 8.0, 16_000),
    }
    for name, numbers in table.items():
        recipe: Any = RECIPES[name]
        found = recipe.lr, recipe.loop.batch_size, recipe.guidance_scale, recipe.loop.iterations
        assert found == numbers and recipe.lr_critic == recipe.lr, name
    gan: Any
    for name, gan in RECIPES.items():
        if name.startswith("sdxl-dmd2"):
            assert (gan.gan_generator, gan.gan_critic, gan.generator_every) == (5e-3, 1e-2, 5)
    for name in ("sdxl-dmd2-4step-lora", "sdxl-dmd2-4step-low-memory"):
        lora: Any = RECIPES[name]
        assert (lora.adapter, lora.rank, lora.alpha, lora.lr) == ("lora", 64, 8.0, 5e-5)
    assert RECIPES["sdxl-dmd2-4step-lora"].networks == "separate"  # type: ignore[attr-defined]


def test_prompts_and_images_are_a_function_of_the_step(paths: dict[str, dict[str, Path]]) -> None:
    family = open_family(paths["sdxl"]["init"], CPU, "fp32")
    source = PromptSource(Inputs(paths["sdxl"], CPU), family, True)
    first, again, other = (source.batch(4, seed=0, step=step, images=True, paired=False) for step in (3, 3, 4))
    assert first.labels == again.labels != other.labels and len(first.labels) == 4
    assert first.images is not None and again.images is not None and torch.equal(first.images, again.images)
    assert first.images.shape == (4, 3, 64, 64)
    colours = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    for caption, image in zip(first.image_labels, first.images, strict=True):
        assert tuple(image[:, 32, 32].tolist()) == colours[caption.split()[1]]  # a caption goes with its image
    epoch = [source.batch(2, seed=0, step=step, images=False, paired=False).labels for step in range(3)]
    assert len({label for labels in epoch for label in labels}) == 6  # each prompt once
    paired = source.batch(2, seed=0, step=0, images=True, paired=True)
    assert paired.labels == paired.image_labels
    alone = PromptSource(Inputs({**paths["sdxl"], "prompts": None}, CPU), family, True)
    assert all("image" in label for label in alone.batch(4, seed=0, step=0, images=False, paired=False).labels)


def test_what_a_text_means_does_not_depend_on_its_batch(paths: dict[str, dict[str, Path]]) -> None:
    for name in ("sdxl", "sd15"):
        family = open_family(paths[name]["init"], CPU, "fp32")
        long, short = "an owl " * 60, "an owl"
        both = family.condition([long, short])
        assert both.length == family.condition([short]).length
        assert torch.allclose(both[1:].context, family.condition([short]).context, atol=1e-5)
        assert torch.allclose(both[:1].context, family.condition([long]).context, atol=1e-5)


def test_what_is_missing_is_one_line(paths: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    given = paths["sdxl"]
    (tmp_path / "empty.txt").write_text("\n\n")
    edm = {"init": write_teacher(tmp_path / "edm"), "prompts": given["prompts"]}
    for name, inputs, words in (
        (
            "sdxl-dmd2-4step",
            given | {"data": None},
            "data: missing; this recipe learns from real images with captions",
        ),
        ("sd15-dmd2", {"init": given["init"]}, "prompts: missing; expected a file of prompts"),
        ("sd15-dmd2", given | {"prompts": tmp_path / "empty.txt"}, "empty.txt"),
        ("sd15-dmd2", edm, "takes classes"),
        ("sdxl-dmd2-1step", given, "student: missing"),
        ("sdxl-regression", given | {"pairs": None}, "pairs: missing"),
    ):
        with pytest.raises(UserError, match=words) as error:
            RECIPES[name].method(Inputs(inputs, CPU))
        assert "\n" not in str(error.value)
    bare = Path(shutil.copytree(paths["sd15"]["init"], tmp_path / "bare", ignore=shutil.ignore_patterns("vae_tiny")))
    make_pairs(bare, tmp_path / "pairs", 2, 2, 2, CPU, prompts=PROMPTS)
    with pytest.raises(UserError, match="has no vae_tiny"):
        RECIPES["sd15-dmd"].method(Inputs({**paths["sd15"], "init": bare, "pairs": tmp_path / "pairs"}, CPU))
