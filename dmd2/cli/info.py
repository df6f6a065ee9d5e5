"""`dmd2 info`: what a folder of weights is, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of weights with a dmd2.json, or a tar.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a folder of weights is and whether its checksums hold; if they do not, the exit status is 2."""
    from dmd2.models.locate import locate
    from dmd2.models.openvino.choice import describe
    from dmd2.runtime.errors import WeightsError
    from dmd2.weights.manifest import read_manifest, verify

    folder = locate(weights) if weights.is_file() else weights
    manifest = read_manifest(folder)
    width, height = manifest.native_size
    sizes = {name: (folder / name).stat().st_size for name in manifest.files if (folder / name).is_file()}
    said: dict[str, Any] = {
        "name": manifest.name,
        "family": manifest.family,
        "native_size": f"{width}x{height}",
        "students": {str(n): s.timesteps or s.sigmas for n, s in sorted(manifest.students.items())},
        "teacher": None if manifest.teacher is None else manifest.teacher.model_dump(exclude={"subfolder"}),
        "licence": manifest.licence,
        "sources": {name: source.revision for name, source in manifest.sources.items()},
        "on a CPU": describe(),
        "files": len(manifest.files),
        "megabytes": round(sum(sizes.values()) / 1e6, 1),
    }
    damage = ""
    try:
        verify(folder, manifest)
    except WeightsError as error:
        damage = str(error)
    said["checksums"] = damage or ("hold" if manifest.files else "none: the manifest lists no files")
    if as_json:
        print(json.dumps(said))
    else:
        for name, value in said.items():
            print(f"{name.replace('_', ' ') + ':':<13}{value if isinstance(value, str) else json.dumps(value)}")
    if damage:
        raise WeightsError(damage)
