"""A loaded EDM model: where it is conditioned on classes, a prompt names one."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dmd2.diffusion.sampling import Callback, Churn, Denoise, sample_heun
from dmd2.models.edm.folder import load_edm
from dmd2.models.edm.network import ClassCondition, Edm, RgbCodec
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.placement import Placement, count_parameters, default_dtype
from dmd2.weights.manifest import Student, read_manifest

NO_CLASS = -1


class ClassEncoder:
    """Prompts to classes: "3", "cat" and "a photo of a cat" are the class 3 of CIFAR-10.

    Args:
        names: of the classes 0, 1, …; none if they have no names.
        classes: how many there are. With 0 every prompt is answered with an image of anything.
    """

    def __init__(self, names: Sequence[str], classes: int, device: torch.device) -> None:
        self.names, self.classes, self.device = list(names), classes, device
        self._patterns = [re.compile(rf"\b{re.escape(name)}(s|es)?\b", re.IGNORECASE) for name in names]

    def __call__(self, prompts: list[str], size: tuple[int, int]) -> ClassCondition:
        """B prompts → their classes. `size` says nothing to such a network.

        Raises:
            UserError: a prompt names no class, or more than one.
        """
        classes = torch.tensor([self.number(prompt) for prompt in prompts], dtype=torch.int64, device=self.device)
        return ClassCondition.of(classes, self.classes)

    def token_chunks(self, prompt: str) -> int:
        """Always 1: all prompts fit into one batch. Raises UserError unless `number` knows the prompt."""
        self.number(prompt)
        return 1

    count_tokens = token_chunks

    def unconditional(self, cond: ClassCondition, empty: Callable[[], ClassCondition]) -> ClassCondition:
        return cond.unconditional()

    def number(self, prompt: str) -> int:
        """The class that a prompt names; −1, for any, if there are no classes, or if the prompt is empty."""
        text = prompt.strip()
        if not self.classes or not text:
            return NO_CLASS
        if text.isascii() and text.isdigit():
            if len(text) > 9 or int(text) >= self.classes:
                raise InvalidInput("prompt", f"class {text[:20]}; expected 0 to {self.classes - 1}")
            return int(text)
        named = [number for number, pattern in enumerate(self._patterns) if pattern.search(text)]
        if len(named) != 1:
            known = f"one of {', '.join(self.names[:20])}, or " if self.names else ""
            what = "more than one class" if named else "no class"
            raise InvalidInput(
                "prompt", f"{text[:60]!r} names {what}; expected {known}a number from 0 to {self.classes - 1}"
            )
        return named[0]


class EdmModel:
    """See `dmd2.models.model.Model` and `FAMILIES`."""

    takes_prompts = False
    takes_churn = True

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
        self.manifest, self.placement, self.device = read_manifest(folder), Placement(), device
        dtype = dtype or default_dtype(device, count_parameters(folder, subfolders))
        # In fp16 EDM's networks overflow; bf16 is as fast.
        self.dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        self.denoisers = {".": load_edm(folder, device, self.dtype)}
        self.codec = self.preview_codec = RgbCodec()
        self.classes = self.denoisers["."].config.classes
        self.encode_text = ClassEncoder(self.manifest.class_names, self.classes, device)
        self._churn = churn

    def denoiser(self, subfolder: str) -> Edm:
        return self.denoisers["."]

    @property
    def size_unit(self) -> int:
        return self.manifest.native_size[0]

    def check_size(self, size: tuple[int, int]) -> None:
        native = self.manifest.native_size
        if size != native:
            raise InvalidInput(
                "width, height",
                f"{size[0]}x{size[1]}; these weights generate {native[0]}x{native[1]} pixels and no other size",
            )

    def check_takes_images(self) -> NoReturn:
        raise UserError("image, control_image, lora_weights: these weights generate classes and know nothing of them")

    def teacher_noises(self, steps: int) -> int:
        """Churn adds noise at each step."""
        return 1 if self._churn is None else 1 + steps

    def sample_teacher(
        self, denoise: Denoise, x: Tensor, noise: Tensor, sigmas: list[float], callback: Callback | None = None
    ) -> Tensor:
        return sample_heun(denoise, x, sigmas, noise.unbind(1), self._churn, callback)

    def use_loras(self, subfolder: str, student: Student | None, loras: Sequence[Any]) -> Hashable:
        if loras:
            self.check_takes_images()
        return ()

    def control(self, folder: Path) -> NoReturn:
        self.check_takes_images()
