"""What is loaded beside a model when an image asks for it: LoRAs, controls, the small VAE of previews."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmd2.models.adapters.control import ControlModel, load_control
from dmd2.models.adapters.lora import Fused, Loras, read_lora
from dmd2.models.stable_diffusion.codec import LatentCodec
from dmd2.models.stable_diffusion.folder import TextToImage, load_vae
from dmd2.runtime.errors import UserError
from dmd2.runtime.placement import Placement
from dmd2.weights.manifest import Student, verify

TINY = "vae_tiny"


class Adapters:
    """Of one loaded model. For the thread that owns the device."""

    def __init__(
        self, folder: Path, model: TextToImage, device: torch.device, dtype: torch.dtype, placement: Placement
    ) -> None:
        self._folder, self._model, self._device, self._dtype = folder, model, device, dtype
        self._placement = placement
        self._fused: dict[str, Fused] = {}
        self._controls: dict[Path, ControlModel] = {}
        self._own: dict[str, Loras] = {}
        self._preview: LatentCodec | None = None

    def use_loras(self, subfolder: str, student: Student | None, loras: Loras) -> Hashable:
        """The UNet in `subfolder` and the text encoders have these LoRAs from now on, and that of a student's own.

        Returns:
            What tells apart the text encoders' states.

        Raises:
            UserError: a LoRA was made for another model. None is in use then.
        """
        denoiser = self._model.denoisers[subfolder]
        loras = (*self._students_own(student), *loras)
        if not loras and not any(self._fused.values()):
            return ()
        if loras and self._placement.go_fast:
            raise UserError("LoRA: these networks run in 8-bit floats, which cannot be changed; unset DMD2_GO_FAST")
        encoders = dict(zip(("text_encoder", "text_encoder_2"), self._model.encode_text.encoders, strict=False))
        for lora, _ in loras:
            for part, layer in lora.layers:
                if part not in ("unet", *encoders):
                    raise UserError(f"LoRA {lora.name}: made for another model: this one has no {part} ({layer})")
        of_text = [(lora, scale) for lora, scale in loras if lora.changes_text]
        self._fuse("text", encoders, of_text)
        try:
            self._fuse(subfolder, {"unet": denoiser.unet}, loras)
        finally:
            denoiser.weights_changed = bool(self._fused[subfolder])
        return tuple((lora.sha256, scale) for lora, scale in of_text)

    def _fuse(self, name: str, parts: dict[str, nn.Module], loras: Loras) -> None:
        if name not in self._fused:
            self._fused[name] = Fused(parts)
        self._fused[name].use(loras)

    def _students_own(self, student: Student | None) -> Loras:
        if student is None or not student.lora:
            return ()
        if student.lora not in self._own:
            verify(self._folder, self._model.manifest, {student.lora.split("/")[0]})
            self._own[student.lora] = ((read_lora(self._folder / student.lora), student.lora_scale),)
        return self._own[student.lora]

    def control(self, folder: Path) -> ControlModel:
        """A ControlNet or T2I-Adapter, loaded at its first use.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if folder not in self._controls:
            if self._folder in folder.parents:
                verify(self._folder, self._model.manifest, {folder.relative_to(self._folder).parts[0]})
            unets = [denoiser.unet.config for denoiser in self._model.denoisers.values()]
            host = self._placement.host(self._device)
            loaded = load_control(folder, host, self._dtype, unets[0] if unets else None)
            if self._placement.turns is not None:
                self._placement.turns.add(f"control {folder}", loaded.network)
            self._controls[folder] = ControlModel(loaded.network, self._device, loaded.task)
        return self._controls[folder]

    @property
    def preview(self) -> LatentCodec:
        """TAESDXL where the weights have it beside another VAE, else the VAE itself."""
        if self._preview is None:
            self._preview = self._model.codec
            if (self._folder / TINY).is_dir():
                verify(self._folder, self._model.manifest, {TINY})
                vae: Any = load_vae(self._folder / TINY, self._device, self._dtype)
                self._preview = LatentCodec(vae, device=self._device)
        return self._preview
