"""What Cog's `/trainings` does: prompts and perhaps images in, a LoRA student of the served weights' teacher out.

The work is done by `dmd2 data` and `dmd2 train` in processes of their own, in one temporary folder. They end with
the request that they belong to: finished, failed, out of time, cancelled, or with a server that was killed; and
nothing of them stays.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmd2.data.prompts import read_prompts
from dmd2.models.family import export_weights
from dmd2.models.locate import locate
from dmd2.models.stable_diffusion.configs import TIMESTEPS, TIMESTEPS_OF
from dmd2.runtime.errors import InvalidInput, UserError, first_error, one_line, pattern, shown
from dmd2.runtime.paths import ROOT
from dmd2.service.cog import leash
from dmd2.service.outbox import Outbox
from dmd2.weights.guard import Guard
from dmd2.weights.manifest import Manifest, read_manifest

RECIPE = "lora-dmd2"
MOST_PROMPTS, MOST_PROMPT_BYTES = 100_000, 50_000_000
MOST_IMAGES, MOST_IMAGE_BYTES = 20_000, 2_000_000_000
DOWNLOAD_SECONDS, KEPT_SECONDS = 600.0, 600.0
GAN = ("gan_generator=5e-3", "gan_critic=1e-2")
"""weights of DMD2's SDXL runs (2405.14867), where there are images to learn from"""
LARGE = 512 * 512
"""pixels from which on memory is short"""
LINE = 2000
"""bytes of a line that is passed on, at most"""

Url = Annotated[
    str,
    Field(
        pattern=pattern(r"^(https://|data:)", "a URL that begins with https:// or data:"),
        max_length=3 * MOST_IMAGE_BYTES,
    ),
]


class TrainingRequest(BaseModel):
    """The inputs of `/trainings`, with their bounds: Cog's server checks none of them without a schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    prompts: Annotated[str, Field(max_length=MOST_PROMPT_BYTES)] = ""
    """one a line"""
    prompts_file: Url | None = None
    images: Url | None = None
    num_inference_steps: Literal[1, 4] = 4
    iterations: Annotated[int, Field(ge=1, le=100_000)] = 1000
    batch_size: Annotated[int, Field(ge=1, le=256)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=0.01)] = 5e-5
    rank: Annotated[int, Field(ge=1, le=256)] = 64
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    minutes: Annotated[int, Field(ge=1, le=7 * 24 * 60)] = 120

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TrainingRequest:
        """
        Raises:
            UserError: a value is out of bounds, or there are neither prompts nor images.
        """
        try:
            request = cls.model_validate({name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            raise UserError(first_error(error)) from None
        if request.prompts.strip() and request.prompts_file:
            raise InvalidInput("prompts_file", "given beside prompts; expected one of the two")
        if not (request.prompts.strip() or request.prompts_file or request.images):
            raise InvalidInput("prompts", "missing; expected prompts, prompts_file or images with captions")
        return request


@cache
def outbox() -> Outbox:
    """Where a student's file lies until Cog has sent it."""
    return Outbox(keep_seconds=KEPT_SECONDS)


def train_student(given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Path:
    """Trains, and returns the student's file, which is deleted after `KEPT_SECONDS`.

    Raises:
        UserError: what is given is wrong, or the training failed or took longer than it may.
        BaseException: whatever ends this call from outside. No process or file of it is left then.
    """
    request, until = TrainingRequest.of(given), time.monotonic()
    until += 60 * request.minutes
    weights = locate(environ=environ).resolve()
    manifest = read_manifest(weights)
    if manifest.teacher is None:
        raise UserError(f"{manifest.name}: these weights hold no teacher to distil; expected DMD2_WEIGHTS with one")
    with tempfile.TemporaryDirectory(prefix="dmd2-training-") as name:
        folder = Path(name)
        inputs = _data(request, weights, folder, until) | {"init": weights, "out": folder / "run"}
        options = [part for option, path in inputs.items() for part in (f"--{option}", str(path))]
        changes = [part for setting in _settings(request, manifest) for part in ("--set", setting)]
        _run(["train", RECIPE, *options, *changes], folder, until)
        student = folder / "student.safetensors"
        export_weights(folder / "run" / "model", student, request.num_inference_steps)
        return outbox().write(student.read_bytes(), "student", "safetensors")


def _data(request: TrainingRequest, weights: Path, folder: Path, until: float) -> dict[str, Path]:
    """Option of `dmd2 train` → what was made for it."""
    made = {}
    if request.images:
        images = _download(request.images, folder / "images.zip", "images", MOST_IMAGE_BYTES)
        _check_images(images)
        _run(["data", "latents", str(weights), str(images), str(folder / "latents")], folder, until)
        made["data"] = folder / "latents"
    if request.prompts.strip() or request.prompts_file:
        texts = _prompts(request, folder)
        (folder / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        _run(["data", "prompts", str(weights), str(folder / "prompts.txt"), str(folder / "prompts")], folder, until)
        made["prompts" if made else "data"] = folder / "prompts"
    return made


def _prompts(request: TrainingRequest, folder: Path) -> list[str]:
    if request.prompts_file:
        path = _download(request.prompts_file, folder / "given", "prompts_file", MOST_PROMPT_BYTES)
        path = path.rename(path.with_suffix(_suffix(path)))
    else:
        path = folder / "given.txt"
        path.write_text(request.prompts, encoding="utf-8", errors="replace")
    try:
        texts = [" ".join(text.split()) for text in read_prompts(path)]
    except UserError as error:  # not where it is for a moment
        raise UserError(str(error).replace(f"{path}: ", "").replace(str(path), "")) from None
    if len(texts) > MOST_PROMPTS:
        raise InvalidInput("prompts", f"{len(texts)} prompts; expected {MOST_PROMPTS} at most")
    return texts


def _suffix(path: Path) -> str:
    """By the content: a URL need not end in one."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"PAR1"):
        return ".parquet"
    if start.startswith((b"\x80", b"(l", b"]")):
        return ".pkl"
    return ".jsonl" if start.startswith((b"{", b'"')) else ".txt"


def _download(url: str, path: Path, field: str, most_bytes: int) -> Path:
    with path.open("wb") as file:
        Guard(most_bytes, DOWNLOAD_SECONDS).fetch(url, file, field)
    return path


def _check_images(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            count = len(archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        raise InvalidInput("images", f"no zip ({shown(error)}); expected images and their captions in one") from None
    if count > 2 * MOST_IMAGES:
        raise InvalidInput("images", f"{count} files; expected at most {MOST_IMAGES} images, each with its caption")


def _settings(request: TrainingRequest, manifest: Manifest) -> list[str]:
    """What differs from the recipe."""
    assert manifest.teacher is not None
    known = manifest.students.get(request.num_inference_steps)
    published = TIMESTEPS_OF.get(manifest.family, TIMESTEPS)[request.num_inference_steps]
    timesteps = known.timesteps if known and known.timesteps else published
    return [
        f"iterations={request.iterations}",
        f"checkpoint_every={request.iterations}",
        f"sample_every={request.iterations}",
        *_batch(request.batch_size, manifest.native_size),
        f"seed={request.seed}",
        f"lr={request.learning_rate!r}",
        f"lr_critic={request.learning_rate!r}",
        f"rank={request.rank}",
        f"timesteps={timesteps}",
        f"guidance_scale={manifest.teacher.guidance_scale!r}",
        *(GAN if request.images else ()),
    ]


def _batch(images: int, size: tuple[int, int]) -> list[str]:
    """Large images one at a time, and their activations computed again, so that one card is enough."""
    if size[0] * size[1] < LARGE:
        return [f"batch_size={images}"]
    return ["batch_size=1", f"grad_accum_steps={images}", "checkpointing=true"]


def _run(arguments: Sequence[str], folder: Path, until: float) -> None:
    """One `dmd2 …`, its output passed on line by line.

    Raises:
        UserError: it failed, with its own last line; or it is not done in time.
    """
    command = [sys.executable, leash.__file__, str(folder), sys.executable, "-m", "dmd2.cli", *arguments]
    # Temporary files, such as torch's, go with the folder.
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    assert process.stdout is not None and process.stdin is not None
    last: deque[str] = deque(maxlen=1)
    try:
        _pass_on(process, last, until)
        if process.wait() != 0:
            told = last[0] if last else f"exit status {process.returncode}"
            raise UserError(told.removeprefix("dmd2: ").replace(f"{folder}/", ""))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
            process.wait()
        process.stdin.close()
        process.stdout.close()


def _pass_on(process: subprocess.Popen[bytes], last: deque[str], until: float) -> None:
    """Waits a moment at a time: only between two moments does a cancellation reach this thread."""
    assert process.stdout is not None
    rest = b""
    while True:
        if time.monotonic() > until:
            raise InvalidInput("minutes", "the training is not done in time; expected more minutes or less to do")
        if not select.select([process.stdout], [], [], 0.2)[0]:
            continue
        block = os.read(process.stdout.fileno(), 65536)
        *lines, rest = (rest + block).replace(b"\r", b"\n").split(b"\n")
        rest = rest[-LINE:]
        for line in [*lines, *([] if block else [rest])]:
            if text := one_line(line[:LINE].decode(errors="replace")).strip():
                print(text, flush=True)
                last.append(text)
        if not block:
            return
