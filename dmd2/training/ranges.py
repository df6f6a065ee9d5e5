"""What numbers a recipe may hold: ranges as part of a field's type, checked in one place, said in words.

A dataclass whose fields are annotated with these types is judged by `checked` before anything is made of it.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from dmd2.runtime.errors import UserError, shown


def _number(value: object) -> object:
    """Pydantic would take true for 1 and "1" for 1."""
    if isinstance(value, bool | str | bytes):
        raise ValueError("expected a number")
    return value


NUMBER = BeforeValidator(_number)
Count = Annotated[int, Field(ge=1, le=10**9), NUMBER]
"""of steps, images and so on"""
Steps = Annotated[int, Field(ge=0, le=10**9), NUMBER]
SamplerSteps = Annotated[int, Field(ge=2, le=1000), NUMBER]
Seed = Annotated[int, Field(ge=0, lt=2**32), NUMBER]
Width = Annotated[int, Field(ge=1, le=16384), NUMBER]
"""channels of a layer"""
Blocks = Annotated[int, Field(ge=0, le=64), NUMBER]
"""layers of a stage"""
Stages = Annotated[tuple[Blocks, ...], Field(min_length=2, max_length=6)]
"""layers of each stage of a network"""
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), NUMBER]
"""a learning rate. With it and a weight decay of at most 1, a step never overshoots zero by decay alone"""
Part = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), NUMBER]
"""a probability, a share, or a decay of weights"""
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), NUMBER]
"""of an average: with 1 it would never move"""
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False), NUMBER]
"""of a loss, a penalty or a guidance"""
Amount = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False), NUMBER]
Blur = Annotated[float, Field(ge=0, le=16, allow_inf_nan=False), NUMBER]
"""standard deviation in pixels"""
Level = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False), NUMBER]
"""σ"""
Timestep = Annotated[int, Field(ge=0, le=999), NUMBER]
Rank = Annotated[int, Field(ge=1, le=1024), NUMBER]
"""of a LoRA"""
Alpha = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False), NUMBER]
"""a LoRA's strength, divided by its rank"""
Levels = Annotated[tuple[Level, ...], Field(max_length=64)]
Timesteps = Annotated[tuple[Timestep, ...], Field(max_length=1000)]
DataName = Literal["emoji", "images", "latents", "prompts"]
"""where batches come from: see `SOURCES` in `dmd2.training.sources`"""
Name = Annotated[str, Field(min_length=1, max_length=200)]
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")]
"""a folder's name, not a path"""


def field_types(kind: type) -> dict[str, Any]:
    """Each field of a dataclass with its type, ranges included."""
    types = get_type_hints(kind, include_extras=True)
    return {field.name: types[field.name] for field in fields(kind)}


def checked(kind: type, field: str, value: Any) -> Any:
    """`value` as `kind.field` has it: [999, 749] becomes a tuple, 1 a float.

    Raises:
        UserError: it is of another type, or out of the field's range; names field, value and what is valid.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(field_types(kind)[field])
    try:
        return adapter.validate_python(value)
    except ValidationError:
        raise UserError(f"{field}={as_text(value)}: expected {in_words(adapter.json_schema())}") from None


def as_text(value: Any) -> str:
    """A value as `--set` would have it, cut short."""
    if isinstance(value, str):
        return shown(value, 100)
    try:
        return shown(json.dumps(value, ensure_ascii=False), 100)
    except (ValueError, TypeError, RecursionError):
        return shown(repr(value), 100)


def in_words(schema: dict[str, Any]) -> str:
    """A JSON schema's type and range, such as "a number above 0, at most 1"."""
    if "anyOf" in schema:
        return " or ".join(in_words(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"a {'whole ' if kind == 'integer' else ''}number {_bounds(schema)}".rstrip()
    if kind == "string":
        return "a name of letters, digits, '.', '_' and '-'" if "pattern" in schema else "text, not empty"
    if kind == "array":
        return _list_in_words(schema)
    return {"boolean": "true or false", "null": "null"}.get(str(kind), str(kind))


def _bounds(schema: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    return ", ".join(f"{word} {_plain(schema[key])}" for key, word in words.items() if key in schema)


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _list_in_words(schema: dict[str, Any]) -> str:
    fewest, most = schema.get("minItems", 0), schema.get("maxItems")
    item = in_words((schema.get("prefixItems") or [schema["items"]])[0])
    many = str(fewest) if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
    return f"a list of {many}, each {item}"
