"""scripts/pack-emoji: students of several runs become one folder of weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dmd2.models.stable_diffusion.folder import save_text_to_image
from dmd2.runtime.errors import InvalidInput
from dmd2.weights.manifest import Student, read_manifest, verify
from tests.conftest import tiny_unet
from tests.scripts.loaded import loaded


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with another folder in the place of weights/emoji."""
    module = loaded("pack-emoji")
    target = tmp_path / "weights" / "emoji"
    target.mkdir(parents=True)
    (target / "README.md").write_text("the card")
    monkeypatch.setattr(module, "DEFAULT", target)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def export(folder: Path, init: Path, steps: int) -> Path:
    name = "unet" if steps == 4 else f"unet_{steps}step"
    student = Student(subfolder=name, timesteps=[999, 749, 499, 249][:steps])
    save_text_to_image(
        folder,
        init,
        unet_subfolder=name,
        unet=tiny_unet(steps),
        prediction_type="v_prediction",
        recipe={},
        student=(steps, student),
        card="# Of one run\n",
    )
    return folder


def test_students_of_two_runs_are_packed_together(pack: Any, weights: Path, tmp_path: Path) -> None:
    four, one = export(tmp_path / "4", weights, 4), export(tmp_path / "1", tmp_path / "4", 1)
    extra = tmp_path / "emoji.zip"
    extra.write_bytes(b"data")
    pack.main([four, one], pack.DEFAULT, [extra])
    assert (pack.DEFAULT / "emoji.zip").read_bytes() == b"data"
    manifest = read_manifest(pack.DEFAULT)
    verify(pack.DEFAULT, manifest)
    assert set(manifest.students) == {4, 1} and manifest.teacher == read_manifest(weights).teacher
    assert (pack.DEFAULT / "README.md").read_text() == "the card"
    other = tmp_path / "other"
    shutil.copytree(one, other)
    text = (other / "dmd2.json").read_text()
    key = read_manifest(other).files["vae/config.json"]
    (other / "dmd2.json").write_text(text.replace(key, "0" * 64))
    with pytest.raises(InvalidInput, match=r"vae/config\.json differs"):
        pack.main([four, other], pack.DEFAULT)
    pack.main([four], tmp_path / "elsewhere")
    assert set(read_manifest(tmp_path / "elsewhere").students) == {4}, "a folder of its own, made anew"
