"""`dmd2 convert`: published weights → a folder that dmd2 reads, and back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.paths import ROOT


def edm(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A pickle of EDM's or GDD's, or the pytorch_model.bin of DMD2's.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder: safetensors, a config, a dmd2.json.")],
    like: Annotated[
        Path | None, typer.Option(help="Folder of the teacher that a .bin was distilled from, unless it is EDM's.")
    ] = None,
) -> None:
    """Convert a network of EDM's kind. Pickles are read, never run: nothing that they hold is executed."""
    from dmd2.models.edm.published import convert_edm

    config = convert_edm(source, out, like)
    print(f"{out}: {config.architecture}, {config.resolution}x{config.resolution}, {config.classes} classes")


def student(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A UNet in one .bin or .safetensors, as DMD2's.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the model that it was distilled from.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    steps: Annotated[int, typer.Option(help="Steps that it was distilled for: 1 or 4.")] = 4,
) -> None:
    """Make a folder of weights of a student's UNet in one file."""
    from dmd2.models.stable_diffusion.students import import_student

    import_student(source, base, out, steps)
    print(f"{out}: {source.name}, {steps} steps")


def export(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of a student.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New file: .safetensors, or .bin as torch writes it.")],
    steps: Annotated[
        int | None, typer.Option(help="Which student; the one with the most steps unless given.")
    ] = None,
) -> None:
    """Write a student as DMD2's release has it: the UNet, the LoRA or EDM's network in one file."""
    from dmd2.models.family import export_weights

    export_weights(weights, out, steps)
    print(out)


def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with --set post_hoc_ema=true.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder of weights.")],
    width: Annotated[float, typer.Option(help="Width of the average, as a part of the run: 0.01 to 0.28.")] = 0.1,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Make the averaged weights of a run at any width (EDM2's post-hoc EMA), from what its checkpoints left."""
    import tempfile
    from copy import deepcopy

    from dmd2.inference.engine import resolve_device
    from dmd2.training.methods.post_hoc_ema import FOLDER, reconstruct
    from dmd2.training.recipes import build_method
    from dmd2.training.run.inputs import continued, read_record

    if out.exists():
        raise InvalidInput("out", "exists; expected a new folder", out)
    averages, record = reconstruct(run / FOLDER, width), read_record(run)
    paths = {name: Path(path) for name, path in record.paths.items()}
    method = build_method(continued(record, [])[0], paths, resolve_device(device))
    network = deepcopy(method.ema_model)
    if network is None or method.export is None or set(averages) - network.state_dict().keys():
        raise InvalidInput("run", "its averages are of another network", run)
    network.load_state_dict(averages, strict=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".ema.") as folder:
        method.export(network, Path(folder))  # with the fake score as it began, which is of no use
        if not (Path(folder) / "model").is_dir():
            raise InvalidInput("run", "makes no folder of weights", run)
        (Path(folder) / "model").rename(out)
    print(f"{out}: width {width:g}")


def sdxl(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE [LORA] OUT",
            help="Any SDXL checkpoint, a folder in diffusers' layout or one safetensors file; DMD2's four-step LoRA, "
            "unless the checkpoint has it merged in; a new folder.",
        ),
    ],
    scale: Annotated[float, typer.Option(help="Scale of the LoRA: 0.5 to 1.0.")] = 1.0,
    vae: Annotated[Path | None, typer.Option(help="Folder of another VAE, such as weights/sdxl/vae.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder, for a file, which has neither, of SDXL's configurations and tokenizers in diffusers' "
            "layout; weights/sdxl if it is there."
        ),
    ] = None,
    prediction: Annotated[
        str, typer.Option(help="epsilon, v or v-zero-snr, if the checkpoint does not say it or wrongly.")
    ] = "",
    teacher: Annotated[
        bool, typer.Option("--teacher", help="The checkpoint is not distilled; to train from.")
    ] = False,
    guidance_scale: Annotated[float, typer.Option(help="Guidance scale of a teacher's samples.")] = 8.0,
) -> None:
    """Make a four-step student of an SDXL checkpoint and a LoRA; or a teacher, to distil."""
    if len(paths) not in (2, 3):
        raise UserError(f"{len(paths)} paths; expected SOURCE [LORA] OUT")
    source, *between, out = paths
    lora = between[0] if between else None
    downloaded = ROOT / "weights" / "sdxl"

    from dmd2.models.stable_diffusion.convert import convert_sdxl
    from dmd2.weights.manifest import Teacher

    logging.basicConfig(format="%(message)s")
    as_teacher = Teacher(subfolder="unet", steps=25, guidance_scale=guidance_scale) if teacher else None
    base = base or (downloaded if downloaded.is_dir() else None)
    convert_sdxl(source, lora, out, scale, vae, base, prediction, as_teacher)
    what = "a teacher" if teacher else f"with {lora.name} at {scale:g}" if lora else "taken to be a four-step student"
    print(f"{out}: {source.name}, {what}")
