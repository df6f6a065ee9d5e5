"""The engine: a seed is an image whatever batch it rides in; every mode draws; what does not fit is named."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dmd2.inference.engine
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import conditioned, sample_dpm_solver_2m, sample_few_step, teacher_sigmas
from dmd2.inference.engine import Engine, resolve_device
from dmd2.models.stable_diffusion.folder import UNET_FILE
from dmd2.runtime.errors import UserError
from dmd2.weights.manifest import MANIFEST, read_manifest

MODES = ("1", "4", "teacher", "teacher-4", "teacher-1")
PROMPTS = ["a red apple on a blue background", "an owl", "a green heart"]
LONG = "a red apple and a blue book " * 5


@pytest.fixture(scope="module")
def engine(weights: Path) -> Engine:
    return Engine(weights, "cpu")


def difference(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_is_the_same_image_alone_and_in_a_batch(engine: Engine, mode: str) -> None:
    batch = engine.generate(PROMPTS, [5, 6, 7], mode)
    assert batch.shape == (3, 3, 64, 64) and batch.dtype == torch.uint8 and batch.device.type == "cpu"
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], [5 + i], mode)
        assert difference(alone[0], batch[i]) <= 2
        assert torch.equal(alone, engine.generate([prompt], [5 + i], mode))  # and again, to the bit


def test_other_seeds_and_other_prompts_are_other_images(engine: Engine) -> None:
    images = engine.generate(["an owl", "an owl", "a blue book"], [0, 1, 0], "4")
    assert images.float().std() > 5
    assert difference(images[0], images[1]) > 10
    assert difference(images[0], images[2]) >= 1


def test_modes_use_their_own_networks_and_samplers(engine: Engine) -> None:
    images = [engine.generate(["an owl"], [0], mode) for mode in MODES]
    for i, first in enumerate(images):
        for second in images[i + 1 :]:
            assert difference(first, second) > 1


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_each_mode_is_its_sampler_over_its_network(engine: Engine, mode: str) -> None:
    """The same by hand, out of the parts."""
    steps = mode.removeprefix("teacher-")
    denoiser = engine.model.denoisers["unet_teacher" if "teacher" in mode else {"1": "unet_1step", "4": "unet"}[mode]]
    cond = engine.model.encode_text(["an owl"], (64, 64))
    cfg_denoise = conditioned(denoiser, cond, cond.unconditional(), 3.0 if "teacher" in mode else 1.0)
    if mode == "teacher":
        sigmas = teacher_sigmas(denoiser, 3)
        noise = seeded_noise([9], (1, 4, 16, 16))[:, 0]
        x0 = sample_dpm_solver_2m(cfg_denoise, denoiser.scale_initial_noise(noise, torch.tensor([sigmas[0]])), sigmas)
    else:
        timesteps = {"1": [399], "4": [999, 749, 499, 249]}[steps]
        levels = [float(denoiser.sigmas[t]) for t in timesteps]
        x0 = sample_few_step(
            cfg_denoise, denoiser.scale_initial_noise, seeded_noise([9], (len(levels), 4, 16, 16)).unbind(1), levels
        )
    assert difference(engine.generate(["an owl"], [9], mode), engine.model.codec.decode(x0)) <= 2


def test_a_prompt_that_needs_two_windows_draws_and_its_end_counts(engine: Engine) -> None:
    found = engine.generate([LONG + "owl", LONG + "heart"], [3, 3], "4")
    assert found.shape == (2, 3, 64, 64)
    assert difference(found[0], found[1]) >= 1
    assert difference(engine.generate([LONG + "owl"], [3], "4")[0], found[0]) <= 2


def test_a_short_prompt_is_the_same_image_beside_a_long_one(engine: Engine) -> None:
    beside = engine.generate([LONG, "an owl", LONG + LONG, "a green heart"], [4, 5, 6, 7], "4")
    for i, prompt in enumerate([LONG, "an owl", LONG + LONG, "a green heart"]):
        assert difference(engine.generate([prompt], [4 + i], "4")[0], beside[i]) <= 2


def test_texts_are_remembered_and_forgotten(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(weights, "cpu", modes=("1",))
    encoded: list[list[str]] = []
    encode = engine.model.encode_text

    class Counting:
        token_chunks = encode.token_chunks

        def __call__(self, prompts: list[str], size: tuple[int, int]) -> object:
            encoded.append(prompts)
            return encode(prompts, size)

    object.__setattr__(engine.model, "encode_text", Counting())
    short = "an owl", encode(["an owl"], (64, 64))
    engine.text_cache = (
        3 * dmd2.inference.engine._bytes(*short) - 1
    )  # two, for all short prompts here are about as large
    first = engine.generate(["an owl"], [0], "1")
    again = engine.generate(["an owl", "a red apple"], [0, 1], "1")
    assert difference(first[0], again[0]) <= 2
    assert encoded == [["an owl"], ["a red apple"]]
    engine.generate(["an owl"], [0], "1", (32, 32))  # a size is part of the condition
    assert encoded[2:] == [["an owl"]]
    engine.generate(["a red apple", "a blue book"], [0, 1], "1")
    assert encoded[3:] == [["a blue book"]]
    engine.generate(["an owl"], [0], "1")
    assert encoded[4:] == [["an owl"]]
    engine.generate(["one", LONG, "two", "one", LONG + "owl"], [0] * 5, "1")  # new ones of equal length together
    assert encoded[5:] == [["one", "two"], [LONG, LONG + "owl"]]


def test_what_texts_are_remembered_is_counted_in_bytes_and_holds_no_others(weights: Path) -> None:
    engine = Engine(weights, "cpu", modes=("1",))
    prompts = ["an owl", "owls " * 100, *map(str, range(20))]
    engine.generate(prompts, list(range(len(prompts))), "1")
    held = [value for cond in engine._texts.values() for value in vars(cond).values()]
    # What the tensors really keep in memory, not only what they show of it.
    stored = sum(storage.nbytes() for storage in {id(s): s for s in (t.untyped_storage() for t in held)}.values())
    assert len(engine._texts) == len(prompts) and stored < engine._text_bytes < 2 * stored
    engine.text_cache = stored // 2
    engine.generate(["an owl"], [0], "1")
    assert 0 < engine._text_bytes <= stored // 2 and len(engine._texts) < len(prompts)
    engine.text_cache = 0
    assert engine.generate(prompts, list(range(len(prompts))), "1").shape == (len(prompts), 3, 64, 64)
    assert not engine._texts and engine._text_bytes == 0


@pytest.mark.parametrize("prompt", ["\U0001f9ff" * 5000, "ḃ" * 1000, "x" * 1501])
def test_a_prompt_of_too_many_tokens_is_refused_before_it_is_encoded(engine: Engine, prompt: str) -> None:
    expected = rf"^prompt: \d+ tokens \(of {len(prompt)} characters\); expected at most 1500$"
    with pytest.raises(UserError, match=expected):
        engine.model.encode_text.token_chunks(prompt)
    with pytest.raises(UserError, match=expected):
        engine.generate(["an owl", prompt], [0, 1], "1")
    assert engine.generate(["x" * 1500], [0], "1").shape == (1, 3, 64, 64)


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 32), (128, 64), (60, 36), (16, 20)])
def test_other_sizes_draw_width_before_height(engine: Engine, size: tuple[int, int]) -> None:
    assert engine.generate(["an owl"], [0], "1", size).shape == (1, 3, size[1], size[0])


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((65, 64), "width: 65"),
        ((64, 42), "height: 42"),
        ((0, 0), "width: 0"),
        ((64, -16), "height: -16"),
        ((8, 8), "width: 8"),
    ],
)
def test_sizes_that_the_networks_cannot_make_are_refused(engine: Engine, size: tuple[int, int], name: str) -> None:
    with pytest.raises(
        UserError, match=f"{name} .size {size[0]}x{size[1]}.; expected a multiple of 4 pixels, at least 16"
    ):
        engine.generate(["an owl"], [0], "1", size)


@pytest.mark.parametrize("size", [(64, 64), (60, 36)])
def test_a_recorded_network_draws_what_the_network_draws_in_every_batch_size(
    weights: Path, engine: Engine, size: tuple[int, int]
) -> None:
    recorded = Engine(weights, "cpu", modes=("1", "4"), trace=True)
    recorded.warm_up(("1", "4"), [size])
    for mode in ("1", "4"):
        network = recorded.model.denoisers[recorded.manifest.students[int(mode)].subfolder]._network
        assert len(network._records) == 1
        for batch in (1, 2, 3, 8):
            prompts, seeds = ["an owl"] * batch, list(range(batch))
            expected = engine.generate(prompts, seeds, mode, size)
            assert difference(recorded.generate(prompts, seeds, mode, size), expected) <= 2
        recorded.generate(["an owl"], [0], mode, (32, 32))
        assert len(network._records) == 1  # nobody waits for a record


def test_a_call_can_be_stopped_before_each_step(engine: Engine) -> None:
    calls = []

    def check() -> None:
        calls.append(True)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.generate_timed(["an owl"], [0], "4", check=check)
    assert len(calls) == 3
    assert engine.generate(["an owl"], [0], "4").shape == (1, 3, 64, 64)


@pytest.mark.parametrize("mode", ["4", "teacher-4", "teacher"])
def test_nothing_is_computed_for_a_call_that_was_cancelled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Cancelled after the second step, whatever the sampler: no third step, no preview or image of it."""
    denoiser = engine.model.denoiser("unet_teacher" if "teacher" in mode else "unet")
    calls: list[int] = []
    decoded: list[int] = []
    network, decode = denoiser._network, engine.model.codec.decode
    monkeypatch.setattr(denoiser, "_network", lambda *inputs: calls.append(1) or network(*inputs))  # type: ignore[func-returns-value]
    monkeypatch.setattr(engine.model.codec, "decode", lambda x: decoded.append(1) or decode(x))  # type: ignore[func-returns-value]

    def check() -> None:
        if len(calls) == 2:
            raise InterruptedError

    previews: list[int] = []
    with pytest.raises(InterruptedError):
        engine.generate_timed(["an owl"], [0], mode, check=check, preview=lambda *told: previews.append(told[0]))
    assert len(calls) == 2 and previews == [1] and decoded == [1]


@pytest.mark.parametrize("mode", ["2", "", "teacher-2", "teacher-", "four", "01"])
def test_an_unknown_mode_lists_the_valid_ones(engine: Engine, weights: Path, mode: str) -> None:
    with pytest.raises(UserError) as error:
        engine.generate(["an owl"], [0], mode)
    assert str(error.value) == f"steps {mode}: these weights have 1, 4, teacher, teacher-4, teacher-1"
    with pytest.raises(UserError, match="these weights have"):
        Engine(weights, "cpu", modes=("1", mode))


def test_weights_without_a_teacher_offer_none(weights: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"teacher": None}))
    with pytest.raises(UserError) as error:
        Engine(copy, "cpu", modes=("teacher",))
    assert str(error.value) == "steps teacher: these weights have 1, 4"


def test_only_the_modes_asked_for_are_loaded_at_once(weights: Path) -> None:
    engine = Engine(weights, "cpu", modes=("1",))
    assert set(engine.model.denoisers) == {"unet_1step"}
    assert engine.generate(["an owl"], [0], "4").shape == (1, 3, 64, 64)
    assert set(engine.model.denoisers) == {"unet_1step", "unet"}
    assert engine.dtype == torch.float32


def test_a_damaged_network_is_an_error_at_once(weights: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    (copy / "unet" / UNET_FILE).write_bytes(b"half")
    with pytest.raises(UserError, match="sha256"):
        Engine(copy, "cpu", modes=("4",))
    Engine(copy, "cpu", modes=("1",))


def test_checksums_are_those_of_the_network_that_a_mode_runs(engine: Engine, weights: Path) -> None:
    files = read_manifest(weights).files
    assert engine.sha256("4") == files[f"unet/{UNET_FILE}"]
    assert engine.sha256("1") == files[f"unet_1step/{UNET_FILE}"]
    assert {engine.sha256(mode) for mode in MODES[2:]} == {files[f"unet_teacher/{UNET_FILE}"]}


def test_timings_are_those_of_the_stages(engine: Engine) -> None:
    _, timings = engine.generate_timed(["an owl and a book"], [0], "4")
    assert timings.text > 0 and timings.decode > 0 and timings.denoise > timings.text / 10


def test_as_many_seeds_as_prompts(engine: Engine) -> None:
    for prompts, seeds in ((["an owl"], [0, 1]), ([], [])):
        with pytest.raises(ValueError, match="as many seeds"):
            engine.generate(prompts, seeds, "1")


def test_resolve_device_takes_auto_cpu_cuda_and_refuses_others() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0"):
        with pytest.raises(UserError, match=f"device {name}: expected auto, cpu or cuda"):
            resolve_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device cuda: this machine has none"):
            resolve_device("cuda")


def test_of_several_gpus_one_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert resolve_device("cuda") == torch.device("cuda") and not chosen
    assert resolve_device("cuda:1") == torch.device("cuda", 1) and chosen == [torch.device("cuda", 1)]
    assert resolve_device(torch.device("cuda:1")) == chosen.pop()
    for name in ("cuda:2", torch.device("cuda:2")):
        with pytest.raises(UserError, match="device cuda:2: this machine has 2; expected cuda:0 to cuda:1"):
            resolve_device(name)
    assert len(chosen) == 1


def test_a_warm_up_says_how_far_it_is(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dmd2"):
        Engine(weights, "cpu", modes=("1", "4")).warm_up(("1", "4"), [(64, 64), (32, 64)])
    told = [message.partition(" (")[0] for message in caplog.messages if " steps at " in message]
    assert told == [f"warm-up: {mode} steps at {size}" for mode in ("1", "4") for size in ("64x64", "32x64")]
