"""`dmd2 generate`: its options are made from `dmd2.inference.request.ImageRequest`, but for some of its own."""

from __future__ import annotations

import gc
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from inspect import Parameter, Signature, signature
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from dmd2.inference.request import ImageRequest, parse_size
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.paths import EMOJI

if TYPE_CHECKING:
    from torch import Tensor

    from dmd2.models.adapters.lora import Lora

BEGAN = time.perf_counter()
STEPS = "Steps: 1 or 4; or teacher, teacher-4, teacher-1 to compare. Repeatable; the most there are unless given."
CHURN = "S_CHURN[,S_TMIN,S_TMAX,S_NOISE]"
WHAT, IMAGE, ADAPTERS, OUTPUT = "What to generate", "From an image", "Adapters", "Output"
PER_PROMPT = 1000
"""images of one call; a request to the service is bounded more tightly"""


def _steps(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the shell: what the weights on the command line can generate with."""
    from dmd2.inference.mode import modes_of
    from dmd2.weights.manifest import read_manifest

    try:
        modes = modes_of(read_manifest(Path(ctx.params.get("weights") or EMOJI)))
    except UserError:
        return []  # no such weights yet: the command itself says so
    return [mode for mode in modes if mode.startswith(incomplete)]


def option(panel: str, help: str, *flags: str, **settings: Any) -> Any:
    """A `typer.Option`, in a group of the help text."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, **settings)


def asks(**fields: tuple[str, str | None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each of these fields of `ImageRequest`: its group and help.

    Name, type and default are the field's; so is the help if it is None.
    """

    def wrap(verb: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(verb, include_extras=True)
        own = [p for p in signature(verb).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        for name, (panel, told) in fields.items():
            field = ImageRequest.model_fields[name]
            kind: Any = Path | None if Path in get_args(field.annotation) else field.annotation
            flags = (f"--{name.replace('_', '-')}",) if kind is bool else ()
            annotation = Annotated[kind, option(panel, told or str(field.description), *flags)]
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation))
        verb.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # where typer looks first
        verb.__annotations__ = {p.name: p.annotation for p in parameters}
        return verb

    return wrap


@asks(
    num_outputs=(WHAT, "Images for each prompt; image i uses seed + i."),
    seed=(WHAT, "Seed of the first image; random unless given."),
    image=(IMAGE, "Image to begin with; it gives the ratio unless --size does."),
    mask=(IMAGE, "Light, or a hole, where --image is to be painted anew."),
    prompt_strength=(IMAGE, None),
    control_image=(ADAPTERS, None),
    control_scale=(ADAPTERS, "How much --control-image counts."),
    previews=(OUTPUT, "Also write what the steps before the last make."),
)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to generate; one image for each.")
    ] = None,
    weights: Annotated[
        Path, option(WHAT, "Folder of weights with a dmd2.json, a tar of one, or a student in one safetensors file.")
    ] = EMOJI,
    steps: Annotated[list[str] | None, option(WHAT, STEPS, autocompletion=_steps)] = None,
    classes: Annotated[
        str | None,
        option(WHAT, "Instead of prompts: classes by number, such as 0,3-5; also writes a grid.", metavar="0-9"),
    ] = None,
    size: Annotated[str | None, option(WHAT, "Size in pixels; the weights' own unless given.", metavar="WxH")] = None,
    lora: Annotated[
        list[str] | None, option(ADAPTERS, "File, URL or hub's owner/name; repeatable.", metavar="SOURCE[:SCALE]")
    ] = None,
    control: Annotated[
        Path | None, option(ADAPTERS, "Folder of a ControlNet or T2I-Adapter; or its name, if in the weights.")
    ] = None,
    vae: Annotated[
        str, option(OUTPUT, "VAE: kl; or tiny (TAESDXL): faster, less sharp; auto: tiny on a CPU, if there is one.")
    ] = "auto",
    churn: Annotated[str | None, option(WHAT, "Noise that an EDM teacher's sampler adds.", metavar=CHURN)] = None,
    out: Annotated[Path, option(OUTPUT, "Folder for the PNG files.")] = Path("outputs"),
    device: Annotated[str, option(OUTPUT, "Device: auto, cpu, cuda or cuda:1.")] = "auto",
    as_json: Annotated[bool, option(OUTPUT, "Print one JSON object for each image.", "--json")] = False,
    **asked: Any,
) -> None:
    """Generate images. Each PNG holds its prompt, seed, steps and the weights' sha256."""
    if classes is not None and prompts:
        raise InvalidInput("classes", "given beside PROMPT; expected one or the other")
    prompts = _numbers(classes) if classes is not None else prompts or []
    if not prompts:
        raise InvalidInput("prompts", "missing; expected what to generate, or --classes")
    num_outputs = asked.pop("num_outputs")
    if not 1 <= num_outputs <= PER_PROMPT:
        raise InvalidInput("num_outputs", f"expected 1 to {PER_PROMPT}", num_outputs)
    request, *_ = [ImageRequest(prompt=prompt, **asked) for prompt in prompts]
    pixels = parse_size(size, "size") if size else None
    _check_folder(out)

    from dmd2.inference.inputs import InputImages
    from dmd2.inference.mode import Mode, default_mode
    from dmd2.models.openvino.choice import give_way, is_enabled
    from dmd2.weights.manifest import read_manifest

    if weights.is_file():
        from dmd2.models.locate import locate

        weights = locate(weights)
    manifest = read_manifest(weights)
    modes = tuple(Mode.parse(name, manifest).name for name in dict.fromkeys(steps or [default_mode(manifest)]))
    if request.previews and "teacher" in modes:
        raise InvalidInput("previews", "the teacher's own sampler shows none; expected --steps with a student")
    given = InputImages.read(
        request.image, request.mask, request.prompt_strength, request.control_image, request.control_scale
    )
    give_way()
    if device in ("auto", "cpu") and is_enabled():
        from dmd2.models.openvino.kept import load_ahead
        from dmd2.runtime.paths import cache_folder

        load_ahead(weights, manifest, [Mode.parse(name, manifest).subfolder for name in modes], cache_folder())

    with _uncollected():
        # Only now torch, which takes a second: what is wrong with the arguments alone is told without it.
        from dmd2.diffusion.sampling import Churn
        from dmd2.inference.engine import Engine
        from dmd2.inference.image_output import image_metadata, save_grid, save_png
        from dmd2.models.model import family_of

        if classes is not None and family_of(weights).takes_prompts:
            raise InvalidInput("classes", f"{weights} takes prompts; expected a class-conditional model", classes)
        noise = None if churn is None else Churn.parse(churn)
        engine = Engine(weights, device, modes=modes, vae=vae, churn=noise)
    for prompt in prompts:
        engine.model.encode_text.token_chunks(prompt)
    pixels = given.size(pixels, manifest.native_size, engine.model.size_unit)
    engine.model.check_size(pixels)
    edit = given.edit(pixels, _control(control, weights), _loras(lora or [], weights))
    loaded = time.perf_counter() - BEGAN
    out.mkdir(parents=True, exist_ok=True)
    first = secrets.randbelow(2**32 - PER_PROMPT) if request.seed is None else request.seed
    for mode in modes:
        drawn = []
        for prompt, i in product(prompts, range(num_outputs)):
            metadata = image_metadata(engine, prompt, first + i, mode, edit, churn=churn)

            def preview(step: int, _: list[int], images: Tensor, metadata: dict[str, object] = metadata) -> None:
                save_png(images[0], out, metadata | {"preview_of_step": step})

            # One at a time: an image's bits never depend on its neighbours. The service batches.
            began = time.perf_counter()
            images, timings = engine.generate_timed(
                [prompt], [first + i], mode, pixels, edit=edit, preview=preview if request.previews else None
            )
            total = time.perf_counter() - began
            path = save_png(images[0], out, metadata)
            drawn.append(images[0])
            _tell(path, metadata, asdict(timings), total, loaded, as_json)
        if classes is not None:
            names = [manifest.class_names[int(n)] if manifest.class_names else f"class {n}" for n in prompts]
            grid = save_grid(drawn, names, out / f"classes-{classes}_{mode}_{first}.png")
            print(json.dumps({"grid": str(grid)}) if as_json else grid)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within it no garbage is looked for: of what imports make there is little, and looking takes a tenth of them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
            raise InvalidInput("out", f"{folder} is a file; expected a folder", out)


def _numbers(text: str) -> list[str]:
    """ "0,3-5" → 0, 3, 4, 5"""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise InvalidInput("classes", "expected numbers and ranges, such as 0,3-5", text)
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
