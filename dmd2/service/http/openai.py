"""OpenAI's images API: `/v1/images/generations`, `/v1/images/edits`, `/v1/models`, `/v1/models/NAME`.

Beside OpenAI's own fields: `seed`, `num_inference_steps`, `negative_prompt` and `guidance_scale` (inert: guidance is
distilled into the models), `loras`, `priority` ("bulk" waits behind others) and, of edits, `prompt_strength`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from dmd2.inference.request import ImageRequest, parse_size
from dmd2.runtime.errors import InvalidInput, pattern
from dmd2.service.http.models import Models, Run, Served, request_of, timing
from dmd2.service.http.refusal import NOT_BLANK, ErrorBody, Refusal

if TYPE_CHECKING:
    from dmd2.service.images import OutputImage

MOST_IMAGES = 10
LONGEST_TIMEOUT = 3600
SIZE = pattern(r"^(auto|[1-9]\d{1,4}x[1-9]\d{1,4})$", "auto or WIDTHxHEIGHT in pixels, such as 1024x1024")
LORA = pattern(r"^[^\s,]+$", "a URL or a name, without spaces and commas")
FORMATS: dict[str, Literal["png", "jpg", "webp"]] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is wrong; `param` names the field.",
        401: "No valid key.",
        403: "From a web page that the server does not allow.",
        404: "No such model.",
        408: "Not done within X-Request-Timeout, or the body came too slowly.",
        413: "The body is too large.",
        421: "Host is not this machine's.",
        429: "The queue is full, or the key's rate is used up; Retry-After says when to ask again.",
        499: "The client has gone.",
        500: "The generation failed.",
        503: "Loading, stopping or overloaded; Retry-After says when to ask again.",
    }.items()
}

Timeout = Annotated[
    float | None,
    Header(gt=0, le=LONGEST_TIMEOUT, allow_inf_nan=False, description="Seconds after which the answer is of no use."),
]


class LoraChoice(BaseModel):
    """A LoRA: an https URL, owner/name of the Hugging Face hub, or a name in the weights' own folder."""

    model_config = ConfigDict(extra="forbid", strict=True)
    path: str = Field(pattern=LORA, max_length=1000)
    scale: float = Field(1.0, ge=-4, le=4)


def lora_text(loras: Sequence[LoraChoice]) -> str | None:
    """As an image request names them."""
    return " ".join(f"{lora.path}:{lora.scale:g}" for lora in loras) or None


class Generation(BaseModel):
    """The body of `/v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str = Field(min_length=1, max_length=5000, pattern=NOT_BLANK)
    model: str | None = Field(None, max_length=200, description="One of /v1/models; the first if none is named.")
    n: int | None = Field(1, ge=1, le=MOST_IMAGES)
    size: str | None = Field("auto", pattern=SIZE, description="WxH or auto.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        "auto", description="low: the student of the fewest steps; else of the most."
    )
    background: Literal["auto", "opaque"] | None = Field("auto", description="Images are always opaque.")
    moderation: Literal["auto", "low"] | None = Field("auto", description="Inert: the operator decides.")
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(100, ge=0, le=100, description="Quality of jpeg and webp.")
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="b64_json; for a model that is called dall-e-… url."
    )
    stream: bool | None = False
    partial_images: int | None = Field(
        0,
        ge=0,
        le=3,
        description="Previews of each image of a stream; at most one less than the steps that it takes.",
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Inert.")
    user: str | None = Field(None, max_length=1000, description="Inert.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Inert.")
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="Image i has seed + i, modulo 2^32. None: random.")
    num_inference_steps: int | None = Field(None, ge=1, le=100, description="One of the model's `steps`.")
    negative_prompt: str | None = Field(None, max_length=5000, description="Inert.")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="Inert.")
    loras: list[LoraChoice] | None = Field(None, max_length=5)
    priority: Literal["interactive", "bulk"] | None = "interactive"

    def request(self, served: Served, **more: Any) -> ImageRequest:
        """As the service understands it. Raises InvalidInput."""
        width, height = (None, None) if self.size in (None, "auto") else parse_size(str(self.size), "size")
        steps = self.num_inference_steps or (served.steps[0] if self.quality == "low" else None)
        return request_of(
            steps,
            prompt=self.prompt,
            width=width,
            height=height,
            seed=self.seed,
            output_format=FORMATS[self.output_format or "png"],
            output_quality=max(1, 100 if self.output_compression is None else self.output_compression),
            lora_weights=lora_text(self.loras or ()),
            previews=bool(self.stream and self.partial_images),
            **more,
        )

    @property
    def wants_url(self) -> bool:
        return self.response_format == "url" or (
            self.response_format is None and (self.model or "").startswith("dall-e")
        )


class Edit(Generation):
    """The fields of `/v1/images/edits` that are no files."""

    prompt_strength: float | None = Field(
        None, gt=0, le=1, description="How much of the image goes; by default 1 with a mask, else 0.75."
    )
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="high: without a prompt_strength half of the image stays."
    )

    @property
    def strength(self) -> dict[str, float]:
        if self.prompt_strength is not None:
            return {"prompt_strength": max(0.01, self.prompt_strength)}
        return {"prompt_strength": 0.5 if self.input_fidelity == "high" else 0.75}


@dataclass(frozen=True)
class _File:
    data: bytes
    kind: str
    until: float


class Kept:
    """Files by names that nobody can guess. The oldest go when there are too many bytes.

    Args:
        seconds: how long each is kept, unless there are too many.
        most: bytes of all.
    """

    def __init__(
        self, seconds: float = 3600.0, most: int = 256_000_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self._most, self._clock = seconds, most, clock
        self._files: OrderedDict[str, _File] = OrderedDict()
        self.bytes = 0

    def put(self, data: bytes, form: str) -> str:
        """The name of a new file. `form`: png, jpeg or webp."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._files[name] = _File(data, f"image/{form}", self._clock() + self.seconds)
        self.bytes += len(data)
        self._clean()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Content and media type; None once it is gone."""
        self._clean()
        file = self._files.get(name)
        return None if file is None else (file.data, file.kind)

    def _clean(self) -> None:
        now = self._clock()
        while self._files and (self.bytes > self._most or next(iter(self._files.values())).until <= now):
            self.bytes -= len(self._files.popitem(last=False)[1].data)


class ImageData(BaseModel):
    """One image. One that the safety checker withheld is left out."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class InputDetails(BaseModel):
    """Of the input's tokens."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Text counts by the model's tokenizer, an image by its latents' cells."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails


class ImagesAnswer(BaseModel):
    """What `/v1/images/…` answers."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["low", "high"]
    size: str
    model: str
    usage: Usage


class ModelData(BaseModel):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["dmd2"] = "dmd2"
    steps: list[int]
    size: str
    takes_prompts: bool
    """else a prompt names a class"""
    classes: list[str]


class ModelList(BaseModel):
    """What `/v1/models` answers."""

    object: Literal["list"] = "list"
    data: list[ModelData]


class Answer:
    """Turns what a run generates into OpenAI's shapes.

    Args:
        kind: "image_generation" or "image_edit", of a stream's events.
        link: the URL of an image that is kept, from its name.
    """

    def __init__(
        self, run: Run, body: Generation, kind: str, kept: Kept, link: Callable[[str], str], loop_time: float
    ) -> None:
        self.run, self._body, self._kind, self._kept, self._link = run, body, kind, kept, link
        self._created = int(loop_time)
        self.images: list[OutputImage] = []
        asked, served = run.request, run.served
        steps = asked.num_inference_steps or served.steps[-1]
        self._quality: Literal["low", "high"] = "low" if steps < served.steps[-1] else "high"
        wanted = body.partial_images or 0
        if asked.image is not None:
            from dmd2.diffusion.sampling import timesteps_for_strength  # torch, which the service has loaded by now

            steps = len(timesteps_for_strength(range(steps), asked.prompt_strength))
        spread = {round((i + 1) * steps / (wanted + 1)) for i in range(wanted)}
        self._shown = sorted(spread & set(range(1, steps)))
        """steps whose previews are sent"""

    async def whole(self) -> ImagesAnswer:
        """Raises Refusal."""

        async def take(image: OutputImage) -> None:
            self.images.append(image)

        await self.run.each(take)
        shown = [image for image in self.images if image.data is not None]
        return ImagesAnswer(
            created=self._created,
            data=[self._data(image) for image in shown],
            output_format=self._body.output_format or "png",
            quality=self._quality,
            size="{}x{}".format(*shown[0].size),
            model=self.run.served.name,
            usage=self._usage(self.images),
        )

    async def events(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Sends previews and images as server-sent events, and an error as the last of them."""

        async def take(image: OutputImage) -> None:
            if image.data is None or (image.step is not None and image.step not in self._shown):
                return
            event = {
                "b64_json": base64.b64encode(image.data).decode(),
                "created_at": self._created,
                "size": "{}x{}".format(*image.size),
                "quality": self._quality,
                "background": "opaque",
                "output_format": self._body.output_format or "png",
                "seed": image.seed,
            }
            if image.step is None:
                kind = f"{self._kind}.completed"
                event["usage"] = self._usage([image]).model_dump()
            else:
                kind = f"{self._kind}.partial_image"
                event["partial_image_index"] = self._shown.index(image.step)
            await send(_event(kind, {"type": kind, **event}))

        async def waiting(position: int) -> None:
            await send(f": position {position}\n\n".encode())

        try:
            await self.run.each(take, waiting)
        except Refusal as refusal:
            await send(_event("error", {"type": "error", "error": refusal.error}))

    def _data(self, image: OutputImage) -> ImageData:
        assert image.data is not None
        if self._body.wants_url:
            form = self._body.output_format or "png"
            return ImageData(url=self._link(self._kept.put(image.data, form)), seed=image.seed)
        return ImageData(b64_json=base64.b64encode(image.data).decode(), seed=image.seed)

    def _usage(self, images: list[OutputImage]) -> Usage:
        model = self.run.served.service.engine.model
        cells = [math.prod(image.size) // model.codec.factor**2 for image in images]
        text, image = model.encode_text.count_tokens(self._body.prompt), cells[0] * isinstance(self._body, Edit)
        given, made = text + image, sum(cells)
        details = InputDetails(text_tokens=text, image_tokens=image)
        return Usage(input_tokens=given, output_tokens=made, total_tokens=given + made, input_tokens_details=details)


class Events(Response):
    """Server-sent events that end when the client hangs up; whatever happens, the run's place is given up."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, headers: dict[str, str]) -> None:
        super().__init__(headers=headers | {"X-Accel-Buffering": "no"})  # else nginx keeps events until the end
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def event(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        run = self._answer.run
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await run.unless_gone(receive, self._answer.events(event))
            await send({"type": "http.response.body", "body": b""})
        except Refusal:
            return  # nobody reads any more
        finally:
            run.close()


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def router(
    models: Models, kept: Kept, public_url: str | None = None, clock: Callable[[], float] = time.time
) -> APIRouter:
    """The routes. `public_url`: see `create_app`."""
    routes = APIRouter(prefix="/v1")

    async def answered(
        request: Request, served: Served, body: Generation, asked: ImageRequest, timeout: float | None, kind: str
    ) -> Response:
        more = {"bulk": body.priority == "bulk", "timeout": timeout or 600.0}
        run = served.offer_for(request.state, asked, body.n or 1, body.prompt, **more)
        headers = {"X-Queue-Position": str(run.position)}

        def link(name: str) -> str:
            url = request.url_for("kept", name=name)
            return str(url) if public_url is None else public_url.rstrip("/") + url.path

        made = Answer(run, body, kind, kept, link, clock())
        if body.stream:
            return Events(made, headers)
        answer = await run.unless_gone(request.receive, made.whole())
        headers |= timing(made.images)
        return Response(answer.model_dump_json(exclude_none=True), 200, headers, "application/json")

    @routes.post(
        "/images/generations",
        response_model=ImagesAnswer,
        responses={**ERRORS, 200: {"content": {"text/event-stream": {}}, "description": "Images, or a stream."}},
    )
    async def generations(request: Request, body: Generation, x_request_timeout: Timeout = None) -> Response:
        served = models.find(body.model)
        with _invalid():
            asked = body.request(served)
        return await answered(request, served, body, asked, x_request_timeout, "image_generation")

    @routes.post(
        "/images/edits",
        response_model=ImagesAnswer,
        responses={**ERRORS, 200: {"content": {"text/event-stream": {}}, "description": "Images, or a stream."}},
        openapi_extra={"requestBody": _edit_schema()},
    )
    async def edits(request: Request, x_request_timeout: Timeout = None) -> Response:
        body, files = await read_form(request)
        served = models.find(body.model)
        strength = {"prompt_strength": 1.0} if "mask" in files and body.prompt_strength is None else body.strength
        with _invalid():
            asked = body.request(served, **files, **strength)
        return await answered(request, served, body, asked, x_request_timeout, "image_edit")

    def described(served: Served) -> ModelData:
        engine = served.service.engine
        return ModelData(
            id=served.name,
            created=served.created,
            steps=served.steps,
            size="{}x{}".format(*engine.manifest.native_size),
            takes_prompts=engine.model.takes_prompts,
            classes=engine.manifest.class_names,
        )

    refused: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403, 421, 503)}

    @routes.get("/models", responses=refused)
    async def listed() -> ModelList:
        return ModelList(data=[described(served) for served in models.served.values()])

    @routes.get("/models/{name}", responses={**refused, 404: ERRORS[404]})
    async def retrieved(name: str) -> ModelData:
        return described(models.find(name))

    return routes


@contextlib.contextmanager
def _invalid() -> Any:
    """An InvalidInput within becomes a Refusal."""
    try:
        yield
    except InvalidInput as error:
        raise Refusal.of(error) from None


async def read_form(request: Request) -> tuple[Edit, dict[str, bytes]]:
    """The fields of a multipart form, and the files `image` and `mask`. Raises Refusal."""
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refusal(400, "invalid_value", "expected a body of multipart/form-data")
    async with request.form(max_files=4, max_fields=40, max_part_size=1 << 16) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if name in fields or name in files:
                raise Refusal(400, "invalid_value", f"{name[:50]}: given more than once; expected one", name[:50])
            if isinstance(value, UploadFile):
                files[name] = await value.read()
            else:
                fields[name] = value
    if unknown := [name for name in files if name not in ("image", "mask")]:
        raise Refusal(
            400, "unknown_parameter", f"{unknown[0][:50]}: a file; expected image and mask", unknown[0][:50]
        )
    if "image" not in files:
        raise Refusal(400, "invalid_value", "image: expected a file", "image")
    try:
        if "loras" in fields:
            fields["loras"] = json.loads(fields["loras"])
        return Edit.model_validate(fields, strict=False), files  # a form's values are all texts
    except ValidationError as error:
        raise Refusal.invalid(error) from None
    except (ValueError, RecursionError):
        raise Refusal(400, "invalid_value", "loras: expected a list as JSON", "loras") from None


def _edit_schema() -> dict[str, Any]:
    """Of the form, for the OpenAPI document."""
    schema = Edit.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    for name in ("image", "mask"):
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["properties"]["loras"] = {"type": "string", "description": "The list, as JSON."}
    schema["required"] = ["prompt", "image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
