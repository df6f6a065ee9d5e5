"""predict.py → the OpenAPI document that `cog build` would make of it.

Cog's server checks requests against `.cog/openapi_schema.json`. `cog build` writes that file with a parser that reads
predict.py without running it, and silently drops or misreads what goes beyond it. This one gives the same bytes for
what predict.py is made of, and refuses the rest: each input is a plain type with an `Input(…)` of literals, the
output an iterator; likewise train.py, which `/trainings` runs. What is the same for every model lies beside it in
`openapi.json`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, TypeAdapter, ValidationError

from dmd2.runtime.errors import UserError, first_error
from dmd2.runtime.files import atomic_text

SCHEMA = Path(".cog") / "openapi_schema.json"

_URI = {"format": "uri", "type": "string"}
_TYPES: dict[str, tuple[type, dict[str, Any]]] = {
    "bool": (bool, {"type": "boolean"}),
    "float": (float, {"type": "number"}),
    "int": (int, {"type": "integer"}),
    "str": (str, {"type": "string"}),
    "Path": (str, _URI),
}
_ITERATORS = ("Iterator[Path]", "AsyncIterator[Path]")
# Input(…)'s keywords: what the schema calls them, which inputs they are for, and the types of their values.
_RULES: dict[str, tuple[str, tuple[str, ...], tuple[type, ...]]] = {
    "ge": ("minimum", ("int", "float"), (int, float)),
    "le": ("maximum", ("int", "float"), (int, float)),
    "min_length": ("minLength", ("str",), (int,)),
    "max_length": ("maxLength", ("str",), (int,)),
    "regex": ("pattern", ("str", "Path"), (str,)),  # a Path without one may be any file of the server
    "choices": ("choices", ("int", "str"), (list,)),
    "default": ("default", tuple(_TYPES), (bool, float, int, str, type(None))),
    "description": ("description", tuple(_TYPES), (str,)),
}

_BOUNDS = {"ge", "le", "min_length", "max_length", "regex"}

Method = ast.FunctionDef | ast.AsyncFunctionDef


def openapi_schema(
    source: str, file: str = "predict.py", target: str = "Predictor", training: str | None = None
) -> str:
    """The OpenAPI document for class `target` of the Python text `source`, as one line of JSON.

    Args:
        file: what messages call the source.
        training: text of a train.py, whose `train` is what `/trainings` runs. It adds the parts that Cog's server
            checks its requests against; without them it would take them for predictions.

    Raises:
        UserError: something that Cog would drop, misread or refuse. Names the parameter and what would be valid.
    """
    module = _Module(source, file)
    method = module.method(target)
    document = json.loads(Path(__file__).with_name("openapi.json").read_text(encoding="utf-8"))
    fixed = document["components"]["schemas"]
    inputs, enums = _inputs(module, method, {"Input", "Output", *fixed}, "Input")
    returns = "nothing" if method.returns is None else ast.unparse(method.returns)
    if returns not in _ITERATORS or "Path" not in module.from_cog:
        module.fail(f"{method.name}()", f"returns {returns}: expected {' or '.join(_ITERATORS)}, of Cog's Path")
    output = {"items": _URI, "title": "Output", "type": "array", "x-cog-array-type": "iterator"}
    if module.decorator(method, "streaming"):
        document["paths"]["/predictions"]["post"]["x-cog-streaming"] = True
    schemas: dict[str, Any] = {"Input": inputs, "Output": output, **enums}
    if training is not None:
        taken = {"TrainingInput", "TrainingOutput", "Input", "Output", *fixed}
        trained = _trained(_Module(training, "train.py"), taken)
        for name in enums.keys() & trained.keys():
            if enums[name] != trained[name]:
                module.fail(name, "has other choices in train.py; expected the same, or another name")
        schemas |= trained
    document["components"]["schemas"] = schemas | fixed
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)  # as Go prints them


def _inputs(module: _Module, method: Method, taken: Set[str], title: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a function's parameters, and those of their choices by name."""
    properties, enums, required = {}, {}, []
    for order, (name, annotation, value) in enumerate(module.parameters(method)):
        if name in taken:
            module.fail(name, "is the name of a part of Cog's schema; choose another")
        optional = re.fullmatch(r"Optional\[(\w+)\]", annotation)
        kind = optional[1] if optional else annotation
        if kind not in _TYPES or (kind == "Path" and "Path" not in module.from_cog):
            module.fail(name, f"type {annotation}: expected {', '.join(_TYPES)} (Cog's), or Optional[…] of one")
        settings = module.settings(name, value)
        module.check(name, kind, bool(optional), settings)
        prop = {"x-order": order} | {_RULES[key][0]: value for key, value in settings.items()}
        if optional:
            prop["nullable"] = True
        if choices := prop.pop("choices", None):
            fields = {"description": "An enumeration.", "enum": choices, "title": name, **_TYPES[kind][1]}
            enums[name] = fields
            prop["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        else:
            prop |= {"title": " ".join(word[:1].upper() + word[1:] for word in name.split("_")), **_TYPES[kind][1]}
        if "default" not in settings:
            required.append(name)
        properties[name] = dict(sorted(prop.items()))
    inputs: dict[str, Any] = {"properties": properties, "title": title, "type": "object"}
    inputs |= {"required": required} if required else {}
    return dict(sorted(inputs.items())), enums


def _trained(module: _Module, taken: Set[str]) -> dict[str, Any]:
    """What train.py adds: its inputs, their choices, and its output, `TrainingOutput(weights=Path)`."""
    functions = [node for node in module.body if isinstance(node, Method) and node.name == "train"]
    if len(functions) != 1:
        module.fail("train()", "expected one, at the top level (not in an `if` or `try`)")
    returns = "nothing" if functions[0].returns is None else ast.unparse(functions[0].returns)
    if returns != "TrainingOutput" or "Path" not in module.from_cog:
        module.fail("train()", f"returns {returns}: expected TrainingOutput, with weights: Path (Cog's)")
    inputs, enums = _inputs(module, functions[0], taken, "TrainingInput")
    weights = {"weights": {"title": "Weights", **_URI}}
    output = {"properties": weights, "required": ["weights"], "title": "TrainingOutput", "type": "object"}
    return {"TrainingInput": inputs, "TrainingOutput": output, **enums}


def max_concurrency(source: str, file: str = "predict.py", target: str = "Predictor") -> int:
    """N of `@concurrent(max=N)` on the class's method; 1 without it.

    Raises:
        UserError: N is not written out, or the method is not async.
    """
    module = _Module(source, file)
    method = module.method(target)
    decorator = module.decorator(method, "concurrent")
    if not isinstance(decorator, ast.Call):
        return 1
    match = re.fullmatch(r"concurrent\(max=([1-9]\d*)\)", ast.unparse(decorator))
    if not match:
        module.fail(f"{method.name}()", f"@{ast.unparse(decorator)}: expected @concurrent(max=N), N written out")
    number = int(match[1])
    if number > 1 and not isinstance(method, ast.AsyncFunctionDef):
        module.fail(f"{method.name}()", f"@concurrent(max={number}) needs `async def`")
    return number


def schema_is_current(folder: Path) -> bool:
    """Whether `.cog/openapi_schema.json` in `folder` is what its predict.py and train.py give."""
    path = folder / SCHEMA
    return path.is_file() and path.read_bytes() == _schema_of(folder).encode()


def write_schema(folder: Path) -> bool:
    """Writes `.cog/openapi_schema.json` beside predict.py unless it is current. Whether it wrote."""
    if schema_is_current(folder):
        return False
    (folder / SCHEMA).parent.mkdir(exist_ok=True)
    atomic_text(folder / SCHEMA, _schema_of(folder))
    return True


def _schema_of(folder: Path) -> str:
    train = folder / "train.py"
    training = train.read_text(encoding="utf-8") if train.is_file() else None
    return openapi_schema((folder / "predict.py").read_text(encoding="utf-8"), training=training)


class _Module:
    """The parsed file."""

    def __init__(self, source: str, file: str) -> None:
        self.file, self.source = file, source
        try:
            self.body = ast.parse(source).body
        except SyntaxError as error:
            raise UserError(f"{file}: line {error.lineno}: {error.msg}") from error
        cogs = [node for node in self.body if isinstance(node, ast.ImportFrom) and node.module == "cog"]
        names = [alias for node in cogs for alias in node.names]
        self.from_cog = {alias.name for alias in names if alias.asname in (None, alias.name)}
        """imported under their own names"""

    def fail(self, name: str, message: str) -> NoReturn:
        raise UserError(f"{self.file}: {name}: {message}")

    def method(self, target: str) -> Method:
        """`run` or `predict` of the class."""
        classes = [node for node in self.body if isinstance(node, ast.ClassDef) and node.name == target]
        if len(classes) != 1:
            self.fail(f"class {target}", "expected one, at the top level (not in an `if` or `try`)")
        methods = [node for node in classes[0].body if isinstance(node, Method) and node.name in ("run", "predict")]
        if len(methods) != 1:
            self.fail(f"class {target}", "expected either run() or predict(), once, in the class itself")
        return methods[0]

    def decorator(self, method: Method, name: str) -> ast.expr | None:
        for node in method.decorator_list:
            function = node.func if isinstance(node, ast.Call) else node
            if ast.unparse(function).split(".")[-1] == name:
                self.imported(f"{method.name}()", function, name)
                return node
        return None

    def parameters(self, method: Method) -> list[tuple[str, str, ast.expr | None]]:
        """(name, annotation, default) of each parameter; of a method, but self."""
        given, where = method.args, f"{method.name}()"
        if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg:
            self.fail(where, "expected plain parameters, without / and *")
        own = method not in self.body
        if own and (not given.args or given.args[0].arg != "self"):
            self.fail(where, "expected self as the first parameter")
        defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
        found = []
        for argument, value in list(zip(given.args, defaults, strict=True))[own:]:
            if argument.annotation is None:
                self.fail(argument.arg, f"has no type; expected one of {', '.join(_TYPES)}")
            found.append((argument.arg, ast.unparse(argument.annotation), value))
        return found

    def settings(self, name: str, value: ast.expr | None) -> dict[str, Any]:
        """What the `Input(…)` says. Without one, an input is required and has no bounds."""
        if value is None:
            return {}
        if not isinstance(value, ast.Call):
            self.fail(name, f"{ast.unparse(value)}: expected Input(default=…)")
        self.imported(name, value.func, "Input")
        if value.args:
            self.fail(name, "Input(…) takes keyword arguments only, such as default=…")
        settings = {}
        for keyword in value.keywords:
            key = keyword.arg or "**"
            if key not in _RULES:
                self.fail(name, f"Input({key}): expected only {', '.join(sorted(_RULES))}")
            if ast.get_source_segment(self.source, keyword) != f"{key}={self.text(keyword.value)}":
                self.fail(name, f"{key}: expected a literal without parentheses")
            settings[key] = self.literal(name, key, keyword.value)
        return settings

    def imported(self, name: str, node: ast.expr, expected: str) -> None:
        if ast.unparse(node) != expected or expected not in self.from_cog:
            self.fail(name, f"{ast.unparse(node)}: expected {expected}, imported with `from cog import {expected}`")

    def text(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.source, node) or ""

    def literal(self, name: str, key: str, node: ast.expr) -> Any:
        """The value of a literal that Cog reads as Python does: its parser knows no escapes and no arithmetic."""
        if isinstance(node, ast.List):
            return [self.literal(name, key, item) for item in node.elts]
        text, value = self.text(node), None
        if text != "None":
            try:
                value = ast.literal_eval(node)
            except ValueError:
                value = ()  # no literal at all
        quoted = text in (f"{raw}{quote}{value}{quote}" for raw in ("", "r") for quote in ('"', "'", '"""', "'''"))
        # Beyond 2**53 Cog loses digits; a number that Python would not print so (1_000, 1e-3) it does not read.
        number = isinstance(value, float | int) and text == repr(value) and abs(value) < 2**53
        if value is None or number or (isinstance(value, str) and quoted and not text.startswith(("r'''", 'r"""'))):
            return int(value) if isinstance(value, float) and value.is_integer() else value
        self.fail(name, f"{key}={text}: expected a plain literal (a string in one part without escapes, or a number)")

    def check(self, name: str, kind: str, optional: bool, settings: dict[str, Any]) -> None:
        """Refuses settings of an input that contradict its type or each other, which Cog refuses or drops."""
        for key, value in settings.items():
            _, kinds, types = _RULES[key]
            if kind not in kinds:
                self.fail(name, f"{key} is for {' and '.join(kinds)}, not for {kind}")
            if type(value) not in types:
                self.fail(name, f"{key}={value!r}: expected a literal {' or '.join(each.__name__ for each in types)}")
        wanted: Any = _TYPES[kind][0]
        bounds = {key.replace("regex", "pattern"): settings[key] for key in settings.keys() & _BOUNDS}
        if "choices" in settings:
            choices = settings["choices"]
            if len(choices) < 2 or any(type(choice) is not wanted for choice in choices):
                self.fail(name, f"choices: expected two or more literals of type {kind}")
            if bounds:
                self.fail(name, "choices: expected no bounds beside them")
            wanted = Literal[tuple(choices)]
        if optional and "default" not in settings:
            self.fail(name, "has no default; expected = Input(default=None, …)")
        default = settings.get("default")
        if "default" in settings and not (optional and default is None):
            try:
                TypeAdapter(Annotated[wanted, Field(**bounds)]).validate_python(default, strict=True)
            except ValidationError as error:
                self.fail(name, f"default={default!r}: {first_error(error)}")
