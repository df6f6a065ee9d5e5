"""Networks built without memory and filled from files: to the bit what the libraries load, or an error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dmd2.models.stable_diffusion.folder import UNET_FILE
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import sha256_file
from dmd2.runtime.loading import load_network, parameters_in
from dmd2.weights.checksums import verifying

CPU = torch.device("cpu")
MODEL = "model.safetensors"
KINDS: tuple[tuple[Any, str, str], ...] = (
    (UNet2DConditionModel, "unet", UNET_FILE),
    (AutoencoderTiny, "vae", UNET_FILE),
    (CLIPTextModel, "text_encoder", MODEL),
    (CLIPTextModelWithProjection, "text_encoder_2", MODEL),
)


def everything(network: Any) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


@pytest.fixture
def copy(weights: Path, tmp_path: Path) -> Path:
    """Weights that a test may change."""
    return Path(shutil.copytree(weights, tmp_path / "copy"))


def changed(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "name", "file"), KINDS)
def test_networks_are_the_ones_that_the_libraries_load(
    weights: Path, kind: Any, name: str, file: str, dtype: torch.dtype
) -> None:
    option = "torch_dtype" if name in ("unet", "vae") else "dtype"
    expected = kind.from_pretrained(weights / name, local_files_only=True, **{option: dtype})
    theirs = everything(expected.to(memory_format=torch.channels_last))
    found = load_network(kind, weights / name / file, CPU, dtype)
    ours = everything(found)
    assert list(ours) == list(theirs) and len(ours) > 10
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
        assert tensor.stride() == theirs[key].stride(), key
        assert not tensor.requires_grad and not tensor.is_meta and not tensor.is_inference()
    assert not any(module.training for module in found.modules())


def test_what_no_file_holds_is_there_too(weights: Path) -> None:
    found = load_network(CLIPTextModel, weights / "text_encoder" / MODEL, CPU, torch.float16)
    positions = found.embeddings.position_ids
    assert positions.dtype == torch.int64
    assert torch.equal(positions, torch.arange(found.config.max_position_embeddings)[None])


def test_weights_loaded_while_drawing_can_be_changed_later(weights: Path) -> None:
    with torch.inference_mode():
        found = load_network(AutoencoderTiny, weights / "vae" / UNET_FILE, CPU, torch.float32)
    next(found.parameters()).zero_()  # of an inference tensor this would be an error
    assert not next(found.parameters()).any()


# Files of other times


@pytest.mark.parametrize(("kind", "name", "file"), KINDS[2:])
def test_text_encoders_of_older_libraries_are_understood(
    copy: Path, weights: Path, kind: Any, name: str, file: str
) -> None:
    """With `text_model.` before each name, and with the positions in the file, as SDXL's own."""

    def older(tensors: dict[str, Tensor]) -> None:
        for key in [*tensors]:
            if not key.startswith(("text_model.", "text_projection.")):
                tensors[f"text_model.{key}"] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = torch.zeros(1, 32, dtype=torch.int64)

    changed(copy / name / file, older)
    found = everything(load_network(kind, copy / name / file, CPU, torch.float32))
    expected = everything(load_network(kind, weights / name / file, CPU, torch.float32))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    positions = next(value for key, value in found.items() if key.endswith("position_ids"))
    assert positions[0, -1] == 31  # what the file said was wrong


def test_vaes_of_older_libraries_are_understood(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    vae.save_pretrained(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(tensors: dict[str, Tensor]) -> None:
        for key in [*tensors]:
            for today, then in names.items():
                if f".{today}." in key:
                    tensors[key.replace(f".{today}.", f".{then}.")] = tensors.pop(key)

    changed(tmp_path / UNET_FILE, older)
    assert any(".query." in key for key in load_file(tmp_path / UNET_FILE))
    found = load_network(AutoencoderKL, tmp_path / UNET_FILE, CPU, torch.float32)
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in vae.state_dict().items())


# What does not fit is named


def refused(copy: Path, change: Any) -> str:
    path = copy / "unet" / UNET_FILE
    changed(path, change)
    with pytest.raises(UserError) as error:
        load_network(UNet2DConditionModel, path, CPU, torch.float32)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(("kind", "folder", "file"), KINDS)
def test_files_with_fp16_in_their_names_are_loaded(copy: Path, kind: Any, folder: str, file: str) -> None:
    expected = load_network(kind, copy / folder / file, CPU, torch.float32).state_dict()
    (copy / folder / file).rename(copy / folder / file.replace(".safetensors", ".fp16.safetensors"))
    found = load_network(kind, copy / folder / file, CPU, torch.float32).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_nulls_and_notes_in_published_configurations_are_no_error(copy: Path) -> None:
    """SDXL's own has such nulls; inpainting ones keep what their average was made with."""
    path = copy / "unet" / "config.json"
    notes = {
        "optimization_step": 37_000_000,
        "decay": 0.9999,
        "_name_or_path": "x",
        "blocks": 10**9,
        "layers": "many",
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"upcast_attention": None, "dropout": 0} | notes))
    network = load_network(UNet2DConditionModel, copy / "unet" / UNET_FILE, CPU, torch.float32)
    assert network.config.upcast_attention is None


def test_missing_keys_are_named(copy: Path) -> None:
    assert refused(copy, lambda tensors: tensors.pop("conv_in.bias")).endswith("describes: lacks conv_in.bias")


def test_of_many_missing_keys_some_are_named_and_the_rest_counted(copy: Path) -> None:
    gone = len(load_file(copy / "unet" / UNET_FILE)) - 1
    message = refused(copy, lambda tensors: [tensors.pop(key) for key in [*tensors] if key != "conv_in.bias"])
    assert message.count(", ") == 2 and f"and {gone - 3} more" in message


def test_unexpected_keys_are_named(copy: Path) -> None:
    message = refused(copy, lambda tensors: tensors.update({"cls_pred_branch.0.weight": torch.zeros(2)}))
    assert "has cls_pred_branch.0.weight, which it should not" in message


def test_wrong_shapes_are_named_with_the_right_ones(copy: Path) -> None:
    message = refused(copy, lambda tensors: tensors.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)}))
    assert "has conv_in.weight as 32x9x3x3 instead of 32x4x3x3" in message


def test_broken_and_missing_files_are_named(copy: Path) -> None:
    path = copy / "unet" / UNET_FILE
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_network(UNet2DConditionModel, path, CPU, torch.float32)
    assert parameters_in([path]) == 0
    path.unlink()
    with pytest.raises(UserError, match=f"{UNET_FILE}: missing"):
        load_network(UNet2DConditionModel, path, CPU, torch.float32)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: missing; expected a AutoencoderTiny there"):
        load_network(AutoencoderTiny, copy / "vae" / UNET_FILE, CPU, torch.float32)


def test_parameters_are_counted_from_the_headers(weights: Path) -> None:
    found = load_network(UNet2DConditionModel, weights / "unet" / UNET_FILE, CPU, torch.float16)
    count = sum(p.numel() for p in found.parameters())
    assert parameters_in([weights / "unet" / UNET_FILE]) == count
    assert parameters_in([weights / "unet" / UNET_FILE] * 2) == 2 * count


# Checksums


def test_files_are_checked_by_subfolder_while_others_wait(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    sums = {f"{name}/file": sha256_file(tmp_path / name / "file") for name in ("first", "second")}
    (tmp_path / "second" / "file").write_text("changed")
    wrong = sha256_file(tmp_path / "second" / "file")
    with verifying(tmp_path, sums, "list.json") as check:
        check("first")
        with pytest.raises(UserError) as error:
            check("second")
        assert all(word in str(error.value) for word in (wrong, sums["second/file"], "list.json", "second/file"))
        with pytest.raises(UserError):
            check(None)
    with verifying(tmp_path, sums, "list.json", ["first"]) as check:
        check(None)  # the other one is none of its business
    (tmp_path / "first" / "file").unlink()
    with (
        verifying(tmp_path, sums, "list.json", ["first"]) as check,
        pytest.raises(UserError, match="first/file: missing"),
    ):
        check("first")


def test_config_of_another_class_is_an_error_not_another_network(copy: Path) -> None:
    path = copy / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"block_out_channels": [32, 32, 64]}))
    with pytest.raises(UserError, match=r"instead of|lacks"):
        load_network(UNet2DConditionModel, copy / "unet" / UNET_FILE, CPU, torch.float32)


STARTED = """
import sys
from importlib.util import find_spec
from pathlib import Path
import torch
from dmd2.models.stable_diffusion.folder import load_text_to_image
load_text_to_image(Path(sys.argv[1]), ["unet"], torch.device("cpu"), torch.float32)
print(sorted({"bitsandbytes", "diffusers"} & sys.modules.keys()))
if find_spec("bitsandbytes"):
    import bitsandbytes.optim
"""


def test_networks_are_loaded_without_a_library_of_quantized_ones(weights: Path) -> None:
    """bitsandbytes takes seconds to import; a training's optimizer still finds it."""
    command = [sys.executable, "-c", STARTED, str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['diffusers']\n"
