"""`dmd2 evaluate`, and the references that it compares with: `dmd2 ref-stats`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of weights; or images: zip, folder.")],
    metric: Annotated[str, typer.Option(help="Metrics, by commas: fid,kid,is,prdc,accuracy,clip,patch-fid.")] = "fid",
    ref: Annotated[Path | None, typer.Option(help="Images (zip, folder), or for fid an .npz.")] = None,
    n: Annotated[
        int | None, typer.Option("-n", help="How many images; 50000, or all there are, unless given.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Feature network: inception; or small (FD-small, which is not FID).")
    ] = "inception",
    inception: Annotated[
        Path | None, typer.Option(help="TorchScript file; the one in weights/metrics unless given.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Network for accuracy and --features small; CIFAR-10's unless given.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder with a CLIP model, for clip.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text, one prompt a line, for text-to-image weights.")] = None,
    steps: Annotated[str | None, typer.Option(help="Sampler's steps; the weights' own unless given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; image i uses seed + i.")] = 0,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 64,
    resize: Annotated[int | None, typer.Option(help="Side in pixels that images are brought to first.")] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")] = "auto",
    churn: Annotated[
        str | None,
        typer.Option(metavar="S_CHURN[,S_TMIN,S_TMAX,S_NOISE]", help="Noise that an EDM teacher's sampler adds."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Also write the result there.")] = None,
) -> None:
    """Judge what weights draw. Prints JSON with all that it takes to repeat it. For several GPUs, run by torchrun."""
    from dmd2.diffusion.sampling import Churn
    from dmd2.evaluation.evaluate import CLASSIFIER, INCEPTION, Settings
    from dmd2.evaluation.evaluate import evaluate as run
    from dmd2.runtime.files import atomic_text, expect_place

    if out is not None:
        expect_place(out, "out")
    metrics = tuple(dict.fromkeys(name for name in metric.split(",") if name))
    noise = None if churn is None else Churn.parse(churn)
    networks = (features, inception or INCEPTION, classifier or CLASSIFIER, clip)
    result = run(Settings(weights, metrics, ref, n, *networks, prompts, steps, seed, batch, resize, device, noise))
    if result is not None:  # else another process has it
        text = json.dumps(result, indent=2) + "\n"
        if out is not None:  # first: whoever reads the output may be gone
            atomic_text(out, text)
        print(text, end="")


def ref_stats(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Images: a zip or a folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.npz", help="File to write.")],
    features: Annotated[str, typer.Option(help="Feature network: inception or small.")] = "inception",
    inception: Annotated[
        Path | None, typer.Option(help="TorchScript file; the one in weights/metrics unless given.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Network for --features small; CIFAR-10's unless given.")
    ] = None,
    resize: Annotated[int | None, typer.Option(help="Side in pixels that images are brought to first.")] = None,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 64,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Mean and covariance of images' features, for --ref, as EDM's .npz. Only fid can do without the images."""
    from dmd2.evaluation.evaluate import CLASSIFIER, INCEPTION, reference_statistics

    networks = (features, inception or INCEPTION, classifier or CLASSIFIER)
    count = reference_statistics(data, out, *networks, resize=resize, batch=batch, device=device)
    print(f"{out}: {count} images, {features} features")
