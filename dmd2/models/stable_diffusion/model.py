"""A loaded Stable Diffusion model (SD 1.5, SDXL), with what images may ask for besides: LoRAs, controls, previews."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dmd2.diffusion.sampling import Callback, Churn, Denoise, sample_dpm_solver_2m
from dmd2.models.adapters.control import ControlModel, load_control
from dmd2.models.adapters.lora import Fused, Loras, read_lora
from dmd2.models.openvino.choice import describe, is_enabled
from dmd2.models.openvino.kept import Kept
from dmd2.models.openvino.network import HINTS
from dmd2.models.stable_diffusion.codec import LatentCodec
from dmd2.models.stable_diffusion.folder import TINY, load_codec, load_denoisers, load_text_to_image
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.errors import InvalidInput, UserError, shown
from dmd2.runtime.files import read_object
from dmd2.runtime.offload import LARGE_MODEL_PARAMS
from dmd2.runtime.paths import cache_folder
from dmd2.runtime.placement import count_parameters, default_dtype, leaves_dtype, place
from dmd2.weights.manifest import Student, read_manifest, verify

logger = logging.getLogger(__name__)


class StableDiffusionModel:
    """See `dmd2.models.model.Model` and `FAMILIES`. For the thread that owns the device."""

    takes_prompts = True
    takes_churn = False
    classes = 0

    def __init__(
        self,
        folder: Path,
        subfolders: list[str],
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        fast: bool,
        vae: str,
        churn: Churn | None,
    ) -> None:
        manifest = read_manifest(folder)
        parameters = count_parameters(folder, subfolders)
        width, height = manifest.native_size
        self.device, self.dtype = device, dtype or default_dtype(device, parameters)
        # Who warms up has all of the folder's controls loaded.
        controls = [f"control/{path.parent.name}" for path in sorted(folder.glob("control/*/config.json"))]
        loaded_later = count_parameters(folder, controls) if fast else {}
        self.placement = place(loaded_later | parameters, device, self.dtype, width * height, fast=fast)
        small = max(parameters.values(), default=0) < LARGE_MODEL_PARAMS
        self._folder, self._trace = folder, fast and small and device.type == "cpu"
        self._vae = vae_folder(folder, vae, device)
        self._kept: Kept | None = None
        if device.type == "cpu":
            kind, by = str(self.dtype).removeprefix("torch."), "torch"
            if is_enabled() and kind in (["float32"] if small else HINTS):
                int8 = not small and dtype is None and leaves_dtype()
                self._kept, by = Kept(folder, manifest, cache_folder(), kind, large=not small, int8=int8), describe()
                by += ", linear layers of int8 weights" if int8 else ""
            logger.info("networks run by %s, in %s", by, kind)
        loaded = load_text_to_image(
            folder,
            subfolders,
            device,
            self.dtype,
            trace=self._trace,
            placement=self.placement,
            vae=self._vae,
            kept=self._kept,
        )
        self.manifest, self.codec, self.encode_text = manifest, loaded.codec, loaded.encode_text
        self.denoisers: dict[str, StableDiffusion] = loaded.denoisers
        self._fused: dict[str, Fused] = {}
        self._controls: dict[Path, ControlModel] = {}
        self._own: dict[str, Loras] = {}

    def denoiser(self, subfolder: str) -> StableDiffusion:
        if subfolder not in self.denoisers:
            self.denoisers |= load_denoisers(
                self._folder,
                [subfolder],
                self.device,
                self.dtype,
                trace=self._trace,
                placement=self.placement,
                kept=self._kept,
            )
        return self.denoisers[subfolder]

    # Bounds

    @property
    def size_unit(self) -> int:
        """Pixels. Sides that are multiples of it are halved without remainder on their way down the UNet."""
        config = next(iter(self.denoisers.values())).config if self.denoisers else None
        halvings = 0 if config is None else len(config.block_out_channels) - 1
        return self.codec.factor * 2**halvings

    def check_size(self, size: tuple[int, int]) -> None:
        for name, side in zip(("width", "height"), size, strict=True):
            if side < self.size_unit or side % self.codec.factor:
                raise InvalidInput(
                    name,
                    f"{side} (size {size[0]}x{size[1]}); expected a multiple of {self.codec.factor} pixels, "
                    f"at least {self.size_unit}",
                )

    def check_takes_images(self) -> None:
        """Images, masks, controls and LoRAs are welcome."""

    # Sampling

    def teacher_noises(self, steps: int) -> int:
        return 1

    def sample_teacher(
        self, denoise: Denoise, x: Tensor, noise: Tensor, sigmas: list[float], callback: Callback | None = None
    ) -> Tensor:
        return sample_dpm_solver_2m(denoise, x, sigmas, callback)

    # Adapters

    def use_loras(self, subfolder: str, student: Student | None, loras: Loras) -> Hashable:
        denoiser = self.denoiser(subfolder)
        loras = (*self._students_own(student), *loras)
        if not loras and not any(self._fused.values()):
            return ()
        names = ("text_encoder", "text_encoder_2")[: len(self.encode_text.tokenizers)]
        for lora, _ in loras:
            for part, layer in lora.layers:
                if part not in ("unet", *names):
                    raise UserError(f"LoRA {lora.name}: made for another model: this one has no {part} ({layer})")
        of_text = [(lora, scale) for lora, scale in loras if lora.changes_text]
        if of_text or "text" in self._fused:
            self._fuse("text", dict(zip(names, self.encode_text.encoders, strict=False)), of_text)
            self.encode_text.weights_changed = bool(self._fused["text"])
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
            verify(self._folder, self.manifest, {student.lora.split("/")[0]})
            self._own[student.lora] = ((read_lora(self._folder / student.lora), student.lora_scale),)
        return self._own[student.lora]

    def control(self, folder: Path) -> ControlModel:
        if folder not in self._controls:
            if self._folder in folder.parents:
                verify(self._folder, self.manifest, {folder.relative_to(self._folder).parts[0]})
            unets = [denoiser.config for denoiser in self.denoisers.values()]
            host = self.placement.host(self.device)
            loaded = load_control(folder, host, self.dtype, unets[0] if unets else None)
            if self.placement.offloader is not None:
                self.placement.offloader.add(f"control {folder}", loaded.network)
            self._controls[folder] = ControlModel(loaded.network, self.device, loaded.task, self.placement.compiler)
        return self._controls[folder]

    @cached_property
    def preview_codec(self) -> LatentCodec:
        """TAESDXL where the weights have it beside another VAE, else the VAE itself."""
        if self._vae == TINY or not (self._folder / TINY).is_dir():
            return self.codec
        verify(self._folder, self.manifest, {TINY})
        return load_codec(self._folder, TINY, self.device, self.dtype, self.placement, self._kept)


def vae_folder(folder: Path, vae: str, device: torch.device | None = None) -> str:
    """The subfolder of the VAE "kl" or "tiny". Raises UserError if there is none.

    "auto" is tiny on a CPU, where SDXL's own decoder takes longer than its UNet, if the folder has it beside another.
    """
    if vae not in ("auto", "kl", "tiny"):
        raise InvalidInput("vae", f"{shown(vae)}; expected auto, kl or tiny")
    if vae == "auto":
        quick = device is not None and device.type == "cpu" and (folder / TINY).is_dir()
        if quick:
            logger.info("VAE: tiny, as this is a CPU; kl is sharper and takes twenty times the work")
        vae = "tiny" if quick else "kl"
    if vae == "kl" or (folder / TINY).is_dir():
        return "vae" if vae == "kl" else TINY
    config = folder / "vae" / "config.json"
    if config.is_file() and read_object(config).get("_class_name") == "AutoencoderTiny":
        return "vae"
    raise InvalidInput("vae", f"tiny, but {folder} has no {TINY}; get it by scripts/download-weights --vae kl,tiny")
