"""predict.py → the OpenAPI document that `cog build` would make of it.

Cog's server checks requests against `.cog/openapi_schema.json`. `cog build` writes that file with a parser that reads
predict.py without running it, and silently drops or misreads what goes beyond it. This one gives the same bytes for
what both can read, and refuses the rest. What is the same for every model lies beside it in `openapi.json`.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dmd2.runtime.errors import UserError
from dmd2.runtime.files import atomic_text

SCHEMA = Path(".cog") / "openapi_schema.json"

_TYPES: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
    "Path": {"format": "uri", "type": "string"},
    "Secret": {"format": "password", "type": "string", "writeOnly": True, "x-cog-secret": True},
}
_VALUES: dict[str, tuple[type, ...]] = {"bool": (bool,), "float": (int, float), "int": (int,)}  # all others: str
_TEXT_ITERATORS = ("ConcatenateIterator", "AsyncConcatenateIterator")
_ITERATORS = ("Iterator", "AsyncIterator", *_TEXT_ITERATORS)
_COGS_OWN = ("Path", "Secret", *_TEXT_ITERATORS)
# Input(…)'s keywords: what they are called in the schema, and which types they are for.
_RULES = {
    "ge": ("minimum", ("int", "float")),
    "le": ("maximum", ("int", "float")),
    "min_length": ("minLength", ("str",)),
    "max_length": ("maxLength", ("str",)),
    "regex": ("pattern", ("str", "Path")),  # a Path without one may be any file of the server
    "choices": ("choices", ("int", "str")),
    "accept": ("x-cog-accept", ("Path",)),
    "default": ("default", tuple(_TYPES)),
    "description": ("description", tuple(_TYPES)),
    "deprecated": ("deprecated", tuple(_TYPES)),
}

Method = ast.FunctionDef | ast.AsyncFunctionDef


def openapi_schema(source: str, file: str = "predict.py", target: str = "Predictor") -> str:
    """The OpenAPI document for class `target` of the Python text `source`, as one line of JSON.

    Args:
        file: what messages call the source.

    Raises:
        UserError: something that Cog would drop, misread or refuse. Names the parameter and what would be valid.
    """
    module = _Module.parse(source, file)
    method = module.method(target)
    document = json.loads(Path(__file__).with_name("openapi.json").read_text(encoding="utf-8"))
    fixed = document["components"]["schemas"]
    properties, enums, required = {}, {}, []
    for order, (name, annotation, value) in enumerate(module.parameters(method)):
        if name in ("Input", "Output", *fixed):
            module.fail(name, "is the name of a part of Cog's schema; choose another")
        kind, nullable = module.input_type(name, annotation)
        if nullable and value is None:
            module.fail(name, "has no default; expected = None or = Input(default=None, …)")
        settings = module.settings(name, value)
        _check(module, name, kind, nullable, settings)
        prop = {"x-order": order, **({"nullable": True} if nullable else {}), **settings}
        if prop.get("deprecated") is False:
            del prop["deprecated"]
        if choices := prop.pop("choices", None):
            fields = {"description": "An enumeration.", "enum": choices, "title": name, "type": _TYPES[kind]["type"]}
            enums[name] = fields
            prop["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        else:
            prop |= {"title": " ".join(word[:1].upper() + word[1:] for word in name.split("_")), **_TYPES[kind]}
        if "default" not in settings:
            required.append(name)
        properties[name] = _sorted(prop)

    inputs = {"properties": properties, "title": "Input", "type": "object"}
    output = module.output(method)
    if module.decorator(method, "streaming"):
        if "x-cog-array-type" not in output:
            module.fail(f"{method.name}()", "@streaming needs a return type such as AsyncIterator[Path]")
        document["paths"]["/predictions"]["post"]["x-cog-streaming"] = True
    inputs = _sorted(inputs | ({"required": required} if required else {}))
    document["components"]["schemas"] = {"Input": inputs, "Output": _sorted(output), **enums, **fixed}
    return _as_go_prints(document)


def max_concurrency(source: str, file: str = "predict.py", target: str = "Predictor") -> int:
    """N of `@concurrent(max=N)` on the class's method; 1 without it.

    Raises:
        UserError: N is not written out, or the method is not async.
    """
    module = _Module.parse(source, file)
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
    """Whether `.cog/openapi_schema.json` in `folder` is what its predict.py gives."""
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
    return openapi_schema((folder / "predict.py").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class _Module:
    """The parsed file, and what its top-level names stand for."""

    file: str
    source: str
    body: list[ast.stmt]
    from_cog: frozenset[str]  # imported under their own names
    bindings: dict[str, list[ast.expr]]  # name → every value that it is set to

    @classmethod
    def parse(cls, source: str, file: str) -> _Module:
        try:
            body = ast.parse(source).body
        except SyntaxError as error:
            raise UserError(f"{file}: line {error.lineno}: {error.msg}") from error
        from_cog: set[str] = set()
        bindings: dict[str, list[ast.expr]] = {}
        for statement in body:
            if isinstance(statement, ast.ImportFrom) and statement.module == "cog":
                from_cog.update(alias.name for alias in statement.names if alias.asname in (None, alias.name))
            elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                name = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
                if isinstance(name, ast.Name):
                    bindings.setdefault(name.id, []).append(statement.value)
        return cls(file, source, body, frozenset(from_cog), bindings)

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

    def parameters(self, method: Method) -> list[tuple[str, ast.expr, ast.expr | None]]:
        """(name, annotation, default) of each parameter but self."""
        given, where = method.args, f"{method.name}()"
        if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg:
            self.fail(where, "expected plain parameters, without / and *")
        if not given.args or given.args[0].arg != "self":
            self.fail(where, "expected self as the first parameter")
        defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
        found = []
        for argument, value in list(zip(given.args, defaults, strict=True))[1:]:
            if argument.annotation is None:
                self.fail(argument.arg, f"has no type; expected one of {', '.join(_TYPES)}")
            found.append((argument.arg, argument.annotation, value))
        return found

    def input_type(self, name: str, annotation: ast.expr) -> tuple[str, bool]:
        """(a key of _TYPES, whether it is optional)."""
        outer, inner = _subscript(annotation)
        kind = self.primitive(name, inner if outer == "Optional" else annotation)
        if kind is None:
            expected = f"expected {', '.join(_TYPES)}, or Optional[…] of one; an enumeration is choices=[…]"
            self.fail(name, f"type {ast.unparse(annotation)}: {expected}")
        return kind, outer == "Optional"

    def output(self, method: Method) -> dict[str, Any]:
        """The schema of what the method returns."""
        where, annotation = f"{method.name}()", method.returns
        if annotation is None:
            self.fail(where, "has no return type; expected one such as -> Path")
        outer, inner = _subscript(annotation)
        kind = self.primitive(where, inner)
        if (
            kind is None
            or outer not in (None, "list", "List", *_ITERATORS)
            or (outer in _TEXT_ITERATORS and kind != "str")
        ):
            expected = (
                f"expected {', '.join(_TYPES)}, a List or an AsyncIterator of one, or AsyncConcatenateIterator[str]"
            )
            self.fail(where, f"return type {ast.unparse(annotation)}: {expected}")
        if outer is None:
            return {"title": "Output", **_TYPES[kind]}
        schema: dict[str, Any] = {"title": "Output", "type": "array", "items": _TYPES[kind]}
        if outer in _ITERATORS:
            schema["x-cog-array-type"] = "iterator"
        if outer in _TEXT_ITERATORS:
            self.imported(where, annotation.value if isinstance(annotation, ast.Subscript) else annotation, outer)
            schema["x-cog-array-display"] = "concatenate"
        return schema

    def settings(self, name: str, value: ast.expr | None) -> dict[str, Any]:
        """What the default, or the `Input(…)` in its place, says, in the schema's words."""
        if value is None:
            return {}
        if not isinstance(value, ast.Call):
            return {"default": self.constant(name, "default", value)}
        self.imported(name, value.func, "Input")
        if value.args:
            self.fail(name, "Input(…) takes keyword arguments only, such as default=…")
        settings = {}
        for keyword in value.keywords:
            key = keyword.arg or "**"
            if key not in _RULES:
                self.fail(name, f"Input({key}): expected only {', '.join(sorted(_RULES))}")
            read = self.constant if key in ("default", "choices") else self.literal
            settings[_RULES[key][0]] = read(name, key, keyword.value)
        return settings

    def imported(self, name: str, node: ast.expr, expected: str) -> None:
        if not isinstance(node, ast.Name) or node.id != expected or expected not in self.from_cog:
            self.fail(name, f"{ast.unparse(node)}: expected {expected}, imported with `from cog import {expected}`")

    def primitive(self, name: str, node: ast.expr | None) -> str | None:
        if not isinstance(node, ast.Name) or node.id not in _TYPES:
            return None
        if node.id in _COGS_OWN:
            self.imported(name, node, node.id)
        return node.id

    def constant(self, name: str, key: str, node: ast.expr) -> Any:
        """A literal, or a name that the top level sets to one."""
        if not isinstance(node, ast.Name):
            return self.literal(name, key, node)
        values = self.bindings.get(node.id, [])
        if len(values) != 1:
            self.fail(name, f"{key}={node.id}: expected a literal, or a name that this file sets to one, once")
        return self.literal(name, key, values[0])

    def literal(self, name: str, key: str, node: ast.expr) -> Any:
        """The value of a literal that Cog reads as Python does: its parser knows no escapes and no arithmetic."""
        if isinstance(node, ast.List):
            return [self.literal(name, key, item) for item in node.elts]
        text = ast.get_source_segment(self.source, node) or ""
        lines = self.source.split("\n")[: node.lineno]
        before = "\n".join([*lines[:-1], lines[-1].encode()[: node.col_offset].decode()])
        if re.search(r"\(\s*(#[^\n]*\n\s*)*$", before):
            self.fail(name, f"{key}: expected a literal without parentheses")
        if text in ("None", "True", "False"):
            return {"None": None, "True": True, "False": False}[text]
        if re.fullmatch(r"-?\d+(\.\d*)?", text):
            number = float(text)
            if number == 0 or 1e-4 <= abs(number) < 2**53:  # beyond, Cog loses digits or prints an exponent
                return int(number) if number.is_integer() else number
        string = re.fullmatch(r"(?:r(?!'''|\"\"\"))?('''|\"\"\"|'|\")(.*)\1", text, re.DOTALL)
        if isinstance(node, ast.Constant) and string and string[2] == node.value:
            return node.value
        self.fail(name, f"{key}={text}: expected a plain literal (a string in one part without escapes, or a number)")


def _check(module: _Module, name: str, kind: str, nullable: bool, settings: dict[str, Any]) -> None:
    """Raises for settings of an input that contradict each other, which Cog refuses or drops."""
    values = _VALUES.get(kind, (str,))
    wanted: dict[str, tuple[type, ...]] = {
        "minimum": (int, float),
        "maximum": (int, float),
        "minLength": (int,),
        "maxLength": (int,),
        "choices": (list,),
        "default": (*values, type(None)) if nullable else values,
        "deprecated": (bool,),
    }
    for key, (word, kinds) in _RULES.items():
        if word not in settings:
            continue
        if kind not in kinds:
            module.fail(name, f"{key} is for {' and '.join(kinds)}, not for {kind}")
        if type(settings[word]) not in wanted.get(word, (str,)):
            hint = f", or the type Optional[{kind}]" if settings[word] is None else ""
            names = " or ".join(kind.__name__ for kind in wanted.get(word, (str,)))
            module.fail(name, f"{key}={settings[word]!r}: expected a literal {names}{hint}")
    choices = settings.get("choices")
    if choices is not None and (len(choices) < 2 or not all(type(choice) in values for choice in choices)):
        module.fail(name, f"choices: expected two or more literals of type {kind}")
    if choices and settings.keys() & {"minimum", "maximum", "minLength", "maxLength"}:
        module.fail(name, "choices: expected no bounds beside them")
    default = settings.get("default")
    if default is None:
        return
    size = len(default) if isinstance(default, str) else 0
    if (
        (choices and default not in choices)
        or not settings.get("minimum", default) <= default <= settings.get("maximum", default)
        or not settings.get("minLength", size) <= size <= settings.get("maxLength", size)
    ):
        module.fail(name, f"default={default!r}: expected what the input's own rules allow")


def _subscript(node: ast.expr) -> tuple[str | None, ast.expr]:
    """`Outer[inner]` → its parts; anything else → (None, itself)."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        return node.value.id, node.slice
    return None, node


def _sorted(fields: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(fields.items()))


def _as_go_prints(document: dict[str, Any]) -> str:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
