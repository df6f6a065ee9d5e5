"""What `test_torchrun` and `test_together` start by torchrun: a list of runs, all by the same two processes."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dmd2.runtime.terminal import hush
from dmd2.training.loop import LoopSettings, train
from dmd2.training.methods.gdd import GddRecipe
from dmd2.training.parallel import sharded
from dmd2.training.parallel.blocks import compile_blocks
from dmd2.training.parallel.group import ALONE, Parallel, Replicated, joined
from dmd2.training.recipes import RECIPES, build_method, resolve
from dmd2.training.run.checkpoints import Checkpoints

CPU = torch.device("cpu")


def run(job: dict[str, Any], group: Parallel = ALONE) -> None:
    """One run; `from` is a run whose newest checkpoint is lost first, or of which all is there with `whole`.

    What is compiled is so without the last part, the making of kernels, which takes minutes.
    """
    out = Path(job["out"])
    if "from" in job and group.leads:
        shutil.copytree(job["from"], out)
        if not job.get("whole"):
            shutil.rmtree(out / "model")
            shutil.rmtree(Checkpoints(out).all()[0])
    group.told(None)
    with patch.dict(RECIPES, TINY):
        recipe = resolve(job.get("recipe", "emoji-dmd2-4step"), job["set"])
    paths = {name: Path(path) for name, path in job["paths"].items()}
    quick = partial(compile_blocks, backend="aot_eager")
    with patch.multiple(sharded, compile_blocks=quick):
        method = build_method(recipe, paths, CPU, group)
    assert train(method, recipe.loop, out, resume=job.get("resume", False), parallel=group)


LOOP = LoopSettings(1, 2, warmup=0, log_every=1, sample_every=1000)
TINY = {
    "tiny-gdd": GddRecipe(
        LOOP, 2e-6, 2e-6, False, sigmas=(), timesteps=(399,), data="emoji", boundary=0.0, r1_every=2, r1_gamma=1.0
    )
}

if __name__ == "__main__":
    with joined("fsdp2", CPU) as shards:
        assert isinstance(shards, Replicated)
        if not shards.leads:
            hush()
        for each in json.loads(sys.argv[1]):
            replicas = Replicated(shards.ranks, CPU, shards.store)
            run(each, shards if each["strategy"] == "fsdp2" else replicas)
