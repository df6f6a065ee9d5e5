"""Small things that many tests need: a zip of four emoji, and weights in SDXL's layout that were never trained."""

import io
import json
import os
import signal
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

# Inductor's cache does not tell apart what was compiled with and without AVX-512, and results are wrong then.
# Before all else: importing diffusers is enough for torch to choose its own folder.
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"dmd2-inductor-{CAPABILITY}"))
# Networks run by torch, as on a GPU, whether OpenVINO is installed or not; tests/models/openvino wants the other.
os.environ.setdefault("DMD2_COMPILE", "off")

from dmd2.emoji.architecture import build_text_encoders, build_tokenizer, build_unet  # noqa: E402
from dmd2.emoji.scenes import EmojiScenes, vocabulary  # noqa: E402
from dmd2.models.stable_diffusion.folder import save_text_to_image, save_vae  # noqa: E402
from dmd2.weights.manifest import Student, Teacher  # noqa: E402

# A shell without job control starts what is in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

EMOJI = (
    ("red apple", "fruit", ["apple"], (215, 40, 40, 255)),
    ("blue book", "book paper", ["reading"], (40, 80, 215, 255)),
    ("green heart", "emotion", [], (60, 160, 70, 255)),
    ("owl", "animal bird", [], (120, 90, 60, 255)),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: whoever began one last would be alone with it at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Networks this small are faster on one thread; and a test must not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emoji_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four discs, in the layout that scripts/build-emoji writes."""
    path = tmp_path_factory.mktemp("emoji") / "emoji.zip"
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, kind, aliases, colour) in enumerate(EMOJI):
            image = Image.new("RGBA", (96, 96))
            ImageDraw.Draw(image).ellipse((4, 4 + 8 * number, 96 - 5, 96 - 5 - 8 * number), fill=colour)
            data = io.BytesIO()
            image.save(data, "PNG")
            archive.writestr(f"{number}.png", data.getvalue())
            entry = {"file_name": f"{number}.png", "name": name, "kind": kind, "aliases": aliases}
            lines.append(entry | {"group": "Food & Drink"})
        archive.writestr("metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def text_models(emoji_zip: Path) -> tuple[Any, Any, Any]:
    """Tokenizer (a window of 32 tokens) and SDXL's two text encoders, small and untrained."""
    tokenizer = build_tokenizer(vocabulary(EmojiScenes(emoji_zip)))
    torch.manual_seed(7)
    first, second = build_text_encoders(tokenizer)
    return tokenizer, first.eval().requires_grad_(False), second.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_vae() -> Any:
    """An untrained f4 `AutoencoderTiny` with 4 latent channels."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(8)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=4,
    )
    return vae.eval().requires_grad_(False)


def tiny_unet(seed: int) -> Any:
    torch.manual_seed(seed)
    return build_unet((32, 32, 128)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, text_models: tuple[Any, Any, Any], tiny_vae: Any) -> Path:
    """A whole folder of untrained weights: teacher, 4-step and 1-step student. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("weights")
    save_vae(tiny_vae, folder / "only-vae" / "vae", {"name": "none"})
    common: dict[str, Any] = {"prediction_type": "v_prediction", "recipe": {"name": "none"}}
    save_text_to_image(
        folder / "teacher",
        folder / "only-vae",
        unet_subfolder="unet_teacher",
        unet=tiny_unet(0),
        text=text_models,
        teacher=Teacher(steps=3, guidance_scale=3.0),
        **common,
    )
    save_text_to_image(
        folder / "four",
        folder / "teacher",
        unet_subfolder="unet",
        unet=tiny_unet(4),
        student=(4, Student(subfolder="unet", timesteps=[999, 749, 499, 249])),
        **common,
    )
    save_text_to_image(
        folder / "tiny",
        folder / "four",
        unet_subfolder="unet_1step",
        unet=tiny_unet(1),
        student=(1, Student(subfolder="unet_1step", timesteps=[399])),
        **common,
    )
    return folder / "tiny"
