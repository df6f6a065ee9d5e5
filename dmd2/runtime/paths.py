"""Paths of the clone, of the embedded model and of the cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""of the clone"""
EMOJI = ROOT / "weights" / "emoji"
"""the embedded model"""


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where what can be made or fetched again is kept: `$DMD2_CACHE`, else `~/.cache/dmd2`."""
    return Path(environ.get("DMD2_CACHE") or "~/.cache/dmd2").expanduser()
