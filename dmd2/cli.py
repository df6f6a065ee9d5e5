"""The command line: `dmd2 generate`, `dmd2 train`, `dmd2 cog`, `dmd2 convert`. One thin verb each."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dmd2.errors import UserError

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_WEIGHTS = ROOT / "weights" / "emoji"

app = typer.Typer(
    help="Few-step diffusion: distil, sample, serve.", no_args_is_help=True, pretty_exceptions_enable=False
)


convert = typer.Typer(help="Turn published weights into a folder that dmd2 reads.", no_args_is_help=True)
app.add_typer(convert, name="convert")


@app.callback()
def _root() -> None:
    """Few-step diffusion: distil, sample, serve."""


@convert.callback()
def _convert() -> None:
    """Turn published weights into a folder that dmd2 reads."""


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; one picture for each.")],
    weights: Annotated[Path, typer.Option(help="Folder of weights with a dmd2.json.")] = DEFAULT_WEIGHTS,
    steps: Annotated[str, typer.Option(help="1 or 4; or teacher, teacher-4, teacher-1 to compare.")] = "4",
    seed: Annotated[int | None, typer.Option(help="Of the first picture; random unless given.")] = None,
    num_outputs: Annotated[int, typer.Option(help="Pictures for each prompt; image i uses seed + i.")] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels; the weights' own unless given.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("outputs"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each picture.")] = False,
) -> None:
    """Draw pictures. Each PNG holds its prompt, seed, steps and the weights' sha256."""
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("PROMPT: empty; expected some words")
    if not 1 <= num_outputs <= 1000:
        raise UserError(f"--num-outputs {num_outputs}: expected 1 to 1000")
    if seed is not None and not 0 <= seed < 2**63 - 1000:
        raise UserError(f"--seed {seed}: expected 0 to 2^63 - 1001")
    pixels = _size(size) if size else None
    _check_folder(out)

    from dmd2.engine import Engine
    from dmd2.picture import save_png

    engine = Engine(weights, device, modes=(steps,))
    if pixels:
        engine.check_size(pixels)
    loaded = time.perf_counter() - BEGAN
    _make(out)
    first = secrets.randbelow(2**32) if seed is None else seed
    for prompt in prompts:
        for i in range(num_outputs):
            # One at a time: a picture's bits never depend on its neighbours. The service batches.
            began = time.perf_counter()
            images, timings = engine.draw_timed([prompt], [first + i], steps, pixels)
            total = time.perf_counter() - began
            facts = {
                "prompt": prompt,
                "seed": first + i,
                "steps": steps,
                "weights_sha256": engine.sha256(steps),
            }
            path = save_png(images[0], out, facts)
            if as_json:
                seconds = {k: round(v, 4) for k, v in asdict(timings).items()}
                print(json.dumps({"path": str(path), **facts, "seconds": {**seconds, "load": round(loaded, 2)}}))
            else:
                print(
                    f"{path}  seed {first + i}  {total * 1000:.0f} ms"
                    f" (text {timings.text * 1000:.0f}, denoise {timings.denoise * 1000:.0f},"
                    f" decode {timings.decode * 1000:.0f}; start-up {loaded:.1f} s)"
                )


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A name from dmd2/recipes.py, such as emoji-dmd2-1step.")],
    data: Annotated[Path, typer.Option(help="Zip of emoji.")] = DEFAULT_WEIGHTS / "emoji.zip",
    init: Annotated[Path, typer.Option(help="Weights to start from, in diffusers' layout.")] = DEFAULT_WEIGHTS,
    judge: Annotated[Path, typer.Option(help="Classifier that scores the samples.")] = DEFAULT_WEIGHTS
    / "classifier.safetensors",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE unless given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one number of the recipe.")
    ] = None,
) -> None:
    """Train one of the named recipes. Ctrl-C stops it after a checkpoint; --resume continues it exactly."""
    from dmd2.recipes import resolve

    settled = resolve(recipe, overrides or [])

    from dmd2.engine import resolve_device
    from dmd2.evaluation import EmojiJudge
    from dmd2.training.data import EmojiScenes
    from dmd2.training.loop import train as run
    from dmd2.training.methods import build_method

    where = resolve_device(device)
    scenes = EmojiScenes(data)
    critic = EmojiJudge.load(judge, where) if judge.is_file() else None
    method = build_method(settled, scenes, init, critic, where)
    folder = out or Path("runs") / recipe
    _make(folder)
    finished = run(method, settled.loop, folder, resume=resume, recipe={"name": recipe, **asdict(settled)})
    if not finished:
        raise typer.Exit(130)
    print(f"done: {folder}")


@app.command()
def cog(
    port: Annotated[int, typer.Option(help="To listen on.")] = 5000,
    host: Annotated[str, typer.Option(help="To listen on; 0.0.0.0 is every address of this machine.")] = "127.0.0.1",
    weights: Annotated[Path | None, typer.Option(help="Folder of weights with a dmd2.json.")] = None,
) -> None:
    """Serve pictures through Cog's own server, without Docker. Needs a clone of the repository."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: expected 1 to 65535")
    if weights is not None and not (weights / "dmd2.json").is_file():
        raise UserError(f"--weights {weights}: expected a folder with a dmd2.json")
    if not (ROOT / "predict.py").is_file():
        raise UserError(f"{ROOT / 'predict.py'}: no such file; `dmd2 cog` works from a clone of the repository only")
    if importlib.util.find_spec("cog") is None:
        raise UserError("Cog's Python package is not installed; pip install 'dmd2[serve]'")

    from dmd2.service.schema import write_schema
    from dmd2.service.supervisor import check_port

    check_port(host, port)
    write_schema(ROOT)
    environment = os.environ | {"PORT": str(port)}
    if weights is not None:
        environment["DMD2_WEIGHTS"] = str(weights.resolve())
    sys.stdout.flush()
    entrypoint = ROOT / "scripts" / "entrypoint"
    os.execve(sys.executable, [sys.executable, str(entrypoint), "--host", host], environment)


@convert.command()
def edm(
    source: Annotated[Path, typer.Argument(metavar="FILE.pkl", help="One of EDM's published pickles.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder: safetensors, a config, a dmd2.json.")],
) -> None:
    """Convert one of EDM's pickles. It is read, never run: nothing that it holds is executed."""
    from dmd2.edm_pickle import convert_edm

    config = convert_edm(source, out)
    print(f"{out}: {config.architecture}, {config.resolution}x{config.resolution}, {config.classes} classes")


def _check_folder(out: Path) -> None:
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {out}: {folder} is a file; expected a folder")


def _make(out: Path) -> None:
    _check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from error


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise UserError(f"--size {text}: expected WIDTHxHEIGHT in pixels, such as 64x64")
    return int(match[1]), int(match[2])


def main() -> None:
    """The console script: a `UserError` is one line on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"dmd2: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
