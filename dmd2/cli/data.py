"""`dmd2 data`: what is computed once before a training. Killed, they go on; with --part, many share the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

WEIGHTS = Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of a text-to-image model.")]
OUT = Annotated[Path, typer.Argument(metavar="OUT", help="New folder, or one to go on with.")]
BATCH = Annotated[int, typer.Option(help="How many at once.")]
SHARD = Annotated[int, typer.Option(min=1, help="Rows in a file.")]
PART = Annotated[
    str | None, typer.Option(metavar="I/N", help="Every N-th file, from the I-th; torchrun's RANK unless given.")
]
DEVICE = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")]


def prompts(
    weights: WEIGHTS,
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="Text, .jsonl, .parquet, or a .pkl of a list, as DMD2's.")
    ],
    out: OUT,
    column: Annotated[str | None, typer.Option(help="What prompts are called there.")] = None,
    batch: BATCH = 16,
    shard: SHARD = 1000,
    part: PART = None,
    device: DEVICE = "auto",
) -> None:
    """Encode prompts once, for trainings that need no text encoders then."""
    from dmd2.data.embeddings import make_prompts
    from dmd2.data.prompts import read_prompts
    from dmd2.data.shards import Part
    from dmd2.inference.engine import resolve_device

    texts, which = read_prompts(prompts, column), Part.parse(part)
    where = resolve_device(device)
    whole = make_prompts(weights, texts, out, batch=batch, device=where, shard=shard, part=which)
    _done(out, f"{len(texts)} prompts", whole)


def latents(
    weights: WEIGHTS,
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Folder, zip or WebDataset's tars of images with captions.")
    ],
    out: OUT,
    batch: BATCH = 4,
    shard: SHARD = 1000,
    part: PART = None,
    device: DEVICE = "auto",
) -> None:
    """Encode captioned images once, for trainings that need neither VAE nor text encoders then."""
    from dmd2.data.embeddings import make_latents
    from dmd2.data.shards import Part
    from dmd2.inference.engine import resolve_device

    which = Part.parse(part)
    whole = make_latents(weights, images, out, batch=batch, device=resolve_device(device), shard=shard, part=which)
    _done(out, f"the latents of {images}", whole)


def pairs(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of a teacher.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pairs, or one to continue.")],
    count: Annotated[int, typer.Option("-n", help="Pairs to make.")] = 100_000,
    steps: Annotated[int, typer.Option(help="Steps of the teacher's sampler for each pair.")] = 18,
    batch: Annotated[
        int | None, typer.Option(help="Pairs made at once; 100 of 32x32 pixels unless given, fewer of larger images.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, as for `data prompts`, for the teacher of a text-to-image model.")
    ] = None,
    solver: Annotated[
        str,
        typer.Option(help="teacher (its own: Heun, DPM-Solver++), pndm or euler-trailing, as SD 1.5's and SDXL's."),
    ] = "teacher",
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; that of the teacher's samples unless given.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="That the teacher runs in: fp32, bf16, or auto, the faster of the two here.")
    ] = "fp32",
    embeddings: Annotated[
        bool, typer.Option(help="Keep the prompts' embeddings, so that training encodes no text.")
    ] = True,
    device: DEVICE = "auto",
    part: PART = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first.")] = False,
) -> None:
    """Make noise-image pairs for DMD with the teacher's deterministic sampler. Run again to continue."""
    from dmd2.data.pairs import make_pairs
    from dmd2.data.prompts import read_prompts
    from dmd2.data.shards import Part
    from dmd2.inference.engine import resolve_device
    from dmd2.runtime.errors import InvalidInput, shown
    from dmd2.runtime.precision import Precision

    if precision not in get_args(Precision):
        raise InvalidInput("precision", f"expected {', '.join(get_args(Precision))}", shown(precision, 100))
    texts = [] if prompts is None else read_prompts(prompts)
    where = resolve_device(device)
    given: dict[str, Any] = {"solver": solver, "guidance_scale": guidance, "part": Part.parse(part)}
    given |= {"precision": precision, "embeddings": embeddings}
    whole = make_pairs(weights, out, count, steps, batch, where, prompts=texts, compile=compile, **given)
    _done(out, f"{count} pairs", whole)


def _done(out: Path, what: str, whole: bool) -> None:
    from dmd2.runtime.terminal import say

    say(f"done: {what} in {out}" if whole else f"done: this part; {out} waits for the others")
