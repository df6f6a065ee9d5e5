"""Checkpoints of a run: two generations with checksums, read with distrust, loaded whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.files import atomic_path
from dmd2.runtime.terminal import say
from dmd2.training.parallel.group import fitted, local

FORMAT = 2
FREE = {f"loop.{name}" for name in ("iterations", "log_every", "sample_every", "checkpoint_every")}
"""what may change when a run goes on: how long it is, and what it shows; never what a step does"""
State = dict[str, Any]


class Unreadable(UserError):
    """A file that is no whole checkpoint."""


class Checkpoints:
    """`checkpoint.pt`, and the one before it as `checkpoint.previous.pt`, in the folder of a run."""

    def __init__(self, out: Path) -> None:
        self.path, self.previous = out / "checkpoint.pt", out / "checkpoint.previous.pt"
        self._whole = False  # whether `path` is known to be: what is damaged never replaces what may be good

    def exist(self) -> bool:
        return self.path.exists() or self.previous.exists()

    def load(self) -> State:
        """The newest state that is whole.

        Raises:
            UserError: there is none.
        """
        try:
            state = read(self.path)
        except Unreadable as error:
            try:
                state = read(self.previous)
            except Unreadable as other:
                older = f"; nor is there an older one ({other})" if self.previous.exists() else ""
                raise UserError(f"{error}{older}") from error
            say(f"{error}; going on from the one before it, of step {state['step']}")
            return state
        self._whole = True
        return state

    def save(self, state: State) -> None:
        """Writes `state`, with its checksum, as the newest.

        Raises:
            OSError: it cannot be written; the older ones stay.
        """
        state = state | {"format": FORMAT}
        state["sha256"] = digest(state)
        with atomic_path(self.path) as temporary:
            _write(state, temporary)
            if self._whole:
                self.path.replace(self.previous)
        self._whole = True


def read(path: Path) -> State:
    """A checkpoint's state, whose checksum is right.

    Raises:
        Unreadable: the file is missing, damaged, or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        why = "it is missing" if isinstance(error, FileNotFoundError) else f"damaged: {type(error).__name__}"
        raise Unreadable(f"{path}: not a readable checkpoint ({why})") from error
    if not isinstance(state, dict) or not {"step", "phases", "average"} <= state.keys():
        raise Unreadable(f"{path}: not a checkpoint of a training run")
    if state.get("format") != FORMAT:
        raise Unreadable(f"{path}: not a checkpoint that this version of dmd2 reads; start the run anew")
    found = state.pop("sha256", None)
    try:
        whole = found == digest(state)
    except RecursionError:
        whole = False
    if not whole:
        raise Unreadable(f"{path}: not a readable checkpoint (damaged: its content and its checksum differ)")
    return state


def digest(state: object) -> str:
    """The sha256 of nested dicts, lists, numbers, strings and tensors: of every bit that counts, in order."""
    sha256 = hashlib.sha256()
    _feed(sha256, state)
    return sha256.hexdigest()


def _feed(sha256: Any, value: object) -> None:
    if isinstance(value, Tensor):
        sha256.update(f"{value.dtype}{tuple(value.shape)};".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        sha256.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _feed(sha256, key)
            _feed(sha256, item)
    elif isinstance(value, list | tuple):
        sha256.update(f"{type(value).__name__} {len(value)};".encode())
        for item in value:
            _feed(sha256, item)
    else:
        sha256.update(f"{type(value).__name__} {value!r};".encode())


class _Recorder(io.RawIOBase):
    """Writes on, and remembers the first error: torch reports a full disk as an "unexpected pos"."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = self.error or error
            raise


def _write(state: State, path: Path) -> None:
    with path.open("wb") as file:
        recorder = _Recorder(file)
        try:
            torch.save(state, recorder)  # type: ignore[arg-type]
            recorder.flush()
        except (OSError, RuntimeError):
            raise recorder.error or OSError(f"{path}: torch could not write it") from None


# Does a state belong to this run?


def check_recipe(path: Path, mine: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> None:
    """Refuses another recipe. One that has gained keys since is the same; what they are now is said.

    Raises:
        UserError: naming what differs.
    """
    now, then = (_flat(recipe or {}) for recipe in (mine, theirs))
    gained = {key for key in now.keys() - then.keys() if key != "name"} if then else set()
    changed = sorted(k for k in (now.keys() | then.keys()) - gained - FREE if now.get(k) != then.get(k))
    if changed:
        raise UserError(f"{path}: made by another recipe (different: {', '.join(changed)})")
    if gained - FREE:
        values = ", ".join(f"{key}={json.dumps(now[key])}" for key in sorted(gained - FREE))
        say(f"{path}: its recipe says nothing of {values}; going on with that")


def check_inputs(mine: Mapping[str, str] | None, theirs: Mapping[str, str] | None) -> None:
    """Refuses other data, teacher and so on. Where one side does not know, nothing is compared.

    Args:
        mine: name of the option → sha256 of what it names.

    Raises:
        UserError: naming the option.
    """
    if mine is None or theirs is None:
        return
    for name in sorted(mine.keys() | theirs.keys()):
        now, then = (str(hashes.get(name) or "nothing")[:12] for hashes in (mine, theirs))
        if mine.get(name) != theirs.get(name):
            raise InvalidInput(
                name, f"not what this run began with (sha256 {then}, now {now}); name that, or another `out`"
            )


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lr": 1, "loop": {"seed": 0}} → {"lr": 1, "loop.seed": 0}, with tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        flat |= inner
    return json.loads(json.dumps(flat))


def check_module(what: str, module: nn.Module, state: object) -> None:
    """Raises UserError unless `state` has the tensors of `module`, all and only, of the same shapes."""
    expected = module.state_dict()
    if not isinstance(state, Mapping):
        raise UserError(f"{what}: lacks the network")
    for name, tensor in expected.items():
        there = state.get(name)
        if not isinstance(there, Tensor):
            raise UserError(f"{what}: lacks the tensor {name}")
        if there.shape != tensor.shape:
            raise UserError(f"{what}: the tensor {name} is {tuple(there.shape)}; this run's is {tuple(tensor.shape)}")
    for name in state.keys() - expected.keys():
        raise UserError(f"{what}: holds the tensor {str(name)[:200]!r}, which this run's network lacks")


def check_optimizer(what: str, optimizer: Optimizer, state: object) -> None:
    """Raises UserError unless `state` is of an optimizer of as many parameters, of the same shapes."""
    try:
        groups, values = state["param_groups"], state["state"]  # type: ignore[index]
        counts = [len(group["params"]) for group in groups]
        shapes = {
            i: {tuple(t.shape) for t in s.values() if isinstance(t, Tensor) and t.ndim} for i, s in values.items()
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{what}: lacks the optimizer's state") from None
    mine = [group["params"] for group in optimizer.param_groups]
    if counts != [len(group) for group in mine]:
        raise UserError(f"{what}: its optimizer has {counts} parameters; this run's has {[len(g) for g in mine]}")
    wanted = dict(zip((i for g in groups for i in g["params"]), (p for g in mine for p in g), strict=True))
    for i, found in shapes.items():
        if i not in wanted or found - {tuple(wanted[i].shape)}:
            raise UserError(f"{what}: its optimizer's state does not fit this run's parameters")


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """A checked state into a module, which may be in shards."""
    wanted = module.state_dict()
    module.load_state_dict({name: fitted(value, wanted[name]) for name, value in state.items()})


def fitted_to(optimizer: Optimizer, state: State) -> State:
    """A checked state with its tensors in shards where the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    values = {
        i: {k: fitted(v, by_number[i]) if isinstance(v, Tensor) else v for k, v in each.items()}
        for i, each in state["state"].items()
    }
    return {**state, "state": values}


def first_not_finite(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The name of the first parameter with a value that is infinite or no number. (Buffers, such as masks, may.)"""
    for name, module in modules:
        for key, value in module.named_parameters():
            if not bool(torch.isfinite(local(value)).all()):
                return f"{name}: {key}"
    return None
