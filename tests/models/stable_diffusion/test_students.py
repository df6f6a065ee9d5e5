"""Students in one file, as DMD2's release has them, and as folders: there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd2.cli import main
from dmd2.inference.engine import Engine
from dmd2.models.family import export_weights
from dmd2.models.stable_diffusion.students import import_student
from dmd2.runtime.errors import UserError
from dmd2.weights.manifest import read_manifest, write_manifest
from tests.tiny_sdxl import difference
from tests.training.test_product import sd15

UNETS = {4: "unet/diffusion_pytorch_model.safetensors", 1: "unet_1step/diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("steps", [4, 1])
def test_a_student_goes_out_and_comes_back_the_same(weights: Path, tmp_path: Path, steps: int, suffix: str) -> None:
    file, original = tmp_path / f"dmd2_unet_fp16{suffix}", load_file(weights / UNETS[steps])
    export_weights(weights, file, steps)
    state = torch.load(file, weights_only=True) if suffix == ".bin" else load_file(file)
    assert state.keys() == original.keys() and all(torch.equal(state[k], original[k]) for k in state)
    import_student(file, weights, tmp_path / "back", steps)
    again = load_file(tmp_path / "back" / UNETS[steps])
    assert again.keys() == original.keys() and all(torch.equal(again[k], original[k]) for k in again)
    manifest = read_manifest(tmp_path / "back")
    assert manifest.students.keys() == {steps} and manifest.name == "back" and manifest.native_size == (64, 64)
    mode = str(steps)
    images = Engine(tmp_path / "back", "cpu", modes=(mode,)).generate(["an owl"], seeds=[1], mode=mode)
    expected = Engine(weights, "cpu", modes=(mode,)).generate(["an owl"], seeds=[1], mode=mode)
    assert difference(images, expected) <= 2  # the same numbers at other places in a file: see test_convert


def test_a_folder_of_diffusers_without_a_manifest_is_a_base_too(weights: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(weights, tmp_path / "base"))
    (base / "dmd2.json").unlink()
    export_weights(weights, tmp_path / "unet.bin", None)
    import_student(tmp_path / "unet.bin", base, tmp_path / "back", 4)
    assert read_manifest(tmp_path / "back").family == "sdxl" and read_manifest(tmp_path / "back").teacher is None
    for name in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(base / name)
    with pytest.raises(UserError, match=r"base: has neither dmd2\.json nor text_encoder;"):
        import_student(tmp_path / "unet.bin", base, tmp_path / "other", 4)


@pytest.mark.parametrize("described", [True, False])
def test_a_student_of_sd_15_goes_into_its_own_folder(
    described: bool, text_models: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    base = sd15(tmp_path / "base", text_models)
    if not described:
        (base / "dmd2.json").unlink()
    import_student(base / UNETS[4], base, tmp_path / "made", 1)
    manifest = read_manifest(tmp_path / "made")
    assert manifest.family == "sd15" and manifest.students[1].timesteps == [999]
    (image,) = Engine(tmp_path / "made", "cpu", modes=("1",)).generate(["an owl"], seeds=[1], mode="1")
    assert image.shape[0] == 3 and float(image.float().std()) > 0


def test_a_lora_goes_out_at_scale_one(weights: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(weights, tmp_path / "lora"))
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    (folder / "lora").mkdir()
    save_file(tensors, folder / "lora" / "mine.safetensors")
    manifest = read_manifest(folder)
    student = manifest.students[4].model_copy(update={"lora": "lora/mine.safetensors", "lora_scale": 0.5})
    write_manifest(folder, manifest.model_copy(update={"students": {4: student}}))
    export_weights(folder, tmp_path / "out.safetensors", 4)
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found[f"{layer}.lora_A.weight"], torch.ones(2, 8).half())
    assert torch.equal(found[f"{layer}.lora_B.weight"], torch.full((8, 2), 0.5).half())


def test_what_does_not_fit_is_one_line(weights: Path, tmp_path: Path) -> None:
    good: dict[str, Any] = load_file(weights / UNETS[4])
    name = sorted(good)[0]
    cases = {
        "lacks": {key: value for key, value in good.items() if key != name},
        "more": good | {"extra.weight": torch.zeros(1)},
        "shape": good | {name: torch.zeros(1, 2, 3)},
    }
    for case, tensors in cases.items():
        torch.save(tensors, tmp_path / f"{case}.bin")
        with pytest.raises(UserError, match=rf"{case}\.bin: "):
            import_student(tmp_path / f"{case}.bin", weights, tmp_path / "out", 4)
    with pytest.raises(UserError, match="steps 3: expected 1 or 4"):
        import_student(tmp_path / "more.bin", weights, tmp_path / "out", 3)
    with pytest.raises(UserError, match="steps 2: expected one of 1, 4"):
        export_weights(weights, tmp_path / "a.bin", 2)
    with pytest.raises(UserError, match=r"out .*a\.pt: expected a name that ends in"):
        export_weights(weights, tmp_path / "a.pt", 4)
    assert not (tmp_path / "out").exists()


def test_the_command_line(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (
        ("export", weights, tmp_path / "one.bin", "--steps", 1),
        ("student", tmp_path / "one.bin", weights, tmp_path / "back", "--steps", 1),
    ):
        monkeypatch.setattr("sys.argv", ["dmd2", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    assert json.loads((tmp_path / "back" / "dmd2.json").read_text())["students"].keys() == {"1"}
