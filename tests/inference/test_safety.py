"""The safety checker, with a tiny untrained CLIP: the same flags as from diffusers' own, whatever the batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig

from dmd2.inference.safety import SafetyChecker, may_be_disabled
from dmd2.runtime.compiled import Compiler
from dmd2.runtime.errors import UserError
from dmd2.weights.manifest import Manifest, write_manifest

SIDE = 32
WEIGHTS = "model.safetensors"
# As CompVis publishes it, but for the side: an old form, with bare numbers for sizes.
PREPROCESSOR = {
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIDE,
}


def samples(count: int, height: int = 48, width: int = 40) -> Tensor:
    """Coloured blotches, uint8 (count, 3, height, width)."""
    coarse = torch.rand((count, 3, 4, 3), generator=torch.Generator().manual_seed(3))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1).mul(255).byte()


@pytest.fixture(scope="module")
def untrained() -> Any:
    torch.manual_seed(2)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = text | {"num_hidden_layers": 2, "image_size": SIDE, "patch_size": 8, "intermediate_size": 32}
    model = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    # An untrained CLIP maps all images to nearly one place: spread them.
    for parameter in (*model.vision_model.encoder.parameters(), model.visual_projection.weight):
        parameter.data.mul_(10)
    for embeds in (model.concept_embeds, model.special_care_embeds):
        embeds.data.normal_()
    return model.eval().requires_grad_(False)


def cosines(model: Any, images: Tensor, concepts: Tensor) -> Tensor:
    pixels = torch.stack([reference_pixels(image) for image in images])
    embeds = model.visual_projection(model.vision_model(pixels).pooler_output)
    return F.normalize(embeds) @ F.normalize(concepts).T


def reference_pixels(image: Tensor) -> Tensor:
    """CLIP's preprocessing in Pillow and NumPy: fp32 (3, SIDE, SIDE)."""
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    short = min(pixels.size)
    width, height = (int(SIDE * side / short) for side in pixels.size)
    pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    array = np.asarray(pixels.crop((left, top, left + SIDE, top + SIDE))) / 255
    array = (array - np.array(PREPROCESSOR["image_mean"])) / np.array(PREPROCESSOR["image_std"])
    return torch.from_numpy(array).permute(2, 0, 1).float()


@pytest.fixture
def folder(untrained: Any, tmp_path: Path) -> Path:
    """A checker whose thresholds flag about half of `samples(12)`, some of them by special care alone."""
    images = samples(12)
    concepts = cosines(untrained, images, untrained.concept_embeds)
    special = cosines(untrained, images, untrained.special_care_embeds)
    untrained.concept_embeds_weights.data.fill_(2)  # no cosine is above 1
    untrained.special_care_embeds_weights.data.fill_(2)
    # Concept 0 flags four images. The fifth is just below it: only the adjustment brings it over.
    order = concepts[:, 0].argsort(descending=True)
    untrained.concept_embeds_weights.data[0] = concepts[order[4], 0] + 0.005
    assert concepts[order[3], 0] > concepts[order[4], 0] + 0.006
    untrained.special_care_embeds_weights.data[1] = special[order[4], 1] - 0.01
    untrained.save_pretrained(tmp_path / "safety")
    return tmp_path / "safety"


def theirs(model: Any, images: Tensor) -> list[bool]:
    pixels = torch.stack([reference_pixels(image) for image in images])
    flags: list[bool] = model(pixels, [np.zeros(1) for _ in images])[1]
    return flags


# Flags


def test_flags_are_those_of_diffusers(folder: Path, untrained: Any) -> None:
    images = samples(12)
    before = images.clone()
    flags = SafetyChecker.load(folder, "cpu", torch.float32)(images)
    assert flags == theirs(untrained, images)
    assert 5 <= sum(flags) <= 7 and all(type(flag) is bool for flag in flags)
    assert torch.equal(images, before)  # nothing is blackened


def test_special_care_makes_the_checker_stricter(folder: Path, untrained: Any) -> None:
    images = samples(12)
    flags = SafetyChecker.load(folder)(images)
    weights = load_file(folder / WEIGHTS)
    weights["special_care_embeds_weights"].fill_(2)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    untrained.special_care_embeds_weights.data.fill_(2)
    laxer = SafetyChecker.load(folder)(images)
    assert laxer == theirs(untrained, images)
    assert sum(laxer) == 4 and sum(flags) > 4 and all(flag for flag, lax in zip(flags, laxer, strict=True) if lax)


def test_flags_do_not_depend_on_the_batch(folder: Path) -> None:
    checker, images = SafetyChecker.load(folder), samples(12)
    together = checker(images)
    assert [checker(image[None])[0] for image in images] == together
    assert checker(images.flip(0)) == together[::-1]
    assert len(set(together)) == 2
    assert checker(images[:0]) == []


def test_what_is_not_a_number_is_flagged(folder: Path) -> None:
    checker = SafetyChecker.load(folder)
    checker.model.visual_projection.weight.fill_(float("nan"))
    assert checker(samples(2)) == [True, True]


def test_gradients_are_not_recorded_and_thresholds_stay_precise(folder: Path) -> None:
    checker = SafetyChecker.load(folder, "cpu", torch.bfloat16)
    seen = []
    checker.model.visual_projection.register_forward_hook(lambda module, args, out: seen.append(out))
    assert len(checker(samples(3))) == 3
    assert seen[0].is_inference() and seen[0].dtype == torch.bfloat16
    assert not checker.model.training and not any(p.requires_grad for p in checker.model.parameters())
    saved = load_file(folder / WEIGHTS)
    for name in ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights"):
        assert torch.equal(checker.model.state_dict()[name], saved[name])


# Preprocessing


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize(("height", "width"), [(48, 40), (33, 100), (100, 33), (SIDE, SIDE), (8, 20), (256, 256)])
def test_preprocessing_is_that_of_clip(folder: Path, with_file: bool, height: int, width: int) -> None:
    if with_file:
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    checker, images, seen = SafetyChecker.load(folder), samples(2, height, width), []
    checker.model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    checker(images)
    # Pillow computes in integers: here and there a value is one or two of 255 apart.
    steps = (seen[0] - torch.stack([reference_pixels(image) for image in images])).abs() * 255 * checker.std
    assert float(steps.max()) < 2.01 and float((steps > 0.01).float().mean()) < 0.05


def test_images_are_shrunk_where_they_are(folder: Path) -> None:
    checker = SafetyChecker.load(folder)
    statistics = checker.mean.to("meta"), checker.std.to("meta")
    there = replace(checker, mean=statistics[0], std=statistics[1])
    assert there.preprocess(torch.empty(2, 3, 96, 64, dtype=torch.uint8, device="meta")).shape == (2, 3, SIDE, SIDE)


def test_the_network_is_prepared_for_every_size_of_image(folder: Path) -> None:
    compiler = Compiler(torch.device("cpu"))
    checker = SafetyChecker.load(folder, compiler=compiler)
    checker.warm_up(4)
    for count, side in ((1, 64), (2, 32), (4, 48), (7, 96)):
        assert len(checker(samples(count, side, side))) == count
    assert compiler.unprepared == compiler.failures == 0
    assert checker(samples(12)) == SafetyChecker.load(folder)(samples(12))


# Files


def test_the_names_of_tensors_that_compvis_published_are_understood(folder: Path) -> None:
    expected = SafetyChecker.load(folder)(samples(12))
    weights = load_file(folder / WEIGHTS)
    old = {name.replace("vision_model.", "vision_model.vision_model.", 1): value for name, value in weights.items()}
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    assert len(old.keys() & weights.keys()) == 5  # the concepts and the projection
    save_file(old, folder / WEIGHTS, metadata={"format": "pt"})
    checker = SafetyChecker.load(folder)
    assert all(torch.equal(checker.model.state_dict()[name], value) for name, value in weights.items())
    assert checker(samples(12)) == expected


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match="missing; expected CompVis's safety checker") as error:
        SafetyChecker.load(folder)
    assert str(error.value).startswith(f"{folder / name}: ")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", WEIGHTS])
@pytest.mark.parametrize("content", [b"", b'{"vision_config": ', b"[]", b"x" * 5000])
def test_damaged_files_are_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        SafetyChecker.load(folder)
    assert str(error.value).startswith(f"{folder / name}: ") and "\n" not in str(error.value)


def test_truncated_weights_are_named(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        SafetyChecker.load(folder)


def test_weights_that_lack_a_tensor_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["concept_embeds"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors: holds no concept_embeds"):
        SafetyChecker.load(folder)


def test_tensors_of_another_shape_are_refused(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["visual_projection.weight"] = torch.zeros(3, 16)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        SafetyChecker.load(folder)


def test_files_are_verified_where_there_are_checksums(folder: Path) -> None:
    write_manifest(folder, Manifest(name="safety", family="safety", native_size=(SIDE, SIDE), licence="MIT"))
    SafetyChecker.load(folder)
    weights = load_file(folder / WEIGHTS)
    weights["concept_embeds_weights"].fill_(2)  # a checker that flags nothing
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors: sha256"):
        SafetyChecker.load(folder)


def test_only_safetensors_are_read(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        SafetyChecker.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"config\.json: missing"):
        SafetyChecker.load(folder)


# The operator's switch


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        (" yes ", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("", False),
    ],
)
def test_dmd2_allow_unsafe_is_a_yes_or_a_no(value: str, expected: bool) -> None:
    assert may_be_disabled({"DMD2_ALLOW_UNSAFE": value}) is expected


def test_switch_is_off_by_default() -> None:
    assert may_be_disabled({}) is False


@pytest.mark.parametrize("value", ["on", "2", "maybe"])
def test_switch_with_another_value_is_an_error(value: str) -> None:
    with pytest.raises(UserError, match=f"DMD2_ALLOW_UNSAFE={value}: expected"):
        may_be_disabled({"DMD2_ALLOW_UNSAFE": value})
