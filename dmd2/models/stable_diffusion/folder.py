"""Weights on disk: diffusers' layout plus a manifest, `dmd2.json`. Locate, verify, load, save. safetensors only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmd2.diffusion.noise import zero_snr_sigmas
from dmd2.models.adapters.lora_training import Adapted
from dmd2.models.openvino.kept import DECODE, ENCODE, STATES, X0, Kept
from dmd2.models.stable_diffusion.codec import LatentCodec, OneWay, attend_by_products
from dmd2.models.stable_diffusion.configs import (
    SCHEDULER,
    Schedule,
    check_configs,
    network_class,
    read_schedule,
    read_vae_config,
)
from dmd2.models.stable_diffusion.text import KeptTokenizer, States, TextEncoder
from dmd2.models.stable_diffusion.unet import OfWaves, PredictionType, StableDiffusion
from dmd2.runtime.errors import UserError, shown
from dmd2.runtime.files import atomic_text, read_object
from dmd2.runtime.loading import Deferred, build_network, check_network, load_network, of_diffusers
from dmd2.runtime.offload import save_memory
from dmd2.runtime.placement import Placement
from dmd2.runtime.tensors import os_errors, save_tensors
from dmd2.weights.checksums import verifying
from dmd2.weights.folders import whole_folder
from dmd2.weights.manifest import MANIFEST, Manifest, Student, Teacher, read_manifest, write_manifest

LICENCE = "Apache-2.0; the emoji it learned are Noto Color Emoji, SIL OFL 1.1"

UNET_FILE = "diffusion_pytorch_model.safetensors"

TINY = "vae_tiny"
"""subfolder of TAESD(XL), where `vae` is another VAE"""

PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", TINY, "LICENSE", "LICENSE.md")
"""what a text-to-image model has besides UNets"""


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
    kept: Kept | None = None,
    defer_text: bool = False,
) -> TextToImage:
    """Text encoders (SDXL's two, or SD 1.5's one), VAE and the UNets in `subfolders`, in `dtype` on `device`, frozen.

    `trace` records the UNets for repeated calls (see `StableDiffusion`); `placement` says what else is done to them.
    `vae` is the VAE's subfolder. With `kept`, networks run by OpenVINO, and torch's are loaded when they are needed;
    with `defer_text` the text encoders are.

    Raises:
        UserError: a file is missing, damaged or not what the manifest says.
    """
    manifest, placement = read_manifest(folder), placement or Placement()
    names = ["text_encoder"]
    if manifest.family not in ("sdxl", "sd15"):
        raise UserError(f"{folder / MANIFEST}: family: {shown(manifest.family)}; expected sdxl or sd15")
    if manifest.family == "sdxl":
        names.append("text_encoder_2")
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in names]
    with _checked(folder, manifest, subfolders, [*tokenizers, *names, vae], vae) as (schedule, check):
        for name in tokenizers:
            check(name)
        words = [_tokenizer(folder, name, kept) for name in tokenizers]
        encoders: list[Any] = []
        runs = []
        for name in names:
            check(name)

            def encoder(kind: torch.dtype, name: str = name) -> Any:
                file, host = folder / name / "model.safetensors", placement.host(device)
                network = load_network(network_class(name, folder / name), file, host, kind)
                placement.prepare_module(name, network)
                return network

            if kept is None and defer_text:
                kind = network_class(name, folder / name)
                check_network(kind, folder / name / "model.safetensors")
                described = build_network(kind, folder / name / "config.json")
                encoders.append(Deferred(described.config, partial(encoder, dtype)))
            elif kept is None:
                encoders.append(encoder(dtype))
            else:
                parts = {STATES: partial(_states_of, alone=len(names) == 1, window=words[len(encoders)])}
                one, run = kept.network(name, encoder, parts)
                encoders.append(one)
                runs.append(run[STATES])
            config, words_of = encoders[-1].config, words[len(encoders) - 1]
            window, most = words_of.model_max_length, config.max_position_embeddings
            if not 3 <= window <= most:
                raise UserError(f"{folder}: a tokenizer of {shown(window, 20)} tokens; {name} takes 3 to {most}")
            if len(words_of) > config.vocab_size:
                raise UserError(f"{folder}: a tokenizer of {len(words_of)} words; {name} knows {config.vocab_size}")
        check(vae)
        codec = load_codec(folder, vae, device, dtype, placement, kept)
        denoisers = _load_denoisers(folder, subfolders, device, dtype, trace, placement, schedule, check, kept)
    encode_text = TextEncoder(words, encoders, compiler=placement.compiler, device=device, runs=runs)
    return TextToImage(manifest, encode_text, codec, denoisers)


def load_codec(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype, placement: Placement, kept: Kept | None = None
) -> LatentCodec:
    """The VAE in a subfolder as a `Codec`. Raises UserError if there is none, or a damaged one."""

    def load(kind: torch.dtype) -> Any:
        vae = load_vae(folder / name, placement.host(device), kind)
        placement.prepare_module(name, vae)
        if device.type == "cuda":
            attend_by_products(vae)
        if placement.offloader is not None:
            save_memory(vae, placement.plan.tiles)
        return vae

    if kept is None:
        return LatentCodec(load(dtype), compiler=placement.compiler, device=device)
    vae, runs = kept.network(name, load, {way: partial(_way_of, way=way) for way in (ENCODE, DECODE)})
    return LatentCodec(vae, device=device, dtype=dtype, runs=runs)


# What is converted, and examples of its inputs, of a batch of two.


def _states_of(encoder: Any, alone: bool, window: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return States(encoder, alone), (torch.zeros(2, window.model_max_length, dtype=torch.int64),)


def _way_of(vae: Any, way: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    codec = LatentCodec(vae)
    channels, side = (3, 16 * codec.factor) if way == ENCODE else (codec.channels, 16)
    return OneWay(vae, way), (torch.zeros(2, channels, side, side, dtype=codec.dtype),)


def _unet_of(unet: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config, dtype = unet.config, unet.dtype
    side, tokens = 2 ** (len(config.block_out_channels) + 1), 32
    zeros = partial(torch.zeros, dtype=dtype)
    time = torch.zeros(2, config.block_out_channels[0])
    inputs = [zeros(2, config.in_channels, side, side), time, zeros(2, tokens, config.cross_attention_dim)]
    if config.addition_embed_type is not None:
        numbers = 6 * config.addition_time_embed_dim
        inputs += [zeros(2, config.projection_class_embeddings_input_dim - numbers), torch.zeros(2, numbers)]
    return OfWaves(unet), tuple(inputs)


def _tokenizer(folder: Path, name: str, kept: Kept | None) -> Any:
    if kept is None:
        return load_tokenizer(folder / name)
    return KeptTokenizer(kept.settings(name, lambda: KeptTokenizer.described(load_tokenizer(folder / name))))


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
    kept: Kept | None = None,
) -> dict[str, StableDiffusion]:
    """The UNets in `subfolders`, by these, and nothing else. Otherwise as `load_text_to_image`."""
    with _checked(folder, read_manifest(folder), subfolders) as (schedule, check):
        placement = placement or Placement()
        return _load_denoisers(folder, subfolders, device, dtype, trace, placement, schedule, check, kept)


@contextmanager
def _checked(
    folder: Path, manifest: Manifest, unets: list[str], others: Sequence[str] = (), vae: str = "vae"
) -> Iterator[tuple[Schedule, Callable[[str | None], None]]]:
    """The schedule of a folder whose configurations fit together, and `verifying`'s function for its files.

    UNets are hashed first, for that takes longest; they should be loaded last.
    """
    for name in unets:
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: missing; these weights are incomplete")
    with verifying(folder, manifest.files, MANIFEST, [*unets, "scheduler", *others]) as check:
        try:
            schedule = check_configs(folder, unets, folder / vae, sdxl=manifest.family == "sdxl")
        except UserError:
            check(None)  # a damaged file is that first of all
            raise
        yield schedule, check


def _load_denoisers(
    folder: Path,
    subfolders: list[str],
    device: torch.device,
    dtype: torch.dtype,
    trace: bool,
    placement: Placement,
    schedule: Schedule,
    check: Callable[[str], None],
    kept: Kept | None = None,
) -> dict[str, StableDiffusion]:
    check("scheduler")
    sigmas = zero_snr_sigmas() if schedule.zero_snr else None
    denoisers = {}
    for name in subfolders:
        check(name)

        def load(kind: torch.dtype, name: str = name) -> Any:
            file, host = folder / name / UNET_FILE, placement.host(device)
            unet = load_network(network_class("unet", folder), file, host, kind)
            placement.prepare_module(name, unet)
            return unet

        how: dict[str, Any] = {"trace": trace, "compiler": placement.compiler}
        if kept is not None and kept.takes(name):
            unet, runs = kept.network(name, load, {X0: _unet_of})
            how = {"dtype": dtype, "run": OfWaves.run_by(runs[X0], unet.config)}
        else:
            unet = load(dtype)
        denoisers[name] = StableDiffusion(unet, schedule.prediction_type, sigmas, device=device, **how)
    return denoisers


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A diffusers VAE, frozen. Raises UserError if there is none.

    One whose config says `force_upcast` (SDXL's own) overflows in fp16, and is loaded in fp32 instead.
    """
    settings = read_vae_config(folder)
    if settings.get("force_upcast") and dtype == torch.float16:
        dtype = torch.float32
    return load_network(of_diffusers(settings["_class_name"]), folder / UNET_FILE, device, dtype)


def save_vae(vae: Any, folder: Path, recipe: Mapping[str, Any]) -> None:
    """Writes a diffusers VAE in fp16 into `folder`."""
    save_module(vae, folder, UNET_FILE, recipe)
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

    A LoRA of a `student`, in training, takes the UNet's place: the one that it is on stays as it is in `init`.

    With a model `card`, only what belongs to the new network: of `init` its teacher, text encoders and VAEs, but no
    other students, data or card. The folder appears whole or not at all, in the place of one that is there. `recipe`
    goes into the safetensors metadata.
    """
    old = read_manifest(init) if (init / MANIFEST).exists() else None
    family = old.family if old else family_of(init)
    with whole_folder(folder) as new:
        lora = unet if isinstance(unet, Adapted) else None
        left_out = {MANIFEST} | ({unet_subfolder} if lora is None else set())
        if card is not None:
            belongs = {*PARTS, *(Path(old.teacher.subfolder).parts[:1] if old and old.teacher else ())}
            left_out |= {path.name for path in init.iterdir() if path.name not in belongs}
            atomic_text(new / "README.md", card)
        shutil.copytree(init, new, ignore=lambda at, _: left_out if Path(at) == init else (), dirs_exist_ok=True)
        if lora is None:
            save_module(unet, new / unet_subfolder, UNET_FILE, recipe)
        elif student is not None:
            path = new / student[1].lora
            path.parent.mkdir(exist_ok=True)
            lora.save(path, {"recipe": json.dumps(recipe)})
        if text is not None:
            tokenizer, *encoders = text
            for suffix, encoder in zip(("", "_2"), encoders, strict=True):
                with os_errors(folder):
                    tokenizer.save_pretrained(new / f"tokenizer{suffix}")
                save_module(encoder, new / f"text_encoder{suffix}", "model.safetensors", recipe)
        levels = (init / "scheduler").is_dir() and read_schedule(init / "scheduler").zero_snr
        save_pipeline_configs(new, prediction_type, levels and prediction_type == "v_prediction", family)
        others = old.students if old and card is None else {}
        manifest = Manifest(
            name=old.name if old else "dmd2-emoji",
            family=family,
            native_size=native_size,
            licence=old.licence if old else LICENCE,
            students=others | (dict([student]) if student else {}),
            teacher=teacher or (old.teacher if old else None),
        )
        write_manifest(new, manifest)


def family_of(folder: Path) -> str:
    """Of a folder in diffusers' layout that has no manifest to say it."""
    return "sdxl" if (folder / "text_encoder_2").is_dir() or not (folder / "text_encoder").is_dir() else "sd15"


def save_module(
    module: Any, folder: Path, filename: str, recipe: Mapping[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """diffusers' and transformers' layout: config.json beside safetensors, floats in `dtype`."""
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
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in module.state_dict().items()
    }
    save_tensors(tensors, folder / filename, {"format": "pt", "recipe": json.dumps(recipe)})


def save_pipeline_configs(
    folder: Path, prediction_type: PredictionType, zero_snr: bool = False, family: str = "sdxl"
) -> None:
    """What diffusers' pipelines for SDXL and SD 1.5 read: the index and the scheduler."""
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
    index: dict[str, Any] = {
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
    if family == "sd15":
        index = {k: v for k, v in index.items() if not k.endswith("_2") and not k.startswith("force")}
        index |= {"_class_name": "StableDiffusionPipeline", "safety_checker": None, "feature_extractor": None}
    atomic_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
