"""Which networks are on the device: the plan in figures, and networks that take turns on a CPU in the GPU's place."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dmd2.runtime.offload
import dmd2.runtime.placement
from dmd2.inference.engine import Engine
from dmd2.models.stable_diffusion.folder import load_text_to_image
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import shapes_alone
from dmd2.runtime.offload import (
    LARGE_MODEL_PARAMS,
    WORK,
    Keeper,
    Offloader,
    Plan,
    peak_memory,
    plan,
    save_memory,
    upload,
)
from dmd2.runtime.placement import Placement, count_parameters, default_dtype, place, prefers_gpu
from dmd2.runtime.precision import DTYPES, Throughput
from tests.tiny_sdxl import difference

CPU = torch.device("cpu")
GPU = torch.device("cuda")
GB = 1_000_000_000
# SDXL in fp16
SIZES = {
    "text_encoder": 246_000_000,
    "text_encoder_2": 1_389_000_000,
    "vae": 167_000_000,
    "unet": 5_135_000_000,
    "unet_1step": 5_135_000_000,
}


# The plan


@pytest.mark.parametrize(("free", "mode"), [(140, "full"), (24, "full"), (16, "12gb"), (11.4, "12gb"), (7.4, "8gb")])
def test_what_is_free_decides(free: float, mode: str) -> None:
    found = plan(SIZES, int(free * GB))
    assert found.mode == mode
    assert (found.weights is None) == (mode == "full")
    assert found.tiles == (mode == "8gb")


def test_one_student_alone_needs_less() -> None:
    one = {name: size for name, size in SIZES.items() if name != "unet_1step"}
    assert plan(one, 14 * GB).mode == "full"
    assert plan(SIZES, 14 * GB).mode == "12gb"


def test_small_images_need_less() -> None:
    assert plan(SIZES, 15 * GB, 512 * 512).mode == "full"
    assert plan(SIZES, 15 * GB, 1024 * 1024).mode == "12gb"


@pytest.mark.parametrize(("mode", "most"), [("12gb", 12 * GB), ("8gb", 8 * GB)])
def test_a_mode_that_is_asked_for_keeps_to_its_name(mode: str, most: int) -> None:
    found = plan(SIZES, 140 * GB, wanted=mode)
    assert found.mode == mode and found.weights is not None
    assert max(SIZES.values()) <= found.weights < most - 1.5 * GB  # the rest is for the work
    assert plan(SIZES, GB, wanted="full") == Plan("full")  # who asks for it gets it


def test_twelve_gigabytes_hold_one_student_and_all_that_is_shared() -> None:
    found = plan(SIZES, 140 * GB, wanted="12gb").weights
    assert found is not None
    assert sum(SIZES.values()) - SIZES["unet"] <= found < sum(SIZES.values())


def test_too_little_memory_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"takes 5\.1 GB, but only 4\.0 GB .*DMD2_MEMORY=cpu") as error:
        plan(SIZES, 4 * GB)
    assert "\n" not in str(error.value)


@given(st.integers(0, 200 * GB), st.integers(64 * 64, 2048 * 2048), st.sampled_from(["auto", "12gb", "8gb"]))
def test_a_plan_never_promises_more_than_there_is(free: int, pixels: int, wanted: str) -> None:
    try:
        found = plan(SIZES, free, pixels, wanted)
    except UserError:
        assert free < max(SIZES.values())
        return
    held = sum(SIZES.values()) if found.weights is None else found.weights
    assert max(SIZES.values()) <= held <= free


# Taking turns


def three(limit: int) -> tuple[Offloader, dict[str, nn.Linear]]:
    """Three networks of 400 bytes each."""
    torch.manual_seed(0)
    networks = {name: nn.Linear(9, 10).requires_grad_(False) for name in ("text", "unet", "vae")}
    offloader = Offloader(CPU, limit)
    for name, network in networks.items():
        offloader.add(name, network)
    return offloader, networks


def test_a_call_brings_a_network_and_the_longest_unused_one_leaves() -> None:
    offloader, networks = three(900)
    x = torch.randn(2, 9)
    hosts = {name: network.weight.data_ptr() for name, network in networks.items()}
    expected = {name: network.weight.clone() for name, network in networks.items()}
    assert offloader.there == {}
    for name in ("text", "unet", "text", "vae", "vae", "unet"):
        found = networks[name](x)
        assert torch.equal(found, x @ expected[name].T + networks[name].bias)
        assert name in offloader.there and sum(offloader.there.values()) <= 900
    assert offloader.there == {"vae": 400, "unet": 400}
    # What is there is a copy; who left has its own weights back.
    assert networks["text"].weight.data_ptr() == hosts["text"]
    assert networks["vae"].weight.data_ptr() != hosts["vae"]
    offloader.park()
    assert offloader.there == {}
    for name, network in networks.items():
        assert network.weight.data_ptr() == hosts[name] and torch.equal(network.weight, expected[name])


def test_everything_stays_if_it_fits_and_a_network_that_is_too_large_is_there_alone() -> None:
    offloader, networks = three(1200)
    for network in networks.values():
        network(torch.randn(1, 9))
    assert list(offloader.there) == ["text", "unet", "vae"]
    offloader, networks = three(100)
    for network in networks.values():
        network(torch.randn(1, 9))
        assert len(offloader.there) == 1


@pytest.mark.parametrize("inference", [True, False])
def test_weights_changed_on_the_device_come_back_changed(inference: bool) -> None:
    offloader, networks = three(500)
    before = networks["unet"].weight.clone()
    with torch.inference_mode(inference), torch.no_grad():
        networks["unet"](torch.randn(1, 9))
        networks["unet"].weight.add_(1)
        networks["vae"](torch.randn(1, 9))
        assert list(offloader.there) == ["vae"]
        assert torch.equal(networks["unet"].weight, before + 1)
        networks["unet"](torch.randn(1, 9))
        assert torch.equal(networks["unet"].weight, before + 1)
    networks["unet"].weight.add_(1)  # not an inference tensor after all that
    offloader.park("unet")
    assert torch.allclose(networks["unet"].weight, before + 2)


def test_an_interrupted_move_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    offloader, networks = three(500)
    expected = networks["unet"].weight.clone()
    to = torch.Tensor.to

    def fails(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.shape == (10,):
            raise torch.OutOfMemoryError("no memory for the bias")
        return to(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", fails)
        with pytest.raises(torch.OutOfMemoryError):
            offloader.bring("unet")
    assert offloader.there == {}
    networks["unet"](torch.randn(1, 9))
    assert torch.equal(networks["unet"].weight, expected) and list(offloader.there) == ["unet"]


def test_images_are_the_same_whoever_has_to_wait(weights: Path) -> None:
    """The whole pipeline with room for one network at a time."""
    offloader = Offloader(CPU, 1)
    together = load_text_to_image(weights, ["unet", "unet_1step"], CPU, torch.float32)
    swapped = load_text_to_image(
        weights, ["unet", "unet_1step"], CPU, torch.float32, placement=Placement(Plan("8gb", 1), offloader)
    )
    x = torch.randn(2, 4, 16, 16)
    seen = []
    for subfolder in ("unet", "unet_1step", "unet"):
        images = []
        for model in (together, swapped):
            with torch.inference_mode():
                cond = model.encode_text(["a red apple", "an owl"], (64, 64))
                x0 = model.denoisers[subfolder](x, torch.full((2,), 5.0), cond)
                seen.append(list(offloader.there))
                images.append(model.codec.decode(x0))
        assert difference(*images) <= 2  # the same numbers at other places in memory may go through other kernels
    assert seen[1::2] == [["unet"], ["unet_1step"], ["unet"]]
    assert list(offloader.there) == ["vae"]
    assert torch.allclose(swapped.codec.encode(images[0]), together.codec.encode(images[0]), atol=1e-5)


# The VAE


def test_a_vae_in_tiles_draws_about_the_same_image() -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=1024, **blocks)
    vae.double().eval().requires_grad_(False)
    z = torch.randn(2, 4, 72, 8, dtype=torch.float64)
    whole = vae.decode(z).sample
    save_memory(vae, tiles=False)
    assert torch.allclose(vae.decode(z).sample, whole, atol=1e-9)
    seen = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    save_memory(vae, tiles=True)
    tiled = vae.decode(z).sample
    assert {shape[0] for shape in seen} == {1} and {shape[2] for shape in seen} == {64, 24}
    assert tiled.shape == whole.shape
    assert float((tiled - whole).abs().mean()) < 0.1 * float(whole.std())


# To the device


def test_tensors_without_numbers_go_to_a_device_too() -> None:
    class Shape(torch.Tensor):
        """As torch's fake ones: has no pages to pin."""

        def pin_memory(self, *_: Any) -> Any:
            raise AssertionError("NYI")

        def to(self, device: Any) -> Any:  # type: ignore[override]
            return device

    with shapes_alone():
        assert upload(torch.ones(2).as_subclass(Shape), GPU) == GPU


# Weights that are about to be changed


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    device = GPU


def test_copies_of_weights_stay_on_a_gpu_while_there_is_room_which_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.device] = []
    weights = [torch.full((250,), float(i)).as_subclass(OnGpu) for i in range(4)]  # 1000 bytes each

    def free(device: torch.device) -> int:
        asked.append(device)
        return int(WORK["full"]) + 2500

    monkeypatch.setattr(dmd2.runtime.offload, "free_memory", free)
    monkeypatch.setattr(dmd2.runtime.offload, "download", lambda tensor: ("host", tensor))
    keep = Keeper()
    copies = [keep(weight) for weight in weights]
    assert [isinstance(copy, tuple) for copy in copies] == [False, False, True, True] and asked == [GPU]
    assert torch.equal(copies[1], weights[1]) and copies[1].data_ptr() != weights[1].data_ptr()


# What an engine decides


@pytest.mark.parametrize("faster", ["bf16", "fp32"])
def test_large_networks_run_on_a_cpu_in_what_is_faster_there(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = {"unet": 8_000_000}, {"unet": 2_567_463_684, "vae": 83_653_863}
    speeds = Throughput(*((200.0, 100.0) if faster == "bf16" else (0.7, 31.0)))
    monkeypatch.setattr("dmd2.runtime.precision.measure_cpu", lambda: speeds)
    monkeypatch.setattr("dmd2.runtime.placement.host_memory", lambda: 24 * 10**9)
    assert default_dtype(CPU, small) == default_dtype(CPU, {}) == torch.float32
    assert default_dtype(CPU, large) == default_dtype(CPU, {"unet": LARGE_MODEL_PARAMS}) == DTYPES[faster]
    monkeypatch.setattr("dmd2.runtime.placement.host_memory", lambda: 10**10)  # fp32 would take 10.6 GB
    assert default_dtype(CPU, large) == torch.bfloat16
    assert default_dtype(GPU, small) == default_dtype(GPU, large) == torch.float16


def test_the_operator_may_choose_another_dtype(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    assert default_dtype(GPU, {}, {"DMD2_DTYPE": " BF16 "}) == torch.bfloat16
    assert default_dtype(CPU, {}, {"DMD2_DTYPE": "auto"}) == torch.float32
    with pytest.raises(UserError, match="DMD2_DTYPE=int8: expected auto, fp16, bf16, fp32"):
        default_dtype(CPU, {}, {"DMD2_DTYPE": "int8"})
    monkeypatch.setenv("DMD2_DTYPE", "bf16")
    engine = Engine(weights, "cpu", modes=("1",))
    assert engine.dtype == torch.bfloat16
    assert engine.generate(["an owl"], [0], "1").shape == (1, 3, 64, 64)


def test_parameters_are_counted_by_network(weights: Path, tmp_path: Path) -> None:
    found = count_parameters(weights, ["unet", "unet_1step"])
    assert list(found) == ["text_encoder", "text_encoder_2", "vae", "unet", "unet_1step"]
    model = load_text_to_image(weights, ["unet"], CPU, torch.float32)
    assert found["unet"] == found["unet_1step"] == sum(p.numel() for p in model.denoisers["unet"].unet.parameters())
    copy = shutil.copytree(weights, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_2")
    assert "text_encoder_2" not in count_parameters(copy, ["unet"])


@pytest.mark.parametrize("name", ["DMD2_MEMORY", "DMD2_COMPILE", "DMD2_GO_FAST"])
def test_wrong_variables_are_named_with_what_is_valid(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}=much: expected .*(auto|true)"):
        place({}, CPU, torch.float32, 64, environ={name: "much"})


def test_on_a_cpu_nothing_is_moved_or_compiled() -> None:
    found = place({"unet": 10}, CPU, torch.float32, 64, environ={"DMD2_MEMORY": "8gb", "DMD2_GO_FAST": "true"})
    assert found == Placement(Plan("cpu")) and found.host(CPU) == CPU


def on_gpu(monkeypatch: pytest.MonkeyPatch, free: float, fp8: bool = True) -> None:
    """As if there were one, as far as deciding goes."""
    monkeypatch.setattr(dmd2.runtime.placement, "free_memory", lambda _: int(free * GB))
    monkeypatch.setattr(dmd2.runtime.placement, "has_fp8", lambda _: fp8)
    monkeypatch.setattr(dmd2.runtime.placement, "Compiler", lambda device, compile: ("compiler", device, compile))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")


def test_on_a_gpu_what_fits_is_compiled_and_what_does_not_takes_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpu(monkeypatch, 140)
    count = {name: size // 2 for name, size in SIZES.items()}
    cache = {"DMD2_CACHE": str(tmp_path)}
    found: Any = place(count, GPU, torch.float16, 1024**2, environ=cache)
    assert (found.plan.mode, found.offloader, found.compiler) == ("full", None, ("compiler", GPU, True))
    assert found.kernels == tmp_path / "compiled" / f"torch-{torch.__version__}-NVIDIA-H200.bin"
    assert found.host(GPU) == GPU and not found.go_fast
    found = place(count, GPU, torch.float16, 1024**2, environ=cache | {"DMD2_COMPILE": "graphs"})
    assert found.compiler == ("compiler", GPU, False)
    for quiet in (
        place(count, GPU, torch.float16, 1024**2, environ=cache | {"DMD2_COMPILE": "off"}),
        place(count, GPU, torch.float16, 1024**2, environ=cache, fast=False),
    ):
        assert quiet.compiler is None and quiet.kernels is None
    found = place(count, GPU, torch.float16, 1024**2, environ=cache | {"DMD2_MEMORY": "8gb"})
    assert found.plan.mode == "8gb" and found.offloader.device == GPU and found.offloader.limit == found.plan.weights
    assert found.compiler is None and found.host(GPU) == CPU
    # fp32 takes twice the memory
    on_gpu(monkeypatch, 20)
    assert place(count, GPU, torch.float16, 1024**2, environ=cache).plan.mode == "full"
    assert place(count, GPU, torch.float32, 1024**2, environ=cache).plan.mode == "12gb"


def test_graphs_are_part_of_the_plan_and_go_before_networks_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert plan(SIZES, 18 * GB).mode == "full" and plan(SIZES, 18 * GB, captured=True).mode == "12gb"
    assert plan(SIZES, 21 * GB, captured=True).mode == "full"
    on_gpu(monkeypatch, 18)
    count = {name: size // 2 for name, size in SIZES.items()}
    found = place(count, GPU, torch.float16, 1024**2, environ={"DMD2_CACHE": str(tmp_path)})
    assert found.plan.mode == "full" and found.compiler is None and found.offloader is None
    assert "not their captured graphs" in caplog.text
    fast = place(count, GPU, torch.float16, 1024**2, environ={"DMD2_CACHE": str(tmp_path), "DMD2_GO_FAST": "true"})
    assert fast.plan.mode == "12gb" and fast.go_fast  # 8-bit weights are there beside the others


def test_a_gpu_without_8_bit_floats_cannot_go_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, 140, fp8=False)
    with pytest.raises(UserError, match="DMD2_GO_FAST=true: this GPU has no 8-bit floats"):
        place({"unet": 10}, GPU, torch.float16, 64, environ={"DMD2_GO_FAST": "true"})


def test_an_engine_that_may_choose_runs_on_the_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not prefers_gpu({}) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert prefers_gpu({}) and prefers_gpu({"DMD2_MEMORY": "8gb"})
    assert not prefers_gpu({"DMD2_MEMORY": "cpu"})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_peak_memory_of_a_cpu_is_what_the_process_took() -> None:
    found = peak_memory(CPU)
    kilobytes = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    assert found == pytest.approx(kilobytes * 1024, rel=0.02)


FAULTS = """
import gc, resource
import torch
from dmd2.runtime.offload import keep_freed_memory

keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 19) for _ in range(64)]
    del tensors
    gc.collect()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 64 * (1 << 21) // os.sysconf("SC_PAGE_SIZE")
"""of those 64 tensors of 2 MB"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what it sets is glibc's")
def test_memory_that_a_training_frees_is_taken_again_without_asking_the_system_for_it() -> None:
    ended = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, *later = (int(line) for line in ended.stdout.split())
    if first < 0.9 * PAGES:
        pytest.skip("this system does not count page by page: huge pages, or a sandbox of its own kernel")
    assert max(later) < 0.5 * PAGES  # without `keep_freed_memory` the second time is like the first
