"""One loop for every method: phases in turn, EMA, checkpoints that resume bit-exactly, logs and sample grids.

A method is a function that returns a `Method`; the loop never learns which one it runs. All randomness of a
step comes from (seed, step), so a resumed run continues exactly as if it had never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd2.runtime.errors import TrainingDiverged, UserError, shown
from dmd2.runtime.files import atomic_text
from dmd2.runtime.terminal import say
from dmd2.training.methods.post_hoc_ema import FOLDER as AVERAGES
from dmd2.training.methods.post_hoc_ema import PowerAverages
from dmd2.training.parallel.group import ALONE, Parallel, full, local
from dmd2.training.ranges import Amount, Count, Decay, Seed, Steps
from dmd2.training.run.belonging import check_inputs, check_recipe, first_not_finite
from dmd2.training.run.checkpoints import KEEP, Checkpoints, Stored
from dmd2.training.run.divergence import Guard
from dmd2.training.run.folder import open_run
from dmd2.training.run.logs import WATCH, NoLogs, RunLogs, Watch
from dmd2.training.run.packing import Part, pack, unpack
from dmd2.training.run.signals import stop_signals

Logs = dict[str, float | Tensor]

EARLY = 20  # step of a first look, however rare the others are

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
    first: int = 0
    """the first step of which it is a part"""
    rests: int = 0
    """at every so many-th step it has no turn, whatever `every` says; 0: it never rests"""

    def is_due(self, step: int) -> bool:
        """Whether it is a part of that step."""
        resting = self.rests > 0 and step % self.rests == 0
        return step % self.every == 0 and step >= self.first and not resting


@dataclass(frozen=True)
class Method:
    """What a training method hands to the loop."""

    phases: list[Phase]
    data: Callable[[int], Any]
    """step → the step's data, always the same for the same step"""
    ema_model: nn.Module | None = None
    """the module that is sampled from and exported: its exponential moving average where one is kept, else itself"""
    sample: Callable[[nn.Module | None], Tensor] | None = None
    """(the module) → an image, uint8 (3, H, W)"""
    score: Callable[[nn.Module | None], dict[str, float]] | None = None
    """(the module) → figures that say how good it is by now"""
    export: Callable[[nn.Module | None, Path], None] | None = None
    """(the module, folder) → writes what the run is for"""


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, how often. Intervals are in steps; a step is one turn of the loop.

    Ranges are checked where a recipe is resolved (`dmd2.training.recipes`).
    """

    iterations: Count
    batch_size: Count
    warmup: Steps = 0
    decay: bool = True
    """whether the learning rate falls linearly to zero after the warm-up"""
    max_grad_norm: Amount = 1.0
    """largest norm of a phase's gradient; 0 for no limit"""
    zero_nans: bool = False
    """whether a gradient's NaNs count as zero, if the loss is finite; otherwise such a gradient is not used at all"""
    grad_accum_steps: Count = 1
    """batches of `batch_size` that make one update: what does not fit into memory at once"""
    ema_decay: Decay = 0.999
    """0: no average is kept, and the weights as they are get shown and exported"""
    ema_half_life: Amount = 0.0
    """in images, instead of `ema_decay` if not 0; at most 5 % of the images so far"""
    post_hoc_ema: bool = False
    """whether each checkpoint leaves what averages of any width are made of afterwards (`dmd2 convert ema`)"""
    seed: Seed = 0
    log_every: Count = 20
    sample_every: Count = 500
    checkpoint_every: Count = 500

    @property
    def averages(self) -> bool:
        """Whether an average is kept: it takes as much memory as what it is of."""
        return self.ema_decay > 0 or self.ema_half_life > 0


def train(
    method: Method | Callable[[], Method],
    settings: LoopSettings,
    out: Path,
    *,
    resume: bool = False,
    recipe: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    origin: dict[str, Any] | None = None,
    parallel: Parallel = ALONE,
    keep: int = KEEP,
    watch: Watch = WATCH,
) -> bool:
    """Runs `method` to `settings.iterations`. Returns False if a signal stopped it early (after a checkpoint).

    Writes into `out`: `recipe.json`, `log.jsonl`, `tensorboard/`, `samples/`, `checkpoints/` and, at the end,
    whatever `method.export` writes.

    Args:
        method: or what makes it, which is asked once `out` is this run's alone.
        recipe: the numbers. A run goes on with the same ones only, but for how long it is and what it shows.
        inputs: hashes of the files that the results depend on, by option; a run goes on with the same ones only.
        origin: what else `recipe.json` is to say: where the run came from.
        parallel: the processes that share the run; `out` is one folder for all.
        watch: what else the log is to say, and where.
        keep: how many checkpoints stay, the newest.

    Raises:
        UserError: `out` holds a run already and `resume` is off, or none and it is on; a checkpoint of another
            recipe, or none that is whole; another trainer is at work in `out`; it cannot be written to.
        TrainingDiverged: the run no longer learns.
    """
    with open_run(out, resume) if parallel.leads else nullcontext():
        parallel.told(None)  # that it is open
        method = method if isinstance(method, Method) else method()
        checkpoints = Checkpoints(out, keep, parallel)
        try:
            run = _Run(method, settings, checkpoints, {"recipe": recipe, "inputs": inputs}, parallel)
            if resume:
                run.restore()
            if parallel.leads:
                known = (recipe or {}) | (origin or {}) | ({"inputs": inputs} if inputs is not None else {})
                atomic_text(out / "recipe.json", json.dumps(known, indent=2) + "\n")
            with checkpoints:
                finished = run.go(out, watch)
            if finished and method.export and (parallel.leads or parallel.collective):
                with run.shown() as module:
                    method.export(module, out)
            return finished
        except OSError as error:
            if not out.is_dir():
                gone = f"{out}: was moved or removed while a training ran there"
                raise UserError(f"{gone}; `resume` goes on from its newest checkpoint, in its new place") from error
            kept = (
                "its checkpoint is whole: `resume` goes on from there" if checkpoints.exist() else "nothing is kept"
            )
            where, what = shown(error.filename or out, 300), shown(error.strerror or error)
            raise UserError(f"{where}: {what}; {kept}") from error


class _Run:
    """One call of `train`: what changes as it goes on.

    `about` goes into every checkpoint, and must be in the one that the run goes on from.
    """

    def __init__(
        self,
        method: Method,
        settings: LoopSettings,
        checkpoints: Checkpoints,
        about: dict[str, dict[str, Any] | None],
        parallel: Parallel,
    ) -> None:
        self.parallel = parallel
        self.method, self.settings, self.checkpoints, self.about = method, settings, checkpoints, about
        self.guard, self.first, self.sums = Guard(), 0, dict[str, list[float]]()
        half_life = settings.ema_half_life / (settings.batch_size * settings.grad_accum_steps)
        ema_model, self.average = method.ema_model, None
        if ema_model is not None and settings.averages:
            self.average = Ema(ema_model, settings.ema_decay, half_life, parallel)
        self.ema_model = self.average.module if self.average else None
        self.networks = [p.module for p in method.phases] + ([ema_model] if ema_model is not None else [])
        self.power = None
        if settings.post_hoc_ema and ema_model is not None:
            if parallel.collective:
                raise UserError("post_hoc_ema=true: expected `parallel` ddp; shards are not averaged so")
            self.power = PowerAverages(ema_model, checkpoints.folder.parent / AVERAGES)

    def go(self, out: Path, watch: Watch) -> bool:
        """All steps that are left. False if a signal stopped it early."""
        settings, images = self.settings, self.settings.batch_size * self.settings.grad_accum_steps
        kind = RunLogs if self.parallel.leads else NoLogs
        logs = kind(out, self.first, settings.iterations, settings.log_every, images, self.sums, watch)
        last_saved = time.monotonic()
        with stop_signals() as stopped, logs:
            self._show(logs, self.first)
            for step in range(self.first, settings.iterations):
                logs.add(self._step(step))
                done = step + 1
                self._check(done, logs)
                # Ten minutes are the most that a crash may cost, however slow the steps are.
                late = time.monotonic() - last_saved > 600
                due, stopping = self.parallel.any(late), self.parallel.any(stopped())
                if done % settings.checkpoint_every == 0 or done == settings.iterations or stopping or due:
                    self._save(done, logs)  # before anything else, for all else may fail, or take long
                    last_saved = time.monotonic()
                if stopping and done < settings.iterations:
                    logs.line(done)
                    self.checkpoints.wait()
                    say(f"stopped at step {done} (checkpoint: {self.checkpoints.folder})")
                    return False
                self._show(logs, done)
        self.guard.check(settings.iterations, finished=True)
        return True

    def _step(self, step: int) -> Logs:
        settings = self.settings
        batches = []
        for part in range(step * settings.grad_accum_steps, (step + 1) * settings.grad_accum_steps):
            seed = _mix(settings.seed, part)
            torch.manual_seed(_mix(seed, 0))  # for data that are drawn without a generator of their own
            batches.append(Batch(step, self.method.data(part), self.parallel.ranks.generator(seed)))
        phases, first, *rest = self.method.phases, *batches
        figures = training_step(phases, first, settings, rest, self.networks, self.parallel)
        if self.average:
            self.average.update(step)
        if self.power:
            self.power.update(step)
        self.guard.note(step + 1, {name: figures.get(f"{name}/skipped") for name in self._names()})
        return figures

    def _check(self, done: int, logs: RunLogs) -> None:
        """Ends a run that no longer learns, with a checkpoint: what was skipped has left no trace in it."""
        try:
            self.guard.check(done)
        except TrainingDiverged as error:
            self.guard.recent.clear()  # whoever goes on from here has as many attempts as before
            self._save(done, logs)
            self.checkpoints.wait()
            raise TrainingDiverged(f"{error} (checkpoint: {self.checkpoints.folder})") from error

    def _names(self) -> list[str]:
        return [phase.name for phase in self.method.phases]

    def _show(self, logs: RunLogs, done: int) -> None:
        """What is due after `done` steps: a line of the log, an image, a score."""
        logs.line(done)
        # Before the first step, too, and soon after: only so one sees that training helps, or that it does not.
        if done % self.settings.sample_every == 0 or done in (EARLY, self.settings.iterations):
            made_up_for = done == self.first > 0 and logs.image_path(done).exists()
            sample, score = self.parallel.told((not made_up_for, logs.lacks(done, "score")))
            if not (self.parallel.leads or self.parallel.collective):
                return
            with self.shown() as module:
                if self.method.sample and sample:
                    logs.image(done, self.method.sample(module))
                if self.method.score and score:
                    logs.score(done, self.method.score(module))
            self.parallel.settle()

    @contextmanager
    def shown(self) -> Iterator[nn.Module | None]:
        """What is sampled from and exported; without dropout, and gradients."""
        module = self.method.ema_model
        if self.average or module is None:
            yield self.ema_model
            return
        training = [part for part in module.modules() if part.training]
        try:
            with torch.no_grad():
                yield module.eval()
        finally:
            for part in training:
                part.training = True

    def _save(self, done: int, logs: RunLogs) -> None:
        networks = [(phase.name, phase.module) for phase in self.method.phases]
        bad = first_not_finite(networks + ([("average", self.ema_model)] if self.ema_model is not None else []))
        if self.parallel.any(bad is not None):
            where = bad or "in another process"
            raise TrainingDiverged(
                f"step {done}: weights are no longer finite ({where}); the checkpoint before is kept"
            )
        if self.power and self.parallel.leads:
            self.power.save(done)
        phases, tensors = pack(self._parts(), self.ema_model)
        about = {"step": done, **self.about, "phases": phases, "guard": self.guard.state(), "log": logs.sums}
        self.checkpoints.save(about, tensors)

    def _parts(self) -> list[Part]:
        return [(p.name, p.module, p.optimizer) for p in self.method.phases]

    def restore(self) -> None:
        """Loads the newest checkpoint, once all of it is known to fit."""
        stored = self.checkpoints.load()
        try:
            self._restore(stored)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # of another kind
            why = " ".join(str(error).split())[:300]
            raise UserError(f"{stored.path}: not a checkpoint of this run ({why})") from error

    def _restore(self, stored: Stored) -> None:
        path, about = stored.path, stored.about
        check_recipe(path, self.about["recipe"], about.get("recipe"))
        check_inputs(self.about["inputs"], about.get("inputs"))
        self.first, self.guard = int(about["step"]), Guard.of(about["guard"])
        self.sums = {name: [float(value) for value in values] for name, values in about["log"].items()}
        unpack(stored, self._parts(), self.ema_model, self.parallel)
        if self.power:
            self.power.restore(self.first)
        self._check_length(stored)

    def _check_length(self, stored: Stored) -> None:
        """The learning rate may depend on how long a run is; it is always that of the length asked for last."""
        path, now = stored.path, self.settings.iterations
        if self.first > now:
            raise UserError(f"{path}: has done {self.first} steps already; expected iterations of at least that")
        then = ((stored.about.get("recipe") or {}).get("loop") or {}).get("iterations", now)
        if then != now and self.settings.decay and self.first < now:
            old, new = (schedule(self.first, replace(self.settings, iterations=n)) for n in (then, now))
            say(
                f"{now} steps instead of {then}: from here on the learning rate falls to zero at step {now}, as if it"
            )
            say(f"had been so from the start ({max(old, 0):.3g} → {new:.3g} of lr); decay=false would have kept it")


def training_step(
    phases: Iterable[Phase],
    batch: Batch,
    settings: LoopSettings,
    rest: Sequence[Batch] = (),
    networks: Iterable[nn.Module] = (),
    parallel: Parallel = ALONE,
) -> Logs:
    """Every phase whose turn it is: loss, gradient, clipping, optimizer. Returns what there is to log.

    The gradient is the mean over `batch` and the `rest` of the step's batches. Where the loss, the gradient or a
    buffer that a forward pass changed (batch normalisation's averages) is not finite, the phase leaves no trace: no
    update, and the buffers of the phases' modules and of `networks` are what they were. "NAME/skipped" is then 1.
    Of several processes all do the same: gradients and figures are means over them.
    """
    phases = list(phases)
    figures: Logs = {}
    for index, phase in enumerate(phases):
        if not phase.is_due(batch.step):
            continue
        parallel.settle()
        for other in phases:  # a loss may run through another phase's network, but never trains it
            other.module.requires_grad_(False)
        phase.module.requires_grad_(True)
        buffers = _buffers([*(p.module for p in phases), *networks])
        losses, told = [], []
        for part in (batch, *rest):
            # What is drawn without `part.generator`, dropout's keys above all: from (seed, step, part, phase), too.
            torch.manual_seed(_mix(part.generator.initial_seed(), 1 + index))
            loss, logs = phase.loss(part)
            (loss / (1 + len(rest))).backward()
            losses.append(loss.detach())
            told.append(logs)
        parallel.reduce(p for group in phase.optimizer.param_groups for p in group["params"])
        norm, finite = _gradient(phase, settings)
        finite = finite and bool(torch.isfinite(torch.stack(losses)).all()) and _still_finite(buffers)
        finite = parallel.all(finite)
        for group in phase.optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * schedule(batch.step, settings)
        if finite:
            phase.optimizer.step()
        else:  # one bad batch must not poison the weights; it shows in the log
            for buffer, before in buffers:
                buffer.copy_(before)
        phase.optimizer.zero_grad(set_to_none=True)
        figures |= {phase.name: torch.stack(losses).mean(), f"{phase.name}/gradient_norm": norm}
        figures |= {f"{phase.name}/skipped": float(not finite), **_means(told)}
    parallel.settle()
    return parallel.averaged(figures)


def _means(parts: Sequence[Logs]) -> Logs:
    """Each figure's mean over the parts of a step that have it."""
    values = {name: [logs[name] for logs in parts if name in logs] for logs in parts for name in logs}
    return {name: sum(found) / len(found) for name, found in values.items()}


def _gradient(phase: Phase, settings: LoopSettings) -> tuple[Tensor, bool]:
    """Clips. Returns the gradient's norm before that, and whether there is anything to learn from it."""
    parameters = [p for group in phase.optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    zeroed = False
    if settings.zero_nans:
        zeroed = not bool(torch.isfinite(full(nn.utils.get_total_norm(gradients))))
        for gradient in gradients:
            torch.nan_to_num_(local(gradient), nan=0.0, posinf=1e5, neginf=-1e5)
    norm = full(nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf")))
    return norm, bool(torch.isfinite(norm)) and not (zeroed and float(norm) == 0)


Buffers = list[tuple[Tensor, Tensor]]


def _buffers(modules: Iterable[nn.Module]) -> Buffers:
    """Each buffer once, with a copy."""
    found = {id(buffer): buffer for module in modules for buffer in module.buffers()}
    return [(buffer, buffer.clone()) for buffer in found.values()]


def _still_finite(buffers: Buffers) -> bool:
    """What was infinite before may stay so: masks are."""
    checks = [(b.isfinite() | (b == old)).all() for b, old in buffers if b.is_floating_point()]
    return bool(torch.stack(checks).all()) if checks else True


def schedule(step: int, settings: LoopSettings) -> float:
    """The learning rate's factor: linear warm-up, then linear decay to zero where the recipe asks for it."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if not settings.decay:
        return 1.0
    return (settings.iterations - step) / max(1, settings.iterations - settings.warmup)


class Ema:
    """Exponential moving average of a module's parameters; short-memoried at first, so that it can start at once.

    It goes on at every step, also where the module moves at every k-th alone: at the end of each k steps it is what
    an average of the module's own updates with the decay to the power of k would be, and a recipe's decay means the
    same time whatever k is. What batch normalisation keeps is averaged alike, for it describes the raw weights, whose
    mean the averaged ones are; whole numbers and constants are copied.

    Args:
        decay: of one step.
        half_life: in steps; if not 0, instead of `decay`.
    """

    def __init__(self, module: nn.Module, decay: float, half_life: float = 0.0, parallel: Parallel = ALONE) -> None:
        self.source, self.decay, self.half_life = module, decay, half_life
        self.module = parallel.copy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.half_life:
            decay = 0.5 ** (1 / min(self.half_life, EMA_RAMP_UP * (step + 1)))
        targets: list[Tensor] = [local(p) for p in self.module.parameters()]
        sources: list[Tensor] = [local(p) for p in self.source.parameters()]
        torch._foreach_lerp_(targets, sources, 1 - decay)
        for target, source in zip(self.module.buffers(), self.source.buffers(), strict=True):
            if target.is_floating_point():
                target.lerp_(source, 1 - decay)
            else:
                target.copy_(source)


def _mix(seed: int, step: int) -> int:
    """One 63-bit seed from two numbers, without the correlations that seed + step would bring."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**63
