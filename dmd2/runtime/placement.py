"""Decides an engine's device, precision, offload and compilation, by the memory there is."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dmd2.runtime import precision
from dmd2.runtime.compiled import Compiler, cache_path, fuse_projections, has_fp8, quantize_linears, restore_kernels
from dmd2.runtime.errors import UserError
from dmd2.runtime.loading import parameters_in
from dmd2.runtime.offload import LARGE_MODEL_PARAMS, MODES, Offloader, Plan, free_memory, host_memory, plan
from dmd2.runtime.paths import cache_folder

EVERYTHING = Plan("full")
DTYPES = {"fp16": torch.float16} | precision.DTYPES
SHARED = ("text_encoder", "text_encoder_2", "vae")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """What was decided for one engine. By default nothing is offloaded or compiled."""

    plan: Plan = EVERYTHING
    offloader: Offloader | None = None
    """if not everything fits"""
    compiler: Compiler | None = None
    """on a GPU, if everything fits"""
    go_fast: bool = False
    """8-bit floats"""
    kernels: Path | None = None
    """where compiled ones are kept"""

    def host(self, device: torch.device) -> torch.device:
        """The device that weights are loaded to."""
        return device if self.offloader is None else torch.device("cpu")

    @torch.inference_mode(False)  # or what is made here could not follow weights that LoRAs change
    def prepare_module(self, name: str, network: nn.Module) -> None:
        """Prepares a network that was loaded to `host`: fused or 8-bit layers, offload, as decided."""
        if name.startswith("unet") and self.compiler is not None:
            fuse_projections(network)
        if name.startswith("unet") and self.go_fast:
            logger.info("%s: %d layers in 8-bit floats", name, quantize_linears(network))
        if self.offloader is not None:
            self.offloader.add(name, network)


def count_parameters(folder: Path, subfolders: Sequence[str]) -> dict[str, int]:
    """The number of parameters of each network that is in a folder of weights."""
    files = {name: sorted((folder / name).glob("*.safetensors")) for name in (*SHARED, *subfolders)}
    # The same network in half precision counts once.
    files = {name: [p for p in paths if ".fp16" not in p.name] or paths for name, paths in files.items()}
    return {name: parameters_in(paths) for name, paths in files.items() if paths}


def default_dtype(
    device: torch.device, parameters: Mapping[str, int], environ: Mapping[str, str] = os.environ
) -> torch.dtype:
    """What `DMD2_DTYPE` says; else fp16 on a GPU, on a CPU fp32.

    If a network has `LARGE_MODEL_PARAMS`, a CPU uses bf16 where it is faster (see `precision`), or where fp32 would
    not fit: SDXL takes 14 GB of it. Which of fp16 and bf16 is faster on a GPU, `scripts/bench gpu` measures.

    Raises:
        UserError: the variable's value is not valid.
    """
    if not leaves_dtype(environ):
        return DTYPES[_wanted_dtype(environ)]
    if device.type == "cuda":
        return torch.float16
    if max(parameters.values(), default=0) < LARGE_MODEL_PARAMS:
        return torch.float32
    speeds, needed = precision.measure_cpu(), 4 * sum(parameters.values())
    name = speeds.fastest
    if name == "fp32" and needed > (memory := host_memory()):
        name = "bf16"
        logger.warning("fp32 is faster here, but takes %.1f GB of %.1f GB: bf16", needed / 1e9, memory / 1e9)
    logger.info("precision: %s (%s)", name, speeds)
    return DTYPES[name]


def leaves_dtype(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `DMD2_DTYPE` leaves it to this program what networks compute in."""
    return _wanted_dtype(environ) == "auto"


def _wanted_dtype(environ: Mapping[str, str]) -> str:
    return _choice(environ, "DMD2_DTYPE", ("auto", *DTYPES))


def prefers_gpu(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an engine that may choose runs on a GPU: where there is one, unless DMD2_MEMORY=cpu."""
    return _choice(environ, "DMD2_MEMORY", MODES) != "cpu" and torch.cuda.is_available()


def place(
    parameters: Mapping[str, int],
    device: torch.device,
    dtype: torch.dtype,
    pixels: int,
    *,
    fast: bool = True,
    environ: Mapping[str, str] = os.environ,
) -> Placement:
    """Decides, and says so in the log. Reads these variables of `environ`:

    - `DMD2_MEMORY`: how much memory of a GPU to use, see `dmd2.runtime.offload.plan`; "cpu" is for `prefers_gpu`.
    - `DMD2_COMPILE`: "auto" compiles and captures large networks on a GPU, "graphs" only captures, "off" neither.
    - `DMD2_GO_FAST`: "true" computes the UNet's linear layers in 8-bit floats. Images are not the same any more.
    - `DMD2_CACHE`: compiled kernels are kept there.

    Args:
        parameters: of each network, see `count_parameters`.
        pixels: of an image of the usual size.
        fast: whether the caller will `warm_up`: without that, nothing is compiled.

    Raises:
        UserError: a variable's value is not valid, or there is not enough memory.
    """
    wanted = _choice(environ, "DMD2_MEMORY", MODES)
    compiling = _choice(environ, "DMD2_COMPILE", ("auto", "graphs", "off"))
    go_fast = _choice(environ, "DMD2_GO_FAST", ("false", "true")) == "true"
    if device.type != "cuda":
        if go_fast:
            logger.warning("DMD2_GO_FAST: has no effect on a CPU")
        return Placement(Plan("cpu"))
    if go_fast and not has_fp8(device):
        raise UserError("DMD2_GO_FAST=true: this GPU has no 8-bit floats; it takes an Ada, a Hopper or a newer one")
    sizes = {name: count * dtype.itemsize for name, count in parameters.items()}
    if go_fast:  # 8 bits beside 16, which LoRAs are merged into: at most a byte for each number
        sizes |= {name: sizes[name] + count for name, count in parameters.items() if name.startswith("unet")}
    free = free_memory(device)
    wanted, capturing = "full" if wanted == "cpu" else wanted, fast and compiling != "off"
    chosen = plan(sizes, free, pixels, wanted, captured=capturing)
    if capturing and chosen.weights is not None and plan(sizes, free, pixels, wanted).weights is None:
        logger.warning("memory: all networks fit, but not their captured graphs: nothing is compiled")
        chosen, capturing = EVERYTHING, False
    total = sum(sizes.values()) / 1e9
    logger.info("memory: %s; %.1f GB of weights, %.1f GB free", chosen.mode, total, free / 1e9)
    offloader = None if chosen.weights is None else Offloader(device, chosen.weights)
    compiler = kernels = None
    if capturing and offloader is None:
        compiler = Compiler(device, compile=compiling == "auto")
        kernels = cache_path(cache_folder(environ), device)
        restore_kernels(kernels)
    return Placement(chosen, offloader, compiler, go_fast, kernels)


def _choice(environ: Mapping[str, str], name: str, valid: Sequence[str]) -> str:
    value = environ.get(name, "").strip().lower() or valid[0]
    if value not in valid:
        raise UserError(f"{name}={value}: expected {', '.join(valid)}")
    return value
