"""A script without a suffix as a module."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def loaded(name: str) -> Any:
    """Of the folder `scripts`; no bytecode is left beside it."""
    module_name = name.replace("-", "_")
    spec = spec_from_loader(module_name, SourceFileLoader(module_name, str(SCRIPTS / name)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.dont_write_bytecode", True)
        spec.loader.exec_module(module)
    return module
