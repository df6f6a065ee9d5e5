"""Converted networks in the cache folder, a file each: with them neither diffusers nor transformers is needed."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.models.openvino.network import Network, converted, runs_on
from dmd2.runtime.files import atomic_bytes, sha256_file
from dmd2.runtime.loading import Deferred
from dmd2.weights.manifest import Manifest

FORMAT = 1
"""of these files; another one for another conversion of the same network"""
READ = (".json", ".safetensors", ".txt")
"""endings of what a network or a tokenizer is made of"""
DIGEST, LENGTH = 32, 8

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
        cache: where they are kept.
        dtype: that networks compute in.
    """

    def __init__(self, folder: Path, manifest: Manifest, cache: Path, dtype: torch.dtype) -> None:
        self._folder, self._manifest, self._cache, self._dtype = folder, manifest, cache, dtype

    def network(
        self,
        name: str,
        load: Callable[[], Any],
        parts: Mapping[str, Callable[[Any], tuple[nn.Module, tuple[Tensor, ...]]]],
    ) -> tuple[Deferred, dict[str, Network]]:
        """A network, of which only what is kept is loaded, if it is kept: its parts, such as a VAE's two ways.

        Args:
            name: its subfolder.
            load: the network itself.
            parts: by name, what makes of it the function to be kept, and an example of its inputs.
        """
        files = {part: self._path(name, part) for part in parts}
        found = {part: _read(path) for part, path in files.items()}
        if all(found.values()):
            runs = {part: Network(content, self._dtype) for part, (_, content) in found.items() if content}  # type: ignore[misc]
            settings = next(entry[0] for entry in found.values() if entry)
            return Deferred(Settings(settings), load), runs
        began = time.perf_counter()
        loaded = load()
        settings = json.loads(json.dumps(dict(_config(loaded)), default=str))
        for part, make in parts.items():
            network, example = make(loaded)
            _write(files[part], settings, converted(network, example, self._dtype))
        logger.info("%s: converted for OpenVINO in %.1f s, once", name, time.perf_counter() - began)
        runs = {part: Network(_expected(path), self._dtype) for part, path in files.items()}
        return Deferred(Settings(settings), load), runs

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
        if found is None:
            found = make(), memoryview(b"")
            _write(path, found[0], b"")
        return found[0]

    def _path(self, name: str, part: str) -> Path:
        of = sorted(path for path in (self._folder / name).iterdir() if path.suffix in READ)
        sums = {path.name: self._manifest.files.get(f"{name}/{path.name}") or sha256_file(path) for path in of}
        made_of = {"files": sums, "part": part, "dtype": str(self._dtype), **self._made_by}
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return self._cache / f"{name.rpartition('/')[2]}-{part}-{key[:32]}.bin"

    @cached_property
    def _made_by(self) -> dict[str, object]:
        packages = ("torch", "diffusers", "transformers", "tokenizers")
        return {"format": FORMAT, **{name: version(name) for name in packages}, **runs_on()}


def _config(network: Any) -> Mapping[str, Any]:
    config = network.config
    return config if isinstance(config, Mapping) else config.to_dict()


def _read(path: Path) -> tuple[dict[str, Any], memoryview] | None:
    """Settings and content; None if there is no such file, or a damaged one."""
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    start = DIGEST + LENGTH
    if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
        logger.warning("%s: damaged, ignored; it is made anew", path)
        return None
    end = start + int.from_bytes(data[DIGEST:start], "little")
    return json.loads(bytes(data[start:end])), data[end:]


def _expected(path: Path) -> memoryview:
    found = _read(path)
    assert found is not None, path
    return found[1]


def _write(path: Path, settings: Mapping[str, Any], content: bytes) -> None:
    head = json.dumps(settings).encode()
    data = len(head).to_bytes(LENGTH, "little") + head + content
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_bytes(path, hashlib.sha256(data).digest() + data)
