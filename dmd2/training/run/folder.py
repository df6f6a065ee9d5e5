"""The folder of a run: one process at a time, checked before the first step, without what killed ones left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.locks import LOCK, locked
from dmd2.training.run.checkpoints import Checkpoints

EXPORTS = ("model", "fake_score", "classifier.safetensors")
"""what `Method.export` may write"""

STALE = re.compile(
    r"\.(checkpoint\.pt|recipe\.json|log\.jsonl|classifier\.safetensors|\d{7,}\.png)\.[0-9a-f]{8}\.tmp"
)


def check_out(out: Path, resume: bool) -> None:
    """What can be known of `out` before anything is loaded.

    Raises:
        UserError: there is nothing to resume; there is something, and `resume` is off; or it is no place for a run.
    """
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise InvalidInput("out", f"{folder} is a file; expected a folder", out)
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidInput("out", f"{nearest} cannot be written to", out)
    there = Checkpoints(out).exist()
    if resume and not there:
        raise InvalidInput("out", "holds no checkpoint to resume from; without `resume`, a run begins there", out)
    if there and not resume:
        raise InvalidInput("out", "holds a run already; add `resume` to continue it, or name another folder", out)
    for path in (out / name for name in EXPORTS):
        if path.exists() and path.is_dir() == bool(path.suffix):
            raise UserError(f"{path}: in the way of what the run is going to write there; move it")
        if not resume and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
            raise InvalidInput("out", f"holds {path.name} already, of no run that is there; name another folder", out)


@contextmanager
def open_run(out: Path, resume: bool) -> Iterator[None]:
    """`out`, made if need be, checked, locked against other trainers, and freed of what killed ones left half done.

    Where nothing came of it, and `out` was not there before, it goes again.

    Raises:
        UserError: see `check_out` and `locked`.
    """
    check_out(out, resume)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    with locked(out, STALE):
        try:
            check_out(out, resume)  # another trainer may have written there until now
            yield
        except BaseException:
            # The lock is ours: whoever waits for it is refused.
            if new and out.is_dir() and [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                for folder in new:
                    if any(folder.iterdir()):
                        break
                    folder.rmdir()
            raise
