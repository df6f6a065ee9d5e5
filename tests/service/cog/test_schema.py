"""predict.py → Cog's OpenAPI document: the very bytes, and a clear refusal of whatever Cog would lose."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmd2.runtime.errors import UserError
from dmd2.service.cog.schema import max_concurrency, openapi_schema, schema_is_current, write_schema

ROOT = Path(__file__).resolve().parents[3]

IMPORTS = """
from typing import AsyncIterator, Iterator, List, Literal, Optional
import cog
from cog import BasePredictor, Input, Path, concurrent, streaming
"""

PREDICT = f"""{IMPORTS}
class Predictor(BasePredictor):
    def setup(self) -> None:
        self.ready = True

    @streaming
    @concurrent(max=4)
    async def predict(
        self,
        prompt: str = Input(description="Text prompt", min_length=1, max_length=20),
        width: int = Input(description="Width", ge=16, le=128, default=64),
        num_inference_steps: int = Input(description="Steps", choices=[1, 4], default=1),
        seed: Optional[int] = Input(description="Seed", default=None),
        image: Optional[Path] = Input(description="Image", default=None),
    ) -> AsyncIterator[Path]:
        yield Path("x.png")
"""

# What Cog's server showed to enforce, of the predict.py above. The order of the keys here does not matter.
INPUT = {
    "title": "Input",
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {
            "x-order": 0,
            "title": "Prompt",
            "type": "string",
            "minLength": 1,
            "maxLength": 20,
            "description": "Text prompt",
        },
        "width": {
            "x-order": 1,
            "title": "Width",
            "type": "integer",
            "default": 64,
            "minimum": 16,
            "maximum": 128,
            "description": "Width",
        },
        "num_inference_steps": {
            "x-order": 2,
            "allOf": [{"$ref": "#/components/schemas/num_inference_steps"}],
            "default": 1,
            "description": "Steps",
        },
        "seed": {
            "x-order": 3,
            "title": "Seed",
            "type": "integer",
            "nullable": True,
            "default": None,
            "description": "Seed",
        },
        "image": {
            "x-order": 4,
            "title": "Image",
            "type": "string",
            "format": "uri",
            "nullable": True,
            "default": None,
            "description": "Image",
        },
    },
}
OUTPUT = {
    "title": "Output",
    "type": "array",
    "items": {"type": "string", "format": "uri"},
    "x-cog-array-type": "iterator",
}
ENUM = {"title": "num_inference_steps", "description": "An enumeration.", "enum": [1, 4], "type": "integer"}


def predictor(
    parameters: str, returns: str = " -> Iterator[Path]", above: str = "", method: str = "def predict"
) -> str:
    """A predict.py with these parameters."""
    inside = f"\n    {above}" if above else ""
    head = f"{IMPORTS}\nclass Predictor(BasePredictor):{inside}\n"
    return f"{head}    {method}(self, {parameters}){returns}:\n        ...\n"


def input_of(parameter: str) -> dict[str, Any]:
    """The schema of one parameter, and whether it is required."""
    inputs = json.loads(openapi_schema(predictor(parameter)))["components"]["schemas"]["Input"]
    name, schema = next(iter(inputs["properties"].items()))
    return schema | {"required": name in inputs.get("required", [])}


# The document


def test_the_example_says_what_cogs_server_enforces() -> None:
    document = json.loads(openapi_schema(PREDICT))
    schemas = document["components"]["schemas"]
    assert schemas["Input"] == INPUT and schemas["Output"] == OUTPUT and schemas["num_inference_steps"] == ENUM
    assert (document["openapi"], document["info"]) == ("3.0.2", {"title": "Cog", "version": "0.23.1"})
    post = document["paths"]["/predictions"]["post"]
    assert post["operationId"] == "predict_predictions_post" and post["x-cog-streaming"] is True
    assert list(schemas["Input"]["properties"]) == ["prompt", "width", "num_inference_steps", "seed", "image"]


def test_the_bytes_are_those_of_gos_encoder() -> None:
    """Fields in alphabetical order, inputs and components in order of appearance; no spaces, no newline."""
    text = openapi_schema(PREDICT)
    assert text.startswith(
        '{"components":{"schemas":{"Input":{"properties":{'
        '"prompt":{"description":"Text prompt","maxLength":20,"minLength":1,"title":"Prompt","type":"string",'
        '"x-order":0},'
        '"width":{"default":64,"description":"Width","maximum":128,"minimum":16,"title":"Width","type":"integer",'
        '"x-order":1},'
        '"num_inference_steps":{"allOf":[{"$ref":"#/components/schemas/num_inference_steps"}],"default":1,'
        '"description":"Steps","x-order":2},'
        '"seed":{"default":null,"description":"Seed","nullable":true,"title":"Seed","type":"integer","x-order":3},'
        '"image":{"default":null,"description":"Image","format":"uri","nullable":true,"title":"Image","type":"string",'
        '"x-order":4}},"required":["prompt"],"title":"Input","type":"object"},'
        '"Output":{"items":{"format":"uri","type":"string"},"title":"Output","type":"array",'
        '"x-cog-array-type":"iterator"},'
        '"num_inference_steps":{"description":"An enumeration.","enum":[1,4],"title":"num_inference_steps",'
        '"type":"integer"},'
        '"PredictionRequest":{"properties":{"id":{"title":"Id","type":"string"},'
        '"input":{"$ref":"#/components/schemas/Input"}},"title":"PredictionRequest","type":"object"},'
    )
    document = json.loads(text)
    assert list(document) == ["components", "info", "openapi", "paths"]
    assert list(document["paths"]) == ["/", "/health-check", "/predictions", "/predictions/{prediction_id}/cancel"]
    assert text == json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def test_every_reference_leads_somewhere() -> None:
    text = openapi_schema(PREDICT)
    schemas = json.loads(text)["components"]["schemas"]
    for part in text.split('"$ref":"')[1:]:
        assert part.split('"')[0].removeprefix("#/components/schemas/") in schemas


def test_the_document_names_the_cog_that_is_installed() -> None:
    version = importlib.metadata.version("cog")
    assert json.loads(openapi_schema(PREDICT))["info"]["version"] == version
    assert f"cog=={version}" in (ROOT / "requirements-dev.txt").read_text().split()


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("text: str", {"type": "string", "title": "Text", "required": True}),
        (
            "some_text: str = Input(default='a')",
            {"type": "string", "title": "Some Text", "default": "a", "required": False},
        ),
        ("flag: bool = Input(default=False)", {"type": "boolean", "default": False, "required": False}),
        ("scale: float = Input(ge=0, le=1.5, default=0.25)", {"minimum": 0, "maximum": 1.5, "default": 0.25}),
        ("scale: float = Input(default=1)", {"type": "number", "default": 1}),
        ("shift: int = Input(default=-3, ge=-4)", {"type": "integer", "default": -3, "minimum": -4}),
        ("seed: int = Input(ge=0, le=4294967295)", {"maximum": 4294967295, "required": True}),
        (
            "seed: Optional[int] = Input(default=None)",
            {"type": "integer", "nullable": True, "default": None, "required": False},
        ),
        ("code: str = Input(regex=r'^a\\d$', default='a1')", {"pattern": r"^a\d$", "default": "a1"}),
        ("image: Path = Input(regex=r'^(https?://|data:)')", {"pattern": "^(https?://|data:)", "format": "uri"}),
        ("text: str = Input(description='''two\nlines''')", {"description": "two\nlines"}),
    ],
)
def test_an_input_is_described_as_cog_describes_it(parameter: str, expected: dict[str, Any]) -> None:
    assert expected.items() <= input_of(parameter).items()


def test_numbers_that_are_whole_are_printed_whole() -> None:
    assert '"maximum":2,' in openapi_schema(predictor("scale: float = Input(default=1.0, le=2.0)"))
    assert '"default":1,' in openapi_schema(predictor("scale: float = Input(default=1.0, le=2.0)"))


def test_characters_that_go_escapes_are_escaped() -> None:
    text = openapi_schema(predictor("text: str = Input(description='<b> & ü')"))
    assert r'"description":"\u003cb\u003e \u0026 ü"' in text


def test_without_streaming_the_output_is_the_same() -> None:
    document = json.loads(openapi_schema(PREDICT.replace("    @streaming\n", "")))
    assert document["components"]["schemas"]["Output"] == OUTPUT
    assert "x-cog-streaming" not in document["paths"]["/predictions"]["post"]


def test_run_is_as_good_as_predict() -> None:
    assert openapi_schema(predictor("text: str", method="def run")) == openapi_schema(predictor("text: str"))


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=30))
def test_a_description_arrives_as_it_was_written_or_is_refused(text: str) -> None:
    source = predictor(f"text: str = Input(description={text!r})")
    try:
        schema = json.loads(openapi_schema(source))["components"]["schemas"]["Input"]["properties"]["text"]
    except UserError as error:
        assert "\\" in repr(text) and "description" in str(error)
    else:
        assert schema["description"] == text


@given(st.integers(1 - 2**53, 2**53 - 1), st.integers(1 - 2**53, 2**53 - 1))
def test_bounds_arrive_exactly(a: int, b: int) -> None:
    low, high = sorted((a, b))
    schema = input_of(f"number: int = Input(ge={low}, le={high}, default={high})")
    assert (schema["minimum"], schema["maximum"], schema["default"]) == (low, high, high)


# Refusals


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ("text", "text: has no type; expected one of bool"),
        ("text='a'", "text: has no type"),
        ("steps: Literal[1, 4] = 1", "steps: type Literal[1, 4]: expected bool"),
        ("mode: Mode", "mode: type Mode: expected bool"),
        ("text: Annotated[str, Input()] = 'a'", "text: type Annotated[str, Input()]: expected"),
        ("text: list = 'a'", "text: type list: expected"),
        ("image: cog.Path", "image: type cog.Path: expected"),
        ("seed: Optional[int]", "seed: has no default; expected = Input(default=None, …)"),
        ("seed: int = None", "seed: None: expected Input(default=…)"),
        ("seed: int = Input(default=None)", "seed: default=None: Input should be a valid integer"),
        ("steps: int = BORROWED", "steps: BORROWED: expected Input(default=…)"),
        ("steps: int = Input(default=BORROWED)", "steps: default=BORROWED: expected a plain literal"),
        ("steps: int = Input(default=2 * 2)", "steps: default=2 * 2: expected a plain literal"),
        ("steps: int = Input(default=(4))", "steps: default: expected a literal without parentheses"),
        ("steps: int = Input(default_factory=int)", "steps: Input(default_factory): expected only choices, default"),
        ("steps: int = Input(4)", "steps: Input(…) takes keyword arguments only"),
        ("steps: int = Input(**COMMON)", "steps: Input(**): expected only"),
        ("steps: int = Input(minimum=1)", "steps: Input(minimum): expected only"),
        (
            "steps: int = cog.Input(default=4)",
            "steps: cog.Input: expected Input, imported with `from cog import Input`",
        ),
        ("steps: int = int(4)", "steps: int: expected Input"),
        ("steps: int = Input(ge=2**31 - 1)", "steps: ge=2**31 - 1: expected a plain literal"),
        ("steps: int = Input(ge=LOW)", "steps: ge=LOW: expected a plain literal"),
        ("steps: int = Input(le=1_000)", "steps: le=1_000: expected a plain literal"),
        ("steps: int = Input(le=0xFF)", "steps: le=0xFF: expected a plain literal"),
        ("scale: float = Input(le=1e-3)", "scale: le=1e-3: expected a plain literal"),
        ("steps: int = Input(le=9007199254740993)", "steps: le=9007199254740993: expected a plain literal"),
        ("steps: int = Input(ge=True)", "steps: ge=True: expected a literal int or float"),
        ("text: str = Input(min_length=1.5)", "text: min_length=1.5: expected a literal int"),
        ("text: str = Input(ge=1)", "text: ge is for int and float, not for str"),
        ("steps: int = Input(regex='1')", "steps: regex is for str and Path, not for int"),
        ("scale: float = Input(choices=[0.5, 1.0])", "scale: choices is for int and str, not for float"),
        ("steps: int = Input(choices=[1])", "steps: choices: expected two or more literals of type int"),
        ("steps: int = Input(choices=[1, '4'])", "steps: choices: expected two or more literals of type int"),
        ("steps: int = Input(choices=(1, 4))", "steps: choices=(1, 4): expected a plain literal"),
        ("steps: int = Input(choices=list(range(4)))", "steps: choices=list(range(4)): expected a plain literal"),
        ("steps: int = Input(choices=BORROWED)", "steps: choices=BORROWED: expected a plain literal"),
        ("steps: int = Input(choices=[1, 4], ge=1)", "steps: choices: expected no bounds beside them"),
        ("steps: int = Input(choices=[1, 4], default=2)", "steps: default=2: Input should be 1 or 4"),
        ("steps: int = Input(ge=1, le=4, default=5)", "steps: default=5: Input should be less than or equal to 4"),
        ("text: str = Input(min_length=1, default='')", "text: default='': String should have at least 1 character"),
        ("steps: int = Input(default=1.5)", "steps: default=1.5: Input should be a valid integer"),
        ("steps: int = Input(default=True)", "steps: default=True: Input should be a valid integer"),
        ("text: str = Input(description='a' 'b')", "text: description='a' 'b': expected a plain literal"),
        ("text: str = Input(description=f'a')", "text: description=f'a': expected a plain literal"),
        ("text: str = Input(description='a\\n')", "text: description='a\\n': expected a plain literal"),
        ("text: str = Input(description=TEXT)", "text: description=TEXT: expected a plain literal"),
        ("text: str = Input(description=('a'))", "text: description: expected a literal without parentheses"),
        (
            "text: str = Input(description=(  # why\n 'a'))",
            "text: description: expected a literal without parentheses",
        ),
        ("text: str = Input(description=r'''a''')", "text: description=r'''a''': expected a plain literal"),
        ("Input: str", "Input: is the name of a part of Cog's schema"),
        ("Status: int = Input(choices=[1, 4])", "Status: is the name of a part of Cog's schema"),
        ("*, text: str", "predict(): expected plain parameters"),
        ("**more: str", "predict(): expected plain parameters"),
    ],
)
def test_parameters_that_cog_would_lose_are_refused(parameters: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        openapi_schema(predictor(parameters))
    assert str(caught.value).startswith(f"predict.py: {named}"), caught.value


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (
            predictor("text: str", ""),
            "predict(): returns nothing: expected Iterator[Path] or AsyncIterator[Path], of Cog's Path",
        ),
        (predictor("text: str", " -> None"), "predict(): returns None: expected Iterator[Path]"),
        (predictor("text: str", " -> Optional[str]"), "predict(): returns Optional[str]: expected Iterator[Path]"),
        (predictor("text: str", " -> Iterator[int]"), "predict(): returns Iterator[int]: expected Iterator[Path]"),
        (predictor("text: str", " -> List[Path]"), "predict(): returns List[Path]: expected Iterator[Path]"),
        (predictor("text: str", above="@cog.streaming"), "predict(): cog.streaming: expected streaming, imported"),
        (predictor("text: str").replace("self, ", ""), "predict(): expected self as the first parameter"),
        (predictor("text: str").replace("Predictor(", "Painter("), "class Predictor: expected one, at the top level"),
        (predictor("text: str").replace("predict(self", "draw(self"), "class Predictor: expected either run() or"),
        (predictor("text: str") + "    def run(self): ...\n", "class Predictor: expected either run() or predict()"),
        (IMPORTS + "if True:\n    class Predictor: ...\n", "class Predictor: expected one, at the top level"),
        (
            "from pathlib import Path\n" + predictor("a: Path").replace("Path, concurrent", "concurrent"),
            "a: type Path: expected",
        ),
        (predictor("a: int = Input()").replace("Input, ", "", 1), "a: Input: expected Input, imported"),
        ("A = 1\n" + predictor("a: int = Input(default=A)"), "a: default=A: expected a plain literal"),
        ("class Predictor(:\n", "line 1: "),
    ],
)
def test_sources_that_cog_would_misread_are_refused(source: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        openapi_schema(source)
    assert str(caught.value).startswith(f"predict.py: {named}"), caught.value


# Concurrency


@pytest.mark.parametrize(
    ("above", "method", "expected"),
    [
        ("", "def predict", 1),
        ("@concurrent", "async def predict", 1),
        ("@concurrent(max=1)", "def predict", 1),
        ("@concurrent(max=16)", "async def predict", 16),
        ("@concurrent(max=16)", "async def run", 16),
    ],
)
def test_max_concurrency_is_read_from_the_decorator(above: str, method: str, expected: int) -> None:
    assert max_concurrency(predictor("a: int", above=above, method=method)) == expected


@pytest.mark.parametrize("given", ["max=N", "max=0", "max=-1", "max=2.0", "max=True", "4", "", "max=4, more=1"])
def test_concurrency_that_is_not_written_out_is_refused(given: str) -> None:
    with pytest.raises(
        UserError, match=r"predict\.py: predict\(\): @concurrent\(.*\): expected @concurrent\(max=N\)"
    ):
        max_concurrency(predictor("a: int", above=f"@concurrent({given})", method="async def predict"))


def test_concurrency_needs_async() -> None:
    with pytest.raises(UserError, match=r"@concurrent\(max=2\) needs `async def`"):
        max_concurrency(predictor("a: int", above="@concurrent(max=2)"))


# The file


def test_the_file_is_written_once_and_compared_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "predict.py").write_text(PREDICT)
    assert not schema_is_current(tmp_path)
    assert write_schema(tmp_path) and not write_schema(tmp_path)
    assert schema_is_current(tmp_path)
    path = tmp_path / ".cog" / "openapi_schema.json"
    assert path.read_bytes() == openapi_schema(PREDICT).encode()
    assert [file.name for file in path.parent.iterdir()] == ["openapi_schema.json"]
    path.write_text(path.read_text() + "\n")
    assert not schema_is_current(tmp_path)


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "openapi-schema"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_writes_checks_and_refuses(tmp_path: Path) -> None:
    source = tmp_path / "predict.py"
    source.write_text(PREDICT)
    missing = script("--check", "--folder", tmp_path)
    assert missing.returncode == 1 and "run scripts/openapi-schema" in missing.stderr
    assert not (tmp_path / ".cog").exists()

    assert script("--folder", tmp_path).stdout.endswith("openapi_schema.json: written\n")
    assert script("--check", "--folder", tmp_path).returncode == 0

    source.write_text(PREDICT.replace("le=128", "le=MOST"))
    refused = script("--check", "--folder", tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("openapi-schema: predict.py: width: le=MOST: ")
    assert refused.stderr.count("\n") == 1


def test_the_repositorys_file_is_what_its_predict_py_gives() -> None:
    assert schema_is_current(ROOT), "run scripts/openapi-schema"


TRAIN = """
from cog import BaseModel, Input, Path

class TrainingOutput(BaseModel):
    weights: Path

def train(
    prompts: str = Input(description="What"),
    num_inference_steps: int = Input(description="Steps", choices=[1, 4], default=1),
) -> TrainingOutput:
    ...
"""
BESIDE = """
from cog import BaseRunner, Input, Path

class Predictor(BaseRunner):
    def run(
        self, num_inference_steps: int = Input(description="Steps", choices=[1, 4], default=4)
    ) -> Iterator[Path]:
        ...
"""


def test_a_training_adds_its_parts_and_changes_no_other() -> None:
    alone, both = (json.loads(openapi_schema(BESIDE, training=train)) for train in (None, TRAIN))
    schemas = both["components"]["schemas"]
    inputs, output = schemas.pop("TrainingInput"), schemas.pop("TrainingOutput")
    assert both == alone
    assert inputs["required"] == ["prompts"] and list(inputs["properties"]) == ["prompts", "num_inference_steps"]
    assert inputs["properties"]["num_inference_steps"]["default"] == 1
    assert output["properties"]["weights"]["format"] == "uri"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("choices=[1, 4]", "choices=[1, 2]", "num_inference_steps: has other choices in train.py"),
        ("-> TrainingOutput", "-> str", "train.py: train\\(\\): returns str: expected TrainingOutput"),
        ("def train(", "def other(", "train.py: train\\(\\): expected one"),
        ("prompts: str", "TrainingInput: str", "train.py: TrainingInput: is the name of a part"),
        ("prompts: str", "prompts", "train.py: prompts: has no type"),
    ],
)
def test_a_training_that_cog_would_misread_is_refused(old: str, new: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        openapi_schema(BESIDE, training=TRAIN.replace(old, new))
