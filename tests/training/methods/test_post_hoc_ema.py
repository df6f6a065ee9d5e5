"""Post-hoc EMA: profiles in closed form, reconstruction, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.cli import main
from dmd2.runtime.errors import UserError
from dmd2.training.loop import Batch, Logs, LoopSettings, Method, Phase, train
from dmd2.training.methods.post_hoc_ema import WIDTHS, PowerAverages, exponent, reconstruct, shares
from dmd2.weights.manifest import read_manifest
from tests.training.pixels import write_teacher

T = 2000


class Powers(nn.Module):
    """Weights that are powers of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.zeros(4, dtype=torch.float64))

    def go(self, step: int) -> None:
        tau = (step + 1) / T
        self.x.copy_(torch.tensor([1.0, tau, tau**2, math.sin(9 * tau)], dtype=torch.float64))


@pytest.mark.parametrize("width", [0.02, 0.05, 0.10, 0.2, 0.28])
def test_an_exponent_has_the_width(width: float) -> None:
    g = exponent(width)
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)  # of τ/t, whose density is (γ + 1)·τ^γ
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with a snapshot at every eighth of it."""
    path, module = tmp_path_factory.mktemp("averages"), Powers()
    averages = PowerAverages(module, path)
    for step in range(T):
        module.go(step)
        averages.update(step)
        if (step + 1) % (T // 8) == 0:
            averages.save(step + 1)
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_a_running_average_is_the_profile_s_integral(folder: Path, width: float) -> None:
    g = exponent(width)
    x = load_file(folder / f"{T:07d}.safetensors")[f"{width:g}/x"]
    expected = [1, (g + 1) / (g + 2), (g + 1) / (g + 3)]
    assert x[:3].tolist() == pytest.approx(expected, rel=2e-3)  # sums for integrals


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_that_was_kept_comes_back(folder: Path, width: float) -> None:
    kept = load_file(folder / f"{T:07d}.safetensors")[f"{width:g}/x"]
    torch.testing.assert_close(reconstruct(folder, width)["x"], kept.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0.04, 0.07, 0.15])
def test_any_width_is_made_of_the_snapshots(folder: Path, width: float) -> None:
    """As if it had been kept: the mean under its profile, for constants, ramps, parabolas and waves."""
    g, tau = exponent(width), (torch.arange(T, dtype=torch.float64) + 0.5) / T
    wave = float(((g + 1) * tau**g * (9 * tau).sin()).mean())
    expected = [1, (g + 1) / (g + 2), (g + 1) / (g + 3), wave]
    assert reconstruct(folder, width)["x"].tolist() == pytest.approx(expected, abs=0.01)


def test_shares_add_up_to_one() -> None:
    kept = [(step, width) for step in range(250, 2001, 250) for width in WIDTHS]
    assert sum(shares(kept, (2000, 0.13))) == pytest.approx(1, abs=0.01)
    assert shares(kept, (2000, 0.05)) == pytest.approx([0.0] * 14 + [1.0, 0.0], abs=1e-6)


def method() -> Method:
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        return net(torch.randn(4, 2, generator=batch.generator)).square().mean(), {}

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return Method([Phase("net", 1, net, optimizer, loss)], lambda step: None, net)


def test_a_resumed_run_has_the_snapshots_of_a_whole_one(tmp_path: Path) -> None:
    def run(name: str, iterations: int, **options: Any) -> dict[str, dict[str, Tensor]]:
        loop = LoopSettings(iterations, 4, decay=False, checkpoint_every=3, post_hoc_ema=True)
        assert train(method(), loop, tmp_path / name, recipe={"name": "net"}, **options)
        return {path.name: load_file(path) for path in sorted((tmp_path / name / "averages").iterdir())}

    whole = run("whole", 9)
    assert list(whole) == [f"{step:07d}.safetensors" for step in (3, 6, 9)]
    run("parts", 4)
    (tmp_path / "parts" / "averages" / "0000005.safetensors").write_bytes(b"of steps that come again")
    parts = run("parts", 9, resume=True)
    assert list(parts) == [f"{step:07d}.safetensors" for step in (3, 4, 6, 9)]
    for name in whole:
        assert all(torch.equal(parts[name][key], value) for key, value in whole[name].items())


def test_a_student_of_any_width_is_made_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, run = write_teacher(tmp_path / "teacher"), tmp_path / "run"
    words = ["cifar10-small-dmd2", "--init", teacher, "--out", run, "--device", "cpu"]
    settings = ["iterations=4", "batch_size=2", "checkpoint_every=1", "sample_every=100", "post_hoc_ema=true"]
    words += [word for setting in settings for word in ("--set", setting)]
    for command in (["train", *words], ["convert", "ema", run, tmp_path / "made", "--width", "0.05"]):
        monkeypatch.setattr("sys.argv", ["dmd2", *map(str, command)])
        with pytest.raises(SystemExit, match="0"):
            main()
    made, student = (load_file(f / "model.safetensors") for f in (tmp_path / "made", run / "model"))
    kept = {k.removeprefix("0.05/"): v for k, v in load_file(run / "averages" / "0000004.safetensors").items()}
    assert read_manifest(tmp_path / "made").students.keys() == read_manifest(run / "model").students.keys()
    assert made.keys() == student.keys() and any(not torch.equal(made[k], student[k]) for k in made)
    for name, value in made.items():
        torch.testing.assert_close(value.float(), kept[name], rtol=1e-2, atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "run", "teacher"]


def test_what_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"width 0\.5: expected 0\.01 to 0\.28"):
        reconstruct(tmp_path, 0.5)
    with pytest.raises(UserError, match="no snapshots; expected a run with post_hoc_ema=true"):
        reconstruct(tmp_path / "none", 0.1)
    (tmp_path / "0000003.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no snapshot of averages"):
        reconstruct(tmp_path, 0.1)
