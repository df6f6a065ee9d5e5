"""A student made of any SDXL checkpoint and DMD2's four-step LoRA: a folder of weights for the engine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dmd2.errors import UserError
from dmd2.fileio import read_object
from dmd2.loading import build_network
from dmd2.lora import Fused, read_lora
from dmd2.weights import UNET_FILE, Manifest, Student, save_pipeline_configs, swap, write_manifest

TIMESTEPS = [999, 749, 499, 249]
NETWORKS = {
    "unet": UNET_FILE,
    "vae": UNET_FILE,
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def convert_sdxl(source: Path, lora: Path, out: Path, scale: float = 1.0, vae: Path | None = None) -> Manifest:
    """Makes `out` of an SDXL checkpoint in diffusers' layout and a LoRA that makes its UNet a four-step student.

    Nothing is added up here: the engine does that when it loads the folder, so that other LoRAs can join it later.

    Args:
        source: folder with `unet`, `text_encoder`, … as safetensors; of files in two precisions fp16 is taken.
        scale: of the LoRA; DMD2's wants 0.5 to 1.0 on checkpoints other than its own.
        vae: folder of another VAE. SDXL's own overflows in fp16 and is run in fp32, at twice the cost.

    Raises:
        UserError: something is missing, or the LoRA was made for another model. `out` is then as it was.
    """
    if not 0 < scale <= 2:
        raise UserError(f"scale {scale}: expected more than 0, at most 2 (DMD2's LoRA: 0.5 to 1.0)")
    if out.exists():
        raise UserError(f"{out}: exists; expected a new folder")
    _check_prediction(source)
    _check_lora(source, lora)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        new = Path(temporary) / out.name
        for name, file in NETWORKS.items():
            folder = vae if name == "vae" and vae is not None else source / name
            _copy(folder / "config.json", new / name / "config.json")
            half = folder / file.replace(".safetensors", ".fp16.safetensors")
            _copy(half if half.is_file() else folder / file, new / name / file)
        for name in ("tokenizer", "tokenizer_2"):
            if not (source / name).is_dir():
                raise UserError(f"{source / name}: missing; expected an SDXL checkpoint in diffusers' layout")
            shutil.copytree(source / name, new / name)
        _copy(lora, new / "lora" / lora.name)
        save_pipeline_configs(new, "epsilon")
        student = Student(subfolder="unet", timesteps=TIMESTEPS, lora=f"lora/{lora.name}", lora_scale=scale)
        licence = f"that of {source.name} and that of {lora.name} (DMD2's is CC BY-NC-SA 4.0: no commercial use)"
        manifest = Manifest(name=out.name, native_size=(1024, 1024), licence=licence, students={4: student})
        write_manifest(new, manifest)
        swap(new, out, Path(temporary) / "old")
    return manifest


def _check_prediction(source: Path) -> None:
    path = source / "scheduler" / "scheduler_config.json"
    found = read_object(path).get("prediction_type", "epsilon") if path.is_file() else ""
    if found not in ("", "epsilon"):
        raise UserError(f"{path}: predicts {found}; expected epsilon, as DMD2's LoRA was made for")


def _check_lora(source: Path, path: Path) -> None:
    """Whether the LoRA changes this UNet and nothing else, told by names and shapes alone."""
    from diffusers import UNet2DConditionModel

    config = source / "unet" / "config.json"
    if not config.is_file():
        raise UserError(f"{config}: missing; expected an SDXL checkpoint in diffusers' layout")
    unet = build_network(UNet2DConditionModel, config)
    lora = read_lora(path)
    if lora.changes_text:
        raise UserError(f"LoRA {lora.name}: changes text encoders; expected one that makes a UNet a few-step student")
    Fused({"unet": unet}).check(lora)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise UserError(f"{source}: missing; expected an SDXL checkpoint in diffusers' layout, as safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
