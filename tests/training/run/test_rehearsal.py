"""What `dmd2 train --dry-run` says, on a toy whose figures can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmd2.training.loop import Batch, Logs, LoopSettings, Method, Phase
from dmd2.training.run.rehearsal import rehearse


def test_a_rehearsal_counts_what_is_trained_and_held_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student, critic, teacher = nn.Linear(100, 100), nn.Linear(100, 10), nn.Linear(100, 1000)
    teacher.requires_grad_(False)
    turns: list[tuple[str, int]] = []

    def loss(name: str, module: nn.Module) -> Phase:
        def run(batch: Batch) -> tuple[Tensor, Logs]:
            turns.append((name, batch.step))
            return module(batch.data).square().mean() + 0 * teacher(batch.data).mean(), {}

        return Phase(name, 5 if name == "generator" else 1, module, torch.optim.Adam(module.parameters()), run, 3)

    phases = [loss("generator", student), loss("critic", critic)]
    method = Method(phases, lambda step: torch.randn(4, 100), ema_model=student)
    said = rehearse(method, LoopSettings(iterations=1000, batch_size=4, grad_accum_steps=2))
    both = ["generator", "generator", "critic", "critic"]
    assert turns == [(name, 5) for name in both * 2] + [("critic", 6)] * 2  # the first step that all take part in
    assert said["parameters"]["generator"] == said["parameters"]["average"] == 10100
    assert said["parameters"]["critic"] == 1010 and said["parameters"]["frozen"] >= 101_000
    assert said["megabytes"]["gradients"] == round(11110 * 4 / 1e6, 1)
    assert said["megabytes"]["optimizer"] == round((2 * 11110 + 4) * 4 / 1e6, 1)
    assert all(seconds >= 0 for seconds in said["seconds"].values()) and list(tmp_path.iterdir()) == []
