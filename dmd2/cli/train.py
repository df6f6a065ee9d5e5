"""`dmd2 train` and `dmd2 recipes`."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from dmd2.runtime.errors import InvalidInput

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one number of the recipe.")
]


def _names(incomplete: str) -> list[str]:
    """For the shell: the recipes that begin so."""
    from dmd2.training.recipes import RECIPES

    return [name for name in RECIPES if name.startswith(incomplete)]


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            autocompletion=_names,
            help="A name from `dmd2 recipes`, such as emoji-dmd2-1step; --resume --out knows it.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Zip or folder of images; the emoji for recipes of the embedded model.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Weights to start from; the embedded ones for recipes of theirs.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts; for data=latents a folder of `dmd2 data prompts`.")
    ] = None,
    classifier: Annotated[Path | None, typer.Option(help="Classifier that scores samples.")] = None,
    student: Annotated[Path | None, typer.Option(help="Student to go on from, for recipes that resume one.")] = None,
    pairs_folder: Annotated[Path | None, typer.Option("--pairs", help="Folder of `data pairs`, for DMD.")] = None,
    lpips: Annotated[
        Path | None, typer.Option(help="TorchScript VGG16 (vgg16.pt) for DMD's regression; L2 without it.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP model: samples of texts get a CLIP score.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception's TorchScript file: samples of texts get a patch-FID.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE unless given.")] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")] = "auto",
    parallel: Annotated[
        Literal["ddp", "fsdp2"] | None,
        typer.Option(help="Under torchrun: copies of the networks that average gradients (the default), or shards."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, with its own --set and inputs.")
    ] = False,
    keep: Annotated[int, typer.Option(min=1, help="How many checkpoints stay: the newest.")] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would hold and take; write nothing.")
    ] = False,
    cards: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="With --dry-run: only predict a process's memory, of so many; nothing is loaded."
        ),
    ] = None,
    flops: Annotated[
        bool, typer.Option("--flops", help="First count a step's arithmetic; the log then says how much is used.")
    ] = False,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Log to Weights & Biases, too (pip install wandb).")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train one of the named recipes. Ctrl-C stops it after a checkpoint; --resume continues it exactly."""
    if recipe is None and not (resume and out):
        raise InvalidInput("recipe", "missing; expected a name from `dmd2 recipes`, or --resume with --out")

    if cards is not None and (not dry_run or resume):
        raise InvalidInput("cards", "expected it with --dry-run, without --resume", cards)

    if wandb is not None and find_spec("wandb") is None:
        raise InvalidInput("wandb", "needs Weights & Biases' package: pip install wandb", wandb)

    from dmd2.training.recipes import build_method, inputs_of, resolve

    settings = overrides or []
    settled = resolve(recipe, settings) if recipe is not None else None

    from dmd2.inference.engine import resolve_device
    from dmd2.runtime.precision import recorded_precision, resolve_precision
    from dmd2.runtime.terminal import hush, say
    from dmd2.training.loop import train as run
    from dmd2.training.parallel.group import ALONE, joined
    from dmd2.training.run.folder import check_out
    from dmd2.training.run.inputs import begun, continued, hashes, origin
    from dmd2.training.run.logs import Watch

    logging.basicConfig(format="%(message)s")
    logging.getLogger("dmd2").setLevel(logging.INFO)
    where = resolve_device(device)
    folder = out or Path("runs") / str(recipe)
    paths = {"data": data, "init": init, "classifier": classifier}
    paths |= {"prompts": prompts, "student": student, "pairs": pairs_folder, "lpips": lpips}
    paths |= {"clip": clip, "inception": inception}
    if cards is not None:
        from dmd2.training.run.memory import predict

        assert settled is not None
        settled = replace(settled, precision=resolve_precision(settled.precision, where))
        said = predict(settled, paths, where, cards, parallel or "ddp").as_json()
        print(json.dumps({"name": recipe, "recipe": asdict(settled), "predicted": said}, indent=2))
        return
    with joined(parallel, where) as group, group.one_voice():
        if not group.leads:
            hush()
            logging.getLogger("dmd2").setLevel(logging.ERROR)
        if not dry_run:
            check_out(folder, resume)
        if resume:
            record = begun(recipe, folder)
            recipe = record.name
            settled, settings = continued(record, settings)
            known = record.paths
            paths = {name: path or (Path(known[name]) if name in known else None) for name, path in paths.items()}
        assert recipe is not None and settled is not None
        recorded = recorded_precision(folder) if resume else None
        precision = group.told(resolve_precision(settled.precision, where, recorded))
        settled = replace(settled, precision=precision)
        method = partial(build_method, settled, paths, where, group)
        if dry_run:
            from dmd2.training.run.memory import predict, predictable
            from dmd2.training.run.rehearsal import rehearse

            if group is not ALONE:
                raise InvalidInput("dry_run", "expected one process, without torchrun")
            said = rehearse(method(), settled.loop)
            if predictable(settled):
                said["predicted"] = predict(settled, paths, where).as_json()
            print(json.dumps({"name": recipe, "recipe": asdict(settled), **said}, indent=2))
            return
        watch = Watch(device=where, wandb=wandb)
        if flops:
            from dmd2.runtime.precision import peak_flops, training_dtype
            from dmd2.training.run.memory import predict

            step = predict(settled, paths, where).flops
            peak, told = peak_flops(where, training_dtype(precision, where))
            say(f"a step: {step / 1e12:.3g} TFLOP; at most {peak / 1e12:.3g} TFLOP/s a device ({told})")
            watch = replace(watch, flops=step, peak=peak * group.ranks.world)
        finished = run(
            method,
            settled.loop,
            folder,
            resume=resume,
            recipe={"name": recipe, **asdict(settled)},
            inputs=group.told(hashes(inputs_of(settled, paths)) if group.leads else None),
            origin=origin(settings, paths),
            parallel=group,
            keep=keep,
            watch=watch,
        )
        if finished:
            say(f"done: {folder}")
    if not finished:
        say("continue with --resume")
        raise typer.Exit(130)


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", autocompletion=_names, help="Recipe to print; all unless given.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List the recipes, what their papers report and what they take; or print one, resolved, as JSON."""
    if name is None and overrides:
        raise InvalidInput("set", "given without NAME; expected the recipe to change")

    from dmd2.training.recipes import RECIPES, resolve
    from dmd2.training.recipes.notes import note_of

    if name is not None:
        recipe = resolve(name, overrides or [])  # first: it knows the names
        print(json.dumps({"name": name, **asdict(note_of(name, recipe)), "recipe": asdict(recipe)}))
        return
    for each in RECIPES:
        note = note_of(each, RECIPES[each])
        print(f"{each}: {note.method}; {note.family}; data: {note.data}")
        for what, said in (("takes", note.takes), ("published", note.published)):
            print(f"    {what}: {said}\n" if said else "", end="")
