"""Numbered images to judge: what weights draw for seed + i, or what a data set holds.

Image i is the same whatever batch, process or order it is drawn in.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dmd2.data.images import ImageSet
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import Churn, conditioned, sample_few_step, sample_heun, teacher_sigmas
from dmd2.inference.engine import Engine
from dmd2.models.edm.folder import heun_steps, load_edm
from dmd2.models.edm.network import ClassCondition, RgbCodec
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import read_text, sha256_file
from dmd2.weights.manifest import MANIFEST, Manifest, read_manifest

TEXT_FAMILIES = "sdxl", "sd15"
DEFAULT_N = 50_000  # what FID is usually measured with


class Images(Protocol):
    """n images, by number."""

    n: int
    side: int
    """in pixels, the shorter one"""
    labels: list[int] | None
    """the class of each; None where there are no classes"""
    prompts: list[str] | None
    metadata: dict[str, Any]
    """what it takes to get the same ones again, for JSON"""

    def generate(self, rows: list[int]) -> Tensor:
        """The images with these numbers, uint8 (B, 3, H, W), on any device."""


class EdmSamples:
    """Samples of an EDM network: a teacher's by Heun's method, a student's in its own steps. In fp32.

    Image i starts from the noise of seed + i, and is of class i modulo the number of classes.

    Args:
        steps: of the teacher's sampler, or which student; None for what the manifest says.
        churn: of the teacher's sampler. Its noise comes from the same seeds.

    Raises:
        UserError: the weights are broken, or know no such steps.
    """

    def __init__(
        self, folder: Path, n: int, steps: str | None, seed: int, device: torch.device, churn: Churn | None = None
    ) -> None:
        manifest = read_manifest(folder)
        self.churn = churn
        self.n, self.seed, self.device = n, seed, device
        self.denoiser = load_edm(folder, device)
        config = self.denoiser.config
        self.side = config.resolution
        self.student, self.sigmas = self._plan(manifest, steps)
        if self.student and churn is not None:
            raise UserError("--churn: only of a teacher's sampler; these weights are a student")
        self.prompts: list[str] | None = None
        self.labels = [i % config.classes for i in range(n)] if config.classes else None
        self.metadata: dict[str, Any] = {
            "family": "edm",
            "sampler": "few-step" if self.student else "heun",
            "sigmas": self.sigmas,
            **({} if churn is None else {"churn": asdict(churn)}),
            "classes": config.classes,
            "dtype": "float32",
            "seeds": [seed, seed + n - 1],
            "weights_sha256": manifest.files["model.safetensors"],
        }

    def _plan(self, manifest: Manifest, steps: str | None) -> tuple[bool, list[float]]:
        """Is it a student, and the levels of its steps."""
        students = {str(count): student for count, student in manifest.students.items()}
        if students:
            chosen = students.get(steps or max(students))
            if chosen is None or not chosen.sigmas:
                raise UserError(f"--steps {steps}: this student has {', '.join(students)}")
            return True, list(chosen.sigmas)
        count = steps or str(manifest.teacher.steps if manifest.teacher else heun_steps(self.denoiser.config))
        if count == "teacher" and manifest.teacher:
            count = str(manifest.teacher.steps)
        if not count.isdecimal() or not 2 <= int(count) <= 10_000:
            raise UserError(f"--steps {steps}: expected 2 to 10000 steps of the teacher's sampler")
        return False, teacher_sigmas(self.denoiser, int(count))

    @torch.inference_mode()
    def generate(self, rows: list[int]) -> Tensor:
        config = self.denoiser.config
        classes = [-1] * len(rows) if self.labels is None else [self.labels[i] for i in rows]
        denoise = conditioned(self.denoiser, ClassCondition.of(torch.tensor(classes), config.classes).to(self.device))
        count = len(self.sigmas) if self.student else 1 if self.churn is None else 1 + len(self.sigmas)
        shape = (count, config.channels, config.resolution, config.resolution)
        noise = seeded_noise([self.seed + i for i in rows], shape, self.device)
        if self.student:
            x0 = sample_few_step(denoise, self.denoiser.start, noise.unbind(1), self.sigmas)
        else:
            highest = torch.full((len(rows),), self.sigmas[0], device=self.device)
            x0 = sample_heun(
                denoise, self.denoiser.start(noise[:, 0], highest), self.sigmas, noise[:, 1:].unbind(1), self.churn
            )
        return RgbCodec().decode(x0)


class TextSamples:
    """What a text-to-image model draws: image i for prompt i, with seed + i; after the last prompt the first again.

    Args:
        steps: a mode of `Engine`; None for the student with the most steps, or else the teacher.

    Raises:
        UserError: the weights are broken, or have no such mode.
    """

    def __init__(
        self, folder: Path, prompts: list[str], n: int, steps: str | None, seed: int, device: torch.device
    ) -> None:
        manifest = read_manifest(folder)
        self.n, self.seed, self.side = n, seed, min(manifest.native_size)
        self.labels: list[int] | None = None
        self.prompts: list[str] | None = [prompts[i % len(prompts)] for i in range(n)]
        self.mode = steps or (str(max(manifest.students)) if manifest.students else "teacher")
        self.engine = Engine(folder, device, modes=(self.mode,))
        self.metadata: dict[str, Any] = {
            "family": manifest.family,
            "sampler": self.mode,
            "size": list(manifest.native_size),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "seeds": [seed, seed + n - 1],
            "weights_sha256": self.engine.sha256(self.mode),
        }

    def generate(self, rows: list[int]) -> Tensor:
        assert self.prompts is not None
        return self.engine.generate([self.prompts[i] for i in rows], [self.seed + i for i in rows], self.mode)


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
            raise UserError(f"-n {n}: {path} holds {len(self._set)} images")
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
        for option, value in (("--steps", steps), ("--prompts", prompts), ("--churn", churn)):
            if value is not None:
                raise UserError(f"{option}: expected weights to draw with; {source} has no {MANIFEST}")
        return DataSet(source, n, side)
    family = read_manifest(source).family
    if family not in ("edm", *TEXT_FAMILIES):
        raise UserError(f"{source}: weights of the family {family!r}; expected edm, {' or '.join(TEXT_FAMILIES)}")
    if family == "edm":
        if prompts is not None:
            raise UserError(f"--prompts: {source} draws classes, not prompts")
        return EdmSamples(source, n or DEFAULT_N, steps, seed, device, churn)
    if churn is not None:
        raise UserError(f"--churn: only of an EDM teacher's sampler; {source} is of the family {family!r}")
    if prompts is None:
        raise UserError(f"--prompts: missing; {source} draws prompts: expected a text file with one a line")
    lines = read_prompts(prompts)
    return TextSamples(source, lines, n or len(lines), steps, seed, device)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError if there is none."""
    try:
        lines = [
            line.strip() for line in read_text(path).split("\n")
        ]  # not splitlines(), which cuts within some prompts
    except UserError as error:
        raise UserError(f"--prompts {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"--prompts {path}: is empty; expected one prompt a line")
    return prompts
