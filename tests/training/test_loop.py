"""The loop: schedules, averages, logs; and runs that are killed anywhere and continue as if nothing had happened.

Run as a script, this file trains the toy method below: what the tests kill.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.runtime.errors import UserError
from dmd2.training.loop import Batch, Ema, Logs, LoopSettings, Method, Phase, schedule, train, training_step
from dmd2.training.run.checkpoints import Checkpoints, read
from dmd2.training.run.logs import SPEED

ROOT = Path(__file__).resolve().parents[2]
TOY = LoopSettings(
    iterations=60,
    batch_size=8,
    warmup=5,
    ema_decay=0.9,
    seed=3,
    log_every=1,
    sample_every=20,
    checkpoint_every=7,
)


def toy(settings: LoopSettings, pause: float = 0.0, hold: float = math.inf) -> Method:
    """Two small networks in turn, with everything random and stateful that a real method has.

    Every step takes `pause` seconds more; the step `hold` waits to be killed.
    """
    torch.manual_seed(settings.seed)
    student, critic = (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)) for _ in range(2))

    def generator_loss(batch: Batch) -> tuple[Tensor, Logs]:
        noise = torch.randn(settings.batch_size, 4, generator=batch.generator)
        loss = (critic(student(noise)) - batch.data).square().mean()
        return loss, {"size": loss.detach() ** 0.5}

    def critic_loss(batch: Batch) -> tuple[Tensor, Logs]:
        time.sleep(600 if batch.step == hold else pause)
        noise = torch.randn(settings.batch_size, 4, generator=batch.generator)
        with torch.no_grad():
            fake = student(noise)
        return (critic(fake) - noise).square().mean(), {}

    def data(step: int) -> Tensor:
        return torch.randn(settings.batch_size, 4, generator=torch.Generator().manual_seed(step))

    def export(ema_model: nn.Module | None, out: Path) -> None:
        assert ema_model is not None
        torch.save({"average": ema_model.state_dict(), "student": student.state_dict()}, out / "exported.pt")

    return Method(
        phases=[
            Phase("generator", 3, student, torch.optim.AdamW(student.parameters(), lr=1e-2), generator_loss),
            Phase("critic", 1, critic, torch.optim.Adam(critic.parameters(), lr=1e-2), critic_loss),
        ],
        data=data,
        ema_model=student,
        sample=lambda ema_model: torch.full((3, 4, 6), 200, dtype=torch.uint8),
        score=lambda ema_model: {"weight": float(next(ema_model.parameters()).sum())},  # type: ignore[union-attr]
        export=export,
    )


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ, to the bit."""
    if isinstance(a, Tensor):
        return [] if isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {a.keys() ^ b.keys()}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def checkpoint(out: Path, age: int = 0) -> dict[str, Any]:
    """The newest, or the one that is `age` older, with all of its tensors."""
    return contents(Checkpoints(out).all()[age])


def contents(path: Path) -> dict[str, Any]:
    stored = read(path)
    about = {name: value for name, value in stored.about.items() if name not in ("files", "format")}
    return about | {"tensors": stored.whole()}  # in what order a file has them may vary, and so may its checksum


def assert_same_runs(a: Path, b: Path) -> None:
    """Weights, optimizers, averages, steps; and the figures that were logged, each once."""
    assert differences(checkpoint(a), checkpoint(b)) == []
    assert [without_rate(line) for line in log(a)] == [without_rate(line) for line in log(b)]


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_rate(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in SPEED}


# One step


def test_schedule_warms_up_and_decays_to_zero() -> None:
    settings = replace(TOY, iterations=100, warmup=10)
    found = [schedule(step, settings) for step in range(100)]
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == 1 and found[55] == pytest.approx(0.5) and found[99] == pytest.approx(1 / 90)
    assert all(value > 0 for value in found) and max(found) == 1
    steady = replace(settings, decay=False)
    assert [schedule(step, steady) for step in (0, 9, 10, 99)] == [0.1, 1, 1, 1]
    assert schedule(0, replace(settings, warmup=0)) == 1


def single(module: nn.Module, loss: Callable[[Batch], tuple[Tensor, Logs]], lr: float = 0.5, every: int = 1) -> Phase:
    return Phase("only", every, module, torch.optim.SGD(module.parameters(), lr=lr), loss)


def test_step_is_gradient_clipped_to_the_norm_times_the_schedule() -> None:
    module = nn.Linear(2, 1, bias=False)
    before = module.weight.detach().clone()
    phase = single(module, lambda batch: ((module.weight * torch.tensor([30.0, 40.0])).sum(), {}))
    settings = replace(TOY, iterations=10, warmup=4, max_grad_norm=2.0)
    logs = training_step([phase], Batch(1, None, torch.Generator()), settings)
    assert float(logs["only/gradient_norm"]) == pytest.approx(50)
    # lr 0.5, half-way through the warm-up, along (3/5, 4/5) with norm 2
    assert torch.allclose(before - module.weight, torch.tensor([[0.6, 0.8]]) * 2 * 0.5 * 0.5, atol=1e-4)
    assert module.weight.grad is None
    # The base learning rate is remembered, not compounded.
    training_step([phase], Batch(9, None, torch.Generator()), settings)
    assert phase.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 6)


def test_a_bad_batch_shows_in_the_log_and_leaves_the_weights() -> None:
    module = nn.Linear(2, 1)
    before = deepcopy(module.state_dict())
    phase = single(module, lambda batch: (module(torch.full((1, 2), float(batch.data))).sum(), {}))
    logs = training_step([phase], Batch(0, "nan", torch.Generator()), TOY)
    assert not torch.isfinite(torch.as_tensor(logs["only/gradient_norm"]))
    assert differences(before, module.state_dict()) == [] and module.weight.grad is None
    training_step([phase], Batch(0, "1.0", torch.Generator()), TOY)
    assert differences(before, module.state_dict()) != []


def test_zeroed_nans_leave_what_is_finite() -> None:
    module = nn.Linear(2, 1, bias=False)
    before = module.weight.detach().clone()
    zero = torch.zeros(())

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        # finite, but the first weight's gradient is 0 times infinity
        return (zero * module.weight[0, 0]).sqrt() + 3 * module.weight[0, 1], {}

    phase = single(module, loss)
    settings = replace(TOY, warmup=0, decay=False, max_grad_norm=0, zero_nans=True)
    logs = training_step([phase], Batch(0, None, torch.Generator()), settings)
    assert float(logs["only/gradient_norm"]) == 3  # and nothing clips it
    assert torch.allclose(before - module.weight, torch.tensor([[0.0, 1.5]]))


def test_batches_that_make_one_update_count_like_a_large_one() -> None:
    whole, parts = nn.Linear(3, 1), nn.Linear(3, 1)
    parts.load_state_dict(whole.state_dict())
    data = torch.randn(8, 3)
    one, two = (
        single(m, lambda batch, m=m: (m(batch.data).square().mean(), {}))  # type: ignore[misc]
        for m in (whole, parts)
    )
    training_step([one], Batch(6, data, torch.Generator()), TOY)
    halves = [Batch(6, half, torch.Generator()) for half in data.chunk(2)]
    training_step([two], halves[0], TOY, halves[1:])
    assert torch.allclose(whole.weight, parts.weight, atol=1e-6)
    assert torch.allclose(whole.bias, parts.bias, atol=1e-6)


def test_a_run_that_accumulates_goes_through_data_and_seeds_in_order(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    module = nn.Linear(1, 1)

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        seen.append((batch.step, batch.data, float(torch.rand(1, generator=batch.generator))))
        return module(torch.ones(1, 1)).sum(), {}

    settings = replace(TOY, iterations=3, grad_accum_steps=2)
    assert train(Method([single(module, loss)], data=lambda part: part), settings, tmp_path / "run")
    assert [(step, part) for step, part, _ in seen] == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    assert len({generate for _, _, generate in seen}) == 6


def test_phases_take_turns_and_train_only_their_own_network() -> None:
    method = toy(TOY)
    student, critic = (phase.module for phase in method.phases)
    for step in range(7):
        before = [[p.detach().clone() for p in module.parameters()] for module in (student, critic)]
        logs = training_step(method.phases, Batch(step, method.data(step), torch.Generator().manual_seed(step)), TOY)
        moved = [
            not all(torch.equal(old, p) for old, p in zip(old_ones, module.parameters(), strict=True))
            for old_ones, module in zip(before, (student, critic), strict=True)
        ]
        assert moved == [step % 3 == 0, True]
        assert ("generator" in logs) == ("size" in logs) == (step % 3 == 0)
        assert {"critic", "critic/gradient_norm"} <= logs.keys()


# Averages


def test_average_starts_short_and_becomes_the_long_one() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = Ema(module, 0.95)
    assert average.module is not module and not average.module.training
    expected, generator = float(module.weight.detach()), torch.Generator().manual_seed(0)
    for step in range(500):
        with torch.no_grad():
            module.weight.copy_(torch.randn(1, 1, generator=generator))
        average.update(step)
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * float(module.weight.detach())
        if step == 0:
            assert decay == pytest.approx(0.1)
    assert float(average.module.weight) == pytest.approx(expected, abs=1e-5)
    assert not average.module.weight.requires_grad


def test_a_half_life_is_at_most_a_twentieth_of_what_has_been() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = Ema(module, 0.95, half_life=10)
    for step in (0, 19, 99, 199, 5000):
        with torch.no_grad():
            average.module.weight.zero_()
            module.weight.fill_(1)
        average.update(step)
        half_life = min(10, 0.05 * (step + 1))
        assert float(average.module.weight) == pytest.approx(1 - 0.5 ** (1 / half_life), rel=1e-5)


def test_the_average_of_batch_normalisation_is_of_what_it_keeps_too() -> None:
    module = nn.BatchNorm1d(3)
    average = Ema(module, 0.99)
    expected = torch.zeros(3)
    for step in range(4):
        module(torch.randn(8, 3) + 5)
        average.update(step)
        expected = torch.lerp(expected, module.running_mean, 1 - (1 + step) / (10 + step))
    assert torch.allclose(average.module.running_mean, expected)
    assert int(average.module.num_batches_tracked) == 4


def test_an_average_of_steps_is_one_of_updates_with_the_decay_to_the_power_of_k() -> None:
    """So a recipe's decay means the same time, whichever step the module moves at."""
    module, k, decay = nn.Linear(1, 1, bias=False), 3, 0.5
    average = Ema(module, decay)
    expected, generator = float(module.weight.detach()), torch.Generator().manual_seed(0)
    for step in range(30, 60):  # past the short memory of the beginning
        if step % k == 0:
            with torch.no_grad():
                module.weight.copy_(torch.randn(1, 1, generator=generator))
            expected = decay**k * expected + (1 - decay**k) * float(module.weight.detach())
        average.update(step)
        if step % k == k - 1:
            assert float(average.module.weight) == pytest.approx(expected, abs=1e-5)


def test_figures_are_means_over_the_batches_that_make_one_update() -> None:
    network = nn.Linear(1, 1)

    def loss(batch: Batch) -> tuple[Tensor, Logs]:
        told: Logs = {"tensor": batch.data.mean(), "number": float(batch.data)}
        return network(batch.data).mean(), told | ({"rare": 7.0} if float(batch.data) == 3 else {})

    phase = Phase("only", 1, network, torch.optim.SGD(network.parameters(), 0.1), loss)
    parts = [Batch(0, torch.full((1, 1), float(value)), torch.Generator()) for value in (1, 2, 6, 3)]
    figures = training_step([phase], parts[0], TOY, parts[1:])
    assert float(figures["tensor"]) == figures["number"] == 3 and figures["rare"] == 7


# Whole runs, in this process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(toy(TOY), TOY, out, recipe={"name": "toy", "loop": asdict(TOY)})
    return out


def test_a_run_writes_recipe_log_samples_checkpoint_and_what_it_is_for(whole: Path) -> None:
    assert json.loads((whole / "recipe.json").read_text()) == {"name": "toy", "loop": asdict(TOY)}
    assert sorted(p.name for p in (whole / "samples").iterdir()) == [
        f"00000{step:02d}.png" for step in (0, 20, 40, 60)
    ]
    exported = torch.load(whole / "exported.pt", weights_only=True)
    state = checkpoint(whole)
    assert state["step"] == 60
    names = {"average": "average/", "student": "generator/module/"}
    for name, prefix in names.items():
        assert differences(exported[name], {k: state["tensors"][prefix + k] for k in exported[name]}) == []
    assert differences(exported["average"], exported["student"]) != []
    lines = log(whole)
    assert [line["step"] for line in lines if "critic" in line] == list(range(1, 61))
    assert [line["step"] for line in lines if "generator" in line] == list(range(1, 61, 3))
    assert [line["step"] for line in lines if "score/weight" in line] == [0, 20, 40, 60]
    assert all(line["images_per_second"] > 0 for line in lines if "critic" in line)
    assert not [p for p in whole.iterdir() if p.name.endswith(".tmp")]


def test_without_a_decay_no_average_is_kept_and_the_weights_themselves_are_shown(tmp_path: Path) -> None:
    settings = replace(TOY, ema_decay=0.0)
    method, modes = toy(settings), list[tuple[str, bool]]()
    assert method.ema_model is not None

    def score(module: nn.Module | None) -> dict[str, float]:
        assert module is method.ema_model and module is not None
        modes.append(("score", module.training))
        return {}

    def export(module: nn.Module | None, out: Path) -> None:
        assert module is method.ema_model and module is not None
        modes.append(("export", module.training))
        torch.save(module.state_dict(), out / "exported.pt")

    frozen = method.ema_model[1]  # type: ignore[index]
    frozen.eval()  # as parts of a network that is trained may be, and stay
    assert train(replace(method, score=score, export=export), settings, tmp_path / "run")
    assert modes == [("score", False)] * 4 + [("export", False)]
    assert method.ema_model.training and not frozen.training
    tensors = checkpoint(tmp_path / "run")["tensors"]
    assert not [name for name in tensors if name.startswith("average/")]
    exported = torch.load(tmp_path / "run" / "exported.pt", weights_only=True)
    assert differences(exported, {k: tensors[f"generator/module/{k}"] for k in exported}) == []

    part = replace(settings, decay=False)
    train(toy(part), replace(part, iterations=33), tmp_path / "parts")
    train(toy(part), part, tmp_path / "parts", resume=True)
    train(toy(part), part, tmp_path / "whole")
    assert differences(checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole")) == []
    half_life = replace(settings, ema_half_life=64.0)
    train(toy(half_life), replace(half_life, iterations=3), tmp_path / "half")
    assert [name for name in checkpoint(tmp_path / "half")["tensors"] if name.startswith("average/")]


def test_the_same_recipe_is_the_same_run(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # randomness outside does not matter
    train(toy(TOY), TOY, tmp_path / "again", recipe={"name": "toy", "loop": asdict(TOY)})
    assert_same_runs(whole, tmp_path / "again")
    other = replace(TOY, seed=4)
    train(toy(TOY), other, tmp_path / "other")
    assert differences(checkpoint(whole)["tensors"], checkpoint(tmp_path / "other")["tensors"]) != []


def test_log_averages_over_its_interval(whole: Path, tmp_path: Path) -> None:
    settings = replace(TOY, log_every=25)
    train(toy(TOY), settings, tmp_path / "run")
    every = [line["critic"] for line in log(whole) if "critic" in line]
    means = {line["step"]: line["critic"] for line in log(tmp_path / "run") if "critic" in line}
    assert means.keys() == {25, 50, 60}
    assert means[50] == pytest.approx(sum(every[25:50]) / 25, abs=1e-5)
    assert means[60] == pytest.approx(sum(every[50:]) / 10, abs=1e-5)


def test_an_existing_run_is_not_overwritten(whole: Path, tmp_path: Path) -> None:
    before = checkpoint(whole)
    with pytest.raises(UserError, match=f"out {whole}: holds a run already; add `resume`"):
        train(toy(TOY), TOY, whole)
    assert differences(checkpoint(whole), before) == []


def stopped_early(out: Path, steps: int) -> None:
    """The first `steps` steps of the toy run, by a method whose data run out."""

    class Enough(Exception):
        pass

    method = toy(TOY)

    def data(step: int) -> Tensor:
        if step == steps:
            raise Enough
        return method.data(step)  # type: ignore[no-any-return]

    with pytest.raises(Enough):
        train(replace(method, data=data), TOY, out, recipe={"name": "toy", "loop": asdict(TOY)})


@pytest.mark.parametrize("steps", [7, 8, 20, 27, 59])
def test_a_run_that_broke_off_continues_to_the_bit(whole: Path, tmp_path: Path, steps: int) -> None:
    out = tmp_path / "run"
    stopped_early(out, steps)
    assert len(log(out)) >= steps  # more than the checkpoint knows of
    assert train(toy(TOY), TOY, out, resume=True, recipe={"name": "toy", "loop": asdict(TOY)})
    assert_same_runs(whole, out)


def test_a_finished_run_may_be_resumed_and_made_longer(whole: Path, tmp_path: Path) -> None:
    steady = replace(TOY, decay=False)
    longer = replace(steady, iterations=80)
    for name, settings in (("run", steady), ("at-once", longer)):
        train(toy(TOY), settings, tmp_path / name, recipe={"loop": asdict(settings)})
    again = checkpoint(tmp_path / "run")
    assert train(toy(TOY), steady, tmp_path / "run", resume=True, recipe={"loop": asdict(steady)})
    assert differences(again, checkpoint(tmp_path / "run")) == []
    # Another number of iterations is no other recipe.
    assert train(toy(TOY), longer, tmp_path / "run", resume=True, recipe={"loop": asdict(longer)})
    a, b = checkpoint(tmp_path / "run"), checkpoint(tmp_path / "at-once")
    assert a["step"] == 80 and differences(a, b) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 2e-2}, "lr"), ({"timesteps": (999, 499)}, "timesteps"), ({"loop": asdict(TOY) | {"seed": 9}}, "seed")],
)
def test_resuming_another_recipe_is_refused_and_the_difference_named(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    recipe: dict[str, Any] = {"name": "toy", "lr": 1e-2, "timesteps": (999, 749), "loop": asdict(TOY)}
    out = tmp_path / "run"
    short = replace(TOY, iterations=2)
    train(toy(TOY), short, out, recipe=recipe)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(UserError, match=rf"made by another recipe \(different: .*{named}\)") as error:
        train(toy(TOY), short, out, resume=True, recipe=recipe | change)
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "another file", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "run"
    short = replace(TOY, iterations=2)
    train(toy(TOY), short, out, recipe={})
    (path,) = (out / "checkpoints" / "0000002").glob("*.safetensors")
    if damage == "another file":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with pytest.raises(UserError, match="checkpoints/0000002: not a readable checkpoint") as error:
        train(toy(TOY), short, out, resume=True, recipe={})
    assert "\n" not in str(error.value)


def test_a_log_line_cut_short_by_a_crash_does_not_stop_a_resume(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped_early(out, 20)
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 21, "cri')
    train(toy(TOY), TOY, out, resume=True, recipe={"name": "toy", "loop": asdict(TOY)})
    assert_same_runs(whole, out)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_a_run_whose_folder_is_moved_ends_and_goes_on_from_the_new_place(whole: Path, tmp_path: Path) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    method = toy(TOY)

    def data(step: int) -> Tensor:
        if step == 24:
            out.rename(moved)
        return method.data(step)  # type: ignore[no-any-return]

    recipe = {"name": "toy", "loop": asdict(TOY)}
    with pytest.raises(UserError, match="run: was moved or removed while a training ran there; `resume` goes on"):
        train(replace(method, data=data), TOY, out, recipe=recipe)
    assert not out.exists() and checkpoint(moved)["step"] in (14, 21)  # the last may still have been in the making
    train(toy(TOY), TOY, moved, resume=True, recipe=recipe)
    assert_same_runs(whole, moved)


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(toy(TOY), replace(TOY, iterations=1), tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# Whole runs, as processes that are killed


def start(*command: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for_line(run: subprocess.Popen[str], path: Path, line: int) -> None:
    """Until the log has that many lines."""
    deadline = time.monotonic() + 600
    while not (path.exists() and path.read_text().count("\n") >= line):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(run: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = run.communicate(timeout=600)
    return run.returncode, out


def test_kill_9_anywhere_then_resume_is_bit_identical(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = sorted(random.sample(range(4, 56), 2))
    print("killed after", steps)  # shown if it fails
    for step in steps:
        run = start(__file__, out, 0.01, step + 3)
        wait_for_line(run, out / "log.jsonl", step)
        run.send_signal(signal.SIGKILL)
        status, text = finish(run)
        assert status == -signal.SIGKILL, text
    status, text = finish(start(__file__, out))
    assert status == 0, text
    assert_same_runs(whole, out)
    assert differences(*(torch.load(folder / "exported.pt", weights_only=True) for folder in (whole, out))) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_a_checkpoint_and_resume_is_bit_identical(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    run = start(__file__, out, 0.05)
    wait_for_line(run, out / "log.jsonl", 10)
    run.send_signal(number)
    status, text = finish(run)
    assert status == 130 and "stopped at step" in text, text
    done = checkpoint(out)["step"]
    assert 10 <= done < 60 and log(out)[-1]["step"] == done
    assert not (out / "exported.pt").exists()
    assert train(toy(TOY), TOY, out, resume=True, recipe={"name": "toy", "loop": asdict(TOY)})
    assert_same_runs(whole, out)


@pytest.mark.slow
def test_dmd2_train_killed_and_resumed_is_bit_identical(weights: Path, emoji_zip: Path, tmp_path: Path) -> None:
    """The real command and the real method, with a GAN, on networks of no size."""
    values = {
        "iterations": 8,
        "batch_size": 3,
        "warmup": 2,
        "generator_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "precision": "fp32",
        "compile": "false",
        "seed": 5,
    }

    def command(out: Path, *more: str) -> list[str | Path]:
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        paths: list[str | Path] = [
            "--data",
            emoji_zip,
            "--init",
            weights,
            "--classifier",
            tmp_path / "none",
            "--out",
            out,
        ]
        return ["-m", "dmd2.cli", "train", "emoji-dmd2-4step", *paths, "--device", "cpu", *sets, *more]

    killed = start(*command(tmp_path / "killed"))
    wait_for_line(killed, tmp_path / "killed" / "log.jsonl", random.randint(2, 4))
    while killed.poll() is None and not Checkpoints(tmp_path / "killed").exist():  # written beside the steps
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    status, text = finish(killed)
    assert status == -signal.SIGKILL, text
    assert not (tmp_path / "killed" / "model").exists()
    runs = [start(*command(tmp_path / "killed", "--resume")), start(*command(tmp_path / "whole"))]
    for run in runs:
        status, text = finish(run)
        assert status == 0, text

    assert_same_runs(tmp_path / "whole", tmp_path / "killed")
    assert checkpoint(tmp_path / "whole")["step"] == 8
    figures = log(tmp_path / "whole")[0]
    assert {"generator", "critic", "dm_gradient", "fake_score", "gan_generator", "gan_critic"} <= figures.keys()
    models = [tmp_path / name / "model" for name in ("whole", "killed")]
    manifests = [json.loads((model / "dmd2.json").read_text()) for model in models]
    student = "unet/diffusion_pytorch_model.safetensors"  # its metadata's order varies, and so does its checksum
    assert manifests[0] | {"files": {}} == manifests[1] | {"files": {}}
    differing = {name for name, sha256 in manifests[0]["files"].items() if sha256 != manifests[1]["files"][name]}
    assert differing <= {student}
    assert differences(*(load_file(model / student) for model in models)) == []
    before = json.loads((weights / "dmd2.json").read_text())
    differing = {name for name in before["files"] if before["files"][name] != manifests[0]["files"].get(name)}
    assert student in differing and all(name == student or name.startswith("unet_1step/") for name in differing)
    assert list(manifests[0]["students"]) == ["4"] and manifests[0]["teacher"] == before["teacher"]
    assert "Distilled by DMD2" in (models[0] / "README.md").read_text()

    # Asked for something else, the run is refused.
    values["batch_size"] = 4
    status, text = finish(start(*command(tmp_path / "whole", "--resume")))
    assert status == 2 and "made by another recipe" in text and "Traceback" not in text


if __name__ == "__main__":
    torch.set_num_threads(1)
    method = toy(TOY, *map(float, sys.argv[2:]))
    out = Path(sys.argv[1])
    begun = Checkpoints(out).exist()
    whole_run = train(method, TOY, out, resume=begun, recipe={"name": "toy", "loop": asdict(TOY)})
    sys.exit(0 if whole_run else 130)
