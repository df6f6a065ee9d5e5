"""Networks by OpenVINO: what they give is torch's, kept files are used and never trusted, and what cannot run by them
runs by torch. Needs openvino.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from safetensors.torch import save_file

from dmd2.inference.conditioning import ImageConditioning
from dmd2.inference.engine import Engine
from dmd2.models.adapters.lora import read_lora
from dmd2.models.openvino.choice import is_installed, is_limited
from dmd2.models.stable_diffusion import model
from dmd2.models.stable_diffusion.folder import load_tokenizer
from dmd2.models.stable_diffusion.text import KeptTokenizer
from dmd2.models.stable_diffusion.unet import waves
from dmd2.runtime import placement
from dmd2.runtime.paths import EMOJI, ROOT
from dmd2.runtime.precision import Throughput

pytestmark = pytest.mark.skipif(
    not is_installed() or is_limited(), reason="OpenVINO is not installed, or may not run"
)
CLOSE = 2
"""of 255"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fast(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The embedded model by OpenVINO."""
    monkeypatch.setenv("DMD2_COMPILE", "auto")
    monkeypatch.setenv("DMD2_CACHE", str(cache))
    return Engine(EMOJI, "cpu", modes=("1",))


@pytest.fixture(scope="module")
def plain() -> Engine:
    return Engine(EMOJI, "cpu", modes=("1",))


def apart(one: Engine, other: Engine, prompts: list[str], mode: str = "1", **more: Any) -> int:
    """The largest difference of two engines' images."""
    seeds = list(range(len(prompts)))
    images = [engine.generate(prompts, seeds, mode, **more).int() for engine in (one, other)]
    return int((images[0] - images[1]).abs().max())


def in_pixels(engine: Engine, latents: tuple[int, int]) -> tuple[int, int]:
    codec: Any = engine.model.codec
    return latents[0] * codec.factor, latents[1] * codec.factor


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_images_are_torch_s(fast: Engine, plain: Engine, count: int) -> None:
    assert apart(fast, plain, ["an owl", "a red apple on a blue background", "", "heart"] * 2, "1") <= CLOSE
    assert apart(fast, plain, ["an owl"] * count, "1") <= CLOSE
    assert "network" not in vars(fast.model.denoisers["unet_1step"]._unet)  # nothing of diffusers' was loaded


@pytest.mark.parametrize("latents", [(8, 16), (24, 16), (17, 19)])
def test_sizes_that_blocks_halve_with_a_remainder_run_by_torch(
    fast: Engine, plain: Engine, latents: tuple[int, int]
) -> None:
    assert apart(fast, plain, ["an owl"], "1", size=in_pixels(plain, latents)) <= CLOSE
    halved = all(side % 4 == 0 for side in latents)
    assert ("network" in vars(fast.model.denoisers["unet_1step"]._unet)) == (not halved)


def test_a_prompt_of_several_windows_and_an_image_to_begin_with(fast: Engine, plain: Engine) -> None:
    assert apart(fast, plain, ["a red apple " * 30, "an owl"]) <= CLOSE
    image = plain.generate(["a lion"], [7], "1")[0]
    assert apart(fast, plain, ["a tiger"], "4", edit=ImageConditioning(image=image, strength=0.5)) <= CLOSE


def test_loras_change_the_image_and_leave_no_trace(fast: Engine, plain: Engine, tmp_path: Path) -> None:
    unet = plain.model.denoisers["unet_1step"].unet
    rng = torch.Generator().manual_seed(0)
    factors: dict[str, torch.Tensor] = {}
    for name, layer in unet.named_modules():
        if name.endswith("to_q"):
            factors[f"unet.{name}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=rng)
            factors[f"unet.{name}.lora_B.weight"] = 0.1 * torch.randn(layer.out_features, 4, generator=rng)
    encoder = plain.model.encode_text.encoders[0]  # type: ignore[attr-defined]
    for name, layer in encoder.named_modules():
        if name.endswith("q_proj"):
            factors[f"text_encoder.{name}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=rng)
            factors[f"text_encoder.{name}.lora_B.weight"] = 0.1 * torch.randn(layer.out_features, 4, generator=rng)
    save_file(factors, tmp_path / "lora.safetensors")
    edit = ImageConditioning(loras=((read_lora(tmp_path / "lora.safetensors"), 1.0),))
    before = fast.generate(["an owl"], [0], "1")
    assert apart(fast, plain, ["an owl"], edit=edit) <= CLOSE
    assert not fast.generate(["an owl"], [0], "1", edit=edit).equal(before)
    assert fast.generate(["an owl"], [0], "1").equal(before)


def test_the_teacher_stays_with_torch(fast: Engine) -> None:
    fast.model.denoiser("unet_teacher")
    assert fast.model.denoisers["unet_teacher"]._run is None


def test_damaged_files_are_made_anew(fast: Engine, cache: Path, plain: Engine) -> None:
    (path,) = cache.glob("openvino/vae-decode-*.bin")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        assert apart(Engine(EMOJI, "cpu", modes=("1",)), plain, ["an owl"]) <= CLOSE
        assert path.read_bytes()[:32] == hashlib.sha256(path.read_bytes()[32:]).digest()


def test_with_what_is_kept_neither_diffusers_nor_transformers_is_imported(fast: Engine, cache: Path) -> None:
    heavy = "sorted({'diffusers', 'transformers', 'accelerate', 'scipy', 'openvino_telemetry'} & set(loaded))"
    code = f"""
import sys
from dmd2.inference.engine import Engine
engine = Engine("{EMOJI}", "cpu", modes=("1",))
engine.generate(["an owl"], [0], "1")
loaded = [name for name, module in sys.modules.items() if module is not None]
print({heavy})
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DMD2_COMPILE": "auto", "DMD2_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "text", ["an Owl's  house, 3 café!", "<|endoftext|> a <|startoftext|>", "\N{OWL} 日本語", "", "!!!"]
)
def test_the_kept_tokenizer_is_transformers_own(text: str) -> None:
    theirs = load_tokenizer(EMOJI / "tokenizer")
    ours = KeptTokenizer(KeptTokenizer.described(theirs))
    assert ours(text).input_ids == theirs(text, add_special_tokens=False).input_ids
    assert len(ours) == len(theirs) and ours.model_max_length == theirs.model_max_length


# Networks of gigabytes, with the embedded model in their place.


@pytest.fixture
def large(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMD2_COMPILE", "auto")
    monkeypatch.setenv("DMD2_CACHE", str(cache))
    monkeypatch.setattr(model, "LARGE_MODEL_PARAMS", 0)
    monkeypatch.setattr(placement, "LARGE_MODEL_PARAMS", 0)
    monkeypatch.setattr(placement.precision, "measure_cpu", lambda: Throughput(bf16=1, fp32=2))


@pytest.mark.usefixtures("large")
def test_large_networks_are_kept_as_graphs(
    plain: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = Engine(EMOJI, "cpu", dtype=torch.float32, modes=("1",))
    assert apart(first, plain, ["an owl", "heart", ""]) <= CLOSE
    assert "unet_1step: converted" in caplog.text
    caplog.clear()
    second = Engine(EMOJI, "cpu", dtype=torch.float32, modes=("1",))
    assert "converted" not in caplog.text
    assert second.generate(["an owl"], [0], "1").equal(first.generate(["an owl"], [0], "1"))
    assert apart(second, plain, ["an owl"], size=in_pixels(plain, (17, 19))) <= CLOSE  # torch's, loaded besides


@pytest.mark.usefixtures("large")
def test_weights_in_int8_change_images_little(plain: Engine, cache: Path) -> None:
    kept = set(cache.glob("openvino/unet_1step-*"))
    fast = Engine(EMOJI, "cpu", modes=("1",))
    (path,) = set(cache.glob("openvino/unet_1step-*")) - kept
    weights = EMOJI / "unet_1step" / "diffusion_pytorch_model.safetensors"
    assert path.stat().st_size < 0.9 * weights.stat().st_size * 2  # of fp32
    prompts, seeds = ["an owl", "heart", "a slice of pizza", "a red apple on a blue background"], [0, 1, 2, 3]
    images = [engine.generate(prompts, seeds, "1").float() for engine in (fast, plain)]
    apart = (images[0] - images[1]).abs()
    assert 0 < apart.mean() < 1, "of 255, on average"


@pytest.mark.usefixtures("large")
def test_without_room_on_the_disk_torch_runs(
    plain: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DMD2_CACHE", str(tmp_path / "none" / "yet"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    engine = Engine(EMOJI, "cpu", dtype=torch.float32, modes=("1",))
    assert apart(engine, plain, ["an owl", "heart"]) <= CLOSE
    assert "unet_1step: run by torch" in caplog.text
    assert not [*tmp_path.rglob("unet_1step-*")]


@pytest.mark.usefixtures("large")
def test_without_a_cache_folder_torch_runs(
    plain: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DMD2_CACHE", str(tmp_path / "file"))
    engine = Engine(EMOJI, "cpu", dtype=torch.float32, modes=("1",))
    assert apart(engine, plain, ["an owl"]) <= CLOSE
    assert f"unet_1step: run by torch; converted for OpenVINO it is faster, but {tmp_path / 'file'}" in caplog.text


@pytest.mark.usefixtures("large")
def test_what_killed_conversions_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMD2_CACHE", str(tmp_path))
    left, running = (tmp_path / "openvino" / f".converting-{name}" for name in ("left", "running"))
    for folder in (left, running):
        folder.mkdir(parents=True)
        (folder / "network.bin").touch()
    os.utime(left, (0, 0))
    Engine(EMOJI, "cpu", dtype=torch.float32, modes=("1",))
    assert [*(tmp_path / "openvino").glob(".converting-*")] == [running]


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1)])
def test_waves_are_diffusers_own(flip: bool, shift: int) -> None:
    numbers = torch.tensor([0.0, 399.0, 999.0, 12.5])
    theirs = Timesteps(320, flip_sin_to_cos=flip, downscale_freq_shift=shift)(numbers)
    assert waves(numbers, 320, SimpleNamespace(flip_sin_to_cos=flip, freq_shift=shift)).equal(theirs)
