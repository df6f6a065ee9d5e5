"""Networks prepared for the shapes that are asked for most: compiled by Inductor, launched as one CUDA graph.

On a GPU an image of one step is a few thousand kernels, most of them shorter than Python takes to launch them.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dmd2.runtime.errors import first_line
from dmd2.runtime.files import atomic_bytes

FP8_MAX = 448.0  # the largest number of float8_e4m3fn

Function = Callable[..., Any]
"""Tensors (or None) of a batch → a tensor or a tuple of tensors of the same batch; the batch is dimension 0."""

Blocks = dict[nn.Module, Any]
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")
"""classes of diffusers' blocks that a UNet repeats: compiled one by one, 70 of SDXL's are the same code twice"""
ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
ROUNDS = 3

logger = logging.getLogger(__name__)


class Recorder:
    """What prepares for the shapes that it sees within `recording()`."""

    recording_now = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls in here prepare for their shapes; it may take minutes."""
        self.recording_now = True
        with searching():
            try:
                yield
            finally:
                self.recording_now = False


@contextmanager
def searching() -> Iterator[None]:
    """cuDNN times its algorithms for each new shape, which takes seconds, and keeps to the fastest afterwards."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Compiler(Recorder):
    """Prepares functions for the shapes that they are called with within `recording()`.

    Args:
        device: on a GPU each shape becomes a CUDA graph; all graphs share one pool of memory.
        compile: False leaves out the compiler (Inductor needs one for C, and time: a minute or so a shape).
        backend: of `torch.compile`.
    """

    def __init__(self, device: torch.device, compile: bool = True, backend: str = "inductor") -> None:
        self.failures = 0
        """shapes that could not be prepared, so far: they run as they are"""
        self.unprepared = 0
        """calls, so far, that ran as they are although they were served, for nothing was prepared for their shape"""
        self._compile, self._backend, self._device = compile, backend, device
        self._blocks: dict[nn.Module, Blocks] = {}
        self._capture = cuda_graphs(torch.cuda.graph_pool_handle()) if device.type == "cuda" else uncaptured
        # One code object serves all shapes, all blocks of a kind and both students.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)

    def __call__(
        self,
        function: Function,
        *,
        compile: bool = True,
        most: int | None = None,
        blocks: nn.Module | None = None,
    ) -> Prepared:
        """`function` prepared: compiled unless that is not wanted, for batches of at most `most`.

        Of a network that repeats its `blocks`, these are compiled and not the whole, which would be traced and
        compiled anew for each shape; it is still captured as one.
        """
        chosen = function
        if compile and self._compile:
            options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": self._backend}
            if blocks is None:
                chosen = torch.compile(function, **options)
            else:
                if blocks not in self._blocks:
                    self._blocks[blocks] = compiled_blocks(blocks, options)
                chosen = in_blocks(function, self._blocks[blocks])
        return Prepared(function, partial(self._capture, chosen), self, most)

    def attention(self, function: Function, inputs: tuple[Tensor | None, ...]) -> AbstractContextManager[None]:
        """Within it attention runs by the kernels that are the fastest for what `function` asks of them."""
        if self._device.type != "cuda":
            return nullcontext()
        order = fastest_attention(function, inputs, ATTENTION)
        return sdpa_kernel([*order, SDPBackend.MATH], set_priority=True)


def compiled_blocks(network: nn.Module, options: dict[str, Any]) -> Blocks:
    """The network's `REGIONS`, each with its compiled call, which is not used yet."""
    blocks: Blocks = {}
    for module in network.modules():
        if type(module).__name__ in REGIONS:
            module.compile(**options)
            blocks[module], module._compiled_call_impl = module._compiled_call_impl, None
    return blocks


def in_blocks(function: Function, blocks: Blocks) -> Function:
    """`function` with these blocks compiled. Who calls their network otherwise meets them as they were."""

    def run(*inputs: Tensor | None) -> Any:
        for module, compiled in blocks.items():
            module._compiled_call_impl = compiled
        try:
            return function(*inputs)
        finally:
            for module in blocks:
                module._compiled_call_impl = None

    return run


class Prepared:
    """A function of tensors that is fast for the shapes it was prepared for.

    Another batch size is put together from batches that were prepared; other shapes run as they would have. So no
    call outside of `Compiler.recording` ever compiles.
    """

    def __init__(
        self,
        function: Function,
        record: Callable[[tuple[Tensor | None, ...]], Function],
        compiler: Compiler,
        most: int | None = None,
    ) -> None:
        self.function = function
        self._record, self._compiler, self._most = record, compiler, most
        self._records: dict[tuple[Any, ...], dict[int, Function]] = {}  # by shape, by batch size

    def __call__(self, *inputs: Tensor | None) -> Any:
        batch = next(len(x) for x in inputs if x is not None)
        key = tuple(None if x is None else (x.shape[1:], x.dtype) for x in inputs)
        if self._compiler.recording_now:
            self._prepare(key, min(batch, self._most or batch), inputs)
        records = self._records.get(key, {})
        size = max((n for n in records if n <= batch), default=0)
        if size == 0:
            self._compiler.unprepared += not self._compiler.recording_now
            return self.function(*inputs)
        outputs = records[size](*(None if x is None else x[:size] for x in inputs))
        if size == batch:
            return outputs
        rest = self(*(None if x is None else x[size:] for x in inputs))
        if isinstance(outputs, Tensor):
            return torch.cat([outputs, rest])
        return tuple(torch.cat(pair) for pair in zip(outputs, rest, strict=True))

    def _prepare(self, key: tuple[Any, ...], batch: int, inputs: tuple[Tensor | None, ...]) -> None:
        records = self._records.setdefault(key, {})
        if batch in records:
            return
        own = tuple(None if x is None else x[:batch].clone() for x in inputs)
        try:
            with self._compiler.attention(self.function, own):
                records[batch] = self._record(own)
        except Exception as error:  # whatever a compiler may raise: images can be generated without it
            self._compiler.failures += 1
            logger.warning(
                "not compiled for %s, batch %d: %s: %s", key, batch, type(error).__name__, first_line(error)
            )


class Traced(Recorder):
    """A network and TorchScript records of it, one for each combination of input shapes but for the batch size."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()
        self._records: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *inputs: Tensor | None) -> Any:
        """The network's output. Inputs that are None come last: they are left to the network's defaults."""
        given = tuple(x for x in inputs if x is not None)
        key = tuple((x.shape[1:], x.dtype) for x in given)
        if self.recording_now and key not in self._records:
            # Tracing warns of each branch on a shape; a record is only ever used for the shapes it was made with.
            with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
                warnings.simplefilter("ignore")
                record = torch.jit.trace(self.network, tuple(x.clone() for x in given), check_trace=False)
                self._records[key] = torch.jit.freeze(record)
        return self._records.get(key, self.network)(*given)


class _Noted(TorchFunctionMode):
    """Counts the calls of attention by what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[int, Function]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = sorted((name, getattr(value, "shape", value)) for name, value in kwargs.items())
            key = str(([(x.shape, x.stride(), x.dtype) for x in args if isinstance(x, Tensor)], named))
            count, call = self.calls.get(key, (0, partial(func, *args, **kwargs)))
            self.calls[key] = count + 1, call
        return func(*args, **kwargs)


def fastest_attention(
    function: Function, inputs: tuple[Tensor | None, ...], backends: Sequence[SDPBackend]
) -> list[SDPBackend]:
    """`backends`, those first that take least time for all the attention in `function`, by a measurement.

    Those that cannot do it come last, in the order given.
    """
    with _Noted() as noted:
        function(*inputs)
    taken = {backend: sum(n * _seconds(call, backend) for n, call in noted.calls.values()) for backend in backends}
    if noted.calls:
        told = ", ".join(f"{backend.name.lower()} {1000 * seconds:.2f} ms" for backend, seconds in taken.items())
        logger.debug("attention: %s", told)
    return sorted(backends, key=taken.__getitem__)


def _seconds(call: Function, backend: SDPBackend) -> float:
    """The best of some rounds; infinite if the backend does not do it."""
    best = float("inf")
    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of why a backend cannot
            for _ in range(ROUNDS + 1):
                began = time.perf_counter()
                out = call()
                if out.is_cuda:
                    torch.cuda.synchronize(out.device)
                best = min(best, time.perf_counter() - began)
    except RuntimeError:
        return float("inf")
    return best


def uncaptured(function: Function, inputs: tuple[Tensor | None, ...]) -> Function:
    """Compiles a function by one call, without capturing it in a CUDA graph."""
    function(*inputs)
    return function


def cuda_graphs(pool: Any) -> Callable[[Function, tuple[Tensor | None, ...]], Function]:
    """Captures functions in CUDA graphs that share `pool`.

    Sharing is safe although graphs overwrite each other's memory: they are replayed one after the other, inputs lie
    outside the pool, and outputs are copied out of it at once (or the next call would overwrite them).
    """

    side = torch.cuda.Stream()  # one for all: libraries keep a workspace for each stream that they have seen

    def capture(function: Function, inputs: tuple[Tensor | None, ...]) -> Function:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):  # compiles, chooses algorithms, makes workspaces: none may be captured
            for _ in range(3):
                function(*inputs)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        return replaying(graph.replay, inputs, outputs)

    return capture


def replaying(replay: Callable[[], None], inputs: tuple[Tensor | None, ...], outputs: Any) -> Function:
    """A captured function: `replay` computes `outputs` from `inputs`, in place."""

    def call(*given: Tensor | None) -> Any:
        for static, x in zip(inputs, given, strict=True):
            if static is not None and x is not None:
                static.copy_(x)
        replay()
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(x.clone() for x in outputs)

    return call


def fuse_projections(unet: Any) -> None:
    """One matrix product for query, key and value in self-attention, and for key and value in cross-attention.

    The single weights become views of the joint one: they take no memory, and what changes them in place (a LoRA,
    say) changes the joint one too.
    """
    unet.fuse_qkv_projections()
    for attention in unet.modules():
        if not getattr(attention, "fused_projections", False):
            continue
        joint = attention.to_qkv if hasattr(attention, "to_qkv") else attention.to_kv
        names = ("to_q", "to_k", "to_v") if hasattr(attention, "to_qkv") else ("to_k", "to_v")
        singles = [getattr(attention, name) for name in names]
        joint.requires_grad_(singles[0].weight.requires_grad)
        for field in ("weight", "bias"):
            if getattr(joint, field) is None:
                continue
            parts = getattr(joint, field).data.split([single.out_features for single in singles])
            for single, part in zip(singles, parts, strict=True):
                getattr(single, field).data = part


class Fp8Linear(nn.Module):
    """x·Wᵀ + b with both factors rounded to 8 bits (e4m3): a scale for each row of x and for each output.

    torchao's layers do the same for bf16 alone, on a GPU alone, and their weights cannot be changed where they lie,
    as LoRAs do under a captured graph.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._source = (linear,)  # not a child: its weights are no part of the network any more
        weight, scale = self._rounded()
        self.weight, self.scale = nn.Buffer(weight), nn.Buffer(scale)
        self.bias = linear.bias

    @property
    def source(self) -> nn.Linear:
        """The layer as it was: LoRAs go into its weights, see `round`."""
        return self._source[0]

    def _rounded(self) -> tuple[Tensor, Tensor]:
        weight = self.source.weight.detach().float()
        scale = (weight.abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
        return (weight / scale).to(torch.float8_e4m3fn), scale.t().contiguous()

    def round(self) -> None:
        """Takes over what `source` has come to be, in place: captured graphs go on being right."""
        for own, new in zip((self.weight, self.scale), self._rounded(), strict=True):
            own.copy_(new)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out) in x's dtype."""
        rows = x.flatten(0, -2)
        scale = (rows.abs().amax(1, keepdim=True).float() / FP8_MAX).clamp(min=1e-12)
        rounded = (rows.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        # A scale for each row is what CUDA has kernels for with bf16 outputs only.
        product = F.scaled_mm(
            rounded,
            self.weight.t(),
            scale,
            F.ScalingType.RowWise,
            self.scale,
            F.ScalingType.RowWise,
            output_dtype=torch.bfloat16,
            use_fast_accum=True,  # sums of 8-bit products need no more bits than a Hopper's fast ones have
        )
        product = product.to(x.dtype).unflatten(0, x.shape[:-1])
        return product if self.bias is None else product + self.bias


def quantize_linears(unet: Any) -> int:
    """Replaces the linear layers of a UNet's transformer blocks, two thirds of SDXL's work at 1024², by `Fp8Linear`.

    Images change a little. Left as they are: keys and values of cross-attention, 77 rows that take longer to round
    than to multiply, and single projections of which a joint one is in use. Returns how many layers it were.
    """
    found = []
    for path, parent in unet.named_modules():
        if "transformer_blocks" not in path:
            continue
        unused = {"to_k", "to_v"} | ({"to_q"} if hasattr(parent, "to_qkv") else set())
        left = unused if getattr(parent, "fused_projections", False) else set()
        left |= {"to_kv", "to_k", "to_v"} if path.endswith(".attn2") else set()
        found += [
            (parent, name, child)
            for name, child in parent.named_children()
            if isinstance(child, nn.Linear)
            and name not in left
            and child.in_features % 16 == child.out_features % 16 == 0
        ]
    for parent, name, child in found:
        setattr(parent, name, Fp8Linear(child))
    return len(found)


def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies matrices of 8-bit floats: Ada, Hopper and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def cache_path(folder: Path, device: torch.device) -> Path:
    """Where compiled kernels are kept: each version of torch and each kind of GPU has its own file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return folder / "compiled" / (re.sub(r"[^\w.+-]+", "-", f"torch-{torch.__version__}-{name}") + ".bin")


def restore_kernels(path: Path) -> bool:
    """Makes torch remember the kernels that an earlier process saved. A damaged file is ignored.

    It holds pickles and machine code: whoever can write there can run what he likes.
    """
    if not path.is_file():
        return False
    content = path.read_bytes()
    checksum, artifacts = content[:32], content[32:]
    if hashlib.sha256(artifacts).digest() != checksum or torch.compiler.load_cache_artifacts(artifacts) is None:
        logger.warning("%s: damaged, ignored; networks are compiled anew", path)
        return False
    logger.info("compiled kernels: %s, %.0f MB", path, len(artifacts) / 1e6)
    return True


def save_kernels(path: Path) -> bool:
    """Keeps what this process compiled for the next one. False if it compiled nothing."""
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_bytes(path, hashlib.sha256(saved[0]).digest() + saved[0])
    return True
