"""DMD2's LoRA on another SDXL checkpoint: the folder that comes of it draws what the two draw together."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from dmd2.inference.conditioning import ImageConditioning
from dmd2.inference.engine import Engine
from dmd2.models.adapters.lora import read_lora
from dmd2.models.family import open_family
from dmd2.models.stable_diffusion.configs import read_schedule
from dmd2.models.stable_diffusion.convert import convert_sdxl
from dmd2.models.stable_diffusion.folder import UNET_FILE
from dmd2.runtime.errors import UserError
from dmd2.runtime.loading import load_network
from dmd2.runtime.placement import count_parameters
from dmd2.weights.manifest import Teacher, read_manifest, verify
from tests.models.adapters.test_lora import ATTENTION, kohya_style, with_text
from tests.tiny_sdxl import SCHEDULE, build_sdxl_unet, build_vae, difference, save_sdxl

SIZE = (64, 64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text_models: tuple[Any, Any, Any]) -> Path:
    """Someone's SDXL, and beside it `dmd2.safetensors`. Not to be changed: copy it."""
    path = tmp_path_factory.mktemp("community") / "checkpoint"
    unet = build_sdxl_unet(0)
    save_sdxl(path, text_models, build_vae(), four=unet, one=unet)
    save_file(kohya_style(unet, "lora_unet", ATTENTION, 0), path.parent / "dmd2.safetensors")
    return path


def test_the_folder_draws_what_checkpoint_and_lora_draw_together(checkpoint: Path, tmp_path: Path) -> None:
    lora = checkpoint.parent / "dmd2.safetensors"
    manifest = convert_sdxl(checkpoint, lora, tmp_path / "made", 0.75)
    verify(tmp_path / "made", manifest)
    edit = ImageConditioning(loras=((read_lora(lora), 0.75),))
    expected = Engine(checkpoint, "cpu").generate(["an owl"], [3], "4", SIZE, edit)
    made = Engine(tmp_path / "made", "cpu", dtype=torch.float32)
    # The same numbers at other places in a file may go through other kernels: by alignment.
    assert difference(made.generate(["an owl"], [3], "4", SIZE), expected) <= 2
    assert made.manifest.students.keys() == {4}
    assert "no commercial use" in made.manifest.licence


def test_a_checkpoint_that_is_not_distilled_is_a_teacher(checkpoint: Path, tmp_path: Path) -> None:
    teacher = Teacher(subfolder="unet", steps=2, guidance_scale=8.0)
    convert_sdxl(checkpoint, None, tmp_path / "made", teacher=teacher)
    manifest = read_manifest(tmp_path / "made")
    assert manifest.students == {} and manifest.teacher == teacher
    family = open_family(tmp_path / "made", torch.device("cpu"), "fp32")
    assert family.guidance_scale == 8.0 and family.shape == (4, 128, 128)
    with pytest.raises(UserError, match=r"teacher: given beside the LoRA dmd2\.safetensors"):
        convert_sdxl(checkpoint, checkpoint.parent / "dmd2.safetensors", tmp_path / "other", teacher=teacher)


@pytest.mark.parametrize("of_base", [False, True])
def test_the_tiny_vae_goes_along(of_base: bool, checkpoint: Path, tiny_vae: Any, tmp_path: Path) -> None:
    """Recipes decode by it."""
    base = tmp_path / "base"
    source = checkpoint if of_base else Path(shutil.copytree(checkpoint, tmp_path / "source"))
    tiny_vae.save_pretrained((base if of_base else source) / "vae_tiny")
    teacher = Teacher(subfolder="unet", steps=2, guidance_scale=8.0)
    convert_sdxl(source, None, tmp_path / "made", base=base if of_base else None, teacher=teacher)
    verify(tmp_path / "made", read_manifest(tmp_path / "made"))
    images = open_family(tmp_path / "made", torch.device("cpu"), "fp32").rgb("tiny", False)(torch.zeros(1, 4, 8, 8))
    assert images.shape == (1, 3, 32, 32)  # an f4 one


def test_pefts_settings_go_along(checkpoint: Path, tmp_path: Path) -> None:
    """Else the student's LoRA would be half as strong as the file says."""
    file = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.conv_in.lora"
    save_file({f"{key}_A.weight": torch.ones(2, 4, 3, 3), f"{key}_B.weight": torch.ones(32, 2, 1, 1)}, file)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    convert_sdxl(checkpoint, file, tmp_path / "made")
    (factors,) = read_lora(tmp_path / "made" / "lora" / file.name).layers.values()
    assert factors.alpha == 4


def test_files_in_half_precision_and_another_vae_are_taken(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    halves = {key: value.half() for key, value in load_file(copy / "unet" / UNET_FILE).items()}
    save_file(halves, copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    build_vae(9).save_pretrained(tmp_path / "fixed")
    convert_sdxl(copy, checkpoint.parent / "dmd2.safetensors", tmp_path / "made", vae=tmp_path / "fixed")
    found = load_file(tmp_path / "made" / "unet" / UNET_FILE)
    assert all(torch.equal(found[key], value) for key, value in halves.items())
    fixed, vae = load_file(tmp_path / "fixed" / UNET_FILE), load_file(tmp_path / "made" / "vae" / UNET_FILE)
    assert all(torch.equal(vae[key], value) for key, value in fixed.items())
    Engine(tmp_path / "made", "cpu").generate(["an owl"], [0], "4", SIZE)


def test_a_lora_may_have_any_name(checkpoint: Path, tmp_path: Path) -> None:
    lora = tmp_path / "my\\ lora\n(4).safetensors"
    shutil.copy(checkpoint.parent / "dmd2.safetensors", lora)
    manifest = convert_sdxl(checkpoint, lora, tmp_path / "made")
    assert manifest.students[4].lora == "lora/my__lora__4_.safetensors"
    assert (tmp_path / "made" / manifest.students[4].lora).read_bytes() == lora.read_bytes()
    verify(tmp_path / "made", read_manifest(tmp_path / "made"))


def test_a_checkpoint_that_predicts_v_keeps_that_and_the_log_says_what_the_lora_is_for(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(
        copy / "scheduler"
    )
    with caplog.at_level(logging.WARNING):
        convert_sdxl(copy, checkpoint.parent / "dmd2.safetensors", tmp_path / "made")
    assert "DDIMScheduler is not used" in caplog.text and "predicts v; DMD2's LoRA was made for" in caplog.text
    schedule = read_schedule(tmp_path / "made" / "scheduler")
    assert schedule.prediction_type == "v_prediction" and schedule.zero_snr
    engine = Engine(tmp_path / "made", "cpu")
    engine.generate(["an owl"], [0], "4", SIZE)
    assert float(engine.model.denoisers["unet"].sigmas[-1]) > 1e6


@pytest.mark.parametrize("precision", ["", "fp16"])
def test_shards_are_taken_and_drawn_with(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    """As diffusers and transformers write them, with and without a variant's name."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")))
    for name, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        network = kind.from_pretrained(checkpoint / name)
        network.save_pretrained(copy / name, max_shard_size="500KB", variant=precision or None)
        assert len(list((copy / name).glob("*.safetensors"))) > 1
    for name in ("vae", "text_encoder_2"):
        for file in (checkpoint / name).glob("*.safetensors"):
            stem = file.name.removesuffix("safetensors")
            shutil.copy(file, copy / name / f"{stem}{precision + '.' if precision else ''}safetensors")
    convert_sdxl(copy, checkpoint.parent / "dmd2.safetensors", tmp_path / "made")
    convert_sdxl(checkpoint, checkpoint.parent / "dmd2.safetensors", tmp_path / "whole")
    sharded, whole = (Engine(tmp_path / name, "cpu", modes=("4",), dtype=torch.float32) for name in ("made", "whole"))
    assert difference(*(engine.generate(["an owl"], [3], "4", SIZE) for engine in (sharded, whole))) <= 2
    one, other = (engine.model.denoisers["unet"].unet.state_dict() for engine in (sharded, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert count_parameters(sharded.folder, ["unet"]) == count_parameters(whole.folder, ["unet"])
    for name in ("unet", "text_encoder"):  # the libraries read them, too
        assert list((tmp_path / "made" / name).glob("*.index.json"))
    UNet2DConditionModel.from_pretrained(tmp_path / "made" / "unet", use_safetensors=True)


@pytest.mark.parametrize(
    "content",
    ["[]", '{"weight_map": 7}', '{"weight_map": {}}', '{"weight_map": {"a": "../../etc/x.safetensors"}}',
     '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": "/x.safetensors"}}', '{"weight_map": {"a": "x.bin"}}',
     '{"weight_map": {"a": "gone.safetensors"}}', "[" * 100_000],
)  # fmt: skip
def test_a_broken_index_is_one_line(checkpoint: Path, tmp_path: Path, content: str) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "unet" / UNET_FILE).unlink()
    (copy / "unet" / f"{UNET_FILE}.index.json").write_text(content)
    with pytest.raises(UserError) as error:
        convert_sdxl(copy, checkpoint.parent / "dmd2.safetensors", tmp_path / "made")
    assert str(error.value).startswith(str(copy / "unet")) and str(error.value).isprintable()
    with pytest.raises(UserError) as error:
        load_network(UNet2DConditionModel, copy / "unet" / UNET_FILE, torch.device("cpu"), torch.float32)
    assert str(error.value).startswith(str(copy / "unet"))


def test_what_is_missing_or_does_not_fit_is_named_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path, text_models: tuple[Any, Any, Any]
) -> None:
    lora, out = checkpoint.parent / "dmd2.safetensors", tmp_path / "made"

    def refused(source: Path = checkpoint, file: Path = lora, scale: float = 1.0) -> str:
        with pytest.raises(UserError) as error:
            convert_sdxl(source, file, out, scale)
        assert not list(tmp_path.glob("*made*"))
        return str(error.value)

    for part in ("unet/config.json", f"unet/{UNET_FILE}", "vae/config.json", "text_encoder_2/model.safetensors"):
        copy = Path(shutil.copytree(checkpoint, tmp_path / part.replace("/", "-")))
        (copy / part).unlink()
        assert f"{copy / part}: missing; expected " in refused(copy)
    (copy / "text_encoder_2" / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "as safetensors; pytorch_model.bin is not read" in refused(copy)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "predicts-x0"))
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"sample"'))
    assert "prediction_type: sample; expected epsilon or v_prediction" in refused(copy)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "another-unet"))
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 8'))
    assert "8 input (InstructPix2Pix) and 4 output channels" in refused(copy)
    config.write_text(config.read_text().replace('"in_channels": 8', '"in_channels": 9'))
    assert "has conv_in.weight as 32x4x3x3 instead of 32x9x3x3" in refused(copy)  # before anything is copied
    copy = Path(shutil.copytree(checkpoint, tmp_path / "quantized"))
    state = load_file(copy / "unet" / UNET_FILE)
    save_file(state | {"conv_in.bias": state["conv_in.bias"].to(torch.int8)}, copy / "unet" / UNET_FILE)
    assert "conv_in.bias: integers; expected floats (quantized weights are not read)" in refused(copy)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "no-tokenizer"))
    shutil.rmtree(copy / "tokenizer")
    assert f"{copy / 'tokenizer'}: missing" in refused(copy)
    assert "nothing: cannot be read as safetensors" in refused(file=tmp_path / "nothing")
    assert "scale 3.0: expected more than 0, at most 2" in refused(scale=3.0)
    unet = build_sdxl_unet()
    save_file(with_text(unet, text_models, 1), tmp_path / "text.safetensors")
    assert "changes text encoders" in refused(file=tmp_path / "text.safetensors")
    pair = {"lora_unet_x.lora_down.weight": torch.zeros(4, 8), "lora_unet_x.lora_up.weight": torch.zeros(8, 4)}
    save_file(pair, tmp_path / "other.safetensors")
    assert "made for another model" in refused(file=tmp_path / "other.safetensors")
    out.mkdir()
    with pytest.raises(UserError, match="exists; expected a new folder"):
        convert_sdxl(checkpoint, lora, out)
