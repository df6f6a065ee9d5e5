"""`scripts/bench train`: a step of DMD2's training, beside a plain implementation of the same step.

Each is a process of its own, whose peak memory counts. They take turns, so that what else the machine does meets
both.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dmd2.data.captioned import METADATA
from dmd2.data.embeddings import make_latents
from dmd2.inference.engine import resolve_device
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.offload import peak_memory
from dmd2.runtime.precision import autocast_dtype, resolve_precision
from dmd2.training.loop import Batch, Ema, training_step
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.recipes import build_method, resolve
from dmd2.training.run.memory import predict
from dmd2.weights.manifest import read_manifest

IMAGES = 4
"""at least"""
Phase = Callable[[str], None]
Step = Callable[[int, Phase], None]
Networks = Callable[[], list[nn.Module]]


class Clock:
    """Seconds by what was going on. On a GPU it waits for what was begun."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.now = device, dict[str, float](), ""
        self.networks = 0.0
        self._began, self._depth = time.perf_counter(), 0

    def __call__(self, name: str) -> None:
        """From here on it is `name`."""
        now = self.read()
        if self.now:
            self.seconds[self.now] = self.seconds.get(self.now, 0.0) + now - self._began
        self.now, self._began = name, now

    def read(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A network's pass, which others may be part of."""
        self._depth += 1
        began = self.read() if self._depth == 1 else 0.0
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.networks += self.read() - began

    @contextmanager
    def watching(self, networks: list[nn.Module]) -> Iterator[None]:
        """Their passes, and everything of autograd's backward, are seconds of `networks`."""
        call, backward, clock, watched = nn.Module.__call__, Tensor.backward, self, {id(n) for n in networks}

        def called(module: nn.Module, *args: Any, **named: Any) -> Any:
            if id(module) not in watched:
                return call(module, *args, **named)
            with clock.inside():
                return call(module, *args, **named)

        def gone_back(tensor: Tensor, *args: Any, **named: Any) -> None:
            with clock.inside():
                backward(tensor, *args, **named)

        with patch.object(nn.Module, "__call__", called), patch.object(Tensor, "backward", gone_back):
            yield


def ours(weights: Path, recipe: Dmd2Recipe, data: Path, device: torch.device) -> tuple[Step, Networks]:
    """The project's step, as `dmd2.training.loop` takes it."""
    method = build_method(recipe, {"init": weights, "data": data}, device)
    average = Ema(method.ema_model, recipe.loop.ema_decay) if method.ema_model is not None else None
    phases = {phase.name: phase for phase in method.phases}

    def step(number: int, phase: Phase) -> None:
        phase("data")
        parts = range(number * recipe.loop.grad_accum_steps, (number + 1) * recipe.loop.grad_accum_steps)
        batches = [Batch(number, method.data(i), torch.Generator().manual_seed(i)) for i in parts]
        for name, one in phases.items():
            if one.is_due(number):
                phase(name)
                training_step([one], batches[0], recipe.loop, batches[1:])
        if average is not None:
            phase("average")
            average.update(number)

    return step, lambda: networks_of(*(phase.loss for phase in method.phases))


def networks_of(*functions: Any) -> list[nn.Module]:
    """The UNets and heads that these functions hold, however deep, by now: of their closures and fields."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    left = list(functions)
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, Tensor | str | int | float):
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
            continue
        left += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        left += vars(thing).values() if hasattr(thing, "__dict__") else ()
        left += thing if isinstance(thing, list | tuple) else thing.values() if isinstance(thing, dict) else ()
    return list(found.values())


def plain(weights: Path, recipe: Dmd2Recipe, data: Path, device: torch.device) -> tuple[Step, Networks]:
    from plain_dmd2 import PlainDmd2

    from dmd2.data.captioned import CaptionedImages

    given = CaptionedImages(data.with_name("images"))
    rows = range(len(given))
    images = given.images(rows, read_manifest(weights).native_size).to(device).float() / 127.5 - 1
    made = PlainDmd2(weights, recipe, images, given.captions(rows), autocast_dtype(recipe.precision, device))
    return made.step, made.networks


def serve(
    pipe: Connection, kind: str, weights: Path, recipe: Dmd2Recipe, data: Path, device: torch.device, threads: int
) -> None:
    """A process: for each number that it is sent, the seconds of that step. Ends at None."""
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(threads)
    step, networks = {"dmd2": ours, "plain": plain}[kind](weights, recipe, data, device)
    loading = peak_memory(device)
    forget_peak(device)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        watched, number = number
        clock = Clock(device)
        began = clock.read()
        if watched:
            with clock.watching(networks()):
                step(number, clock)
        else:
            step(number, clock)
        clock("")
        pipe.send({"seconds": clock.seconds, "total": clock.read() - began, "networks": clock.networks})
    pipe.send({"loading_peak_gb": round(loading / 1e9, 3), "peak_gb": round(steps_peak(device) / 1e9, 3)})


def apart(function: Callable[..., Any], *args: Any, **named: Any) -> None:
    """Calls it in a process of its own, so that none of its memory stays."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args, kwargs=named)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__}: ended with {process.exitcode}; what it said stands above")


def forget_peak(device: torch.device) -> None:
    """Loading is not counted in `steps_peak`, where that can be: on a GPU, and on Linux."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def steps_peak(device: torch.device) -> int:
    """Bytes: tensors on a GPU, the resident set on a CPU, at most since `forget_peak`."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory(device)
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def write_images(folder: Path, size: tuple[int, int], count: int = IMAGES) -> None:
    """Noise with captions: what images show does not change how long a step takes."""
    from PIL import Image

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    lines = []
    for i in range(count):
        pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"a red apple on a table, number {i}"}))
    (folder / METADATA).write_text("\n".join(lines) + "\n")


def bench(
    weights: Path, name: str, settings: list[str], device: str, rounds: int, kinds: list[str]
) -> dict[str, Any]:
    """Figures of each kind of step.

    Raises:
        UserError: the recipe is not DMD2's of a text-to-image model.
    """
    where = resolve_device(device)
    recipe = resolve(name, ["data=latents", *settings])
    if not isinstance(recipe, Dmd2Recipe) or not recipe.timesteps:
        raise InvalidInput("recipe", "expected DMD2 of a text-to-image model", name)
    recipe = replace(recipe, precision=resolve_precision(recipe.precision, where))
    size = read_manifest(weights).native_size
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if where.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights": read_manifest(weights).name,
        "size": f"{size[0]}x{size[1]}",
        "rounds": rounds,
        "recipe": {"name": name, **asdict(recipe)},
    }
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "latents"
        write_images(data.with_name("images"), size, max(IMAGES, recipe.loop.batch_size))
        apart(make_latents, weights, data.with_name("images"), data, device=where)
        try:
            for kind in kinds:
                pipes[kind], theirs = context.Pipe()
                given = kind, weights, recipe, data, where, torch.get_num_threads()
                processes[kind] = context.Process(target=serve, args=(theirs, *given), daemon=True)
                processes[kind].start()
                theirs.close()  # so that its end is heard
                pipes[kind].recv()
            told = {kind: _turns(pipes, kind) for kind in kinds}
            every = recipe.generator_every
            whole = range(rounds * every)
            for number in range(min(2, every)):  # to get warm: both updates, then the critic's alone
                for kind in kinds:
                    told[kind](number)
            taken: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
            for number in whole:
                for kind in kinds:
                    taken[kind].append(told[kind](number))
            looked = {kind: [told[kind](number, watched=True) for number in range(every)] for kind in kinds}
            for kind in kinds:
                pipes[kind].send(None)
                result[kind] = _figures(taken[kind], looked[kind], pipes[kind].recv(), recipe)
        except EOFError as error:
            raise RuntimeError("a process ended; what it said stands above") from error
        finally:
            for process in processes.values():
                process.terminate()
    if len(kinds) == 2:
        first, second = (result[kind]["images_per_second"] for kind in kinds)
        result["ratio"] = round(first / second, 2)
    return result


def _turns(pipes: dict[str, Any], kind: str) -> Callable[..., dict[str, Any]]:
    def turn(number: int, watched: bool = False) -> dict[str, Any]:
        pipes[kind].send((watched, number))
        found: dict[str, Any] = pipes[kind].recv()
        return found

    return turn


def _figures(
    taken: list[dict[str, Any]], looked: list[dict[str, Any]], peaks: dict[str, float], recipe: Dmd2Recipe
) -> dict[str, Any]:
    """Medians in milliseconds. A mean step is one of `generator_every`."""
    every, images = recipe.generator_every, recipe.loop.batch_size * recipe.loop.grad_accum_steps
    of = {
        name: [step["seconds"][name] for step in taken if name in step["seconds"]]
        for name in ("data", "generator", "critic", "average")
    }
    cycles = [sum(step["total"] for step in taken[i : i + every]) / every for i in range(0, len(taken), every)]
    outside = 1 - sum(step["networks"] for step in looked) / sum(step["total"] for step in looked)
    return {
        "images_per_second": round(images / statistics.median(cycles), 3),
        "step_ms": round(1000 * statistics.median(cycles), 1),
        **{f"{name}_ms": round(1000 * statistics.median(values), 1) for name, values in of.items() if values},
        "outside_networks": round(outside, 3),
        **peaks,
    }


def predicted(weights: Path, name: str, settings: list[str]) -> dict[str, Any]:
    """What `dmd2 train --dry-run --cards 1` says of the same run."""
    recipe = resolve(name, ["data=latents", *settings])
    recipe = replace(recipe, precision=resolve_precision(recipe.precision, torch.device("cpu")))
    return predict(recipe, {"init": weights}, torch.device("cpu"), count_flops=False).as_json()["megabytes"]
