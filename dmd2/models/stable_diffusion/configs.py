"""Checks the configurations in a folder of weights before anything large is loaded.

Whatever this project cannot do right is refused by name here, instead of giving wrong images later.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dmd2.models.stable_diffusion.codec import LATENT_CHANNELS, MORE_CHANNELS
from dmd2.models.stable_diffusion.unet import INPAINTING_CHANNELS, PredictionType
from dmd2.runtime.errors import UserError, shown
from dmd2.runtime.files import read_object
from dmd2.runtime.loading import of_diffusers

VAES = ("AutoencoderKL", "AutoencoderTiny")
SCHEDULER = "LCMScheduler"
"""what few-step students are sampled with, in diffusers' terms"""
TIMESTEPS = {4: [999, 749, 499, 249], 1: [399]}
"""of DMD2's published students of SDXL (2405.14867), by number of steps"""
TIMESTEPS_OF = {"sdxl": TIMESTEPS, "sd15": {**TIMESTEPS, 1: [999]}}
"""by family: the one-step student of SD 1.5 starts from noise alone"""
SD_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
OTHER_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
"""of UNets that are given more than text and timesteps: unCLIP, upscalers, IP-Adapters, LCM's guidance scale"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """What a folder's scheduler says of its networks."""

    prediction_type: PredictionType = "epsilon"
    zero_snr: bool = False
    """the last timestep is noise alone: Lin et al. 2023, "Common diffusion noise schedules … are flawed", alg. 1"""


def read_schedule(folder: Path) -> Schedule:
    """Reads `scheduler_config.json` in a folder. Its sampler is not used, which the log says; its noise levels are.

    Raises:
        UserError: the networks were trained with other levels than Stable Diffusion's, or predict something else.
    """
    path = folder / "scheduler_config.json"
    config = read_object(path)
    name = config.get("_class_name")
    if not isinstance(name, str) or not name.endswith("Scheduler"):
        raise UserError(f"{path}: _class_name: {shown(name)}; expected one of diffusers' schedulers")
    flow = "Flow" in name or bool(config.get("use_flow_sigmas"))
    if name.startswith("EDM") or flow or "CosineDPM" in name or "sigma_data" in config:
        kind = "flow matching's" if flow else "EDM's, as Playground 2.5's"
        raise UserError(f"{path}: {shown(name)}: noise levels of {kind}; expected Stable Diffusion's 1000 timesteps")
    for key, value in SD_SCHEDULE.items():
        given = config.get(key, value)
        if not isinstance(given, int | float) or not math.isclose(given, value, rel_tol=1e-3):
            raise UserError(f"{path}: {key}: {shown(given)}; expected {value}, as in Stable Diffusion")
    if config.get("beta_schedule", "scaled_linear") != "scaled_linear" or config.get("trained_betas") is not None:
        raise UserError(f"{path}: beta_schedule: {shown(config.get('beta_schedule'))}; expected scaled_linear")
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{path}: prediction_type: {shown(kind)}; expected epsilon or v_prediction")
    zero_snr = config.get("rescale_betas_zero_snr") is True
    if zero_snr and kind == "epsilon":
        raise UserError(f"{path}: rescale_betas_zero_snr with prediction_type epsilon; expected v_prediction with it")
    if name != SCHEDULER:
        logger.warning("%s: %s is not used: few-step students have steps of their own (%s)", path, name, SCHEDULER)
    return Schedule(cast(PredictionType, kind), zero_snr)


def network_class(name: str, folder: Path) -> Any:
    """The class of the network of SDXL or SD 1.5 in the subfolder called `name`, which lies at `folder`."""
    if name in ("unet", "vae"):
        return of_diffusers("UNet2DConditionModel" if name == "unet" else read_vae_config(folder)["_class_name"])
    import transformers

    return transformers.CLIPTextModelWithProjection if name == "text_encoder_2" else transformers.CLIPTextModel


def read_vae_config(folder: Path) -> dict[str, Any]:
    """The config of a VAE of 4 latent channels, or of an `AutoencoderTiny` of 8.

    Raises:
        UserError: there is none, or one of another kind.
    """
    path, config = _read_config(folder, "VAE", VAES)
    channels = config.get("latent_channels", LATENT_CHANNELS)
    tiny = config["_class_name"] == "AutoencoderTiny"
    if not (channels == LATENT_CHANNELS or (tiny and channels == MORE_CHANNELS)):
        other = f", or {MORE_CHANNELS}" if tiny else ""
        raise UserError(
            f"{path}: {shown(channels)} latent channels; expected {LATENT_CHANNELS}, as in SDXL and SD 1.5{other}"
        )
    if config.get("shift_factor") not in (None, 0):
        raise UserError(
            f"{path}: shift_factor: {shown(config['shift_factor'])}; expected none, as in SDXL and SD 1.5"
        )
    if not _is_number(scale := config.get("scaling_factor", 1.0)) or scale <= 0:
        raise UserError(f"{path}: scaling_factor: {shown(scale)}; expected a number above 0")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise UserError(f"{path}: expected both latents_mean and latents_std, or neither")
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        if values is None:
            continue
        numbers = isinstance(values, list) and len(values) == channels and all(map(_is_number, values))
        if not numbers or (key == "latents_std" and min(values) <= 0):
            raise UserError(f"{path}: {key}: {shown(values)}; expected {channels} numbers, one a channel")
    return config


def read_unet_config(folder: Path, *, sdxl: bool = True) -> dict[str, Any]:
    """The config of a `UNet2DConditionModel` that is given text, timesteps and, if it has 9 channels, a mask.

    Raises:
        UserError: there is none, or one of another kind.
    """
    path, config = _read_config(folder, "UNet", ("UNet2DConditionModel",), default="UNet2DConditionModel")
    given, made = config.get("in_channels", LATENT_CHANNELS), config.get("out_channels", LATENT_CHANNELS)
    fits = given in (LATENT_CHANNELS, INPAINTING_CHANNELS) and made == LATENT_CHANNELS
    if not (fits or (given == made == MORE_CHANNELS)):
        known = {5: " (depth)", 7: " (upscaling)", 8: " (InstructPix2Pix)"}.get(given if _is_number(given) else 0, "")
        raise UserError(
            f"{path}: {shown(given)} input{known} and {shown(made)} output channels; expected 4 and 4, 8 and 8, or 9 "
            "and 4 (inpainting)"
        )
    for key in OTHER_INPUTS:
        if config.get(key) is not None:
            raise UserError(f"{path}: {key}: {shown(config[key])}; expected none: only text and timesteps are given")
    added, expected = config.get("addition_embed_type"), "text_time" if sdxl else None
    if added != expected:
        raise UserError(
            f"{path}: addition_embed_type: {shown(added)}; expected {expected}, as in {'SDXL' if sdxl else 'SD 1.5'}"
        )
    return config


def _read_config(folder: Path, what: str, known: tuple[str, ...], default: str = "") -> tuple[Path, dict[str, Any]]:
    """Path and content of a network's config.json, whose class must be one of those known."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: missing; expected a diffusers {what} there")
    config = read_object(path)
    name = config.get("_class_name", default)
    if name not in known:
        raise UserError(f"{path}: describes a {shown(name)}; expected one of {', '.join(known)}")
    return path, config


def check_configs(
    folder: Path, unets: Iterable[str], vae: Path, *, sdxl: bool = True, schedule: Schedule | None = None
) -> Schedule:
    """Whether the networks in a folder of SDXL's layout (or SD 1.5's) are of kinds known here, and fit together.

    Args:
        unets: their subfolders.
        vae: its folder.
        schedule: if it is known otherwise.

    Raises:
        UserError: naming the first file that says something else.
    """
    encoders = [folder / "text_encoder" / "config.json"]
    if sdxl:
        encoders.append(folder / "text_encoder_2" / "config.json")
    texts = [read_object(path) for path in encoders]
    widths = [_number(path, text, "hidden_size") for path, text in zip(encoders, texts, strict=True)]
    latents = read_vae_config(vae).get("latent_channels", LATENT_CHANNELS)
    for name in unets:
        unet, path = read_unet_config(folder / name, sdxl=sdxl), folder / name / "config.json"
        if (made := unet.get("out_channels", LATENT_CHANNELS)) != latents:
            raise UserError(f"{path}: {made} output channels; the latents of {vae.name} have {latents}")
        if unet.get("cross_attention_dim") != sum(widths):
            told, width = " + ".join(map(str, widths)), shown(unet.get("cross_attention_dim"))
            raise UserError(f"{path}: cross_attention_dim: {width}; the text encoders give {told}")
        if sdxl:
            pooled = _number(encoders[1], texts[1], "projection_dim")
            wanted = pooled + 6 * _number(path, unet, "addition_time_embed_dim")
            key = "projection_class_embeddings_input_dim"
            if _number(path, unet, key) != wanted:
                raise UserError(
                    f"{path}: {key}: {unet[key]}; expected {wanted}, for SDXL's pooled text and six numbers (a "
                    "refiner has five)"
                )
    return schedule or read_schedule(folder / "scheduler")


def _number(path: Path, config: dict[str, Any], key: str) -> int:
    defaults = {"hidden_size": 512, "projection_dim": 512}  # transformers'
    value = config.get(key, defaults.get(key))
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"{path}: {key}: {shown(value)}; expected a whole number above 0")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
