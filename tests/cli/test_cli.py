"""The command line: images with their facts; and for bad input one line, status 2 and nothing written."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

import dmd2.cli
from dmd2.inference.inputs import fitted
from dmd2.inference.request import ImageRequest
from dmd2.models.stable_diffusion.folder import UNET_FILE
from dmd2.runtime.files import sha256_file
from dmd2.training.preview import CaptionPreview
from dmd2.training.recipes import RECIPES
from dmd2.weights.manifest import read_manifest
from tests.models.adapters.test_lora import ATTENTION, kohya_style
from tests.tiny_sdxl import photograph

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that whatever is written by default shows."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """`dmd2 …` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["dmd2", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        dmd2.cli.main()
    return int(end.value.code or 0)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a refused call leaves on stderr."""
    assert run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dmd2: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert list(Path.cwd().iterdir()) == []
    return err


# Bad input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([""], "PROMPT: empty"),
        (["an owl", "  "], "PROMPT: empty"),
        (["an owl", "--steps", "2"], "--steps 2: these weights have 1, 4, teacher"),
        (["an owl", "--size", "65x64"], "width: 65 (size 65x64); expected a multiple of 4 pixels, at least 16"),
        (["an owl", "--size", "0x0"], "width: 0 (size 0x0); expected"),
        (["an owl", "--size", "foo"], "--size foo: expected WIDTHxHEIGHT"),
        (["an owl", "--size", "64x-64"], "--size 64x-64: expected WIDTHxHEIGHT"),
        (["an owl", "--num-outputs", "0"], "--num-outputs 0: expected 1 to 1000"),
        (["an owl", "--seed", "-1"], "--seed -1: expected greater than or equal to 0"),
        (["an owl", "--seed", str(2**32)], "--seed 4294967296: expected less than or equal to 4294967295"),
        (["an owl", "--device", "tpu"], "--device tpu: expected auto, cpu or cuda"),
    ],
)
def test_generate_refuses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    arguments: list[str],
    named: str,
) -> None:
    assert named in refused(monkeypatch, capsys, "generate", *arguments, "--weights", weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_generate_refuses_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    line = refused(monkeypatch, capsys, "generate", "an owl", "--weights", weights, "--device", "cuda")
    assert "--device cuda: this machine has none" in line


def test_generate_names_what_is_wrong_with_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere"
    assert f"--weights {missing}: no such folder" in refused(
        monkeypatch, capsys, "generate", "an owl", "--weights", missing
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "dmd2.json: missing" in refused(monkeypatch, capsys, "generate", "an owl", "--weights", empty)

    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    file = copy / "unet" / UNET_FILE
    os.truncate(file, file.stat().st_size - 1000)
    line = refused(monkeypatch, capsys, "generate", "an owl", "--weights", copy)
    assert f"{file}: sha256 is {sha256_file(file)}" in line
    assert read_manifest(weights).files[f"unet/{UNET_FILE}"] in line
    file.unlink()
    assert f"{file}: missing" in refused(monkeypatch, capsys, "generate", "an owl", "--weights", copy)


def test_generate_refuses_an_out_that_is_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    line = refused(monkeypatch, capsys, "generate", "an owl", "--weights", weights, "--out", file)
    assert f"--out {file}: " in line and "is a file; expected a folder" in line
    line = refused(monkeypatch, capsys, "generate", "an owl", "--weights", weights, "--out", file / "below")
    assert f"--out {file / 'below'}: {file} is a file" in line
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["emoji-dmd3"], "recipe 'emoji-dmd3': unknown; expected one of emoji-vae"),
        (["emoji-dmd2-4step", "--set", "colour=red"], "--set colour: emoji-dmd2-4step has no such key; expected"),
        (["emoji-dmd2-4step", "--set", "loop=1"], "--set loop: "),
        (["emoji-dmd2-4step", "--set", "lr"], "--set lr: expected key=value"),
        (["emoji-dmd2-4step", "--set", "lr=fast"], "--set lr=fast: "),
        (["emoji-dmd2-4step", "--set", "iterations=1.5"], "--set iterations=1.5: "),
        (["emoji-dmd2-4step", "--set", "loop.seed=null"], "--set loop.seed=null: expected a whole number from 0"),
        (["emoji-dmd2-4step", "--set", "timesteps=[999,x]"], "--set timesteps=[999,x]: "),
        (["emoji-dmd2-4step", "--set", "precision=fp8"], "--set precision=fp8: "),
        (["emoji-dmd2-4step", "--set", "batch_size=0"], "--set batch_size=0: expected a whole number from 1"),
        (["emoji-dmd2-4step", "--set", "loop.sample_every=-1"], "sample_every=-1: expected a whole number from 1"),
        (["emoji-dmd2-4step", "--set", "timesteps=[]"], "--set sigmas=[] with timesteps=[]: expected the levels"),
        (["emoji-dmd2-4step", "--set", "timesteps=[249,999]"], "expected descending levels"),
        (["emoji-dmd2-4step", "--set", "timesteps=[1000]"], "--set timesteps=[1000]: expected a list of"),
        (["emoji-dmd2-4step", "--device", "tpu"], "--device tpu: "),
        (["emoji-dmd2-4step", "--data", "nowhere.zip"], "nowhere.zip: "),
        (["emoji-dmd2-4step", "--init", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_train_refuses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    emoji_zip: Path,
    arguments: list[str],
    named: str,
) -> None:
    given = [] if "--data" in arguments else ["--data", emoji_zip]
    given += [] if "--init" in arguments else ["--init", weights]
    assert named in refused(monkeypatch, capsys, "train", *arguments, *given)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "dmd2: No space left on device\n"),
        (OSError(30, "Read-only file system", "/a\nb"), "dmd2: /a b: Read-only file system\n"),
        (OSError("something else"), "dmd2: something else\n"),
    ],
)
def test_an_error_of_a_disk_is_one_line_whatever_the_command(
    error: OSError, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("dmd2.data.pairs.make_pairs", fail)
    assert run(monkeypatch, "pairs", "weights", "out", "--device", "cpu") == 2
    assert capsys.readouterr().err == line


def test_train_refuses_a_zip_that_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    emoji_zip: Path,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken.zip"
    broken.write_bytes(emoji_zip.read_bytes()[:-200])
    line = refused(monkeypatch, capsys, "train", "emoji-dmd2-4step", "--data", broken, "--init", weights)
    assert str(broken) in line and "build-emoji" in line


def test_train_refuses_a_judge_that_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    emoji_zip: Path,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "judge.safetensors"
    broken.write_bytes(b"nothing")
    arguments = ("--data", emoji_zip, "--init", weights, "--classifier", broken)
    assert str(broken) in refused(monkeypatch, capsys, "train", "emoji-dmd2-4step", *arguments)


# Images


def test_images_say_how_they_were_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "images"
    prompt = "an öwl – “quoted”"
    arguments = ("--weights", weights, "--seed", "7", "--num-outputs", "2", "--steps", "1", "--out", out, "--json")
    assert run(monkeypatch, "generate", prompt, *arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sha256 = read_manifest(weights).files[f"unet_1step/{UNET_FILE}"]
    assert len(lines) == 2
    assert {Path(line["path"]) for line in lines} == set(out.iterdir())  # and no temporary files
    for i, line in enumerate(lines):
        metadata = {"prompt": prompt, "seed": 7 + i, "steps": "1", "weights_sha256": sha256}
        assert line.keys() == {"path", "seconds", *metadata}
        assert metadata.items() <= line.items()
        assert line["seconds"].keys() == {"text", "denoise", "decode", "load"}
        assert all(seconds >= 0 for seconds in line["seconds"].values())
        with Image.open(line["path"]) as image:
            assert image.format == "PNG" and image.mode == "RGB" and image.size == (64, 64)
            assert image.info == {name: str(value) for name, value in metadata.items()}


def test_one_line_for_each_image_and_the_asked_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    assert (
        run(monkeypatch, "generate", "an owl", "a book", "--weights", weights, "--size", "96x32", "--seed", "3") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        path, metadata = line.split("  ", 1)
        assert metadata.startswith("seed 3  ") and " ms" in metadata
        with Image.open(path) as image:
            assert image.size == (96, 32) and image.info["steps"] == "4"
    assert {path.parent.name for path in Path.cwd().rglob("*.png")} == {"outputs"}


def test_image_i_uses_seed_plus_i_and_is_the_same_in_any_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    def pixels(folder: str, *arguments: str) -> dict[tuple[str, int], np.ndarray]:
        assert (
            run(monkeypatch, "generate", *arguments, "--weights", weights, "--out", tmp_path / folder, "--json") == 0
        )
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return {(line["prompt"], line["seed"]): np.asarray(Image.open(line["path"])) for line in lines}

    many = pixels("many", "an owl", "a red apple", "--num-outputs", "3", "--seed", "100")
    assert set(many) == {(prompt, seed) for prompt in ("an owl", "a red apple") for seed in (100, 101, 102)}
    for (prompt, seed), image in many.items():
        alone = pixels("alone", prompt, "--seed", str(seed))
        assert np.array_equal(alone[prompt, seed], image)
    assert not np.array_equal(many["an owl", 100], many["an owl", 101])


def test_prompts_that_look_alike_do_not_overwrite_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    start = "a red apple on a blue background beside a book and a green heart and "
    prompts = [start + "an owl", start + "a book", "an owl", "an owl!"]
    assert run(monkeypatch, "generate", *prompts, "--weights", weights, "--seed", "0", "--steps", "1", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({line["path"] for line in lines}) == 4
    for line in lines:
        with Image.open(line["path"]) as image:
            assert image.info["prompt"] == line["prompt"]


def test_a_random_seed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    seeds = []
    for _ in range(2):
        assert run(monkeypatch, "generate", "an owl", "--weights", weights, "--steps", "1", "--json") == 0
        seeds.append(json.loads(capsys.readouterr().out)["seed"])
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**32 for seed in seeds)
    assert len(list((Path.cwd() / "outputs").iterdir())) == 2


def test_nothing_heavy_is_imported_before_arguments_are_checked() -> None:
    code = "import dmd2.cli, sys; dmd2.cli.main()"
    for arguments in (
        ["generate", "an owl", "--seed", "-1"],
        ["cog", "--port", "0"],
        ["train"],
        ["--version"],
        ["pairs", "--help"],
    ):
        heavy = "sorted({'torch', 'diffusers'} & sys.modules.keys())"
        tell = f"import atexit, sys; atexit.register(lambda: print({heavy})); {code}"
        done = subprocess.run(
            [sys.executable, "-c", tell, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode in (0, 2) and done.stdout.splitlines()[-1] == "[]", (arguments, done)


def test_the_version_is_the_package_s(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"dmd2 {dmd2.__version__}\n"


def test_options_of_generate_are_the_request_s() -> None:
    """Names, defaults and, where they need no other words, help texts are those of `ImageRequest`."""
    command = typer.main.get_command(dmd2.cli.app).commands["generate"]  # type: ignore[attr-defined]
    options = {parameter.name: parameter for parameter in command.params}
    made = ["seed", "num_outputs", "image", "mask", "prompt_strength", "control_image", "control_scale", "previews"]
    for name in made:
        assert options[name].default == ImageRequest.model_fields[name].default
        assert options[name].opts == ["--" + name.replace("_", "-")] and options[name].help
    assert options["prompt_strength"].help == ImageRequest.model_fields["prompt_strength"].description


def test_every_command_has_an_example_and_every_option_a_sentence() -> None:
    def commands(group: Any) -> Iterator[Any]:
        for command in group.commands.values():
            yield from commands(command) if hasattr(command, "commands") else [command]

    for command in commands(typer.main.get_command(dmd2.cli.app)):
        assert command.epilog.startswith("Example: dmd2 "), command.name
        for parameter in command.params:
            assert parameter.help and not parameter.help.startswith(("Of ", "For ", "To ")), (
                command.name,
                parameter.name,
            )


def test_info_says_what_a_folder_is_and_whether_it_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    assert run(monkeypatch, "info", weights, "--json") == 0
    manifest, said = read_manifest(weights), json.loads(capsys.readouterr().out)
    assert said["checksums"] == "hold" and said["name"] == manifest.name and said["licence"] == manifest.licence
    assert said["native_size"] == "64x64" and set(said["students"]) == {"1", "4"}
    assert said["teacher"]["steps"] == manifest.teacher.steps if manifest.teacher else said["teacher"] is None
    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    (copy / "vae" / UNET_FILE).write_bytes(b"half")
    assert run(monkeypatch, "info", copy) == 2
    out, err = capsys.readouterr()
    assert "sha256 is" in out and err.startswith("dmd2: ") and "sha256 is" in err and err.count("\n") == 1
    assert "WEIGHTS nowhere: no such folder" in refused(monkeypatch, capsys, "info", "nowhere")


def test_recipes_are_listed_or_one_is_resolved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "recipes") == 0
    listed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert listed == list(RECIPES)
    assert run(monkeypatch, "recipes", "emoji-dmd2-1step", "--set", "lr=5e-5", "--set", "batch_size=7") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["recipe"]["lr"], said["recipe"]["loop"]["batch_size"]) == (5e-5, 7) and "DMD2" in said["method"]
    assert "unknown" in refused(monkeypatch, capsys, "recipes", "nothing")
    assert "--set: given without NAME" in refused(monkeypatch, capsys, "recipes", "--set", "lr=1")


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], emoji_zip: Path
) -> None:
    sets = ["--set", "batch_size=2", "--set", "precision=fp32"]
    assert (
        run(monkeypatch, "train", "emoji-classifier", "--dry-run", "--data", emoji_zip, "--device", "cpu", *sets) == 0
    )
    text = capsys.readouterr().out
    said = json.loads(text[text.index("{") :])
    assert said["name"] == "emoji-classifier" and said["recipe"]["loop"]["batch_size"] == 2
    assert (
        said["parameters"]["classifier"] > 1000
        and said["megabytes"]["optimizer"] > said["megabytes"]["gradients"] > 0
    )
    assert len(said["seconds"]) == 3 and list(Path.cwd().iterdir()) == []


def test_a_dry_run_of_many_cards_needs_neither_them_nor_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(weights, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    sets = ["generator_every=1", "timesteps=[999]", "batch_size=4", "precision=fp32"]
    sets += ["gan_generator=0", "gan_critic=0"]
    options = [word for each in sets for word in ("--set", each)]
    begin = ("train", "emoji-dmd2-4step", "--init", bare, "--device", "cpu", *options, "--cards")
    assert run(monkeypatch, *begin, "2", "--dry-run") == 0
    text = capsys.readouterr().out
    said = json.loads(text[text.index("{") :])
    sizes = said["predicted"]["megabytes"]
    assert sizes["peak"] == pytest.approx(sum(sizes.values()) - sizes["peak"], abs=0.5) and min(sizes.values()) > 0
    assert said["predicted"]["teraflops"] > 0 and said["recipe"]["loop"]["batch_size"] == 4
    assert "--cards 2: expected it with --dry-run" in refused(monkeypatch, capsys, *begin, "2")
    assert "multiple of the 3" in refused(monkeypatch, capsys, *begin, "3", "--dry-run")
    assert "makes a student" in refused(monkeypatch, capsys, "train", "emoji-vae", "--cards", "2", "--dry-run")


def test_a_run_that_counts_its_arithmetic_logs_how_much_of_the_device_it_uses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    emoji_zip: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(CaptionPreview, "grid", lambda self, generate: generate(self.captions[:2], [0, 1])[0])
    sets = ["generator_every=1", "timesteps=[999]", "batch_size=2", "precision=fp32", "iterations=1"]
    options = [word for each in [*sets, "gan_generator=0", "gan_critic=0"] for word in ("--set", each)]
    paths = ("--init", weights, "--data", emoji_zip, "--classifier", tmp_path / "none", "--out", tmp_path / "run")
    begin = ("train", "emoji-dmd2-4step", "--device", "cpu", *paths, *options)
    monkeypatch.setattr("dmd2.cli.train.find_spec", lambda name: None)
    assert "pip install wandb" in refused(monkeypatch, capsys, *begin, "--wandb", "students")
    assert run(monkeypatch, *begin, "--flops") == 0
    assert "TFLOP/s a device" in capsys.readouterr().out
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 < line["flop_utilisation"] < 2 and line["peak_memory_gb"] > 0 and line["images_per_second"] > 0


@pytest.mark.parametrize(
    ("words", "found"),
    [("dmd2 train emoji-t", ["emoji-teacher"]), ("dmd2 generate owl --steps teacher-", ["teacher-4", "teacher-1"])],
)
def test_the_shell_completes_names_and_steps(words: str, found: list[str]) -> None:
    environment = {"_DMD2_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = "import sys; sys.argv = ['dmd2']; from dmd2.cli import app; app(prog_name='dmd2')"
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.stdout.split() == found, done.stderr


def test_every_field_has_the_name_of_its_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(monkeypatch, capsys, "evaluate", ".", "-n", "0", "--metric", "accuracy")
    assert line.startswith("dmd2: -n 0: too few")
    assert "dmd2: OUT.npz out.txt: " in refused(monkeypatch, capsys, "ref-stats", ".", "out.txt")
    assert "dmd2: WEIGHTS nothing: no such" in refused(monkeypatch, capsys, "pairs", "nothing", "out")
    line = refused(monkeypatch, capsys, "train", "emoji-vae", "--resume", "--out", "nothing")
    assert line.endswith("--out nothing: holds no checkpoint to resume from; without --resume, a run begins there\n")


def test_the_library_names_fields_and_no_flags() -> None:
    """Which flag a field has, the command line alone knows."""
    flags = re.compile(r"(?<![\w`-])--[a-z]\w+")
    for path in (ROOT / "dmd2").rglob("*.py"):
        if "cli" in path.parts or "service" in path.parts:
            continue
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise))
        told = [text.value for call in calls for text in ast.walk(call) if isinstance(text, ast.Constant)]
        for text in told:
            named = flags.findall(text) if isinstance(text, str) and "scripts/" not in text else []
            assert named == [], f"{path}: {text}"


# As a process of its own


def process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-m", "dmd2.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )


def test_a_process_prints_one_json_object_and_nothing_else(weights: Path) -> None:
    done = process("generate", "an owl", "--weights", weights, "--steps", "1", "--seed", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["path"]).is_file() and done.stdout.count("\n") == 1


def test_a_process_refuses_damaged_weights_in_one_line(weights: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    (copy / "vae" / UNET_FILE).write_bytes(b"half")
    done = process("generate", "an owl", "--weights", copy)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dmd2: ") and done.stderr.count("\n") == 1 and "sha256" in done.stderr
    assert list(Path.cwd().iterdir()) == []


def test_convert_refuses_what_is_no_pickle_of_edm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hostile, out = tmp_path / "hostile.pkl", tmp_path / "out"
    hostile.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert "os.system" in refused(monkeypatch, capsys, "convert", "edm", hostile, out)
    assert str(tmp_path / "nowhere.pkl") in refused(
        monkeypatch, capsys, "convert", "edm", tmp_path / "nowhere.pkl", out
    )
    assert not out.exists() and not (tmp_path / "ran").exists()


# Images from images


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with an image, a mask and a file that is none."""
    photograph(size=(128, 64)).save(tmp_path / "given.png")
    mask = Image.new("L", (128, 64))
    mask.paste(255, (0, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    (tmp_path / "text.png").write_text("hello")
    return tmp_path


def test_generate_begins_with_an_image_and_paints_into_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, given: Path
) -> None:
    common = ["generate", "an owl", "--weights", weights, "--seed", "3", "--json", "--image", given / "given.png"]
    found = []
    for more in ([], ["--prompt-strength", "0.3"], ["--mask", given / "mask.png"], ["--size", "96x96"]):
        assert run(monkeypatch, *common, *more) == 0
        answer = json.loads(capsys.readouterr().out)
        image = np.array(Image.open(answer["path"]))
        assert image.shape == ((96, 96, 3) if "--size" in more else (48, 96, 3))
        assert len(answer["image_sha256"]) == 64 and ("mask_sha256" in answer) == ("--mask" in more)
        found.append((answer["path"], image))
    assert len({path for path, _ in found}) == 4  # nothing was replaced
    kept = fitted(Image.open(given / "given.png"), (96, 48)).permute(1, 2, 0).numpy()
    assert (found[2][1][:, 48:] == kept[:, 48:]).all() and (found[2][1][:, :48] != kept[:, :48]).any()


def test_generate_with_loras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, given: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(weights / "unet")
    for seed, name in enumerate(("one", "two")):
        save_file(kohya_style(unet, "lora_unet", ATTENTION, seed), given / f"{name}.safetensors")
    images = []
    for more in (
        [],
        ["--lora", given / "one.safetensors"],
        ["--lora", f"{given / 'one.safetensors'}:0.5", "--lora", given / "two.safetensors"],
        ["--vae", "tiny"],
    ):
        assert run(monkeypatch, "generate", "an owl", "--weights", weights, "--seed", "3", "--json", *more) == 0
        answer = json.loads(capsys.readouterr().out)
        images.append(np.array(Image.open(answer["path"])).astype(int))
        assert answer.get("loras", "").count("safetensors") == list(more).count("--lora")
    assert abs(images[0] - images[1]).max() > 1 and abs(images[1] - images[2]).max() > 1
    assert (images[0] == images[3]).all()  # the embedded VAE is a small one


def test_generate_with_previews(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "generate", "an owl", "--weights", weights, "--seed", "3", "--json", "--previews") == 0
    path = Path(json.loads(capsys.readouterr().out)["path"])
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == sorted([path.name, *(f"{path.stem}_preview-{step}.png" for step in (1, 2, 3))])
    with Image.open(path.with_name(f"{path.stem}_preview-2.png")) as image:
        assert image.info["preview_of_step"] == "2"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--previews", "--steps", "teacher"], "--previews: the teacher's own sampler shows none"),
        (["--image", "nothing.png"], "image: cannot be read (No such file or directory)"),
        (["--image", "text.png"], "image: no image; expected PNG, JPEG, WEBP"),
        (["--mask", "mask.png"], "mask: given without an image"),
        (
            ["--image", "given.png", "--prompt-strength", "0"],
            "--prompt-strength 0.0: expected greater than",
        ),
        (["--image", "given.png", "--prompt-strength", "nan"], "--prompt-strength nan: expected"),
        (["--image", "given.png", "--steps", "teacher"], "--steps teacher: takes no image"),
        (["--lora", "nothing.safetensors"], "LoRA nothing.safetensors: expected an https URL"),
        (["--lora", "text.png"], "LoRA text.png: cannot be read as safetensors"),
        (["--lora", "text.png:7"], "LoRA text.png: scale 7.0; expected -4 to 4"),
        (["--control", "canny"], "control, control_image: expected both or neither"),
        (["--control-image", "given.png"], "control, control_image: expected both or neither"),
        (["--control", "canny", "--control-image", "given.png"], "control canny: expected a folder"),
        (["--vae", "huge"], "vae: huge; expected auto, kl or tiny"),
    ],
)
def test_generate_refuses_what_is_given(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    given: Path,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(given)
    assert run(monkeypatch, "generate", "an owl", "--weights", weights, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dmd2: ") and err.count("\n") == 1 and named in err
    assert not list(given.glob("outputs/*"))
