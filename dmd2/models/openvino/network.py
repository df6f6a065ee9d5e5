"""One network as OpenVINO runs it: torch's tensors in, torch's tensors out. Loading one needs no torch."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

HINTS = {"float32": "f32", "bfloat16": "bf16"}
"""what OpenVINO computes in, for the names of torch's dtypes that it is used for"""
GROUP = 128
"""numbers of a product's input that share a scale, where its weights are int8: products are then of integers"""
INT8_MAX = 127


@lru_cache(maxsize=1)
def _openvino() -> tuple[Any, Any]:
    """The package and its `Core`."""
    # Where this package of theirs is installed, importing OpenVINO reports to its makers. None makes that impossible.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino, openvino.Core()


def runs_on() -> dict[str, object]:
    """What compiled networks depend on besides their weights: OpenVINO's version and the CPU's abilities."""
    openvino, core = _openvino()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {"openvino": openvino.get_version(), "cpu": sorted(able)}


def _settings(dtype: str) -> dict[str, object]:
    _, core = _openvino()
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[dtype] if has_bf16 else "f32",
        # Else it binds its threads to cores: those of two processes to the same ones.
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
    }
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return settings | ({"INFERENCE_NUM_THREADS": int(threads)} if threads.isdecimal() else {})


def converted(network: nn.Module, example: tuple[Tensor, ...], dtype: str) -> bytes:
    """A network of positional tensors, compiled for any batch and size: a `content` of `Network`.

    Args:
        example: inputs of a batch of two, as sizes of one are taken for constants.
        dtype: to compute in, one of `HINTS`.
    """
    _, core = _openvino()
    compiled = core.compile_model(_graph(network, example), "CPU", _settings(dtype))
    return bytes(compiled.export_model().getvalue())


def write_graph(network: nn.Module, example: tuple[Tensor, ...], folder: Path, int8: bool) -> tuple[Path, Path]:
    """As `converted`, for a large network: not compiled, so that its weights are in memory once, if at all.

    Args:
        network: in fp16; it is of no use afterwards.
        folder: for two files, the graph and its weights.
        int8: rounds the weights of linear layers to 8 bits, with a scale for each output.
    """
    openvino, _ = _openvino()
    from openvino.frontend.pytorch import ModuleExtension
    from torch import full, nn

    # Linear layers, most of the weights, are noted and not run, and stay in fp16; all else is traced in fp32.
    linear = ModuleExtension(
        nn.Linear,
        "ov_ext::linear",
        evaluate=lambda layer, x, *_: full((*x.shape[:-1], layer.out_features), 0.5),
        convert=lambda layer, operation, x: operation(x, layer.weight, layer.bias),
    )
    for module in network.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point() and type(module) is not nn.Linear:
                tensor.data = tensor.data.float()
    model = _graph(network, tuple(x.float() if x.is_floating_point() else x for x in example), linear)
    if int8:
        _round_weights(model)
    graph = folder / "network.xml"
    openvino.save_model(model, graph, compress_to_fp16=False)
    return graph, graph.with_suffix(".bin")


def _graph(network: nn.Module, example: tuple[Tensor, ...], extension: Any = None) -> Any:
    import torch

    openvino, _ = _openvino()
    # Tracing warns of each branch on a shape; callers use a record only where all of these go the same way.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = tuple(x.clone() for x in example)
        return openvino.convert_model(network.eval(), example_input=given, extension=extension)


def _round_weights(model: Any) -> None:
    """Makes constant factors of a graph's products int8 with a scale for each output, in OpenVINO's form of that."""
    import numpy
    from openvino import opset13

    for product in model.get_ops():
        if product.get_type_name() != "MatMul":
            continue
        source = product.input_value(1).get_node()
        if source.get_type_name() == "Convert":  # from fp16
            source = source.input_value(0).get_node()
        if source.get_type_name() != "Constant":
            continue
        weight = source.data.astype(numpy.float32)
        inputs = -1 if product.get_attributes()["transpose_b"] else -2
        largest = numpy.abs(weight).max(inputs, keepdims=True)
        scale = numpy.where(largest > 0, largest / INT8_MAX, 1).astype(numpy.float32)
        rounded = opset13.constant(numpy.rint(weight / scale).astype(numpy.int8))
        scaled = opset13.multiply(opset13.convert(rounded, "f32"), opset13.constant(scale))
        product.input(1).replace_source_output(scaled.output(0))


class Network:
    """What `converted` or `write_graph` made, loaded. For one thread at a time.

    Args:
        content: of this version of OpenVINO on such a CPU, see `runs_on`.
        dtype: to compute in, one of `HINTS`; the one it was converted for.
        weights: if `content` is a graph alone.
    """

    def __init__(self, content: bytes | memoryview, dtype: str, weights: memoryview | None = None) -> None:
        openvino, core = _openvino()
        if weights is None:
            compiled = core.import_model(io.BytesIO(content), "CPU", _settings(dtype))
        else:
            import numpy

            numbers = openvino.Tensor(numpy.frombuffer(weights, numpy.uint8), shared_memory=True)
            compiled = core.compile_model(core.read_model(bytes(content), numbers), "CPU", _settings(dtype))
            self._held = numbers  # OpenVINO reads it, but does not keep it
        self._request = compiled.create_infer_request()
        self._kinds = [x.get_element_type().to_dtype() for x in compiled.inputs]

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """The network's fp32 outputs, which the next call does not overwrite. Inputs that are None are left out."""
        import torch

        given = [self._plain(x) for x in inputs if x is not None]
        found = self._request.infer(given, share_inputs=True)
        return tuple(torch.from_numpy(x) for x in found.to_tuple())

    def rehearse(self, shapes: Sequence[Sequence[int]]) -> None:
        """Runs once, on zeros: the first run of a batch and size makes its kernels.

        Args:
            shapes: of each input of a batch of one, without the batch.
        """
        import numpy

        self._request.infer([numpy.zeros((1, *s), kind) for s, kind in zip(shapes, self._kinds, strict=True)])

    @staticmethod
    def _plain(x: Tensor) -> Any:
        x = x.detach()
        return (x.float() if x.is_floating_point() else x).contiguous().numpy()
