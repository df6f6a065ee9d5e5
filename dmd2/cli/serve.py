"""`dmd2 serve` and `dmd2 cog`: images over HTTP."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dmd2.runtime.errors import InvalidInput, UserError, shown
from dmd2.runtime.paths import ROOT


def cog(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    weights: Annotated[Path | None, typer.Option(help="Folder of weights with a dmd2.json.")] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")] = "auto",
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

    from dmd2.models.openvino.choice import give_way
    from dmd2.service.cog.schema import write_schema
    from dmd2.service.cog.supervisor import check_port

    check_port(host, port)
    write_schema(ROOT)
    environment = os.environ | {"PORT": str(port)}
    give_way(environment)
    if weights is not None:
        environment["DMD2_WEIGHTS"] = str(weights.resolve())
    if device != "auto":
        environment["DMD2_DEVICE"] = device
    sys.stdout.flush()
    entrypoint = ROOT / "scripts" / "entrypoint"
    os.execve(sys.executable, [sys.executable, str(entrypoint), "--host", host], environment)


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    weights: Annotated[
        list[Path] | None, typer.Option(help="Folder of weights with a dmd2.json. Repeat it to serve several.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of all of them: auto, cpu, cuda or cuda:1.")] = "auto",
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys, one a line: who brings none of them is refused.")
    ] = None,
    insecure_public: Annotated[
        bool, typer.Option("--insecure-public", help="Listen on a public address although anybody may ask.")
    ] = False,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may call, as https://HOST. Repeat it.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, max=10_000, help="Requests that wait for a model, at most.")] = 64,
    rate: Annotated[int, typer.Option(min=0, max=100_000, help="Requests a minute of each key; 0: any number.")] = 0,
    body_mb: Annotated[
        int, typer.Option(min=1, max=1000, help="Megabytes of one request with images, at most.")
    ] = 64,
    keep_seconds: Annotated[
        int, typer.Option(min=1, max=86_400, help="Seconds for which images that are answered as URLs are kept.")
    ] = 3600,
    public_url: Annotated[
        str | None,
        typer.Option(help="Where clients reach this server, as https://HOST: what URLs of images begin with."),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Prompts go into the access log.")] = False,
) -> None:
    """Serve images to clients of OpenAI's and AUTOMATIC1111's APIs, and a page to generate in."""
    for folder in weights or ():
        if not folder.is_file() and not (folder / "dmd2.json").is_file():
            raise InvalidInput("weights", "expected a folder with a dmd2.json or a tar of one", folder)
    for origin in cors or ():
        if not re.fullmatch(r"https?://[\w.-]+(:\d{1,5})?", origin, re.ASCII):
            raise InvalidInput("cors", "expected an origin such as https://example.org", shown(origin))
    if public_url is not None and not re.fullmatch(
        r"https?://[\w.-]+(:\d{1,5})?(/[\w.~-]+)*/?", public_url, re.ASCII
    ):
        raise InvalidInput("public_url", "expected a URL such as https://example.org", shown(public_url))
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError("what serving needs is not installed; pip install 'dmd2[serve]'")

    from dmd2.models.openvino.choice import give_way

    give_way()  # before torch is loaded

    from dmd2.service.http.guard import Rules, read_keys
    from dmd2.service.http.server import is_loopback
    from dmd2.service.http.server import serve as run

    keys = read_keys(api_key_file) if api_key_file is not None else ()
    if not is_loopback(host) and not keys and not insecure_public:
        raise InvalidInput(
            "host", "anybody could ask; expected --api-key-file, or --insecure-public if that is meant", shown(host)
        )
    rules = Rules(
        keys,
        loopback=is_loopback(host),
        origins=tuple(cors or ()),
        per_minute=rate,
        body=body_mb * 1_000_000,
        bodies=4 * body_mb * 1_000_000,
        log_prompts=log_prompts,
    )
    given: dict[str, Any] = {"waiting": queue, "keep_seconds": keep_seconds, "public_url": public_url}
    sys.exit(run(weights or [], host, port, rules, device=device, **given))
