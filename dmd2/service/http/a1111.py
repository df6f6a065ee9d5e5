"""AUTOMATIC1111's API, `/sdapi/v1`, as Open WebUI, SillyTavern and LibreChat call it.

Fields that mean nothing to distilled models (samplers, schedulers, high-resolution fixes, scripts) are accepted and
have no effect, since these clients send all of theirs; any number of steps becomes the student's that is next below.
LoRAs are named in the prompt, as `<lora:NAME:0.8>`; it may be empty. The chosen checkpoint, progress and interrupts
are each caller's own: by key, or by address where there are no keys.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field

from dmd2.inference.image_input import MOST_BYTES, Role, read_image
from dmd2.inference.request import ImageRequest
from dmd2.runtime.errors import UserError
from dmd2.service.http.models import Models, Run, Served, request_of, timing
from dmd2.service.http.openai import ERRORS, MOST_IMAGES, Timeout
from dmd2.service.http.refusal import Refusal

if TYPE_CHECKING:
    from dmd2.service.images import OutputImage

SAMPLER = "DMD2"
LISTS: dict[str, list[str]] = {
    "samplers": [SAMPLER],
    "schedulers": ["Automatic"],
    "upscalers": ["None"],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
}
"""what there is one of, or nothing, but is asked for"""
LORA = re.compile(r"<lora:([^\s,:<>]{1,1000})(?::(-?\d{1,2}(?:\.\d{1,6})?))?>")
MOST_CALLERS = 1000
"""whose choice of a checkpoint is remembered"""
BASE64 = 4 * MOST_BYTES // 3 * 78 // 76 + 100
"""characters of an image, in lines of 76 or in one"""


class ErrorBody(BaseModel):
    """The shape of errors."""

    error: str
    detail: str
    body: str
    errors: str


class TextToImage(BaseModel):
    """The body of `txt2img`: what has an effect. The rest of what clients send is ignored."""

    model_config = ConfigDict(extra="ignore")
    prompt: str = Field("", max_length=5000, description="Empty: whatever the model makes of no words.")
    negative_prompt: str | None = Field("", max_length=5000, description="Inert.")
    width: int | None = Field(None, ge=16, le=2048)
    height: int | None = Field(None, ge=16, le=2048)
    steps: int | None = Field(None, ge=0, le=1000)
    seed: int | None = Field(-1, ge=-1, le=2**32 - 1, description="-1: random.")
    batch_size: int | None = Field(1, ge=1, le=MOST_IMAGES)
    n_iter: int | None = Field(1, ge=1, le=MOST_IMAGES)
    override_settings: dict[str, Any] | None = None
    send_images: bool | None = True


class ImageToImage(TextToImage):
    """The body of `img2img`."""

    init_images: list[str] = Field(min_length=1, max_length=1, description="Base64 or a data URL.")
    mask: str | None = Field(None, max_length=BASE64)
    inpainting_mask_invert: int | bool | None = 0
    denoising_strength: float | None = Field(0.75, ge=0, le=1)


class Images(BaseModel):
    """PNGs in base64, and how they were made, as JSON in a text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class State(BaseModel):
    """What a caller's requests are doing."""

    skipped: bool = False
    interrupted: bool = False
    job: str = ""
    job_count: int
    job_no: int
    job_timestamp: str = "0"
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    """How far a caller's requests are, in images; within one, by the time that images took lately."""

    progress: float
    eta_relative: float
    state: State
    current_image: str | None = None
    textinfo: str | None = None


class Named(BaseModel):
    """A sampler, scheduler, upscaler or LoRA."""

    name: str
    label: str | None = None
    alias: str | None = None
    path: str | None = None
    aliases: list[str] = []
    options: dict[str, str] = {}
    metadata: dict[str, str] = {}


class Checkpoint(BaseModel):
    """A folder of weights."""

    title: str
    model_name: str
    hash: str
    sha256: str
    filename: str


class Options(BaseModel):
    """The one option that there is. Others may be set, without effect."""

    model_config = ConfigDict(extra="ignore")
    sd_model_checkpoint: str | None = Field(None, max_length=200)


class Settings(BaseModel):
    """What `options` tells."""

    sd_model_checkpoint: str
    sd_checkpoint_hash: str
    samples_format: str = "png"
    CLIP_stop_at_last_layers: int = 1


class _Job:
    """One request under way."""

    def __init__(self, run: Run) -> None:
        self.run, self.images, self.task = run, list["OutputImage"](), asyncio.ensure_future(run.each(self._take))
        self._since: float | None = None  # somebody asked, and it was under way

    async def _take(self, image: OutputImage) -> None:
        self.images.append(image)

    def done(self) -> tuple[float, int]:
        """Its images, and steps of those under way. Steps are not watched, which would cost a decoding each: an image
        is as far as the time says that images took lately, but never done before it is."""
        admission, now, made = self.run.served.admission, time.monotonic(), len(self.images)
        if not self.run.admitted.is_set():
            return 0.0, 0
        if self._since is None:
            self._since = now
        together = min(self.run.request.num_outputs - made, self.run.served.service.max_batch)
        each = admission.seconds_each()
        likely = (now - self._since) / each - made if each else 0.0
        share = min(0.99, max(0.0, likely / together)) if together else 0.0
        return made + share * together, int(share * (self.run.request.num_inference_steps or 0))


class _Callers:
    """What is remembered of each caller."""

    def __init__(self) -> None:
        self._checkpoints: OrderedDict[str, str] = OrderedDict()
        self.jobs: dict[str, list[_Job]] = {}

    def choose(self, caller: str, name: str) -> None:
        self._checkpoints[caller] = name
        self._checkpoints.move_to_end(caller)
        if len(self._checkpoints) > MOST_CALLERS:
            self._checkpoints.popitem(last=False)

    def checkpoint(self, caller: str) -> str | None:
        return self._checkpoints.get(caller)


def decoded(text: str, field: str) -> bytes:
    """An image's content, from base64, in lines or in one, or a data URL. Raises Refusal."""
    try:
        digits = text.partition(",")[2] if text[:5].lower() == "data:" else text
        return base64.b64decode("".join(digits.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, "invalid_value", f"{field}: expected base64 or a data URL", field) from None


def bare(title: str) -> str:
    """The name in a checkpoint's title or path: "emoji.safetensors [abcd1234]" → "emoji"."""
    name, bracket, _ = title.rpartition("[") if title.rstrip().endswith("]") else (title, "", "")
    name = (name if bracket else title).strip().replace("\\", "/").rpartition("/")[2]
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def found(models: Models, name: str | None) -> Served:
    """As `Models.find`; the name may be a checkpoint's title, too."""
    try:
        return models.find(name)
    except Refusal as refusal:
        if refusal.code != "model_not_found":
            raise
        return models.find(bare(name or "") or name)


def asked_by(body: TextToImage, served: Served) -> ImageRequest:
    """As the service understands it. Raises UserError."""
    prompt = LORA.sub("", body.prompt).strip()
    loras = [f"{match[1]}:{match[2] or 1}" for match in LORA.finditer(body.prompt)]
    most = served.steps[-1] if body.steps is None else body.steps
    given: dict[str, Any] = {}
    if isinstance(body, ImageToImage):
        given["image"] = decoded(body.init_images[0], "init_images")
        given["prompt_strength"] = max(0.01, 0.75 if body.denoising_strength is None else body.denoising_strength)
        if body.mask:
            given["mask"] = decoded(body.mask, "mask")
            if body.inpainting_mask_invert:
                inverted = io.BytesIO()
                ImageOps.invert(read_image(given["mask"], "mask", Role.MASK)).save(inverted, "PNG")
                given["mask"] = inverted.getvalue()
    return request_of(
        max((n for n in served.steps if n <= most), default=served.steps[0]),
        prompt=prompt or "no words",
        width=body.width,
        height=body.height,
        seed=None if body.seed == -1 else body.seed,
        output_format="png",
        lora_weights=" ".join(loras) or None,
        **given,
    ).model_copy(update={"prompt": prompt})  # which other doors refuse if it is empty; encoders do not


def _listing(names: list[str]) -> Callable[[], Awaitable[list[Named]]]:
    async def listed() -> list[Named]:
        return [Named(name=name, label=name) for name in names]

    return listed


def router(models: Models) -> APIRouter:
    """The routes."""
    errors: dict[int | str, dict[str, Any]] = {status: ERRORS[status] | {"model": ErrorBody} for status in ERRORS}
    few: dict[int | str, dict[str, Any]] = {status: errors[status] for status in (400, 401, 403, 408, 413, 421, 503)}
    routes, callers = APIRouter(prefix="/sdapi/v1", responses=few), _Callers()

    def chosen(request: Request, name: object = None) -> Served:
        """The model that a caller names now, or has chosen before."""
        return found(models, str(name or callers.checkpoint(request.state.caller) or "") or None)

    async def made(request: Request, response: Response, body: TextToImage, timeout: float | None) -> Images:
        n = (body.batch_size or 1) * (body.n_iter or 1)
        if n > MOST_IMAGES:
            raise Refusal(
                400, "invalid_value", f"batch_size x n_iter: {n}; expected at most {MOST_IMAGES}", "batch_size"
            )
        served = chosen(request, (body.override_settings or {}).get("sd_model_checkpoint"))
        caller = request.state.caller
        try:
            if isinstance(body, ImageToImage):  # megabytes of base64
                asked = await asyncio.to_thread(asked_by, body, served)
            else:
                asked = asked_by(body, served)
        except UserError as error:
            raise Refusal.of(error) from None
        job = _Job(served.offer_for(request.state, asked, n, body.prompt, timeout=timeout or 600.0))
        callers.jobs.setdefault(caller, []).append(job)
        try:
            await job.run.unless_gone(request.receive, asyncio.wait({job.task}))
            if not job.task.cancelled():  # else interrupted: what there is, is the answer
                job.task.result()
        finally:
            job.task.cancel()
            callers.jobs[caller].remove(job)
            if not callers.jobs[caller]:
                del callers.jobs[caller]
        response.headers.update({"X-Queue-Position": str(job.run.position)} | timing(job.images))
        return answered(body, job)

    @routes.post("/txt2img", responses=errors)
    async def txt2img(
        request: Request, response: Response, body: TextToImage, x_request_timeout: Timeout = None
    ) -> Images:
        return await made(request, response, body, x_request_timeout)

    @routes.post("/img2img", responses=errors)
    async def img2img(
        request: Request, response: Response, body: ImageToImage, x_request_timeout: Timeout = None
    ) -> Images:
        return await made(request, response, body, x_request_timeout)

    @routes.get("/options")
    async def options(request: Request) -> Settings:
        served = chosen(request)
        return Settings(sd_model_checkpoint=served.name, sd_checkpoint_hash=sha256_of(served))

    @routes.post("/options", responses={404: errors[404]})
    async def set_options(request: Request, body: Options) -> None:
        if body.sd_model_checkpoint:
            callers.choose(request.state.caller, found(models, body.sd_model_checkpoint).name)

    @routes.get("/progress")
    async def progress(request: Request) -> Progress:
        jobs = callers.jobs.get(request.state.caller, [])
        state = State(job_count=len(jobs), job_no=min(1, len(jobs)))
        if not jobs:
            return Progress(progress=0.0, eta_relative=0.0, state=state)
        parts = [job.done() for job in jobs]
        done, total = sum(images for images, _ in parts), sum(job.run.request.num_outputs for job in jobs)
        each = max(job.run.served.admission.seconds_each() or 0.0 for job in jobs)
        state.sampling_step, state.sampling_steps = parts[0][1], jobs[0].run.request.num_inference_steps or 0
        # Not 0, which to clients means that nothing is under way; so AUTOMATIC1111 has it.
        return Progress(progress=max(0.01, done / total), eta_relative=each * (total - done), state=state)

    @routes.post("/interrupt")
    async def interrupt(request: Request) -> dict[str, str]:
        for job in callers.jobs.get(request.state.caller, []):
            job.task.cancel()
        return {}

    for path, names in LISTS.items():
        routes.get(f"/{path}", name=path)(_listing(names))

    @routes.get("/sd-models")
    async def checkpoints() -> list[Checkpoint]:
        return [
            Checkpoint(title=name, model_name=name, hash=sha[:10], sha256=sha, filename=f"{name}.safetensors")
            for name, sha in ((served.name, sha256_of(served)) for served in models.served.values())
        ]

    @routes.get("/loras")
    async def loras(request: Request) -> list[Named]:
        folder = Path(chosen(request).service.loras.folder) / "lora"
        return [
            Named(name=path.stem, alias=path.stem, path=path.name) for path in sorted(folder.glob("*.safetensors"))
        ]

    return routes


def sha256_of(served: Served) -> str:
    """Of the best student's network."""
    return served.service.engine.sha256(str(served.steps[-1]))


def answered(body: TextToImage, job: _Job) -> Images:
    """What was generated. Raises Refusal if the safety checker withheld all of it."""
    shown = [image for image in job.images if image.data is not None]
    if job.images and not shown:
        raise Refusal(400, "moderation_blocked", "withheld by the safety checker; try another seed")
    asked, seeds = job.run.request, [image.seed for image in shown]
    width, height = shown[0].size if shown else (asked.width or 0, asked.height or 0)
    name = job.run.served.name
    facts = f"Steps: {asked.num_inference_steps}, Sampler: {SAMPLER}, Size: {width}x{height}, Model: {name}"
    info = {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(shown),
        "negative_prompt": body.negative_prompt or "",
        "seed": asked.seed,
        "all_seeds": seeds,
        "width": width,
        "height": height,
        "sampler_name": SAMPLER,
        "cfg_scale": 1.0,
        "steps": asked.num_inference_steps,
        "batch_size": len(shown),
        "sd_model_name": name,
        "sd_model_hash": sha256_of(job.run.served)[:10],
        "infotexts": [f"{asked.prompt}\n{facts}, Seed: {seed}" for seed in seeds],
    }
    images = (
        [base64.b64encode(image.data or b"").decode() for image in shown] if body.send_images is not False else []
    )
    echoed = body.model_dump(exclude={"init_images", "mask"})
    return Images(images=images, parameters=echoed, info=json.dumps(info))
