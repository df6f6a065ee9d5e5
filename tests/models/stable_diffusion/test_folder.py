"""Weights on disk: whole, checked, readable by diffusers itself, and never half replaced."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

import dmd2.models.stable_diffusion.folder
import dmd2.weights.folders
from dmd2.diffusion.noise import seeded_noise, zero_snr_sigmas
from dmd2.emoji.architecture import build_unet
from dmd2.inference.engine import Engine
from dmd2.inference.mode import default_mode
from dmd2.models.stable_diffusion.family import StableDiffusionFamily
from dmd2.models.stable_diffusion.folder import (
    UNET_FILE,
    load_text_to_image,
    load_vae,
    save_pipeline_configs,
    save_text_to_image,
)
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import sha256_file
from dmd2.weights.folders import _exchange, swap
from dmd2.weights.manifest import DEFAULT, MANIFEST, Student, read_manifest, verify, write_manifest

CPU = torch.device("cpu")


@pytest.fixture
def copy(weights: Path, tmp_path: Path) -> Path:
    """Weights that a test may damage."""
    return Path(shutil.copytree(weights, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


# What a saved folder is


def test_saved_folder_holds_teacher_students_and_checksums(weights: Path) -> None:
    manifest = read_manifest(weights)
    assert manifest.family == "sdxl" and manifest.native_size == (64, 64)
    assert manifest.students == {
        4: Student(subfolder="unet", timesteps=[999, 749, 499, 249]),
        1: Student(subfolder="unet_1step", timesteps=[399]),
    }
    assert manifest.teacher is not None and manifest.teacher.subfolder == "unet_teacher"
    assert (manifest.teacher.steps, manifest.teacher.guidance_scale) == (3, 3.0)
    found = contents(weights)
    del found[MANIFEST]
    assert manifest.files == found
    for unet in ("unet", "unet_1step", "unet_teacher"):
        assert f"{unet}/{UNET_FILE}" in manifest.files
    verify(weights, manifest)  # raises if not
    assert not [p for p in weights.parent.iterdir() if p.name.startswith(".")]  # nothing is left behind


def test_saved_networks_are_the_ones_given_in_half_precision_with_their_recipe(weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    unet = build_unet((32, 32, 128))
    recipe = {"name": "mine", "lr": 1e-4, "loop": {"seed": 3}}
    save_text_to_image(
        tmp_path / "new",
        weights,
        unet_subfolder="unet_1step",
        unet=unet,
        prediction_type="epsilon",
        recipe=recipe,
        student=(1, Student(subfolder="unet_1step", timesteps=[299])),
    )
    file = tmp_path / "new" / "unet_1step" / UNET_FILE
    saved = load_file(file)
    assert saved.keys() == unet.state_dict().keys()
    for name, value in unet.state_dict().items():
        assert saved[name].dtype == torch.float16 and torch.equal(saved[name], value.half())
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["recipe"]) == recipe

    # The rest is as it was.
    before, after = read_manifest(weights), read_manifest(tmp_path / "new")
    assert after.students == before.students | {1: Student(subfolder="unet_1step", timesteps=[299])}
    assert after.teacher == before.teacher and after.licence == before.licence and after.name == before.name
    differing = {name for name in before.files if before.files[name] != after.files[name]}
    assert differing == {f"unet_1step/{UNET_FILE}", "scheduler/scheduler_config.json"}
    loaded = load_text_to_image(tmp_path / "new", ["unet_1step"], CPU, torch.float32)
    assert loaded.denoisers["unet_1step"].prediction_type == "epsilon"


def test_an_export_with_a_card_holds_the_new_student_and_its_teacher_alone(weights: Path, tmp_path: Path) -> None:
    """`generate --weights` then draws with the student just trained, whatever else there was to begin with."""
    init = tmp_path / "init"
    shutil.copytree(weights, init)
    for name in ("README.md", "emoji.zip", "classifier.safetensors"):
        (init / name).write_text("of another model")
    for _ in range(2):  # the second takes the place of the first
        save_text_to_image(
            tmp_path / "run" / "model",
            init,
            unet_subfolder="unet_1step",
            unet=build_unet((32, 32, 128)),
            prediction_type="v_prediction",
            recipe={},
            student=(1, Student(subfolder="unet_1step", timesteps=[999])),
            card="# Mine\n",
        )
    model = tmp_path / "run" / "model"
    manifest = read_manifest(model)
    assert default_mode(manifest) == "1" and list(manifest.students) == [1]
    assert manifest.teacher == read_manifest(weights).teacher
    verify(model, manifest)
    before = {path.name for path in weights.iterdir()}
    assert {path.name for path in model.iterdir()} == before - {"unet"} | {"README.md"}
    assert (model / "README.md").read_text() == "# Mine\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]
    load_text_to_image(model, ["unet_1step", "unet_teacher"], CPU, torch.float32)


def test_a_student_of_a_teacher_with_zero_terminal_snr_keeps_its_levels(copy: Path, tmp_path: Path) -> None:
    save_pipeline_configs(copy, "v_prediction", zero_snr=True)
    write_manifest(copy, read_manifest(copy))
    save_over(tmp_path / "new", copy)
    loaded = load_text_to_image(tmp_path / "new", ["unet"], CPU, torch.float32)
    assert torch.equal(loaded.denoisers["unet"].table, zero_snr_sigmas())


def test_loaded_networks_are_frozen_and_of_the_asked_type(weights: Path) -> None:
    loaded = load_text_to_image(weights, ["unet", "unet_teacher"], CPU, torch.bfloat16)
    assert set(loaded.denoisers) == {"unet", "unet_teacher"}
    modules = [d.unet for d in loaded.denoisers.values()] + [loaded.codec.vae, *loaded.encode_text.encoders]
    for module in modules:
        assert not module.training
        parameters = list(module.parameters())
        assert parameters and all(p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)
    assert all(d.prediction_type == "v_prediction" for d in loaded.denoisers.values())
    first, second = (d.unet.conv_in.weight for d in loaded.denoisers.values())
    assert not torch.equal(first, second)


def test_no_file_tells_where_on_this_machine_a_network_came_from(weights: Path, tmp_path: Path) -> None:
    loaded = load_text_to_image(weights, ["unet"], CPU, torch.float32)
    save_text_to_image(
        tmp_path / "new",
        weights,
        unet_subfolder="unet_1step",
        unet=loaded.denoisers["unet"].unet,
        prediction_type="v_prediction",
        recipe={},
    )
    for folder in (tmp_path / "new", DEFAULT):
        configs = list(folder.rglob("*.json"))
        assert len(configs) > 5
        assert [p for p in configs if "_name_or_path" in p.read_text() or str(weights) in p.read_text()] == []


def test_embedded_weights_are_whole_and_small() -> None:
    manifest = read_manifest(DEFAULT)
    assert set(manifest.students) == {1, 4} and manifest.teacher is not None
    verify(DEFAULT, manifest)
    assert sum(p.stat().st_size for p in DEFAULT.rglob("*") if p.is_file()) <= 80e6


# diffusers reads it too


@torch.no_grad()
def test_diffusers_loads_the_folder_and_draws_the_same_image(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(weights, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    timesteps = read_manifest(weights).students[4].timesteps
    noise = list(seeded_noise([11], (4, 4, 16, 16)).unbind(1))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *args, **kwargs: noise.pop(0))
    theirs = pipeline(
        "a red apple",
        timesteps=timesteps,
        guidance_scale=1.0,
        latents=noise.pop(0),
        width=64,
        height=64,
        output_type="pt",
    ).images
    assert not noise
    ours = Engine(weights, "cpu").generate(["a red apple"], [11], "4")
    assert ours.shape == theirs.shape and ours.float().std() > 1
    assert float((ours.float() - theirs * 255).abs().max()) <= 1


# What is wrong is named


def test_missing_folder_and_manifest_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"dmd2\.json: missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"native_size": [64]}, "native_size"),
        ({"native_size": [64, "wide"]}, "native_size.1"),
        ({"licence": None}, "licence"),
        ({"students": {"four": {"subfolder": "unet", "timesteps": [999]}}}, "students.four"),
        ({"students": {"4": {"subfolder": "unet"}}}, "students.4: Value error, expected either timesteps or sigmas"),
        ({"teacher": {"subfolder": "unet_teacher", "steps": 25}}, "teacher.guidance_scale"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_manifest_errors_name_the_field(copy: Path, change: dict[str, Any], named: str) -> None:
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        read_manifest(copy)
    assert f"{path}: {named}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["/etc", "..", "unet/../../other", "a\\..\\b", "", "unet\n", "x" * 9_000_000 + "/.."]
)
@pytest.mark.parametrize(
    "field", ["students.4.subfolder", "students.4.lora", "teacher.subfolder", "files", "sources.a/b.files"]
)
def test_manifest_names_nothing_outside_the_folder(copy: Path, field: str, name: str) -> None:
    path = copy / MANIFEST
    content = json.loads(path.read_text())
    content["sources"] = {"a/b": {"revision": "0", "licence": "none", "files": {}}}
    at = content
    *parents, last = field.split(".")
    for key in parents:
        at = at[key]
    at[last] = {name: "0" * 64} if last == "files" else name
    path.write_text(json.dumps(content))
    if field.endswith("lora") and not name:
        assert read_manifest(copy).students[4].lora == ""  # none
        return
    with pytest.raises(UserError) as error:
        read_manifest(copy)
    message = str(error.value)
    assert message.startswith(f"{path}: {field}") and message.isprintable() and len(message) < 1000


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b c", "/", "\\", "~", "\x00", "…", "\n", "C:"]), max_size=6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_path_that_a_manifest_may_name_is_in_the_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    try:
        student = Student(subfolder=name, timesteps=[999])
    except ValidationError:
        assert not name or not name.isprintable() or "\\" in name or name.startswith("/") or ".." in parts
    else:
        assert os.path.normpath(os.path.join("/folder", student.subfolder)).startswith("/folder")  # noqa: PTH118


@pytest.mark.parametrize("field", ["students.4.subfolder", "students.4.lora", "teacher.subfolder", "files.x"])
def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(copy: Path, tmp_path: Path, field: str) -> None:
    path = copy / MANIFEST
    content = json.loads(path.read_text())
    at = content
    *parents, last = field.split(".")
    for key in parents:
        at = at[key]
    at["link/x" if last == "x" else last] = "0" * 64 if last == "x" else "link/x"
    path.write_text(json.dumps(content))
    (copy / "link").symlink_to("unet", target_is_directory=True)
    read_manifest(copy)
    (copy / "link").unlink()
    (copy / "link").symlink_to("../..")
    with pytest.raises(UserError, match=f"{field.removesuffix('.x')}.*a link that leads out of the folder") as error:
        read_manifest(copy)
    assert "\n" not in str(error.value)
    (tmp_path / "linked").symlink_to(DEFAULT)
    assert read_manifest(tmp_path / "linked").name == read_manifest(DEFAULT).name  # the folder itself may be one


@pytest.mark.parametrize(
    "change",
    [
        {"native_size": [0, 64]},
        {"native_size": [64, 10**12]},
        {"students": {"0": {"subfolder": "unet", "timesteps": [999]}}},
        {"students": {"1": {"subfolder": "unet", "timesteps": [1000]}}},
        {"students": {"1": {"subfolder": "unet", "timesteps": [-1]}}},
        {"students": {"2": {"subfolder": "unet", "timesteps": [249, 499]}}},
        {"students": {"1": {"subfolder": "unet", "sigmas": [float("nan")]}}},
        {"students": {"1": {"subfolder": "unet", "sigmas": [0]}}},
        {"students": {"1": {"subfolder": "unet", "timesteps": [999], "lora_scale": float("inf")}}},
        {"teacher": {"steps": 0, "guidance_scale": 3}},
        {"teacher": {"steps": 10**9, "guidance_scale": 3}},
    ],
)
def test_manifest_numbers_have_bounds(copy: Path, change: dict[str, Any]) -> None:
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        read_manifest(copy)
    assert str(error.value).startswith(f"{path}: {next(iter(change))}.") and "\n" not in str(error.value)


DEEP = "[" * 100_000
HOSTILE = {
    "deep": f'{{"a": {DEEP}',
    "deep and whole": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "list": "[]",
    "number": "7",
    "no JSON": "<!doctype html>",
    "no UTF-8": "\udcff",
    "digits": '{"block_out_channels": [' + "9" * 10_000 + "]}",
    "large": '{"a": "' + "x" * 20_000_000 + '"}',
    "types": json.dumps({key: {"a": []} for key in ("_class_name", "block_out_channels", "hidden_size")}),
    "layers": json.dumps(
        {"layers_per_block": 10**9, "num_hidden_layers": 10**9, "decoder_block_out_channels": [4] * 999}
    ),
}


@pytest.mark.parametrize("name", [MANIFEST, "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_json_is_one_line_wherever_it_is_read(weights: Path, tmp_path: Path, name: str, kind: str) -> None:
    refuses_hostile_json(weights, tmp_path, name, kind)


@pytest.mark.parametrize(
    "name", ["text_encoder/config.json", "tokenizer_2/tokenizer.json", "tokenizer/tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", ["deep", "list", "no UTF-8", "large"])
def test_hostile_json_of_text_models_is_one_line(weights: Path, tmp_path: Path, name: str, kind: str) -> None:
    refuses_hostile_json(weights, tmp_path, name, kind)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unet/config.json", {"norm_eps": "small"}),
        ("unet/config.json", {"freq_shift": None}),
        ("unet/config.json", {"flip_sin_to_cos": 7}),
        ("vae/config.json", {"act_fn": 3}),
        ("vae/config.json", {"scaling_factor": 10**99}),
        ("text_encoder/config.json", {"num_attention_heads": -1}),
        ("text_encoder_2/config.json", {"layer_norm_eps": float("nan")}),
        ("text_encoder/config.json", {"eos_token_id": []}),
        ("text_encoder/config.json", {"vocab_size": 100}),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 10**99}),
        ("tokenizer_2/tokenizer_config.json", {"eos_token": "a new one"}),
    ],
)
def test_settings_of_wrong_types_are_one_line_before_anything_is_drawn(
    copy: Path, name: str, change: dict[str, Any]
) -> None:
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | change))
    write_manifest(copy, read_manifest(copy))
    with pytest.raises(UserError) as error:
        load_text_to_image(copy, ["unet"], CPU, torch.float32)
    assert str(error.value).startswith(str(copy)) and str(error.value).isprintable()


def refuses_hostile_json(weights: Path, tmp_path: Path, name: str, kind: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(weights, copy, copy_function=os.link)  # of which one is replaced
    (copy / name).unlink()
    (copy / name).write_text(HOSTILE[kind], errors="surrogateescape")
    if name != MANIFEST:  # its maker's checksum is right
        manifest = read_manifest(weights)
        sums = manifest.files | {name: sha256_file(copy / name)}
        (copy / MANIFEST).unlink()
        (copy / MANIFEST).write_text(manifest.model_copy(update={"files": sums}).model_dump_json())
    with pytest.raises(UserError) as error:
        load_text_to_image(copy, ["unet"], CPU, torch.float32)
    message = str(error.value)
    assert Path(name).parts[0] in message and message.isprintable() and len(message) < 1000


def test_manifest_that_is_no_json_is_one_line(copy: Path) -> None:
    (copy / MANIFEST).write_text('{"name": "tiny",')
    with pytest.raises(UserError) as error:
        read_manifest(copy)
    assert str(copy / MANIFEST) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "changed"])
@pytest.mark.parametrize("name", [f"unet/{UNET_FILE}", "text_encoder_2/model.safetensors", "vae/config.json"])
def test_damaged_file_is_named_with_both_checksums(copy: Path, damage: str, name: str) -> None:
    path = copy / name
    expected = sha256_file(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError) as error:
        verify(copy, read_manifest(copy))
    message = str(error.value)
    assert str(path) in message and expected in message and sha256_file(path) in message
    assert "\n" not in message
    with pytest.raises(UserError, match="sha256"):  # before anything is read from it
        load_text_to_image(copy, ["unet"], CPU, torch.float32)


def test_missing_file_is_named(copy: Path) -> None:
    (copy / "unet" / UNET_FILE).unlink()
    with pytest.raises(UserError, match=f"unet/{UNET_FILE}: missing"):
        verify(copy, read_manifest(copy))
    shutil.rmtree(copy / "unet")
    with pytest.raises(UserError, match="unet: missing"):
        load_text_to_image(copy, ["unet"], CPU, torch.float32)


def test_only_what_is_about_to_be_loaded_is_checked(copy: Path) -> None:
    (copy / "unet_1step" / UNET_FILE).write_bytes(b"damaged")
    manifest = read_manifest(copy)
    verify(copy, manifest, {"unet", "vae"})
    assert load_text_to_image(copy, ["unet"], CPU, torch.float32).denoisers.keys() == {"unet"}
    with pytest.raises(UserError, match="unet_1step"):
        load_text_to_image(copy, ["unet_1step"], CPU, torch.float32)


def test_a_folder_without_a_vae_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: missing"):
        load_vae(tmp_path, CPU, torch.float32)


# Saving


def save_over(folder: Path, init: Path) -> None:
    torch.manual_seed(6)
    save_text_to_image(
        folder,
        init,
        unet_subfolder="unet",
        unet=build_unet((32, 32, 128)),
        prediction_type="v_prediction",
        recipe={},
        student=(4, Student(subfolder="unet", timesteps=[999, 749, 499, 249])),
    )


def test_saving_replaces_a_folder_even_the_one_it_starts_from(copy: Path) -> None:
    before = contents(copy)
    (copy / "README.md").write_text("a model card")
    save_over(copy, copy)
    after = contents(copy)
    differing = {name for name in before if before[name] != after[name]}
    assert differing == {f"unet/{UNET_FILE}", MANIFEST}
    verify(copy, read_manifest(copy))
    assert (copy / "README.md").read_text() == "a model card"
    assert "README.md" not in read_manifest(copy).files
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("stage", ["save_module", "save_pipeline_configs", "write_manifest"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_save_leaves_the_old_folder_whole(
    copy: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: type[BaseException]
) -> None:
    before = contents(copy)
    work = getattr(dmd2.models.stable_diffusion.folder, stage)

    def fails(*args: Any, **kwargs: Any) -> None:
        work(*args, **kwargs)
        raise error("no space left")

    monkeypatch.setattr(dmd2.models.stable_diffusion.folder, stage, fails)
    with pytest.raises(error):
        save_over(copy, copy)
    assert contents(copy) == before
    verify(copy, read_manifest(copy))
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]  # no rest of the failed one either


def test_save_that_fails_at_the_very_swap_leaves_the_old_folder_whole(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copy)
    monkeypatch.setattr(
        dmd2.weights.folders, "_exchange", lambda new, folder: False
    )  # as on another system than Linux
    rename = Path.rename
    calls = []

    def fails(self: Path, target: Path) -> Path:
        if Path(target) == copy and not calls:
            calls.append(target)
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        save_over(copy, copy)
    assert calls
    assert contents(copy) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_saving_over_a_folder_is_one_step_on_linux(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_between(self: Path, target: Path) -> Path:
        raise AssertionError(f"{self} was renamed: killed now, the process would leave no folder")

    monkeypatch.setattr(Path, "rename", killed_between)
    before = contents(copy)
    save_over(copy, copy)
    assert contents(copy)[f"unet/{UNET_FILE}"] != before[f"unet/{UNET_FILE}"]
    verify(copy, read_manifest(copy))
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("at_once", [True, False])
def test_swapped_folders_keep_their_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    if at_once and not sys.platform.startswith("linux"):
        pytest.skip("renameat2 is Linux's")
    new, folder, old = (tmp_path / name for name in ("new", "ünïcode folder", "old"))
    for path in (new, folder):
        path.mkdir()
        (path / "file").write_text(path.name)
    if not at_once:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # a C library without renameat2
    swap(new, folder, old)
    assert (folder / "file").read_text() == "new"
    assert ((new if at_once else old) / "file").read_text() == "ünïcode folder"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_the_kernel_cannot_exchange_is_not_exchanged(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert not _exchange(tmp_path / "one", tmp_path / "missing")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_writing_a_manifest_again_changes_nothing(copy: Path) -> None:
    before = (copy / MANIFEST).read_bytes()
    write_manifest(copy, read_manifest(copy))
    assert (copy / MANIFEST).read_bytes() == before


def test_for_data_that_were_encoded_text_encoders_are_not_loaded(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = dmd2.models.stable_diffusion.folder.load_network
    name = "dmd2.models.stable_diffusion.folder.load_network"
    monkeypatch.setattr(name, lambda kind, path, *args: loaded.append(path.parent.name) or load(kind, path, *args))
    family = StableDiffusionFamily.open(weights, CPU, "fp32", CPU)
    together = StableDiffusionFamily.open(weights, CPU, "fp32")
    expected = together.condition(["an owl", ""])
    assert {"text_encoder", "text_encoder_2"} < set(loaded)
    loaded.clear()
    rows = {"context": expected.context, "pooled": expected.pooled}
    cond = family.embedded({name: tensor for name, tensor in rows.items() if tensor is not None})
    assert not family.unconditional(cond).context.any()
    x, sigma = torch.randn(2, *family.shape), torch.ones(2)
    assert torch.equal(family.teacher(x, sigma, cond), together.teacher(x, sigma, expected))
    assert loaded == []
    assert torch.equal(family.condition(["an owl", ""]).context, expected.context)  # but they can be
    assert loaded == ["text_encoder", "text_encoder_2"]
