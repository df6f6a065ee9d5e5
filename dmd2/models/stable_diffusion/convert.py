"""A student made of any SDXL checkpoint and DMD2's four-step LoRA: a folder of weights for the engine."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import safe_open

from dmd2.models.adapters.lora import SETTINGS_FILE, Fused, read_lora, settings_of
from dmd2.models.stable_diffusion.configs import TIMESTEPS, Schedule, check_configs, network_class
from dmd2.models.stable_diffusion.folder import TINY, UNET_FILE, load_tokenizer, save_pipeline_configs
from dmd2.models.stable_diffusion.single_file import TOKENIZERS, SingleFile, check_base
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.files import atomic_text, sha256_file
from dmd2.runtime.loading import build_network, check_network, weight_files
from dmd2.weights.folders import swap
from dmd2.weights.manifest import Manifest, Student, Teacher, write_manifest

NETWORKS = {
    "unet": UNET_FILE,
    "vae": UNET_FILE,
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
PREDICTIONS = {
    "epsilon": Schedule(),
    "v": Schedule("v_prediction"),
    "v-zero-snr": Schedule("v_prediction", zero_snr=True),
}

logger = logging.getLogger(__name__)


def convert_sdxl(
    source: Path,
    lora: Path | None,
    out: Path,
    scale: float = 1.0,
    vae: Path | None = None,
    base: Path | None = None,
    prediction: str = "",
    teacher: Teacher | None = None,
) -> Manifest:
    """Makes `out` of an SDXL checkpoint and a LoRA that makes its UNet a four-step student; or of a `teacher`.

    Nothing is added up here: the engine does that when it loads the folder, so that other LoRAs can join it later.

    Args:
        source: folder in diffusers' layout, with `unet`, `text_encoder`, … as safetensors (in shards, too; of files
            in two precisions fp16 is taken); or a checkpoint in one safetensors file, see `single_file`.
        lora: None for a checkpoint that has it merged in, or is such a student otherwise.
        scale: of the LoRA; DMD2's wants 0.5 to 1.0 on checkpoints other than its own.
        vae: folder of another VAE. SDXL's own overflows in fp16 and is run in fp32, at twice the cost.
        base: folder of SDXL's configurations and tokenizers, which a file lacks; and of the tiny VAE, where `source`
            has none.
        prediction: one of `PREDICTIONS`, if the checkpoint does not say it, or wrongly.
        teacher: the checkpoint is not distilled, and is sampled so. Students are trained from such a folder.

    Raises:
        UserError: something is missing, of an unknown kind, or the LoRA was made for another model. `out` is then as
            it was.
    """
    if not 0 < scale <= 2:
        raise UserError(f"scale {scale}: expected more than 0, at most 2 (DMD2's LoRA: 0.5 to 1.0)")
    if prediction and prediction not in PREDICTIONS:
        raise UserError(f"prediction {prediction}: expected one of {', '.join(PREDICTIONS)}")
    if teacher is not None and lora is not None:
        raise InvalidInput("teacher", f"given beside the LoRA {lora.name}; expected a checkpoint alone")
    if out.exists():
        raise UserError(f"{out}: exists; expected a new folder")
    if not source.exists():
        raise UserError(f"{source}: missing; expected an SDXL checkpoint, a folder in diffusers' layout or one file")
    schedule = PREDICTIONS.get(prediction)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        new = Path(temporary) / out.name
        if source.is_file():
            schedule = _from_file(source, lora, new, vae, base, schedule)
        else:
            schedule = _from_folder(source, lora, new, vae, schedule)
        for folder in (source, base):
            if folder is not None and (folder / TINY).is_dir() and not (new / TINY).exists():
                check_network(network_class("vae", folder / TINY), folder / TINY / UNET_FILE, half=True)
                _copy_network(folder / TINY, new / TINY, UNET_FILE)
        student, licence = Student(subfolder="unet", timesteps=TIMESTEPS[4]), f"that of {source.name}"
        if lora is not None:
            if schedule.prediction_type != "epsilon":
                logger.warning("%s predicts v; DMD2's LoRA was made for one that predicts epsilon", source)
            name = re.sub(r"[^\w.-]", "_", lora.name)  # a manifest takes plain names
            (new / "lora").mkdir()
            shutil.copyfile(lora, new / "lora" / name)
            if settings := settings_of(lora):
                shutil.copyfile(settings, (new / "lora" / name).with_suffix(f".{SETTINGS_FILE}"))
            student = student.model_copy(update={"lora": f"lora/{name}", "lora_scale": scale})
            licence += f" and that of {lora.name} (DMD2's is CC BY-NC-SA 4.0: no commercial use)"
        save_pipeline_configs(new, schedule.prediction_type, schedule.zero_snr)
        manifest = Manifest(name=out.name, native_size=(1024, 1024), licence=licence, teacher=teacher)
        if teacher is None:
            manifest = manifest.model_copy(update={"students": {4: student}})
        write_manifest(new, manifest)
        swap(new, out, Path(temporary) / "old")
    return manifest


def converted(source: Path, base: Path, cache: Path) -> Path:
    """The folder that a checkpoint in one file becomes without a LoRA: made once, then found in the cache.

    Raises:
        UserError: as `convert_sdxl`.
    """
    check_base(base)
    configs = sorted(path for path in base.glob("*/*") if path.suffix in (".json", ".txt"))
    key = hashlib.sha256("".join(map(sha256_file, [source, *configs])).encode()).hexdigest()
    folder = cache / f"{key}-{source.stem}"[:200]
    if not folder.is_dir():
        logger.warning("%s: is taken to be a four-step student, and unpacked into %s once", source, cache)
        try:
            convert_sdxl(source, None, folder, base=base)
        except OSError as error:
            raise UserError(f"{source}: cannot be unpacked into {cache}: {error.strerror}") from error
    return folder


def _from_folder(source: Path, lora: Path | None, new: Path, vae: Path | None, schedule: Schedule | None) -> Schedule:
    folders = {name: source / name for name in NETWORKS} | ({} if vae is None else {"vae": vae})
    for name, folder in folders.items():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder / 'config.json'}: missing; expected an SDXL checkpoint in diffusers' layout")
        weight_files(folder / NETWORKS[name], half=True)
    if schedule is None and not (source / "scheduler").is_dir():
        logger.warning("%s: has no scheduler; taken to predict epsilon", source)
        schedule = PREDICTIONS["epsilon"]
    schedule = check_configs(source, ["unet"], folders["vae"], schedule=schedule)
    for name in TOKENIZERS:
        if not (source / name).is_dir():
            raise UserError(f"{source / name}: missing; expected an SDXL checkpoint in diffusers' layout")
        load_tokenizer(source / name)
    for name, folder in folders.items():
        check_network(network_class(name, folder), folder / NETWORKS[name], half=True)
    _check_lora(source / "unet", lora)
    for name, folder in folders.items():
        _copy_network(folder, new / name, NETWORKS[name])
    for name in TOKENIZERS:
        shutil.copytree(source / name, new / name)
    return schedule


def _from_file(
    source: Path, lora: Path | None, new: Path, vae: Path | None, base: Path | None, schedule: Schedule | None
) -> Schedule:
    if base is None:
        raise InvalidInput(
            "base",
            f"missing; {source} has neither configurations nor tokenizers; expected a folder with those of SDXL in "
            "diffusers' layout, such as weights/sdxl",
        )
    file = SingleFile(source, base, vae)
    file.write_configs(new)
    if vae is not None:
        check_network(network_class("vae", vae), vae / UNET_FILE, half=True)
        _copy_network(vae, new / "vae", UNET_FILE)
    try:
        schedule = check_configs(new, ["unet"], new / "vae", schedule=schedule or file.schedule)
    except UserError as error:  # says where that came from, not where it is for a moment
        raise UserError(str(error).replace(f"{new}/", f"{base}/")) from None
    for name in TOKENIZERS:
        load_tokenizer(base / name)
    _check_lora(new / "unet", lora)
    file.write_weights(new, NETWORKS)
    return schedule


def _check_lora(unet: Path, path: Path | None) -> None:
    """Whether the LoRA changes this UNet and nothing else, told by names and shapes alone."""
    if path is None:
        return
    from diffusers import UNet2DConditionModel

    lora = read_lora(path)
    if lora.changes_text:
        raise UserError(f"LoRA {lora.name}: changes text encoders; expected one that makes a UNet a few-step student")
    Fused({"unet": build_network(UNet2DConditionModel, unet / "config.json")}).check(lora)


def _copy_network(source: Path, folder: Path, name: str) -> None:
    """Configuration and weights, under the usual `name`, into the new `folder`."""
    folder.mkdir(parents=True)
    shutil.copyfile(source / "config.json", folder / "config.json")
    path = folder / name
    files = weight_files(source / name, half=True)
    if len(files) == 1:
        shutil.copyfile(files[0], path)
        return
    of_keys: dict[str, str] = {}
    for i, file in enumerate(files, 1):
        shard = f"{path.stem}-{i:05}-of-{len(files):05}.safetensors"
        shutil.copyfile(file, folder / shard)
        with safe_open(folder / shard, "pt") as opened:
            of_keys |= dict.fromkeys(opened.keys(), shard)
    index = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": of_keys}
    atomic_text(folder / f"{name}.index.json", json.dumps(index, indent=2) + "\n")
