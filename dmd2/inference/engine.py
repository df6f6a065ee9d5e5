"""Prompts in, images out: loads a folder of weights once and generates with its students or its teacher."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from dmd2.diffusion.denoiser import Cond
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import Callback, Churn, conditioned
from dmd2.inference.conditioning import TEXT_TO_IMAGE, ImageConditioning
from dmd2.inference.mode import Mode
from dmd2.models.model import Model, family_of
from dmd2.runtime.compiled import save_kernels
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.offload import download, peak_memory, upload
from dmd2.runtime.placement import prefers_gpu
from dmd2.weights.manifest import DEFAULT, read_manifest

TEXT_CACHE = 256_000_000

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


@dataclass
class Engine:
    """Generates images with one folder of weights: Stable Diffusion from prompts, EDM from the classes they name.

    What to generate with is a `Mode`, or its name: "1", "4" (any number of steps that the manifest lists) are the
    students, "teacher" is the teacher, "teacher-4" the teacher in a student's steps. Networks are loaded at their
    first use.

    Args:
        folder: weights in diffusers' layout with a `dmd2.json`.
        device: "cpu", "cuda", one of several GPUs ("cuda:1") or "auto" (cuda where there is one).
        dtype: of networks; by default see `dmd2.runtime.placement.default_dtype`.
        modes: to load at once, so that a broken file is an error now and the first image is fast.
        trace: `warm_up` records networks for repeated calls: on a GPU they are compiled (see `dmd2.runtime.placement`
            for the variables that say how), on a CPU small ones are traced, which makes them about 1.3 times as fast.
        vae: "kl" decodes with the folder's `vae`, whatever that is; "tiny" with its TAESDXL: a twentieth of the work,
            and less sharp; "auto" with that on a CPU where the folder has it.
        churn: noise that the sampler of an EDM teacher adds, by the images' seeds; None for none.
        text_cache: bytes of encoded prompts that are remembered on the device, at most.
    """

    folder: Path = DEFAULT
    device: torch.device | str = "auto"
    dtype: torch.dtype | None = None
    modes: tuple[str | Mode, ...] = ()
    trace: bool = False
    vae: str = "kl"
    churn: Churn | None = None
    text_cache: int = TEXT_CACHE
    _texts: OrderedDict[tuple[str, Hashable], Cond] = field(default_factory=OrderedDict, init=False)
    _text_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.device = resolve_device(self.device)
        self.manifest = read_manifest(self.folder)
        modes, family = [self._mode(mode) for mode in self.modes], family_of(self.folder)
        if self.churn is not None and not (family.takes_churn and all(mode.levels is None for mode in modes)):
            raise InvalidInput(
                "churn", "only of an EDM teacher's sampler; expected its weights, and the steps teacher"
            )
        subfolders = list(dict.fromkeys(mode.subfolder for mode in modes))
        self.model: Model = family(
            self.folder, subfolders, self.device, self.dtype, fast=self.trace, vae=self.vae, churn=self.churn
        )
        self.dtype = self.model.dtype

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        mode: str | Mode = "4",
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
        mode: str | Mode = "4",
        size: tuple[int, int] | None = None,
        check: Callable[[], object] = lambda: None,
        edit: ImageConditioning = TEXT_TO_IMAGE,
        preview: Preview | None = None,
    ) -> tuple[Tensor, Timings]:
        """As `generate`, with the time that each stage took.

        `check` is called before the first step and after each; what it raises ends the call. `preview` is called
        after each step but the last, and takes the time of a decoding.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"expected as many seeds as prompts, at least one, not {len(prompts)}, {len(seeds)}")
        mode, size = self._mode(mode), size or self.manifest.native_size
        self._check(mode, size, edit)
        # Encode
        began = self._clock()
        texts = self.model.use_loras(mode.subfolder, mode.student, edit.loras)
        conditions = self._encode(prompts, size, texts)
        text, denoise, decode = self._clock() - began, 0.0, 0.0
        sigmas = mode.sigmas(self.model.denoiser(mode.subfolder), edit.strength)
        images = torch.empty(len(prompts), 3, size[1], size[0], dtype=torch.uint8)
        # Prompts of one token chunk and of several do not fit into one tensor, and padding would change the images.
        for length in sorted({cond.length for cond in conditions}):
            rows = [i for i, cond in enumerate(conditions) if cond.length == length]
            cond = conditions[rows[0]].cat(*(conditions[i] for i in rows[1:]))
            # Noise
            began = self._clock()
            noise = self._noise([seeds[i] for i in rows], mode, size, len(sigmas))
            # Sample
            check()
            uncond = None
            if mode.guidance_scale is not None:
                uncond = self.model.encode_text.unconditional(cond, lambda: self._encode([""], size, texts)[0])

            def after_step(done: int, x0: Tensor, rows: list[int] = rows) -> None:
                check()
                if preview is not None and done < len(sigmas):
                    preview(done, rows, download(self.model.preview_codec.decode(x0)))

            x0 = self._sample(mode, cond, uncond, noise, sigmas, size, edit, after_step)
            sampled = self._clock()
            # Decode
            images[rows] = edit.finish(download(self.model.codec.decode(x0)))
            denoise, decode = denoise + sampled - began, decode + self._clock() - sampled
        return images, Timings(text, denoise, decode)

    def _mode(self, mode: str | Mode) -> Mode:
        return Mode.parse(mode, self.manifest) if isinstance(mode, str) else mode

    def _check(self, mode: Mode, size: tuple[int, int], edit: ImageConditioning) -> None:
        """Loads what is needed and not there yet. Raises UserError unless all of it goes together."""
        self.model.denoiser(mode.subfolder)
        self.model.check_size(size)
        if edit is not TEXT_TO_IMAGE:
            self.model.check_takes_images()
        if mode.levels is None and edit.images:
            raise InvalidInput("steps", "takes no image and no control; expected a student's steps", mode.name)
        edit.check_size(size)
        if edit.control is not None:
            self.model.control(edit.control)

    def _encode(self, prompts: list[str], size: tuple[int, int], texts: Hashable) -> list[Cond]:
        """A condition of each prompt, remembered for the prompts used last.

        New prompts of equally many token chunks are encoded together. `texts` tells apart what LoRAs make of the text
        encoders.
        """
        now = size, texts
        new: dict[int, list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            if (prompt, now) not in self._texts:
                new.setdefault(self.model.encode_text.token_chunks(prompt), []).append(prompt)
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

    def _noise(self, seeds: list[int], mode: Mode, size: tuple[int, int], steps: int) -> Tensor:
        """Unit noise (B, N, C, h, w) of the size of latents: one for each step of a few-step sampler."""
        codec = self.model.codec
        count = self.model.teacher_noises(steps) if mode.levels is None else steps
        shape = (count, codec.channels, size[1] // codec.factor, size[0] // codec.factor)
        return upload(seeded_noise(seeds, shape), self.model.device)

    def _sample(
        self,
        mode: Mode,
        cond: Cond,
        uncond: Cond | None,
        noise: Tensor,
        sigmas: list[float],
        size: tuple[int, int],
        edit: ImageConditioning,
        callback: Callback,
    ) -> Tensor:
        """x0 (B, C, h, w): the mode's network by the mode's sampler."""
        denoiser, codec = self.model.denoiser(mode.subfolder), self.model.codec
        given: dict[str, Any] = {"known": edit.known(codec, size)} if denoiser.inpaints else {}
        if edit.control is not None and edit.control_image is not None:
            control = self.model.control(edit.control)
            given["control"] = control.guide(edit.control_image, mode.timesteps(edit.strength), edit.control_scale)
        denoise = conditioned(partial(denoiser, **given), cond, uncond, mode.guidance_scale or 0.0)
        if mode.levels is not None:
            return edit.sample(denoise, denoiser, codec, noise, sigmas, callback)
        x = denoiser.scale_initial_noise(noise[:, 0], torch.full((len(noise),), sigmas[0], device=noise.device))
        return self.model.sample_teacher(denoise, x, noise[:, 1:], sigmas, callback)

    def _clock(self) -> float:
        if isinstance(self.device, torch.device) and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # What callers may ask for

    def sha256(self, mode: str | Mode) -> str:
        """The checksum of the network that `mode` runs."""
        folder = PurePosixPath(self._mode(mode).subfolder)
        files = self.manifest.files.items()
        return next((v for k, v in files if k.endswith(".safetensors") and PurePosixPath(k).parent == folder), "")

    # Before and after

    def warm_up(
        self,
        modes: tuple[str, ...],
        sizes: list[tuple[int, int]],
        batch: int = 2,
        controls: Sequence[Path] = (),
        windows: int = 2,
    ) -> None:
        """Generates once in each mode and size, so that no later call is the first of its kind.

        With `trace`, this is where networks are recorded. Calls of other modes and sizes run the networks as they
        are. On a CPU a record serves every batch size, and an image is the same to ±2 of 255 either way. On a GPU
        networks are compiled for one image, for two and for `batch` images, each with prompts of up to so many
        `windows` of the text encoders, and with each of `controls`; other batches are put together from these.
        Whatever comes that was not prepared for is counted, see `dmd2.runtime.compiled.Compiler`.
        """
        began, placement = time.perf_counter(), self.model.placement
        for mode in modes:
            denoiser = self.model.denoiser(self._mode(mode).subfolder)
            for size in sizes:  # "0" is a prompt to any family
                logger.info("warm-up: %s steps at %dx%d (%.0f s so far)", mode, *size, time.perf_counter() - began)
                with denoiser.recording():
                    for prompts, edit in self._rehearsal(mode, size, batch, controls, windows):
                        shape_began = time.perf_counter()
                        self.generate(prompts, list(range(len(prompts))), mode, size, edit)
                        if placement.compiler is None:
                            continue
                        now = time.perf_counter()
                        logger.info(
                            "warm-up: %s steps at %dx%d, batch %d, prompts of %d letters%s: %.1f s (%.0f s so far)",
                            mode,
                            *size,
                            len(prompts),
                            len(prompts[0]),
                            f", control {edit.control.name}" if edit.control else "",
                            now - shape_began,
                            now - began,
                        )
                    if placement.compiler is not None:
                        self._rehearse_codecs(size)
                # A record's first two runs are slow: torch watches the one and rewrites the record for the other.
                for _ in range(2):
                    self.generate(["0"], [0], mode, size)
        if placement.compiler is not None and placement.kernels is not None:
            save_kernels(placement.kernels)
        seconds, peak = time.perf_counter() - began, peak_memory(self.model.device) / 1e9
        logger.info("warm-up: %.1f s; memory: %s, peak %.1f GB", seconds, placement.plan.mode, peak)

    @torch.inference_mode()
    def _rehearse_codecs(self, size: tuple[int, int]) -> None:
        """For images that callers give, and for previews."""
        codec = self.model.codec
        codec.encode(torch.zeros(1, 3, size[1], size[0], dtype=torch.uint8))
        shape = (1, codec.channels, size[1] // codec.factor, size[0] // codec.factor)
        self.model.preview_codec.decode(torch.zeros(shape, device=self.model.device))

    def _rehearsal(
        self, mode: str, size: tuple[int, int], batch: int, controls: Sequence[Path], windows: int
    ) -> list[tuple[list[str], ImageConditioning]]:
        """Batches of prompts to record with, and what else there is to them."""
        if self.model.placement.compiler is None:
            return [(["", "0"], TEXT_TO_IMAGE)]
        black = torch.zeros(3, size[1], size[0], dtype=torch.uint8)
        edits = [TEXT_TO_IMAGE]
        for folder in controls:
            if all(side % self.model.control(folder).unit == 0 for side in size):
                edits.append(ImageConditioning(control=folder, control_image=black))
        found = []
        for number, edit in enumerate(edits):
            for window in range(1, 1 + (windows if edit is TEXT_TO_IMAGE else 1)):
                for count in sorted({1, min(2, batch), batch}):
                    # Prompts that are new each time: text encoders are recorded, too, for as many as are new.
                    name = f"{mode} {size} {number} {count}"
                    while self.model.encode_text.token_chunks(name) < window:
                        name += " a" * 8
                    found.append(([f"{i} {name}" for i in range(count)], edit))
        return found

    def recover(self) -> None:
        """After an error: gives back what memory it held. Raises whatever the device raises if it is gone."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
            torch.cuda.empty_cache()


def _bytes(prompt: str, cond: Cond) -> int:
    tensors = [getattr(cond, f.name) for f in fields(cond)]
    return sys.getsizeof(prompt) + sum(0 if tensor is None else tensor.nbytes for tensor in tensors)


def resolve_device(name: torch.device | str) -> torch.device:
    """ "auto" is cuda where there is one (unless DMD2_MEMORY=cpu), else the CPU. "cuda:1" is this thread's GPU from
    now on.

    Raises:
        UserError: the device is not there.
    """
    name = str(name)
    found = re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name)
    if found is None:
        raise InvalidInput("device", "expected auto, cpu or cuda (of several GPUs such as cuda:1)", name)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidInput("device", "this machine has none that torch can use; expected cpu", name)
    device = torch.device(("cuda" if prefers_gpu() else "cpu") if name == "auto" else name)
    if device.index is not None:
        if device.index >= (count := torch.cuda.device_count()):
            raise InvalidInput("device", f"this machine has {count}; expected cuda:0 to cuda:{count - 1}", name)
        torch.cuda.set_device(device)  # what streams, graphs and kernels are made for where none is named
    return device
