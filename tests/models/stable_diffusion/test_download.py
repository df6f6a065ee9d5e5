"""Downloads with the real client from a hub on the loopback: what they make, later calls, offline, the script."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, StableDiffusionXLPipeline
from huggingface_hub import constants, hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file, save

from dmd2.models.family import open_family
from dmd2.models.stable_diffusion.download import (
    BASE,
    DMD2,
    LICENCES,
    LORA,
    SD15,
    STUDENTS,
    TAESD,
    TEACHERS,
    VAES,
    download,
)
from dmd2.models.stable_diffusion.folder import UNET_FILE, load_text_to_image
from dmd2.models.stable_diffusion.model import vae_folder
from dmd2.runtime.files import sha256_file
from dmd2.weights.manifest import DEFAULT, MANIFEST, Student, read_manifest, verify
from tests.hub import Hub, sha256
from tests.models.stable_diffusion.downloads import (
    FOUR,
    ONE,
    ROOT,
    contents,
    environment,
    left_beside,
    pickled,
    refused,
)
from tests.training.test_product import sd15

# What a download makes


def test_download_is_diffusers_layout_of_checked_and_recorded_files(
    hub: Hub, dest: Path, repositories: Mapping[str, Mapping[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    download(dest, steps=(1, 4), vaes=("kl", "tiny"), lora=True, safety=True)
    manifest = read_manifest(dest)
    encoders = {f"text_encoder{s}/{n}" for s in ("", "_2") for n in ("config.json", "model.safetensors")}
    names = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    tokenizers = {f"tokenizer{s}/{n}" for s in ("", "_2") for n in names}
    pairs = {f"{f}/{n}" for f in ("unet", "unet_1step", "vae", "vae_tiny") for n in ("config.json", UNET_FILE)}
    generated = {"model_index.json", "scheduler/scheduler_config.json"}
    assert set(manifest.files) == encoders | tokenizers | pairs | generated | {f"lora/{LORA}"}
    assert contents(dest) == manifest.files | {MANIFEST: sha256_file(dest / MANIFEST)}
    assert left_beside(dest) == {"safety"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in dest.rglob("*"))  # others may read

    assert manifest.students == {
        4: Student(subfolder="unet", timesteps=[999, 749, 499, 249]),
        1: Student(subfolder="unet_1step", timesteps=[399]),
    }
    assert (manifest.family, manifest.native_size, manifest.teacher) == ("sdxl", (1024, 1024), None)
    assert set(manifest.sources) == {BASE, DMD2, *VAES.values()}
    for name, source in manifest.sources.items():
        assert source.revision == hub.branches[name]["main"]
        assert source.files and source.files.items() <= {k: sha256(v) for k, v in repositories[name].items()}.items()
    assert manifest.sources[DMD2].licence == "CC BY-NC-SA 4.0: no commercial use"
    assert all(name in manifest.licence for name in manifest.sources)

    # Only what is needed was asked for, each file once.
    asked = [line.partition("/resolve/")[2].partition("/")[2] for line in hub.lines("GET .*/resolve/")]
    wanted = [path for source in manifest.sources.values() for path in source.files]
    safety = read_manifest(dest.with_name("safety"))
    assert sorted(asked) == sorted([*wanted, "unet/config.json", *safety.files])  # one config for both students
    verify(dest.with_name("safety"), safety)
    assert set(safety.files) == {"config.json", "preprocessor_config.json", "model.safetensors"}

    said, shown = capsys.readouterr()
    for name in repositories:
        assert f"{name} at {hub.branches[name]['main']}\n    licence: {LICENCES[name]}" in said
    assert "100%" in shown and "B/s" in shown


def test_pickle_becomes_the_same_tensors_as_safetensors(hub: Hub, dest: Path, weights: Path) -> None:
    download(dest)
    converted = dest / "unet_1step" / UNET_FILE
    expected, found = load_file(weights / "unet_1step" / UNET_FILE), load_file(converted)
    assert expected.keys() == found.keys()
    assert all(found[k].dtype == torch.float16 and torch.equal(found[k], v) for k, v in expected.items())
    with safe_open(converted, "pt") as opened:
        assert opened.metadata() == {"sha256_of_pickle": read_manifest(dest).sources[DMD2].files[ONE]}
    assert not list(dest.rglob("*.bin"))


@torch.no_grad()
def test_dmd2_and_plain_diffusers_load_what_was_downloaded(hub: Hub, dest: Path) -> None:
    download(dest)
    loaded = load_text_to_image(dest, ["unet", "unet_1step"], torch.device("cpu"), torch.float32)
    assert all(d.prediction_type == "epsilon" for d in loaded.denoisers.values())
    pipeline = StableDiffusionXLPipeline.from_pretrained(dest, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, LCMScheduler) and isinstance(pipeline.vae, AutoencoderKL)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    timesteps = read_manifest(dest).students[4].timesteps
    image = pipeline("an owl", width=32, height=32, guidance_scale=0.0, timesteps=timesteps, output_type="pt")
    assert image.images.shape == (1, 3, 32, 32) and image.images.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("model", list(TEACHERS))
def test_a_teacher_is_what_students_are_trained_from(
    model: str,
    hub: Hub,
    dest: Path,
    repositories: Mapping[str, Mapping[str, bytes]],
    text_models: tuple[Any, Any, Any],
    weights: Path,
    tmp_path: Path,
) -> None:
    half = "diffusion_pytorch_model.fp16.safetensors"
    if model == "sd15":
        made, tiny = sd15(tmp_path / "made", text_models), repositories[VAES["tiny"]]
        served = {f"{name}/config.json": made / name / "config.json" for name in ("unet", "vae", "text_encoder")}
        served |= {f"{name}/{half}": made / name / UNET_FILE for name in ("unet", "vae")}
        served["text_encoder/model.fp16.safetensors"] = made / "text_encoder" / "model.safetensors"
        words = {name: file for name, file in repositories[BASE].items() if name.startswith("tokenizer/")}
        hub.push(SD15, {name: path.read_bytes() for name, path in served.items()} | words)
        hub.push(TAESD, tiny)
        expected = {SD15, TAESD}
    else:
        made = weights
        hub.push(BASE, {**repositories[BASE], f"unet/{half}": (weights / "unet" / UNET_FILE).read_bytes()})
        expected = {BASE, *VAES.values()}
    download(dest, model=model, vaes=("kl", "tiny"))
    manifest = read_manifest(dest)
    assert set(manifest.sources) == expected and manifest.students == {} and manifest.teacher is not None
    assert manifest.native_size == ((512, 512) if model == "sd15" else (1024, 1024))
    assert contents(dest) == manifest.files | {MANIFEST: sha256_file(dest / MANIFEST)}
    loaded, found = load_file(made / "unet" / UNET_FILE), load_file(dest / "unet" / UNET_FILE)
    assert loaded.keys() == found.keys() and all(torch.equal(found[k], v) for k, v in loaded.items())

    family = open_family(dest, torch.device("cpu"), "fp32")
    cond = family.condition(["an owl"])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert family.teacher(x, torch.tensor([1.0]), cond).isfinite().all()
    assert vae_folder(dest, "tiny") == "vae_tiny"  # what `decoder="tiny"` decodes by

    hub.requests.clear()
    download(dest, model=model, vaes=("kl", "tiny"))
    assert hub.lines("/resolve/") == []


def test_licences_are_shown_before_anything_is_loaded(hub: Hub, dest: Path) -> None:
    seen: dict[str, int] = {}
    download(dest, steps=(4,), say=lambda line: seen.setdefault(line, len(hub.lines("/resolve/"))))
    shown = {line: loaded for line, loaded in seen.items() if "licence: " in line}
    assert len(shown) == 3 and set(shown.values()) == {0}


# Later calls


def test_second_call_loads_nothing_and_keeps_to_the_recorded_commit(
    hub: Hub, dest: Path, repositories: Mapping[str, Mapping[str, bytes]]
) -> None:
    download(dest, lora=True)
    before = contents(dest)
    moved = hub.push(DMD2, {**repositories[DMD2], LORA: save({"new": torch.ones(1)})})
    hub.requests.clear()
    download(dest, lora=True)
    assert contents(dest) == before and hub.lines("/resolve/") == []

    message = refused(dest, lora=True, revisions={DMD2: "main"})
    assert moved in message and "`update`" in message and contents(dest) == before

    download(dest, lora=True, update=True)
    assert read_manifest(dest).sources[DMD2].revision == moved
    assert hub.lines("/resolve/") == [f"GET /{DMD2}/resolve/{moved}/{LORA}"]  # the rest has not changed
    assert "new" in load_file(dest / "lora" / LORA)


@pytest.mark.parametrize("path", [FOUR, LORA])
def test_other_bytes_at_the_recorded_commit_are_refused(hub: Hub, dest: Path, path: str) -> None:
    download(dest, lora=True)
    before = contents(dest)
    commit = hub.branches[DMD2]["main"]
    hub.commits[commit][path] += b"\0"
    message = refused(dest, lora=True)
    assert f"{DMD2}/{path}" in message and sha256(hub.commits[commit][path]) in message and commit in message
    assert contents(dest) == before


def test_other_bytes_of_a_small_file_are_refused_and_can_be_taken(hub: Hub, dest: Path) -> None:
    download(dest, steps=(4,))
    before, recorded = contents(dest), read_manifest(dest).files["unet/config.json"]
    commit = hub.branches[BASE]["main"]
    hub.commits[commit]["unet/config.json"] += b"\n"
    message = refused(dest, steps=(4,))
    assert f"{BASE}/unet/config.json" in message and recorded in message and "`update`" in message
    assert contents(dest) == before
    download(dest, steps=(4,), update=True)
    assert (dest / "unet" / "config.json").read_bytes() == hub.commits[commit]["unet/config.json"]


def test_commit_can_be_pinned(hub: Hub, dest: Path, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
    first = hub.branches[VAES["kl"]]["main"]
    hub.push(VAES["kl"], {**repositories[VAES["kl"]], "config.json": b"not json"})
    download(dest, steps=(4,), revisions={VAES["kl"]: first})
    assert read_manifest(dest).sources[VAES["kl"]].revision == first
    assert f"knows no revision {'0' * 40}" in refused(dest, steps=(4,), revisions={BASE: "0" * 40})
    assert "expected one of" in refused(dest, steps=(4,), revisions={"some/thing": "main"})


def test_another_choice_replaces_the_folder_and_loads_only_what_is_new(hub: Hub, dest: Path) -> None:
    download(dest, lora=True)
    hub.requests.clear()
    download(dest, steps=(1,), vaes=("tiny",))
    loaded = {line.split("/resolve/")[0] for line in hub.lines("GET .*/resolve/")}
    assert loaded == {f"GET /{VAES['tiny']}"}
    manifest = read_manifest(dest)
    assert manifest.students == {1: Student(subfolder="unet", timesteps=[399])}  # where plain diffusers looks
    assert set(contents(dest)) == {*manifest.files, MANIFEST} and not (dest / "lora").exists()
    assert AutoencoderTiny.from_pretrained(dest / "vae").config.latent_channels == 4

    hub.requests.clear()
    download(dest)  # the 1-step student goes back to unet_1step, converted as it is
    assert sorted(line.rpartition("/")[2] for line in hub.lines("/resolve/")) == sorted(
        [FOUR, "config.json", UNET_FILE]
    )
    verify(dest, read_manifest(dest))


@pytest.mark.parametrize("damaged", [f"unet/{UNET_FILE}", f"unet_1step/{UNET_FILE}", "vae/config.json"])
def test_damaged_file_is_loaded_again(hub: Hub, dest: Path, damaged: str) -> None:
    download(dest)
    before = contents(dest)
    content = (dest / damaged).read_bytes()
    (dest / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    hub.requests.clear()
    download(dest)
    assert contents(dest) == before and len(hub.lines("GET .*/resolve/")) == 1


def test_what_is_not_from_the_hub_is_never_replaced(hub: Hub, dest: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DEFAULT, tmp_path / "emoji"))
    assert "holds something else" in refused(copy)
    dest.mkdir(parents=True)
    (dest / "thesis.txt").write_text("years of work")
    assert "holds something else" in refused(dest)
    (tmp_path / "file").touch()
    assert "is a file" in refused(tmp_path / "file")
    assert "mount point" in refused(Path("/"))
    assert "choose another name" in refused(tmp_path / "safety", safety=True)
    assert hub.requests == [] and (dest / "thesis.txt").exists() and contents(copy) == contents(DEFAULT)

    shutil.rmtree(dest)
    dest.mkdir()  # an empty folder is nothing that could be lost
    download(dest, steps=(4,))
    (dest / "lora").mkdir()
    (dest / "lora" / "mine.safetensors").touch()
    assert "mine.safetensors: is not from the hub" in refused(dest, steps=(4,))


# Offline


def test_offline_keeps_what_is_there_and_uses_the_cache(
    hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{BASE}: offline (HF_HUB_OFFLINE), and main is not in the cache" in refused(dest)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    download(dest, steps=(4,))
    before = contents(dest)
    for path in (ONE, LORA):
        hf_hub_download(DMD2, path)
    hub.close()
    hub.requests.clear()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download(dest, steps=(4,))
    assert contents(dest) == before
    download(dest, lora=True)
    manifest = read_manifest(dest)
    assert set(manifest.sources[DMD2].files) == {FOUR, ONE, LORA} and not (dest / "lora" / LORA).is_symlink()
    verify(dest, manifest)
    assert f"{VAES['tiny']}: offline" in refused(dest, vaes=("tiny",))
    (dest / "text_encoder" / "model.safetensors").write_bytes(b"damaged")
    assert f"{BASE}/text_encoder/model.fp16.safetensors: offline" in refused(dest)
    assert hub.requests == []


def test_cache_of_the_hub_spares_the_download(hub: Hub, dest: Path) -> None:
    cached = Path(hf_hub_download(DMD2, FOUR))
    hub.requests.clear()
    download(dest, steps=(4,))
    assert not hub.lines(f"/resolve/.*/{FOUR}")
    assert cached.exists() and not cached.samefile(dest / "unet" / UNET_FILE)
    cached.resolve().write_bytes(b"damaged")
    shutil.rmtree(dest)
    download(dest, steps=(4,))
    assert len(hub.lines(f"GET .*/resolve/.*/{FOUR}")) == 1


# Contents that are not what they should be


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-here",)


def test_pickle_with_code_is_refused(hub: Hub, dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (pickled({"conv_in.weight": Evil()}), pickle.dumps(Evil()), b"no pickle at all"):
        hub.push(DMD2, {ONE: content})
        message = refused(dest, steps=(1,))
        assert f"{DMD2}/{ONE}: torch.load with weights_only=True refuses it" in message
    assert not (tmp_path / "was-here").exists() and not dest.exists()


def test_other_networks_are_refused_and_the_difference_is_named(hub: Hub, dest: Path, weights: Path) -> None:
    state = load_file(weights / "unet" / UNET_FILE)
    state["extra.weight"] = state.pop("conv_in.weight")
    state["conv_in.bias"] = state["conv_in.bias"][:1].clone()
    hub.push(DMD2, {ONE: pickled(state), FOUR: save(state)})
    for step in (1, 4):
        message = refused(dest, steps=(step,))
        assert f"{DMD2}/{STUDENTS[step]}: not the UNet" in message
        assert "missing: conv_in.weight (1 in all)" in message
        assert "unexpected: extra.weight (1 in all)" in message
        assert "of another shape: conv_in.bias (1 in all)" in message
    hub.push(DMD2, {ONE: pickled(["a list"]), FOUR: b"no safetensors"})
    assert "expected tensors by name" in refused(dest, steps=(1,))
    assert f"{DMD2}/{FOUR}: Error while deserializing" in refused(dest, steps=(4,))
    assert not dest.exists()


# The script


def load_script() -> types.ModuleType:
    path = str(ROOT / "scripts" / "download-weights")
    loader = importlib.machinery.SourceFileLoader("download_weights", path)
    module = types.ModuleType("download_weights")
    module.__file__ = path
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sd21"], "sd21: expected sdxl, sdxl-teacher, sd15"),
        (["sd15", "--steps", "4"], "--steps with sd15: a teacher has none; expected it with sdxl"),
        (["sdxl-teacher", "--lora"], "--lora with sdxl-teacher: a teacher has none; expected it with sdxl"),
        (["--steps", "2"], "--steps 2: expected 1, 4 or 1,4"),
        (["--steps", ""], "--steps : expected 1, 4 or 1,4"),
        (["--vae", "kl,kl"], "--vae kl,kl: expected kl, tiny or kl,tiny"),
        (["--revision", "main"], "--revision main: expected REPOSITORY=REVISION"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script()
    monkeypatch.setattr(sys, "argv", ["download-weights", *arguments])
    with pytest.raises(SystemExit) as exit:
        script.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"download-weights: {told}\n"


def test_the_end_names_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, dest = load_script(), tmp_path / "my weights"
    monkeypatch.setattr(script, "download", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["download-weights", "--dest", str(dest)])
    with pytest.raises(SystemExit) as exit:
        script.main()
    first, second = capsys.readouterr().out.splitlines()
    assert exit.value.code in (0, None)
    assert first == f"next: dmd2 generate \"a lion in the savanna\" --weights '{dest}'"
    assert second == f"  or: dmd2 cog --weights '{dest}'"


def test_ctrl_c_is_one_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script()

    def interrupted(*_: Any, **options: Any) -> None:
        assert options["steps"] == [4] and options["vaes"] == ["tiny"] and options["revisions"] == {BASE: "abc"}
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "download", interrupted)
    arguments = ["--steps", "4", "--vae", "tiny", "--revision", f"{BASE}=abc"]
    monkeypatch.setattr(sys, "argv", ["download-weights", *arguments])
    with pytest.raises(SystemExit) as exit:
        script.main()
    assert exit.value.code == 130
    assert capsys.readouterr().err == "download-weights: stopped; run this again to go on\n"


def test_script_through_a_proxy_with_a_token(hub: Hub, tmp_path: Path) -> None:
    dest = tmp_path / "weights" / "mine"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "download-weights"),
        "sdxl",
        "--steps",
        "4",
        "--dest",
        str(dest),
    ]
    pin = ["--revision", f"{DMD2}={hub.branches[DMD2]['main']}", "--safety"]
    hub.token = "hf_secret"
    far = {"HF_ENDPOINT": "http://hub.example", "HTTP_PROXY": hub.endpoint, "HF_TOKEN": "hf_secret"}
    done = subprocess.run(
        command + pin, env=environment(hub, tmp_path, **far), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CC BY-NC-SA 4.0: no commercial use" in done.stdout and "every file checked" in done.stdout
    assert {request.headers["host"] for request in hub.requests} == {"hub.example", f"localhost:{hub.port}"}
    verify(dest, read_manifest(dest))
    verify(dest.with_name("safety"), read_manifest(dest.with_name("safety")))
