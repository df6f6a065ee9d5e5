"""`scripts/bench gpu`: SDXL at full size with random weights, dmd2's engine beside diffusers' pipeline."""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PROMPT = "a red apple on a blue background"
SHAPES = ((1024, 1), (512, 1), (512, 8), (1024, 4), (512, 4), (1024, 8), (512, 2), (1024, 2))  # (side, batch)
STEPS = {1: [399], 4: [999, 749, 499, 249]}
UNET, VAE = {512: 1.59, 1024: 6.76}, {512: 2.52, 1024: 10.47}  # TFLOP of a forward pass, by side
RATE, TEXT = 790, 0.00034  # of an H200: dense 16-bit TFLOP/s, seconds to read the text encoders' weights
VARIANTS: dict[str, dict[str, Any]] = {  # dmd2's engines, the most important ones first
    "fp16": {"dtype": "float16"},
    "fp16, tiny VAE": {"dtype": "float16", "vae": "tiny"},
    "fp8, tiny VAE": {"dtype": "float16", "vae": "tiny", "go_fast": True},
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "float16", "go_fast": True},
}
NEEDED = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "accelerate",
    "safetensors",
    "pydantic",
    "numpy",
    "pillow",
    "typer",
)
"""packages. Triton takes a C compiler besides (gcc, clang or what CC names): without one, every shape counts as a
failure in a row's `compile_failures`."""


def start(weights: Path, system: str, device: str, size: int, steps: int, rounds: int) -> dict[str, Any]:
    """From the start of a process to its images, in seconds. Run in a process of its own."""
    import torch

    mode = str(steps)
    marks = {"start": (BEGAN, 0.0)}

    def done(what: str) -> None:
        marks[what] = time.perf_counter(), time.process_time()

    if system != "diffusers":
        from dmd2.inference.engine import Engine

        done("imports")
        engine = Engine(weights, device, modes=(mode,), trace=True, vae="tiny" if "tiny" in system else "kl")
        done("load")
        if engine.device.type == "cuda":
            engine.warm_up((mode,), [(size, size)], 1)
            done("warm_up")
        generate, dtype, target = ours(engine, size, steps, 1), engine.dtype, engine.device
    else:
        from diffusers import StableDiffusionXLPipeline  # noqa: F401

        from dmd2.runtime.precision import DTYPES, fastest

        done("imports")
        target = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if target.type == "cuda" else DTYPES[fastest(target)]
        generate = theirs(load_pipeline(weights, dtype, target), size, steps, 1)
        done("load")
    stages = {}
    for i in range(1 + rounds):
        stages = generate()
        done(f"image {i + 1}")
    result: dict[str, Any] = {"system": system, "threads": torch.get_num_threads()}
    for (_, before), (name, after) in itertools.pairwise(marks.items()):
        result[name] = {"s": round(after[0] - before[0], 2), "cpu_s": round(after[1] - before[1], 2)}
    result["stages_s"] = stages
    from dmd2.runtime.offload import peak_memory

    result |= {"dtype": str(dtype).removeprefix("torch."), "peak_gb": round(peak_memory(target) / 1e9, 2)}
    if target.type == "cpu":  # the peak counts pages of mapped files, which the system may drop
        status = Path("/proc/self/status").read_text()
        result["anonymous_gb"] = round(int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e9, 2)
        result["product_gflops"] = round(product_rate(dtype) / 1e9)
        if stages:
            result["unet_gflops"] = round(1000 * UNET[size] * steps / stages["denoise"])
    return result


def product_rate(dtype: Any) -> float:
    """Operations a second of a large matrix product, by torch."""
    import torch

    a = torch.randn(2048, 2048).to(dtype)
    return rate(lambda: a @ a, 2 * len(a) ** 3)


def rate(call: Callable[[], object], amount: float) -> float:
    """Of which a call does `amount`: so much a second, in the best of ten calls."""
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return amount / best


def ours(engine: Any, size: int, steps: int, batch: int) -> Callable[[], dict[str, float]]:
    """A call that generates and returns the seconds of its stages. Each has new prompts: none is encoded already."""
    numbers = itertools.count()

    def generate() -> dict[str, float]:
        seeds = [next(numbers) for _ in range(batch)]
        prompts = [f"{PROMPT} {steps} {seed}" for seed in seeds]
        timings = engine.generate_timed(prompts, seeds, str(steps), (size, size))[1]
        return {name: round(value, 4) for name, value in vars(timings).items()}

    return generate


def load_pipeline(weights: Path, dtype: Any, device: Any) -> Any:
    """diffusers' own, with the weights of the four-step student for any number of steps."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(weights, torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, size: int, steps: int, batch: int) -> Callable[[], None]:
    """A call that generates with diffusers, up to the tensor on the CPU."""
    import torch

    def generate() -> None:
        images = pipeline(
            [PROMPT] * batch, width=size, height=size, timesteps=STEPS[steps], guidance_scale=0.0, output_type="pt"
        ).images
        (images * 255).round().to(torch.uint8).cpu()

    return generate


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, ascending; several take turns, after two calls that do not count."""
    import torch

    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 2:
                taken[name].append((time.perf_counter() - began) * 1000)
    return {name: sorted(values) for name, values in taken.items()}


def floor_ms(size: int, steps: int, batch: int) -> float:
    """What the arithmetic alone would take on an H200."""
    return 1000 * ((UNET[size] * steps + VAE[size]) * batch / RATE + TEXT)


class OutOfTime(BaseException):
    """The deadline is over, or somebody wants this process to end: nothing that catches errors may go on."""


@contextmanager
def ending(deadline: float) -> Iterator[None]:
    """Raises `OutOfTime` in what runs within it at the deadline, and at SIGTERM."""

    def stop(number: int, frame: object) -> None:
        raise OutOfTime(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - time.perf_counter()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def wheels() -> dict[str, str]:
    """The packages that this needs, with the versions that are there; "" for one that is missing."""
    found = {}
    for name in NEEDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # triton, where there is no GPU
            found[name] = ""
    return found


def told(error: Exception) -> str:
    """An error's kind and first line."""
    from dmd2.runtime.errors import first_line

    return f"{type(error).__name__}: {first_line(error)}"


def attempt(
    result: dict[str, Any], fits: Callable[[str, float], bool], what: str, seconds: float, run: Callable[[], None]
) -> None:
    """Runs what takes about so many seconds, if it fits. If it fails that is named, and the next one has its turn."""
    if not fits(what, seconds):
        return
    try:
        run()
    except Exception as error:
        result["skipped"].append(f"{what}: {told(error)}")


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable for what runs within, child processes included."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def gpu(device: str, minutes: float, size: int, rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Everything that fits into `minutes`. Without a GPU: only the starts, one step at `size`.

    Args:
        out: file that has all there is so far, after each row.
    """
    import torch
    from full_size import write_full_size

    from dmd2.runtime.files import atomic_text

    deadline = BEGAN + minutes * 60
    cuda = device != "cpu" and torch.cuda.is_available()
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "wheels": wheels(),
        "starts": [],
        "rows": [],
        "skipped": [],
    }

    def fits(what: str, seconds: float) -> bool:
        if out is not None:
            atomic_text(out, json.dumps(result, indent=2) + "\n")
        if time.perf_counter() + seconds < deadline:
            return True
        result["skipped"].append(f"{what}: {seconds:.0f} s, more than was left")
        return False

    try:
        with ending(deadline):
            _measure(device, size, rounds, result, fits, cuda, write_full_size)
    except OutOfTime as error:
        result["skipped"].append(f"what had begun when time was up ({error})")
    except Exception as error:  # what there is so far is worth having
        result["skipped"].append(f"the rest: {told(error)}")
    result["seconds"] = round(time.perf_counter() - BEGAN, 1)
    if out is not None:
        atomic_text(out, json.dumps(result, indent=2) + "\n")
    return result


def _measure(
    device: str,
    size: int,
    rounds: int,
    result: dict[str, Any],
    fits: Callable[[str, float], bool],
    cuda: bool,
    write_full_size: Callable[..., None],
) -> None:
    with tempfile.TemporaryDirectory(prefix="dmd2-bench-") as temporary:
        began = time.perf_counter()
        weights = Path(temporary) / "weights"
        write_full_size(weights, students=(1, 4) if cuda else (4, 1), tiny=True)
        result["writing_s"] = round(time.perf_counter() - began, 1)
        os.environ["DMD2_CACHE"] = str(Path(temporary) / "cache")  # cold at first
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(temporary) / "inductor")
        if cuda:  # before the starts: rows tell more
            compare(weights, result, fits, rounds)
        # On a CPU the first process of all converts the networks.
        for system in ("dmd2", "diffusers") if cuda else ("dmd2, converting", "dmd2", "dmd2 tiny", "diffusers"):
            command = [sys.executable, __file__, str(weights), system, device, str(size), "1", str(rounds)]
            attempt(result, fits, f"start {system}", 200 if cuda else 120, partial(_start, result, command))


def _start(result: dict[str, Any], command: list[str]) -> None:
    """Adds what a child process found. Raises whatever is wrong with that."""
    child = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if child.returncode:
        raise RuntimeError(f"exit status {child.returncode}")
    result["starts"].append(json.loads(child.stdout))
    print(json.dumps(result["starts"][-1]), file=sys.stderr)


def compare(
    weights: Path, result: dict[str, Any], fits: Callable[[str, float], bool], rounds: int, device: str = "cuda"
) -> None:
    """Rows of times, the most important ones first: all variants at the largest size, then the other shapes.

    What a variant cannot do (fp8 on a GPU without) is named, and the next one has its turn.
    """
    import torch

    from dmd2.inference.engine import Engine

    largest = SHAPES[0][0]
    tried = partial(attempt, result, fits)

    def rows(
        name: str, make: Callable[..., Callable[[], Any]], size: int, batch: int, made: Engine | None = None
    ) -> None:
        for steps in STEPS:
            torch.cuda.reset_peak_memory_stats()
            row(result, name, size, steps, batch, make(size, steps, batch), rounds, made)

    def engine(vae: str = "kl", dtype: str = "float16", go_fast: bool = False) -> Engine:
        gc.collect()  # the one before is in cycles, by its hooks
        torch.cuda.empty_cache()
        with variable("DMD2_GO_FAST", str(go_fast).lower()):
            return Engine(weights, device, dtype=getattr(torch, dtype), modes=("1", "4"), trace=True, vae=vae)

    def variant(name: str, size: int, batch: int, made: Engine | None = None) -> None:
        chosen = made or engine(**VARIANTS[name])
        chosen.warm_up(("1", "4"), [(size, size)], batch, windows=1)
        rows(f"dmd2, {name}", partial(ours, chosen), size, batch, chosen)

    first = next(iter(VARIANTS))
    kept: list[Engine] = []
    pipelines: list[Any] = []

    def usual() -> None:
        kept.append(engine(**VARIANTS[first]))
        variant(first, largest, 1, kept[0])

    def eager(size: int, batch: int) -> None:
        if not pipelines:
            pipelines.append(load_pipeline(weights, getattr(torch, VARIANTS[first]["dtype"]), device))
        rows("diffusers", partial(theirs, pipelines[0]), size, batch)

    tried(f"dmd2, {first}", 90, usual)
    tried("diffusers", 20, partial(eager, largest, 1))
    for name in [*VARIANTS][1:]:
        tried(f"dmd2, {name}", 90, partial(variant, name, largest, 1))
    for size, batch in SHAPES[1:]:
        if kept:
            tried(f"dmd2, {first}, {size}², batch {batch}", 45, partial(variant, first, size, batch, kept[0]))
        tried(f"diffusers, {size}², batch {batch}", 30, partial(eager, size, batch))

    def compiled() -> None:
        pipeline = pipelines[0]
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(pipeline.unet, mode="reduce-overhead", fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="reduce-overhead", fullgraph=True)
        rows("diffusers, compiled", partial(theirs, pipeline), largest, 1)

    if pipelines:
        tried("diffusers, compiled", 150, compiled)


def row(
    result: dict[str, Any],
    name: str,
    size: int,
    steps: int,
    batch: int,
    call: Callable[[], Any],
    rounds: int,
    engine: Any = None,
) -> None:
    """Adds one row to the table: of an `engine` also how it uses memory, the shapes that it could not compile so far,
    and how many calls of networks ran uncompiled for this row."""
    import torch

    placement = None if engine is None else engine.model.placement
    compiler = None if placement is None else placement.compiler
    before = 0 if compiler is None else compiler.unprepared
    values = timed({name: call}, rounds)[name]
    found: dict[str, Any] = {"system": name, "size": size, "steps": steps, "batch": batch}
    found["p50_ms"] = round(statistics.median(values), 1)
    found["p95_ms"] = round(values[min(len(values) - 1, int(0.95 * len(values)))], 1)
    found["times_floor"] = round(found["p50_ms"] / floor_ms(size, steps, batch), 2)
    found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)  # of all that is loaded
    if placement is not None:
        found["memory"] = placement.plan.mode
    if compiler is not None:
        found |= {"compile_failures": compiler.failures, "unprepared": compiler.unprepared - before}
    if stages := call():
        found["stages_s"] = stages
    result["rows"].append(found)
    print(json.dumps(found), file=sys.stderr)


def table(result: dict[str, Any]) -> str:
    """The rows and starts as text, one below the other."""
    entries = [*result["starts"], *result["rows"]]
    lines = ["  ".join(f"{key} {value}" for key, value in entry.items()) for entry in entries]
    versions = ", ".join(f"{name} {found or 'missing'}" for name, found in result.get("wheels", {}).items())
    return "\n".join([*lines, *(f"skipped {what}" for what in result["skipped"]), versions])


if __name__ == "__main__":  # a child of `gpu`
    folder, system, device, *numbers = sys.argv[1:]
    print(json.dumps(start(Path(folder), system, device, *map(int, numbers))))
