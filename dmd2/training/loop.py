"""One loop for every method: phases in turn, EMA, checkpoints that resume bit-exactly, logs and sample grids.

A method is a function that returns a `Method`; the loop never learns which one it runs. All randomness of a
step comes from (seed, step), so a resumed run continues exactly as if it had never stopped.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from dmd2.errors import UserError
from dmd2.fileio import atomic_path

Logs = dict[str, float | Tensor]
EMA_RAMP_UP = 0.05  # a half-life is at most this part of what has been (Karras et al. 2022's code; GDD)


@dataclass(frozen=True)
class Batch:
    """What the phases of one step share."""

    step: int
    data: Any
    generator: torch.Generator
    """on the CPU, seeded from (seed, step); every draw of the step comes from it"""


@dataclass(frozen=True)
class Phase:
    """One network's update: every `every`-th step, by the gradient of `loss`."""

    name: str
    every: int
    module: nn.Module
    optimizer: Optimizer
    loss: Callable[[Batch], tuple[Tensor, Logs]]


@dataclass(frozen=True)
class Method:
    """What a training method hands to the loop."""

    phases: list[Phase]
    data: Callable[[int], Any]
    """step → the step's data, always the same for the same step"""
    averaged: nn.Module | None = None
    """the module whose exponential moving average is kept, sampled from and exported"""
    sample: Callable[[nn.Module | None], Tensor] | None = None
    """(averaged weights) → a picture, uint8 (3, H, W)"""
    score: Callable[[nn.Module | None], dict[str, float]] | None = None
    """(averaged weights) → figures that say how good it is by now"""
    export: Callable[[nn.Module | None, Path], None] | None = None
    """(averaged weights, folder) → writes what the run is for"""


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, how often. Intervals are in steps; a step is one turn of the loop."""

    iterations: int
    batch_size: int
    warmup: int = 0
    decay: bool = True
    """whether the learning rate falls linearly to zero after the warm-up"""
    clip_norm: float = 1.0
    """largest norm of a phase's gradient; 0 for no limit"""
    zero_nans: bool = False
    """whether a gradient's NaNs count as zero; otherwise a gradient that is not finite is not used at all"""
    accumulate: int = 1
    """batches of `batch_size` that make one update: what does not fit into memory at once"""
    ema_decay: float = 0.999
    ema_half_life: float = 0.0
    """in images, instead of `ema_decay` if not 0; at most 5 % of the images so far"""
    seed: int = 0
    log_every: int = 20
    sample_every: int = 500
    checkpoint_every: int = 500


def train(
    method: Method,
    settings: LoopSettings,
    out: Path,
    *,
    resume: bool = False,
    recipe: dict[str, Any] | None = None,
) -> bool:
    """Runs `method` to `settings.iterations`. Returns False if a signal stopped it early (after a checkpoint).

    Writes into `out`: `recipe.json`, `log.jsonl`, `tensorboard/`, `samples/`, `checkpoint.pt` and, at the end,
    whatever `method.export` writes.

    Raises:
        UserError: `out` holds a run already and `resume` is off, or a checkpoint of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise UserError(f"--out {out}: holds a run already; add --resume to continue it, or name another folder")
    images = settings.batch_size * settings.accumulate
    half_life = settings.ema_half_life / images
    average = Average(method.averaged, settings.ema_decay, half_life) if method.averaged is not None else None
    first = _restore(checkpoint, method, average, recipe) if checkpoint.exists() else 0
    with atomic_path(out / "recipe.json") as temporary:
        temporary.write_text(json.dumps(recipe or {}, indent=2) + "\n")

    logs = _Logs(out, first, settings)
    averaged = average.module if average else None
    last_saved = time.monotonic()
    with logs, _stop_signals() as stopped:
        for step in range(first, settings.iterations):
            parts = range(step * settings.accumulate, (step + 1) * settings.accumulate)
            first_part, *rest = (
                Batch(step, method.data(part), torch.Generator().manual_seed(_mix(settings.seed, part)))
                for part in parts
            )
            figures = training_step(method.phases, first_part, settings, rest)
            if average:
                average.update(step)
            logs.step(step, figures)

            done = step + 1
            if done % settings.sample_every == 0 or done == settings.iterations:
                if method.sample:
                    logs.picture(done, method.sample(averaged))
                if method.score:
                    logs.score(done, method.score(averaged))
            # Ten minutes are the most that a crash may cost, however slow the steps are.
            late = time.monotonic() - last_saved > 600
            if done % settings.checkpoint_every == 0 or done == settings.iterations or stopped() or late:
                _save(checkpoint, done, method, average, recipe)
                last_saved = time.monotonic()
            if stopped() and done < settings.iterations:
                tqdm.write(f"stopped at step {done}; continue with --resume (checkpoint: {checkpoint})")
                return False
    if method.export:
        method.export(averaged, out)
    return True


def training_step(phases: Iterable[Phase], batch: Batch, settings: LoopSettings, rest: Sequence[Batch] = ()) -> Logs:
    """Every phase whose turn it is: loss, gradient, clipping, optimizer. Returns what there is to log.

    The gradient is the mean over `batch` and the `rest` of the step's batches.
    """
    phases = list(phases)
    figures: Logs = {}
    for phase in phases:
        if batch.step % phase.every:
            continue
        for other in phases:  # a loss may run through another phase's network, but never trains it
            other.module.requires_grad_(other is phase)
        for part in (batch, *rest):
            loss, logs = phase.loss(part)
            (loss / (1 + len(rest))).backward()
        parameters = [p for group in phase.optimizer.param_groups for p in group["params"]]
        if settings.zero_nans:
            for gradient in (p.grad for p in parameters if p.grad is not None):
                torch.nan_to_num_(gradient, nan=0.0, posinf=1e5, neginf=-1e5)
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm or float("inf"))
        for group in phase.optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * schedule(batch.step, settings)
        if torch.isfinite(norm):  # one bad batch must not poison the weights; it shows in the log
            phase.optimizer.step()
        phase.optimizer.zero_grad(set_to_none=True)
        figures |= {phase.name: loss.detach(), f"{phase.name}/gradient_norm": norm, **logs}
    return figures


def schedule(step: int, settings: LoopSettings) -> float:
    """The learning rate's factor: linear warm-up, then linear decay to zero where the recipe asks for it."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if not settings.decay:
        return 1.0
    return (settings.iterations - step) / max(1, settings.iterations - settings.warmup)


class Average:
    """Exponential moving average of a module's parameters; short-memoried at first, so that it can start at once.

    Args:
        decay: of one step.
        half_life: in steps; if not 0, instead of `decay`.
    """

    def __init__(self, module: nn.Module, decay: float, half_life: float = 0.0) -> None:
        self.source, self.decay, self.half_life = module, decay, half_life
        self.module = deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.half_life:
            decay = 0.5 ** (1 / min(self.half_life, EMA_RAMP_UP * (step + 1)))
        targets: list[Tensor] = list(self.module.parameters())
        sources: list[Tensor] = list(self.source.parameters())
        torch._foreach_lerp_(targets, sources, 1 - decay)
        for target, source in zip(self.module.buffers(), self.source.buffers(), strict=True):
            target.copy_(source)


def _mix(seed: int, step: int) -> int:
    """One 63-bit seed from two numbers, without the correlations that seed + step would bring."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**63


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask the loop to stop after the step at hand; a second one ends the process at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked = True
        tqdm.write("stopping after this step, with a checkpoint (once more to stop at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(path: Path, step: int, method: Method, average: Average | None, recipe: dict[str, Any] | None) -> None:
    state = {
        "step": step,
        "recipe": recipe,
        "phases": {
            p.name: {"module": p.module.state_dict(), "optimizer": p.optimizer.state_dict()} for p in method.phases
        },
        "average": average.module.state_dict() if average else None,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path, method: Method, average: Average | None, recipe: dict[str, Any] | None) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    # The number of iterations may change between two parts of a run; anything else would be another run.
    if not isinstance(state, dict) or not {"step", "recipe", "phases", "average"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of a training run")
    mine, theirs = (_without_length(r or {}) for r in (recipe, state["recipe"]))
    if mine != theirs:
        changed = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        raise UserError(f"{path}: made by another recipe (different: {', '.join(changed)})")
    for phase in method.phases:
        phase.module.load_state_dict(state["phases"][phase.name]["module"])
        phase.optimizer.load_state_dict(state["phases"][phase.name]["optimizer"])
    if average:
        average.module.load_state_dict(state["average"])
    return int(state["step"])


def _step_of(line: str) -> float:
    """The step of a line of the log; infinity for a line that a crash cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _without_length(recipe: dict[str, Any]) -> dict[str, Any]:
    loop = {f"loop.{k}": v for k, v in recipe.get("loop", {}).items() if k != "iterations"}
    return {k: v for k, v in recipe.items() if k != "loop"} | loop


@dataclass
class _Logs:
    """JSON lines, TensorBoard (where installed), pictures, and a progress bar with rate and ETA."""

    out: Path
    first: int
    settings: LoopSettings
    sums: dict[str, list[float]] = field(default_factory=dict)

    def __enter__(self) -> None:
        path = self.out / "log.jsonl"
        if path.exists():  # what came after the checkpoint is going to happen again
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self.first]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a")
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.first)
        except ImportError:
            tqdm.write("no TensorBoard log: pip install 'dmd2[train]' brings it")
        terminal = os.isatty(2)
        self.bar = tqdm(
            total=self.settings.iterations,
            initial=self.first,
            unit="step",
            mininterval=0.5 if terminal else 30,
            dynamic_ncols=terminal,
        )
        self.clock, self.clock_step = time.monotonic(), self.first

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()

    def step(self, step: int, figures: Logs) -> None:
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(float(value))
        done = step + 1
        if done % self.settings.log_every == 0 or done == self.settings.iterations:
            now = time.monotonic()
            rate = (
                (done - self.clock_step)
                * self.settings.batch_size
                * self.settings.accumulate
                / max(now - self.clock, 1e-9)
            )
            means = {name: sum(values) / len(values) for name, values in self.sums.items()}
            self._write(done, means | {"images_per_second": rate})
            short = {k: f"{v:.3g}" for k, v in means.items() if "/" not in k}
            self.bar.set_postfix(short | {"img/s": f"{rate:.0f}"}, refresh=False)
            self.sums, self.clock, self.clock_step = {}, now, done
        self.bar.update(1)

    def score(self, done: int, scores: dict[str, float]) -> None:
        self._write(done, {f"score/{k}": v for k, v in scores.items()})
        tqdm.write(f"step {done}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    def picture(self, done: int, picture: Tensor) -> None:
        path = self.out / "samples" / f"{done:07d}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(temporary, format="PNG")
        if self.board:
            self.board.add_image("samples", picture, done)
        tqdm.write(f"step {done}: {path}")

    def _write(self, done: int, figures: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": done} | {k: round(v, 6) for k, v in figures.items()}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, done)
