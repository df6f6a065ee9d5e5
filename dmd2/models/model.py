"""What every loaded model answers, whatever its family, and the one table of families."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dmd2.diffusion.denoiser import Codec, Cond
from dmd2.diffusion.sampling import Callback, Denoise
from dmd2.models.adapters.control import ControlModel
from dmd2.models.adapters.lora import Loras
from dmd2.models.edm.model import EdmModel
from dmd2.models.stable_diffusion.model import StableDiffusionModel
from dmd2.runtime.errors import UserError, shown
from dmd2.runtime.placement import Placement
from dmd2.weights.manifest import MANIFEST, Manifest, Student, read_manifest


class PromptEncoder(Protocol):
    """Prompts to what a family's networks are conditioned on."""

    def __call__(self, prompts: list[str], size: tuple[int, int]) -> Cond:
        """B prompts, of equally many token chunks, for images of `size` (width, height) in pixels."""

    def token_chunks(self, prompt: str) -> int:
        """How many windows of the text encoder the prompt fills. Prompts of unequal numbers do not go into one batch.

        Raises:
            UserError: it is too long, or names nothing that the networks know.
        """

    def count_tokens(self, prompt: str) -> int:
        """How many tokens the prompt has; of what names a class 1. Raises as `token_chunks`."""

    def unconditional(self, cond: Any, empty: Callable[[], Any]) -> Cond:
        """What guidance leads away from, for the batch of `cond`; `empty` encodes the empty prompt."""


class Model(Protocol):
    """A folder of weights, loaded: all that the engine, the service and the evaluation ask of a family."""

    takes_prompts: bool
    """text-to-image; otherwise a prompt names a class"""
    takes_churn: bool
    """the teacher's sampler can add noise, see `Churn`"""

    classes: int
    """how many the networks know; 0 for none"""
    manifest: Manifest
    device: torch.device
    dtype: torch.dtype
    """what the networks compute in"""
    placement: Placement

    @property
    def codec(self) -> Codec: ...
    @property
    def preview_codec(self) -> Codec:
        """The codec for images that are not finished: quick rather than sharp."""

    @property
    def encode_text(self) -> PromptEncoder: ...
    @property
    def denoisers(self) -> Mapping[str, Any]:
        """By subfolder: those that were loaded so far."""

    def denoiser(self, subfolder: str) -> Any:
        """The `Denoiser` in a subfolder, loaded at its first use. Calls within its `recording()` prepare it for their
        shapes; if it `inpaints`, it must be told the mask and what is `known` of the image.

        Raises:
            UserError: it is missing or damaged.
        """

    @property
    def size_unit(self) -> int:
        """Pixels that suit every stage as a unit of width and height."""

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError unless width and height (pixels) suit the networks."""

    def check_takes_images(self) -> None:
        """Raises UserError unless images, masks, controls and LoRAs can be given beside a prompt."""

    def teacher_noises(self, steps: int) -> int:
        """How many unit noises `sample_teacher` takes for so many steps, the first to start from."""

    def sample_teacher(
        self, denoise: Denoise, x: Tensor, noise: Tensor, sigmas: list[float], callback: Callback | None = None
    ) -> Tensor:
        """x0 (B, C, h, w) by the teacher's own sampler.

        Args:
            x: (B, C, h, w), the first unit noise, scaled to sigmas[0].
            noise: (B, teacher_noises - 1, C, h, w), further unit noise.
            sigmas: descending, one a step.
        """

    def use_loras(self, subfolder: str, student: Student | None, loras: Loras) -> Hashable:
        """Has the network in `subfolder` and the text encoders carry these LoRAs, and the student's own, from now on.

        Returns:
            What tells apart the text encoders' states.

        Raises:
            UserError: a LoRA was made for another model. None is in use then.
        """

    def control(self, folder: Path) -> ControlModel:
        """A ControlNet or T2I-Adapter, loaded at its first use. Raises UserError if it is missing or damaged."""


FAMILIES: dict[str, type[StableDiffusionModel] | type[EdmModel]] = {
    "sdxl": StableDiffusionModel,
    "sd15": StableDiffusionModel,
    "edm": EdmModel,
}
"""Each is made of a folder of weights, the subfolders of denoisers that are loaded at once, the device, the dtype of
networks (None for what suits device and family), and

- fast: prepare networks for repeated calls, within their `recording()`;
- vae: "kl" for the folder's `vae`, "tiny" for its TAESDXL, "auto" for that on a CPU where it is there;
- churn: of the teacher's sampler, where the family `takes_churn`.

They raise UserError if a file is missing, damaged or not what the manifest says."""


def family_of(folder: Path) -> type[StableDiffusionModel] | type[EdmModel]:
    """The class of the model in a folder of weights; nothing is loaded.

    Raises:
        UserError: the manifest is missing or wrong, or names another family.
    """
    name = read_manifest(folder).family
    if name not in FAMILIES:
        raise UserError(f"{folder / MANIFEST}: family: {shown(name)}; expected sdxl, sd15 or edm")
    return FAMILIES[name]
