"""Prompts in, images out: loads a folder of weights once and draws with its students or its teacher."""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import (
    Churn,
    Denoise,
    conditioned,
    sample_dpm_solver_2m,
    sample_heun,
    teacher_sigmas,
    timesteps_for_strength,
)
from dmd2.inference.conditioning import TEXT_TO_IMAGE, ImageConditioning
from dmd2.models.edm.classes import ClassToImage, load_class_to_image
from dmd2.models.edm.network import ClassCondition, Edm
from dmd2.models.stable_diffusion.adapters import TINY, Adapters
from dmd2.models.stable_diffusion.folder import TextToImage, load_denoisers, load_text_to_image
from dmd2.models.stable_diffusion.text import TextCondition
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.compiled import save_kernels
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import read_object
from dmd2.runtime.memory import LARGE, peak_memory
from dmd2.runtime.placement import Placement, count_parameters, default_dtype, place, prefers_gpu
from dmd2.weights.manifest import DEFAULT, Manifest, Student, read_manifest

TEXT_CACHE = 256_000_000

Condition = TextCondition | ClassCondition
Preview = Callable[[int, list[int], Tensor], object]
"""Is told the number of steps done, which of a call's images these are, and what they look like so far: uint8
(B, 3, H, W) on the CPU."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage of a call took."""

    text: float
    denoise: float
    decode: float

    def __add__(self, other: Timings) -> Timings:
        return Timings(self.text + other.text, self.denoise + other.denoise, self.decode + other.decode)


def go_on() -> None:
    """What a call that nobody cancels asks between two steps."""


@dataclass
class Engine:
    """Draws images from one folder of weights: Stable Diffusion's from prompts, EDM's from the classes they name.

    Modes: "1", "4" (any number of steps that the manifest lists) are the students; "teacher" is the teacher with
    its own sampler and guidance; "teacher-4" is the undistilled teacher, guided, put through the sampler of the
    4-step student: what distillation must beat. Networks are loaded at their first use.

    Args:
        folder: weights in diffusers' layout with a `dmd2.json`.
        device: "cpu", "cuda" or "auto" (cuda where there is one).
        dtype: of networks; by default see `dmd2.runtime.placement.default_dtype`.
        trace: `warm_up` records networks for repeated calls: on a GPU they are compiled (see `dmd2.runtime.placement`
            for the variables that say how), on a CPU small ones are traced, which makes them about 1.3 times as fast.
        modes: to load at once, so that a broken file is an error now and the first image is fast.
        vae: "kl" decodes with the folder's `vae`, whatever that is; "tiny" with its TAESDXL: a twentieth of the work,
            and less sharp.
        churn: noise that the sampler of an EDM teacher adds, by the images' seeds; None for none.
        text_cache: bytes of encoded prompts that are remembered on the device, at most.
    """

    folder: Path = DEFAULT
    device: torch.device | str = "auto"
    dtype: torch.dtype | None = None
    modes: tuple[str, ...] = ()
    trace: bool = False
    vae: str = "kl"
    churn: Churn | None = None
    text_cache: int = TEXT_CACHE
    _encoders: Hashable = field(default=(), init=False)
    """what LoRAs have made of the text encoders"""
    _texts: OrderedDict[tuple[str, Hashable], Condition] = field(default_factory=OrderedDict, init=False)
    _text_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.device = resolve_device(self.device)
        self.manifest = read_manifest(self.folder)
        subfolders = list(dict.fromkeys(self._plan(mode)[0] for mode in self.modes))
        parameters = count_parameters(self.folder, subfolders)
        self.dtype = self.dtype or default_dtype(self.device, parameters)
        if self.churn is not None and (
            self.manifest.family != "edm" or any(mode != "teacher" for mode in self.modes)
        ):
            raise UserError("--churn: only of an EDM teacher's sampler; expected its weights and --steps teacher")
        self.placement = Placement()
        self.model: TextToImage | ClassToImage
        self._solve: Callable[..., Tensor] = sample_dpm_solver_2m
        if self.manifest.family == "edm":
            self.model, self._solve = (
                load_class_to_image(self.folder, subfolders, self.device, self.dtype),
                sample_heun,
            )
            return
        width, height = self.manifest.native_size
        self.placement = place(parameters, self.device, self.dtype, width * height, fast=self.trace)
        self.trace = self.trace and self.device.type == "cpu" and max(parameters.values(), default=0) < LARGE
        self.model = load_text_to_image(
            self.folder,
            subfolders,
            self.device,
            self.dtype,
            trace=self.trace,
            placement=self.placement,
            vae=vae_folder(self.folder, self.vae),
        )
        self.adapters = Adapters(self.folder, self.model, self.device, self.dtype, self.placement)

    def sha256(self, mode: str) -> str:
        """The checksum of the UNet that `mode` runs."""
        prefix = f"{self._plan(mode)[0]}/"
        return next(
            (v for k, v in self.manifest.files.items() if k.startswith(prefix) and k.endswith(".safetensors")),
            "",
        )

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError unless width and height (pixels) suit the networks."""
        if isinstance(self.model, ClassToImage):
            if size != self.manifest.native_size:
                native = "x".join(map(str, self.manifest.native_size))
                raise UserError(
                    f"width, height: {size[0]}x{size[1]}; these weights draw {native} pixels and no other size"
                )
            return
        factor = self.model.codec.factor
        for name, side in zip(("width", "height"), size, strict=True):
            if side < self.size_unit or side % factor:
                raise UserError(
                    f"{name}: {side} (size {size[0]}x{size[1]}); expected a multiple of {factor} pixels, "
                    f"at least {self.size_unit}"
                )

    @property
    def draws_prompts(self) -> bool:
        """Whether these weights are text-to-image; else they draw classes."""
        return not isinstance(self.model, ClassToImage)

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError if one is too long, or names nothing that a class-conditional network knows."""
        for prompt in prompts:
            if isinstance(self.model, ClassToImage):
                self.model.encode_text.number(prompt)
            else:
                self.model.encode_text.windows(prompt)

    @property
    def size_unit(self) -> int:
        """Pixels. Sides that are multiples of it are halved without remainder on their way down the UNet."""
        if isinstance(self.model, ClassToImage):
            return self.manifest.native_size[0]
        config = next(iter(self.model.denoisers.values())).unet.config if self.model.denoisers else None
        halvings = 0 if config is None else len(config.block_out_channels) - 1
        return self.model.codec.factor * 2**halvings

    def warm_up(self, modes: tuple[str, ...], sizes: list[tuple[int, int]], batch: int = 2) -> None:
        """Draws once in each mode and size, so that no later call is the first of its kind.

        With `trace`, this is where networks are recorded. Calls of other modes and sizes run the networks as they
        are. On a CPU a record serves every batch size, and an image is the same to ±2 of 255 either way. On a GPU
        networks are compiled for one image and for `batch` images, and other batches are put together from these.
        """
        began = time.perf_counter()
        for mode in modes:
            denoiser = self._denoiser(self._plan(mode)[0])
            for size in sizes:  # "0" is a prompt to any family
                logger.info("warm-up: %s steps at %dx%d (%.0f s so far)", mode, *size, time.perf_counter() - began)
                with denoiser.recording():
                    for prompts in self._rehearsal(mode, size, batch):
                        self.generate(prompts, list(range(len(prompts))), mode, size)
                # A record's first two runs are slow: torch watches the one and rewrites the record for the other.
                for _ in range(2):
                    self.generate(["0"], [0], mode, size)
        if self.placement.compiler is not None and self.placement.kernels is not None:
            save_kernels(self.placement.kernels)
        assert isinstance(self.device, torch.device)
        seconds, peak = time.perf_counter() - began, peak_memory(self.device) / 1e9
        logger.info("warm-up: %.1f s; memory: %s, peak %.1f GB", seconds, self.placement.plan.mode, peak)

    def _rehearsal(self, mode: str, size: tuple[int, int], batch: int) -> list[list[str]]:
        """Batches of prompts to record with."""
        if self.placement.compiler is None:
            return [["", "0"]]
        # Prompts that are new each time: the text encoders are recorded, too, for as many as are new.
        name = f"{mode} {size}"
        return [[name], [f"{name} {i}" for i in range(batch)]] if batch > 1 else [[name]]

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        mode: str = "4",
        size: tuple[int, int] | None = None,
        edit: ImageConditioning = TEXT_TO_IMAGE,
    ) -> Tensor:
        """One batch: B prompts and seeds → uint8 (B, 3, H, W) on the CPU. `size` is (width, height) in pixels."""
        return self.generate_timed(prompts, seeds, mode, size, edit=edit)[0]

    @torch.inference_mode()
    def generate_timed(
        self,
        prompts: list[str],
        seeds: list[int],
        mode: str = "4",
        size: tuple[int, int] | None = None,
        check: Callable[[], None] = go_on,
        edit: ImageConditioning = TEXT_TO_IMAGE,
        preview: Preview | None = None,
    ) -> tuple[Tensor, Timings]:
        """As `generate`, with the time that each stage took.

        `check` is called before each step of a student; what it raises ends the call. `preview` is called after each
        of its steps but the last, and takes the time of a decoding.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"expected as many seeds as prompts, at least one, not {len(prompts)}, {len(seeds)}")
        subfolder, student = self._plan(mode)
        self._denoiser(subfolder)
        size = size or self.manifest.native_size
        self.check_size(size)
        self._check_edit(mode, size, edit)
        began = time.perf_counter()
        own = None if mode.startswith("teacher") else student
        if not isinstance(self.model, ClassToImage):
            self._encoders = self.adapters.use_loras(subfolder, own, edit.loras)
        conditions: list[Any] = self._conditions(prompts, size)
        timings = Timings(time.perf_counter() - began, 0.0, 0.0)
        # Prompts of one window and of several do not fit into one tensor, and padding would change the images.
        samples: dict[int, Tensor] = {}
        for length in sorted({c.length for c in conditions}):
            rows = [i for i, c in enumerate(conditions) if c.length == length]
            cond = conditions[rows[0]].cat(*(conditions[i] for i in rows[1:]))
            shown = None if preview is None else partial(_of_rows, preview, rows)
            images, taken = self._generate(cond, [seeds[i] for i in rows], mode, size, check, edit, shown)
            samples |= dict(zip(rows, images, strict=True))
            timings += taken
        return torch.stack([samples[i] for i in range(len(prompts))]), timings

    def _check_edit(self, mode: str, size: tuple[int, int], edit: ImageConditioning) -> None:
        if isinstance(self.model, ClassToImage) and edit is not TEXT_TO_IMAGE:
            raise UserError("image, control_image, lora_weights: these weights draw classes and know nothing of them")
        if mode == "teacher" and edit.images:
            raise UserError("--steps teacher: takes no image and no control; expected a student's steps")
        edit.check_size(size)
        if edit.control is not None:
            self.adapters.control(edit.control)  # before anything is computed

    def _generate(
        self,
        cond: Any,
        seeds: list[int],
        mode: str,
        size: tuple[int, int],
        check: Callable[[], None],
        edit: ImageConditioning,
        preview: Callable[[int, Tensor], object] | None,
    ) -> tuple[Tensor, Timings]:
        subfolder, student = self._plan(mode)
        denoiser: Any = self._denoiser(subfolder)
        codec: Any = self.model.codec
        timesteps = [] if student is None else timesteps_for_strength(student.timesteps, edit.strength)
        sigmas = [float(denoiser.sigmas[t]) for t in timesteps]
        if student is not None and student.sigmas:
            sigmas = student.sigmas
        began = time.perf_counter()
        levels = len(sigmas)
        if self.churn is not None and mode == "teacher":
            assert self.manifest.teacher is not None
            levels = 1 + self.manifest.teacher.steps
        shape = (max(1, levels), codec.channels, size[1] // codec.factor, size[0] // codec.factor)
        noise = seeded_noise(seeds, shape, denoiser.device)

        def each_step() -> Iterator[Tensor]:
            for step_noise in noise.unbind(1):
                check()
                yield step_noise

        inpaints = isinstance(denoiser, StableDiffusion) and denoiser.inpaints
        network: Any = partial(denoiser, known=edit.known(codec, size)) if inpaints else denoiser
        if mode == "teacher":
            x0 = self._teach(denoiser, network, cond, self._no_text(cond, size), noise)
        else:
            scale = 1.0
            if mode.startswith("teacher"):
                assert self.manifest.teacher is not None
                scale = self.manifest.teacher.guidance_scale
            if edit.control is not None and edit.control_image is not None:
                model = self.adapters.control(edit.control)
                control = model.guide(edit.control_image, timesteps, edit.control_scale)
                network = partial(network, control=control)
            uncond = None if scale == 1 else self._no_text(cond, size)
            denoise = conditioned(network, cond, uncond, scale)
            if preview is not None:
                denoise = self._shown(denoise, len(sigmas), preview)
            x0 = edit.sample(denoise, denoiser.start, codec, each_step(), sigmas, denoiser.device, inpaints=inpaints)
        denoised = self._clock()
        images = edit.finish(codec.decode(x0).cpu())
        return images, Timings(0.0, denoised - began, time.perf_counter() - denoised)

    def _shown(self, denoise: Denoise, steps: int, preview: Callable[[int, Tensor], object]) -> Denoise:
        done = 0
        codec: Any = self.model.codec if isinstance(self.model, ClassToImage) else self.adapters.preview

        def shown(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal done
            x0, done = denoise(x, sigma), done + 1
            if done < steps:
                preview(done, codec.decode(x0).cpu())
            return x0

        return shown

    def _no_text(self, cond: Any, size: tuple[int, int]) -> Any:
        """What guidance leads away from: SD 1.5 was trained with an empty prompt there, SDXL with zeros."""
        if self.manifest.family != "sd15":
            return cond.unconditional()
        empty: Any = self._conditions([""], size)[0]
        return TextCondition(empty.context.repeat(len(cond), cond.length // empty.length, 1))

    def recover(self) -> None:
        """After an error: gives back what memory it held. Raises whatever the device raises if it is gone."""
        assert isinstance(self.device, torch.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _teach(self, denoiser: StableDiffusion | Edm, network: Any, cond: Any, uncond: Any, noise: Tensor) -> Tensor:
        assert self.manifest.teacher is not None
        sigmas = teacher_sigmas(denoiser, self.manifest.teacher.steps)
        start = denoiser.start(noise[:, 0], torch.full((len(noise),), sigmas[0], device=noise.device))
        scale = self.manifest.teacher.guidance_scale
        denoise = conditioned(network, cond, uncond, scale)
        if self.churn is not None:
            return sample_heun(denoise, start, sigmas, noise[:, 1:].unbind(1), self.churn)
        return self._solve(denoise, start, sigmas)

    def _clock(self) -> float:
        if isinstance(self.device, torch.device) and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _plan(self, mode: str) -> tuple[str, Student | None]:
        """mode → (subfolder, the student through whose steps it goes); None for the teacher's own sampler."""
        valid = modes_of(self.manifest)
        if mode not in valid:
            raise UserError(f"--steps {mode}: these weights have {', '.join(valid) or 'no student'}")
        steps = mode.removeprefix("teacher").removeprefix("-")
        student = self.manifest.students[int(steps)] if steps else None
        if mode.startswith("teacher"):
            assert self.manifest.teacher is not None
            return self.manifest.teacher.subfolder, student
        assert student is not None
        return student.subfolder, student

    def _denoiser(self, subfolder: str) -> StableDiffusion | Edm:
        if subfolder not in self.model.denoisers:
            assert isinstance(self.device, torch.device) and self.dtype is not None
            denoisers: Any = self.model.denoisers
            denoisers |= load_denoisers(
                self.folder, [subfolder], self.device, self.dtype, trace=self.trace, placement=self.placement
            )
        return self.model.denoisers[subfolder]

    def _conditions(self, prompts: list[str], size: tuple[int, int]) -> list[Condition]:
        """Text conditions, remembered for the prompts used last. New ones of equal length are encoded together."""
        now = size, self._encoders
        new: dict[int, list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            if (prompt, now) not in self._texts:
                new.setdefault(self.model.encode_text.windows(prompt), []).append(prompt)
        for group in new.values():
            encoded = self.model.encode_text(group, size)
            for i, prompt in enumerate(group):
                # A copy: a view would keep all of the batch in memory for as long as one of it is remembered.
                self._texts[prompt, now] = encoded[[i]]
                self._text_bytes += _bytes(prompt, self._texts[prompt, now])
        for prompt in prompts:
            self._texts.move_to_end((prompt, now))
        conditions = [self._texts[prompt, now] for prompt in prompts]
        while self._text_bytes > self.text_cache:
            (prompt, _), oldest = self._texts.popitem(last=False)
            self._text_bytes -= _bytes(prompt, oldest)
        return conditions


def _bytes(prompt: str, cond: Condition) -> int:
    tensors = [getattr(cond, f.name) for f in fields(cond)]
    return sys.getsizeof(prompt) + sum(0 if tensor is None else tensor.nbytes for tensor in tensors)


def _of_rows(preview: Preview, rows: list[int], done: int, images: Tensor) -> None:
    preview(done, rows, images)


def vae_folder(folder: Path, vae: str) -> str:
    """The subfolder of the VAE "kl" or "tiny". Raises UserError if there is none."""
    if vae not in ("kl", "tiny"):
        raise UserError(f"vae: {vae}; expected kl or tiny")
    if vae == "kl" or (folder / TINY).is_dir():
        return "vae" if vae == "kl" else TINY
    config = folder / "vae" / "config.json"
    if config.is_file() and read_object(config).get("_class_name") == "AutoencoderTiny":
        return "vae"
    raise UserError(f"vae: tiny, but {folder} has no {TINY}; get it by scripts/download-weights --vae kl,tiny")


def modes_of(manifest: Manifest) -> list[str]:
    """What `Engine` can draw with: step counts of students, the teacher, the teacher in a student's steps."""
    modes = [str(steps) for steps in sorted(manifest.students)]
    if manifest.teacher is not None:
        modes += ["teacher", *(f"teacher-{steps}" for steps in sorted(manifest.students, reverse=True))]
    return modes


def default_mode(manifest: Manifest) -> str:
    """The student with the most steps, else the teacher.

    Raises:
        UserError: there is neither.
    """
    if manifest.students:
        return str(max(manifest.students))
    if manifest.teacher is None:
        raise UserError(f"weights {manifest.name}: have neither a student nor a teacher to draw with")
    return "teacher"


def resolve_device(name: torch.device | str) -> torch.device:
    """ "auto" is cuda where there is one (unless DMD2_MEMORY=cpu), else the CPU.

    Raises:
        UserError: the device is not there.
    """
    if isinstance(name, torch.device):
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has none that torch can use; try --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and prefers_gpu()) else "cpu")
