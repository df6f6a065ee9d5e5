"""CompVis's safety checker (Stable Diffusion's): does CLIP see one of its concepts in an image?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd2.runtime.compiled import Compiler
from dmd2.runtime.errors import UserError, first_line
from dmd2.runtime.offload import upload
from dmd2.runtime.paths import ROOT
from dmd2.weights.manifest import MANIFEST, read_manifest, verify

FOLDER = ROOT / "weights" / "safety"
SWITCH = "DMD2_ALLOW_UNSAFE"


@dataclass(frozen=True)
class SafetyChecker:
    """Flags images. Make one with `SafetyChecker.load`."""

    model: Any
    """diffusers' `StableDiffusionSafetyChecker`"""
    side: int
    """of the images that the model sees, in pixels"""
    mean: Tensor
    """(3, 1, 1), of CLIP's images, 0 … 1"""
    std: Tensor
    compiler: Compiler | None = None
    """allow `warm_up`: see `dmd2.runtime.compiled`"""

    @classmethod
    def load(
        cls,
        folder: Path = FOLDER,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiler: Compiler | None = None,
    ) -> SafetyChecker:
        """From diffusers' layout: config.json, model.safetensors, and preprocessor_config.json where there is one.

        The image encoder is put on `device` in `dtype`; embeddings and thresholds of the concepts stay in fp32. If
        the folder has a `dmd2.json`, its files must match that.

        Raises:
            UserError: a file is missing, damaged or not what it should be; the message names it.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPConfig, CLIPImageProcessorPil
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
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
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        if (folder / "preprocessor_config.json").exists():
            with _naming(folder / "preprocessor_config.json"):
                # By its full name: what `CLIPImageProcessor` is depends on whether torchvision is installed.
                processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
                mean, std = processor.image_mean, processor.image_std
                found = processor.size["shortest_edge"], processor.crop_size["height"], processor.crop_size["width"]
                if found != (side,) * 3 or len(mean) != 3 or len(std) != 3:
                    raise ValueError(f"images of {found}; the model sees {side}")
        model.requires_grad_(False).eval().to(device)
        model.vision_model.to(dtype)
        model.visual_projection.to(dtype)
        statistics = torch.tensor([mean, std], device=device).float().view(2, 3, 1, 1)
        return cls(model, side, statistics[0], statistics[1], compiler)

    def warm_up(self, batch: int) -> None:
        """Prepares the network for batches of up to `batch` images, whatever their size."""
        if self.compiler is not None:
            with self.compiler.recording():
                for count in sorted({1, min(2, batch), batch}):
                    self(torch.zeros(count, 3, self.side, self.side, dtype=torch.uint8))

    @cached_property
    def _embed(self) -> Callable[[Tensor], Tensor]:
        """(B, 3, side, side) → (B, P), normalised, fp32."""
        model = self.model

        def embed(pixels: Tensor) -> Tensor:
            return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output).float())

        return embed if self.compiler is None else self.compiler(embed, compile=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → fp32 (B, 3, side, side), all of it on the images' device.

        As CLIP's in Pillow, to two steps of 255: shortest side to the model's, bicubic; centre crop.
        """
        height, width = images.shape[-2:]
        short = min(height, width)
        sizes = int(self.side * height / short), int(self.side * width / short)
        x = images.float()
        # Pillow scales the width, rounds to bytes, scales the height.
        for size in ((height, sizes[1]), sizes):
            if x.shape[-2:] != size:
                x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = ((length - self.side) // 2 for length in sizes)
        x = x[..., top : top + self.side, left : left + self.side]
        return (x / 255 - self.mean) / self.std

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[bool]:
        """uint8 (B, 3, H, W) on any device → B times: is it flagged?

        The same flags as from diffusers' own `forward`, which also blackens images and logs.
        """
        if not len(images):
            return []
        model = self.model
        weight = model.visual_projection.weight
        embeds = self._embed(self.preprocess(upload(images, weight.device)).to(weight.dtype))

        def excess(concepts: Tensor, thresholds: Tensor, adjustment: float | Tensor = 0.0) -> Tensor:
            """By how much cosines exceed thresholds, rounded as diffusers does: (B, number of concepts)."""
            return (embeds @ F.normalize(concepts).T - thresholds + adjustment).round(decimals=3)

        special = excess(model.special_care_embeds, model.special_care_embeds_weights) > 0
        adjustment = 0.01 * special.any(dim=1, keepdim=True)  # stricter with what calls for special care
        concepts = excess(model.concept_embeds, model.concept_embeds_weights, adjustment)
        flagged = ~(concepts <= 0).all(dim=1)  # so that not-a-number counts as flagged
        return [bool(flag) for flag in flagged.tolist()]


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
