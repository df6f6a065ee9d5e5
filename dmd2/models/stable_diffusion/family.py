"""SD 1.5 and SDXL as a `Family`: latents, conditioned on text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmd2.diffusion.noise import sample_sigma
from dmd2.diffusion.sampling import (
    conditioned,
    leading_sigmas,
    sample_dpm_solver_2m,
    sample_euler,
    sample_plms,
    teacher_sigmas,
    trailing_sigmas,
)
from dmd2.models.adapters.lora_training import LORA_FILE, Adapted, LoraShape, bare, checkpoint_activations, halve
from dmd2.models.stable_diffusion.codec import LatentCodec
from dmd2.models.stable_diffusion.folder import (
    LICENCE,
    UNET_FILE,
    load_denoisers,
    load_text_to_image,
    load_vae,
    save_module,
    save_text_to_image,
)
from dmd2.models.stable_diffusion.model import vae_folder
from dmd2.models.stable_diffusion.text import TextCondition, TextEncoder, time_ids
from dmd2.models.stable_diffusion.unet import PredictionType, StableDiffusion
from dmd2.runtime.errors import InvalidInput, WeightsError
from dmd2.runtime.loading import load_network
from dmd2.runtime.precision import Precision, autocast_dtype
from dmd2.weights.manifest import MANIFEST, Student, Teacher, read_manifest, verify

TEACHER = "unet_teacher"
EMBEDDED = ("context", "pooled")
"""columns of rows that `dmd2 data` makes of a text"""

MOST_PIXELS_OF_PLAIN_ATTENTION = 256
"""along a side"""


class StableDiffusionFamily:
    """See `dmd2.models.family.Family`.

    Args:
        folder: what exports begin as a copy of: the teacher's, or one with a VAE for a teacher that is new.
        teacher: its network, what that predicts, and its table of σ.
        encode_text: its text encoders, frozen.
        text: tokenizer and text encoders that are trained with the UNet, of a new teacher.
        autocast: the dtype that networks are trained in; None for fp32.
        subfolder: of the teacher.
    """

    classes, class_names, takes_classes = 0, (), False
    frozen_in_gdd_i = re.compile(r"\.(conv\d|to_out\.0|proj_out)\.(weight|bias)$")
    """convolutions and attention's last layers within blocks, as in EDM's networks"""

    def __init__(
        self,
        folder: Path,
        teacher: StableDiffusion,
        codec: LatentCodec,
        encode_text: TextEncoder,
        size: tuple[int, int],
        autocast: torch.dtype | None,
        subfolder: str = TEACHER,
        text: tuple[Any, nn.Module, nn.Module] | None = None,
    ) -> None:
        self.folder, self.codec, self.teacher_network = folder, codec, teacher.unet
        self.prediction_type, self._sigmas = teacher.prediction_type, teacher.table
        self.encode_text, self.size, self.autocast = encode_text, size, autocast
        self.subfolder, self.text = subfolder, text
        plain_attention(teacher.unet, size)
        arrange(teacher.unet)
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
        self.name = manifest.name if manifest else "the weights it began with"
        self.licence = manifest.licence if manifest else LICENCE
        self.sha256 = manifest.files.get(f"{subfolder}/{UNET_FILE}", "") if manifest else ""
        about = manifest.teacher if manifest else None
        self.sample_steps, self.guidance_scale = (about.steps, about.guidance_scale) if about else (25, 1.0)
        self.origin = f"the teacher of {self.name}, which is in `{subfolder}`"
        self.teacher = self.denoiser(teacher.unet)
        self.device = self.teacher.device
        width, height = size
        self.shape = codec.channels, height // codec.factor, width // codec.factor
        channels = teacher.unet.config.block_out_channels
        self.bottleneck = channels[-1], self.shape[1] // 2 ** (len(channels) - 1)

    @classmethod
    def open(
        cls, folder: Path, device: torch.device, precision: Precision, host: torch.device | None = None
    ) -> StableDiffusionFamily:
        manifest = read_manifest(folder)
        if manifest.teacher is None:
            raise WeightsError("holds no teacher; `dmd2 train emoji-teacher` makes one", folder)
        name = manifest.teacher.subfolder
        together = host in (None, device)
        loaded = [name] if together else []
        # On "meta" text encoders take nothing, and a prediction must not count their being loaded in a step.
        later = host is not None and host.type != "meta"
        model = load_text_to_image(folder, loaded, host or device, torch.float32, defer_text=later)
        denoisers = model.denoisers if together else load_denoisers(folder, [name], device, torch.float32)
        return cls(
            folder,
            denoisers[name],
            model.codec,
            model.encode_text,
            manifest.native_size,
            autocast_dtype(precision, device),
            name,
        )

    @classmethod
    def new(
        cls,
        folder: Path,
        unet: nn.Module,
        text: tuple[Any, nn.Module, nn.Module],
        prediction_type: PredictionType,
        size: tuple[int, int],
        device: torch.device,
        precision: Precision,
    ) -> StableDiffusionFamily:
        """Networks without training, on the latents of `folder`/vae. UNet and text encoders are trained together."""
        autocast = autocast_dtype(precision, device)
        codec = LatentCodec(load_vae(folder / "vae", device, autocast or torch.float32))
        tokenizer, *encoders = text
        for network in (unet, *encoders):
            network.to(device)
        encode = TextEncoder([tokenizer] * 2, encoders)
        teacher = StableDiffusion(unet, prediction_type)
        return cls(folder, teacher, codec, encode, size, autocast, text=text)

    def student(self, levels: Sequence[float], *, boundary: float, subfolder: str | None, start: Path | None) -> Any:
        if boundary:
            raise InvalidInput(
                "boundary", "expected 0; only EDM's networks have such preconditioning", f"{boundary:g}"
            )
        folder = self.folder
        if start is not None:
            student = read_manifest(start).students.get(len(levels))
            if student is None or student.timesteps != list(levels):
                raise InvalidInput("student", f"expected a student of the timesteps {list(levels)}", start)
            folder, subfolder = start, student.subfolder
            if student.lora:
                raise InvalidInput("student", "is a LoRA; expected adapter=lora to go on from it", start)
        if subfolder is None:
            return self._trainable(bare(self.teacher_network))
        return self._trainable(load_denoisers(folder, [subfolder], self.device, torch.float32)[subfolder].unet)

    def fake_score(self, start: Path | None) -> Any:
        if start is None:
            return self._trainable(bare(self.teacher_network))
        if (start / LORA_FILE).is_file():
            raise InvalidInput("student", "its fake score is a LoRA; expected networks=adapters", start)
        from diffusers import UNet2DConditionModel

        return self._trainable(load_network(UNet2DConditionModel, start / UNET_FILE, self.device, torch.float32))

    def adapter(self, name: str, shape: LoraShape, levels: Sequence[float], start: Path | None) -> Adapted:
        made = Adapted(self.teacher_network, name, shape)
        if start is not None:
            path = start / LORA_FILE
            if levels:
                manifest = read_manifest(start)
                student = manifest.students.get(len(levels))
                if student is None or student.timesteps != list(levels) or not student.lora:
                    expected = f"expected a LoRA student of the timesteps {list(levels)}"
                    raise InvalidInput("student", f"{expected}, or adapter=full", start)
                verify(start, manifest, {Path(student.lora).parts[0]})
                path = start / student.lora
            made.load(path)
        return made

    def lighten(self, *, half: bool, checkpoints: Sequence[Any]) -> None:
        if half and self.autocast is not None:
            halve(self.teacher_network, self.autocast)
            self.teacher = self.denoiser(self.teacher_network)
        for network in checkpoints:
            checkpoint_activations(network.unet if isinstance(network, Adapted) else network)

    def _trainable(self, unet: Any) -> Any:
        plain_attention(unet, self.size)
        arrange(unet)
        return unet.requires_grad_(True).train()

    def denoiser(self, network: Any, compile: bool = False) -> StableDiffusion:
        unet = network["unet"] if isinstance(network, nn.ModuleDict) else network
        adapted: dict[str, Any] = {"autocast": self.autocast, "compile": compile}
        if isinstance(network, Adapted):
            unet, adapted["adapter"] = network.unet, network.active
        return StableDiffusion(unet, self.prediction_type, self._sigmas, **adapted)

    def sigmas(self, timesteps: Sequence[int], sigmas: Sequence[float]) -> tuple[float, ...]:
        if sigmas:
            raise InvalidInput("sigmas", "expected [], and timesteps instead: this teacher's levels are timesteps")
        return tuple(float(self.teacher.sigmas[t]) for t in timesteps)

    def condition(self, labels: list[str] | TextCondition, network: Any = None) -> TextCondition:
        if isinstance(labels, TextCondition):
            return labels
        if not isinstance(network, nn.ModuleDict):
            window = self.encode_text.tokenizers[0].model_max_length
            cond = self.encode_text(labels, self.size).to(self.device)
            # Of a long text the first window, as in the published runs and in `dmd2 data prompts`: what a text is to
            # the networks then does not depend on how long the others of its batch are.
            return replace(cond, context=cond.context[:, :window])
        encode = TextEncoder(self.encode_text.tokenizers, [network["text_encoder"], network["text_encoder_2"]])
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return encode(labels, self.size)

    def unconditional(self, cond: TextCondition) -> TextCondition:
        return self.encode_text.unconditional(cond, lambda: self.condition([""]))

    def embedded(self, rows: Mapping[str, Tensor]) -> TextCondition:
        context, pooled = (rows[name].to(self.device, torch.float32) if name in rows else None for name in EMBEDDED)
        width = self.teacher_network.config.cross_attention_dim
        two = len(self.encode_text.tokenizers) > 1
        if context is None or context.ndim != 3 or context.shape[-1] != width or (pooled is not None) != two:
            found = {name: tuple(value.shape[1:]) for name, value in rows.items()}
            told = f"holds {found}; {self.name} takes a context of {width} channels"
            raise InvalidInput("data", told + (" and a pooled embedding" if two else " alone"))
        return TextCondition(context, pooled, time_ids(self.size, context) if two else None)

    def any_labels(self, n: int) -> list[str]:
        return [""] * n

    @property
    def gathered(self) -> torch.dtype | None:
        return self.autocast

    def blocks(self, network: Any) -> list[nn.Module]:
        """Residual and transformer blocks; of text encoders their layers."""
        names = ("ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer")
        return [module for module in network.modules() if type(module).__name__ in names]

    def encoder_levels(self) -> list[nn.Module]:
        return [block.resnets[-1] for block in self.teacher_network.down_blocks]

    def to_rgb(self, x0: Tensor) -> Tensor:
        return self.codec.decoded(x0).to(x0.device)

    def rgb(self, decoder: str, one_by_one: bool) -> Callable[[Tensor], Tensor]:
        own = vae_folder(self.folder, decoder)
        codec = self.codec
        if own != "vae" or codec.device != self.device:  # the codec may be where nothing else is: see `open`
            verify(self.folder, read_manifest(self.folder), {own})
            codec = LatentCodec(load_vae(self.folder / own, self.device, codec.dtype))

        def one_at_a_time(x0: Tensor) -> Tensor:
            images = [checkpoint(codec.decoded, x, use_reentrant=False) for x in x0.split(1)]
            return torch.cat(images).to(x0.device)

        return one_at_a_time if one_by_one else lambda x0: codec.decoded(x0).to(x0.device)

    def trainable(self) -> Any:
        if self.text is None:
            return self.teacher_network.requires_grad_(True).train()
        return nn.ModuleDict(
            {"unet": self.teacher_network, "text_encoder": self.text[1], "text_encoder_2": self.text[2]}
        )

    def sample_sigma(self, n: int, generator: torch.Generator) -> Tensor:
        return sample_sigma(self.teacher.sigmas, n, generator)

    def sample(
        self,
        denoiser: Any,
        cond: TextCondition,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        solver: str = "teacher",
    ) -> Tensor:
        """DPM-Solver++(2M) unless told otherwise."""
        denoise = conditioned(denoiser, cond, self.unconditional(cond), guidance_scale)
        if solver == "euler-trailing":
            sigmas = trailing_sigmas(denoiser.table, steps)
            return sample_euler(denoise, noise * sigmas[0], sigmas)
        sigmas = leading_sigmas(denoiser.table, steps) if solver == "pndm" else teacher_sigmas(denoiser, steps)
        start = denoiser.scale_initial_noise(noise, torch.full((len(noise),), sigmas[0], device=noise.device))
        return (sample_plms if solver == "pndm" else sample_dpm_solver_2m)(denoise, start, sigmas)

    def _save(self, out: Path, subfolder: str, network: Any, recipe: Any, card: str, **others: Any) -> None:
        save_text_to_image(
            out,
            self.folder,
            unet_subfolder=subfolder,
            unet=network,
            prediction_type=self.prediction_type,
            recipe=recipe,
            native_size=self.size,
            card=card,
            **others,
        )

    def save_student(
        self, out: Path, network: Any, levels: Sequence[float], kind: str, recipe: Any, card: str
    ) -> None:
        timesteps = [int(t) for t in levels]
        if isinstance(network, Adapted):
            student = Student(
                subfolder=self.subfolder, timesteps=timesteps, lora=f"lora_{len(levels)}step/{LORA_FILE}"
            )
            return self._save(out, self.subfolder, network, recipe, card, student=(len(levels), student))
        name = "unet" if len(levels) == 4 and self.subfolder != "unet" else f"unet_{len(levels)}step"
        student = Student(subfolder=name, timesteps=timesteps)
        self._save(out, student.subfolder, network, recipe, card, student=(len(levels), student))

    def save_fake_score(self, out: Path, network: Any, kind: str, recipe: Any, card: str) -> None:
        if isinstance(network, Adapted):
            out.mkdir(parents=True, exist_ok=True)
            return network.save(out / LORA_FILE, {"recipe": json.dumps(recipe)})
        save_module(network, out, UNET_FILE, recipe, torch.float32)

    def save_teacher(
        self, out: Path, network: Any, steps: int, guidance_scale: float, recipe: Any, card: str
    ) -> None:
        teacher = Teacher(subfolder=self.subfolder, steps=steps, guidance_scale=guidance_scale)
        if not isinstance(network, nn.ModuleDict):
            return self._save(out, self.subfolder, network, recipe, card, teacher=teacher)
        text = (self.encode_text.tokenizers[0], network["text_encoder"], network["text_encoder_2"])
        self._save(out, self.subfolder, network["unet"], recipe, card, teacher=teacher, text=text)


def arrange(unet: Any) -> None:
    """Puts channels last, as a GPU's convolutions like them; on a CPU first.

    There oneDNN lays a convolution's inputs out as it likes them in either case, and all that lies between is faster.
    """
    last = unet.device.type != "cpu"
    unet.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def plain_attention(unet: Any, size: tuple[int, int]) -> None:
    """Matrix products for attention, on a CPU and of few tokens: there the fused kernel's backward is slow.

    Elsewhere they would not fit: of SDXL at 1024x1024, one layer's scores and their softmax are 0.7 GB in bf16.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if unet.device.type == "cpu" and max(size) <= MOST_PIXELS_OF_PLAIN_ATTENTION:
        unet.set_attn_processor(AttnProcessor())
