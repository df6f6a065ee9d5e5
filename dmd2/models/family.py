"""What training asks of a family of networks: one object is one teacher, opened.

`stable_diffusion/family.py` and `edm/family.py` answer. A family says how its networks are made, conditioned, sampled
and saved; it knows no method, and no method knows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Codec, Cond, Denoiser
from dmd2.models.adapters.lora_training import LoraShape
from dmd2.runtime.precision import Precision
from dmd2.weights.manifest import read_manifest

TEACHERS = "teacher"
SOLVERS = (TEACHERS, "pndm", "euler-trailing")
"""how pairs are made: by the teacher's own sampler, Stable Diffusion's PLMS, Euler on SDXL's trailing timesteps"""

Labels = Any
"""what images are asked for by: captions (or what they were encoded to), or int64 (B,) classes with −1 for any"""


class Family(Protocol):
    """One teacher of the family. Images are (B, C, h, w) in its x0 space: latents or pixels."""

    name: str
    origin: str
    """how a model card names the teacher"""
    licence: str
    shape: tuple[int, int, int]
    """of one image: C, h, w"""
    classes: int
    """0 where there are none, or text takes their place"""
    takes_classes: bool
    """or nothing; else captions"""
    sample_steps: int
    guidance_scale: float
    """of the teacher's samples"""
    sha256: str
    """of the teacher's weights; empty where they are new"""
    bottleneck: tuple[int, int]
    """channels and side of the activations that `Denoiser.features` returns"""
    frozen_in_gdd_i: re.Pattern[str]
    """the parameters that GDD-I leaves as the teacher has them, by name"""

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def teacher(self) -> Denoiser:
        """Frozen, never compiled."""

    @property
    def teacher_network(self) -> Any:
        """What `teacher` runs."""

    def student(self, levels: Sequence[float], *, boundary: float, subfolder: str | None, start: Path | None) -> Any:
        """A network to train: the teacher's weights, those in a `subfolder` of its folder, or of the run `start`.

        Args:
            levels: timesteps or σ of its steps.
            boundary: ε of GDD's preconditioning (app. C); 0 for the teacher's own.
        """

    def fake_score(self, start: Path | None) -> Any:
        """A network to train: the teacher's weights, or those in the folder `start` that a run exported."""

    def adapter(self, name: str, shape: LoraShape, levels: Sequence[float], start: Path | None) -> Any:
        """A LoRA to train on the teacher's network, which stays frozen, as a network of its own.

        Args:
            name: no other adapter's.
            levels: for a student, as in `student`; none for a fake score.
            start: what it goes on from: a student's folder of weights, or that of a fake score that a run exported.

        Raises:
            UserError: such a family has no LoRAs; `start` is not of this shape.
        """

    def lighten(self, *, half: bool, checkpoints: Sequence[Any]) -> None:
        """Less memory: the frozen teacher in the dtype that networks run in, if `half`; and the networks in
        `checkpoints` keep no activations within their blocks, which run again in backward.

        Raises:
            UserError: the family cannot do without.
        """

    def denoiser(self, network: Any, compile: bool = False) -> Denoiser:
        """One of these networks as x0(x, σ, cond)."""

    def sigmas(self, timesteps: Sequence[int], sigmas: Sequence[float]) -> tuple[float, ...]:
        """The σ of a student's steps. Raises UserError where the family counts otherwise."""

    def condition(self, labels: Labels, network: Any = None) -> Cond:
        """What labels are to the networks; by the text encoders in `network`, where these are trained, too."""

    def unconditional(self, cond: Cond) -> Cond:
        """What guidance leads away from, for as many images."""

    def embedded(self, rows: Mapping[str, Tensor]) -> Cond:
        """What rows of `dmd2 data prompts` or `latents` are to the networks. Raises UserError if they do not fit."""

    def any_labels(self, n: int) -> Labels:
        """Labels that leave everything open."""

    @property
    def gathered(self) -> torch.dtype | None:
        """What shards of these networks may be gathered in; None for their own type."""
        ...

    def blocks(self, network: Any) -> list[nn.Module]:
        """The parts of one of these networks that are gathered, or computed anew in the backward pass, one by one."""
        ...

    def encoder_levels(self) -> list[nn.Module]:
        """The last block of each resolution of the teacher's encoder, finest first."""

    def to_rgb(self, x0: Tensor) -> Tensor:
        """fp32 (B, 3, H, W) in about [−1, 1], differentiable."""

    def trainable(self) -> Any:
        """What a teacher's training moves: the network, or all of them where text encoders learn, too."""

    def sample_sigma(self, n: int, generator: torch.Generator) -> Tensor:
        """(n,) noise levels to train a teacher on."""

    def rgb(self, decoder: str, one_by_one: bool) -> Callable[[Tensor], Tensor]:
        """As `to_rgb`, by the "kl" or the "tiny" VAE. Raises UserError if the teacher has none such.

        `one_by_one`: what is inside a decoder is in memory for one image at a time, and computed again in backward.
        """

    def sample(
        self, denoiser: Denoiser, cond: Cond, noise: Tensor, steps: int, guidance_scale: float, solver: str = TEACHERS
    ) -> Tensor:
        """x0 by a deterministic sampler, from unit noise (B, C, h, w): the teacher's own, or that of a published run.

        Raises:
            UserError: the family has no such `solver`.
        """

    def save_student(
        self, out: Path, network: Any, levels: Sequence[float], kind: str, recipe: Any, card: str
    ) -> None:
        """Writes a folder that `dmd2 generate --weights` takes. `levels` as for `student`; `recipe` is a dict."""

    def save_fake_score(self, out: Path, network: Any, kind: str, recipe: Any, card: str) -> None:
        """Writes a folder that `fake_score` reads."""

    def save_teacher(
        self, out: Path, network: Any, steps: int, guidance_scale: float, recipe: Any, card: str
    ) -> None:
        """Writes a folder of weights with what `trainable` has become."""


def open_family(folder: Path, device: torch.device, precision: Precision, host: torch.device | None = None) -> Family:
    """The teacher in a folder of weights.

    Args:
        host: where the VAE is, for data that were encoded before; text encoders are loaded to it only if they are
            needed. None: all are on `device`.

    Raises:
        UserError: there is none.
    """
    if read_manifest(folder).family == "edm":
        from dmd2.models.edm.family import EdmFamily

        return EdmFamily.open(folder, device, precision)
    from dmd2.models.stable_diffusion.family import StableDiffusionFamily

    return StableDiffusionFamily.open(folder, device, precision, host)


def export_weights(folder: Path, out: Path, steps: int | None) -> None:
    """Writes a student as one file with the names of DMD2's release.

    Of Stable Diffusion's that is the UNet in fp16 by diffusers' names, or the LoRA; of EDM's the network by EDM's.

    Args:
        out: `.safetensors`, or `.bin` as torch writes it.
        steps: of the student; None for the one with the most.

    Raises:
        UserError: there is no such student; `out` exists or cannot be written.
    """
    if read_manifest(folder).family == "edm":
        from dmd2.models.edm.published import export_edm

        return export_edm(folder, out)
    from dmd2.models.stable_diffusion.students import export_student

    return export_student(folder, out, steps)
