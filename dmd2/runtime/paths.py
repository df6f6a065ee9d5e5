"""Paths of the clone and of the embedded model."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""of the clone"""
EMOJI = ROOT / "weights" / "emoji"
"""the embedded model"""
