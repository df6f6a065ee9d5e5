"""EDM's pickles: read to the bit in the published format; whatever else they hold is refused and never run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dmd2.models.edm.published
from dmd2.models.edm.folder import load_edm
from dmd2.models.edm.network import EdmConfig, EdmNetwork
from dmd2.models.edm.preconditioning import iddpm_levels
from dmd2.models.edm.published import Record, convert_edm, read_pickle
from dmd2.models.family import export_weights
from dmd2.runtime.errors import UserError
from dmd2.runtime.tensors import read_tensors
from dmd2.weights.manifest import read_manifest

CONFIGS = {
    "ddpmpp": {"classes": 10, "augment_dim": 9, "model_channels": 8, "channel_mult": (2, 2), "attention": (4,)},
    "ncsnpp": {"augment_dim": 9, "model_channels": 8, "channel_mult": (1, 2), "attention": (4,)},
    "adm": {"classes": 5, "model_channels": 64, "channel_mult": (1, 2), "attention": (8, 4)},
}
ARCHITECTURES = pytest.mark.parametrize("name", list(CONFIGS))


def config(name: str) -> EdmConfig:
    return EdmConfig.model_validate(
        {"architecture": name, "resolution": 8, "blocks": 1, "dropout": 0.13, **CONFIGS[name]}
    )


# Writing pickles as EDM does. Its modules are not here, so others stand in under their names.


class Persistent(nn.Module):
    """An object that pickles itself as source code, class name and attributes."""

    def __init__(self, class_name: str, **attributes: Any) -> None:
        super().__init__()
        self.__dict__["class_name"] = class_name
        self.__dict__.update(attributes)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k != "class_name"}
        source = "import os\nos.environ['EDM_PICKLE_RAN'] = '1'\nraise SystemExit\n"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.class_name, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


@pytest.fixture(autouse=True)
def _edm_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("the reader called what a pickle names")

    class EasyDict(dict[str, Any]):
        pass

    for thing, module in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")):
        thing.__module__, thing.__qualname__ = module, thing.__name__
        setattr(sys.modules[module], thing.__name__, thing)


CLASSES = {"Conv": "Conv2d", "Norm": "GroupNorm", "Linear": "Linear", "Block": "UNetBlock"}
CLASSES |= {"_Sinusoids": "PositionalEmbedding", "_Fourier": "FourierEmbedding"}


def persisted(module: nn.Module) -> nn.Module:
    children = {name: persisted(child) for name, child in module._modules.items() if child is not None}
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict(children)
    kind = type(module).__name__
    extra: dict[str, Any] = {"skip_scale": np.sqrt(0.5)} if kind == "Block" else {}
    twin = Persistent(CLASSES.get(kind, kind), _init_args=(), _init_kwargs={}, **extra)
    twin._parameters.update(module._parameters)
    twin._buffers.update(module._buffers)
    if kind == "Conv":
        twin._buffers.setdefault("resample_filter", None)
    twin._modules.update(children)
    return twin


def arguments(c: EdmConfig) -> dict[str, Any]:
    """What EDM's training script passes to `EDMPrecond`."""
    easy: dict[str, Any] = sys.modules["dnnlib.util"].EasyDict()
    easy |= {"img_resolution": c.resolution, "img_channels": c.channels, "label_dim": c.classes, "use_fp16": False}
    easy |= {"model_channels": c.model_channels, "channel_mult": list(c.channel_mult), "dropout": c.dropout}
    easy |= {"num_blocks": c.blocks, "attn_resolutions": list(c.attention), "sigma_max": float("inf"), "sigma_min": 0}
    if c.augment_dim:
        easy["augment_dim"] = c.augment_dim
    if c.architecture == "adm":
        return easy | {"model_type": "DhariwalUNet"}
    easy |= {"model_type": "SongUNet", "decoder_type": "standard"}
    if c.architecture == "ddpmpp":
        easy |= {"embedding_type": "positional", "encoder_type": "standard"}
        return easy | {"channel_mult_noise": 1, "resample_filter": [1, 1]}
    easy |= {"embedding_type": "fourier", "encoder_type": "residual"}
    return easy | {"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}


def network(name: str) -> EdmNetwork:
    torch.manual_seed(len(name))
    built = EdmNetwork(config(name))
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(torch.randn_like(p))
    return built


def snapshot(name: str, **changes: Any) -> dict[str, Any]:
    built = network(name)
    top: Any = persisted(built)
    kwargs = {k: v for k, v in (arguments(built.config) | changes).items() if v is not ...}
    top.__dict__.update(class_name="EDMPrecond", _init_kwargs=kwargs, sigma_data=0.5, label_dim=10)
    easy = sys.modules["dnnlib.util"].EasyDict(path="cifar10.zip", use_labels=True)
    augment = Persistent("AugmentPipe", wavelet=np.arange(6, dtype=">f4").reshape(2, 3), p=np.float32(0.12))
    return {"ema": top, "augment_pipe": augment, "dataset_kwargs": easy}


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@ARCHITECTURES
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_published_format_is_read_to_the_bit(tmp_path: Path, name: str, protocol: int) -> None:
    content = snapshot(name)
    if protocol == 5:  # NumPy's arrays are other calls in it, but a network has none
        del content["augment_pipe"]
    path = write(tmp_path / "edm-test.pkl", content, protocol)
    if protocol == 3:  # as NumPy 1 wrote it
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    found = convert_edm(path, tmp_path / "out")
    assert found == config(name)
    assert "EDM_PICKLE_RAN" not in os.environ
    loaded = load_edm(tmp_path / "out", "cpu")
    mine, theirs = network(name).state_dict(), loaded.network.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.name == "edm-test" and manifest.family == "edm" and "CC BY-NC-SA 4.0" in manifest.licence
    with pytest.raises(UserError, match="out: exists already"):
        convert_edm(path, tmp_path / "out")


def test_everything_beside_the_network_is_inert_data(tmp_path: Path) -> None:
    content = read_pickle(write(tmp_path / "a.pkl", snapshot("ddpmpp")))
    assert content["dataset_kwargs"] == {"path": "cifar10.zip", "use_labels": True}
    assert type(content["dataset_kwargs"]) is dict
    pipe = content["augment_pipe"]
    assert type(pipe) is Record and pipe.class_name == "AugmentPipe"
    assert pipe.state["wavelet"].value.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert pipe.state["p"] == pytest.approx(0.12) and type(pipe.state["p"]) is float
    block = content["ema"].state["_modules"]["model"].state["_modules"]["enc"].state["_modules"]["8x8_block0"]
    assert block.class_name == "UNetBlock" and block.state["skip_scale"] == 0.5**0.5


@pytest.mark.parametrize("protocol", [3, 4])
def test_plain_data_and_arrays_are_read_to_the_bit(tmp_path: Path, protocol: int) -> None:
    every = {
        "none": [None, True, False],
        "numbers": [0, -1, 255, 70000, -(2**31), 2**40, 1.5, float("inf")],
        "texts": ["", "é" * 300, b"", b"\x00" * 300],
        "nested": {"list": [[], {}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 3: OrderedDict(a=1)},
        "set": {"a", "b"},
        "many": list(range(2000)),
    }
    assert read_pickle(write(tmp_path / "a.pkl", every, protocol)) == every
    arrays = [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array([True]), np.uint8([7]), np.int64(9)]
    fortran, boolean, byte, scalar = read_pickle(write(tmp_path / "b.pkl", arrays, protocol))
    assert fortran.value.tolist() == [[0, 1, 2], [3, 4, 5]] and fortran.value.dtype == torch.float64
    assert boolean.value.tolist() == [True] and byte.value.dtype == torch.uint8 and scalar == 9
    tensors = [torch.arange(6.0).reshape(2, 3).T, torch.randn(3).half(), torch.randn(2, dtype=torch.bfloat16)]
    for mine, theirs in zip(tensors, read_pickle(write(tmp_path / "c.pkl", tensors, protocol)), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


def test_what_was_left_out_has_edm_s_default(tmp_path: Path) -> None:
    left_out = {"embedding_type": ..., "encoder_type": ..., "channel_mult_noise": ..., "resample_filter": ...}
    path = write(tmp_path / "a.pkl", snapshot("ddpmpp", **left_out, sigma_min=..., sigma_max=...))
    assert convert_edm(path, tmp_path / "out") == config("ddpmpp")
    path = write(tmp_path / "b.pkl", snapshot("adm", model_type=..., sigma_min=0.01, sigma_max=40.0, sigma_data=0.3))
    found = convert_edm(path, tmp_path / "adm")
    assert (found.sigma_min, found.sigma_max, found.sigma_data) == (0.01, 40, 0.3)


# What must never run


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def refused(path: Path, *words: str) -> str:
    """The one line with which `path` is refused."""
    with pytest.raises(UserError) as caught:
        convert_edm(path, path.with_name("converted"))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    assert all(word in message for word in words), message
    assert not path.with_name("converted").exists()
    return message


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("where", ["top", "inside the network", "inside a storage"])
def test_a_call_of_anything_else_is_refused_by_name(tmp_path: Path, protocol: int, where: str) -> None:
    marker = tmp_path / "ran"
    calls: list[tuple[Callable[..., Any], str, str]] = [
        (os.system, f"touch {marker}", "posix.system"),
        (eval, f"open({str(marker)!r}, 'w').close()", "builtins.eval"),
        (exec, f"open({str(marker)!r}, 'w').close()", "builtins.exec"),
        (os.mkdir, str(marker), "posix.mkdir"),
        (__import__, "antigravity", "builtins.__import__"),
        (getattr, "", "builtins.getattr"),
    ]
    for function, argument, name in calls:
        evil = Evil(function, argument)
        content: dict[str, Any] = {"ema": evil}
        if where == "inside the network":
            content = snapshot("ddpmpp")
            content["ema"].__dict__["more"] = evil
        elif where == "inside a storage":
            content = {"ema": Evil(torch.storage._load_from_bytes, torch_storage(evil))}
        refused(
            write(tmp_path / "evil.pkl", content, protocol), "asks for " + name.replace("posix", os.name), "refused"
        )
        assert not marker.exists() and "antigravity" not in sys.modules


def torch_storage(persistent: Any, numbers: int = 3, length: int | None = None) -> bytes:
    """A storage in torch's older format, with `persistent` in the place of its description."""
    out = io.BytesIO()
    pickle.dump(0x1950A86A20F9469CFC6C, out, 2)
    pickle.dump(1001, out, 2)
    pickle.dump({"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}}, out, 2)
    if isinstance(persistent, Evil):
        pickle.dump(persistent, out, 2, fix_imports=False)
    else:

        class Writer(pickle._Pickler):  # type: ignore[name-defined,misc]
            def persistent_id(self, value: Any) -> Any:
                return persistent if value == "here" else None

        Writer(out, 2).dump("here")
    pickle.dump(["0"], out, 2)
    out.write(struct.pack("<q", numbers if length is None else length) + bytes(4 * numbers))
    return out.getvalue()


RAW = {
    # opcode by opcode: (what is in the file, what the refusal says)
    "the oldest protocol": (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    "INST": (b"(S'true'\nios\nsystem\n.", "STRING"),
    "INST first": (b"(ios\nsystem\n.", "INST"),
    "OBJ": (b"(cbuiltins\nset\no.", "OBJ"),
    "a submodule": (b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93.", "os.path.exists"),
    "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0df2py.os.popen\x93.", "numpy.f2py.os.popen"),
    "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "a persistent id": (b"\x80\x02X\x01\x00\x00\x00aQ.", "BINPERSID"),
    "keywords": (b"\x80\x04}\x92.", "NEWOBJ_EX"),
    "a byte array": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.", "truncated"),
    "a name with line breaks": (b"\x80\x04\x8c\x03o\ns\x8c\x03a\x1bb\x93.", "o?s.a?b"),
    "a call of an uncallable": (b"\x80\x02)R.", "truncated or damaged"),
    "a call of a string": (b"\x80\x02X\x01\x00\x00\x00a)R.", "expected Global, found str"),
    "a class that is to be called": (
        b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)R.",
        "ModuleDict cannot be made this way",
    ),
    "a new object of a function": (b"\x80\x02ctorch.storage\n_load_from_bytes\n)\x81.", "cannot be made this way"),
    "a state for a name": (b"\x80\x02cnumpy\ndtype\n}b.", "a state for a Global"),
    "a state for a number": (b"\x80\x02K\x01}b.", "a state for a int"),
    "items for a name": (b"\x80\x02cnumpy\ndtype\nK\x01K\x02s.", "expected dict, found Global"),
    "an item for a number": (b"\x80\x02K\x01K\x02a.", "expected list, found int"),
    "objects as a dtype": (b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.", "a dtype that is not of numbers"),
    "a dict of pairs": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "truncated or damaged"),
    "a tuple as a key": (b"\x80\x02})K\x01s.", "found tuple"),
    "an empty file": (b"", "truncated or damaged"),
    "text": (b"hello", "truncated or damaged"),
    "a zip": (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
    "nothing on the stack": (b"\x80\x02.", "truncated or damaged"),
    "no mark": (b"\x80\x02t.", "truncated or damaged"),
    "a lost memo": (b"\x80\x02h\x07.", "truncated or damaged"),
    "a number": (b"\x80\x02K\x01.", "holds no network under the key 'ema'"),
    "a huge memo": (b"\x80\x02}r\xff\xff\xff\xff.", "holds no network"),
    "a huge text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.", "truncated"),
    "huge bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.", "truncated"),
    "an absurd frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.", "holds no network"),
}


@pytest.mark.parametrize("name", list(RAW))
def test_hostile_and_broken_files_are_one_line(tmp_path: Path, name: str) -> None:
    content, words = RAW[name]
    (tmp_path / "a.pkl").write_bytes(content)
    refused(tmp_path / "a.pkl", words)


def test_a_module_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "innocent_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02cinnocent_module\nthing\n.")
    refused(tmp_path / "a.pkl", "asks for innocent_module.thing", "nothing was run")
    assert "innocent_module" not in sys.modules


def test_absurd_sizes_are_refused_before_memory_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor(*args: Any, data: bytes | None = None) -> Any:
        storage = Evil(torch.storage._load_from_bytes, data or torch_storage(describe(3)))
        return Evil(torch._utils._rebuild_tensor_v2, storage, *args, False, OrderedDict())

    def describe(numbers: int, kind: Any = torch.FloatStorage) -> tuple[Any, ...]:
        return ("storage", kind, "0", "cpu", numbers, None)

    path = tmp_path / "a.pkl"
    assert read_pickle(write(path, tensor(0, (3,), (1,)))).tolist() == [0, 0, 0]  # an honest one

    for what in (
        tensor(0, (10**12,), (0,)),
        tensor(0, (2, 2), (0, 0)),
        tensor(0, (3,), (1,), data=torch_storage(describe(10**12))),
    ):
        refused(write(path, what), "claims tensors that are larger than the file")
    for what in (
        tensor(1, (3,), (1,)),  # beyond its storage
        tensor(0, (3,), (2,)),
        tensor(0, (-1,), (1,)),
        tensor(-1, (2,), (1,)),
        tensor(0, (0, 2**70), (1, 1)),
        tensor(0, (3.0,), (1,)),
        tensor(0, (3,), (1,), data=torch_storage(describe(4))),
        tensor(0, (3,), (1,), data=torch_storage(describe(3), length=2**40)),
        tensor(0, (3,), (1,), data=torch_storage(describe(3))[:-1]),
        tensor(0, (3,), (1,), data=torch_storage(("module", 1, "0", "cpu", 3, None))),
    ):
        refused(write(path, what), "truncated or damaged")
    refused(write(path, tensor(0, (3,), (1,), data=torch_storage(describe(3, os.system)))), "asks for", "system")
    refused(write(path, tensor(0, (3,), (1,), data=torch_storage(("a",)).replace(b"Q", b"0"))), "refused")
    zipped = io.BytesIO()
    torch.save(torch.zeros(3), zipped)
    refused(write(path, tensor(0, (3,), (1,), data=zipped.getvalue())), "not in the format of EDM's pickles")
    twice = torch_storage(describe(1000), numbers=1000)
    storage = Evil(torch.storage._load_from_bytes, twice)
    calls = [Evil(torch.storage._load_from_bytes, twice) for _ in range(100)]
    refused(write(path, [storage, *calls]), "larger than the file")
    bombs = b"\x80\x02" + b"]" * 5000 + b"."
    monkeypatch.setattr(dmd2.models.edm.published.EdmReader, "most_operations", 1000)
    path.write_bytes(bombs)
    refused(path, "holds more than 1000 operations")


def test_a_truncated_file_is_one_line(tmp_path: Path) -> None:
    whole = pickle.dumps(snapshot("ncsnpp"), 4)
    path = tmp_path / "a.pkl"
    for part in (1, 2, 11, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:part])
        refused(path, "truncated or damaged")
    refused(tmp_path / "nowhere.pkl", "no such file")
    refused(tmp_path, "no such file")


def test_damage_never_does_more_than_a_refusal(tmp_path: Path) -> None:
    """Bytes changed at random: a value may change unseen, but whatever is raised is a `UserError` of one line."""
    small = Persistent("Linear", init=np.sqrt(0.5), kind={"a", "b"}, bias=None)
    small.weight = nn.Parameter(torch.zeros(2, 2))
    whole = pickle.dumps({"ema": small, "list": nn.ModuleDict({"a": small}), "array": np.zeros(2)}, 4)
    random_ = random.Random(0)
    path, refusals = tmp_path / "a.pkl", 0
    for _ in range(800):
        damaged = bytearray(whole)
        start = random_.randrange(len(whole))
        for i in range(start, min(start + random_.choice([1, 1, 2, 8]), len(whole))):
            damaged[i] = random_.randrange(256)
        path.write_bytes(damaged)
        try:
            read_pickle(path)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 200
    assert "EDM_PICKLE_RAN" not in os.environ


# What is read but is not a network of EDM's


def test_a_wrong_network_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    for changes, words in (
        ({"model_type": "DiT"}, "a network of the type DiT; expected SongUNet or DhariwalUNet"),
        ({"model_type": 3}, "expected str, found int"),
        ({"encoder_type": "skip"}, "a SongUNet that is neither DDPM++ nor NCSN++"),
        ({"resample_filter": [1, 3, 3, 1]}, "neither DDPM++ nor NCSN++"),
        ({"channel_mult_emb": 2}, "needs floats"),
        ({"gated": True}, "gated: Extra inputs are not permitted"),
        ({"img_resolution": ...}, "resolution: Field required"),
        ({"num_blocks": 10**6}, "blocks: Input should be less than or equal to 16"),
        ({"num_blocks": 2}, "lacks the tensor model.enc.8x8_block1.norm0.weight of the ddpmpp network"),
        ({"label_dim": 11}, "map_label.weight is torch.float32 (8, 10); the ddpmpp network of 8x8 pixels needs"),
        ({"label_dim": 0}, "holds the tensor 'model.map_label.weight', which the ddpmpp network"),
        ({"model_channels": 4}, "needs floats"),
    ):
        refused(write(path, snapshot("ddpmpp", **changes)), words)

    content = snapshot("ddpmpp")
    content["ema"].__dict__["class_name"] = "DDIMPrecond"
    refused(write(path, content), "a network of the class DDIMPrecond; expected EDMPrecond, GDDPrecond, VPPrecond")
    content = snapshot("ddpmpp", beta_d=10)
    content["ema"].__dict__["class_name"] = "VPPrecond"
    refused(write(path, content), "beta_d of VPPrecond is not 19.9")
    refused(write(path, {"G_ema": content["ema"]}), "holds no network under the key 'ema'")
    refused(write(path, {"ema": {"model": 3}}), "holds no network under the key 'ema'")

    content = snapshot("ddpmpp")
    model = content["ema"]._modules["model"]
    model._modules["again"] = model._modules["enc"]
    refused(write(path, content), "holds the module model.", "twice")
    content = snapshot("ddpmpp")
    content["ema"]._modules["model"] = torch.zeros(3)
    refused(write(path, content), "expected Record, found Tensor")


# Others than EDM's own


OTHERS: dict[str, dict[str, Any]] = {
    "GDDPrecond": {"boundary": 0.002, "sigmas": (80.0,)},
    "VPPrecond": {"preconditioning": "vp"},
    "VEPrecond": {"preconditioning": "ve", "sigma_min": 0.02, "sigma_max": 100.0},
    "iDDPMPrecond": {"preconditioning": "iddpm", "sigma_min": 0.0064},
}


@pytest.mark.parametrize("kind", list(OTHERS))
@ARCHITECTURES
def test_other_preconditionings_are_read_to_the_bit(tmp_path: Path, name: str, kind: str) -> None:
    expected = EdmConfig.model_validate(config(name).model_dump() | OTHERS[kind])
    torch.manual_seed(3)
    built = EdmNetwork(expected)
    top: Any = persisted(built)
    kwargs = {key: value for key, value in arguments(expected).items() if not key.startswith("sigma_")}
    top.__dict__.update(class_name=kind, _init_kwargs=kwargs)
    if kind == "iDDPMPrecond":
        top._buffers["u"] = iddpm_levels().float()
    path = write(tmp_path / "a.pkl", {"ema": top})
    assert convert_edm(path, tmp_path / "out") == expected
    mine, theirs = built.state_dict(), load_edm(tmp_path / "out", "cpu").network.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
    if kind == "iDDPMPrecond":
        top._buffers["u"] = iddpm_levels().float() * 2
        refused(write(path, {"ema": top}), "the levels u are not those of iDDPM")


def test_another_width_of_the_embedding(tmp_path: Path) -> None:
    expected = config("ddpmpp").model_copy(update={"embedding_mult": 2})
    top: Any = persisted(EdmNetwork(expected))
    top.__dict__.update(class_name="EDMPrecond", _init_kwargs=arguments(expected) | {"channel_mult_emb": 2})
    assert convert_edm(write(tmp_path / "a.pkl", {"ema": top}), tmp_path / "out") == expected


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_student_s_parameters_by_name_go_both_ways(tmp_path: Path, suffix: str) -> None:
    """As DMD2 publishes them, within a wrapper or not; the teacher says what they are of."""
    convert_edm(write(tmp_path / "teacher.pkl", snapshot("adm")), tmp_path / "teacher")
    built = network("adm").state_dict()
    for prefix in ("", "feedforward_model."):
        torch.save({f"{prefix}{name}": value for name, value in built.items()}, tmp_path / "pytorch_model.bin")
        out = tmp_path / f"student{prefix}"
        found = convert_edm(tmp_path / "pytorch_model.bin", out, tmp_path / "teacher")
        assert found.sigmas == (80.0,) and read_manifest(out).students[1].sigmas == [80.0]
    export_weights(tmp_path / "student", tmp_path / f"back{suffix}", None)
    again = read_tensors(tmp_path / f"back{suffix}")
    assert again.keys() == built.keys() and all(torch.equal(again[k], built[k]) for k in built)
    assert convert_edm(tmp_path / f"back{suffix}", tmp_path / "again", tmp_path / "teacher") == found
    with pytest.raises(UserError, match=r"out .*: exists already"):
        export_weights(tmp_path / "student", tmp_path / f"back{suffix}", None)


def test_a_published_network_is_known_by_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the inputs for augmentation or without: distillation drops them."""
    monkeypatch.setattr(dmd2.models.edm.published, "PUBLISHED", {n: config(n) for n in CONFIGS})
    built = EdmNetwork(config("ddpmpp").model_copy(update={"augment_dim": 0}))
    torch.save(built.state_dict(), tmp_path / "a.bin")
    found = convert_edm(tmp_path / "a.bin", tmp_path / "out")
    assert found.architecture == "ddpmpp" and found.augment_dim == 0


def test_a_bin_that_is_something_else_is_one_line(tmp_path: Path) -> None:
    convert_edm(write(tmp_path / "teacher.pkl", snapshot("adm")), tmp_path / "teacher")
    good = network("adm").state_dict()
    name = next(iter(good))
    cases: dict[str, Any] = {
        "lacks": {key: value for key, value in good.items() if key != name},
        "wide": good | {name: torch.zeros(3, 4)},
        "list": [1, 2],
        "number": good | {"model.x": 3},
    }
    for case, content in cases.items():
        torch.save(content, tmp_path / f"{case}.bin")
        with pytest.raises(UserError, match=rf"{case}\.bin: ") as raised:
            convert_edm(tmp_path / f"{case}.bin", tmp_path / "out", tmp_path / "teacher")
        assert "\n" not in str(raised.value)
    (tmp_path / "junk.bin").write_bytes(b"junk")
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps({"a": os.mkdir}))
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1000)
    for case in ("junk", "pickle", "bomb", "nowhere"):
        with pytest.raises(UserError, match=rf"{case}\.bin: "):
            convert_edm(tmp_path / f"{case}.bin", tmp_path / "out", tmp_path / "teacher")
    with pytest.raises(UserError, match="those of no network that EDM publishes"):
        torch.save(good, tmp_path / "tiny.bin")
        convert_edm(tmp_path / "tiny.bin", tmp_path / "out")


def test_writing_needs_room(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl", snapshot("ddpmpp"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: exists already"):
        convert_edm(path, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        convert_edm(path, tmp_path / "file" / "out")
