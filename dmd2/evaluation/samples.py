"""Numbered images to evaluate: what weights generate with seed + i, or what a data set holds.

Image i is the same whatever batch, process or order it is generated in.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.data.images import ImageSet
from dmd2.data.prompts import read_prompts
from dmd2.diffusion.sampling import Churn
from dmd2.inference.engine import Engine
from dmd2.inference.mode import Mode, default_mode
from dmd2.models.model import family_of
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.files import sha256_file
from dmd2.weights.manifest import MANIFEST, Manifest, read_manifest

DEFAULT_N = 50_000  # what FID is usually measured with


class Samples:
    """What weights generate: image i with seed + i, for prompt i or of class i, modulo their number.

    Class-conditional networks run in fp32.

    Args:
        steps: a mode of the weights, or where they have no student, any number of steps of the teacher's sampler;
            None for the student with the most steps, else the teacher.
        prompts: for text-to-image weights.
        churn: of an EDM teacher's sampler. Its noise comes from the same seeds.

    Raises:
        UserError: the weights are broken, or know no such steps.
    """

    def __init__(
        self,
        folder: Path,
        n: int,
        steps: str | None,
        seed: int,
        device: torch.device,
        prompts: list[str] | None = None,
        churn: Churn | None = None,
    ) -> None:
        manifest = read_manifest(folder)
        self.n, self.seed, self.side = n, seed, min(manifest.native_size)
        self.mode = _mode(manifest, steps)
        if self.mode.student and churn is not None:
            raise InvalidInput("churn", "only of a teacher's sampler; these weights are a student")
        dtype = torch.float32 if prompts is None else None
        self.engine = Engine(folder, device, dtype, modes=(self.mode,), churn=churn)
        self.sigmas = self.mode.sigmas(self.engine.model.denoiser(self.mode.subfolder))
        classes = self.engine.model.classes
        self.labels = [i % classes for i in range(n)] if classes else None
        self.prompts = None if prompts is None else [prompts[i % len(prompts)] for i in range(n)]
        about: dict[str, Any] = {"sampler": self.mode.name, "size": list(manifest.native_size)}
        if prompts is None:
            sampler = "few-step" if self.mode.student else "heun"
            about = {"sampler": sampler, "sigmas": self.sigmas, "classes": classes}
        self.metadata: dict[str, Any] = {
            "family": manifest.family,
            **about,
            **({} if churn is None else {"churn": asdict(churn)}),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "seeds": [seed, seed + n - 1],
            "weights_sha256": self.engine.sha256(self.mode),
        }

    def generate(self, rows: list[int]) -> Tensor:
        named = self.prompts or self.labels
        prompts = [str(named[i]) if named else "" for i in rows]
        return self.engine.generate(prompts, [self.seed + i for i in rows], self.mode)


def _mode(manifest: Manifest, steps: str | None) -> Mode:
    teacher = manifest.teacher
    if manifest.students or teacher is None or steps in (None, "teacher"):
        return Mode.parse(steps or default_mode(manifest), manifest)
    if not (steps or "").isdecimal() or not 2 <= int(steps or 0) <= 10_000:
        raise InvalidInput("steps", "expected 2 to 10000 steps of the teacher's sampler", steps)
    return Mode.of_teacher(manifest, int(steps or 0))


class DataSet:
    """Images in a zip or a folder, square or, with `side`, their central squares brought to `side` pixels.

    See `dmd2.data.images.ImageSet`, also for how classes are told.

    Args:
        n: how many of them, from the first; None for all.

    Raises:
        UserError: there are no or not enough images, or they or their labels are not as they should be.
    """

    def __init__(self, path: Path, n: int | None = None, side: int | None = None) -> None:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected weights, or images in a zip or a folder")
        self._set = ImageSet(path, side, fit=side is not None, in_memory=False)
        if n is not None and n > len(self._set):
            raise InvalidInput("n", f"{path} holds {len(self._set)} images", n)
        self.n, self.side = n or len(self._set), self._set.resolution
        self.labels: list[int] | None = None if self._set.labels is None else self._set.labels[: self.n].tolist()
        self.prompts: list[str] | None = None
        names = self._set.names[: self.n]
        self.metadata: dict[str, Any] = {
            "sha256": _sha256_of_folder(path, names) if path.is_dir() else sha256_file(path)
        }

    def generate(self, rows: list[int]) -> Tensor:
        return self._set.images(torch.tensor(rows))


def _sha256_of_folder(folder: Path, names: list[str]) -> str:
    """Of the lines "sha256  name" of its images, as `sha256sum` prints them."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{sha256_file(folder / name)}  {name}\n".encode())
    return digest.hexdigest()


Images = Samples | DataSet
"""n images by number, of `side` pixels (the shorter one), with `labels` or `prompts` where they have any; `metadata`
is what it takes to get the same ones again, for JSON"""


def open_images(
    source: Path,
    n: int | None,
    prompts: Path | None,
    steps: str | None,
    seed: int,
    device: torch.device,
    side: int | None = None,
    churn: Churn | None = None,
) -> Images:
    """What `dmd2 evaluate` judges: a folder of weights, or images in a folder or a zip.

    Args:
        n: how many; None for all that the data set or the prompts have, else 50,000.
        prompts: text, one prompt a line; for text-to-image weights only.
        side: see `DataSet`.
        churn: of an EDM teacher's sampler.

    Raises:
        UserError: it is none of these, or an option does not fit it.
    """
    if not (source / MANIFEST).is_file():
        for option, value in (("steps", steps), ("prompts", prompts), ("churn", churn)):
            if value is not None:
                raise InvalidInput(option, f"expected weights to generate with; {source} has no {MANIFEST}")
        return DataSet(source, n, side)
    family = family_of(source)
    if churn is not None and not family.takes_churn:
        raise InvalidInput("churn", f"only of an EDM teacher's sampler; {source} has another one")
    if not family.takes_prompts:
        if prompts is not None:
            raise InvalidInput("prompts", f"{source} takes classes, not prompts")
        return Samples(source, n or DEFAULT_N, steps, seed, device, churn=churn)
    if prompts is None:
        raise InvalidInput("prompts", f"missing; {source} takes prompts: expected a text file with one a line")
    lines = read_prompts(prompts)
    return Samples(source, n or len(lines), steps, seed, device, lines)
