"""What can be asked for: names, types, bounds, defaults, descriptions, and what follows from them for some weights.

The command line's options are made from it, the service checks by it; `predict.py` repeats it, as Cog reads that
file without running it.
"""

from __future__ import annotations

import math
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dmd2.runtime.errors import InvalidInput, UserError, first_error, shown

if TYPE_CHECKING:
    from dmd2.inference.engine import Engine
    from dmd2.inference.inputs import InputImages

MAX_PIXELS = 1024 * 1024
"""of an image that any weights may be asked for; more only if their own size is large"""


class ImageRequest(BaseModel):
    """What a caller asks for. None: whoever serves it chooses.

    Raises:
        InvalidInput: something of it is unknown, of another type or out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(
        min_length=1,
        max_length=5000,
        description="What to show. Beyond the text encoder's window it is read in parts; at most 1500 tokens.",
    )
    negative_prompt: str = Field(
        "", description="Inert, accepted for compatibility: a distilled model generates without guidance."
    )
    width: int | None = Field(
        None,
        ge=16,
        le=2048,
        description="Pixels, a multiple of 8. Empty: the weights' own size (SDXL: 1024, emoji: 128).",
    )
    height: int | None = Field(None, ge=16, le=2048, description="Pixels, as width.")
    aspect_ratio: Literal["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"] | None = (
        Field(
            None,
            description="Instead of width and height: this shape, in about as many pixels as the weights' own size.",
        )
    )
    image: Path | bytes | None = Field(
        None, description="Image to begin with (PNG, JPEG, WebP), by https or data URL; width and height follow it."
    )
    mask: Path | bytes | None = Field(
        None, description="Light, or a hole in an opaque image, where image is painted anew. Resized to image."
    )
    prompt_strength: float = Field(
        0.8,
        ge=0.01,
        le=1,
        description="How much of image goes: 1 is all. Four steps know 0.25, 0.5, 0.75 and 1 and round down.",
    )
    lora_weights: str | None = Field(
        None,
        max_length=2000,
        description="LoRAs, by spaces or commas: https URL, owner/name of the hub, name. Each may end in :scale.",
    )
    lora_scale: float = Field(1, ge=-4, le=4, description="Of all LoRAs that name no scale of their own.")
    control_image: Path | bytes | None = Field(
        None, description="Image whose lines (or depth, …) are followed, as the control was trained for."
    )
    control: str | None = Field(
        None,
        max_length=100,
        description="Name of one of the weights' own ControlNets or T2I-Adapters. Empty: the only one.",
    )
    control_scale: float = Field(0.8, ge=0, le=2, description="How much control_image counts.")
    num_outputs: int = Field(1, ge=1, le=4, description="How many images.")
    num_inference_steps: Literal[1, 4] | None = Field(
        None, description="Each is a distilled model of its own: 1 is faster, 4 better. Empty: the most there is."
    )
    guidance_scale: float = Field(
        0, ge=0, le=20, description="Inert, accepted for compatibility: guidance is distilled into the model."
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=4294967295,
        description="Of the first image; image i has seed + i. Empty: random (see the metrics and the log).",
    )
    output_format: Literal["webp", "jpg", "png"] = Field("webp", description="Of the files.")
    output_quality: int = Field(80, ge=1, le=100, description="Of webp and jpg; png is lossless.")
    disable_safety_checker: bool = Field(
        False, description="Do not check the images. Only where the operator allows it."
    )
    previews: bool = Field(
        False, description="Also show rough images of the steps before the last, as they are made; for SSE clients."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field, given = shown(str(first["loc"][0]), 50), first["input"]
            what = first_error(error).partition(": ")[2].removeprefix("Value error, ")
            what = re.sub("^(Input|String) should (be |have |match )?", "expected ", what)
            brief = isinstance(given, int | float) or (isinstance(given, str) and given.strip() and len(given) <= 50)
            raise InvalidInput(field, what, shown(given) if brief else None) from None

    @field_validator("prompt", mode="before")
    @classmethod
    def _has_words(cls, prompt: object) -> object:
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError("empty; expected some words")
        return prompt

    @property
    def is_plain(self) -> bool:
        """Whether it is text-to-image with the weights as they are."""
        given = (self.image, self.mask, self.lora_weights, self.control, self.control_image)
        return all(value is None or value == "" for value in given)


def resolve_request(
    request: ImageRequest, engine: Engine, given: InputImages | None = None
) -> tuple[tuple[int, int], int, int]:
    """Size (width, height), steps and first seed of a request; what is given may choose the size's ratio.

    Raises:
        UserError: the weights cannot do this; names the input and what would be valid.
    """
    engine.model.encode_text.token_chunks(request.prompt)
    students, native = engine.manifest.students, engine.manifest.native_size
    steps = request.num_inference_steps or max(students)
    if steps not in students:
        valid = " or ".join(map(str, sorted(students)))
        raise InvalidInput("num_inference_steps", f"{steps}; these weights generate in {valid}")
    unit = max(engine.model.size_unit, native[0] // 16)
    asked = (request.width or native[0], request.height or native[1]) if request.width or request.height else None
    if request.aspect_ratio is not None:
        if asked is not None:
            raise InvalidInput("aspect_ratio", "given beside width or height; expected one or the other")
        asked = aspect_size(request.aspect_ratio, native, unit)
    size = asked or native if given is None else given.size(asked, native, unit)
    engine.model.check_size(size)
    most = max(4 * native[0] * native[1], MAX_PIXELS)
    if size[0] * size[1] > most:
        raise InvalidInput("width, height", f"{size[0]}x{size[1]}; expected at most {most} pixels in all")
    return size, steps, secrets.randbelow(2**32) if request.seed is None else request.seed


def check_together(
    image: object, mask: object, strength: float, control: object = None, control_image: object = None
) -> None:
    """Raises UserError unless what is given (or None) goes together."""
    if mask is not None and image is None:
        raise InvalidInput("mask", "given without an image; expected the image that it is a mask of")
    if not 0 < strength <= 1:
        raise InvalidInput("prompt_strength", f"{strength}; expected more than 0, at most 1")
    if (control is None) != (control_image is None):
        raise UserError("control, control_image: expected both or neither")


def aspect_size(ratio: str, native: tuple[int, int], unit: int) -> tuple[int, int]:
    """Width and height, multiples of `unit`, of about the ratio "W:H" and with about as many pixels as `native`."""
    w, h = (int(part) for part in ratio.split(":"))
    pixels = native[0] * native[1]
    sides = math.sqrt(pixels * w / h), math.sqrt(pixels * h / w)
    width, height = (max(1, round(side / unit)) * unit for side in sides)
    return width, height


def parse_size(text: str, field: str) -> tuple[int, int]:
    """ "1216x832" → 1216, 832. Raises InvalidInput, naming `field`, if it is no size."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    if not match:
        raise InvalidInput(field, "expected WIDTHxHEIGHT in pixels, such as 64x64", shown(text, 50))
    return int(match[1]), int(match[2])
