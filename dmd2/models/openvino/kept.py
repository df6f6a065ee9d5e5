"""Converted networks in the cache folder, a file each: with them neither diffusers nor transformers is needed."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dmd2.models.openvino.network import Network, converted, runs_on, write_graph
from dmd2.runtime.files import atomic_path, sha256_file
from dmd2.weights.manifest import Manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dmd2.runtime.loading import Deferred

FORMAT = 3
"""of these files; another one for another conversion of the same network"""
READ = (".json", ".safetensors", ".txt")
"""endings of what a network or a tokenizer is made of"""
DIGEST, LENGTH = 32, 8
ALIGNED = 64
"""bytes: what weights are read from begins at a multiple of it"""
ROOM = 2
"""times a large network's files: of disk that converting it takes, at most"""
CONVERTING, STALE = ".converting-", 3600.0
"""how folders begin in which large networks are on their way; seconds after which such a one was left behind"""
STATES, ENCODE, DECODE, X0 = "states", "encode", "decode", "x0"
"""parts of Stable Diffusion's networks: of text encoders, of VAEs, of UNets"""

Run = Callable[..., Any]
"""tensors, or None, to a tuple of tensors"""

logger = logging.getLogger(__name__)


class Settings(dict[str, Any]):
    """What a `config.json` holds, also as attributes, as the libraries have it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Kept:
    """What was converted of one folder of weights. A file is found by the checksums of all that it was made of.

    Args:
        folder: of weights.
        cache: the cache folder.
        dtype: that networks compute in, by its name in torch.
        large: networks of gigabytes: their weights are mapped, not compiled ahead.
        int8: of large networks, the weights of linear layers are rounded to 8 bits.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        cache: Path,
        dtype: str = "float32",
        *,
        large: bool = False,
        int8: bool = False,
    ) -> None:
        self._folder, self._manifest, self._cache, self._dtype = folder, manifest, cache / "openvino", dtype
        self._large, self._int8 = large, int8

    def network(
        self,
        name: str,
        load: Callable[[torch.dtype], Any],
        parts: Mapping[str, Callable[[Any], tuple[nn.Module, tuple[Tensor, ...]]]],
    ) -> tuple[Deferred, dict[str, Run]]:
        """A network, of which only what is kept is loaded, if it is kept: its parts, such as a VAE's two ways.

        For a large one that the cache folder does not take, the parts are torch's.

        Args:
            name: its subfolder.
            load: the network itself, in a dtype.
            parts: by name, what makes of it the function to be kept, and an example of its inputs.
        """
        import torch

        from dmd2.runtime.loading import Deferred

        dtype: torch.dtype = getattr(torch, self._dtype)
        _join()
        files = {part: self._path(name, part) for part in parts}
        found = {part: _AHEAD.pop(path, None) or self._read(path) for part, path in files.items()}
        here = {part: entry for part, entry in found.items() if entry is not None}
        if len(here) == len(parts):
            settings = next(iter(here.values()))[0]["config"]
            return Deferred(Settings(settings), partial(load, dtype)), {part: run for part, (_, run) in here.items()}
        if self._large and (obstacle := self._obstacle(name)):
            told = "%s: run by torch; converted for OpenVINO it is faster, but %s %s"
            logger.warning(told, name, self._cache, obstacle)
            loaded = load(dtype)
            return Deferred.of(loaded), {part: make(loaded)[0] for part, make in parts.items()}
        began = time.perf_counter()
        if self._large:
            logger.info("%s: being converted for OpenVINO, which takes minutes, once", name)
        loaded = load(torch.float16 if self._large else dtype)
        settings = json.loads(json.dumps(dict(_config(loaded)), default=str))
        runs: dict[str, Run] = {}
        for part, make in parts.items():
            network, example = make(loaded)
            about = {"config": settings, "shapes": [[*x.shape[1:]] for x in example]}
            runs[part] = self._converted(files[part], about, network, example)
        logger.info("%s: converted for OpenVINO in %.1f s, once", name, time.perf_counter() - began)
        return Deferred(Settings(settings), partial(load, dtype)), runs

    def _converted(
        self, path: Path, about: dict[str, Any], network: nn.Module, example: tuple[Tensor, ...]
    ) -> Network:
        if not self._large:
            content = converted(network, example, self._dtype)
            _keep(path, about, content)
            return Network(content, self._dtype)
        for left in self._cache.glob(f"{CONVERTING}*"):
            with suppress(OSError):  # another process may be as tidy
                if time.time() - left.stat().st_mtime > STALE:
                    shutil.rmtree(left)
        with TemporaryDirectory(dir=self._cache, prefix=CONVERTING) as folder:
            graph, weights = (_mapped(file) for file in write_graph(network, example, Path(folder), self._int8))
        # Both are mapped still: where they cannot be kept, they can be used.
        padded = bytes(graph) + b"\n" * (-len(graph) % ALIGNED)
        _keep(path, about | {"graph": len(padded)}, padded, weights)
        return Network(padded, self._dtype, weights)

    def _obstacle(self, name: str) -> str:
        """Why the cache folder does not take a large network; empty if it does."""
        needed = ROOM * sum(path.stat().st_size for path in (self._folder / name).glob("*.safetensors"))
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"cannot be made ({error.strerror})"
        if not os.access(self._cache, os.W_OK):
            return "cannot be written to"
        free = shutil.disk_usage(self._cache).free
        return "" if needed <= free else f"has {free / 1e9:.1f} GB left, and it takes {needed / 1e9:.1f}"

    def takes(self, name: str) -> bool:
        """Whether the UNet in a subfolder is run by OpenVINO: a student's, if its weights are what it runs with.

        The teacher stays with torch: it is what students are measured by.
        """
        teacher = self._manifest.teacher
        of_lora = any(student.lora for student in self._manifest.students.values() if student.subfolder == name)
        return not of_lora and (teacher is None or teacher.subfolder != name)

    def settings(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` makes of the files in a subfolder, kept as JSON."""
        path = self._path(name, "settings")
        found = _read(path)
        if found is not None:
            return found[0]
        settings = make()
        with suppress(OSError):  # it is made in no time
            _write(path, settings)
        return settings

    def _read(self, path: Path) -> tuple[dict[str, Any], Network] | None:
        found = _read(path)
        if found is None:
            return None
        about, content = found
        graph = about.get("graph")
        if graph is None:
            return about, Network(content, self._dtype)
        return about, Network(content[:graph], self._dtype, content[graph:])

    def _path(self, name: str, part: str) -> Path:
        of = sorted(path for path in (self._folder / name).iterdir() if path.suffix in READ)
        sums = {path.name: self._manifest.files.get(f"{name}/{path.name}") or sha256_file(path) for path in of}
        how = {"dtype": "" if self._large else self._dtype, "large": self._large, "int8": self._int8}
        made_of = {"files": sums, "part": part, **how, **self._made_by}
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return self._cache / f"{name.rpartition('/')[2]}-{part}-{key[:32]}.bin"

    @cached_property
    def _made_by(self) -> dict[str, object]:
        packages = ("torch", "diffusers", "transformers", "tokenizers")
        compiled_for = {"openvino": version("openvino")} if self._large else runs_on()
        return {"format": FORMAT, **{name: version(name) for name in packages}, **compiled_for}


_AHEAD: dict[Path, tuple[dict[str, Any], Network]] = {}
_THREADS: list[threading.Thread] = []


def load_ahead(folder: Path, manifest: Manifest, unets: Iterable[str], cache: Path) -> None:
    """Begins to load, in a thread, what is kept of a Stable Diffusion model, for `Kept.network` to find.

    While torch is imported, that takes hardly any time. What cannot be loaded is left to `Kept.network`.
    """
    kept = Kept(folder, manifest, cache)
    parts: dict[str, tuple[str, ...]] = {name: (X0,) for name in unets if kept.takes(name)}
    parts |= {"vae": (DECODE, ENCODE), "text_encoder": (STATES,), "text_encoder_2": (STATES,)}

    def load() -> None:
        try:
            for name in parts:
                for part in parts[name]:
                    path = kept._path(name, part)
                    if entry := kept._read(path):
                        entry[1].rehearse(entry[0]["shapes"])
                        _AHEAD[path] = entry
        except Exception as error:  # of any kind: the same happens again where it can be told
            logger.debug("not loaded ahead: %s", error)

    _THREADS.append(threading.Thread(target=load, name="load-ahead"))
    _THREADS[-1].start()


def _join() -> None:
    while _THREADS:
        _THREADS.pop().join()


def _config(network: Any) -> Mapping[str, Any]:
    config = network.config
    return config if isinstance(config, Mapping) else config.to_dict()


def _mapped(path: Path) -> memoryview:
    """A file's bytes. A copy of what is written to: OpenVINO takes none that cannot be."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b"")


def _read(path: Path) -> tuple[dict[str, Any], memoryview] | None:
    """Settings and content; None if there is no such file, or a damaged one."""
    try:
        data = _mapped(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    start = DIGEST + LENGTH
    if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
        logger.warning("%s: damaged, ignored; it is made anew", path)
        return None
    end = start + int.from_bytes(data[DIGEST:start], "little")
    return json.loads(bytes(data[start:end])), data[end:]


def _keep(path: Path, settings: Mapping[str, Any], *contents: bytes | memoryview) -> None:
    try:
        _write(path, settings, *contents)
    except OSError as error:
        logger.warning("%s: cannot be kept (%s); every process converts it anew", path, error.strerror)


def _write(path: Path, settings: Mapping[str, Any], *contents: bytes | memoryview) -> None:
    head = json.dumps(settings).encode()
    head += b" " * (-(DIGEST + LENGTH + len(head)) % ALIGNED)
    pieces = [len(head).to_bytes(LENGTH, "little"), head, *contents]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines([digest.digest(), *pieces])
