"""scripts/bench train compares like with like; scripts/predict-memory has a row for every recipe of SDXL."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2.diffusion.noise import add_noise, sd_sigmas
from dmd2.models.family import open_family
from dmd2.runtime.paths import EMOJI
from dmd2.training.losses import distribution_matching_gradient
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.recipes import RECIPES, resolve

SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = spec_from_loader(name.replace("-", "_"), SourceFileLoader(name.replace("-", "_"), str(SCRIPTS / name)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("sys.path", [*sys.path, str(SCRIPTS)])
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def recipe() -> Dmd2Recipe:
    found = resolve("emoji-dmd2-4step", ["batch_size=2", "precision=fp32"])
    assert isinstance(found, Dmd2Recipe)
    return found


def test_the_plain_step_has_the_same_networks_conditions_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = load("plain_dmd2.py", monkeypatch).PlainDmd2
    captions = ["a red apple", "a rocket"]
    plain = kind(EMOJI, recipe(), torch.zeros(2, 3, 64, 64), captions, None)
    family = open_family(EMOJI, CPU, "fp32")
    cond = family.condition(captions)
    given, nothing = plain.encode([0, 1]), plain.nothing(2)
    torch.testing.assert_close(given["encoder_hidden_states"], cond.context)
    torch.testing.assert_close(given["added_cond_kwargs"]["text_embeds"], cond.pooled)
    torch.testing.assert_close(given["added_cond_kwargs"]["time_ids"], cond.time_ids)
    uncond = family.unconditional(cond)
    torch.testing.assert_close(nothing["encoder_hidden_states"], uncond.context)

    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, *family.shape, generator=generator) for _ in range(2))
    t = torch.tensor([300, 800])
    # Its x_t is scaled by √ᾱ, as the papers' is; ours is not.
    with torch.no_grad():
        theirs = [plain.x0(plain.teacher, plain.noised(x, t, noise), t, c) for c in (given, nothing)]
        sigma = sd_sigmas()[t].float()
        noisy = add_noise(x, sigma, noise)
        own = [family.teacher(noisy, sigma, c) for c in (cond, uncond)]
    for found, expected in zip(theirs, own, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    scale = plain.recipe.guidance_scale
    expected = distribution_matching_gradient(x, own[1] + scale * (own[0] - own[1]), own[0])
    torch.testing.assert_close(plain.gradient(x, theirs[1], theirs[0], theirs[0]), expected, rtol=1e-2, atol=1e-2)


def test_both_steps_train_their_networks_and_say_how_long_what_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = load("bench_train.py", monkeypatch)
    settings = resolve("emoji-dmd2-4step", ["data=latents", "batch_size=2", "precision=fp32"])
    assert isinstance(settings, Dmd2Recipe)
    bench.write_images(tmp_path / "images", (64, 64))
    bench.make_latents(EMOJI, tmp_path / "images", tmp_path / "latents")
    for make in (bench.ours, bench.plain):
        step, networks = make(EMOJI, settings, tmp_path / "latents", CPU)
        step(0, lambda name: None)  # what is made at its first use is there then
        parameters = {id(p): p for network in networks() for p in network.parameters()}
        before = {key: p.detach().clone() for key, p in parameters.items()}
        clock = bench.Clock(CPU)
        with clock.watching(networks()):
            step(3, clock)
        clock("")
        assert set(clock.seconds) == {"data", "generator", "critic", "average"}
        assert 0 < clock.networks < sum(clock.seconds.values())
        trained = {id(p) for p in parameters.values() if p.requires_grad}
        moved = {key for key, old in before.items() if not torch.equal(old, parameters[key])}
        assert moved and moved <= trained  # teacher and encoders stay
        clock = bench.Clock(CPU)
        step(4, clock)
        clock("")
        assert "generator" not in clock.seconds  # every third


def test_every_sdxl_recipe_has_rows_that_its_batch_can_be_shared_by(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("predict-memory", monkeypatch)
    rows = list(script.rows())
    of_sdxl = {name for name in RECIPES if name.startswith("sdxl")} | {"lora-dmd2"}
    assert {row.recipe for row in rows} | set(script.ALIKE) == of_sdxl
    for name, like in script.ALIKE.items():
        one, other = (vars(RECIPES[each]) for each in (name, like))
        assert {key for key in one if one[key] != other[key]} <= {"timesteps", "pretrained", "loop"}
        loops = (replace(RECIPES[each].loop, iterations=1) for each in (name, like))
        assert next(loops) == next(loops)
    assert len({row.name for row in rows}) == len(rows)
    for name in {row.recipe for row in rows}:
        assert {row.cards for row in rows if row.recipe == name} == {1, 8, 64}
    for row in rows:
        settled = script.settle(row)
        assert settled.conflict() is None and settled.loop.batch_size % row.cards == 0


def test_the_page_of_memory_has_a_line_for_every_row_and_keeps_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = load("predict-memory", monkeypatch)
    row = script.Row("lora-dmd2", "whole", ("data=latents",), 8)
    monkeypatch.setattr(script, "rows", lambda: iter([row, replace(row, cards=64)]))
    monkeypatch.setattr(script, "write_teacher", lambda folder, numbers: None)
    asked = []

    def predicted(row: Any, teacher: Path) -> dict[str, Any]:
        asked.append(row.cards)
        if row.cards == 64 and len(asked) == 2:
            raise KeyboardInterrupt
        sizes = {"weights": 1e4, "average": 0.0, "optimizer": 2e3, "step": 500.0, "peak": 12_500.0, "seconds": 1}
        return {"recipe": row.recipe, "mode": row.mode, "cards": row.cards, **sizes}

    monkeypatch.setattr(script, "predicted", predicted)
    with pytest.raises(KeyboardInterrupt):
        script.main(None, tmp_path / "rows", tmp_path / "memory.md")
    assert not (tmp_path / "memory.md").exists()
    script.main(None, tmp_path / "rows", tmp_path / "memory.md")
    assert asked == [8, 64, 64]
    page = (tmp_path / "memory.md").read_text()
    assert "| `lora-dmd2` | whole | 8 | 10.0 | 0.0 | 2.0 | 0.5 | 12.5 |" in page
    assert "|  |  | 64 | 10.0 | 0.0 | 2.0 | 0.5 | 12.5 |" in page
