"""From a request to image files: what Cog's `Predictor` and any other server share.

Checks and completes requests, queues their images for the one thread that owns the device, has the images encoded
in other threads, and leaves them in the outbox.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from dmd2.inference.batcher import Batcher, Check, JobResult, PendingJob, Stopped
from dmd2.inference.conditioning import TEXT_TO_IMAGE, ImageConditioning
from dmd2.inference.engine import TEXT_CACHE, Engine, Timings
from dmd2.inference.image_output import encode_image, image_metadata
from dmd2.inference.inputs import InputImages
from dmd2.inference.request import ImageRequest, parse_size, resolve_request
from dmd2.inference.safety import FOLDER as SAFETY
from dmd2.inference.safety import SafetyChecker, may_be_disabled
from dmd2.models.adapters.lora import Lora
from dmd2.models.adapters.lora_files import LoraFiles, cache_folder
from dmd2.models.locate import locate
from dmd2.runtime.errors import UserError, shown
from dmd2.service.outbox import Outbox
from dmd2.weights.manifest import Manifest, read_manifest

SLOTS = 32  # predictions that Cog lets in (see predict.py)
WAITING = 4 * SLOTS  # images in the queue, at most: as many as all of these may ask for

K = TypeVar("K")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputImage:
    """A finished image, or a preview of one. `path` and `data` are None if the safety checker withheld it."""

    path: Path | None
    seed: int
    batch_size: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """by stage"""
    step: int | None = None
    """of a preview: how many steps were done"""
    data: bytes | None = None
    """the file's content, of a service without `files`"""
    size: tuple[int, int] = (0, 0)
    """width and height"""
    steps: int = 0
    """that it was generated in"""


@dataclass(frozen=True)
class _Preview:
    job: _Job
    step: int
    image: Tensor


@dataclass(frozen=True)
class _Job:
    prompt: str
    seed: int
    steps: int
    size: tuple[int, int]
    check_safety: bool
    edit: ImageConditioning = TEXT_TO_IMAGE
    show: Callable[[_Preview], object] | None = None
    """takes previews, on the device thread"""


@dataclass(frozen=True)
class _Image:
    image: Tensor
    flagged: bool
    timings: Timings
    safety: float


class ImageService:
    """Loads weights and generates for many clients at once. Reads these variables of `environ`:

    - `DMD2_WEIGHTS`: see `dmd2.models.locate.locate`.
    - `DMD2_ALLOW_UNSAFE`: whether callers may switch the safety checker off.
    - `DMD2_DEVICE`: in place of the device "auto".
    - `DMD2_MAX_BATCH`: images in one batch, at most.
    - `DMD2_SIZES`: sizes that are compiled for during setup, beside the weights' own; others run as they are.
    - `DMD2_VAE`: "auto", "kl" or "tiny", see `dmd2.inference.engine.Engine`.
    - `DMD2_TEXT_CACHE`: megabytes of encoded prompts that are remembered on the device, at most.
    - `DMD2_CACHE`: LoRAs that callers name are kept there.

    Args:
        weights: folder or tar of weights; None to look in the usual places.
        device: see `dmd2.inference.engine.Engine`.
        safety: folder of the safety checker; it is used if it is there.
        files: whether images are left in files; else each comes with its content.
        turn: held while a batch is generated: services on one device may share a lock.

    Raises:
        UserError: weights or checker are missing, damaged or not what they say.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        device: str = "auto",
        safety: Path = SAFETY,
        environ: Mapping[str, str] = os.environ,
        files: bool = True,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        folder = locate(weights, environ)
        manifest = read_manifest(folder)
        logger.info("weights: %s (%s), licence: %s", folder, manifest.name, manifest.licence)
        self.max_batch = max_batch = _max_batch(environ, manifest.native_size)
        self._turn = turn or nullcontext()
        self._unsafe_allowed = may_be_disabled(environ)
        self._text_cache = _megabytes(environ, "DMD2_TEXT_CACHE", TEXT_CACHE)
        self._vae = environ.get("DMD2_VAE", "").strip() or "auto"
        sizes = _sizes(environ)
        if device == "auto":
            device = environ.get("DMD2_DEVICE", "").strip() or device
        self.controls = {path.parent.name: path.parent for path in sorted(folder.glob("control/*/config.json"))}
        self.engine: Engine
        self._safety: SafetyChecker | None = None
        self._batcher: Batcher[_Job, _Image] = Batcher(
            self._generate,
            _key,
            max_batch=max_batch,
            max_waiting=WAITING,
            prepare=lambda: self._load(folder, manifest, device, safety, max_batch, sizes),
            recover=lambda: self.engine.recover(),
        )
        self._encoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "encode")
        self._readers = ThreadPoolExecutor(4, "read")  # of images that callers give
        # Downloads have a thread for each prediction, so that nobody waits for somebody else's slow server.
        self._downloads = ThreadPoolExecutor(SLOTS, "download")
        self._downloading: set[threading.Event] = set()
        self.loras = LoraFiles(folder, cache_folder(environ))
        self._outbox = Outbox() if files else None
        if self._outbox is not None:
            atexit.register(self._outbox.close)

    def _load(
        self,
        folder: Path,
        manifest: Manifest,
        device: str,
        safety: Path,
        max_batch: int,
        sizes: list[tuple[int, int]],
    ) -> None:
        """On the device thread, before anything else."""
        if not manifest.students:
            raise UserError(f"weights {folder}: hold no few-step student, and only those are served")
        modes = tuple(str(steps) for steps in sorted(manifest.students))
        self.engine = Engine(folder, device, modes=modes, trace=True, vae=self._vae, text_cache=self._text_cache)
        for size in sizes:
            try:
                self.engine.model.check_size(size)
            except UserError as error:
                raise UserError(f"DMD2_SIZES: {error}") from None
        for control in self.controls.values():
            self.engine.model.control(control)
        if safety.is_dir():
            assert self.engine.dtype is not None
            compiler = self.engine.model.placement.compiler
            self._safety = SafetyChecker.load(safety, self.engine.model.device, self.engine.dtype, compiler)
            self._safety.warm_up(max_batch)
            allowed = "may" if self._unsafe_allowed else "may not"
            logger.info("safety checker: %s; callers %s disable it", safety, allowed)
        else:
            logger.warning("safety checker: none (no folder %s); images are not checked", safety)
        sizes = list(dict.fromkeys([manifest.native_size, *sizes]))
        self.engine.warm_up(modes, sizes, max_batch, list(self.controls.values()))

    @property
    def uncompiled(self) -> dict[str, int]:
        """Where networks are compiled, so far: shapes that could not be, calls in shapes that were not prepared."""
        compiler = self.engine.model.placement.compiler
        if compiler is None:
            return {}
        return {"compile_failures": compiler.failures, "unprepared_calls": compiler.unprepared}

    @property
    def alive(self) -> bool:
        """False once the device is gone: then only a new process helps."""
        return self._batcher.alive

    def close(self) -> None:
        """Finishes what is queued and deletes the files."""
        for gone in list(self._downloading):
            gone.set()
        self._downloads.shutdown(cancel_futures=True)
        self._batcher.close()
        self._readers.shutdown(cancel_futures=True)
        self._encoders.shutdown()
        if self._outbox is not None:
            self._outbox.close()
            atexit.unregister(self._outbox.close)

    async def generate(self, request: ImageRequest) -> AsyncGenerator[OutputImage, None]:
        """Generates the request's images and yields them in order, each as soon as it is encoded; previews meanwhile.

        Raises:
            UserError: the request is wrong.
            dmd2.inference.batcher.Busy: too many images wait already.
            dmd2.inference.batcher.Stopped: the device is gone.
        """
        if request.is_plain:
            (size, steps, seed), edit = resolve_request(request, self.engine), TEXT_TO_IMAGE
        else:
            loop = asyncio.get_running_loop()
            size, steps, seed, edit = await loop.run_in_executor(self._readers, self._read, request)
            if loras := await self._find_loras(request):
                edit = replace(edit, loras=loras)
        tickets: list[PendingJob[_Job, _Image]] = []
        files: list[asyncio.Task[OutputImage]] = []
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[_Preview | None] = asyncio.Queue()  # None: one of the files is done

        def show(preview: _Preview) -> None:
            loop.call_soon_threadsafe(news.put_nowait, preview)

        try:
            shows = show if request.previews else None
            tickets += self._batcher.submit_all(self._jobs(request, size, steps, seed, edit, shows))
            files += [asyncio.create_task(self._finish(ticket, request)) for ticket in tickets]
            for file in files:
                file.add_done_callback(lambda _: news.put_nowait(None))
            for file in files:
                while not file.done():
                    preview = await news.get()
                    if preview is not None:
                        yield await self._finish_preview(preview, request)
                yield await file
        finally:  # cancelled, failed or done: leave nothing behind that works for nobody
            for ticket in tickets:
                ticket.cancel()
            for file in files:
                file.cancel()
            await asyncio.gather(*files, return_exceptions=True)

    def generate_all(
        self, requests: Iterable[tuple[K, ImageRequest]]
    ) -> Iterator[tuple[K, list[OutputImage] | Exception]]:
        """Generates many requests, in order, as fast as it can: for bulk, where nobody else asks this service.

        Neighbours of equal key share batches, and which ones do depends on the requests alone: the same requests
        make the same batches each time, and so the same images to the bit on the same machine. No previews.

        Args:
            requests: each with what it is called in the answer.

        Yields:
            Each one's images, or why there are none.

        Raises:
            dmd2.inference.batcher.Stopped: the device is gone.
        """
        rows: deque[tuple[K, list[Future[OutputImage]]]] = deque()
        chunk: list[tuple[_Job, ImageRequest, list[Future[OutputImage]]]] = []
        running: deque[list[PendingJob[_Job, _Image]]] = deque()
        # One batch waits while another runs. Only full ones have a successor of the same key, so none is mixed.
        ahead = 1 if 2 * self.max_batch <= WAITING else 0

        def submit() -> None:
            while len(running) > ahead:
                wait([ticket.future for ticket in running.popleft()])
            tickets = self._batcher.submit_all([job for job, _, _ in chunk]) if chunk else []
            for ticket, (_, request, files) in zip(tickets, chunk, strict=True):
                files.append(self._encoders.submit(self._file, ticket, request))
            running.append(tickets)
            chunk.clear()

        try:
            for name, request in requests:
                files: list[Future[OutputImage]] = []
                try:
                    jobs = self._prepare(request)
                except Exception as error:
                    files.append(Future())
                    files[0].set_exception(error)
                    jobs = []
                rows.append((name, files))
                for job in jobs:
                    if chunk and (len(chunk) == self.max_batch or _key(job) != _key(chunk[0][0])):
                        submit()
                    chunk.append((job, request, files))
                waits = {id(files) for _, _, files in chunk}
                while rows and id(rows[0][1]) not in waits and all(file.done() for file in rows[0][1]):
                    yield _collected(*rows.popleft())
            submit()
            while rows:
                yield _collected(*rows.popleft())
        finally:  # nobody waits any more
            for tickets in running:
                for ticket in tickets:
                    ticket.cancel()

    def _prepare(self, request: ImageRequest) -> list[_Job]:
        """The jobs of a request, whatever reading and downloading that takes."""
        if request.is_plain:
            return self._jobs(request, *resolve_request(request, self.engine), TEXT_TO_IMAGE)
        size, steps, seed, edit = self._read(request)
        if request.lora_weights:
            gone = threading.Event()
            edit = replace(edit, loras=self.loras.find_all(request.lora_weights, request.lora_scale, gone))
        return self._jobs(request, size, steps, seed, edit)

    def _jobs(
        self,
        request: ImageRequest,
        size: tuple[int, int],
        steps: int,
        seed: int,
        edit: ImageConditioning,
        show: Callable[[_Preview], object] | None = None,
    ) -> list[_Job]:
        check = not (request.disable_safety_checker and self._unsafe_allowed)
        seeds = [(seed + i) % 2**32 for i in range(request.num_outputs)]  # each may be asked for by itself
        return [_Job(request.prompt, each, steps, size, check, edit, show) for each in seeds]

    def _read(self, request: ImageRequest) -> tuple[tuple[int, int], int, int, ImageConditioning]:
        """As `resolve_request`, and the images that the caller gives, read and fitted."""
        self.engine.model.check_takes_images()
        given = InputImages.read(
            request.image, request.mask, request.prompt_strength, request.control_image, request.control_scale
        )
        if request.control is not None and given.control_image is None:
            raise UserError("control: given without a control_image; expected the image to follow")
        size, steps, seed = resolve_request(request, self.engine, given)
        control = None if given.control_image is None else self._control(request.control)
        return size, steps, seed, given.edit(size, control)

    async def _find_loras(self, request: ImageRequest) -> tuple[tuple[Lora, float], ...]:
        """The request's LoRAs. Their download ends with the request."""
        if not request.lora_weights:
            return ()
        gone, loop = threading.Event(), asyncio.get_running_loop()
        self._downloading.add(gone)
        find = partial(self.loras.find_all, request.lora_weights, request.lora_scale, gone)
        try:
            return await loop.run_in_executor(self._downloads, find)
        finally:
            gone.set()
            self._downloading.discard(gone)

    def _control(self, name: str | None) -> Path:
        if name is None and len(self.controls) == 1:
            return next(iter(self.controls.values()))
        if name not in self.controls:
            valid = ", ".join(self.controls) or "none: these weights have no folder `control`"
            raise UserError(f"control: {shown(name or 'not given', 100)}; expected one of {valid}")
        return self.controls[name]

    async def _finish(self, ticket: PendingJob[_Job, _Image], request: ImageRequest) -> OutputImage:
        drawn: JobResult[_Image] = await asyncio.wrap_future(ticket.future)
        return await asyncio.get_running_loop().run_in_executor(
            self._encoders, self._encoded, ticket.job, drawn, request
        )

    def _file(self, ticket: PendingJob[_Job, _Image], request: ImageRequest) -> OutputImage:
        """As `_finish`, in a thread."""
        return self._encoded(ticket.job, ticket.future.result(), request)

    def _encoded(self, job: _Job, drawn: JobResult[_Image], request: ImageRequest) -> OutputImage:
        image, path, data, began = drawn.result, None, None, time.perf_counter()
        if not image.flagged:
            path, data = self._write(job, image.image, request)
        seconds = {
            "queue": drawn.queue_seconds,
            "text": image.timings.text,
            "denoise": image.timings.denoise,
            "decode": image.timings.decode,
            "safety": image.safety,
            "encode": time.perf_counter() - began,
        }
        rounded = {stage: round(value, 4) for stage, value in seconds.items()}
        return OutputImage(path, job.seed, drawn.batch_size, rounded, None, data, job.size, job.steps)

    async def _finish_preview(self, preview: _Preview, request: ImageRequest) -> OutputImage:
        loop = asyncio.get_running_loop()
        write = partial(self._write, preview.job, preview.image, request, preview.step)
        path, data = await loop.run_in_executor(self._encoders, write)
        return OutputImage(path, preview.job.seed, step=preview.step, data=data, size=preview.job.size)

    def _write(
        self, job: _Job, image: Tensor, request: ImageRequest, step: int | None = None
    ) -> tuple[Path, None] | tuple[None, bytes]:
        metadata = image_metadata(self.engine, job.prompt, job.seed, str(job.steps), job.edit, preview_of_step=step)
        data = encode_image(image, request.output_format, request.output_quality, metadata)
        if self._outbox is None:
            return None, data
        # The seed tells the images of a request apart where Cog uploads them in any order.
        name = f"{job.seed}" if step is None else f"{job.seed}-preview-{step}"
        return self._outbox.write(data, name, request.output_format), None

    def _generate(self, jobs: list[_Job], check: Check) -> list[_Image]:
        """On the device thread: jobs of equal steps, size and edits."""
        prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
        first = jobs[0]

        def preview(step: int, rows: list[int], images: Tensor) -> None:
            for row, image, flag in zip(rows, images, self._flags([jobs[i] for i in rows], images), strict=True):
                show = jobs[row].show
                if show is not None and not flag:
                    show(_Preview(jobs[row], step, image))

        with self._turn:
            images, timings = self.engine.generate_timed(
                prompts, seeds, str(first.steps), first.size, check, first.edit, preview if first.show else None
            )
        began = time.perf_counter()
        flags = self._flags(jobs, images)
        seconds = time.perf_counter() - began
        return [_Image(image, flag, timings, seconds) for image, flag in zip(images, flags, strict=True)]

    def _flags(self, jobs: list[_Job], images: Tensor) -> list[bool]:
        """Which of the jobs' images are to be withheld."""
        if self._safety is None or not any(job.check_safety for job in jobs):
            return [False] * len(jobs)
        flags = self._safety(images)
        return [flag and job.check_safety for job, flag in zip(jobs, flags, strict=True)]


def _key(job: _Job) -> tuple[object, ...]:
    """Equal for jobs that may share a batch."""
    return job.steps, job.size, job.edit.key, job.show is not None


def _collected(name: K, files: list[Future[OutputImage]]) -> tuple[K, list[OutputImage] | Exception]:
    try:
        return name, [file.result() for file in files]
    except Stopped:
        raise
    except Exception as error:
        return name, error


def _sizes(environ: Mapping[str, str]) -> list[tuple[int, int]]:
    """ "1216x832,832x1216" → its sizes."""
    texts = environ.get("DMD2_SIZES", "").split(",")
    return [parse_size(text.strip(), "DMD2_SIZES") for text in texts if text.strip()]


def _megabytes(environ: Mapping[str, str], name: str, default: int) -> int:
    """In bytes."""
    text = environ.get(name, "").strip()
    if not re.fullmatch(r"\d{0,6}", text, re.ASCII):
        raise UserError(f"{name}={text}: expected megabytes, from 0 to 999999")
    return int(text) * 1_000_000 if text else default


def _max_batch(environ: Mapping[str, str], native: tuple[int, int]) -> int:
    text = environ.get("DMD2_MAX_BATCH", "").strip()
    if not text:
        return 8 if native[0] * native[1] <= 512 * 512 else 4
    if not text.isdigit() or not 1 <= int(text) <= WAITING:
        raise UserError(f"DMD2_MAX_BATCH={text}: expected a number from 1 to {WAITING}")
    return int(text)
