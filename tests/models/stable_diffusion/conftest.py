"""A hub on the loopback with the real repositories' file names, for the tests of downloads."""

from __future__ import annotations

import json
import os
import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import load_file, save

from dmd2.models.stable_diffusion.download import BASE, DMD2, LORA, SAFETY, VAES
from dmd2.models.stable_diffusion.folder import UNET_FILE
from tests.hub import Hub
from tests.models.stable_diffusion.downloads import (
    FOUR,
    ONE,
    pickled,
)


@pytest.fixture(scope="session")
def repositories(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The real repositories' file names with tiny networks in them, and some of what must not be downloaded."""
    folder = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(3)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        force_upcast=False,
    ).save_pretrained(folder)
    kl = {name: (folder / name).read_bytes() for name in ("config.json", UNET_FILE)}
    base = {"README.md": b"base", "sd_xl_base_1.0.safetensors": b"all in one", "unet/" + UNET_FILE: b"base's own"}
    base["unet/config.json"] = (weights / "unet" / "config.json").read_bytes()
    for suffix in ("", "_2"):
        encoder, tokenizer = f"text_encoder{suffix}/", f"tokenizer{suffix}/"
        base[encoder + "config.json"] = (weights / encoder / "config.json").read_bytes()
        base[encoder + "model.fp16.safetensors"] = (weights / encoder / "model.safetensors").read_bytes()
        base[encoder + "model.safetensors"] = b"in fp32"
        model = json.loads((weights / tokenizer / "tokenizer.json").read_bytes())["model"]
        base[tokenizer + "vocab.json"] = json.dumps(model["vocab"]).encode()
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
        base[tokenizer + "merges.txt"] = "\n".join(lines).encode()
        config = (weights / tokenizer / "tokenizer_config.json").read_bytes()
        base[tokenizer + "tokenizer_config.json"] = config
        marks = {key: value for key, value in json.loads(config).items() if key.endswith("_token")}
        base[tokenizer + "special_tokens_map.json"] = json.dumps(marks).encode()
    return {
        BASE: base,
        VAES["kl"]: kl | {"sdxl_vae.safetensors": b"in another format"},
        VAES["tiny"]: {name: (weights / "vae" / name).read_bytes() for name in ("config.json", UNET_FILE)},
        DMD2: {
            FOUR: (weights / "unet" / UNET_FILE).read_bytes(),
            ONE: pickled(load_file(weights / "unet_1step" / UNET_FILE)),
            LORA: save({"lora_unet.alpha": torch.ones(4)}),
            "dmd2_sdxl_4step_unet_fp16.bin": b"a pickle",
        },
        SAFETY: {
            "config.json": b"{}",
            "preprocessor_config.json": b"{ }",
            "model.safetensors": save({"concept_embeds": torch.ones(17, 3)}),
            "pytorch_model.bin": b"a pickle",
        },
    }


@pytest.fixture
def hub(repositories: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client in this process knows as the only one. The client's waits are noted, not waited."""
    hub = Hub()
    for name, files in repositories.items():
        hub.push(name, files)
    for name in [*os.environ]:
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("dmd2.models.stable_diffusion.download.are_progress_bars_disabled", lambda: False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it takes most of the time, and no test cuts the power
    yield hub
    huggingface_hub.close_session()
    hub.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited before it tries again."""
    waits: list[float] = []
    clock = types.SimpleNamespace(**{**vars(time), "sleep": waits.append})
    monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    return waits


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "weights" / "sdxl"
