"""For the scripts beside it: the project can be imported, and where packages lack, .venv's Python takes over."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
sys.path.insert(0, str(ROOT))


@contextmanager
def packages(setup: str = "scripts/setup-venv") -> Iterator[None]:
    """Around imports of what may not be installed: then the script starts anew in .venv, or says how to make it."""
    try:
        yield
    except ModuleNotFoundError as error:
        python = VENV / "bin" / "python"
        if (error.name or "").split(".")[0] == "dmd2":
            raise
        if Path(sys.prefix) == VENV or not python.exists():
            sys.exit(f"{Path(sys.argv[0]).name}: {error}; run {setup} first")
        os.execv(python, [str(python), *sys.argv])
