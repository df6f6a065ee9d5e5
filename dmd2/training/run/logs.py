"""What a run says of itself: JSON lines, TensorBoard, images, a progress bar."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dmd2.runtime.files import atomic_path, atomic_text
from dmd2.runtime.offload import peak_memory
from dmd2.runtime.terminal import Terminal, say

Logs = dict[str, float | Tensor]
SPEED = ("images_per_second", "flop_utilisation", "peak_memory_gb")
"""figures of the log that no two runs have in common"""


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Watch:
    """What the log is to say beside figures, and where else."""

    flops: float = 0.0
    """of a mean step, all processes together; 0 where it was not counted"""
    peak: float = 0.0
    """operations a second of all devices together, at most"""
    device: torch.device = CPU
    """whose memory is looked at"""
    wandb: str | None = None
    """Weights & Biases' project; the mode is by its own variables, such as WANDB_MODE=offline"""

    def per_step(self, seconds: float) -> dict[str, float]:
        """Of a mean step of so many seconds: model FLOP utilisation in [0, 1], and this process's peak memory."""
        used = {"flop_utilisation": self.flops / self.peak / max(seconds, 1e-9)} if self.flops and self.peak else {}
        return used | {"peak_memory_gb": peak_memory(self.device) / 1e9}


WATCH = Watch()


class RunLogs:
    """The logs of one run, from step `first` on.

    `add` only remembers; `line`, `score` and `image` write. A step's checkpoint comes between the two and holds
    `sums`, so that a run that is killed in between loses nothing: when it goes on, it writes what is missing of
    step `first` (see `lacks`).

    Args:
        out: the run's folder: `log.jsonl`, `tensorboard/` and `samples/` are in it.
        first: steps done already.
        iterations: of the whole run.
        every: steps between two lines.
        images: of one step.
        sums: figures since the last line, as the checkpoint has them.
        watch: what else there is to say.
    """

    def __init__(
        self,
        out: Path,
        first: int,
        iterations: int,
        every: int,
        images: int,
        sums: dict[str, list[float]],
        watch: Watch = WATCH,
    ) -> None:
        self.watch = watch
        self.out, self.first, self.iterations, self.every, self.images = out, first, iterations, every, images
        self.sums = {name: list(values) for name, values in sums.items()}
        self._there: set[str] = set()  # names of figures that the log holds of step `first`
        self.board: Any = None
        self.wandb: Any = None

    def __enter__(self) -> RunLogs:
        path = self.out / "log.jsonl"
        if path.exists() and not self.first:  # of a run that left no checkpoint
            path.replace(self.out / "log.previous.jsonl")
        if path.exists():  # what came after the checkpoint is going to happen again
            lines = [(step, line) for line in path.read_text(errors="replace").splitlines() for step in [_step(line)]]
            kept = [line for step, line in lines if step <= self.first]
            self._there = {name for step, line in lines if step == self.first for name in json.loads(line)}
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.first + 1)
        except ImportError:
            say("no TensorBoard log: pip install 'dmd2[train]' brings it")
        if self.watch.wandb is not None:
            import wandb  # `dmd2 train` has looked whether there is one

            self.wandb = wandb.init(
                project=self.watch.wandb, name=self.out.name, id=wandb_id(self.out), dir=self.out, resume="allow"
            )
        terminal = os.isatty(2)
        self.bar = tqdm(
            total=self.iterations,
            initial=self.first,
            unit="step",
            mininterval=0.5 if terminal else 30,
            dynamic_ncols=terminal,
            file=Terminal(sys.stderr),
        )
        self._clock, self._clock_step = time.monotonic(), self.first
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        try:
            self.file.close()
        finally:
            if self.board:
                self.board.close()
            if self.wandb:
                self.wandb.finish()

    def add(self, figures: Logs) -> None:
        """Remembers the figures of a step, all brought over from the device at once: each copy would wait for it.

        Once a step and not once a line: what a step skips is decided in its middle, where the loop waits anyhow.
        """
        tensors = {name: value for name, value in figures.items() if isinstance(value, Tensor)}
        brought: list[float] = []
        if tensors:
            brought = torch.stack([value.detach().double().reshape(()) for value in tensors.values()]).tolist()
        for name, number in (figures | dict(zip(tensors, brought, strict=True))).items():
            self.sums.setdefault(name, []).append(float(number))

    def lacks(self, done: int, what: str) -> bool:
        """Whether the log has yet to be told `what` ("line" or "score") of step `done`. Only `first` may have it."""
        scored = {name for name in self._there if name.startswith("score/")}
        return done != self.first or not (scored if what == "score" else self._there - scored - {"step"})

    def line(self, done: int) -> None:
        """Means since the last line, where one is due. A mean is over what was finite; null if nothing was."""
        due = (done % self.every == 0 or done == self.iterations) and self.sums
        if due and self.lacks(done, "line"):
            means = {name: _mean(values) for name, values in self.sums.items()}
            now, steps = time.monotonic(), done - self._clock_step
            rate = steps * self.images / max(now - self._clock, 1e-9)
            speed = self.watch.per_step((now - self._clock) / steps) if steps else {}
            self._write(done, means | ({"images_per_second": rate} if steps else {}) | speed)
            short = {k: f"{v:.3g}" for k, v in means.items() if "/" not in k} | {"img/s": f"{rate:.3g}"}
            named = {"flop_utilisation": ("MFU", ".1%"), "peak_memory_gb": ("GB", ".3g")}
            short |= {name: f"{speed[key]:{form}}" for key, (name, form) in named.items() if key in speed}
            self.bar.set_postfix(short, refresh=False)
            self._clock, self._clock_step = now, done
        if due:
            self.sums = {}
        self.bar.update(done - self.bar.n)

    def score(self, done: int, scores: dict[str, float]) -> None:
        if scores:
            self._write(done, {f"score/{k}": v for k, v in scores.items()})
            say(f"step {done}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    def image_path(self, done: int) -> Path:
        return self.out / "samples" / f"{done:07d}.png"

    def image(self, done: int, image: Tensor) -> None:
        """Writes uint8 (3, H, W)."""
        path = self.image_path(done)
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, format="PNG")
        if self.board:
            self.board.add_image("samples", image, done)
        if self.wandb:
            import wandb

            self.wandb.log({"samples": wandb.Image(str(path))}, step=done)
        say(f"step {done}: {path}")

    def _write(self, done: int, figures: dict[str, float]) -> None:
        rounded = {k: round(v, 6) if math.isfinite(v) else None for k, v in figures.items()}
        self.file.write(json.dumps({"step": done} | rounded, allow_nan=False) + "\n")
        self.file.flush()
        if self.board:
            for name, value in figures.items():
                if math.isfinite(value):
                    self.board.add_scalar(name, value, done)
        if self.wandb:
            self.wandb.log({name: value for name, value in figures.items() if math.isfinite(value)}, step=done)


class NoLogs(RunLogs):
    """What the other processes of a run have in its place: figures are remembered, nothing is written."""

    def __enter__(self) -> RunLogs:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, done: int) -> None:
        if done % self.every == 0 or done == self.iterations:
            self.sums = {}

    def score(self, done: int, scores: dict[str, float]) -> None:
        pass

    def image(self, done: int, image: Tensor) -> None:
        pass


def wandb_id(out: Path) -> str:
    """The same for a run whenever it goes on; kept beside its log."""
    path = out / "wandb-id.txt"
    if not path.is_file():
        atomic_text(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _step(line: str) -> float:
    """The step of a line of the log; infinity for a line that a crash cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
