"""Offload: as many networks as fit are on the device, the others wait in the host's memory."""

from __future__ import annotations

import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.runtime.errors import UserError
from dmd2.runtime.files import only_shapes

MODES = ("auto", "full", "12gb", "8gb", "cpu")
LARGE_MODEL_PARAMS = 500_000_000  # from here on a CPU may run a network in bf16, and does not trace it
CONTEXT = 600_000_000  # bytes that CUDA takes for itself on a device of which a part is to be used
# Bytes beside the weights that an image of 1024² needs: estimates for SDXL in 16 bits. With `full` a batch of four
# goes through the UNet at once; the decoder takes one image at a time, in `8gb` one tile of 512² at a time.
WORK = {"full": 5e9, "12gb": 3.5e9, "8gb": 1.5e9}
# Captured graphs have a pool of their own, which what runs uncaptured cannot use: as much as their largest takes.
POOL = 3e9

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Which networks stay on the device, and how the VAE saves memory."""

    mode: str
    """"full", "12gb", "8gb" or "cpu" """
    weights: int | None = None
    """bytes of weights on the device at a time, at most; None: all networks stay there"""
    tiles: bool = False
    """whether the VAE decodes large images in tiles, which changes them a little"""


def plan(
    sizes: Mapping[str, int],
    free: int,
    pixels: int = 1024 * 1024,
    wanted: str = "auto",
    *,
    captured: bool = False,
) -> Plan:
    """Chooses what to keep on a GPU, by its memory and the networks' sizes.

    "full" keeps everything there; "12gb" one UNet, the text encoders and the VAE, the other student is fetched when
    it is asked for; "8gb" fetches each network before its stage. "auto" takes the first of these that fits into what
    is free; "12gb" and "8gb" keep to so much even where there is more.

    Args:
        sizes: bytes of each network's weights, by subfolder; UNets are those whose name begins with "unet".
        free: bytes free on the device before anything is loaded.
        pixels: of an image.
        wanted: one of `MODES`, but not "cpu".
        captured: with "full", networks are captured in graphs.

    Raises:
        UserError: the mode is none, or not even the largest network fits.
    """
    if wanted not in MODES[:-1]:
        raise UserError(f"DMD2_MEMORY={wanted}: expected {', '.join(MODES)}")
    work = {mode: int(size * pixels / 1024**2) for mode, size in WORK.items()}
    work["full"] += int(POOL * pixels / 1024**2) if captured else 0
    unets = [size for name, size in sizes.items() if name.startswith("unet")]
    needed = {
        "full": sum(sizes.values()),
        "12gb": sum(sizes.values()) - sum(unets) + max(unets, default=0),
        "8gb": max(sizes.values()),
    }
    fitting = (mode for mode in needed if needed[mode] + work[mode] <= free)
    mode = next(fitting, "8gb") if wanted == "auto" else wanted
    if mode == "full":
        return Plan(mode)
    if wanted != "auto":
        free = min(free, {"12gb": 12_000_000_000, "8gb": 8_000_000_000}[mode] - CONTEXT)
    if needed["8gb"] > free:
        raise UserError(
            f"memory: the largest network takes {needed['8gb'] / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of the "
            "GPU's may be used; free some, or set DMD2_MEMORY=cpu"
        )
    return Plan(mode, max(needed["8gb"], free - work[mode]), tiles=mode == "8gb")


class Offloader:
    """Moves networks to the device when they are needed, and others off it.

    A network is brought there when it (or one of its children) is called; those that were used longest ago make room.
    All of them stay in the host's memory, mapped from their files where they can be: one that leaves the device is
    just dropped, but for what was changed there in place (by a LoRA), which is copied back.

    Args:
        device: where networks are run.
        limit: bytes of weights there at a time. A network that is larger is there alone.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit = device, limit
        self._hosts: dict[str, list[tuple[Tensor, Tensor]]] = {}  # (the network's own, what it is on the host)
        self._versions: dict[str, list[int]] = {}  # torch's counters of changes, as they were when it was brought
        self._there: OrderedDict[str, int] = OrderedDict()  # name → bytes, longest unused first

    @property
    def there(self) -> dict[str, int]:
        """Bytes of the networks on the device, by name, the one that will leave first in front."""
        return dict(self._there)

    @torch.inference_mode(False)
    def add(self, name: str, network: nn.Module) -> None:
        """Takes over a frozen network whose weights are in the host's memory."""
        tensors = [*network.parameters(), *network.buffers()]
        self._hosts[name] = [(tensor, tensor.data) for tensor in tensors]
        for module in (network, *network.children()):  # a VAE is not called itself, but its decoder is
            module.register_forward_pre_hook(lambda *_: self.bring(name))

    @torch.inference_mode(False)  # weights must not become inference tensors
    @torch.no_grad()
    def bring(self, name: str) -> None:
        """Moves a network to the device, unless it is there already."""
        if name in self._there:
            self._there.move_to_end(name)
            return
        size = sum(host.nbytes for _, host in self._hosts[name])
        while self._there and sum(self._there.values()) + size > self.limit:
            self.park(next(iter(self._there)))
        logger.debug("memory: %s goes to %s (%.2f GB)", name, self.device, size / 1e9)
        for tensor, host in self._hosts[name]:
            tensor.data = host.to(self.device, non_blocking=True, copy=True)
        self._versions[name] = [tensor._version for tensor, _ in self._hosts[name]]
        self._there[name] = size

    @torch.inference_mode(False)
    @torch.no_grad()
    def park(self, *names: str) -> None:
        """Moves networks off the device; without names, all of them."""
        for name in names or tuple(self._there):
            if self._there.pop(name, None) is None:
                continue
            for (tensor, host), version in zip(self._hosts[name], self._versions[name], strict=True):
                if tensor._version != version:
                    host.copy_(tensor.data)
                tensor.data = host


def save_memory(vae: Any, tiles: bool) -> None:
    """Lets a diffusers VAE work on one image at a time, and in tiles of 512² pixels if that is asked for."""
    vae.enable_slicing()
    if tiles and hasattr(vae, "post_quant_conv"):  # the KL-VAE: tiny ones take little memory anyway
        vae.enable_tiling()
        vae.tile_sample_min_size = 512
        vae.tile_latent_min_size = 512 // 2 ** (len(vae.config.block_out_channels) - 1)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device. The host does not wait: work that is queued there goes on meanwhile.

    One that is on a device already goes as it would have.
    """
    if device.type != "cuda" or tensor.device.type != "cpu" or only_shapes():  # fake tensors have no pages
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from other memory a copy waits for the whole queue


def download(tensor: Tensor) -> Tensor:
    """A tensor of the device's in the host's memory, into pages that a GPU writes to by itself."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


class Keeper:
    """Copies weights that are about to be changed: on their device if that leaves room for work, else on the host.

    It asks once what is free: for each of hundreds of weights that would take longer than the copies.
    """

    def __init__(self) -> None:
        self._room: dict[torch.device, float] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        device = tensor.device
        if device not in self._room:
            self._room[device] = free_memory(device) - WORK["full"] if device.type == "cuda" else float("inf")
        if self._room[device] < tensor.nbytes:
            return download(tensor.detach())
        self._room[device] -= tensor.nbytes
        return tensor.detach().clone()


def host_memory() -> int:
    """Bytes of memory that this machine, or the container it is, has for processes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # not Linux, or no limit ("max")
        return total


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process, in bytes: tensors on a GPU; on a CPU its largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Has this process keep what it frees, up to a quarter of a gigabyte, for what it allocates next.

    glibc now and then gives what was freed back to the system and then takes the same pages again, each of which the
    system fills with zeros first: some 3 % of a small network's training on a CPU. Without glibc it does nothing.
    """
    import ctypes

    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "gnu_get_libc_version"):
        m_mmap_threshold, m_trim_threshold = -3, -1  # of <malloc.h>
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 256 << 20)
