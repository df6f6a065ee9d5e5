"""`scripts/bench beside`: one process that generates, and two at a time on the same cores, by how threads wait."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TORCH = {"DMD2_COMPILE": "off"}
VARIANTS: dict[str, dict[str, str]] = {
    "as it is": {},
    "torch": TORCH,
    "torch, passive": TORCH | {"OMP_WAIT_POLICY": "passive"},
    "torch, 1000 spins": TORCH | {"GOMP_SPINCOUNT": "1000"},
}
"""as it is: OpenVINO where it is installed, and `GOMP_SPINCOUNT` as dmd2 sets it then"""


def beside(seconds: float, steps: int) -> dict[str, Any]:
    """Images a second, and what two processes lose of what one makes alone."""
    import torch

    rows = {}
    for name, variables in VARIANTS.items():
        alone = _rates(1, variables, seconds, steps)
        both = _rates(2, variables, seconds, steps)
        rows[name] = {"alone": alone, "two": both, "loss": round(1 - sum(both) / alone[0], 3)}
        print(json.dumps({name: rows[name]}), file=sys.stderr)
    machine = platform.processor() or platform.machine()
    return {"machine": machine, "torch": torch.__version__, "steps": steps, "images_per_second": rows}


def _rates(processes: int, variables: dict[str, str], seconds: float, steps: int) -> list[float]:
    command = [sys.executable, __file__, str(seconds), str(steps)]
    children = [
        subprocess.Popen(
            command, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    for child in children:  # all have warmed up
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    return [round(float(child.communicate()[0]), 1) for child in children]


def _generate(seconds: float, steps: int) -> None:
    """A child: says that it is ready, waits, and prints images a second."""
    from dmd2.models.openvino.choice import give_way

    give_way()
    from dmd2.inference.engine import Engine
    from dmd2.weights.manifest import DEFAULT

    mode = str(steps)
    engine = Engine(DEFAULT, "cpu", modes=(mode,), trace=True)
    engine.warm_up((mode,), [engine.manifest.native_size])
    print("ready", flush=True)
    sys.stdin.readline()
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        engine.generate([f"an owl {made}"], [made], mode)
        made += 1
    print(made / (time.perf_counter() - began))


if __name__ == "__main__":
    _generate(float(sys.argv[1]), int(sys.argv[2]))
