"""Noise-image pairs for DMD's regression: what a teacher's deterministic sampler makes of each noise.

There is no S_churn here: with noise added on the way, an image would not follow from the noise it is paired with.

A folder is a set of rows (`dmd2.data.shards`). Of the noise only seeds are kept: `seeded_noise` makes it anew.
Images are kept in fp16: rounding moves a pixel by less than 1/2000 of the range, where uint8 would move it by 1/500
and clip what the teacher generated beyond the range; and any x0 fits, latents too. Beside images of texts their
embeddings may be kept, as `dmd2 data prompts` keeps them: what is trained on them then encodes no text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dmd2.data.embeddings import embedding_columns
from dmd2.data.prompts import MOST_BYTES
from dmd2.data.shards import MOST_ROWS, Column, Index, Part, Rows, Shards, make_shards
from dmd2.diffusion.denoiser import Cond, Denoiser
from dmd2.diffusion.noise import seeded_noise
from dmd2.models.family import SOLVERS, TEACHERS, Family, open_family
from dmd2.runtime.errors import DataError, InvalidInput, first_error, shown
from dmd2.runtime.files import atomic_bytes, read_bounded
from dmd2.runtime.precision import Precision, resolve_precision

PROMPTS_FILE = "prompts.json"
"""of a text-to-image teacher's pairs: its prompts in turn; `labels` count them"""
FIRST_SEED = 2**31
"""PyTorch's CPU generator uses 32 bits of a seed: the upper half is for pairs, so that a student that is judged by
seeds from 0 on is never judged by noise that it was shown."""
MOST = MOST_ROWS
AT_ONCE = 100 * 3 * 32 * 32
"""numbers of x0 in a batch unless another is asked for: 100 images of CIFAR-10, 18 of SD 1.5, 4 of SDXL"""
SHARD = 1000
"""pairs in a shard: what a stop costs at most"""


class Made(BaseModel):
    """What the index says of how pairs were made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    teacher: str
    """sha256 of its weights"""
    steps: int = Field(ge=1, le=1000)
    """of the solver"""
    solver: str
    """see `dmd2.models.family.SOLVERS`; EDM's own is Heun's method (Karras et al. 2022, algorithm 1)"""
    classes: int = Field(ge=0)
    prompts: str = ""
    """sha256 of `PROMPTS_FILE`"""
    guidance_scale: float = 1.0
    precision: str = "fp32"
    """that the teacher ran in"""
    first_seed: int = Field(ge=0, lt=2**32)

    def seeds(self, pairs: range) -> Tensor:
        """int64 (n,)"""
        return torch.arange(pairs.start, pairs.stop) + self.first_seed


def _condition(family: Family, prompts: Sequence[str], labels: Tensor) -> Cond:
    return family.condition([prompts[i] for i in labels.tolist()] if prompts else labels)


def make_pairs(
    weights: Path,
    out: Path,
    count: int,
    steps: int,
    batch: int | None,
    device: torch.device | str,
    *,
    prompts: Sequence[str] = (),
    shard: int = SHARD,
    compile: bool = False,
    solver: str = TEACHERS,
    guidance_scale: float | None = None,
    precision: Precision = "fp32",
    embeddings: bool = False,
    part: Part | None = None,
) -> bool:
    """Makes the shards of `part` that `out` lacks, and says whether all are there now. See `make_shards`.

    With the same batch size on the same machine the files are the same to the bit, stopped or not.

    Args:
        weights: folder of a teacher, of any family.
        out: folder, new or begun with the same arguments.
        count: how many pairs.
        steps: of the sampler.
        batch: how many at once; None for `AT_ONCE`. It changes nothing but rounding.
        device: where the teacher runs.
        prompts: what a text-to-image teacher is asked for, in turn.
        shard: pairs in a file.
        compile: compile the network first.
        solver: one of `SOLVERS`.
        guidance_scale: of a text-to-image teacher; None for that of its own samples.
        precision: that the teacher's network runs in; "auto" is what the device is fastest in.
        embeddings: whether to keep those of the prompts.

    Raises:
        UserError: the weights are no teacher; `out` holds something else.
    """
    if not 1 <= count <= MOST:
        raise InvalidInput("count", f"expected 1 to {MOST}", count)
    if not 2 <= steps <= 1000:  # of a single level, there is only the lowest
        raise InvalidInput("steps", "expected 2 to 1000", steps)
    if batch is not None and batch < 1:
        raise InvalidInput("batch", "expected at least 1", batch)
    if solver not in SOLVERS:
        raise InvalidInput("solver", f"expected {', '.join(SOLVERS)}", shown(solver, 100))
    if solver == "pndm" and steps > 500:  # its levels are one timestep above those of equal steps
        raise InvalidInput("steps", "expected 2 to 500 with solver pndm", steps)
    if guidance_scale is not None and not 0 <= guidance_scale <= 100:
        raise InvalidInput("guidance", "expected 0 to 100", guidance_scale)
    settled = resolve_precision(precision, torch.device(device))
    family = open_family(weights, torch.device(device), settled)
    given: dict[str, Any] = {"solver": solver, "guidance_scale": guidance_scale, "part": part}
    given |= {"precision": settled, "embeddings": embeddings}
    return make_pairs_of(family, out, count, steps, batch, prompts=prompts, shard=shard, compile=compile, **given)


def make_pairs_of(
    family: Family,
    out: Path,
    count: int,
    steps: int,
    batch: int | None,
    *,
    prompts: Sequence[str] = (),
    shard: int = SHARD,
    compile: bool = False,
    solver: str = TEACHERS,
    guidance_scale: float | None = None,
    precision: str = "fp32",
    embeddings: bool = False,
    part: Part | None = None,
) -> bool:
    """As `make_pairs`, of a teacher that is open already, in that precision."""
    if bool(prompts) == family.takes_classes:
        expected = "expected none for a teacher of classes" if prompts else "missing; this teacher takes prompts"
        raise InvalidInput("prompts", expected)
    if guidance_scale is not None and family.takes_classes:
        raise InvalidInput("guidance", "expected none for a teacher of classes", guidance_scale)
    listed = json.dumps(list(prompts), ensure_ascii=False).encode() if prompts else b""
    made = Made(
        teacher=family.sha256,
        steps=steps,
        solver=solver,
        classes=family.classes,
        prompts=hashlib.sha256(listed).hexdigest() if prompts else "",
        guidance_scale=float(family.guidance_scale if guidance_scale is None else guidance_scale),
        precision=precision,
        first_seed=FIRST_SEED,
    )
    number = Column(dtype="int64", shape=[])
    columns = {"images": Column(dtype="float16", shape=list(family.shape)), "labels": number, "seeds": number}
    if embeddings and prompts:
        for name, value in embedding_columns(family.condition([""])).items():
            columns[name] = Column(dtype="float16", shape=list(value.shape[1:]))
    index = Index(kind="pairs", count=count, shard=shard, columns=columns, made=made.model_dump())
    teacher, kinds = family.denoiser(family.teacher_network, compile), family.classes or len(prompts)

    def make(pairs: range) -> Rows:
        rows = torch.arange(pairs.start, pairs.stop)
        labels = rows % kinds if kinds else torch.full_like(rows, -1)  # all classes (or prompts) alike, in turn
        cond = _condition(family, prompts, labels)
        images = _generate(family, teacher, made, made.seeds(pairs), cond)
        texts = embedding_columns(cond) if embeddings and prompts else {}
        return {"images": images.half(), "labels": labels, "seeds": made.seeds(pairs), **texts}

    whole = make_shards(out, index, make, batch or max(1, AT_ONCE // math.prod(family.shape)), part=part)
    if prompts and not (out / PROMPTS_FILE).is_file():  # the index has its sum; each part would write the same
        atomic_bytes(out / PROMPTS_FILE, listed)
    return whole


@torch.no_grad()
def _generate(family: Family, teacher: Denoiser, made: Made, seeds: Tensor, cond: Cond) -> Tensor:
    noise = seeded_noise(seeds.tolist(), family.shape, teacher.sigmas.device)
    own = () if made.solver == TEACHERS else (made.solver,)
    return family.sample(teacher, cond, noise, made.steps, made.guidance_scale, *own)


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
        folder: made by `dmd2 data pairs`, all of it.
        family: the teacher that is distilled.

    Raises:
        UserError: the folder is not whole, or another teacher made it.
    """

    def __init__(self, folder: Path, family: Family) -> None:
        self._shards, self._family = Shards(folder, "pairs"), family
        try:
            made = Made.model_validate(self._shards.index.made)
        except ValidationError as error:
            raise DataError(f"made: {first_error(error)}", folder) from None
        if made.teacher != family.sha256:
            told = f"made by another teacher, with sha256 {shown(made.teacher, 64)}"
            raise DataError(f"{told}; {family.name} has {family.sha256}", folder)
        images = self._shards.index.columns.get("images")
        if images is None or images.shape != list(family.shape):
            raise DataError(f"holds no images of {list(family.shape)}, as {family.name} makes them", folder)
        self.made, self._prompts = made, _prompts(folder, made.prompts) if made.prompts else []

    def __len__(self) -> int:
        return len(self._shards)

    def batch(
        self, n: int, *, seed: int, step: int, rows: slice = slice(None), device: torch.device | str = "cpu"
    ) -> RegressionPairs:
        """Of `n` pairs, drawn uniformly, those in `rows`; always the same for the same arguments, on `device`."""
        digest = hashlib.sha256(f"regression {seed} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        chosen = torch.randint(len(self), (n,), generator=generator)[rows]
        found = self._shards.rows(chosen)
        noise = seeded_noise(found["seeds"].tolist(), self._family.shape, device)
        images, labels, _ = (found.pop(name) for name in ("images", "labels", "seeds"))
        embedded = bool(self._prompts and found)  # what is left are its texts'
        cond = self._family.embedded(found) if embedded else _condition(self._family, self._prompts, labels)
        return RegressionPairs(noise, images.to(device).float(), cond)


def _prompts(folder: Path, checksum: str) -> list[str]:
    path = folder / PROMPTS_FILE
    listed = read_bounded(path, MOST_BYTES, shown(path, 500))
    if hashlib.sha256(listed).hexdigest() != checksum:
        raise DataError("is not what the pairs were made of; delete it and run `dmd2 data pairs` again", path)
    return [str(prompt) for prompt in json.loads(listed)]
