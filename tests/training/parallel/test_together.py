"""What goes together with shards: adapters, checkpointing, compiled blocks, other optimizers, GDD."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.parallel.runs import SETTINGS, Paths, finish, inputs_of, largest_difference, log, sets, torchrun
from tests.training.parallel.worker import run
from tests.training.test_loop import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paths(weights: Path, emoji_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return inputs_of(weights, emoji_zip, tmp_path_factory.mktemp("nothing"))


SHORT = {"iterations": 3, "checkpoint_every": 2, "batch_size": 2, "log_every": 1, "sample_every": 1000}
LORA: dict[str, Any] = {"adapter": "lora", "networks": "adapters", "rank": 4, "checkpointing": "true"}
GAN = {"gan_generator": 0.1, "gan_critic": 0.1}
OURS = {k: v for k, v in SETTINGS.items() if k in ("timesteps", "optimizer", "lr", "lr_critic", "warmup", "compile")}
DMD2 = SHORT | OURS | {"generator_every": 2, "precision": "fp32"}
TOGETHER: dict[str, dict[str, Any]] = {
    "lora-beside-a-fake-score-bf16": DMD2 | LORA | {"networks": "separate", "precision": "bf16"},
    "full-checkpointing-bf16": DMD2 | GAN | {"precision": "bf16", "checkpointing": "true"},
    "lora-compiled": DMD2 | LORA | {"compile": "true", "gan_generator": 0, "gan_critic": 0},
    "muon": DMD2 | {"optimizer": "muon"},
    "tiny-gdd": SHORT | {"precision": "fp32"},
}


@pytest.fixture(scope="module")
def together(paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of these by two processes with shards, by one alone, and the former's checkpoint gone on with by one.

    Alone none is compiled.
    """
    folder = tmp_path_factory.mktemp("together")
    jobs = []
    for name, values in TOGETHER.items():
        recipe = {"recipe": name} if name.startswith("tiny") else {}
        jobs.append({"out": str(folder / name), "paths": paths, "set": sets(values), **recipe})
    finish(torchrun("-m", "tests.training.parallel.worker", json.dumps([j | {"strategy": "fsdp2"} for j in jobs])))
    for each in jobs:
        alone = each | {"set": [*each["set"], "compile=false"]}
        run(alone | {"out": each["out"] + "-one"})
        run(alone | {"out": each["out"] + "-resumed", "from": each["out"], "resume": True})
    return folder


@pytest.mark.parametrize("name", list(TOGETHER))
def test_what_goes_together_with_shards_is_what_one_process_does(name: str, together: Path) -> None:
    half = "bf16" in name
    for other in (f"{name}-one", f"{name}-resumed"):
        one, two = log(together / other), log(together / name)
        assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2, 3]
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            most = 0.05 if half else 1e-5
            assert all(abs(a[k] - b[k]) <= most * max(1, abs(a[k])) for k in a if "norm" not in k), (a, b)
            assert all(b[k] == 0 for k in b if k.endswith("/skipped"))
        a, b = (checkpoint(together / run)["tensors"] for run in (other, name))
        assert largest_difference(a, b) <= 1e-5 or half
        # The weights have moved by little; the averages of their gradients say that it was the same way.
        moments = [k for k in a if k.endswith(("/exp_avg", "/momentum", "/mean"))]
        size = torch.stack([a[k].norm() for k in moments]).norm()
        apart = torch.stack([(a[k] - b[k]).norm() for k in moments]).norm()
        assert len(moments) > 20 and size > 0 and apart <= (0.2 if half else 1e-3) * size
