"""EDM's published pickles as weights of this package, without running anything that they say.

What `dmd2.weights.pickles` parses is made of one closed table of builders of plain data. Python source inside the
file stays a string that nobody reads.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dmd2.models.edm.folder import expect_new, load_edm, network_of, read_edm_config, save_edm
from dmd2.models.edm.network import PUBLISHED, EdmConfig, EdmNetwork
from dmd2.models.edm.preconditioning import BETA_D, BETA_MIN, C_1, C_2, LEVELS, RANGES, Kind, iddpm_levels
from dmd2.runtime.errors import UserError, first_error
from dmd2.runtime.tensors import read_tensors, write_tensors
from dmd2.weights.pickles import LITERALS, PickleReader, of_type, printable

LICENCE = "that of the file they were converted from; EDM's published weights are CC BY-NC-SA 4.0"

OPERATIONS = re.compile(
    "PROTO|FRAME|STOP|NONE|NEWTRUE|NEWFALSE|EMPTY_(DICT|LIST|SET|TUPLE)|MARK|TUPLE[123]?|APPENDS?|ADDITEMS|SETITEMS?"
    f"|(LONG_)?BIN(PUT|GET)|MEMOIZE|(STACK_)?GLOBAL|REDUCE|NEWOBJ|BUILD|{LITERALS}"
)
STORAGE_OPCODES = (
    "PROTO|STOP|MARK|NONE|NEWTRUE|NEWFALSE|EMPTY_DICT|EMPTY_LIST|TUPLE|APPENDS?|SETITEMS?|(LONG_)?BIN(PUT|GET)|GLOBAL"
    f"|BINPERSID|{LITERALS}"
)
STORAGE_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # pickled magic number of torch's older format


@dataclass(eq=False)
class Record:
    """A network object in a pickle: its class's name and its attributes."""

    class_name: str
    state: dict[Any, Any]


@dataclass(eq=False)
class _Dtype:
    """A NumPy dtype while it is being read."""

    code: str
    order: str = "<"

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass(eq=False)
class _Array:
    """A NumPy array while it is being read."""

    value: Tensor | None = None


class EdmReader(PickleReader):
    """Reads one pickle into dicts, lists, numbers, strings, tensors and `Record`s.

    Args:
        size: of the file in bytes: tensors that take more than twice as much (they are read once as a storage, once
            as a tensor) cannot have come from it.
    """

    kind = "EDM's pickles"
    operations = OPERATIONS
    most_operations = 5_000_000  # ImageNet-64's file has 54,000

    def __init__(self, size: int) -> None:
        super().__init__()
        self._budget = 2 * size
        array: dict[str, Callable[..., Any]] = {
            f"numpy.{core}.multiarray.{name}": function
            for core in ("core", "_core")
            for name, function in (("scalar", self._scalar), ("_reconstruct", lambda kind, shape, code: _Array()))
        }
        self._call = {
            "torch_utils.persistence._reconstruct_persistent_obj": self._record,
            "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch.storage._load_from_bytes": self._storage,
            "collections.OrderedDict": _empty,
            "builtins.set": lambda items=(): {of_type(str, item) for item in items},
            "numpy.dtype": self._dtype,
            **array,
        }
        self._new = {
            "torch.nn.modules.container.ModuleDict": lambda: Record("ModuleDict", {}),
            "dnnlib.util.EasyDict": dict,
            "dnnlib.EasyDict": dict,
        }
        self._known = {*self._call, *self._new, "numpy.ndarray"}

    @staticmethod
    def _record(meta: Any) -> Record:
        return Record(of_type(str, of_type(dict, meta)["class_name"]), of_type(dict, meta["state"]))

    def _build(self, target: Any, state: Any) -> None:
        match target:
            case Record():
                target.state.update(of_type(dict, state))
            case dict() if not state or type(state) is dict:
                pass  # attributes of a dict; its items come by themselves
            case _Dtype() if of_type(tuple, state)[1] in ("<", ">", "|", "="):
                target.order = state[1]
            case _Array():
                _, shape, dtype, is_fortran, data = of_type(tuple, state)
                flat = np.frombuffer(of_type(bytes, data), of_type(_Dtype, dtype).numpy())
                self._spend(len(data))
                array = flat.reshape(of_type(tuple, shape), order="F" if is_fortran else "C")
                target.value = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
            case _:
                super()._build(target, state)

    def _spend(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            raise UserError("claims tensors that are larger than the file: refused")

    def _storage(self, data: Any) -> Tensor:
        """All of a torch storage as a flat tensor."""
        self._spend(len(of_type(bytes, data)))
        _check_storage(data)
        try:
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # of any kind: torch has many for bytes that it does not understand
            raise ValueError(f"a tensor that cannot be read: {error}") from error
        if not isinstance(storage, torch.storage.TypedStorage):
            raise TypeError("expected a storage")
        return torch.empty(0, dtype=storage.dtype).set_(storage)

    def _tensor(
        self, storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, metadata: Any = None
    ) -> Tensor:
        numbers = math.prod(of_type(int, length) for length in of_type(tuple, size))
        if len(size) > 8 or numbers > of_type(Tensor, storage).numel():
            raise UserError("claims tensors that are larger than the file: refused")
        self._spend(numbers * storage.element_size())
        # PyTorch checks that size, stride and offset stay within the storage.
        return torch.as_strided(storage, size, of_type(tuple, stride), of_type(int, offset))

    @staticmethod
    def _dtype(code: Any, *flags: bool) -> _Dtype:
        if not re.fullmatch("[biuf][1248]", of_type(str, code)):
            raise TypeError("a dtype that is not of numbers")
        return _Dtype(code)

    @staticmethod
    def _scalar(dtype: Any, data: Any) -> Any:
        return np.frombuffer(of_type(bytes, data), of_type(_Dtype, dtype).numpy()).reshape(()).item()


def _empty() -> dict[Any, Any]:
    return {}


def _check_storage(data: bytes) -> None:
    """A storage in torch's older format: magic number, version, system, the storage's type and length, its key.

    `torch.load(weights_only=True)` runs no code, but it takes the length on trust.
    """
    if not data.startswith(STORAGE_START):
        raise UserError("holds a tensor that is not in the format of EDM's pickles (torch's older one): refused")
    arg: Any
    file, storages = io.BytesIO(data[len(STORAGE_START) :]), 0
    for _ in range(4):
        for opcode, arg, _ in pickletools.genops(file):
            if not re.fullmatch(STORAGE_OPCODES, opcode.name):
                raise UserError(f"holds a tensor that uses the pickle operation {opcode.name}: refused")
            if opcode.name == "PROTO" and arg != 2:
                raise UserError(f"holds a tensor in pickle protocol {arg}; expected 2: refused")
            if opcode.name == "GLOBAL" and not re.fullmatch(r"torch \w+Storage", arg):
                raise UserError(f"holds a tensor that asks for {printable(arg.replace(' ', '.', 1))}: refused")
            if type(arg) is int and arg > max(len(data), 1001):  # 1001 is the format's version
                raise UserError("claims tensors that are larger than the file: refused")
            storages += opcode.name == "BINPERSID"
    if storages != 1:
        raise UserError(f"holds a tensor of {storages} storages instead of one: refused")


def read_pickle(path: Path) -> Any:
    """What a pickle of EDM's holds, see `EdmReader`.

    Raises:
        UserError: there is no such file, it is truncated, malformed or asks for anything that is not needed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one of EDM's pickles")
    try:
        return EdmReader(path.stat().st_size).read_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def tensors_of(record: Record) -> dict[str, Tensor]:
    """Parameters and buffers of a network, by their full names."""
    found: dict[str, Tensor] = {}
    waiting, seen = [("", record)], set()
    while waiting:
        prefix, here = waiting.pop()
        if id(of_type(Record, here)) in seen:
            raise UserError(f"holds the module {printable(prefix)} twice")
        seen.add(id(here))
        for kind in ("_parameters", "_buffers"):
            for name, value in of_type(dict, here.state.get(kind, {})).items():
                if value is not None:
                    found[f"{prefix}{name}"] = of_type(Tensor, value.value if isinstance(value, _Array) else value)
        modules = of_type(dict, here.state.get("_modules", {}))
        waiting += [(f"{prefix}{name}.", child) for name, child in modules.items() if child is not None]
    return found


# What the U-Net's preconditioning is made with, in order, then more of the U-Net's arguments: their names in
# `EdmConfig`.
FIRST = {"img_resolution": "resolution", "img_channels": "channels", "label_dim": "classes", "use_fp16": ""}
NAMES = {"sigma_min": "sigma_min", "sigma_max": "sigma_max", "sigma_data": "sigma_data"}
ARGUMENTS = FIRST | NAMES | {"model_type": "", "num_blocks": "blocks", "attn_resolutions": "attention"}
ARGUMENTS |= {"channel_mult_emb": "embedding_mult"}

# By class: the preconditioning; the arguments of its own, which must have these values; levels of a student.
CLASSES: dict[str, tuple[Kind, dict[str, float], tuple[float, ...]]] = {
    "EDMPrecond": ("edm", {}, ()),
    "GDDPrecond": ("edm", {}, (80.0,)),
    "VPPrecond": ("vp", {"beta_d": BETA_D, "beta_min": BETA_MIN, "M": LEVELS, "epsilon_t": 1e-5}, ()),
    "VEPrecond": ("ve", {}, ()),
    "iDDPMPrecond": ("iddpm", {"C_1": C_1, "C_2": C_2, "M": LEVELS}, ()),
}
GDD_BOUNDARY = 0.002
UNUSED = ("use_fp16", "label_dropout")  # precision is the caller's; labels are only dropped in training

# The arguments that tell DDPM++ and NCSN++ apart. A file may leave out what is as in the first line.
SONG = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "residual"),
    "decoder_type": ("standard", "standard"),
    "channel_mult_noise": (1, 2),
    "resample_filter": ((1, 1), (1, 3, 3, 1)),
}


def config_of(record: Record) -> EdmConfig:
    """The configuration that a preconditioned network was made with.

    Raises:
        UserError: it is of none of `CLASSES`, or not DDPM++, NCSN++ or ADM.
    """
    if record.class_name not in CLASSES:
        raise UserError(f"a network of the class {printable(record.class_name)}; expected {', '.join(CLASSES)}")
    kind, own, sigmas = CLASSES[record.class_name]
    order = [*FIRST, *(NAMES if kind == "edm" else own or ("sigma_min", "sigma_max")), "model_type"]
    given = dict(zip(order, of_type(tuple, record.state.get("_init_args", ())), strict=False))
    given |= of_type(dict, record.state.get("_init_kwargs", {}))
    given = {of_type(str, name): tuple(value) if type(value) is list else value for name, value in given.items()}
    for name, value in own.items():
        if given.pop(name, value) != value:
            raise UserError(f"{name} of {record.class_name} is not {value:g}")

    defaults: dict[str, Any]
    model_type = of_type(str, given.pop("model_type", "DhariwalUNet"))
    if model_type == "SongUNet":
        style = [given.pop(name, values[0]) for name, values in SONG.items()]
        styles = {"ddpmpp": [v[0] for v in SONG.values()], "ncsnpp": [v[1] for v in SONG.values()]}
        architecture = next((name for name, its in styles.items() if its == style), None)
        if architecture is None:
            raise UserError("a SongUNet that is neither DDPM++ nor NCSN++")
        defaults = {"model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)}
    elif model_type == "DhariwalUNet":
        architecture = "adm"
        defaults = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3}
        defaults["attn_resolutions"] = (32, 16, 8)
    else:
        raise UserError(f"a network of the type {printable(model_type)}; expected SongUNet or DhariwalUNet")
    given = {"dropout": 0.1, **defaults, **given}
    values = {ARGUMENTS.get(name, name): value for name, value in given.items() if name not in UNUSED}
    # EDM's networks say 0 … ∞ where they were trained for 0.002 … 80.
    lowest, highest = RANGES[kind]
    values["sigma_min"] = max(lowest, values.get("sigma_min", 0))
    values["sigma_max"] = min(highest, values.get("sigma_max", math.inf))
    values |= {"preconditioning": kind, "sigmas": sigmas, "boundary": GDD_BOUNDARY if sigmas else 0.0}
    try:
        return EdmConfig.model_validate({"architecture": architecture, **values})
    except ValidationError as error:
        raise UserError(f"not a network of EDM's: {printable(first_error(error))}") from None


def convert_edm(source: Path, out: Path, like: Path | None = None) -> EdmConfig:
    """Reads a network and writes it into the new folder `out`. See `save_edm`.

    Args:
        source: one of EDM's pickles (its EMA is taken), one with an older preconditioning, one of GDD's; or, as DMD2
            publishes its EDM students, `pytorch_model.bin` or safetensors with the parameters by name.
        like: for the latter, folder of the teacher that it was distilled from; None for EDM's published one that has
            such parameters.

    Returns:
        The network's configuration.

    Raises:
        UserError: `source` is no such file, or `out` cannot be written.
    """
    expect_new(out)
    if source.suffix in (".bin", ".safetensors"):
        tensors = _plain(source)
        config = _config_of(tensors, source, like).model_copy(update={"sigmas": (80.0,), "dropout": 0.0})
    else:
        content = read_pickle(source)
        if type(content) is not dict or not isinstance(content.get("ema"), Record):
            raise UserError(f"{source}: holds no network under the key 'ema'")
        try:
            config, tensors = config_of(content["ema"]), tensors_of(content["ema"])
        except (UserError, TypeError) as error:
            raise UserError(f"{source}: {error}") from None
        levels = tensors.pop("u", None) if config.preconditioning == "iddpm" else None
        if levels is not None and not torch.allclose(levels.double(), iddpm_levels(), rtol=1e-4, atol=1e-6):
            raise UserError(f"{source}: the levels u are not those of iDDPM's schedule")
    network = network_of(config, tensors, source)
    try:
        save_edm(out, network, name=source.stem, licence=LICENCE, recipe={"name": "convert edm", "file": source.name})
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    return config


def _plain(source: Path) -> dict[str, Tensor]:
    """Parameters by name; without what a wrapper or an augmentation that distillation drops adds to them."""
    tensors = read_tensors(source)
    prefix = next(
        (name[: name.index("model.map_layer0.")] for name in sorted(tensors) if "model.map_layer0." in name), ""
    )
    return {
        name.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
        if name.startswith(f"{prefix}model.")
    }


def _config_of(tensors: Mapping[str, Tensor], source: Path, like: Path | None) -> EdmConfig:
    if like is not None:
        found = read_edm_config(like)
        candidates = [found, found.model_copy(update={"augment_dim": 0})]
    else:
        candidates = [c.model_copy(update={"augment_dim": n}) for c in PUBLISHED.values() for n in {c.augment_dim, 0}]
    shapes = {name: value.shape for name, value in tensors.items()}
    for config in candidates:
        with torch.device("meta"):
            expected = EdmNetwork(config).state_dict()
        if shapes == {name: value.shape for name, value in expected.items()}:
            return config
    if like is not None:
        network_of(candidates[-1] if not any("map_augment" in name for name in tensors) else found, tensors, source)
    raise UserError(f"{source}: its tensors are those of no network that EDM publishes; name its teacher's folder")


def export_edm(folder: Path, out: Path) -> None:
    """A folder of EDM weights as DMD2 publishes such students: parameters by name in one `.bin` or `.safetensors`.

    Raises:
        UserError: there are no such weights; `out` exists already or cannot be written.
    """
    write_tensors(load_edm(folder, "cpu").network.state_dict(), out)
