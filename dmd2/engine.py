"""Prompts in, pictures out: loads a folder of weights once and draws with its students or its teacher."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dmd2.errors import UserError
from dmd2.noise import seeded_noise
from dmd2.sampling import conditioned, dpm_solver_2m, few_step, teacher_sigmas
from dmd2.stable_diffusion import StableDiffusion, TextCondition
from dmd2.weights import DEFAULT, Student, TextToImage, load_text_to_image, read_manifest

CACHED_PROMPTS = 256


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
    """Draws pictures from one folder of weights.

    Modes: "1", "4" (any number of steps that the manifest lists) are the students; "teacher" is the teacher with
    its own sampler and guidance; "teacher-4" is the undistilled teacher, guided, put through the sampler of the
    4-step student: what distillation must beat. UNets are loaded at their first use.

    Args:
        folder: weights in diffusers' layout with a `dmd2.json`.
        device: "cpu", "cuda" or "auto" (cuda where there is one).
        dtype: of networks; by default fp16 on a GPU and fp32 on a CPU.
        trace: on a CPU, `warm_up` records networks for repeated calls, which are then about 1.3 times as fast.
        modes: to load at once, so that a broken file is an error now and the first picture is fast.
    """

    folder: Path = DEFAULT
    device: torch.device | str = "auto"
    dtype: torch.dtype | None = None
    modes: tuple[str, ...] = ()
    trace: bool = False
    _texts: OrderedDict[tuple[str, int, int], TextCondition] = field(default_factory=OrderedDict, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.device = resolve_device(self.device)
        self.dtype = self.dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.manifest = read_manifest(self.folder)
        subfolders = list(dict.fromkeys(self._plan(mode)[0] for mode in self.modes))
        self.model: TextToImage = load_text_to_image(
            self.folder, subfolders, self.device, self.dtype, trace=self.trace and self.device.type == "cpu"
        )

    def sha256(self, mode: str) -> str:
        """The checksum of the UNet that `mode` runs."""
        prefix = f"{self._plan(mode)[0]}/"
        return next(
            (v for k, v in self.manifest.files.items() if k.startswith(prefix) and k.endswith(".safetensors")),
            "",
        )

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError unless width and height (pixels) suit the networks."""
        factor = self.model.codec.factor
        for name, side in zip(("width", "height"), size, strict=True):
            if side < self.size_unit or side % factor:
                raise UserError(
                    f"{name}: {side} (size {size[0]}x{size[1]}); expected a multiple of {factor} pixels, "
                    f"at least {self.size_unit}"
                )

    @property
    def size_unit(self) -> int:
        """Pixels. Sides that are multiples of it are halved without remainder on their way down the UNet."""
        config = next(iter(self.model.denoisers.values())).unet.config if self.model.denoisers else None
        halvings = 0 if config is None else len(config.block_out_channels) - 1
        return self.model.codec.factor * 2**halvings

    def warm_up(self, modes: tuple[str, ...], sizes: list[tuple[int, int]]) -> None:
        """Draws once in each mode and size, so that no later call is the first of its kind.

        With `trace`, this is where networks are recorded; a record serves every batch size. Calls of other modes
        and sizes run the networks as they are: a picture is the same to the bit either way.
        """
        for mode in modes:
            denoiser = self._denoiser(self._plan(mode)[0])
            for size in sizes:
                with denoiser.recording():
                    self.draw(["", "warm up"], [0, 1], mode, size)
                # A record's first two runs are slow: torch watches the one and rewrites the record for the other.
                for _ in range(2):
                    self.draw(["warm up"], [0], mode, size)

    @torch.inference_mode()
    def draw(
        self, prompts: list[str], seeds: list[int], mode: str = "4", size: tuple[int, int] | None = None
    ) -> Tensor:
        """One batch: B prompts and seeds → uint8 (B, 3, H, W) on the CPU. `size` is (width, height) in pixels."""
        return self.draw_timed(prompts, seeds, mode, size)[0]

    @torch.inference_mode()
    def draw_timed(
        self,
        prompts: list[str],
        seeds: list[int],
        mode: str = "4",
        size: tuple[int, int] | None = None,
        check: Callable[[], None] = go_on,
    ) -> tuple[Tensor, Timings]:
        """As `draw`, with the time that each stage took.

        `check` is called before each step of a student; what it raises ends the call.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"expected as many seeds as prompts, at least one, not {len(prompts)}, {len(seeds)}")
        subfolder, _ = self._plan(mode)
        self._denoiser(subfolder)
        size = size or self.manifest.native_size
        self.check_size(size)
        began = time.perf_counter()
        conditions = self._conditions(prompts, size)
        timings = Timings(time.perf_counter() - began, 0.0, 0.0)
        # Prompts of one window and of several do not fit into one tensor, and padding would change the pictures.
        lengths = sorted({c.context.shape[1] for c in conditions})
        pictures: dict[int, Tensor] = {}
        for length in lengths:
            rows = [i for i, c in enumerate(conditions) if c.context.shape[1] == length]
            cond = conditions[rows[0]].cat(*(conditions[i] for i in rows[1:]))
            images, taken = self._draw(cond, [seeds[i] for i in rows], mode, size, check)
            pictures |= dict(zip(rows, images, strict=True))
            timings += taken
        return torch.stack([pictures[i] for i in range(len(prompts))]), timings

    def _draw(
        self, cond: TextCondition, seeds: list[int], mode: str, size: tuple[int, int], check: Callable[[], None]
    ) -> tuple[Tensor, Timings]:
        subfolder, timesteps = self._plan(mode)
        denoiser = self._denoiser(subfolder)
        began = time.perf_counter()
        height, width = size[1] // self.model.codec.factor, size[0] // self.model.codec.factor
        shape = (max(1, len(timesteps)), 4, height, width)
        noise = seeded_noise(seeds, shape, denoiser.device)

        def each_step() -> Iterator[Tensor]:
            for step_noise in noise.unbind(1):
                check()
                yield step_noise

        if mode == "teacher":
            x0 = self._teach(denoiser, cond, noise[:, 0])
        else:
            scale = 1.0
            if mode.startswith("teacher"):
                assert self.manifest.teacher is not None
                scale = self.manifest.teacher.guidance_scale
            sigmas = [float(denoiser.sigmas[t]) for t in timesteps]
            uncond = cond.unconditional()
            x0 = few_step(conditioned(denoiser, cond, uncond, scale), denoiser.start, each_step(), sigmas)
        denoised = self._clock()
        images = self.model.codec.decode(x0).cpu()
        return images, Timings(0.0, denoised - began, time.perf_counter() - denoised)

    def recover(self) -> None:
        """After an error: gives back what memory it held. Raises whatever the device raises if it is gone."""
        assert isinstance(self.device, torch.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _teach(self, denoiser: StableDiffusion, cond: TextCondition, noise: Tensor) -> Tensor:
        assert self.manifest.teacher is not None
        sigmas = teacher_sigmas(denoiser, self.manifest.teacher.steps)
        start = denoiser.start(noise, torch.full((len(noise),), sigmas[0], device=noise.device))
        scale = self.manifest.teacher.guidance_scale
        return dpm_solver_2m(conditioned(denoiser, cond, cond.unconditional(), scale), start, sigmas)

    def _clock(self) -> float:
        if isinstance(self.device, torch.device) and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _plan(self, mode: str) -> tuple[str, list[int]]:
        """mode → (subfolder, timesteps); no timesteps for the teacher's own sampler."""
        steps = mode.removeprefix("teacher-")
        students = self.manifest.students
        valid = [str(n) for n in sorted(students)]
        if self.manifest.teacher is not None:
            valid += ["teacher", *(f"teacher-{n}" for n in sorted(students, reverse=True))]
        if mode not in valid:
            raise UserError(f"--steps {mode}: these weights have {', '.join(valid) or 'no student'}")
        if mode.startswith("teacher"):
            assert self.manifest.teacher is not None
            return self.manifest.teacher.subfolder, [] if mode == "teacher" else students[int(steps)].timesteps
        student: Student = students[int(steps)]
        return student.subfolder, student.timesteps

    def _denoiser(self, subfolder: str) -> StableDiffusion:
        if subfolder not in self.model.denoisers:
            assert isinstance(self.device, torch.device) and self.dtype is not None
            trace = self.trace and self.device.type == "cpu"
            loaded = load_text_to_image(self.folder, [subfolder], self.device, self.dtype, trace=trace)
            self.model.denoisers.update(loaded.denoisers)
        return self.model.denoisers[subfolder]

    def _conditions(self, prompts: list[str], size: tuple[int, int]) -> list[TextCondition]:
        """Text conditions, remembered for the prompts used last. New ones of equal length are encoded together."""
        new: dict[int, list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            if (prompt, *size) not in self._texts:
                new.setdefault(self.model.encode_text.windows(prompt), []).append(prompt)
        for group in new.values():
            encoded = self.model.encode_text(group, size)
            for i, prompt in enumerate(group):
                self._texts[prompt, *size] = encoded[i : i + 1]
        for prompt in prompts:
            self._texts.move_to_end((prompt, *size))
        conditions = [self._texts[prompt, *size] for prompt in prompts]
        while len(self._texts) > CACHED_PROMPTS:
            self._texts.popitem(last=False)
        return conditions


def resolve_device(name: torch.device | str) -> torch.device:
    """ "auto" is cuda where there is one, else the CPU. Raises UserError for a device that is not there."""
    if isinstance(name, torch.device):
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has none that torch can use; try --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
