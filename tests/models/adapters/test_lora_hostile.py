"""Whatever a file holds, it is a LoRA or one clear, short line; and it costs little."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

import dmd2.models.adapters.lora
from dmd2.models.adapters.lora import Fused, read_lora
from dmd2.runtime.errors import UserError

KEY = "lora_te1_fc"
DOWN, UP, ALPHA = f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight", f"{KEY}.alpha"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.norm = nn.Linear(4, 6), nn.Conv2d(4, 6, 3), nn.LayerNorm(4)


def packed(header: Any, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(*shape: int, at: tuple[int, int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_lora(path)
    message = str(error.value)
    assert message.startswith("LoRA x.safetensors: ") and len(message) <= 500 and message.isprintable()
    return message.removeprefix("LoRA x.safetensors: ")


PAIR = {DOWN: entry(2, 4, at=(0, 32)), UP: entry(6, 2, at=(32, 80))}
DEEP = "[" * 100_000


def metadata(**content: str) -> bytes:
    return packed({"__metadata__": content, **PAIR}, bytes(80))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (metadata(lora_adapter_metadata=DEEP), "lora_adapter_metadata: nested too deeply"),
        (metadata(ss_network_args=DEEP), "ss_network_args: nested too deeply"),
        (metadata(lora_adapter_metadata=" " * 2_000_000), "lora_adapter_metadata: longer than 1000000 characters"),
        (metadata(lora_adapter_metadata="[]"), "lora_adapter_metadata: expected an object"),
        (metadata(lora_alpha="NaN"), "lora_alpha: NaN; expected a number"),
        (metadata(ss_network_alpha="x" * 9_000), "ss_network_alpha: xxxx"),
        (packed(DEEP.encode()), "cannot be read as safetensors"),
        (packed({DOWN: entry(0, 4, at=(0, 0)), UP: entry(6, 0, at=(0, 0))}), r"down is \[0, 4\]: empty"),
        (packed({DOWN: entry(2**64 - 1, 0, at=(0, 0))}), r"down\.weight: has the shape \[18446744073709551615, 0\]"),
        (packed({DOWN: entry(2**64 - 1, at=(0, 4))}, bytes(4)), "cannot be read as safetensors"),
        (packed({DOWN: entry(*[1] * 60, at=(0, 4))}, bytes(4)), r"has the shape \[1, 1, 1"),
        (
            packed({**PAIR, ALPHA: entry(3, at=(80, 92))}, bytes(92)),
            r"alpha: has the shape \[3\]; expected one number",
        ),
        (packed({**PAIR, ALPHA: entry(at=(80, 84))}, bytes(82) + b"\xc0\x7f"), "alpha: has values that are NaN"),
        (
            packed(PAIR, bytes(78) + b"\x80\x7f"),
            r"up\.weight: has values that are NaN or infinite: the file is damaged",
        ),
        (packed({DOWN: entry(2, 4, at=(0, 64), dtype="C64")}, bytes(64)), "is torch.complex64"),
        (packed({DOWN: entry(2, 4, at=(0, 4), dtype="F4")}, bytes(4)), "cannot be read"),
        (packed({DOWN: entry(2, 4, at=(0, 32)), UP: entry(6, 3, at=(32, 104))}, bytes(104)), "factors do not match"),
        (packed({DOWN: entry(8, at=(0, 32)), UP: entry(6, 2, at=(32, 80))}, bytes(80)), "factors do not match"),
        (
            packed({"x" * 9_000_000: entry(1, at=(0, 4))}, bytes(4)),
            "a name of 9000000 characters; expected at most 500",
        ),
        (packed({"x" * 400: entry(1, at=(0, 4))}, bytes(4)), "holds nothing: x{30,}.*… ?x* is no name"),
        (packed({"\n\x1b[2J": entry(1, at=(0, 4))}, bytes(4)), "holds nothing"),
        (packed(b" " * 20_000_001 + b"{}", bytes(4)), "lists 20 MB of names"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_files_are_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    assert re.search(message, refused(tmp_path / "x.safetensors", content))


def test_many_tensors_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> Tensor:
        raise AssertionError("read")

    monkeypatch.setattr(dmd2.models.adapters.lora, "_read", read)
    many = {f"lora_unet_{n}.alpha": entry(at=(4 * n, 4 * n + 4)) for n in range(20_001)}
    assert (
        refused(tmp_path / "x.safetensors", packed(many, bytes(4 * 20_001)))
        == "20001 tensors; expected at most 20000"
    )


def test_weights_that_overflow_are_told_from_a_bad_dtype_and_taken_back(tmp_path: Path) -> None:
    network = Small().half()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({DOWN: torch.full((2, 4), 3e4), UP: torch.full((6, 2), 3e4)}))
    fused = Fused({"text_encoder": network})
    with pytest.raises(UserError, match=r"^LoRA x\.safetensors: makes weights that are too large for the model"):
        fused.use([(read_lora(path), 1.0)])
    assert not fused and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 9, 2**31, 2**64 - 1]), max_size=5)
TEXT_TO_IMAGE = {"lora_down.weight": [2, 4], "lora_up.weight": [6, 2]}
KINDS: list[dict[str, list[int]]] = [  # of a layer (6, 4)
    TEXT_TO_IMAGE,
    {**TEXT_TO_IMAGE, "alpha": []},
    {**TEXT_TO_IMAGE, "dora_scale": [6, 1], "lora_up.bias": [6]},
    {**TEXT_TO_IMAGE, "lora_magnitude_vector": [6]},
    {"lora_A.default.weight": [2, 4], "lora_B.default.weight": [6, 2]},
    {"hada_w1_a": [6, 2], "hada_w1_b": [2, 4], "hada_w2_a": [6, 2], "hada_w2_b": [2, 4]},
    {"lokr_w1": [3, 2], "lokr_w2": [2, 2], "alpha": []},
    {"lokr_w1": [3, 2], "lokr_w2_a": [2, 2], "lokr_w2_b": [2, 2], "alpha": []},
    {"diff": [6, 4], "diff_b": [6]},
]
OTHERS = st.sampled_from(
    ["lora_mid.weight", "hada_t1", "lokr_t2", "lokr_w1", "diff", "oft_blocks", "bundle_emb.x", "alpha"]
)
DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "I64", "BOOL", "C64", "F4", "Q9"])
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8_E4M3": 1, "I64": 8, "BOOL": 1, "C64": 8, "F4": 1, "Q9": 1}
SETTINGS = st.dictionaries(
    st.sampled_from(
        ["r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "init_lora_weights"]
    ),
    st.one_of(
        st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=5), st.dictionaries(st.text(), st.floats())
    ),
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A list of tensors whose sizes mostly are those of their shapes, and the bytes that they need."""
    header: dict[str, Any] = {}
    at = 0
    prefix = draw(
        st.sampled_from([KEY, KEY, "text_encoder.fc", "lora_te1_conv", "base_model.model.text_model.fc", "x"])
    )
    tensors = dict(draw(st.sampled_from(KINDS)))
    if draw(st.booleans()):
        tensors[draw(OTHERS)] = draw(SHAPES)
    wrong = draw(st.sampled_from([None, None, *tensors]))
    for name, shape in tensors.items():
        name, dtype = f"{prefix}.{name}", "F32"
        if name == f"{prefix}.{wrong}":
            shape, dtype = draw(st.one_of(st.just(shape), SHAPES)), draw(DTYPES)
        size = SIZES[dtype]
        for length in shape:
            size *= length
        size = min(size, 100_000) + draw(st.sampled_from([0] * 30 + [1]))
        header[name] = entry(*shape, at=(at, at + size), dtype=dtype)
        at += size
    if draw(st.booleans()):
        told = {f"text_encoder.{key}": value for key, value in draw(SETTINGS).items()}
        header["__metadata__"] = {
            "lora_adapter_metadata": json.dumps(told),
            "lora_alpha": draw(st.text(max_size=9)),
        }
    return header, at


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    header=headers(),
    fill=st.sampled_from([0, 1, 60, 63, 190, 127, 255]),
    cut=st.sampled_from([0] * 9 + [-3, 3]),
    flips=st.one_of(st.just([]), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=2)),
)
def test_any_file_is_a_lora_or_one_clear_line(
    tmp_path: Path, header: tuple[dict[str, Any], int], fill: int, cut: int, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(packed(header[0], bytes([fill]) * max(0, header[1] + cut)))
    for place, value in flips:
        content[place % len(content)] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    network = Small()
    try:
        lora = read_lora(path)
        Fused({"text_encoder": network}).use([(lora, 1.0)])
        assert all(bool(value.isfinite().all()) for value in network.state_dict().values())
    except UserError as error:
        message = str(error)
        assert message.startswith("LoRA x.safetensors: ") and len(message) <= 700 and message.isprintable()
