"""The folders of `dmd2/`: imports point down the README's list, and none is a corridor of doors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dmd2"
ORDER = (
    "cli",
    "service",
    "training",
    "emoji",
    "evaluation",
    "data",
    "inference",
    "models",
    "weights",
    "diffusion",
    "runtime",
)
MOST_ENTRIES = 12


def imports(path: Path) -> set[str]:
    """The modules of `dmd2` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("dmd2.")}


def upward(path: Path, order: tuple[str, ...] = ORDER) -> list[str]:
    """What a file imports from a folder above its own."""
    own = order.index(path.relative_to(PACKAGE).parts[0])
    return [name for name in sorted(imports(path)) if name.split(".")[1] in order[:own]]


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]


def test_the_order_names_every_folder() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert upward(path) == []


def test_an_import_that_points_up_is_found() -> None:
    path = PACKAGE / "inference" / "engine.py"
    assert upward(path) == [] and any(name.startswith("dmd2.models.") for name in imports(path))
    assert upward(path, ("models", *ORDER)) != []


def test_families_know_nothing_of_each_other() -> None:
    for family, other in (("stable_diffusion", "edm"), ("edm", "stable_diffusion")):
        for path in (PACKAGE / "models" / family).glob("*.py"):
            assert not any(name.startswith(f"dmd2.models.{other}") for name in imports(path)), path


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in modules()} | {PACKAGE}), ids=lambda path: path.name
)
def test_a_folder_is_small_and_says_what_lives_there(folder: Path) -> None:
    entries = [p for p in folder.iterdir() if p.name not in ("__pycache__", "py.typed")]
    assert 2 <= len(entries) <= MOST_ENTRIES, sorted(p.name for p in entries)
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


def branches(source: str) -> list[str]:
    """Where code asks which family a model is of: comparisons of `family`, and isinstance of a model's class."""
    classes = {"StableDiffusion", "StableDiffusionModel", "TextToImage", "LatentCodec", "Edm", "EdmModel", "RgbCodec"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            asked = {getattr(side, "attr", getattr(side, "id", "")) for side in (node.left, *node.comparators)}
        elif isinstance(node, ast.Match):
            asked = {getattr(node.subject, "attr", getattr(node.subject, "id", ""))}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass", "type"):
            names = [n for argument in node.args for n in ast.walk(argument)]
            asked = {"family"} if classes & {getattr(n, "id", getattr(n, "attr", "")) for n in names} else set()
        else:
            continue
        if "family" in asked:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if path.relative_to(PACKAGE).parts[0] != "models"],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_only_models_ask_which_family_it_is(path: Path) -> None:
    assert branches(path.read_text(encoding="utf-8")) == []


def test_a_branch_on_the_family_is_found() -> None:
    for source in (
        "manifest.family != 'edm'",
        "family in ('sdxl', 'sd15')",
        "'edm' == self.manifest.family",
        "isinstance(self.model, StableDiffusion)",
        "isinstance(model, (int, edm.EdmModel))",
        "match manifest.family:\n    case 'edm': pass",
    ):
        assert len(branches(source)) == 1, source
    assert branches("family_of(weights).takes_prompts and isinstance(mode, str)") == []
