"""scripts/graft-students: the students' differences from their teacher, on the teacher that went on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd2.inference.engine import Engine
from dmd2.models.stable_diffusion.folder import UNET_FILE
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.tensors import save_tensors
from dmd2.weights.manifest import MANIFEST, Manifest, read_manifest, verify, write_manifest
from tests.scripts.loaded import loaded


@pytest.fixture(scope="module")
def graft() -> Any:
    return loaded("graft-students")


def changed(weights: Path, out: Path, file: str, change: Callable[[str, Tensor], Tensor], **manifest: Any) -> Path:
    """A copy of `weights` with the tensors of one file, and fields of the manifest, changed."""
    shutil.copytree(weights, out)
    save_tensors({name: change(name, tensor) for name, tensor in load_file(out / file).items()}, out / file)
    before = read_manifest(weights)
    (out / MANIFEST).unlink()
    write_manifest(out, Manifest.model_validate(before.model_dump() | manifest))
    return out


def moved(weights: Path, out: Path) -> Path:
    return changed(weights, out, f"unet_teacher/{UNET_FILE}", lambda name, t: t + 0.01 * (1 + len(name) % 3))


def test_the_difference_from_the_teacher_stays(graft: Any, weights: Path, tmp_path: Path) -> None:
    teacher, out = moved(weights, tmp_path / "teacher"), tmp_path / "out"
    graft.main(teacher, out, weights)
    verify(out, read_manifest(out))
    assert read_manifest(out).students == read_manifest(weights).students
    was, now = (load_file(folder / "unet_teacher" / UNET_FILE) for folder in (weights, out))
    for name, tensor in load_file(teacher / "unet_teacher" / UNET_FILE).items():
        torch.testing.assert_close(now[name], tensor, rtol=0, atol=0)
    for student in ("unet", "unet_1step"):
        before, after = (load_file(folder / student / UNET_FILE) for folder in (weights, out))
        assert any(not torch.equal(before[name], was[name]) for name in was)
        for name, tensor in after.items():
            assert tensor.dtype == before[name].dtype and not torch.equal(tensor, before[name])
            torch.testing.assert_close(tensor - now[name], before[name] - was[name], rtol=0, atol=2e-3)
    assert Engine(out, "cpu", modes=("1",)).generate(["an owl"], [0], "1").shape == (1, 3, 64, 64)


def test_without_a_change_nothing_changes(graft: Any, weights: Path, tmp_path: Path) -> None:
    graft.main(weights, tmp_path / "out", weights)
    for student in ("unet", "unet_1step"):
        before, after = (load_file(folder / student / UNET_FILE) for folder in (weights, tmp_path / "out"))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_share_of_the_difference(graft: Any, weights: Path, tmp_path: Path) -> None:
    graft.main(weights, tmp_path / "out", weights, ["4=0.75", "1=0"])
    teacher = load_file(weights / "unet_teacher" / UNET_FILE)
    for student, kept in (("unet", 0.75), ("unet_1step", 0.0)):
        before, after = (load_file(folder / student / UNET_FILE) for folder in (weights, tmp_path / "out"))
        for name, tensor in after.items():
            expected = teacher[name].float().lerp(before[name].float(), kept)
            torch.testing.assert_close(tensor.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["2=0.5", "4", "4=", "4=nan", "4=2.1", "4=-0.1", "four=1", ""])
def test_a_share_of_no_student_is_refused(text: str, graft: Any, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="expected 4=SHARE or 1=SHARE, and a share from 0 to 2") as error:
        graft.main(weights, tmp_path / "out", weights, [text])
    assert error.value.field == "scale" and not (tmp_path / "out").exists()


def test_students_in_one_folder_have_one_share(graft: Any) -> None:
    both = {4: "unet", 1: "unet"}
    assert graft.shares_of(both, ["4=0.5", "1=0.5"]) == {"unet": 0.5}
    with pytest.raises(InvalidInput, match="the student in unet has another share already"):
        graft.shares_of(both, ["4=0.5", "1=0.6"])


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("text_encoder/model.safetensors", lambda name, t: t + 1, "text_encoder differs from that of "),
        (f"unet_teacher/{UNET_FILE}", lambda name, t: torch.cat([t, t]), "other tensors than the teacher's of "),
    ],
)
def test_a_teacher_of_another_kind_is_refused(
    file: str, change: Callable[[str, Tensor], Tensor], said: str, graft: Any, weights: Path, tmp_path: Path
) -> None:
    other = changed(weights, tmp_path / "other", file, change)
    with pytest.raises(InvalidInput, match=said) as error:
        graft.main(other, tmp_path / "out", weights)
    assert error.value.field == "teacher" and not (tmp_path / "out").exists()


def test_weights_without_students_or_teacher_are_refused(graft: Any, weights: Path, tmp_path: Path) -> None:
    alone = changed(weights, tmp_path / "alone", f"unet/{UNET_FILE}", lambda name, t: t, students={})
    with pytest.raises(InvalidInput, match="has no students; expected those of its teacher"):
        graft.main(weights, tmp_path / "out", alone)
    untaught = changed(weights, tmp_path / "untaught", f"unet/{UNET_FILE}", lambda name, t: t, teacher=None)
    with pytest.raises(InvalidInput, match=r"expected a folder with a teacher, of SDXL or SD 1\.5") as error:
        graft.main(untaught, tmp_path / "out", weights)
    assert error.value.field == "teacher" and not (tmp_path / "out").exists()
