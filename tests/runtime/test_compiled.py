"""Compiled networks: the numbers of eager ones, nobody's output overwritten, kernels that outlive the process."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

import dmd2.models.stable_diffusion.codec
import dmd2.models.stable_diffusion.model
import dmd2.runtime.compiled
from dmd2.emoji.architecture import build_unet
from dmd2.inference.engine import Engine
from dmd2.models.adapters.control import ControlModel
from dmd2.models.stable_diffusion.codec import LatentCodec, OneHead
from dmd2.models.stable_diffusion.text import TextCondition, TextEncoder
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.compiled import (
    REGIONS,
    Compiler,
    Fp8Linear,
    Prepared,
    Traced,
    cache_path,
    fastest_attention,
    fuse_projections,
    has_fp8,
    quantize_linears,
    replaying,
    restore_kernels,
    save_kernels,
)
from dmd2.runtime.offload import Plan
from dmd2.runtime.placement import Placement
from tests.tiny_sdxl import build_vae

CPU = torch.device("cpu")
SDXL = tomllib.loads((Path(__file__).parents[2] / "scripts" / "sdxl.toml").read_text())


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    torch.compiler.reset()


def unet() -> Any:
    torch.manual_seed(0)
    return build_unet((32, 32, 32)).eval().requires_grad_(False)


def smallest_unet() -> Any:
    """With one block of everything that SDXL's has: it is compiled in seconds."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=1,
        cross_attention_dim=256,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=320,
    )
    return network.eval().requires_grad_(False)


def condition(batch: int) -> TextCondition:
    torch.manual_seed(1)
    sizes = torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0]).expand(batch, -1)
    return TextCondition(torch.randn(batch, 8, 256), torch.randn(batch, 128), sizes)


class Double:
    """A function that notes its batches, in the place of one that was captured: same memory for every result."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self.plain: list[int] = []

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.plain.append(len(x))
        return 2 * x

    def record(self, inputs: tuple[Tensor | None, ...]) -> Any:
        x, *_ = inputs
        assert x is not None
        self.recorded.append(len(x))
        output = torch.empty_like(x)

        def replay() -> None:
            self.replayed.append(len(output))
            torch.mul(x, 2, out=output)

        return replaying(replay, inputs, output)


def prepared(most: int | None = None) -> tuple[Double, Compiler, Prepared]:
    double, compiler = Double(), Compiler(CPU)
    return double, compiler, Prepared(double, double.record, compiler, most)


# Shapes


def test_only_what_is_recorded_is_replayed() -> None:
    double, compiler, function = prepared()
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(function(x), 2 * x) and double.plain == [2] and not double.recorded
    assert compiler.unprepared == 1
    with compiler.recording():
        assert torch.equal(function(x), 2 * x)
        assert torch.equal(function(x + 1), 2 * x + 2)
    assert double.recorded == [2] and double.replayed == [2, 2]
    assert torch.equal(function(-x), -2 * x) and double.replayed == [2, 2, 2]
    # Another shape, another dtype, an input more: as they are.
    for inputs in ((x[:, :2],), (x.double(),), (x, x)):
        assert torch.equal(function(*inputs), 2 * inputs[0])
    assert double.plain == [2] * 4 and double.recorded == [2] and compiler.unprepared == 4


def test_other_batches_are_put_together() -> None:
    double, compiler, function = prepared()
    x = torch.randn(7, 3)
    with compiler.recording():
        function(x[:1])
        function(x[:3])
    double.replayed.clear()
    for count, parts in ((7, [3, 3, 1]), (5, [3, 1, 1]), (3, [3]), (2, [1, 1]), (1, [1])):
        assert torch.equal(function(x[:count]), 2 * x[:count])
        assert double.replayed == parts
        double.replayed.clear()
    assert double.plain == []


def test_batches_smaller_than_any_recorded_one_run_as_they_are() -> None:
    double, compiler, function = prepared()
    with compiler.recording():
        function(torch.ones(4, 3))
    assert torch.equal(function(torch.ones(2, 3)), torch.full((2, 3), 2.0)) and double.plain == [2]


def test_a_limit_keeps_large_batches_from_being_recorded() -> None:
    double, compiler, function = prepared(most=1)
    x = torch.randn(3, 2)
    with compiler.recording():
        assert torch.equal(function(x), 2 * x)
    assert double.recorded == [1] and double.replayed == [1, 1, 1]


def test_no_result_is_overwritten_by_the_next_call_and_no_input_kept() -> None:
    _, compiler, function = prepared()
    x = torch.ones(2, 3)
    with compiler.recording():
        first = function(x)
    second = function(5 * x)
    x.zero_()
    third = function(x)
    assert [float(result.mean()) for result in (first, second, third)] == [2, 10, 0]


def test_several_outputs_are_each_copied_and_joined() -> None:
    x, outputs = torch.zeros(1, 2), (torch.zeros(1, 2), torch.zeros(1, 1))

    def replay() -> None:
        outputs[0].copy_(x + 1)
        outputs[1].copy_(x.sum(1, keepdim=True))

    compiler = Compiler(CPU)
    function = Prepared(lambda _: (), lambda inputs: replaying(replay, (x,), outputs), compiler)
    with compiler.recording():
        function(torch.ones(1, 2))
    first, second = function(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert first.tolist() == [[2, 3], [4, 5]] and second.tolist() == [[3], [7]]


def test_what_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    double, compiler, _ = prepared()

    def fails(inputs: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    function = Prepared(double, fails, compiler)
    with compiler.recording(), caplog.at_level(logging.WARNING):
        assert torch.equal(function(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert "no compiler" in caplog.text and "and more" not in caplog.text and double.plain == [2]
    assert compiler.failures == 1


# Networks


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_compiled_unet_is_the_eager_one(backend: str) -> None:
    """Inductor's C++ takes a while; "eager" still sees to it that the whole network is one graph."""
    network, compiler = smallest_unet(), Compiler(CPU, backend=backend)
    eager = StableDiffusion(network, "v_prediction")
    compiled = StableDiffusion(network, "v_prediction", compiler=compiler)
    x, sigma, cond = torch.randn(3, 4, 16, 16), torch.tensor([14.6, 1.0, 0.1]), condition(3)
    plain = compiled(x, sigma, cond)
    with compiled.recording():
        compiled(x[:1], sigma[:1], cond[:1])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1 and not torch._dynamo.utils.counters["graph_break"]
    found, features = compiled.features(x, sigma, cond)  # three times one
    expected, bottleneck = eager.features(x, sigma, cond)
    assert torch.allclose(plain, expected, atol=1e-6)
    assert torch.allclose(found, expected, atol=1e-4) and torch.allclose(features, bottleneck, atol=1e-4)
    other = compiled(x[..., :8], sigma, cond)  # a shape that nobody recorded is not compiled either
    assert torch.allclose(other, eager(x[..., :8], sigma, cond), atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
def test_compiled_decoders_and_captured_text_encoders_are_the_eager_ones(
    text_models: tuple[Any, Any, Any], tiny_vae: Any
) -> None:
    compiler = Compiler(CPU, backend="eager")
    codec, fast = LatentCodec(tiny_vae), LatentCodec(tiny_vae, compiler=compiler)
    z = torch.randn(2, 4, 8, 8)
    with compiler.recording():
        fast.decode(z)
    difference = fast.decode(z).int() - codec.decode(z).int()
    assert int(difference.abs().max()) <= 1
    plain, vae = build_vae(), build_vae()
    expected, larger = LatentCodec(plain).decode(z), LatentCodec(vae, compiler=compiler)
    with compiler.recording():
        larger.encode(expected)
        larger.decode(z)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert int((larger.decode(z).int() - expected.int()).abs().max()) <= 1
        larger.encode(expected)
    assert graphs >= 2 and compiler.failures == compiler.unprepared == 0
    tokenizer, first, second = text_models
    both: tuple[Any, Any] = ([tokenizer] * 2, [first, second])
    with compiler.recording():
        TextEncoder(*both, compiler=compiler)(["an owl"], (64, 64))
    found = TextEncoder(*both, compiler=compiler)(["an owl", ""], (64, 64))
    expected = TextEncoder(*both)(["an owl", ""], (64, 64))
    assert found.pooled is not None and expected.pooled is not None
    assert torch.equal(found.context, expected.context) and torch.equal(found.pooled, expected.pooled)


@torch.no_grad()
def test_no_shape_of_sdxl_breaks_a_graph_and_none_is_compiled_twice() -> None:
    """Every kind of block at full width, on tensors without numbers: batches of 1 and 4, prompts of one window, two.

    There are fewer blocks of a kind, for the time it takes: those that are left out would find their code compiled.
    """
    with torch.device("meta"):
        shallow = SDXL["unet"] | {"transformer_layers_per_block": [1, 1, 1], "layers_per_block": 1}
        networks = [UNet2DConditionModel(**shallow).eval().requires_grad_(False) for _ in range(2)]
    compiler = Compiler(CPU, backend="eager")
    for network in networks:
        fuse_projections(network)
    denoiser, other = (StableDiffusion(network, compiler=compiler) for network in networks)

    def run(batch: int, windows: int, denoiser: StableDiffusion = denoiser) -> None:
        cond = TextCondition(
            torch.empty(batch, 77 * windows, 2048, device="meta"),
            torch.empty(batch, 1280, device="meta"),
            torch.empty(batch, 6, device="meta"),
        )
        x = torch.empty(batch, 4, 64, 64, device="meta")
        assert denoiser(x, torch.full((batch,), 5.0, device="meta"), cond).shape == x.shape

    shapes = [(batch, windows) for batch in (1, 4) for windows in (1, 2)]
    torch._dynamo.utils.counters.clear()
    with compiler.recording():
        for shape in shapes:
            run(*shape)
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    blocks = [m for m in networks[0].modules() if type(m).__name__ in REGIONS]
    assert 0 < graphs <= len(blocks) * len(shapes)
    with compiler.recording():  # the other student's blocks find their code compiled
        run(1, 1, other)
    assert stats["unique_graphs"] == graphs
    assert compiler.failures == 0 and not torch._dynamo.utils.counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in [*shapes, (3, 1), (7, 2)]:
            run(*shape)
    assert stats["unique_graphs"] == graphs and compiler.unprepared == 0


@torch.no_grad()
def test_the_decoder_of_sdxl_is_one_graph() -> None:
    """At full width and with all of its blocks, on tensors without numbers."""
    with torch.device("meta"):
        vae = AutoencoderKL(**SDXL["vae"]).eval().requires_grad_(False)
    compiler = Compiler(CPU, backend="eager")
    codec = LatentCodec(vae, compiler=compiler)
    torch._dynamo.utils.counters.clear()
    z = torch.empty(2, 4, 64, 64, device="meta")
    with compiler.recording():
        assert codec.decoded(z).shape == (2, 3, 512, 512)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        codec.decoded(z)
    assert compiler.failures == compiler.unprepared == 0


@pytest.mark.parametrize("rows", [1, 40, 2**28])
@torch.no_grad()
def test_a_vaes_attention_in_two_products_is_the_fused_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmd2.models.stable_diffusion.codec, "MOST_SCORES", rows)
    vae, z = build_vae(), torch.randn(2, 4, 8, 6)
    for attention in (m for m in vae.modules() if type(m).__name__ == "Attention"):
        attention.to_q.weight.mul_(20)  # else it is no more than a mean
    expected = vae.decode(z).sample
    LatentCodec(vae, compiler=Compiler(CPU))
    assert all(isinstance(processor, OneHead) for processor in vae.attn_processors.values())
    assert torch.allclose(vae.decode(z).sample, expected, atol=1e-5)


def test_a_vaes_attention_keeps_no_scores_for_the_way_back() -> None:
    vae, plain, z = build_vae(), build_vae(), torch.randn(2, 4, 32, 32)
    plain.load_state_dict(vae.state_dict())
    LatentCodec(vae, compiler=Compiler(CPU))
    kept: list[int] = []
    gradients = []
    for network in (vae, plain):
        x = z.clone().requires_grad_()
        kept.append(0)

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel() * (tensor.shape[-2:] == (1024, 1024))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network.decode(x).sample.square().mean().backward()
        gradients.append(x.grad)
    assert kept == [0, 0]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("task", [None, 3])
@torch.no_grad()
def test_controls_are_recorded_with_the_network(task: int | None) -> None:
    network = unet()
    torch.manual_seed(6)
    if task is None:
        net: Any = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8, 8, 16, 16))
    else:
        net = ControlNetUnionModel(
            **{
                key: network.config[key]
                for key in signature(ControlNetUnionModel).parameters
                if key in network.config
            },
            conditioning_embedding_out_channels=(8, 8, 16, 16),
            num_trans_channel=32,
            num_proj_channel=32,
            num_trans_head=2,
        )
    for parameter in net.eval().requires_grad_(False).parameters():
        if not parameter.any():  # a new one adds nothing
            nn.init.normal_(parameter, std=0.05)
    compiler = Compiler(CPU, backend="eager")
    image, x, cond = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8), torch.randn(2, 4, 16, 16), condition(2)
    sigma = torch.full((2,), 5.0)
    expected = StableDiffusion(network)(x, sigma, cond, ControlModel(net, CPU, task).guide(image, [999], 0.7))
    denoiser, control = StableDiffusion(network, compiler=compiler), ControlModel(net, CPU, task, compiler)
    with compiler.recording():
        denoiser(x, sigma, cond, control.guide(image, [999], 0.3))
    with torch.compiler.set_stance("fail_on_recompile"):
        found = denoiser(x, sigma, cond, control.guide(image, [999], 0.7))
    assert torch.allclose(found, expected, atol=1e-5) and compiler.unprepared == compiler.failures == 0


def test_attention_is_timed_by_what_it_is_asked_for() -> None:
    q = torch.randn(1, 2, 64, 16)
    flash, math = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH

    def attend(x: Tensor | None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)

    assert set(fastest_attention(attend, (q,), (flash, math))) == {flash, math}
    # Kernels that a device has not come last, in the order given.
    missing = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    assert fastest_attention(attend, (q,), (*missing, math)) == [math, *missing]
    assert fastest_attention(lambda x: x, (q,), missing) == [*missing]  # there is none


# Joint projections, 8 bits


@torch.no_grad()
def test_fused_projections_compute_the_same_without_more_memory() -> None:
    network = unet()
    x, cond = torch.randn(2, 4, 16, 16), condition(2)
    sigma = torch.tensor([1.0, 0.5])
    before = StableDiffusion(network)(x, sigma, cond)
    size = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}.values())
    fuse_projections(network)
    after = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}.values())
    assert after == size
    fused = [module for module in network.modules() if getattr(module, "fused_projections", False)]
    assert {hasattr(module, "to_qkv") for module in fused} == {True, False}  # self- and cross-attention
    assert torch.allclose(StableDiffusion(network)(x, sigma, cond), before, atol=1e-5)
    assert not any(p.requires_grad for p in network.parameters())
    # What changes a single projection in place changes the joint one.
    for module in fused:
        module.to_v.weight.mul_(0)
    gone = StableDiffusion(network)(x, sigma, cond)
    assert float((gone - before).abs().max()) > 1e-3
    for module in fused:
        joint = module.to_qkv if hasattr(module, "to_qkv") else module.to_kv
        assert not joint.weight[-module.to_v.out_features :].any() and joint.weight.any()


def multiplies_8_bit_floats() -> bool:
    """Whether torch has the product with a scale for each row on a CPU: 2.13 does, 2.11 does not."""
    try:
        Fp8Linear(nn.Linear(16, 16).requires_grad_(False))(torch.ones(16, 16))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


needs_8_bit_floats = pytest.mark.skipif(not multiplies_8_bit_floats(), reason="this torch cannot on a CPU")


@needs_8_bit_floats
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bit_linears_are_the_linears_but_for_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).to(dtype)
    linear.weight[3] *= 100  # outputs and rows of other sizes have scales of their own
    x = torch.randn(2, 5, 64).to(dtype)
    x[1, 2] *= 1000
    x[0, 0] = 0
    found, expected = Fp8Linear(linear)(x), linear(x)
    assert found.shape == expected.shape and found.dtype == dtype and found.isfinite().all()
    assert torch.equal(found[0, 0], linear.bias)
    # Each row and each output has a scale of its own: none is lost for another's being large.
    error, size = (found - expected).float()[0, 1:], expected.float()[0, 1:]
    for kept in (error[:, 3].norm() / size[:, 3].norm(), error[:, 4:].norm() / size[:, 4:].norm()):
        assert 0 < kept < 0.1


@needs_8_bit_floats
@torch.no_grad()
def test_an_8_bit_unet_draws_about_the_same() -> None:
    network = unet()
    x, sigma, cond = torch.randn(2, 4, 16, 16), torch.tensor([14.6, 1.0]), condition(2)
    expected = StableDiffusion(network)(x, sigma, cond) - x
    fuse_projections(network)
    before = {name: p.data_ptr() for name, p in network.named_parameters()}
    assert quantize_linears(network) > 10
    left = {n for n, m in network.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in n}
    # Keys and values of cross-attention; what is not run, for a joint projection is, takes no memory of its own.
    assert {".".join(n.split(".")[-2:]) for n in left} == {
        *(f"attn1.to_{x}" for x in "qkv"),
        *(f"attn2.to_{x}" for x in ("k", "v", "kv")),
    }
    assert all(before[name] == p.data_ptr() for name, p in network.named_parameters())
    assert not any(name.endswith("attn1.to_qkv.weight") for name, _ in network.named_parameters())
    found = StableDiffusion(network)(x, sigma, cond) - x
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    assert not has_fp8(CPU)


@torch.no_grad()
def test_what_is_prepared_in_the_middle_of_an_image_follows_loras() -> None:
    """A network that a request names first is loaded in inference mode, whose tensors cannot be changed outside."""
    network = unet()
    with torch.inference_mode():
        Placement(compiler=Compiler(CPU), go_fast=True).prepare_module("unet", network)
    assert not any(tensor.is_inference() for tensor in (*network.parameters(), *network.buffers()))
    layers = [module for module in network.modules() if isinstance(module, Fp8Linear)]
    before = layers[0].scale.clone()
    for layer in layers:
        layer.source.weight.mul_(2)
        layer.round()
    assert layers and torch.allclose(layers[0].scale, 2 * before)


# Kernels that outlive the process

CHILD = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from dmd2.runtime.compiled import restore_kernels, save_kernels
path = Path(sys.argv[1])
restored = restore_kernels(path)
function = torch.compile(lambda x: (x.sin() + 1).cos() * 3, fullgraph=True)
value = float(function(torch.ones(7)).sum())
print(restored, counters["inductor"]["fxgraph_cache_hit"], round(value, 4), save_kernels(path))
"""


def child(path: Path, cache: Path) -> list[str]:
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [sys.executable, "-c", CHILD, str(path)]
    root = Path(dmd2.runtime.compiled.__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.slow
def test_kernels_saved_by_one_process_are_found_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "torch.bin"
    assert child(path, tmp_path / "a") == ["False", "0", "-5.615", "True"] and path.is_file()
    assert child(path, tmp_path / "b") == ["True", "1", "-5.615", "True"]  # a new machine, but for this file


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign"])
def test_a_damaged_cache_is_ignored_with_a_line_in_the_log(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: loaded.append(data) or object())
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"kernels", None))
    path = tmp_path / "compiled" / "torch.bin"
    assert save_kernels(path) and restore_kernels(path) and loaded == [b"kernels"]
    content = path.read_bytes()
    broken = {"cut": content[:-1], "changed": content[:-1] + b"!", "empty": b"", "foreign": b"kernels"}
    path.write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING):
        assert not restore_kernels(path)
    assert f"{path}: damaged" in caplog.text and loaded == [b"kernels"]
    assert [p.name for p in path.parent.iterdir()] == ["torch.bin"]


def test_a_missing_cache_is_nothing_to_speak_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not restore_kernels(tmp_path / "torch.bin") and not caplog.records


def test_each_torch_and_each_device_has_its_own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {cache_path(tmp_path, CPU)}
    for name in ("NVIDIA H200", "NVIDIA A100-SXM4/80GB"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        paths.add(cache_path(tmp_path, torch.device("cuda")))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    paths.add(cache_path(tmp_path, CPU))
    assert len(paths) == 4 and {p.parent for p in paths} == {tmp_path / "compiled"}


# Traced on a CPU


class Doubled(nn.Module):
    """Counts its calls in Python, which a record does not make."""

    calls = 0

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return (x * 2, x) if y is None else (x * 2 + y, y)


def test_a_trace_serves_every_batch_size_of_its_shapes_and_only_these() -> None:
    network = Doubled()
    traced = Traced(network)
    one, two = torch.randn(2, 3), torch.randn(5, 3)
    assert torch.equal(traced(one, None)[0], 2 * one) and network.calls == 1  # outside of `recording` none is made
    with traced.recording():
        traced(one, None)
        traced(one, one)
    recorded = network.calls
    assert torch.equal(traced(two, None)[0], 2 * two) and torch.equal(traced(two, two)[0], 3 * two)
    assert network.calls == recorded
    for other in (torch.randn(2, 4), one.double()):
        assert torch.equal(traced(other, None)[0], 2 * other)
    assert network.calls == recorded + 2


# In an engine


def test_an_engine_draws_the_same_with_compiled_networks(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = tmp_path / "compiled" / "torch.bin"
    placement = Placement(Plan("full"), compiler=Compiler(CPU, backend="eager"), kernels=kernels)
    prompts = [f"an owl {i}" for i in range(5)]
    expected = Engine(weights, "cpu", modes=("1", "4")).generate(prompts, [*range(5)], "4")
    monkeypatch.setattr(dmd2.models.stable_diffusion.model, "place", lambda *args, **kwargs: placement)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"kernels", None))
    engine = Engine(weights, "cpu", modes=("1", "4"), trace=True)
    with caplog.at_level(logging.INFO):
        engine.warm_up(("4",), [(64, 64)], 1)
    assert "memory: full, peak" in caplog.text and "not compiled" not in caplog.text
    assert kernels.read_bytes().endswith(b"kernels")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    found = engine.generate(prompts, [*range(5)], "4")
    assert int((found.int() - expected.int()).abs().max()) <= 1 and float(expected.float().std()) > 1
    for i in range(5):  # each alone: nobody has another's image
        alone = engine.generate([prompts[i]], [i], "4")
        assert int((alone.int() - expected[i].int()).abs().max()) <= 1
    long = " a" * 40
    assert engine.model.encode_text.token_chunks(long) == 2
    engine.generate([long], [0], "4")
    compiler = engine.model.placement.compiler
    assert compiler is not None and compiler.unprepared == 0
    assert engine.generate(prompts[:1], [0], "4", (96, 64)).shape == (1, 3, 64, 96)
    assert compiler.unprepared > 0
    assert engine.generate(prompts[:1], [0], "1").shape == (1, 3, 64, 64)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # no request was compiled for
