"""The command line: the app, its commands (one file a group of verbs), and `main`, where errors become one line."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dmd2 import __version__
from dmd2.cli import batch, convert, data, evaluate, generate, info, serve, train
from dmd2.runtime.errors import InvalidInput, UserError


class Verb(TyperCommand):
    """Knows the flag of a field: `num_outputs` is --num-outputs; an argument has the name that its usage shows."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            flags = self._flags()
            text = str(error)
            if isinstance(error, InvalidInput) and error.field in flags:
                text = flags[error.field] + text.removeprefix(error.field)
            # What a message advises, it calls by the field's name in backquotes.
            raise UserError(re.sub(r"`(\w+)`", lambda field: flags.get(field[1], field[0]), text)) from error

    def _flags(self) -> dict[str, str]:
        """Field → how it is given on the command line."""
        flags: dict[str, str] = {}
        for parameter in self.params:
            flag = max(parameter.opts, key=len)
            if parameter.param_type_name == "argument":
                flag = (getattr(parameter, "metavar", None) or flag.upper()).removesuffix("...")
            flags |= {parameter.name: flag, flag.lower().lstrip("-").replace("-", "_"): flag}
        return flags


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
converters = typer.Typer(no_args_is_help=True)
makers = typer.Typer(no_args_is_help=True)

EXAMPLES: dict[Callable[..., None], str] = {
    generate.generate: 'dmd2 generate "a red apple" --steps 1 --seed 7 --out images',
    batch.batch: "dmd2 batch prompts.jsonl --out images --format parquet",
    train.train: "dmd2 train emoji-dmd2-1step --out runs/mine",
    train.recipes: "dmd2 recipes cifar10-dmd2 --set lr=5e-5",
    data.pairs: "dmd2 pairs weights/edm/edm-cifar10-32x32-cond-vp pairs -n 100000",
    evaluate.evaluate: "dmd2 evaluate runs/mine/model --metric fid --ref cifar10.npz",
    evaluate.ref_stats: "dmd2 ref-stats cifar10.zip cifar10.npz",
    info.info: "dmd2 info weights/emoji",
    serve.serve: "dmd2 serve --weights weights/emoji --api-key-file keys.txt",
    serve.cog: "dmd2 cog --port 5000 --weights weights/emoji",
}
for _verb, _example in EXAMPLES.items():
    app.command(cls=Verb, epilog=f"Example: {_example}")(_verb)
app.add_typer(converters, name="convert")
converters.command(cls=Verb, epilog="Example: dmd2 convert edm edm-cifar10-32x32-cond-vp.pkl teacher")(convert.edm)
converters.command(cls=Verb, epilog="Example: dmd2 convert sdxl checkpoint.safetensors lora.safetensors student")(
    convert.sdxl
)
converters.command(cls=Verb, epilog="Example: dmd2 convert student dmd2_sdxl_4step_unet_fp16.bin sdxl student")(
    convert.student
)
converters.command(cls=Verb, epilog="Example: dmd2 convert ema runs/mine student --width 0.08")(convert.ema)
converters.command(cls=Verb, epilog="Example: dmd2 convert export runs/mine/model unet_fp16.safetensors")(
    convert.export
)

app.add_typer(makers, name="data")
MAKERS: dict[Callable[..., None], str] = {
    data.prompts: "dmd2 data prompts weights/emoji prompts.txt prompts",
    data.latents: "dmd2 data latents weights/emoji images.zip latents --part 1/8",
    data.pairs: "dmd2 data pairs weights/edm/edm-cifar10-32x32-cond-vp pairs -n 100000",
}
for _verb, _example in MAKERS.items():
    makers.command(cls=Verb, epilog=f"Example: {_example}")(_verb)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dmd2 {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Few-step diffusion: distil, sample, serve."""


@converters.callback()
def _convert() -> None:
    """Turn published weights into a folder that dmd2 reads."""


@makers.callback()
def _data() -> None:
    """Compute once what trainings read again and again: embeddings, latents, noise-image pairs."""


def main() -> None:
    """The console script."""
    run(app, "dmd2")


def script(verb: Callable[..., None], purpose: str | None) -> Callable[[], None]:
    """The command line of a script that has one verb; `purpose` is its help."""
    only = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    only.command(cls=Verb, help=purpose)(verb)
    return lambda: run(only, Path(sys.argv[0]).name)


def run(commands: typer.Typer, name: str) -> None:
    """Runs a command line: a `UserError` is one line on stderr and exit status 2, so is an error of the system."""
    from dmd2.runtime.errors import shown
    from dmd2.runtime.terminal import Terminal, occupy_standard_streams

    occupy_standard_streams()
    try:
        commands()
    except UserError as error:
        Terminal(sys.stderr).write(f"{name}: {error}\n")
        sys.exit(2)
    except OSError as error:  # a full disk, a file that went away; a broken pipe ends in status 1 by itself
        where = f"{shown(error.filename, 300)}: " if error.filename else ""
        Terminal(sys.stderr).write(f"{name}: {where}{shown(error.strerror or error)}\n")
        sys.exit(2)
    finally:
        gc.freeze()  # or Python looks for garbage in all of torch before it ends, for a third of a second
