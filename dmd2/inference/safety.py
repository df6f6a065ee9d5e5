"""CompVis's safety checker (Stable Diffusion's): does CLIP see one of its concepts in an image?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd2.runtime.errors import UserError, first_line
from dmd2.runtime.paths import ROOT
from dmd2.weights.manifest import MANIFEST, read_manifest, verify

FOLDER = ROOT / "weights" / "safety"
SWITCH = "DMD2_ALLOW_UNSAFE"


@dataclass(frozen=True)
class SafetyChecker:
    """Flags images. Make one with `SafetyChecker.load`."""

    model: Any
    """diffusers' `StableDiffusionSafetyChecker`"""
    processor: Any
    """CLIP's preprocessing: shortest side to the model's, bicubic; centre crop; mean and standard deviation"""

    @classmethod
    def load(
        cls,
        folder: Path = FOLDER,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SafetyChecker:
        """From diffusers' layout: config.json, model.safetensors, and preprocessor_config.json where there is one.

        The image encoder is put on `device` in `dtype`; embeddings and thresholds of the concepts stay in fp32. If
        the folder has a `dmd2.json`, its files must match that.

        Raises:
            UserError: a file is missing, damaged or not what it should be; the message names it.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPConfig, CLIPImageProcessorPil
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        config_file, weights = folder / "config.json", folder / "model.safetensors"
        for path in (config_file, weights):
            if not path.is_file():
                raise UserError(f"{path}: missing; expected CompVis's safety checker in diffusers' layout")
        if (folder / MANIFEST).exists():
            verify(folder, read_manifest(folder))
        with _naming(config_file):
            config = CLIPConfig.from_pretrained(folder, local_files_only=True)
            side = int(config.vision_config.image_size)
        with _naming(weights):
            model, info = StableDiffusionSafetyChecker.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        if info["missing_keys"]:  # transformers has made up their values, with no more than a warning
            raise UserError(f"{weights}: holds no {min(info['missing_keys'])}: no safety checker, or damaged")
        # By its full name: what `CLIPImageProcessor` is depends on whether torchvision is installed.
        if (folder / "preprocessor_config.json").exists():
            with _naming(folder / "preprocessor_config.json"):
                processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        else:
            crop = {"height": side, "width": side}
            processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)
        model.requires_grad_(False).eval().to(device)
        model.vision_model.to(dtype)
        model.visual_projection.to(dtype)
        return cls(model, processor)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[bool]:
        """uint8 (B, 3, H, W) on the CPU → B times: is it flagged?

        The same flags as from diffusers' own `forward`, which also blackens images and logs.
        """
        if not len(images):
            return []
        pixels = self.processor(list(images), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        model = self.model
        weight = model.visual_projection.weight
        encoded = model.vision_model(pixels.to(weight.device, weight.dtype)).pooler_output
        embeds = F.normalize(model.visual_projection(encoded).float())

        def excess(concepts: Tensor, thresholds: Tensor, adjustment: float | Tensor = 0.0) -> Tensor:
            """By how much cosines exceed thresholds, rounded as diffusers does: (B, number of concepts)."""
            return (embeds @ F.normalize(concepts).T - thresholds + adjustment).round(decimals=3)

        special = excess(model.special_care_embeds, model.special_care_embeds_weights) > 0
        adjustment = 0.01 * special.any(dim=1, keepdim=True)  # stricter with what calls for special care
        concepts = excess(model.concept_embeds, model.concept_embeds_weights, adjustment)
        flagged = ~(concepts <= 0).all(dim=1)  # so that not-a-number counts as flagged
        return [bool(flag) for flag in flagged]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever a library makes of a damaged file (a dozen kinds of errors) becomes one line with the file's name."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path}: damaged or no part of a safety checker: {first_line(error)}") from error


def may_be_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Does the operator let requests switch the checker off? By the variable `DMD2_ALLOW_UNSAFE`; no by default.

    Raises:
        UserError: its value is neither yes nor no.
    """
    value = environ.get(SWITCH, "").strip().lower()
    if value not in ("1", "true", "yes", "0", "false", "no", ""):
        raise UserError(f"{SWITCH}={value}: expected 1, true or yes; or 0, false, no or nothing")
    return value in ("1", "true", "yes")
