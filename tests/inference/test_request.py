"""The one description of a request: what it takes, what it refuses, and that `predict.py` says the same."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.inference.request import ImageRequest, parse_size
from dmd2.runtime.errors import MOST, InvalidInput
from dmd2.runtime.paths import ROOT
from dmd2.weights.manifest import read_manifest


def test_the_emojis_own_size_is_the_one_that_is_told() -> None:
    width, height = read_manifest(ROOT / "weights" / "emoji").native_size
    assert width == height and f"emoji: {width})" in (ImageRequest.model_fields["width"].description or "")


def says(name: str) -> dict[str, Any]:
    """What the model says of a field, in `predict.py`'s terms."""
    field = ImageRequest.model_fields[name]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind not in (NoneType, bytes)]
    found: dict[str, Any] = {"description": field.description}
    found["optional"] = NoneType in get_args(field.annotation)
    literal = next((k for k in (field.annotation, *kinds) if get_origin(k) is Literal), None)
    if literal is not None:
        found["choices"] = list(get_args(literal))
        kinds = [type(found["choices"][0])]
    found["type"] = kinds[0].__name__
    for bound in field.metadata:
        found |= {key: getattr(bound, key) for key in ("ge", "le", "min_length", "max_length") if hasattr(bound, key)}
    return found if field.is_required() else found | {"default": field.default}


def test_predict_py_says_the_same_word_for_word() -> None:
    tree = ast.parse((ROOT / "predict.py").read_text(encoding="utf-8"))
    run = next(n for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef) and n.name == "run")
    repeated = {}
    for parameter, default in zip(run.args.args[1:], run.args.defaults, strict=True):
        assert isinstance(default, ast.Call) and parameter.annotation is not None
        kind = ast.unparse(parameter.annotation)
        said = {str(k.arg): ast.literal_eval(k.value) for k in default.keywords if k.arg != "regex"}
        kind, optional = kind.removeprefix("Optional[").removesuffix("]"), kind.startswith("Optional[")
        repeated[parameter.arg] = {"type": kind, "optional": optional, **said}
    assert repeated == {name: says(name) for name in ImageRequest.model_fields}
    assert list(repeated) == list(ImageRequest.model_fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "prompt: field required"),
        ({"prompt": ""}, "prompt: empty; expected some words"),
        ({"prompt": " \n"}, "prompt: empty; expected some words"),
        ({"prompt": 5}, "prompt 5: expected a valid string"),
        ({"num_outputs": 0}, "num_outputs 0: expected greater than or equal to 1"),
        ({"seed": 2**32}, "seed 4294967296: expected less than or equal to 4294967295"),
        ({"seed": 0.5}, "seed 0.5: expected a valid integer"),
        ({"prompt_strength": float("nan")}, "prompt_strength nan: expected less than or equal to 1"),
        ({"output_format": "gif"}, "output_format gif: expected 'webp', 'jpg' or 'png'"),
        ({"aspect_ratio": "x" * 10**6}, "aspect_ratio: expected '1:1', '16:9'"),
        ({"colour": 1}, "colour 1: extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        ImageRequest(**({"prompt": "an owl"} if values and "prompt" not in values else {}) | values)
    assert str(error.value).lower().startswith(message.lower())
    assert len(str(error.value)) <= MOST and str(error.value).startswith(error.value.field)


def test_whole_floats_are_integers_and_a_line_of_json_is_a_request() -> None:
    """As Cog hands over 4.0 for an integer; and what a bulk job reads."""
    line = '{"prompt": "an owl", "seed": 7.0, "num_outputs": 2.0, "image": "a/b.png"}'
    request = ImageRequest(**json.loads(line))
    assert (request.seed, request.num_outputs, request.image) == (7, 2, Path("a/b.png"))
    assert type(request.seed) is int and not request.is_plain and ImageRequest(prompt="an owl").is_plain


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 99999), st.integers(0, 99999), st.text(max_size=8))
def test_sizes_are_read_or_refused_by_name(width: int, height: int, text: str) -> None:
    assert parse_size(f"{width}x{height}", "size") == (width, height)
    try:
        found = parse_size(text, "size")
    except InvalidInput as error:
        assert error.field == "size" and "expected WIDTHxHEIGHT" in str(error)
    else:
        assert min(found) >= 0
