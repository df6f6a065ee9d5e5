"""`dmd2 cog`: images over HTTP."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.paths import ROOT


def cog(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    weights: Annotated[Path | None, typer.Option(help="Folder of weights with a dmd2.json.")] = None,
) -> None:
    """Serve images through Cog's own server, without Docker. Needs a clone of the repository."""
    if not 1 <= port <= 65535:
        raise InvalidInput("port", "expected 1 to 65535", port)
    if weights is not None and not weights.is_file() and not (weights / "dmd2.json").is_file():
        raise InvalidInput(
            "weights", "expected a folder with a dmd2.json, a tar of one or a safetensors file", weights
        )
    if not (ROOT / "predict.py").is_file():
        raise UserError(f"{ROOT / 'predict.py'}: no such file; `dmd2 cog` works from a clone of the repository only")
    if importlib.util.find_spec("cog") is None:
        raise UserError("Cog's Python package is not installed; pip install 'dmd2[serve]'")

    from dmd2.service.cog.schema import write_schema
    from dmd2.service.cog.supervisor import check_port

    check_port(host, port)
    write_schema(ROOT)
    environment = os.environ | {"PORT": str(port)}
    if weights is not None:
        environment["DMD2_WEIGHTS"] = str(weights.resolve())
    sys.stdout.flush()
    entrypoint = ROOT / "scripts" / "entrypoint"
    os.execve(sys.executable, [sys.executable, str(entrypoint), "--host", host], environment)
