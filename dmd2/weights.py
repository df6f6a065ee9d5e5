"""Weights on disk: diffusers' layout plus a manifest, `dmd2.json`. Locate, verify, load, save. safetensors only."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from dmd2.checksums import verifying
from dmd2.configs import SCHEDULER, Schedule, judge, read_schedule, read_unet_config, read_vae_config
from dmd2.errors import UserError, first_error, shown
from dmd2.fetch import is_url, unpacked
from dmd2.fileio import atomic_text, read_object, sha256_file
from dmd2.loading import load_network
from dmd2.memory import save_memory
from dmd2.noise import zero_snr_sigmas
from dmd2.placement import Placement
from dmd2.stable_diffusion import LatentCodec, PredictionType, StableDiffusion, TextEncoder
from dmd2.tensors import os_errors, save_tensors

MANIFEST = "dmd2.json"
LICENCE = "Apache-2.0; the emoji it learned are Noto Color Emoji, SIL OFL 1.1"
ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "weights" / "emoji"
UNET_FILE = "diffusion_pytorch_model.safetensors"
PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "vae_tiny", "LICENSE", "LICENSE.md")
"""what a text-to-image model has besides UNets"""


def _inside(name: str) -> str:
    """A path within the folder of weights. Links are looked at by `read_manifest`, which knows the folder."""
    path = PurePosixPath(name)
    if not name or not name.isprintable() or "\\" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{shown(repr(name))}: leads out of the folder; expected a path in it")
    return name


Inside = Annotated[str, AfterValidator(_inside), Field(max_length=1000)]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1000, le=1000)]
Level = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e6)]
Side = Annotated[int, Field(ge=1, le=16384)]


class Student(BaseModel):
    """A distilled network: where it lies and the timesteps, or for EDM the levels, that it was distilled for."""

    model_config = ConfigDict(extra="forbid")
    subfolder: Inside
    timesteps: Annotated[list[Annotated[int, Field(ge=0, le=999)]], Field(max_length=1000)] = []
    """descending, one a step"""
    sigmas: Annotated[list[Level], Field(max_length=1000)] = []
    """descending, one a step"""
    lora: Annotated[str, AfterValidator(lambda name: name and _inside(name)), Field(max_length=1000)] = ""
    """path of a safetensors file in the folder: what makes the network in `subfolder` this student"""
    lora_scale: Finite = 1.0

    @model_validator(mode="after")
    def _check(self) -> Student:
        if bool(self.timesteps) == bool(self.sigmas):
            raise ValueError("expected either timesteps or sigmas")
        levels = self.timesteps or self.sigmas
        if any(later >= earlier for earlier, later in pairwise(levels)):
            raise ValueError("expected timesteps or sigmas in descending order")
        return self


class Teacher(BaseModel):
    """The undistilled network and how it is sampled on Karras levels: DPM-Solver++(2M), guided, or for EDM Heun."""

    model_config = ConfigDict(extra="forbid")
    subfolder: Inside = "unet_teacher"
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Finite


class Source(BaseModel):
    """A repository of the Hugging Face hub that files came from."""

    model_config = ConfigDict(extra="forbid")
    revision: str
    """commit"""
    licence: str
    files: dict[Inside, str] = {}
    """path in the repository → sha256 of what the hub served"""


class Manifest(BaseModel):
    """`dmd2.json`: what a folder of weights is and what its files must be."""

    model_config = ConfigDict(extra="forbid")
    name: str
    family: str = "sdxl"
    native_size: tuple[Side, Side]
    """width and height in pixels"""
    licence: str
    class_names: list[str] = []
    """what the classes 0, 1, … show, if it is conditioned on classes and they have names"""
    students: dict[Annotated[int, Field(ge=1, le=1000)], Student] = {}
    """by number of steps"""
    teacher: Teacher | None = None
    files: dict[Inside, str] = {}
    """path relative to the folder → sha256"""
    sources: dict[str, Source] = {}
    """by repository, if it was downloaded"""


def locate(given: Path | str | None = None, environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Path:
    """The folder of weights to use: `given`, else `$DMD2_WEIGHTS`, else what was downloaded, else the embedded ones.

    The first two may be a folder, a tar or the http(s) URL of a tar, or an SDXL checkpoint in one safetensors file.
    A tar is unpacked once, into `weights` in the cache folder `$DMD2_CACHE` (`~/.cache/dmd2`), and its files are
    verified; so is a checkpoint, whose configurations and tokenizers come from `$DMD2_BASE` or what was downloaded.

    Raises:
        UserError: there is no such thing, or it is broken.
    """
    source = str(given or environ.get("DMD2_WEIGHTS", ""))
    if not source:
        downloaded = root / "weights" / "sdxl"
        return downloaded if (downloaded / MANIFEST).is_file() else root / "weights" / "emoji"
    source = re.sub(r"^(https?):/+", r"\1://", source)  # a URL that went through Path has lost a slash
    if not is_url(source):
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if not path.is_file():
            raise UserError(
                f"weights {path}: no such file or folder; expected a folder, a tar or the URL of a tar, or an SDXL "
                "checkpoint as safetensors"
            )
        source = str(path)
    cache = Path(environ.get("DMD2_CACHE") or "~/.cache/dmd2").expanduser()
    if source.endswith(".safetensors") and not is_url(source):
        from dmd2.community import converted

        base = Path(environ.get("DMD2_BASE") or root / "weights" / "sdxl").expanduser()
        return converted(Path(source), base, cache / "weights")
    return unpacked(source, cache / "weights", MANIFEST, lambda folder: verify(folder, read_manifest(folder)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of weights.

    Raises:
        UserError: there is no such folder, its `dmd2.json` is missing or wrong, or names what is not in the folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"--weights {folder}: no such folder")
    if not path.is_file():
        raise UserError(f"{path}: missing; expected a folder of weights with a {MANIFEST}")
    try:
        manifest = Manifest.model_validate(read_object(path))
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}") from None
    _check_links(folder, manifest)
    return manifest


def _check_links(folder: Path, manifest: Manifest) -> None:
    """Raises UserError if what the manifest names leads out of the folder by a symbolic link."""
    named = {f"students.{n}.subfolder": student.subfolder for n, student in manifest.students.items()}
    named |= {f"students.{n}.lora": student.lora for n, student in manifest.students.items() if student.lora}
    if manifest.teacher is not None:
        named["teacher.subfolder"] = manifest.teacher.subfolder
    named |= {f"files.{name}": name for name in manifest.files}
    top = os.path.realpath(folder)
    for field, name in named.items():
        real = os.path.realpath(folder / name)
        if os.path.commonpath([top, real]) != top:
            raise UserError(
                f"{folder / MANIFEST}: {shown(field)}: a link that leads out of the folder, to {shown(real)}"
            )


def verify(folder: Path, manifest: Manifest, subfolders: set[str] | None = None) -> None:
    """Checks the sha256 of every listed file (or those in the `subfolders`).

    Raises:
        UserError: naming the first file that is missing or differs, with both checksums.
    """
    with verifying(folder, manifest.files, MANIFEST, subfolders) as check:
        check(None)


@dataclass(frozen=True)
class TextToImage:
    """A loaded family of text-to-image networks that share text encoders and codec."""

    manifest: Manifest
    encode_text: TextEncoder
    codec: LatentCodec
    denoisers: dict[str, StableDiffusion]
    """by subfolder"""


def load_text_to_image(
    folder: Path,
    subfolders: list[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    trace: bool = False,
    placement: Placement | None = None,
    vae: str = "vae",
) -> TextToImage:
    """Text encoders (SDXL's two, or SD 1.5's one), VAE and the UNets in `subfolders`, in `dtype` on `device`, frozen.

    `trace` records the UNets for repeated calls (see `StableDiffusion`); `placement` says what else is done to them.
    `vae` is the VAE's subfolder.

    Raises:
        UserError: a file is missing, damaged or not what the manifest says.
    """
    manifest, placement = read_manifest(folder), placement or Placement()
    classes = {"text_encoder": "CLIPTextModel"}
    if manifest.family not in ("sdxl", "sd15"):
        raise UserError(f"{folder / MANIFEST}: family: {shown(manifest.family)}; expected sdxl, sd15 or edm")
    if manifest.family == "sdxl":
        classes["text_encoder_2"] = "CLIPTextModelWithProjection"
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in classes]
    _check_there(folder, subfolders)
    # UNets are checked first, for that takes longest, and loaded last.
    wanted = [*subfolders, "scheduler", *tokenizers, *classes, vae]
    with verifying(folder, manifest.files, MANIFEST, wanted) as check:
        try:
            schedule = judge(folder, subfolders, folder / vae, sdxl=manifest.family == "sdxl")
        except UserError:
            check(None)  # a damaged file is that first of all
            raise
        import transformers  # takes a while, in which other threads hash

        for name in tokenizers:
            check(name)
        words = [load_tokenizer(folder / name) for name in tokenizers]
        encoders = []
        for name, kind in classes.items():
            check(name)
            file = folder / name / "model.safetensors"
            encoders.append(load_network(getattr(transformers, kind), file, placement.host(device), dtype))
            config, words_of = encoders[-1].config, words[len(encoders) - 1]
            window, most = words_of.model_max_length, config.max_position_embeddings
            if not 3 <= window <= most:
                raise UserError(f"{folder}: a tokenizer of {shown(window, 20)} tokens; {name} takes 3 to {most}")
            if len(words_of) > config.vocab_size:
                raise UserError(f"{folder}: a tokenizer of {len(words_of)} words; {name} knows {config.vocab_size}")
            placement.settle(name, encoders[-1])
        check(vae)
        decoder = load_vae(folder / vae, placement.host(device), dtype)
        placement.settle("vae", decoder)
        if placement.turns is not None:
            save_memory(decoder, placement.plan.tiles)
        denoisers = _load_denoisers(folder, subfolders, device, dtype, trace, placement, schedule, check)
    encode_text = TextEncoder(words, encoders, compiler=placement.compiler, device=device)
    codec = LatentCodec(decoder, compiler=placement.compiler, device=device)
    return TextToImage(manifest, encode_text, codec, denoisers)


def load_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer in transformers' layout. Raises UserError if there is none, or a damaged one."""
    import transformers

    for name in ("tokenizer_config.json", "vocab.json", "tokenizer.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_object(folder / name)  # too large or too deep for transformers to be asked
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has neither vocab.json nor tokenizer.json; expected CLIP's tokenizer there")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        numbers = [tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    except Exception as error:  # of any kind: tokenizers raises plain ones
        raise UserError(f"{folder}: no tokenizer of CLIP's, or a damaged one ({shown(error)})") from error
    if not all(isinstance(number, int | float) for number in numbers):
        raise UserError(f"{folder}: lacks the tokens that pad, begin or end a text, or its window (model_max_length)")
    return tokenizer


def load_denoisers(
    folder: Path,
    subfolders: list[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    trace: bool = False,
    placement: Placement | None = None,
) -> dict[str, StableDiffusion]:
    """The UNets in `subfolders`, by these, and nothing else. Otherwise as `load_text_to_image`."""
    manifest = read_manifest(folder)
    _check_there(folder, subfolders)
    with verifying(folder, manifest.files, MANIFEST, [*subfolders, "scheduler"]) as check:
        try:
            for name in subfolders:
                read_unet_config(folder / name, sdxl=manifest.family == "sdxl")
            schedule = read_schedule(folder / "scheduler")
        except UserError:
            check(None)
            raise
        return _load_denoisers(folder, subfolders, device, dtype, trace, placement or Placement(), schedule, check)


def _check_there(folder: Path, subfolders: list[str]) -> None:
    for subfolder in subfolders:
        if not (folder / subfolder).is_dir():
            raise UserError(f"{folder / subfolder}: missing; these weights are incomplete")


def _load_denoisers(
    folder: Path,
    subfolders: list[str],
    device: torch.device,
    dtype: torch.dtype,
    trace: bool,
    placement: Placement,
    schedule: Schedule,
    check: Callable[[str], None],
) -> dict[str, StableDiffusion]:
    from diffusers import UNet2DConditionModel

    check("scheduler")
    sigmas = zero_snr_sigmas() if schedule.zero_snr else None
    denoisers = {}
    for name in subfolders:
        check(name)
        unet = load_network(UNet2DConditionModel, folder / name / UNET_FILE, placement.host(device), dtype)
        placement.settle(name, unet)
        denoisers[name] = StableDiffusion(
            unet, schedule.prediction_type, sigmas, trace=trace, compiler=placement.compiler, device=device
        )
    return denoisers


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A diffusers VAE, frozen. Raises UserError if there is none.

    One whose config says `force_upcast` (SDXL's own) overflows in fp16, and is loaded in fp32 instead.
    """
    import diffusers

    settings = read_vae_config(folder)
    if settings.get("force_upcast") and dtype == torch.float16:
        dtype = torch.float32
    return load_network(getattr(diffusers, settings["_class_name"]), folder / UNET_FILE, device, dtype)


def save_vae(vae: Any, folder: Path, recipe: Mapping[str, Any]) -> None:
    """Writes a diffusers VAE in fp16 into `folder`."""
    _save_module(vae, folder, UNET_FILE, recipe)
    # AutoencoderTiny records a key that it does not accept, and warns of it whenever it is loaded.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if config["_class_name"] == "AutoencoderTiny":
        config.pop("block_out_channels", None)
        atomic_text(path, json.dumps(config, indent=2) + "\n")


def save_text_to_image(
    folder: Path,
    init: Path,
    *,
    unet_subfolder: str,
    unet: nn.Module,
    prediction_type: PredictionType,
    recipe: Mapping[str, Any],
    text: tuple[Any, nn.Module, nn.Module] | None = None,
    student: tuple[int, Student] | None = None,
    teacher: Teacher | None = None,
    native_size: tuple[int, int] = (64, 64),
    card: str | None = None,
) -> None:
    """Writes `folder`: everything of `init`, with one UNet (and perhaps the text encoders) new, in fp16.

    With a model `card`, only what belongs to the new network: of `init` its teacher, text encoders and VAEs, but no
    other students, data or card. The folder appears whole or not at all, in the place of one that is there. `recipe`
    goes into the safetensors metadata.
    """
    old = read_manifest(init) if (init / MANIFEST).exists() else None
    with whole_folder(folder) as new:
        left_out = {MANIFEST, unet_subfolder}
        if card is not None:
            belongs = {*PARTS, *(Path(old.teacher.subfolder).parts[:1] if old and old.teacher else ())}
            left_out |= {path.name for path in init.iterdir() if path.name not in belongs}
            atomic_text(new / "README.md", card)
        shutil.copytree(init, new, ignore=lambda at, _: left_out if Path(at) == init else (), dirs_exist_ok=True)
        _save_module(unet, new / unet_subfolder, UNET_FILE, recipe)
        if text is not None:
            tokenizer, *encoders = text
            for suffix, encoder in zip(("", "_2"), encoders, strict=True):
                with os_errors(folder):
                    tokenizer.save_pretrained(new / f"tokenizer{suffix}")
                _save_module(encoder, new / f"text_encoder{suffix}", "model.safetensors", recipe)
        levels = (init / "scheduler").is_dir() and read_schedule(init / "scheduler").zero_snr
        save_pipeline_configs(new, prediction_type, levels and prediction_type == "v_prediction")
        others = old.students if old and card is None else {}
        manifest = Manifest(
            name=old.name if old else "dmd2-emoji",
            native_size=native_size,
            licence=old.licence if old else LICENCE,
            students=others | (dict([student]) if student else {}),
            teacher=teacher or (old.teacher if old else None),
        )
        write_manifest(new, manifest)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a new, empty folder; when the block ends well, it takes the place of `folder`, whatever is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        yield new
        swap(new, folder, Path(temporary) / "old")


def swap(new: Path, folder: Path, old: Path) -> None:
    """`folder` becomes `new`; if that fails, it is what it was. Its old content ends up at `new` or `old`."""
    if not folder.exists():
        new.rename(folder)
        return
    if _exchange(new, folder):
        return
    # Killed between these two, the process leaves the old weights at `old` and nothing at `folder`.
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Two names swap what they stand for, in one step of the kernel. False where that cannot be (all but Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28 and newer
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    if renameat2 is None:
        return False
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `dmd2.json` with the sha256 of every file that is in `folder` now, but for the model card."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, "README.md"))
    sums = {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}
    atomic_text(folder / MANIFEST, manifest.model_copy(update={"files": sums}).model_dump_json(indent=2) + "\n")


def _save_module(module: Any, folder: Path, filename: str, recipe: Mapping[str, Any]) -> None:
    """diffusers' and transformers' layout: config.json beside fp16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(module, "save_config"):
        module.save_config(folder)
    else:
        module.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # where it was loaded from: of no use elsewhere
    if "transformers_version" in config:  # else transformers would load in the file's fp16, diffusers in fp32
        config["dtype"] = "float32"
    atomic_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {
        name: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype).contiguous()
        for name, value in module.state_dict().items()
    }
    save_tensors(tensors, folder / filename, {"format": "pt", "recipe": json.dumps(recipe)})


def save_pipeline_configs(folder: Path, prediction_type: PredictionType, zero_snr: bool = False) -> None:
    """What diffusers' `StableDiffusionXLPipeline.from_pretrained` reads: the index and the scheduler."""
    import diffusers

    scheduler = diffusers.LCMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        clip_sample=False,
    )
    scheduler.save_pretrained(folder / "scheduler")
    vae_class = json.loads((folder / "vae" / "config.json").read_text())["_class_name"]
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", SCHEDULER],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae_class],
    }
    atomic_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
