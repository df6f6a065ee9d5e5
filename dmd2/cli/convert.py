"""`dmd2 convert`: published weights → a folder that dmd2 reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from dmd2.runtime.errors import UserError
from dmd2.runtime.paths import ROOT


def edm(
    source: Annotated[Path, typer.Argument(metavar="FILE.pkl", help="One of EDM's published pickles.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder: safetensors, a config, a dmd2.json.")],
) -> None:
    """Convert one of EDM's pickles. It is read, never run: nothing that it holds is executed."""
    from dmd2.models.edm.published import convert_edm

    config = convert_edm(source, out)
    print(f"{out}: {config.architecture}, {config.resolution}x{config.resolution}, {config.classes} classes")


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
) -> None:
    """Make a four-step student of an SDXL checkpoint and a LoRA."""
    if len(paths) not in (2, 3):
        raise UserError(f"{len(paths)} paths; expected SOURCE [LORA] OUT")
    source, *between, out = paths
    lora = between[0] if between else None
    downloaded = ROOT / "weights" / "sdxl"

    from dmd2.models.stable_diffusion.convert import convert_sdxl

    logging.basicConfig(format="%(message)s")
    convert_sdxl(source, lora, out, scale, vae, base or (downloaded if downloaded.is_dir() else None), prediction)
    print(
        f"{out}: {source.name}" + (f" with {lora.name} at {scale:g}" if lora else ", taken to be a four-step student")
    )
