"""Pictures as files: PNGs that say how they were made."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from dmd2.fileio import atomic_path


def save_png(image: Tensor, folder: Path, facts: Mapping[str, object]) -> Path:
    """Writes uint8 (3, H, W) into `folder` under a name made of prompt, steps and seed.

    `facts` become text chunks, which Pillow shows as `Image.open(path).info`. A file of the same name is replaced:
    it was made of the same prompt, seed and steps.
    """
    info = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        info.add_itxt(name, str(value))
    words = re.sub(r"[^\w]+", "-", str(facts["prompt"]).lower()).strip("-")[:60] or "picture"
    # The digits tell prompts apart whose words look alike in a file name.
    mark = hashlib.sha256(str(facts["prompt"]).encode()).hexdigest()[:6]
    path = folder / f"{words}_{mark}_{facts['steps']}_{facts['seed']}.png"
    with atomic_path(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG", pnginfo=info)
    return path
