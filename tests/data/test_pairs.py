"""Noise-image pairs: what is in them, that work goes on where it stopped, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dmd2.cli
from dmd2.data.pairs import FIRST_SEED, Pairs, make_pairs
from dmd2.data.shards import INDEX, Part, read_index
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import conditioned, sample_heun, teacher_sigmas
from dmd2.models.edm.folder import load_edm, save_edm
from dmd2.models.edm.network import ClassCondition, EdmConfig, EdmNetwork
from dmd2.models.family import Family, open_family
from dmd2.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = EdmConfig(
    architecture="ddpmpp",
    resolution=4,
    classes=3,
    model_channels=8,
    channel_mult=(1, 1),
    blocks=1,
    attention=(),
)
COUNT, STEPS, BATCH, SHARD = 25, 3, 4, 10


def saved(folder: Path, seed: int = 0, **change: object) -> Path:
    torch.manual_seed(seed)
    network = EdmNetwork(CONFIG.model_copy(update=change))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    save_edm(folder, network, name="tiny", licence="none", recipe={})
    return folder


def opened(teacher: Path) -> Family:
    return open_family(teacher, torch.device("cpu"), "fp32")


def make(weights: Path, out: Path, count: int = COUNT, steps: int = STEPS) -> Path:
    make_pairs(weights, out, count, steps, BATCH, "cpu", shard=SHARD)
    return out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 pairs. Not to be changed: copy them."""
    return make(teacher, tmp_path_factory.mktemp("pairs") / "whole")


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def test_pairs_are_what_the_teacher_s_sampler_draws_from_their_seeds(teacher: Path, whole: Path) -> None:
    names = [f"pairs-0000{k}.safetensors" for k in range(3)]
    assert list(shards(whole)) == ["index.json", *names]
    denoiser = load_edm(teacher, "cpu")
    seen = 0
    for name in names:
        shard = load_file(whole / name)
        n = len(shard["seeds"])
        index = torch.arange(seen, seen + n)
        assert torch.equal(shard["seeds"], FIRST_SEED + index) and torch.equal(shard["labels"], index % 3)
        cond = ClassCondition.of(shard["labels"], 3)
        noise = seeded_noise(shard["seeds"].tolist(), (3, 4, 4))
        with torch.no_grad():
            expected = sample_heun(conditioned(denoiser, cond), 80 * noise, teacher_sigmas(denoiser, STEPS))
        assert expected.std() > 0.1
        assert shard["images"].dtype == torch.float16
        assert torch.allclose(shard["images"].float(), expected, atol=2e-3, rtol=1e-3)
        seen += n
    assert seen == COUNT


def test_seeds_are_not_those_that_students_are_judged_by() -> None:
    judged, shown = (seeded_noise([first], (3, 4, 4)) for first in (0, FIRST_SEED))
    assert not torch.equal(judged, shown)
    # PyTorch's CPU generator drops all but 32 bits: a seed of 2³² would have been 0 again.
    assert 0 < FIRST_SEED < 2**32


def test_after_a_kill_the_rest_is_made_and_every_byte_is_the_same(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    script = (
        "import sys, time; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "import dmd2.data.pairs as p\n"
        "draw = p._generate\n"
        "def slow(*arguments):\n    time.sleep(0.2)\n    return draw(*arguments)\n"
        "p._generate = slow\n"
        f"p.make_pairs(Path(sys.argv[1]), Path(sys.argv[2]), {COUNT}, {STEPS}, {BATCH}, 'cpu', shard={SHARD})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(teacher), str(out)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not ((out / INDEX).exists() and read_index(out).files) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    begun = shards(out)
    assert "pairs-00000.safetensors" in begun and "pairs-00002.safetensors" not in begun
    with pytest.raises(UserError, match=r"lacks 2 of 3 files, such as pairs-00001"):
        Pairs(out, opened(teacher))
    kept = (out / "pairs-00000.safetensors").stat().st_mtime_ns

    make(teacher, out)
    assert shards(out) == shards(whole)
    assert (out / "pairs-00000.safetensors").stat().st_mtime_ns == kept  # not made again
    Pairs(out, opened(teacher))


def test_what_killed_processes_left_is_removed(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "pairs"))
    stale = out / ".pairs-00000.safetensors.0123abcd.tmp"
    stale.write_text("half a shard")
    (out / "pairs-00000.safetensors").unlink()
    make(teacher, out)
    assert not stale.exists() and shards(out) == shards(whole)


def test_parts_make_the_same_pairs(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    for number, done in ((2, False), (1, True)):
        given = {"shard": SHARD, "part": Part(number, 2)}
        assert make_pairs(teacher, out, COUNT, STEPS, BATCH, "cpu", **given) is done  # type: ignore[arg-type]
    assert shards(out) == shards(whole)


def test_batches_are_a_function_of_seed_and_step(teacher: Path, whole: Path) -> None:
    pairs = Pairs(whole, opened(teacher))
    assert len(pairs) == COUNT
    one, again, other = (pairs.batch(64, seed=seed, step=7) for seed in (0, 0, 1))
    assert torch.equal(one.noise, again.noise) and torch.equal(one.target, again.target)
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise, pairs.batch(64, seed=0, step=8).noise)
    assert one.noise.shape == one.target.shape == (64, 3, 4, 4) and one.target.dtype == torch.float32

    table = [load_file(whole / f"pairs-0000{k}.safetensors") for k in range(3)]
    seeds = torch.cat([shard["seeds"] for shard in table]).tolist()
    noise, images = seeded_noise(seeds, (3, 4, 4)), torch.cat([shard["images"] for shard in table])
    found = [int((noise - n).flatten(1).abs().sum(1).argmin()) for n in one.noise]
    assert torch.equal(one.noise, noise[found]) and torch.equal(one.target, images[found].float())
    assert torch.equal(one.cond.labels.argmax(1), torch.tensor(found) % 3)
    assert len(set(found)) > 15  # from all over the folder


def test_networks_without_classes_have_pairs_too(tmp_path: Path) -> None:
    weights = saved(tmp_path / "model", classes=0)
    out = make(weights, tmp_path / "pairs", count=3)
    assert load_file(out / "pairs-00000.safetensors")["labels"].tolist() == [-1, -1, -1]
    assert Pairs(out, opened(weights)).batch(2, seed=0, step=0).cond.labels.shape == (2, 0)


# What is refused


def test_pairs_of_another_teacher_are_refused(teacher: Path, whole: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made by another teacher"):
        Pairs(whole, opened(other))
    with pytest.raises(UserError, match="holds other rows, whose teacher is"):
        make(other, whole)


def test_other_pairs_are_not_mixed_with_these(teacher: Path, whole: Path) -> None:
    before = shards(whole)
    with pytest.raises(UserError, match="whose steps is 3, not 5"):
        make(teacher, whole, steps=5)
    with pytest.raises(UserError, match="whose count is 25, not 40"):
        make(teacher, whole, count=40)
    assert shards(whole) == before


def test_broken_shards_are_named_and_made_again(teacher: Path, whole: Path, tmp_path: Path) -> None:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-7])

    def changed(path: Path) -> None:
        shard = load_file(path)
        save_file(shard | {"seeds": shard["seeds"] + 1}, path)

    for number, spoil in enumerate((cut, changed)):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        spoil(folder / "pairs-00001.safetensors")
        with pytest.raises(UserError, match=r"pairs-00001.safetensors: sha256 is .* damaged or changed") as error:
            Pairs(folder, opened(teacher)).batch(64, seed=0, step=0)
        assert "\n" not in str(error.value)
        make(teacher, folder)
        assert shards(folder) == shards(whole)

    path = folder / INDEX
    for change, message in (({"count": "many"}, r"index.json: count: "), ({"made": {}}, r"made: teacher: ")):
        path.write_text(json.dumps(json.loads((whole / INDEX).read_text()) | change))
        with pytest.raises(UserError, match=message):
            Pairs(folder, opened(teacher))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "-n 0: expected 1 to"),
        (["--steps", "1"], "--steps 1: expected 2 to 1000"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_wrong_numbers_are_one_line(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert verb(monkeypatch, teacher, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_no_teacher_and_what_is_no_folder_of_pairs(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = saved(tmp_path / "student", sigmas=(80.0,))
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "letter.txt").write_text("dear")
    for weights, out, message in (
        (student, tmp_path / "out", "a student of 1 steps"),
        (tmp_path / "nowhere", tmp_path / "out", "no such folder"),
        (teacher, occupied, "has no index.json"),
        (teacher, occupied / "letter.txt", "has no index.json"),
    ):
        assert verb(monkeypatch, weights, out, "-n", "2") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(UserError, match=r"has no index\.json"):
        Pairs(occupied, opened(teacher))


def test_the_verb_makes_pairs(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "pairs"
    assert verb(monkeypatch, teacher, out, "-n", "7", "--steps", "2", "--batch", "3", "--device", "cpu") == 0
    assert capsys.readouterr().out == f"done: 7 pairs in {out}\n"
    assert len(Pairs(out, opened(teacher))) == 7


def verb(monkeypatch: pytest.MonkeyPatch, weights: Path, out: Path, *arguments: str) -> int:
    """`dmd2 pairs …` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["dmd2", "pairs", str(weights), str(out), *arguments])
    with pytest.raises(SystemExit) as end:
        dmd2.cli.main()
    return int(end.value.code or 0)
