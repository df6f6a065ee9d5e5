"""Every method on every family: three steps, a resume to the bit, and a folder that `dmd2 generate` draws with.

The last part holds the interfaces: a family and a method that are here alone need nothing changed elsewhere.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.cli import main
from dmd2.data.pairs import make_pairs, make_pairs_of
from dmd2.diffusion.noise import per_image, sample_sigma, sd_sigmas
from dmd2.diffusion.sampling import conditioned, sample_dpm_solver_2m, teacher_sigmas
from dmd2.models.family import Family, open_family
from dmd2.models.stable_diffusion.folder import save_pipeline_configs
from dmd2.runtime.errors import UserError
from dmd2.training.distil import Distillation, wire
from dmd2.training.loop import Batch, LoopSettings, Phase, train
from dmd2.training.losses import denoising
from dmd2.training.methods.common import Kit, Recipe, generate
from dmd2.training.methods.denoising import DenoisingRecipe, train_teacher
from dmd2.training.methods.dmd import DmdRecipe
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.methods.gdd import GddRecipe
from dmd2.training.methods.matching.decoupled import DecoupledRecipe
from dmd2.training.methods.matching.f_distill import FDistillRecipe
from dmd2.training.methods.matching.sid import SidRecipe
from dmd2.training.preview import CaptionPreview
from dmd2.training.recipes import RECIPES, resolve
from dmd2.training.sources import Examples, Inputs
from dmd2.weights.manifest import Manifest, Teacher, read_manifest, write_manifest
from tests.tiny_sdxl import build_vae, frozen
from tests.training.pixels import CONFIG, write_set, write_teacher

CPU = torch.device("cpu")
LOOP = LoopSettings(iterations=3, batch_size=4, decay=False, sample_every=100, log_every=1)
GAN: Any = {"gan_generator": 0.1, "gan_critic": 0.1}
METHODS: dict[str, Recipe] = {
    "denoising": DenoisingRecipe(LOOP, lr=1e-3, sample_steps=2),
    "dmd": DmdRecipe(LOOP, lr=1e-3, lr_critic=1e-3, regression_weight=0.25, pairs_batch=2),
    "dmd2": Dmd2Recipe(LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2),
    "dmd2-gan": Dmd2Recipe(LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2, **GAN),
    "dmd2-teacher-head": Dmd2Recipe(
        LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2, **GAN, gan_features="teacher", r1=1.0
    ),
    "f-distill": FDistillRecipe(LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2, **GAN),
    "decoupled-dmd": DecoupledRecipe(LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2, guidance_scale=2.0),
    "sid": SidRecipe(LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2),
    "sida": SidRecipe(LOOP, lr=1e-3, lr_critic=1e-3, generator_every=2, **GAN),
    "gdd": GddRecipe(LOOP, lr=1e-3, lr_critic=1e-3, freeze=False, r1_every=2, boundary=0),
    "gdd-i": GddRecipe(LOOP, lr=1e-3, lr_critic=1e-3, freeze=True, r1_every=2, boundary=0),
}
PROMPTS = ["an owl", "a red apple on a blue background"]


@dataclass(frozen=True)
class Case:
    """A family's teacher and data."""

    inputs: Inputs
    of_family: Mapping[str, Any]
    """what its recipes say"""
    prompt: str

    def family(self) -> Family:
        return open_family(self.inputs.need("init"), CPU, "fp32")


def sd15(folder: Path, text_models: tuple[Any, Any, Any]) -> Path:
    """An untrained teacher with one text encoder, of images of 32×32 pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    tokenizer, encoder, _ = text_models
    parts = {"unet": frozen(unet), "text_encoder": encoder, "tokenizer": tokenizer, "vae": build_vae()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    save_pipeline_configs(folder, "epsilon", family="sd15")
    teacher = Teacher(subfolder="unet", steps=2, guidance_scale=2.0)
    write_manifest(
        folder, Manifest(name="tiny", family="sd15", native_size=(64, 64), licence="none", teacher=teacher)
    )
    return folder


FAMILIES = ("sdxl", "sd15", "edm", "edm-unconditional")
BASIC = ("denoising", "dmd", "dmd2", "dmd2-gan", "gdd", "gdd-i")


def quick(family: str, method: str) -> bool:
    """What builds on DMD2 has much in common with it: on most families it is left to the slow tests."""
    return method in BASIC or family == "edm" or (family, method) == ("sdxl", "sida")


PRODUCT = [
    pytest.param(family, method, marks=[] if quick(family, method) else pytest.mark.slow)
    for family in FAMILIES
    for method in METHODS
]


@pytest.fixture(scope="module", params=FAMILIES)
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    weights: Path,
    emoji_zip: Path,
    text_models: tuple[Any, Any, Any],
) -> Case:
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    if name.startswith("edm"):
        config = CONFIG if name == "edm" else CONFIG.model_copy(update={"classes": 0})
        teacher, data = write_teacher(folder / "teacher", config), write_set(folder / "set.zip")
        make_pairs(teacher, folder / "pairs", 4, 2, 4, CPU)
        paths = {"init": teacher, "data": data, "pairs": folder / "pairs"}
        return Case(Inputs(paths, CPU), {"data": "images"}, "1" if config.classes else "")
    teacher = weights if name == "sdxl" else sd15(folder / "teacher", text_models)
    make_pairs(teacher, folder / "pairs", 4, 2, 4, CPU, prompts=PROMPTS)
    paths = {"init": teacher, "data": emoji_zip, "pairs": folder / "pairs", "classifier": folder / "none"}
    return Case(Inputs(paths, CPU), {"data": "emoji", "sigmas": (), "timesteps": (999,)}, PROMPTS[0])


def run(recipe: Any, inputs: Inputs, out: Path, iterations: int, resume: bool = False) -> None:
    recipe = replace(recipe, loop=replace(recipe.loop, iterations=iterations))
    assert train(recipe.method(inputs), recipe.loop, out, resume=resume, recipe=asdict(recipe))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.relative_to(folder)} {name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("case", "method"), PRODUCT, indirect=["case"])
def test_trains_resumes_to_the_bit_and_exports_what_generates(
    method: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {k: v for k, v in case.of_family.items() if k in METHODS[method].__dataclass_fields__}
    recipe: Any = replace(METHODS[method], precision="fp32", **fields)  # type: ignore[type-var]
    assert recipe.conflict() is None
    monkeypatch.setattr(CaptionPreview, "grid", lambda self, generate: generate(self.captions[:2], [0, 1])[0])
    run(recipe, case.inputs, tmp_path / "whole", 3)
    run(recipe, case.inputs, tmp_path / "parts", 2)
    half = tensors(tmp_path / "parts" / "model")
    run(recipe, case.inputs, tmp_path / "parts", 3, resume=True)
    whole, parts = (tensors(tmp_path / name / "model") for name in ("whole", "parts"))
    assert equal(whole, parts) and not equal(whole, half)

    steps = "teacher" if method == "denoising" else "1"
    words = ["generate", case.prompt or "0", "--weights", tmp_path / "whole" / "model", "--steps", steps]
    if not case.prompt:
        words[1:2] = ["anything"]
    words += ["--seed", 0, "--out", tmp_path / "images", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["dmd2", *map(str, words)])
    with pytest.raises(SystemExit, match="0"):
        main()
    (path,) = (tmp_path / "images").glob("*.png")
    with Image.open(path) as image:
        assert image.size in ((64, 64), (8, 8))


def test_a_student_goes_on_with_its_fake_score_in_either_family(case: Case, tmp_path: Path) -> None:
    fields = {**case.of_family, "precision": "fp32"}
    run(replace(METHODS["dmd2"], **fields), case.inputs, tmp_path / "first", 1)  # type: ignore[type-var]
    paths = {**case.inputs.paths, "student": tmp_path / "first" / "model"}
    resumed: Any = replace(METHODS["dmd2-gan"], resumed=True, **fields)  # type: ignore[type-var]
    made = resumed.method(Inputs(paths, CPU))
    critic = next(phase.module for phase in made.phases if phase.name == "critic")
    assert isinstance(critic, nn.ModuleDict)
    (fake,) = (load_file(path) for path in (tmp_path / "first" / "fake_score").glob("*.safetensors"))
    assert equal(dict(critic["network"].state_dict()), fake)
    teacher = case.family().fake_score(None).state_dict()
    assert not equal(fake, teacher) and made.ema_model is not None


def test_a_student_never_takes_its_teacher_s_place(tmp_path: Path, text_models: Any, emoji_zip: Path) -> None:
    """SD 1.5's teacher lies in `unet`, where four-step students of the emoji's go."""
    teacher = sd15(tmp_path / "teacher", text_models)
    inputs = Inputs({"init": teacher, "data": emoji_zip, "classifier": tmp_path / "none"}, CPU)
    fields: Any = {"data": "emoji", "sigmas": (), "timesteps": (999, 749, 499, 249), "precision": "fp32"}
    run(replace(METHODS["dmd2"], **fields), inputs, tmp_path / "run", 1)  # type: ignore[type-var]
    manifest, model = read_manifest(tmp_path / "run" / "model"), tmp_path / "run" / "model"
    assert manifest.teacher is not None and manifest.students[4].subfolder not in ("unet", manifest.teacher.subfolder)
    name = "diffusion_pytorch_model.safetensors"
    before, kept = load_file(teacher / "unet" / name), load_file(model / "unet" / name)
    assert all(torch.allclose(kept[key].float(), value, atol=1e-2) for key, value in before.items())

    # As the teacher is sampled, unless the recipe says otherwise.
    denoised: Any = replace(METHODS["denoising"], data="emoji", sample_steps=None, precision="fp32")  # type: ignore[type-var]
    run(denoised, inputs, tmp_path / "denoised", 1)
    again = read_manifest(tmp_path / "denoised" / "model").teacher
    assert again is not None and (again.subfolder, again.steps, again.guidance_scale) == ("unet", 2, 2.0)


def test_what_does_not_fit_the_teacher_is_one_line(weights: Path, emoji_zip: Path, tmp_path: Path) -> None:
    paths = {"init": weights, "data": emoji_zip, "classifier": tmp_path / "none"}
    texts: Any = {"data": "emoji", "sigmas": (), "timesteps": (999,)}
    edm = {"init": write_teacher(tmp_path / "edm")}
    for given, fields, words in (
        (paths, texts | {"data": "images"}, "set data=images: .* takes captions"),
        (edm, {"data": "emoji"}, "set data=emoji: .* takes classes"),
        (paths, {"data": "emoji"}, "sigmas: expected"),
        (edm, texts | {"data": "images"}, "timesteps: expected"),
    ):
        with pytest.raises(UserError, match=words):
            replace(METHODS["dmd2"], **fields).method(Inputs(given, CPU))  # type: ignore[type-var]
    damaged = Path(shutil.copytree(weights, tmp_path / "damaged"))
    file = damaged / "unet_1step" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="sha256"):
        recipe: Any = replace(METHODS["dmd2"], **texts, student_init="unet_1step")  # type: ignore[type-var]
        recipe.method(Inputs(paths | {"init": damaged}, CPU))


# A family that is here alone: points of the plane, sixteen to an image


class PointNet(nn.Module):
    """A denoiser of points (B, 2, 4, 4), each by itself, as x0(x, σ)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv_in, self.conv1, self.out = (
            nn.Conv2d(3, width, 1),
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, 2, 1),
        )
        self.sigmas = sd_sigmas().float()

    def features(self, x: Tensor, sigma: Tensor, cond: Points) -> tuple[Tensor, Tensor]:
        level = per_image(sigma, x)
        place = torch.cat([x / (1 + level**2).sqrt(), level.log().expand(-1, 1, 4, 4)], dim=1)
        hidden = nn.functional.silu(self.conv1(nn.functional.silu(self.conv_in(place))))
        return x / (1 + level**2) + level / (1 + level**2).sqrt() * self.out(hidden), hidden

    def forward(self, x: Tensor, sigma: Tensor, cond: Points) -> Tensor:
        return self.features(x, sigma, cond)[0]

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise * (1 + per_image(sigma, noise) ** 2).sqrt()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2) / sigma**2


@dataclass(frozen=True)
class Points:
    """A condition that says nothing, for n images."""

    n: int

    def __len__(self) -> int:
        return self.n

    def cat(self, other: Points) -> Points:
        return Points(self.n + other.n)


class PointCodec:
    def encode(self, images: Tensor) -> Tensor:
        return images[:, :2].float() / 64 - 2

    def decode(self, x: Tensor) -> Tensor:
        pixels = (64 * (x + 2)).round().clamp(0, 255).byte()
        return torch.cat([pixels, torch.zeros_like(pixels[:, :1])], dim=1)


class PointFamily:
    """A ring of eight Gaussians, and a network that has not learned it yet."""

    name = origin = "a ring"
    licence, sha256, class_names, classes, takes_classes = "none", "0" * 64, (), 0, True
    shape, bottleneck, sample_steps, guidance_scale = (2, 4, 4), (64, 4), 4, 1.0
    codec = PointCodec()
    frozen_in_gdd_i = re.compile(r"^conv1\.")

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.teacher = self.teacher_network = PointNet().requires_grad_(False)

    def student(self, levels: Sequence[float], **options: Any) -> PointNet:
        return self.fake_score(None)

    def fake_score(self, start: Path | None) -> PointNet:
        network = PointNet()
        network.load_state_dict(self.teacher.state_dict())
        return network

    def trainable(self) -> PointNet:
        return self.teacher.requires_grad_(True)

    def denoiser(self, network: PointNet, compile: bool = False) -> PointNet:
        return network

    def sigmas(self, timesteps: Sequence[int], sigmas: Sequence[float]) -> tuple[float, ...]:
        return tuple(sigmas)

    def condition(self, labels: Any, network: Any = None) -> Points:
        return Points(len(labels))

    def unconditional(self, cond: Points) -> Points:
        return cond

    def any_labels(self, n: int) -> Tensor:
        return torch.full((n,), -1)

    gathered = None

    def blocks(self, network: PointNet) -> list[nn.Module]:
        return [network.conv1]

    def encoder_levels(self) -> list[nn.Module]:
        return [self.teacher.conv1]

    def to_rgb(self, x0: Tensor) -> Tensor:
        return torch.cat([x0, x0[:, :1]], dim=1)

    def sample_sigma(self, n: int, generator: torch.Generator) -> Tensor:
        return sample_sigma(self.teacher.sigmas, n, generator)

    def sample(self, denoiser: Any, cond: Points, noise: Tensor, steps: int, guidance_scale: float) -> Tensor:
        sigmas = teacher_sigmas(denoiser, steps)
        start = denoiser.scale_initial_noise(noise, torch.full((len(noise),), sigmas[0]))
        return sample_dpm_solver_2m(conditioned(denoiser, cond), start, sigmas)

    def _save(self, out: Path, network: PointNet, *rest: Any) -> None:
        out.mkdir(parents=True)
        torch.save(network.state_dict(), out / "network.pt")

    save_student = save_fake_score = save_teacher = _save


class Ring:
    """A source of such images, and what a run shows of its own."""

    defaults: ClassVar[Mapping[str, Path]] = {}
    scores = False

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def batch(self, n: int, *, seed: int, step: int, images: bool, paired: bool) -> Examples:
        return self.lesson(n, seed=seed, step=step, freedom=1.0) if images else Examples(torch.full((n,), -1))

    def lesson(self, n: int, *, seed: int, step: int, freedom: float) -> Examples:
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        angles = torch.randint(8, (n, 4, 4), generator=generator) * (math.pi / 4)
        points = torch.stack([angles.cos(), angles.sin()], dim=1)
        return Examples(torch.full((n,), -1), PointCodec().decode(points), torch.full((n,), -1))

    def preview(self) -> Ring:
        return self

    def grid(self, generate: Callable[[Any, list[int]], Tensor]) -> Tensor:
        self.shown.append(generate(torch.full((2,), -1), [0, 1]))
        return self.shown[-1][0]

    def score(self, generate: Callable[[Any, list[int]], Tensor]) -> dict[str, float]:
        raise NotImplementedError


@pytest.mark.parametrize("method", list(METHODS))
def test_a_family_of_one_file_takes_every_method(method: str, tmp_path: Path) -> None:
    family, source = PointFamily(), Ring()
    make_pairs_of(family, tmp_path / "pairs", 4, 2, 4)
    inputs = Inputs({"pairs": tmp_path / "pairs"}, CPU)
    of_family = {"sigmas": (14.0,)} if method != "denoising" else {}
    recipe: Any = replace(METHODS[method], precision="fp32", **of_family)  # type: ignore[type-var]
    build = train_teacher if method == "denoising" else wire
    made = build(recipe, family, source, inputs)
    before = {name: value.clone() for name, value in made.ema_model.state_dict().items()}  # type: ignore[union-attr]
    assert train(made, recipe.loop, tmp_path / "run", recipe=asdict(recipe))
    after = torch.load(tmp_path / "run" / "model" / "network.pt")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == before.keys() - ({"conv1.weight", "conv1.bias"} if method == "gdd-i" else set())
    assert source.shown[0].shape == (2, 3, 4, 4)


# A method that is here alone


@dataclass(frozen=True)
class ScoreDistillation(Distillation):
    """Score distillation (Poole et al. 2022, eq. 3): the student follows the teacher's denoising alone."""

    kind = "sds"

    def phases(self, kit: Kit) -> list[Phase]:
        def loss(batch: Batch) -> tuple[Tensor, dict[str, Any]]:
            x = generate(kit.networks.student, batch.data, kit.sigmas, batch.generator)
            sigma = sample_sigma(kit.family.teacher.sigmas, len(x), batch.generator, 0.02, 0.98)
            noise = torch.randn(x.shape, generator=batch.generator)
            return denoising(kit.family.teacher, x, sigma, noise, batch.data.cond)[0], {}

        return [Phase("generator", 1, kit.student, torch.optim.Adam(kit.student.parameters(), self.lr), loss)]


def test_a_method_of_one_file_and_one_recipe_is_trained_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "toy-sds", ScoreDistillation(LOOP, 1e-3))
    assert resolve("toy-sds", ["lr=0.01", "iterations=2"]).loop.iterations == 2
    teacher, model = write_teacher(tmp_path / "teacher"), tmp_path / "run" / "model"
    for words in (
        ["recipes"],
        ["recipes", "toy-sds"],
        ["train", "toy-sds", "--init", teacher, "--out", tmp_path / "run", "--device", "cpu"],
        ["generate", "1", "--weights", model, "--out", tmp_path / "images", "--device", "cpu"],
    ):
        monkeypatch.setattr(sys, "argv", ["dmd2", *map(str, words)])
        with pytest.raises(SystemExit, match="0"):
            main()
    assert not equal(tensors(teacher), tensors(model)) and list((tmp_path / "images").glob("*.png"))
