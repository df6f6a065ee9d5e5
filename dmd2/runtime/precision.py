"""Chooses bf16 or fp32 by a measurement: CPUs differ a hundredfold in how fast they are in bf16.

With AVX512-BF16 or AMX a CPU is twice as fast in bf16 as in fp32; with AVX2 only it takes ten to forty times as
long, as every operation is emulated. What is measured follows `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA`, which
flags of the CPU would not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from dmd2.runtime.errors import UserError
from dmd2.runtime.files import read_object

Precision = Literal["auto", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = 3
MOST_ROUNDS = 20
PLAIN = 8.0  # times as slow: other work on the machine alone does not do that in each of three rounds
SIDE = 384  # of the matrices
CHANNELS, PIXELS = 64, 32  # of the convolution
LARGE = 4096  # side of the matrices that a GPU without an entry is measured by
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""dense bf16 TFLOP/s with fp32 sums, by makers' data sheets; the longest name that a device's contains counts"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Throughput:
    """GFLOP/s of a convolution followed by a matrix product, in each type."""

    bf16: float
    fp32: float

    @property
    def fastest(self) -> Literal["bf16", "fp32"]:
        return "bf16" if self.bf16 > self.fp32 else "fp32"

    def __str__(self) -> str:
        return f"bf16 {self.bf16:.3g} GFLOP/s, fp32 {self.fp32:.3g}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations a second that a device has at most in a type, and where that is from."""
    if device.type == "cpu":
        found = measure_cpu()
        return 1e9 * (found.bf16 if dtype == torch.bfloat16 else found.fp32), "a convolution and a product, measured"
    name = torch.cuda.get_device_name(device)
    known = PEAKS.get(max((part for part in PEAKS if part in name), key=len, default=""))
    if known is not None and dtype == torch.bfloat16:
        return 1e12 * known, f"the data sheet's {known} TFLOP/s of {name}"
    a = torch.ones(LARGE, LARGE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * LARGE**3 / best, f"a matrix product, measured on {name}"


@lru_cache(maxsize=1)
def measure_cpu() -> Throughput:
    """Measures this CPU: milliseconds where both are fast, about a second where bf16 is emulated.

    The types take turns and the best round of each counts, so that what else the machine does falls on both. While
    they are close, more rounds are measured: on a busy machine three may not hold an undisturbed one of each.
    """
    work = {name: _work(dtype) for name, dtype in DTYPES.items()}
    best = dict.fromkeys(work, float("inf"))
    with torch.inference_mode():
        for run in work.values():
            run()  # kernels are chosen, memory is taken
        for done in range(MOST_ROUNDS):
            if done >= ROUNDS and max(best.values()) > PLAIN * min(best.values()):
                break
            for name, run in work.items():
                began = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - began)
    gflop = 2e-9 * (SIDE**3 + CHANNELS * CHANNELS * 9 * PIXELS**2)
    return Throughput(*(gflop / max(best[name], 1e-9) for name in ("bf16", "fp32")))


def _work(dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(2))
    x, w = torch.ones(1, CHANNELS, PIXELS, PIXELS, dtype=dtype), torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype)
    return lambda: (a @ b, torch.nn.functional.conv2d(x, w, padding=1))


def fastest(device: torch.device) -> Literal["bf16", "fp32"]:
    """The faster of bf16 and fp32 on `device`; fp16 is left out, because it needs its losses scaled."""
    if device.type == "cpu":
        return measure_cpu().fastest
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32"


def resolve_precision(
    wanted: Precision, device: torch.device, recorded: str | None = None
) -> Literal["bf16", "fp32"]:
    """The precision that a run trains in; logs it.

    Args:
        wanted: by the recipe; "auto" leaves it to the device.
        recorded: what the run began with, if it is continued: it keeps that, or its results would change.
    """
    if wanted != "auto":
        return wanted
    found = fastest(device)
    speed = f" ({measure_cpu()})" if device.type == "cpu" else ""
    if recorded in DTYPES and recorded != found:
        logger.warning("precision: %s, as the run began; on this machine %s is faster%s", recorded, found, speed)
        return "bf16" if recorded == "bf16" else "fp32"
    logger.info("precision: %s%s", found, speed)
    return found


def recorded_precision(run: Path) -> str | None:
    """What the run in this folder computes in; None if there is none, or it does not say."""
    try:
        found = read_object(run / "recipe.json").get("precision")
    except UserError:  # the checkpoint has it, too, and is what a damaged file is measured by
        return None
    return found if isinstance(found, str) and found in DTYPES else None


def training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that forward and backward passes run in; parameters stay fp32."""
    return DTYPES[fastest(device) if precision == "auto" else precision]


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """`training_dtype` for `torch.autocast`; None where none is needed."""
    dtype = training_dtype(precision, device)
    return None if dtype == torch.float32 else dtype
