"""What `dmd2 train --dry-run` predicts, beside what a real step of the same run allocates."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch.profiler import ProfilerActivity, profile

from dmd2.data.pairs import make_pairs
from dmd2.diffusion.draws import Ranks
from dmd2.evaluation.perceptual import Vgg16
from dmd2.runtime.errors import UserError
from dmd2.training.loop import Batch, Ema, training_step
from dmd2.training.parallel.group import ALONE, Parallel
from dmd2.training.parallel.sharded import Sharded
from dmd2.training.recipes import build_method, resolve
from dmd2.training.run.memory import Tracker, predict
from tests.training.test_product import PROMPTS

CPU = torch.device("cpu")
SMALL = ["precision=fp32", "batch_size=4"]


def inputs(weights: Path, emoji_zip: Path) -> dict[str, Path | None]:
    return {"init": weights, "data": emoji_zip, "classifier": weights / "none"}


def peak_of_real_steps(
    settings: list[str],
    paths: Mapping[str, Path | None],
    parallel: Parallel = ALONE,
    recipe_name: str = "emoji-dmd2-4step",
) -> int:
    """Of a run's first two steps: what torch's allocator had given out at most, by its own profile."""
    recipe = resolve(recipe_name, settings)
    gc.collect()  # what an earlier test left, freed within the profile, would count as less than nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        method = build_method(recipe, paths, CPU, parallel)
        kept = method.ema_model if recipe.loop.averages else None
        average = Ema(kept, 0.9, 0.0, parallel) if kept is not None else None
        for _ in range(2):  # the optimizers' states are there in the second
            batch = Batch(0, method.data(0), parallel.ranks.generator(0))
            training_step(method.phases, batch, recipe.loop, parallel=parallel)
        del average, kept, method
    events = profiled.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    sizes = [size for _, size in sorted(_allocations(events))]
    now = peak = 0
    for size in sizes:
        now += size
        peak = max(peak, now)
    return peak


def _allocations(events: Any) -> Iterator[tuple[int, int]]:
    """When, and how many bytes; less than none where some are given back."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def test_predicts_what_a_real_step_allocates_from_configurations_alone(
    weights: Path, emoji_zip: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(weights, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    said = predict(resolve("emoji-dmd2-4step", SMALL), {"init": bare}, CPU)
    assert said.peak == pytest.approx(peak_of_real_steps(SMALL, inputs(weights, emoji_zip)), rel=0.1)
    assert said.weights + said.average + said.optimizer + said.step == said.peak and said.flops > 0


def test_predicts_the_low_memory_mode(weights: Path, emoji_zip: Path) -> None:
    settings = [*SMALL, "adapter=lora", "networks=adapters", "checkpointing=true", "grad_accum_steps=2"]
    said = predict(resolve("emoji-dmd2-4step", settings), {"init": weights}, CPU, count_flops=False)
    assert said.peak == pytest.approx(peak_of_real_steps(settings, inputs(weights, emoji_zip)), rel=0.1)


def test_predicts_an_optimizer_in_8_bits(weights: Path, emoji_zip: Path) -> None:
    settings = [*SMALL, "adapter=lora", "networks=adapters", "checkpointing=true"]
    plain, small = (
        predict(
            resolve("emoji-dmd2-4step", [*settings, f"optimizer={name}"]), {"init": weights}, CPU, count_flops=False
        )
        for name in ("adamw", "adamw8bit")
    )
    found = peak_of_real_steps([*settings, "optimizer=adamw8bit"], inputs(weights, emoji_zip))
    assert small.peak == pytest.approx(found, rel=0.1) and small.optimizer < 0.4 * plain.optimizer


def test_without_an_average_there_is_none_in_memory(weights: Path, emoji_zip: Path) -> None:
    settings = [*SMALL, "ema_decay=0"]
    said = predict(resolve("emoji-dmd2-4step", settings), {"init": weights}, CPU, count_flops=False)
    assert said.average == 0
    assert said.peak == pytest.approx(peak_of_real_steps(settings, inputs(weights, emoji_zip)), rel=0.1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "settings"), [("sdxl-regression", ["checkpointing=true"]), ("sd15-dmd", ["pairs_batch=2"])]
)
def test_predicts_lpips_by_the_decoder(name: str, settings: list[str], weights: Path, tmp_path: Path) -> None:
    """LPIPS takes most of what these tiny networks' step does."""
    torch.jit.script(Vgg16()).save(tmp_path / "vgg16.pt")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    make_pairs(weights, tmp_path / "pairs", 4, 2, 4, CPU, prompts=PROMPTS)
    paths = {"init": weights, "lpips": tmp_path / "vgg16.pt"}
    settings = ["precision=fp32", "batch_size=4", *settings]
    recipe = resolve(name, settings)
    said, plain = (
        predict(recipe, given, CPU, count_flops=False) for given in (paths, {"init": weights, "lpips": None})
    )
    paths |= {"prompts": tmp_path / "prompts.txt", "pairs": tmp_path / "pairs"}
    found = peak_of_real_steps(settings, paths, recipe_name=name)
    assert said.peak == pytest.approx(found, rel=0.1) and said.peak > 1.5 * plain.peak


def test_lpips_takes_its_file_s_size(weights: Path, tmp_path: Path) -> None:
    recipe = resolve("sdxl-regression", ["precision=fp32", "batch_size=1"])
    file = tmp_path / "vgg16.pt"
    without = predict(recipe, {"init": weights, "lpips": file}, CPU, count_flops=False)
    file.write_bytes(bytes(10**8))
    beside = predict(recipe, {"init": weights, "lpips": file}, CPU, count_flops=False)
    convolutions = 14_714_688 * 4
    assert beside.weights - without.weights == 10**8 - convolutions


def test_predicts_a_shard_of_four_processes(weights: Path, emoji_zip: Path) -> None:
    """Measured on real tensors in the first of four processes, whose others only seem to answer."""
    settings = [*SMALL]
    said = predict(resolve("emoji-dmd2-4step", settings), {"init": weights}, CPU, 4, "fsdp2", count_flops=False)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=4)
    try:
        found = peak_of_real_steps(settings, inputs(weights, emoji_zip), Sharded(Ranks(0, 4), CPU, None))
    finally:
        dist.destroy_process_group()
    assert said.peak == pytest.approx(found, rel=0.1)


def test_counts_a_tensor_while_it_lives() -> None:
    with Tracker() as tracker:
        kept = torch.zeros(1000)
        view = kept[10:]
        for _ in range(3):
            torch.zeros(500).add(1)
        assert (tracker.now, tracker.peak) == (4000, 8000) and view.numel() == 990
        kept.untyped_storage().resize_(0)
        assert tracker.now == 0
        a, b = torch.zeros(3, 5), torch.zeros(5, 7)
        before = tracker.flops
        a @ b
        assert tracker.flops - before == 2 * 3 * 5 * 7


def test_what_makes_no_student_is_not_predicted(weights: Path) -> None:
    for name in ("emoji-vae", "emoji-teacher"):
        with pytest.raises(UserError, match="expected one that makes a student"):
            predict(resolve(name, []), {"init": weights}, CPU)
    with pytest.raises(UserError, match=r"batch_size=4.*multiple of the 3"):
        predict(resolve("emoji-dmd2-4step", SMALL), {"init": weights}, CPU, 3)


def test_configurations_are_enough_and_text_encoders_do_not_count_for_data_that_were_encoded(
    weights: Path, tmp_path: Path
) -> None:
    recipe = resolve("emoji-dmd2-4step", [*SMALL, "data=latents"])
    whole = predict(recipe, {"init": weights}, CPU, count_flops=False)
    alone = shutil.copytree(weights, tmp_path / "alone")
    for name in ("text_encoder", "text_encoder_2"):
        (alone / name / "model.safetensors").unlink()
        config = json.loads((alone / name / "config.json").read_text())
        config |= {"num_hidden_layers": 20 * config["num_hidden_layers"]}
        (alone / name / "config.json").write_text(json.dumps(config))
    assert predict(recipe, {"init": alone}, CPU, count_flops=False) == whole
