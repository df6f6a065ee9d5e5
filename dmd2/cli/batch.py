"""`dmd2 batch`: bulk. Its options of what is asked for are made from `dmd2.inference.request.ImageRequest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dmd2.cli.generate import asks, option
from dmd2.inference.request import ImageRequest
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.paths import EMOJI

WORK, ROWS = "The work", "Defaults of rows that do not say otherwise"


TOLD = {
    "lora_scale": "Scale of all LoRAs that name none of their own.",
    "output_format": "Format of the images.",
    "output_quality": "Quality of webp and jpg; png is lossless.",
    "seed": "Seed of a row's first image; image i has seed + i. A function of the row's place unless given.",
}


@asks(**{name: (ROWS, TOLD.get(name)) for name in ImageRequest.model_fields if name not in ("prompt", "previews")})
def batch(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS",
            help="One request a row: prompts in .txt, or any of the options below in .jsonl, .parquet.",
        ),
    ],
    out: Annotated[Path, option(WORK, "New folder, or one to go on with.")],
    weights: Annotated[Path, option(WORK, "Folder of weights with a dmd2.json, or a tar of one.")] = EMOJI,
    format: Annotated[
        Literal["webdataset", "parquet"], option(WORK, "Kind of the files: tars of images and JSON, or Parquet.")
    ] = "webdataset",
    shard: Annotated[int, option(WORK, "Rows in a file.", min=1)] = 500,
    part: Annotated[
        str | None, option(WORK, "Every N-th file, from the I-th; torchrun's RANK unless given.", metavar="I/N")
    ] = None,
    retry: Annotated[bool, option(WORK, "Make files again that hold rows with errors.", "--retry")] = False,
    device: Annotated[str, option(WORK, "Device: auto, cpu, cuda or cuda:1.")] = "auto",
    ray: Annotated[
        bool, option(WORK, "Share the work among the workers of a Ray cluster; they see the same files.", "--ray")
    ] = False,
    **asked: Any,
) -> None:
    """Generate an image for each row of a file. Killed, it goes on; a row that fails is kept with its error."""
    from dmd2.data.shards import Part
    from dmd2.inference.batcher import Stopped
    from dmd2.models.locate import locate
    from dmd2.runtime.terminal import say
    from dmd2.service.batch import Requests, bulk_index, make_images
    from dmd2.service.cluster import batch_on_ray
    from dmd2.service.images import ImageService
    from dmd2.weights.manifest import read_manifest

    which, requests, folder = Part.parse(part), Requests(prompts, asked), locate(weights)
    sums = {name: sum for name, sum in read_manifest(folder).files.items() if name.endswith(".safetensors")}
    index = bulk_index(requests, {"weights": sums}, format, shard)
    if ray and part is not None:
        raise InvalidInput("part", "given beside --ray, which shares the work itself; expected one or the other")
    services: list[ImageService] = []

    def generate(rows: Any) -> Any:
        if not services:  # not before there is something to do
            services.append(ImageService(folder, device, files=False))
        return services[0].generate_all(rows)

    try:
        if ray:
            which, there = Part(), batch_on_ray(prompts, requests.defaults, folder, device, out, index, retry)
        else:
            there = make_images(requests, out, index, generate, part=which, retry=retry)
    except Stopped as error:
        raise UserError(f"{error}; the same command goes on with what is left") from error
    finally:
        for service in services:
            service.close()
    failed = sum(there.failed.get(name, 0) for name in which.names(there))
    what = f"{len(requests)} rows of {prompts} in {out}"
    say(f"done: {what}" if there.whole else f"done: this part; {out} waits for the others")
    if failed:
        say(f"{failed} of the rows could not be generated: they hold an `error`; --retry tries their files again")
        raise typer.Exit(1)
