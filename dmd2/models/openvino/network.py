"""One network as OpenVINO runs it: torch's tensors in, torch's tensors out. Loading one needs no torch."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

HINTS = {"float32": "f32", "bfloat16": "bf16"}
"""what OpenVINO computes in, for the names of torch's dtypes that it is used for"""


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
    return {"openvino": openvino.get_version(), "cpu": sorted(able), "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "")}


def _settings(dtype: str) -> dict[str, object]:
    settings: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[dtype],
        # Else it binds its threads to cores: those of two processes to the same ones.
        "ENABLE_CPU_PINNING": False,
    }
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return settings | ({"INFERENCE_NUM_THREADS": int(threads)} if threads.isdecimal() else {})


def converted(network: nn.Module, example: tuple[Tensor, ...], dtype: str) -> bytes:
    """A network of positional tensors, compiled for any batch and size: what `Network` takes.

    Args:
        example: inputs of a batch of two, as sizes of one are taken for constants.
        dtype: to compute in, one of `HINTS`.
    """
    import torch

    openvino, core = _openvino()
    # Tracing warns of each branch on a shape; callers use a record only where all of these go the same way.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(network.eval(), example_input=tuple(x.clone() for x in example))
    compiled = core.compile_model(model, "CPU", _settings(dtype))
    return bytes(compiled.export_model().getvalue())


class Network:
    """What `converted` made, loaded. For one thread at a time.

    Args:
        content: of this version of OpenVINO on such a CPU, see `runs_on`.
        dtype: that it was converted for.
    """

    def __init__(self, content: bytes | memoryview, dtype: str) -> None:
        _, core = _openvino()
        compiled = core.import_model(io.BytesIO(content), "CPU", _settings(dtype))
        self._request, self._dtype = compiled.create_infer_request(), dtype
        self._kinds = [x.get_element_type().to_dtype() for x in compiled.inputs]

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """The network's outputs, which the next call does not overwrite. Inputs that are None are left out."""
        import torch

        given = [self._plain(x) for x in inputs if x is not None]
        found = self._request.infer(given, share_inputs=True)
        return tuple(torch.from_numpy(x).to(getattr(torch, self._dtype)) for x in found.to_tuple())

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
