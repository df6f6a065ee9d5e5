"""Downloads with the real client from a hub on the loopback: whole, checked, resumable, and nothing half replaced."""

from __future__ import annotations

import errno
import fcntl
import importlib.machinery
import importlib.util
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, StableDiffusionXLPipeline
from huggingface_hub import constants, hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file, save

import dmd2.models.stable_diffusion.download
from dmd2.models.stable_diffusion.download import BASE, DMD2, LICENCES, LORA, SAFETY, STUDENTS, VAES, download
from dmd2.models.stable_diffusion.folder import UNET_FILE, load_text_to_image
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import sha256_file
from dmd2.weights.manifest import DEFAULT, MANIFEST, Student, read_manifest, verify
from tests.hub import Hub, sha256

ROOT = Path(__file__).parents[3]
FOUR, ONE = STUDENTS[4], STUDENTS[1]


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


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


def refused(dest: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        download(dest, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def left_beside(dest: Path) -> set[str]:
    return {path.name for path in dest.parent.iterdir()} - {dest.name, ".download-weights.lock"}


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
    assert moved in message and "--update" in message and contents(dest) == before

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
    assert f"{BASE}/unet/config.json" in message and recorded in message and "--update" in message
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


# The network


def test_cut_connection_goes_on_in_the_middle(hub: Hub, dest: Path, waits: list[float]) -> None:
    hub.on("GET /cdn/", times=1, cut=200_000)
    download(dest, steps=(4,))
    assert waits == [1]
    ranges = [request.headers.get("range") for request in hub.requests if "range" in request.headers]
    begun = {int(value.removeprefix("bytes=").removesuffix("-")) for value in ranges}
    assert len(begun) == 1 and 0 < begun.pop() <= 200_000
    verify(dest, read_manifest(dest))


@pytest.mark.parametrize("server", ["goes on", "begins anew", "has less now"])
def test_later_call_goes_on_where_a_dead_connection_stopped(
    hub: Hub, dest: Path, waits: list[float], repositories: Mapping[str, Mapping[str, bytes]], server: str
) -> None:
    large = sha256(repositories[DMD2][FOUR])
    hub.on(f"GET /cdn/{large}", times=1, cut=300_000)
    hub.on(f"GET /cdn/{large}", cut=0)
    message = refused(dest, steps=(4,))
    assert f"{DMD2}/{FOUR}" in message and "run this again" in message and not dest.exists()
    assert len(waits) == 5  # the client has tried again

    hub.heal()
    hub.requests.clear()
    if server == "begins anew":
        hub.on(f"GET /cdn/{large}", whole=True)
    if server == "has less now":  # as it were: there is more than the file has
        (part,) = dest.parent.rglob("*.part")
        part.write_bytes(bytes(len(repositories[DMD2][FOUR]) + 1))
    download(dest, steps=(4,))
    (request,) = [request for request in hub.requests if request.line == f"GET /cdn/{large}"]
    begun = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    assert begun == 0 if server == "has less now" else 0 < begun <= 300_000
    assert len(hub.lines("GET /cdn/")) == 1  # the other files were complete
    verify(dest, read_manifest(dest))


@pytest.mark.parametrize("path", [f"{DMD2}/{FOUR}", f"{BASE}/tokenizer/vocab.json"])
def test_wrong_bytes_are_not_kept(hub: Hub, dest: Path, path: str) -> None:
    owner, name, inner = path.split("/", 2)
    content = hub.commits[hub.branches[f"{owner}/{name}"]["main"]][inner]
    line = f"GET /cdn/{sha256(content)}" if path.endswith(".safetensors") else f"GET .*/{inner}"
    hub.on(line, times=1, damage=True)
    message = refused(dest, steps=(4,))
    assert path in message and "came damaged" in message and not dest.exists()
    damaged = bytes([content[0] ^ 1]) + content[1:]
    assert sha256(damaged) in message and sha256(damaged) not in contents(dest.parent).values()
    download(dest, steps=(4,))
    verify(dest, read_manifest(dest))


@pytest.mark.parametrize(
    ("line", "fault", "told"),
    [
        (f"GET /api/models/{BASE}/revision", {"status": 401}, f"{BASE}: the hub answers 401"),
        (f"GET /api/models/{DMD2}/revision", {"status": 404}, f"{DMD2}: the hub answers 404"),
        (
            f"GET /api/models/{BASE}/revision",
            {"status": 429, "headers": {"Retry-After": "7"}},
            f"{BASE}: the hub answers 429 Too Many Requests; in 7 seconds, run this again",
        ),
        (f"GET /api/models/{BASE}/revision", {"status": 503}, f"{BASE}: the hub answers 503"),
        (f"GET /{DMD2}/resolve", {"status": 403}, f"{DMD2}/{FOUR}: the hub answers 403"),
        (f"GET /{DMD2}/resolve", {"status": 404}, f"{DMD2}/{FOUR}: the hub answers 404"),
        (f"GET /{DMD2}/resolve", {"status": 429}, f"{DMD2}/{FOUR}: the hub answers 429"),
        ("GET /cdn", {"status": 500}, f"{BASE}/text_encoder/model.fp16.safetensors: the hub answers 500"),
        ("GET /api", {"status": 200}, "does not answer like a hub; check HF_ENDPOINT"),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    hub: Hub, dest: Path, waits: list[float], line: str, fault: dict[str, Any], told: str
) -> None:
    hub.on(line, **fault)
    assert told in refused(dest, steps=(4,))
    assert not dest.exists()


def test_rate_limit_is_waited_for_as_long_as_the_hub_says(hub: Hub, dest: Path, waits: list[float]) -> None:
    hub.on("GET .*/tree/", times=1, status=429, headers={"Retry-After": "3"})
    hub.on("GET /cdn/", times=1, status=429, headers={"Retry-After": "5"})
    download(dest, steps=(4,))
    assert waits == [4, 6]  # the client adds a second
    verify(dest, read_manifest(dest))


def test_missing_things_are_named(hub: Hub, dest: Path, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
    hub.push(DMD2, {name: content for name, content in repositories[DMD2].items() if name != ONE})
    assert f"{DMD2}: has no {ONE} at {hub.branches[DMD2]['main']}" in refused(dest)
    del hub.branches[DMD2]
    told = refused(dest)
    assert f"{DMD2}: the hub answers 404: {hub.endpoint} has no /api/models/{DMD2}" in told
    assert "HF_ENDPOINT" in told and "HF_TOKEN" not in told  # a mirror that lacks it: no token would help
    hub.close()
    huggingface_hub.close_session()
    assert hub.endpoint in refused(dest) and not dest.exists()


def test_a_dest_that_cannot_be_written_to_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told = refused(tmp_path / "file" / "sdxl", steps=(4,))
    assert told.startswith(f"--dest in {tmp_path / 'file'}: cannot be written to") and "another --dest" in told
    assert hub.lines("/resolve/") == []


def test_token_goes_to_the_hub_alone(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    assert "HF_TOKEN" in refused(dest, steps=(4,))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.requests.clear()
    download(dest, steps=(4,))
    sent = {request.line: request.headers.get("authorization") for request in hub.requests}
    assert {token for line, token in sent.items() if "/cdn/" in line} == {None}
    assert {token for line, token in sent.items() if "/cdn/" not in line} == {"Bearer hf_secret"}
    assert "hf_secret" not in (dest / MANIFEST).read_text()


# Xet


def test_xet_is_used_where_it_is_offered_and_goes_on_in_the_middle(
    hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.on("GET /cdn/", times=1, cut=400_000)  # so that there is something to go on with
    hub.on("GET /cdn/", cut=0)
    assert "text_encoder/model.fp16.safetensors" in refused(dest, steps=(4,))
    (part,) = dest.parent.rglob("*.part")
    had = part.stat().st_size
    assert had > 0
    hub.heal()
    hub.requests.clear()
    hub.xet = True
    download(dest, steps=(4,))
    verify(dest, read_manifest(dest))
    plans = [request for request in hub.requests if "/v1/reconstructions/" in request.line]
    assert len(plans) == 4  # two encoders, VAE, student
    assert plans[0].headers["range"].startswith(f"bytes={had}-") and plans[1].headers["range"].startswith("bytes=0-")
    assert {request.headers["authorization"] for request in plans} == {"Bearer for Xet only"}
    assert not [line for line in hub.lines("GET .*/resolve/") if line.endswith(".safetensors")]


def test_xet_can_be_switched_off(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.xet = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    download(dest, steps=(4,))
    assert hub.lines("reconstructions|xet-read-token") == [] and len(hub.lines("GET /cdn/")) == 4


def test_failure_of_xet_says_how_to_do_without(hub: Hub, dest: Path) -> None:
    hub.xet = True
    hub.on("reconstructions", status=404)
    message = refused(dest, steps=(4,))
    assert "text_encoder/model.fp16.safetensors: Xet:" in message and "HF_HUB_DISABLE_XET=1" in message


# The disk


def test_room_is_checked_before_anything_is_loaded(
    hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch, repositories: Mapping[str, Mapping[str, bytes]]
) -> None:
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    assert "the disk has 0.0 GB free" in refused(dest)
    assert hub.lines("/resolve/") == []

    # What it takes: every file that is loaded, and the pickle once more as safetensors.
    free = 10**9
    download(dest)
    loaded = [repositories[name][path] for name, s in read_manifest(dest).sources.items() for path in s.files]
    config = repositories[BASE]["unet/config.json"]
    free = sum(map(len, loaded)) + len(config) + len(repositories[DMD2][ONE]) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    other = dest.with_name("other")
    refused(other)
    free += 1
    download(other)
    free = 0
    download(other)  # everything is there, and links take no room


def test_disk_that_fills_up_loses_nothing(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(dest, steps=(4,))
    before = contents(dest)
    real = dmd2.models.stable_diffusion.download.http_get

    class Full(io.FileIO):
        """A file on a disk that has room for 100 kB."""

        def write(self, block: Any) -> int:
            if self.tell() + len(block) > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    def on_full_disk(url: str, stream: io.BufferedWriter, **options: Any) -> None:
        with Full(stream.fileno(), "ab", closefd=False) as file:
            real(url, file, **options)

    monkeypatch.setattr(dmd2.models.stable_diffusion.download, "http_get", on_full_disk)
    message = refused(dest)
    assert f"{DMD2}/{ONE}: the disk is full" in message and contents(dest) == before
    monkeypatch.setattr(dmd2.models.stable_diffusion.download, "http_get", real)
    hub.requests.clear()
    download(dest)
    (request,) = [request for request in hub.requests if "/cdn/" in request.line]
    assert request.headers["range"] == "bytes=65536-"
    verify(dest, read_manifest(dest))


def test_folder_that_cannot_be_written_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(tmp_path / "file" / "sdxl")
    opened = Path.open

    def no_writing(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "a" in mode:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", no_writing)
    assert "Permission denied" in refused(tmp_path / "weights" / "sdxl")
    assert hub.requests == []


def test_second_process_is_told_of_the_first(hub: Hub, dest: Path) -> None:
    dest.parent.mkdir()
    with (dest.parent / ".download-weights.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another download-weights is at work" in refused(dest)
    assert hub.requests == []
    download(dest, steps=(4,))


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


# Killed

CRASHES = """
import json, os, shutil, signal, sys
from pathlib import Path
from huggingface_hub import constants
from diffusers import LCMScheduler, UNet2DConditionModel  # once, not in each child
from dmd2.models.stable_diffusion.download import download
from dmd2.weights.manifest import read_manifest, verify
from tqdm import tqdm

os.fsync = lambda _: None
constants.DOWNLOAD_CHUNK_SIZE = 65536
parent = Path(sys.argv[1])
dest, old, new = parent / "sdxl", dict(steps=(4,)), dict(steps=(1,), vaes=("tiny",))
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree"}

def run(kill_at, choice):
    # In a child: download; before the kill_at-th change of a file or folder, SIGKILL. Returns status and changes.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        def hook(event, arguments):
            nonlocal count
            changes = event in WRITES or (event == "open" and arguments[1] and set(arguments[1]) & set("wax+"))
            if changes and str(parent) in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        download(dest, **choice, say=lambda line: None)
        os.write(writer, str(count).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        count = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(count or 0)

def state():
    verify(dest, read_manifest(dest))
    names = {p.relative_to(dest).as_posix() for p in dest.rglob("*") if p.is_file()} - {"dmd2.json"}
    assert names == set(read_manifest(dest).files), names
    return dict(read_manifest(dest).files)

assert run(0, old)[0] == 0
before = state()
shutil.copytree(dest, parent / "kept")
status, changes = run(0, new)
assert status == 0
after = state()
seen = []
for kill_at in sorted({*range(1, changes + 1, 16), *range(changes - 7, changes + 1)}):
    for name in ("sdxl", ".sdxl.partial", ".sdxl.old"):
        shutil.rmtree(parent / name, ignore_errors=True)
    shutil.copytree(parent / "kept", dest)
    assert run(kill_at, new)[0] == -signal.SIGKILL, kill_at
    found = state()
    assert found in (before, after), kill_at
    seen.append("new" if found == after else "old")
    if kill_at % 3 == 1:
        assert run(0, new)[0] == 0 and state() == after
        assert not list(parent.glob(".sdxl.*")), kill_at
shutil.rmtree(dest)
print(json.dumps({"changes": changes, "seen": seen}), flush=True)

# At last, in the middle of a file's bytes.
real = tqdm.update
def update(bar, number=1):
    real(bar, number)
    if number > 0 and bar.n > 600_000:
        os.kill(os.getpid(), signal.SIGKILL)
tqdm.update = update
download(dest, **old)
"""


def environment(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return kept | ours | {"PYTHONPATH": str(ROOT)} | more


def test_kill_at_any_point_leaves_the_old_state_or_the_new_one(hub: Hub, tmp_path: Path) -> None:
    parent = tmp_path / "weights"
    parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(parent)],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    result = json.loads(done.stdout.splitlines()[0])
    assert result["changes"] > 60 and {"old", "new"} == set(result["seen"])

    (part,) = (parent / ".sdxl.partial").rglob("*.part")
    had = part.stat().st_size
    assert had > 0 and not (parent / "sdxl").exists()
    hub.requests.clear()
    download(parent / "sdxl", steps=(4,))
    first = next(request for request in hub.requests if "/cdn/" in request.line)
    assert first.headers["range"] == f"bytes={had}-"
    verify(parent / "sdxl", read_manifest(parent / "sdxl"))


def test_swap_cut_between_its_two_steps_is_undone(hub: Hub, dest: Path) -> None:
    """Where the system cannot exchange two folders, it takes two renames."""
    download(dest, steps=(4,))
    before = contents(dest)
    dest.rename(dest.with_name(".sdxl.old"))
    hub.on("GET /api", status=503)
    refused(dest, steps=(4,))
    assert contents(dest) == before
    shutil.copytree(dest, dest.with_name(".sdxl.old"))
    refused(dest, steps=(4,))
    assert contents(dest) == before and left_beside(dest) == set()


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
        (["sd15"], "sd15: expected sdxl"),
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
