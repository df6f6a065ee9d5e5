"""scripts/enlarge-emoji: an autoencoder of the same latents makes a model's images larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from dmd2.inference.engine import Engine
from dmd2.models.stable_diffusion.folder import UNET_FILE, save_vae
from dmd2.runtime.errors import InvalidInput
from dmd2.weights.manifest import read_manifest, verify
from tests.scripts.loaded import loaded
from tests.training.test_product import sd15


@pytest.fixture(scope="module")
def enlarge() -> Any:
    return loaded("enlarge-emoji")


def autoencoder(folder: Path, stages: int, channels: int = 4) -> Path:
    torch.manual_seed(9)
    settings: dict[str, Any] = {f"{way}_block_out_channels": (8,) * stages for way in ("encoder", "decoder")}
    blocks: dict[str, Any] = {f"num_{way}_blocks": (1,) * stages for way in ("encoder", "decoder")}
    save_vae(AutoencoderTiny(latent_channels=channels, **settings, **blocks), folder / "vae", {"name": "none"})
    return folder


def test_images_have_twice_the_side_and_the_latents_of_before(enlarge: Any, weights: Path, tmp_path: Path) -> None:
    extra, out = tmp_path / "emoji.zip", tmp_path / "larger"
    extra.write_bytes(b"data")
    enlarge.main(autoencoder(tmp_path / "vae", 4), out, weights, [extra])
    manifest = read_manifest(out)
    verify(out, manifest)
    assert manifest.native_size == (128, 128) and "emoji.zip" in manifest.files
    assert manifest.students == read_manifest(weights).students and manifest.teacher is not None
    before, after = (Engine(folder, "cpu", modes=("4", "1", "teacher")).model for folder in (weights, out))
    noise = 3 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def x0(model: Any, subfolder: str, size: tuple[int, int]) -> torch.Tensor:
        cond = model.encode_text(["an owl", "a fruit"], size)
        found: torch.Tensor = model.denoiser(subfolder)(noise, torch.tensor([3.0, 3.0]), cond)
        return found

    for subfolder in ("unet", "unet_1step", "unet_teacher"):
        sizes = [(folder / subfolder / UNET_FILE).stat().st_size for folder in (weights, out)]
        assert abs(sizes[0] - sizes[1]) < 1000  # of the same numbers, in the same dtype
        wanted = x0(before, subfolder, (64, 64))
        for size in ((128, 128), (64, 192)):
            # The new bias is rounded to the dtype of the file.
            torch.testing.assert_close(x0(after, subfolder, size), wanted, rtol=0, atol=1e-3)
    assert Engine(out, "cpu", modes=("1",)).generate(["an owl"], [0], "1").shape == (1, 3, 128, 128)


@pytest.mark.parametrize(
    ("stages", "channels", "said"),
    [
        (2, 4, "vae: 2 pixels to a latent; expected a multiple of the 4 of "),
        (4, 8, "vae: 8 latent channels; expected the 4 of "),
    ],
)
def test_an_autoencoder_of_other_latents_is_refused(
    stages: int, channels: int, said: str, enlarge: Any, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=said):
        enlarge.main(autoencoder(tmp_path / "vae", stages, channels), tmp_path / "no", weights)
    assert not (tmp_path / "no").exists()


def test_another_family_is_refused(enlarge: Any, text_models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    other = sd15(tmp_path / "sd15", text_models)
    with pytest.raises(InvalidInput, match="a model of the family sd15; expected sdxl") as error:
        enlarge.main(autoencoder(tmp_path / "vae", 4), tmp_path / "no", other)
    assert error.value.field == "weights" and not (tmp_path / "no").exists()
