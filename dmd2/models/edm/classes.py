"""A class-conditional EDM network in the place of a text-to-image model: a prompt names a class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dmd2.models.edm.folder import load_edm
from dmd2.models.edm.network import ClassCondition, Edm, RgbCodec
from dmd2.runtime.errors import UserError
from dmd2.weights.manifest import Manifest, read_manifest

NO_CLASS = -1


class ClassEncoder:
    """Prompts to classes: "3", "cat" and "a photo of a cat" are the class 3 of CIFAR-10.

    Args:
        names: of the classes 0, 1, …; none if they have no names.
        classes: how many there are. With 0 every prompt is answered with a picture of anything.
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

    def windows(self, prompt: str) -> int:
        """All prompts fit into one batch."""
        return 1

    def number(self, prompt: str) -> int:
        """The class that a prompt names; −1, for any, if there are no classes, or if the prompt is empty."""
        text = prompt.strip()
        if not self.classes or not text:
            return NO_CLASS
        if text.isascii() and text.isdigit():
            if len(text) > 9 or int(text) >= self.classes:
                raise UserError(f"prompt: class {text[:20]}; expected 0 to {self.classes - 1}")
            return int(text)
        named = [number for number, pattern in enumerate(self._patterns) if pattern.search(text)]
        if len(named) != 1:
            known = f"one of {', '.join(self.names[:20])}, or " if self.names else ""
            what = "more than one class" if named else "no class"
            raise UserError(
                f"prompt: {text[:60]!r} names {what}; expected {known}a number from 0 to {self.classes - 1}"
            )
        return named[0]


@dataclass(frozen=True)
class ClassToImage:
    """What `TextToImage` is for prompts: everything that turns classes into images."""

    manifest: Manifest
    encode_text: ClassEncoder
    codec: RgbCodec
    denoisers: dict[str, Edm]
    """by subfolder: "." alone"""


def load_class_to_image(
    folder: Path, subfolders: Iterable[str], device: torch.device, dtype: torch.dtype, *, trace: bool = False
) -> ClassToImage:
    """The EDM network in `folder`, frozen. Takes what `load_text_to_image` takes; there is nothing to choose.

    Raises:
        UserError: a file is missing, damaged or not what it should be.
    """
    manifest = read_manifest(folder)
    # In fp16 EDM's networks overflow; bf16 is as fast.
    denoiser = load_edm(folder, device, torch.bfloat16 if dtype == torch.float16 else dtype)
    encoder = ClassEncoder(manifest.class_names, denoiser.config.classes, device)
    return ClassToImage(manifest, encoder, RgbCodec(), {".": denoiser})
