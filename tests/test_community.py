"""DMD2's LoRA on another SDXL checkpoint: the folder that comes of it draws what the two draw together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd2.community import convert_sdxl
from dmd2.edit import Edit
from dmd2.engine import Engine
from dmd2.errors import UserError
from dmd2.lora import read_lora
from dmd2.weights import UNET_FILE, verify
from tests.test_lora import ATTENTION, kohya_style, with_text
from tests.tiny_sdxl import build_sdxl_unet, build_vae, save_sdxl

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
    edit = Edit(loras=((read_lora(lora), 0.75),))
    expected = Engine(checkpoint, "cpu").draw(["an owl"], [3], "4", SIZE, edit)
    made = Engine(tmp_path / "made", "cpu", dtype=torch.float32)
    assert torch.equal(made.draw(["an owl"], [3], "4", SIZE), expected)
    assert made.manifest.students.keys() == {4}
    assert "no commercial use" in made.manifest.licence


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
    Engine(tmp_path / "made", "cpu").draw(["an owl"], [0], "4", SIZE)


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
        assert f"{copy / part}: missing; expected an SDXL checkpoint in diffusers' layout" in refused(copy)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "predicts-v"))
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    assert "predicts v_prediction; expected epsilon" in refused(copy)
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
