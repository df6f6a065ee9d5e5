"""The command line: `dmd2 generate`, `train`, `evaluate`, `cog` and so on. One thin verb each."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import secrets
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.paths import ROOT

if TYPE_CHECKING:
    from torch import Tensor

    from dmd2.models.adapters.lora import Lora

BEGAN = time.perf_counter()
DEFAULT_WEIGHTS = ROOT / "weights" / "emoji"


class Verb(TyperCommand):
    """Knows the flag of a field: `num_outputs` is --num-outputs; an argument has the name that its usage shows."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InvalidInput as error:
            for parameter in self.params:
                name = max(parameter.opts, key=len)
                if parameter.param_type_name == "argument":
                    name = (getattr(parameter, "metavar", None) or name.upper()).removesuffix("...")
                if error.field in (parameter.name, name.lstrip("-").replace("-", "_")):
                    raise error.named(name) from error
            raise


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


@app.command(cls=Verb)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; one image for each.")
    ] = None,
    weights: Annotated[
        Path,
        typer.Option(help="Folder of weights with a dmd2.json, a tar of one, or a student in one safetensors file."),
    ] = DEFAULT_WEIGHTS,
    steps: Annotated[
        str | None,
        typer.Option(
            help="1 or 4; or teacher, teacher-4, teacher-1 to compare. The most that there are unless given."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="0-9", help="Instead of prompts: classes by number, such as 0,3-5; also writes a grid."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first image; random unless given.")] = None,
    num_outputs: Annotated[int, typer.Option(help="Images for each prompt; image i uses seed + i.")] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels; the weights' own unless given.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to begin with; gives the ratio unless --size.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Light, or a hole, where to paint --image anew.")] = None,
    prompt_strength: Annotated[float, typer.Option(help="How much of --image goes; 1 is all of it.")] = 0.8,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE[:SCALE]", help="File, URL or hub's owner/name; repeatable."),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(help="Folder of a ControlNet or T2I-Adapter; or its name, if in the weights."),
    ] = None,
    control_image: Annotated[Path | None, typer.Option(help="Image that --control follows.")] = None,
    control_scale: Annotated[float, typer.Option(help="How much --control-image counts.")] = 0.8,
    vae: Annotated[str, typer.Option(help="kl; or tiny (TAESDXL): faster, less sharp.")] = "kl",
    previews: Annotated[
        bool, typer.Option("--previews", help="Also write what the steps before the last make.")
    ] = False,
    churn: Annotated[
        str | None,
        typer.Option(metavar="S_CHURN[,S_TMIN,S_TMAX,S_NOISE]", help="Noise that an EDM teacher's sampler adds."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("outputs"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each image.")] = False,
) -> None:
    """Draw images. Each PNG holds its prompt, seed, steps and the weights' sha256."""
    if classes is not None and prompts:
        raise UserError("--classes: given beside PROMPT; expected one or the other")
    prompts = _numbers(classes) if classes is not None else prompts or []
    if not prompts:
        raise UserError("PROMPT: missing; expected what to draw, or --classes")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("PROMPT: empty; expected some words")
    if not 1 <= num_outputs <= 1000:
        raise UserError(f"--num-outputs {num_outputs}: expected 1 to 1000")
    if seed is not None and not 0 <= seed < 2**32 - 1000:  # torch's generator looks at 32 bits
        raise UserError(f"--seed {seed}: expected 0 to 2^32 - 1001")
    pixels = _size(size) if size else None
    _check_folder(out)

    from dmd2.diffusion.sampling import Churn
    from dmd2.inference.engine import Engine
    from dmd2.inference.image_output import save_grid, save_png
    from dmd2.inference.inputs import InputImages
    from dmd2.inference.mode import default_mode
    from dmd2.models.locate import locate
    from dmd2.models.model import family_of
    from dmd2.weights.manifest import read_manifest

    if weights.is_file():
        weights = locate(weights)
    manifest = read_manifest(weights)
    if classes is not None and family_of(weights).takes_prompts:
        raise UserError(f"--classes {classes}: {weights} draws prompts; expected a class-conditional model")
    steps = steps or default_mode(manifest)
    if previews and steps == "teacher":
        raise UserError("--previews: the teacher's own sampler shows none; expected --steps with a student")
    given = InputImages.read(image, mask, prompt_strength, control_image, control_scale)
    engine = Engine(weights, device, modes=(steps,), vae=vae, churn=None if churn is None else Churn.parse(churn))
    engine.check_prompts(prompts)
    pixels = given.size(pixels, manifest.native_size, engine.size_unit)
    engine.check_size(pixels)
    edit = given.edit(pixels, _control(control, weights), _loras(lora or [], weights))
    loaded = time.perf_counter() - BEGAN
    _make(out)
    first = secrets.randbelow(2**32 - 1000) if seed is None else seed
    drawn = []
    for prompt in prompts:
        for i in range(num_outputs):
            metadata: dict[str, object] = {
                "prompt": prompt,
                "seed": first + i,
                "steps": steps,
                "weights_sha256": engine.sha256(steps),
                **edit.metadata,
                **({} if churn is None else {"churn": churn}),
            }

            def preview(step: int, _: list[int], images: Tensor, metadata: dict[str, object] = metadata) -> None:
                save_png(images[0], out, metadata | {"preview_of_step": step})

            # One at a time: an image's bits never depend on its neighbours. The service batches.
            began = time.perf_counter()
            images, timings = engine.generate_timed(
                [prompt], [first + i], steps, pixels, edit=edit, preview=preview if previews else None
            )
            total = time.perf_counter() - began
            path = save_png(images[0], out, metadata)
            drawn.append(images[0])
            _tell(path, metadata, asdict(timings), total, loaded, as_json)
    if classes is not None:
        names = [manifest.class_names[int(n)] if manifest.class_names else f"class {n}" for n in prompts]
        grid = save_grid(drawn, names, out / f"classes-{classes}_{steps}_{first}.png")
        print(json.dumps({"grid": str(grid)}) if as_json else grid)


@app.command(cls=Verb)
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A name from dmd2/training/recipes/kinds.py, such as emoji-dmd2-1step; --resume --out knows it."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Zip or folder of images; the emoji for recipes of the embedded model.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Weights to start from; the embedded ones for recipes of theirs.")
    ] = None,
    judge: Annotated[Path | None, typer.Option(help="Classifier that scores samples.")] = None,
    student: Annotated[Path | None, typer.Option(help="Student to go on from, for recipes that resume one.")] = None,
    pairs_folder: Annotated[Path | None, typer.Option("--pairs", help="Folder of `dmd2 pairs`, for DMD.")] = None,
    lpips: Annotated[
        Path | None, typer.Option(help="TorchScript VGG16 (vgg16.pt) for DMD's regression; L2 without it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE unless given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, with its own --set and inputs.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one number of the recipe.")
    ] = None,
) -> None:
    """Train one of the named recipes. Ctrl-C stops it after a checkpoint; --resume continues it exactly."""
    if recipe is None and not (resume and out):
        raise UserError(
            "RECIPE: missing; expected a name from dmd2/training/recipes/kinds.py, or --resume with --out"
        )

    from dmd2.training.recipes import resolve

    settings = overrides or []
    settled = resolve(recipe, settings) if recipe is not None else None

    from dmd2.inference.engine import resolve_device
    from dmd2.runtime.precision import recorded_precision, resolve_precision
    from dmd2.runtime.terminal import say
    from dmd2.training.build import build_method, inputs_of
    from dmd2.training.loop import train as run
    from dmd2.training.run.folder import check_out
    from dmd2.training.run.inputs import begun, continued, hashes, origin

    logging.basicConfig(format="%(message)s")
    logging.getLogger("dmd2").setLevel(logging.INFO)
    where = resolve_device(device)
    folder = out or Path("runs") / str(recipe)
    check_out(folder, resume)
    paths = {"data": data, "init": init, "judge": judge, "student": student, "pairs": pairs_folder, "lpips": lpips}
    if resume:
        record = begun(recipe, folder)
        recipe = record.name
        settled, settings = continued(record, settings)
        known = record.paths
        paths = {name: path or (Path(known[name]) if name in known else None) for name, path in paths.items()}
    assert recipe is not None and settled is not None
    recorded = recorded_precision(folder) if resume else None
    settled = replace(settled, precision=resolve_precision(settled.precision, where, recorded))
    method = build_method(settled, paths, where)
    finished = run(
        method,
        settled.loop,
        folder,
        resume=resume,
        recipe={"name": recipe, **asdict(settled)},
        inputs=hashes(inputs_of(settled, paths)),
        origin=origin(settings, paths),
    )
    if not finished:
        raise typer.Exit(130)
    say(f"done: {folder}")


@app.command(cls=Verb)
def pairs(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of an EDM teacher.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pairs, or one to continue.")],
    count: Annotated[int, typer.Option("-n", help="How many.")] = 100_000,
    steps: Annotated[int, typer.Option(help="Of Heun's method.")] = 18,
    batch: Annotated[int, typer.Option(help="How many at once.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first.")] = False,
) -> None:
    """Make noise-image pairs for DMD with the teacher's deterministic sampler. Run again to continue."""
    from dmd2.data.pairs import make_pairs
    from dmd2.inference.engine import resolve_device
    from dmd2.runtime.terminal import say

    make_pairs(weights, out, count, steps, batch, resolve_device(device), compile=compile)
    say(f"done: {count} pairs in {out}")


@app.command(cls=Verb)
def evaluate(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of weights; or images: zip, folder.")],
    metric: Annotated[str, typer.Option(help="Some of fid,kid,is,prdc,accuracy,clip,patch-fid.")] = "fid",
    ref: Annotated[Path | None, typer.Option(help="Images (zip, folder), or for fid an .npz.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Images; 50000, or all there are, unless given.")] = None,
    features: Annotated[str, typer.Option(help="inception; or small: FD-small, which is not FID.")] = "inception",
    inception: Annotated[Path | None, typer.Option(help="TorchScript; in weights/metrics unless given.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="For accuracy and --features small; CIFAR-10's.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder with a CLIP model, for clip.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text, one prompt a line, for text-to-image weights.")] = None,
    steps: Annotated[str | None, typer.Option(help="Sampler's steps; the weights' own unless given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; image i uses seed + i.")] = 0,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 64,
    resize: Annotated[int | None, typer.Option(help="Side in pixels that images are brought to first.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
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


@app.command(cls=Verb)
def ref_stats(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Images: a zip or a folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.npz", help="File to write.")],
    features: Annotated[str, typer.Option(help="inception or small.")] = "inception",
    inception: Annotated[Path | None, typer.Option(help="TorchScript; in weights/metrics unless given.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="For --features small; CIFAR-10's.")] = None,
    resize: Annotated[int | None, typer.Option(help="Side in pixels that images are brought to first.")] = None,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Mean and covariance of images' features, for --ref, as EDM's .npz. Only fid can do without the images."""
    from dmd2.evaluation.evaluate import CLASSIFIER, INCEPTION, reference_statistics

    networks = (features, inception or INCEPTION, classifier or CLASSIFIER)
    count = reference_statistics(data, out, *networks, resize=resize, batch=batch, device=device)
    print(f"{out}: {count} images, {features} features")


@app.command(cls=Verb)
def cog(
    port: Annotated[int, typer.Option(help="To listen on.")] = 5000,
    host: Annotated[str, typer.Option(help="To listen on; 0.0.0.0 is every address of this machine.")] = "127.0.0.1",
    weights: Annotated[Path | None, typer.Option(help="Folder of weights with a dmd2.json.")] = None,
) -> None:
    """Serve images through Cog's own server, without Docker. Needs a clone of the repository."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: expected 1 to 65535")
    if weights is not None and not weights.is_file() and not (weights / "dmd2.json").is_file():
        raise UserError(
            f"--weights {weights}: expected a folder with a dmd2.json, a tar of one or a safetensors file"
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


@convert.command(cls=Verb)
def edm(
    source: Annotated[Path, typer.Argument(metavar="FILE.pkl", help="One of EDM's published pickles.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder: safetensors, a config, a dmd2.json.")],
) -> None:
    """Convert one of EDM's pickles. It is read, never run: nothing that it holds is executed."""
    from dmd2.models.edm.published import convert_edm

    config = convert_edm(source, out)
    print(f"{out}: {config.architecture}, {config.resolution}x{config.resolution}, {config.classes} classes")


@convert.command(cls=Verb)
def sdxl(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE [LORA] OUT",
            help="Any SDXL checkpoint, a folder in diffusers' layout or one safetensors file; DMD2's four-step LoRA, "
            "unless the checkpoint has it merged in; a new folder.",
        ),
    ],
    scale: Annotated[float, typer.Option(help="Of the LoRA: 0.5 to 1.0.")] = 1.0,
    vae: Annotated[Path | None, typer.Option(help="Folder of another VAE, such as weights/sdxl/vae.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="For a file, which has neither: folder of SDXL's configurations and tokenizers in diffusers' "
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


def _tell(
    path: Path, metadata: dict[str, object], seconds: dict[str, float], total: float, loaded: float, as_json: bool
) -> None:
    """One line of a finished image."""
    if as_json:
        rounded = {k: round(v, 4) for k, v in seconds.items()}
        print(json.dumps({"path": str(path), **metadata, "seconds": {**rounded, "load": round(loaded, 2)}}))
        return
    stages = ", ".join(f"{stage} {value * 1000:.0f}" for stage, value in seconds.items())
    print(f"{path}  seed {metadata['seed']}  {total * 1000:.0f} ms ({stages}; start-up {loaded:.1f} s)")


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


def _numbers(text: str) -> list[str]:
    """ "0,3-5" → 0, 3, 4, 5"""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--classes {text}: expected numbers and ranges, such as 0,3-5")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return [str(number) for number in dict.fromkeys(numbers)]


def _control(given: Path | None, weights: Path) -> Path | None:
    own = weights / "control" / (given or "")
    return own if given is not None and not given.exists() and own.is_dir() else given


def _loras(sources: list[str], weights: Path) -> tuple[tuple[Lora, float], ...]:
    if not sources:
        return ()
    from dmd2.models.adapters.lora_files import LoraFiles, cache_folder, split_list, split_scale

    files = LoraFiles(weights, cache_folder(), paths=True, token=None)
    exact = [os.path.exists(split_scale(source)[0]) for source in sources]  # noqa: PTH110  # which raises at long names
    parts = [[source] if here else split_list(source) for source, here in zip(sources, exact, strict=True)]
    found = [split_scale(source) for part in parts for source in part]
    return tuple((files.find(source), scale) for source, scale in found)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise UserError(f"--size {text}: expected WIDTHxHEIGHT in pixels, such as 64x64")
    return int(match[1]), int(match[2])


def main() -> None:
    """The console script: a `UserError` is one line on stderr and exit status 2; so is a file's or a disk's error."""
    from dmd2.runtime.errors import shown
    from dmd2.runtime.terminal import Terminal, occupy_standard_streams

    occupy_standard_streams()
    try:
        app()
    except UserError as error:
        Terminal(sys.stderr).write(f"dmd2: {error}\n")
        sys.exit(2)
    except OSError as error:  # a full disk, a file that went away; a broken pipe ends in status 1 by itself
        where = f"{shown(error.filename, 300)}: " if error.filename else ""
        Terminal(sys.stderr).write(f"dmd2: {where}{shown(error.strerror or error)}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
