"""Noise-image pairs for DMD's regression: what a teacher's deterministic sampler makes of each noise.

There is no S_churn here: with noise added on the way, an image would not follow from the noise it is paired with.

A folder holds `pairs.json` and shards of equal size. Of the noise only seeds are kept: `seeded_noise` makes it anew.
Images are kept in fp16: rounding moves a pixel by less than 1/2000 of the range, where uint8 would move it by 1/500
and clip what the teacher generated beyond the range; and any x0 fits, latents too.
"""

from __future__ import annotations

import hashlib
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.diffusion.noise import seeded_noise
from dmd2.models.family import SOLVERS, TEACHERS, Family, open_family
from dmd2.runtime.errors import DataError, InvalidInput, first_error, shown
from dmd2.runtime.files import atomic_text
from dmd2.runtime.locks import locked
from dmd2.runtime.tensors import save_tensors
from dmd2.runtime.terminal import Terminal

PAIRS_FILE = "pairs.json"
STALE = re.compile(r"\.pairs(\.json|-\d{5,}\.safetensors)\.[0-9a-f]{8}\.tmp")
FIRST_SEED = 2**31
"""PyTorch's CPU generator uses 32 bits of a seed: the upper half is for pairs, so that a student that is judged by
seeds from 0 on is never judged by noise that it was shown."""
MOST = 2**31
SHARD = 1000
"""pairs in a shard: what a stop costs at most"""


class PairsConfig(BaseModel):
    """`pairs.json`: what the pairs are and who made them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    teacher: str
    """sha256 of its weights"""
    count: int = Field(ge=1, le=MOST)
    steps: int = Field(ge=1, le=1000)
    """of the solver"""
    solver: Literal["teacher", "pndm", "euler-trailing"] = "teacher"
    """see `dmd2.models.family.SOLVERS`; EDM's own is Heun's method (Karras et al. 2022, algorithm 1)"""
    shape: tuple[int, int, int]
    """channels, height, width"""
    classes: int = Field(ge=0)
    prompts: list[str] = []
    """of a text-to-image teacher, which takes them in turn; `labels` count them"""
    guidance_scale: float = 1.0
    shard: int = Field(ge=1)
    """pairs in each file but the last"""
    first_seed: int = Field(ge=0, lt=2**32)

    def shards(self) -> list[tuple[str, range]]:
        """Each file's name and its pairs."""
        starts = range(0, self.count, self.shard)
        return [(f"pairs-{k:05d}.safetensors", self.rows(k, start)) for k, start in enumerate(starts)]

    def rows(self, k: int, start: int) -> range:
        return range(start, min(start + self.shard, self.count))

    def seeds(self, pairs: range) -> Tensor:
        """int64 (n,)"""
        return torch.arange(pairs.start, pairs.stop) + self.first_seed

    def labels(self, pairs: range) -> Tensor:
        """int64 (n,): all classes (or prompts) alike, in turn; −1 where there are none."""
        index = torch.arange(pairs.start, pairs.stop)
        kinds = self.classes or len(self.prompts)
        return index % kinds if kinds else torch.full_like(index, -1)

    def condition(self, family: Family, labels: Tensor) -> Cond:
        return family.condition([self.prompts[i] for i in labels.tolist()] if self.prompts else labels)


def make_pairs(
    weights: Path,
    out: Path,
    count: int,
    steps: int,
    batch: int,
    device: torch.device | str,
    *,
    prompts: Sequence[str] = (),
    shard: int = SHARD,
    compile: bool = False,
    solver: str = TEACHERS,
    guidance_scale: float | None = None,
) -> None:
    """Makes the shards that `out` lacks, with a progress bar.

    Each shard appears whole or not at all, so the work may be stopped at any time, and goes on where it stopped.
    With the same batch size on the same machine the files are the same to the bit, stopped or not.

    Args:
        weights: folder of a teacher, of any family.
        out: folder, new or begun with the same arguments.
        count: how many pairs.
        steps: of the sampler.
        batch: how many at once. It changes nothing but rounding.
        device: where the teacher runs.
        prompts: what a text-to-image teacher is asked for, in turn.
        shard: pairs in a file.
        compile: compile the network first.
        solver: one of `SOLVERS`.
        guidance_scale: of a text-to-image teacher; None for that of its own samples.

    Raises:
        UserError: the weights are no teacher; `out` holds other pairs; a shard in it is broken.
    """
    if not 1 <= count <= MOST:
        raise InvalidInput("count", f"expected 1 to {MOST}", count)
    if not 2 <= steps <= 1000:  # of a single level, there is only the lowest
        raise InvalidInput("steps", "expected 2 to 1000", steps)
    if batch < 1:
        raise InvalidInput("batch", "expected at least 1", batch)
    if solver not in SOLVERS:
        raise InvalidInput("solver", f"expected {', '.join(SOLVERS)}", shown(solver, 100))
    if solver == "pndm" and steps > 500:  # its levels are one timestep above those of equal steps
        raise InvalidInput("steps", "expected 2 to 500 with solver pndm", steps)
    if guidance_scale is not None and not 0 <= guidance_scale <= 100:
        raise InvalidInput("guidance", "expected 0 to 100", guidance_scale)
    family = open_family(weights, torch.device(device), "fp32")
    given: dict[str, Any] = {"solver": solver, "guidance_scale": guidance_scale}
    make_pairs_of(family, out, count, steps, batch, prompts=prompts, shard=shard, compile=compile, **given)


def make_pairs_of(
    family: Family,
    out: Path,
    count: int,
    steps: int,
    batch: int,
    *,
    prompts: Sequence[str] = (),
    shard: int = SHARD,
    compile: bool = False,
    solver: str = TEACHERS,
    guidance_scale: float | None = None,
) -> None:
    """As `make_pairs`, of a teacher that is open already."""
    if bool(prompts) == family.takes_classes:
        expected = "expected none for a teacher of classes" if prompts else "missing; this teacher takes prompts"
        raise InvalidInput("prompts", expected)
    if guidance_scale is not None and family.takes_classes:
        raise InvalidInput("guidance", "expected none for a teacher of classes", guidance_scale)
    config = PairsConfig(
        teacher=family.sha256,
        count=count,
        steps=steps,
        solver=solver,  # type: ignore[arg-type]
        shape=family.shape,
        classes=family.classes,
        prompts=list(prompts),
        guidance_scale=family.guidance_scale if guidance_scale is None else guidance_scale,
        shard=shard,
        first_seed=FIRST_SEED,
    )
    _begin(out, config)
    with locked(out, STALE):
        _make_missing(family, family.denoiser(family.teacher_network, compile), out, config, batch)


def _make_missing(family: Family, teacher: Denoiser, out: Path, config: PairsConfig, batch: int) -> None:
    missing = [(name, pairs) for name, pairs in config.shards() if not _is_there(out / name, config, pairs)]
    terminal, done = Terminal(sys.stderr), config.count - sum(len(pairs) for _, pairs in missing)
    interval = 0.5 if terminal.isatty() else 30
    with tqdm(total=config.count, initial=done, unit="pair", mininterval=interval, file=terminal) as bar:
        for name, pairs in missing:
            images = []
            for start in range(pairs.start, pairs.stop, batch):
                part = range(start, min(start + batch, pairs.stop))
                images.append(_generate(family, teacher, config, part).half().cpu())
                bar.update(len(part))
            tensors = {"images": torch.cat(images), "labels": config.labels(pairs), "seeds": config.seeds(pairs)}
            save_tensors(tensors, out / name)


def _is_there(path: Path, config: PairsConfig, pairs: range) -> bool:
    if path.exists():
        _load(path, config, pairs)
    return path.exists()


@torch.no_grad()
def _generate(family: Family, teacher: Denoiser, config: PairsConfig, pairs: range) -> Tensor:
    noise = seeded_noise(config.seeds(pairs).tolist(), config.shape, teacher.sigmas.device)
    cond = config.condition(family, config.labels(pairs))
    own = () if config.solver == TEACHERS else (config.solver,)
    return family.sample(teacher, cond, noise, config.steps, config.guidance_scale, *own)


def _begin(out: Path, config: PairsConfig) -> None:
    """Writes `pairs.json`, or compares with the one that is there."""
    if (out / PAIRS_FILE).exists():
        there = _read_config(out)
        for field in PairsConfig.model_fields:
            old, new = getattr(there, field), getattr(config, field)
            if old != new:
                raise DataError(f"holds other pairs, whose {field} is {old}, not {new}; name another folder", out)
        return
    # Hidden: what a process that was killed while writing the first file may have left.
    if out.exists() and not (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir())):
        raise DataError("exists already and holds no pairs; expected a new or empty folder", out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot be made a folder ({error.strerror})", out) from error
    atomic_text(out / PAIRS_FILE, config.model_dump_json(indent=2) + "\n")


def _read_config(folder: Path) -> PairsConfig:
    path = folder / PAIRS_FILE
    if not path.is_file():
        raise DataError(f"holds no {PAIRS_FILE}; `dmd2 pairs` makes such a folder", folder)
    try:
        return PairsConfig.model_validate_json(path.read_bytes().removeprefix(BOM_UTF8))
    except ValidationError as error:
        raise DataError(f"{first_error(error)}", path) from None


def _load(path: Path, config: PairsConfig, pairs: range) -> dict[str, Tensor]:
    """A shard, mapped into memory: pages are read when they are looked at."""
    if not path.is_file():
        raise DataError("missing; `dmd2 pairs` with the same arguments makes what lacks", path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DataError(f"truncated or damaged ({error}); delete it and run `dmd2 pairs` again", path) from None
    expected = {"images": (len(pairs), *config.shape), "labels": (len(pairs),), "seeds": (len(pairs),)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise DataError(f"holds {found}; expected {expected}", path)
    if not torch.equal(tensors["seeds"], config.seeds(pairs)):
        raise DataError(f"holds other seeds than {config.first_seed + pairs.start} and on", path)
    return tensors


@dataclass(frozen=True)
class RegressionPairs:
    """Noise, and what the teacher's deterministic sampler made of it (DMD sec. 3.3)."""

    noise: Tensor
    """(B, C, H, W) unit noise, fp32"""
    target: Tensor
    """(B, C, H, W) x0, fp32"""
    cond: Cond


class Pairs:
    """A folder of pairs to train on.

    Args:
        folder: made by `dmd2 pairs`, all of it.
        family: the teacher that is distilled.

    Raises:
        UserError: the folder is not whole, or another teacher made it.
    """

    def __init__(self, folder: Path, family: Family) -> None:
        self.config = config = _read_config(folder)
        self._family = family
        if config.teacher != family.sha256:
            made = f"made by another teacher, with sha256 {config.teacher}"
            raise DataError(f"{made}; {family.name} has {family.sha256}", folder)
        shards = [_load(folder / name, config, pairs) for name, pairs in config.shards()]
        self._images = [shard["images"] for shard in shards]
        self._seeds = torch.cat([shard["seeds"] for shard in shards])
        self._labels = torch.cat([shard["labels"] for shard in shards])

    def __len__(self) -> int:
        return self.config.count

    def batch(
        self, n: int, *, seed: int, step: int, rows: slice = slice(None), device: torch.device | str = "cpu"
    ) -> RegressionPairs:
        """Of `n` pairs, drawn uniformly, those in `rows`; always the same for the same arguments, on `device`."""
        digest = hashlib.sha256(f"regression {seed} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        chosen = torch.randint(len(self), (n,), generator=generator)[rows]
        places = [divmod(i, self.config.shard) for i in chosen.tolist()]
        images = torch.stack([self._images[shard][row] for shard, row in places])
        noise = seeded_noise(self._seeds[chosen].tolist(), self.config.shape, device)
        cond = self.config.condition(self._family, self._labels[chosen])
        return RegressionPairs(noise, images.to(device).float(), cond)
