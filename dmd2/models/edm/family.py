"""EDM's networks as a `Family`: pixels, conditioned on classes or on nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.diffusion import draws
from dmd2.diffusion.sampling import conditioned, sample_heun, teacher_sigmas
from dmd2.models.adapters.lora_training import LoraShape
from dmd2.models.edm.folder import WEIGHTS_FILE, heun_steps, load_edm, save_edm
from dmd2.models.edm.layers import Block
from dmd2.models.edm.network import ClassCondition, Edm, EdmConfig, EdmNetwork, RgbCodec
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.precision import Precision, training_dtype
from dmd2.weights.manifest import Teacher, read_manifest

P_MEAN, P_STD = -1.2, 1.2  # ln σ ~ N(P_mean, P_std²) (Karras et al. 2022, table 1)


class EdmFamily:
    """See `dmd2.models.family.Family`."""

    takes_classes, guidance_scale = True, 1.0
    codec = RgbCodec()
    frozen_in_gdd_i = re.compile(r"\.(conv\d+|proj)\.(weight|bias)$")
    """convolutions and attention's last layer within blocks, not the network's first and last convolution"""

    def __init__(
        self,
        network: EdmNetwork,
        name: str,
        licence: str,
        class_names: Sequence[str],
        dtype: torch.dtype,
        sha256: str = "",
    ) -> None:
        self.name, self.origin, self.licence, self.class_names = name, name, licence, class_names
        self.config, self.teacher_network, self.dtype, self.sha256 = network.config, network, dtype, sha256
        network.dtype = dtype
        self.teacher = Edm(network)
        self.device, self.classes = self.teacher.device, self.config.classes
        self.sample_steps = heun_steps(self.config)
        self.shape = (self.config.channels, self.config.resolution, self.config.resolution)
        multiples = self.config.channel_mult
        self.bottleneck = self.config.model_channels * multiples[-1], self.config.resolution >> (len(multiples) - 1)

    @classmethod
    def open(cls, folder: Path, device: torch.device, precision: Precision) -> EdmFamily:
        manifest = read_manifest(folder)
        if manifest.students:
            raise UserError(f"{folder}: a student of {max(manifest.students)} steps; expected a teacher")
        network = load_edm(folder, device).network
        dtype = training_dtype(precision, device)
        return cls(
            network, manifest.name, manifest.licence, manifest.class_names, dtype, manifest.files[WEIGHTS_FILE]
        )

    @classmethod
    def new(
        cls, config: EdmConfig, name: str, class_names: Sequence[str], device: torch.device, precision: Precision
    ) -> EdmFamily:
        """An untrained network, initialised from torch's seed."""
        licence = "not stated: trained on data of your own choice"
        dtype = training_dtype(precision, device)
        return cls(EdmNetwork(config, dtype).to(device), name, licence, class_names, dtype)

    def student(
        self, levels: Sequence[float], *, boundary: float, subfolder: str | None, start: Path | None
    ) -> EdmNetwork:
        if subfolder is not None:
            raise InvalidInput("student_init", "expected null; an EDM teacher's folder holds no student", subfolder)
        if boundary and self.config.preconditioning != "edm":
            told = f"expected 0; {self.name} has the preconditioning {self.config.preconditioning}"
            raise InvalidInput("boundary", told, f"{boundary:g}")
        network = deepcopy(self.teacher_network) if start is None else load_edm(start, self.device).network
        wanted = self.config.model_copy(
            update={"sigmas": tuple(levels), "boundary": boundary or self.config.boundary}
        )
        if start is not None and network.config != wanted:
            raise InvalidInput("student", f"expected a student of {self.name} at σ {tuple(levels)}", start)
        network.config, network.dtype = EdmConfig.model_validate(wanted.model_dump()), self.dtype
        return network.requires_grad_(True).train()

    def fake_score(self, start: Path | None) -> EdmNetwork:
        network = deepcopy(self.teacher_network) if start is None else load_edm(start, self.device).network
        if network.config != self.config:
            raise InvalidInput("student", f"{start} is not of the structure of {self.name}")
        network.dtype = self.dtype
        return network.requires_grad_(True).train()

    def adapter(self, name: str, shape: LoraShape, levels: Sequence[float], start: Path | None) -> EdmNetwork:
        raise InvalidInput("adapter", "expected full; LoRAs are for Stable Diffusion's networks", "lora")

    def lighten(self, *, half: bool, checkpoints: Sequence[Any]) -> None:
        if half or checkpoints:
            raise InvalidInput("checkpointing", "expected false; it is for Stable Diffusion's networks", "true")

    def denoiser(self, network: EdmNetwork, compile: bool = False) -> Edm:
        return Edm(network, compile=compile)

    def sigmas(self, timesteps: Sequence[int], sigmas: Sequence[float]) -> tuple[float, ...]:
        if timesteps:
            raise InvalidInput("timesteps", "expected [], and sigmas instead: this teacher's levels are σ")
        return tuple(sigmas)

    def condition(self, labels: Tensor, network: Any = None) -> ClassCondition:
        return ClassCondition.of(labels, self.classes).to(self.device)

    def unconditional(self, cond: ClassCondition) -> ClassCondition:
        return cond.unconditional()

    def embedded(self, rows: Mapping[str, Tensor]) -> ClassCondition:
        raise InvalidInput("set", f"{self.name} takes classes, not texts; expected data=images", "data=latents")

    def any_labels(self, n: int) -> Tensor:
        return torch.full((n,), -1)

    gathered = None  # the embedding is fp32

    def blocks(self, network: EdmNetwork) -> list[nn.Module]:
        return [module for module in network.modules() if isinstance(module, Block)]

    def encoder_levels(self) -> list[nn.Module]:
        return encoder_levels(self.teacher_network)

    def to_rgb(self, x0: Tensor) -> Tensor:
        return x0

    def trainable(self) -> EdmNetwork:
        return self.teacher_network.requires_grad_(True).train()

    def sample_sigma(self, n: int, generator: torch.Generator) -> Tensor:
        """Log-normal (Karras et al. 2022, table 1)."""
        return (draws.randn((n,), generator) * P_STD + P_MEAN).exp().to(self.device)

    def rgb(self, decoder: str, one_by_one: bool) -> Callable[[Tensor], Tensor]:
        if decoder != "kl":
            raise InvalidInput("decoder", "expected kl, as for all teachers of pixels", decoder)
        return self.to_rgb

    def sample(
        self,
        denoiser: Any,
        cond: ClassCondition,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        solver: str = "teacher",
    ) -> Tensor:
        """Heun's method (Karras et al. 2022, algorithm 1)."""
        if solver != "teacher":
            raise InvalidInput("solver", "expected teacher: Heun's method is what EDM's pairs are made by", solver)
        sigmas = teacher_sigmas(denoiser, steps)
        start = denoiser.scale_initial_noise(noise, torch.full((len(noise),), sigmas[0], device=noise.device))
        return sample_heun(conditioned(denoiser, cond, cond.unconditional(), guidance_scale), start, sigmas)

    def _save(
        self, out: Path, network: EdmNetwork, name: str, recipe: Any, card: str, teacher: Teacher | None = None
    ) -> None:
        about: dict[str, Any] = {"licence": self.licence, "class_names": self.class_names, "teacher": teacher}
        save_edm(out, network, name=name, recipe=recipe, card=card, **about)

    def save_student(
        self, out: Path, network: EdmNetwork, levels: Sequence[float], kind: str, recipe: Any, card: str
    ) -> None:
        self._save(out, network, f"{self.name}-{kind}", recipe, card)

    def save_fake_score(self, out: Path, network: EdmNetwork, kind: str, recipe: Any, card: str) -> None:
        self._save(out, network, f"{self.name}-{kind}-fake-score", recipe, card)

    def save_teacher(
        self, out: Path, network: EdmNetwork, steps: int, guidance_scale: float, recipe: Any, card: str
    ) -> None:
        teacher = Teacher(subfolder=".", steps=steps, guidance_scale=guidance_scale)
        self._save(out, network, self.name, recipe, card, teacher)


def encoder_levels(network: nn.Module) -> list[nn.Module]:
    """The last block of each resolution of an EDM network's encoder, finest first."""
    last: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        parts = name.split(".")
        if len(parts) >= 2 and parts[-2] == "enc" and "_block" in parts[-1]:
            last[parts[-1].split("_")[0]] = module
    if not last:
        raise ValueError("network: expected an EDM network, whose encoder's blocks are enc.{R}x{R}_block{i}")
    return list(last.values())
