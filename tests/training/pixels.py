"""What the tests of training in pixel space share: a small data set and a small teacher."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from dmd2.models.edm.folder import save_edm
from dmd2.models.edm.network import EdmConfig, EdmNetwork

CONFIG = EdmConfig(
    architecture="ddpmpp",
    resolution=8,
    classes=2,
    model_channels=32,
    channel_mult=(1, 2),
    blocks=1,
    attention=(4,),
)


def write_set(path: Path, n: int = 24) -> Path:
    """A zip of dark images (class 0) and bright ones (class 1)."""
    generator = torch.Generator().manual_seed(0)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(n):
            pixels = torch.randint(0, 60, (8, 8, 3), generator=generator) + 190 * (i % 2)
            buffer = BytesIO()
            Image.fromarray(pixels.byte().numpy()).save(buffer, format="PNG")
            archive.writestr(f"{i:05d}.png", buffer.getvalue())
            labels.append([f"{i:05d}.png", i % 2])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders of weights hold the same, bit for bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_teacher(folder: Path, config: EdmConfig = CONFIG) -> Path:
    """A new network in which every layer matters: the last ones start at zero."""
    torch.manual_seed(0)
    network = EdmNetwork(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_edm(folder, network, name="tiny", licence="none", recipe={}, class_names=["dark", "bright"])
    return folder
