"""Which folder of weights a process uses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from dmd2.runtime.errors import UserError
from dmd2.runtime.paths import ROOT, cache_folder
from dmd2.weights.fetch import is_url, unpacked
from dmd2.weights.manifest import MANIFEST, read_manifest, verify


def locate(given: Path | str | None = None, environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Path:
    """The folder of weights to use: `given`, else `$DMD2_WEIGHTS`, else what was downloaded, else the embedded ones.

    The first two may be a folder, a tar or the http(s) URL of a tar, or an SDXL checkpoint in one safetensors file.
    A tar is unpacked once, into `weights` in the cache folder `$DMD2_CACHE` (`~/.cache/dmd2`), and its files are
    verified; so is a checkpoint, whose configurations and tokenizers come from `$DMD2_BASE` or what was downloaded.

    Raises:
        UserError: there is no such thing, or it is broken.
    """
    source = str(given or environ.get("DMD2_WEIGHTS", ""))
    if not source:
        downloaded = root / "weights" / "sdxl"
        return downloaded if (downloaded / MANIFEST).is_file() else root / "weights" / "emoji"
    source = re.sub(r"^(https?):/+", r"\1://", source)  # a URL that went through Path has lost a slash
    if not is_url(source):
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if not path.is_file():
            raise UserError(
                f"weights {path}: no such file or folder; expected a folder, a tar or the URL of a tar, or an SDXL "
                "checkpoint as safetensors"
            )
        source = str(path)
    cache = cache_folder(environ)
    if source.endswith(".safetensors") and not is_url(source):
        from dmd2.models.stable_diffusion.convert import converted

        base = Path(environ.get("DMD2_BASE") or root / "weights" / "sdxl").expanduser()
        return converted(Path(source), base, cache / "weights")
    return unpacked(source, cache / "weights", MANIFEST, lambda folder: verify(folder, read_manifest(folder)))
