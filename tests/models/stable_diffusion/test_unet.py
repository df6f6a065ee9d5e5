"""The adapter over diffusers' UNet and its neighbours, against diffusers itself."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, LCMScheduler, StableDiffusionXLPipeline
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmd2.diffusion.noise import add_noise, sd_sigmas
from dmd2.diffusion.sampling import sample_few_step
from dmd2.emoji.architecture import build_unet
from dmd2.models.adapters.control import ControlModel
from dmd2.models.stable_diffusion.codec import LatentCodec
from dmd2.models.stable_diffusion.text import TextCondition, TextEncoder
from dmd2.models.stable_diffusion.unet import PredictionType, StableDiffusion
from tests.tiny_sdxl import build_adapter, build_sdxl_unet

TEXT = 256  # both encoders' hidden states
POOLED = 128
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction")


def generate(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return build_unet((32, 32, 32)).eval().requires_grad_(False)


def condition(n: int, seed: int = 1) -> TextCondition:
    sizes = torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0]).expand(n, -1)
    return TextCondition(generate(n, 8, TEXT, seed=seed), generate(n, POOLED, seed=seed + 1), sizes)


# Timesteps


def test_every_table_entry_in_float32_is_exactly_its_integer(unet: Any) -> None:
    denoiser = StableDiffusion(unet)
    assert denoiser.sigmas.dtype == torch.float32 and denoiser.sigmas.shape == (1000,)
    found = denoiser.timestep(denoiser.sigmas)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.arange(1000.0))
    # Whatever rounding a sampler brings in, up or down, the entry stays the entry.
    for towards in (0.0, 100.0):
        near = torch.nextafter(denoiser.sigmas, torch.tensor(towards))
        assert torch.equal(denoiser.timestep(near), torch.arange(1000.0))


def test_timesteps_rise_between_entries_and_stop_at_the_ends(unet: Any) -> None:
    denoiser = StableDiffusion(unet)
    table = sd_sigmas()
    fine = torch.cat([table[:-1] * (table[1:] / table[:-1]) ** (k / 8) for k in range(8)]).sort().values.float()
    found = denoiser.timestep(fine)
    assert bool((found.diff() > 0).all())
    middle = denoiser.timestep((table[:-1] * table[1:]).sqrt().float())  # half-way in log σ
    assert torch.allclose(middle, torch.arange(999.0) + 0.5, atol=2e-3)
    assert denoiser.timestep(torch.tensor([1e-4, 1e4])).tolist() == [0, 999]


# x0


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 249, 399, 749, 999])
def test_x0_is_that_of_diffusers_schedulers(unet: Any, prediction_type: PredictionType, t: int) -> None:
    denoiser = StableDiffusion(unet, prediction_type)
    cond = condition(2)
    sigma = denoiser.sigmas[t].repeat(2)
    x = add_noise(generate(2, 4, 16, 16), sigma, generate(2, 4, 16, 16, seed=5))
    found = denoiser(x, sigma, cond)
    assert found.dtype == torch.float32 and found.shape == x.shape

    ddpm = DDPMScheduler(prediction_type=prediction_type, **SCHEDULE)
    lcm = LCMScheduler(prediction_type=prediction_type, **SCHEDULE)
    x_t = x * ddpm.alphas_cumprod[t].sqrt()  # variance preserving
    output = unet(
        x_t, t, cond.context, added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    ).sample
    expected = ddpm.step(output, t, x_t).pred_original_sample
    tolerance = 1e-4 * (1 + float(sigma[0]))
    assert float((found - expected).abs().max()) < tolerance
    if t >= 249:  # at t = 0 a consistency model returns its input
        lcm.set_timesteps(timesteps=[t])
        assert float((found - lcm.step(output, t, x_t).denoised).abs().max()) < tolerance


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_weighted_x0_error_is_the_plain_error_of_the_output(unet: Any, prediction_type: PredictionType) -> None:
    denoiser = StableDiffusion(unet, prediction_type)
    index = torch.tensor([20, 399, 980, 999])
    sigma, cond = denoiser.sigmas[index], condition(4)
    x0, noise = generate(4, 4, 16, 16), generate(4, 4, 16, 16, seed=2)
    x = add_noise(x0, sigma, noise)
    s = sigma[:, None, None, None]
    root = (1 + s**2).sqrt()
    output = unet(
        x / root, index, cond.context, added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    ).sample
    target = noise if prediction_type == "epsilon" else noise / root - x0 * s / root
    expected = (output - target).square().mean((1, 2, 3))
    found = denoiser.loss_weight(sigma) * (denoiser(x, sigma, cond) - x0).square().mean((1, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-3)


def test_an_unknown_prediction_is_an_error(unet: Any) -> None:
    with pytest.raises(ValueError, match="prediction_type"):
        StableDiffusion(unet, "flow")  # type: ignore[arg-type]


def test_features_are_the_mid_block_s_output_of_the_same_pass(unet: Any) -> None:
    denoiser = StableDiffusion(unet)
    caught: list[Tensor] = []
    handle = unet.mid_block.register_forward_hook(lambda module, inputs, output: caught.append(output))
    x, sigma, cond = generate(2, 4, 16, 16), torch.tensor([0.7, 9.0]), condition(2)
    try:
        x0, bottleneck = denoiser.features(x, sigma, cond)
    finally:
        handle.remove()
    assert len(caught) == 1 and torch.equal(bottleneck, caught[0])
    assert bottleneck.shape == (2, 32, 4, 4)
    assert torch.equal(x0, denoiser(x, sigma, cond))


def test_the_bottleneck_alone_is_that_of_the_whole_pass_and_runs_no_way_up(unet: Any) -> None:
    denoiser = StableDiffusion(unet)
    x, sigma, cond = generate(2, 4, 16, 16).requires_grad_(), torch.tensor([0.7, 9.0]), condition(2)
    ran: list[str] = []
    handles = [
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, block in (("middle", unet.mid_block), ("up", unet.up_blocks[0]), ("out", unet.conv_out))
    ]
    try:
        whole = denoiser.features(x, sigma, cond)[1]
        assert ran == ["middle", "up", "out"]
        ran.clear()
        half = denoiser.bottleneck(x, sigma, cond)
        assert ran == ["middle"]
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(half, whole, rtol=1e-5, atol=1e-6)
    expected, found = (torch.autograd.grad(value.square().mean(), x)[0] for value in (whole, half))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert len(unet.up_blocks) == 3  # the UNet itself is as it was
    torch.testing.assert_close(denoiser(x, sigma, cond), denoiser.features(x, sigma, cond)[0])


def test_the_first_rows_go_up_alone_and_all_go_down(unet: Any) -> None:
    denoiser = StableDiffusion(unet)
    x, sigma, cond = generate(5, 4, 16, 16).requires_grad_(), torch.tensor([0.7, 9.0, 0.1, 3.0, 1.0]), condition(5)
    seen: list[tuple[str, int]] = []
    handles = [
        block.register_forward_hook(lambda _, given, out, name=name: seen.append((name, len(out))))
        for name, block in (("middle", unet.mid_block), *(("up", block) for block in unet.up_blocks))
    ]
    try:
        x0, bottleneck = denoiser.features(x, sigma, cond, first=2)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("middle", 5), ("up", 2), ("up", 2), ("up", 2)]
    alone, others = denoiser.features(x[:2], sigma[:2], cond[:2]), denoiser.bottleneck(x[2:], sigma[2:], cond[2:])
    torch.testing.assert_close(x0, alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bottleneck, torch.cat([alone[1], others]), rtol=1e-4, atol=1e-5)
    found, expected = (
        torch.autograd.grad(a.square().mean() + b.square().mean(), x)[0]
        for a, b in ((x0, bottleneck), (alone[0], torch.cat([alone[1], others])))
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    assert denoiser(x, sigma, cond).shape == x.shape  # the next call is as ever


def test_the_bottleneck_of_a_sharded_unet_makes_no_other_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """`copy` of such a one makes a UNet by default settings first: 3.4 GB, whatever its own size is."""
    torch.manual_seed(0)
    unet = build_unet((32, 32, 32)).eval().requires_grad_(False)
    x, sigma, cond = generate(1, 4, 16, 16), torch.tensor([0.7]), condition(1)
    expected = StableDiffusion(unet).bottleneck(x, sigma, cond)
    plain = type(unet)
    unet.__class__ = type("FSDP", (FSDPModule, plain), {})  # as `fully_shard` does

    def construct(*_: Any, **__: Any) -> None:
        raise AssertionError("another UNet is made")

    monkeypatch.setattr(plain, "__init__", construct)
    assert torch.equal(StableDiffusion(unet).bottleneck(x, sigma, cond), expected)
    with pytest.raises(AssertionError, match="another UNet"):
        copy(unet)


def test_gradients_reach_the_input_through_x0_and_features(unet: Any) -> None:
    denoiser = StableDiffusion(unet)
    x = generate(1, 4, 16, 16).requires_grad_()
    x0, bottleneck = denoiser.features(x, torch.tensor([1.0]), condition(1))
    for value in (x0, bottleneck):
        (gradient,) = torch.autograd.grad(value.square().mean(), x, retain_graph=True)
        assert float(gradient.abs().max()) > 0


def test_a_generator_starts_from_unit_noise_whatever_its_level(unet: Any) -> None:
    denoiser = StableDiffusion(unet)
    noise = generate(3, 4, 16, 16)
    sigma = denoiser.sigmas[torch.tensor([399, 749, 999])]
    start = denoiser.scale_initial_noise(noise, sigma)
    seen = start / (1 + sigma[:, None, None, None] ** 2).sqrt()  # what the UNet is given
    assert torch.allclose(seen, noise, atol=1e-6)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision_stays_inside_the_network(how: str) -> None:
    torch.manual_seed(0)
    full = build_unet((32, 32, 32)).eval().requires_grad_(False)
    x, sigma, cond = generate(2, 4, 16, 16), torch.tensor([0.7, 3.0]), condition(2)
    expected, features = StableDiffusion(full).features(x, sigma, cond)
    if how == "weights":
        denoiser = StableDiffusion(full.to(torch.bfloat16))
    else:
        denoiser = StableDiffusion(full, autocast=torch.bfloat16)
    found, bottleneck = denoiser.features(x, sigma, cond)
    assert found.dtype == bottleneck.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().max()) < 0.1
    assert float((bottleneck - features).abs().max()) < 0.1 * float(features.abs().max())


# Text


def pipeline(text_models: tuple[Any, Any, Any]) -> Any:
    tokenizer, first, second = text_models
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=None,
        scheduler=LCMScheduler(**SCHEDULE),
    )


def text_encoder(text_models: tuple[Any, Any, Any]) -> TextEncoder:
    tokenizer, first, second = text_models
    return TextEncoder([tokenizer, tokenizer], [first, second])


@torch.no_grad()
def test_text_is_encoded_as_by_diffusers(text_models: tuple[Any, Any, Any]) -> None:
    prompts = ["a red apple on a blue background", "an owl", "Something, QUITE else: 3 words?"]
    context, _, pooled, _ = pipeline(text_models).encode_prompt(
        prompts, device=torch.device("cpu"), do_classifier_free_guidance=False
    )
    found = text_encoder(text_models)(prompts, (64, 32))
    assert found.pooled is not None and found.time_ids is not None
    assert found.context.shape == (3, 32, TEXT) and found.pooled.shape == (3, POOLED)
    assert torch.allclose(found.context, context, atol=1e-6)
    assert torch.allclose(found.pooled, pooled, atol=1e-6)
    assert found.time_ids.tolist() == [[32, 64, 0, 0, 32, 64]] * 3  # height before width
    assert float((found.context[0] - found.context[1]).abs().max()) > 0.1


@torch.no_grad()
def test_no_text_is_zeros_as_diffusers_negative_prompt(text_models: tuple[Any, Any, Any]) -> None:
    encode = text_encoder(text_models)
    found = encode(["an owl", "", "  "], (64, 64))
    assert found.pooled is not None
    assert float(found.context[0].abs().max()) > 0 and float(found.pooled[0].abs().max()) > 0
    assert not found.context[1:].any() and not found.pooled[1:].any()
    _, negative, _, negative_pooled = pipeline(text_models).encode_prompt(
        "an owl", device=torch.device("cpu"), do_classifier_free_guidance=True
    )
    unconditional = encode(["an owl"], (64, 64)).unconditional()
    assert unconditional.pooled is not None
    assert torch.equal(unconditional.context, negative)
    assert torch.equal(unconditional.pooled, negative_pooled)
    assert torch.equal(found[1:2].context, unconditional.context)


@torch.no_grad()
def test_long_prompts_are_encoded_in_windows_not_cut(text_models: tuple[Any, Any, Any]) -> None:
    encode = text_encoder(text_models)
    words = ["owl", "apple", "book", "heart"] * 10  # 40 words: more than a window of 30 and its two marks
    long, other = " ".join([*words, "red"]), " ".join([*words, "blue"])
    found = encode([long, other, "an owl"], (64, 64))
    assert found.pooled is not None
    assert found.context.shape == (3, 64, TEXT)
    # Only the last word differs, and it lies in the second window.
    assert torch.allclose(found.context[0, :32], found.context[1, :32], atol=1e-6)
    assert float((found.context[0, 32:] - found.context[1, 32:]).abs().max()) > 1e-2
    assert torch.allclose(found.pooled[0], found.pooled[1], atol=1e-6)
    # Each window is what encoding its words alone gives.
    first = encode([" ".join(words[:30])], (64, 64))
    second = encode([" ".join([*words[30:], "red"])], (64, 64))
    assert torch.allclose(found.context[:1], torch.cat([first.context, second.context], dim=1), atol=1e-5)
    # Exactly full is still one window, one more word is two.
    assert encode([" ".join(words[:30])], (64, 64)).context.shape[1] == 32
    assert encode([" ".join(words[:31])], (64, 64)).context.shape[1] == 64


@torch.no_grad()
def test_one_encoder_gives_its_last_layer_and_nothing_pooled(text_models: tuple[Any, Any, Any]) -> None:
    tokenizer, first, _ = text_models
    found = TextEncoder([tokenizer], [first])(["an owl"], (64, 64))
    ids = tokenizer(["an owl"], padding="max_length", return_tensors="pt").input_ids
    assert found.pooled is None and found.time_ids is None
    assert torch.allclose(found.context, first(ids).last_hidden_state, atol=1e-6)
    with pytest.raises(ValueError, match="tokenizers"):
        TextEncoder([tokenizer, tokenizer], [first])


# Conditions


def test_conditions_are_joined_picked_and_masked() -> None:
    two, one = condition(2), condition(1, seed=9)
    both = two.cat(one)
    assert len(both) == 3 and both.pooled is not None and both.time_ids is not None
    assert torch.equal(both[:2].context, two.context) and torch.equal(both[2:].context, one.context)
    assert torch.equal(both.pooled[2:], one.pooled) and both.time_ids.shape == (3, 6)
    assert torch.equal(both[torch.tensor([2, 0])].context, both.context[[2, 0]])
    assert torch.equal(two.cat().context, two.context)

    nothing = both.unconditional()
    assert nothing.pooled is not None
    assert not nothing.context.any() and not nothing.pooled.any()
    assert nothing.context.shape == both.context.shape and torch.equal(nothing.time_ids, both.time_ids)

    masked = both.masked(torch.tensor([True, False, True]))
    assert masked.pooled is not None
    assert torch.equal(masked[0:1].context, both[0:1].context) and torch.equal(masked.pooled[2], both.pooled[2])
    assert not masked.context[1].any() and not masked.pooled[1].any()
    assert torch.equal(masked.time_ids, both.time_ids)

    tracked = TextCondition(two.context.clone().requires_grad_())
    assert tracked.context.requires_grad and not tracked.detach().context.requires_grad
    assert tracked.cat(TextCondition(one.context)).pooled is None


def test_contexts_of_unequal_length_do_not_go_into_one_batch() -> None:
    with pytest.raises(ValueError, match=r"unequal length in one batch: \[8, 12\]"):
        TextCondition(generate(1, 8, TEXT)).cat(TextCondition(generate(2, 12, TEXT, seed=1)))


# Images


def test_codec_keeps_shapes_ranges_and_types(tiny_vae: Any) -> None:
    codec = LatentCodec(tiny_vae)
    assert codec.factor == 4
    images = torch.randint(0, 256, (2, 3, 64, 32), generator=torch.Generator().manual_seed(0)).byte()
    z = codec.encode(images)
    assert z.shape == (2, 4, 16, 8) and z.dtype == torch.float32
    back = codec.decode(z)
    assert back.shape == images.shape and back.dtype == torch.uint8
    expected = tiny_vae.decode(tiny_vae.encode(images.float() / 127.5 - 1).latents).sample.clamp(-1, 1)
    assert torch.equal(back, ((expected + 1) * 127.5).round().byte())


def test_codec_maps_the_whole_range_of_a_byte_and_clips_the_rest() -> None:
    class Through(torch.nn.Module):
        """A VAE that returns its input."""

        config: dict[str, Any]

        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

            class Config(dict[str, Any]):
                scaling_factor = 0.5

            self.config = Config(block_out_channels=(8,))

        def encode(self, x: Tensor) -> Any:
            return type("Encoded", (), {"latents": x})

        def decode(self, z: Tensor) -> Any:
            return type("Decoded", (), {"sample": z})

    codec = LatentCodec(Through())
    images = torch.arange(256).byte().reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    z = codec.encode(images)
    assert float(z.min()) == -0.5 and float(z.max()) == 0.5  # scaled to about unit variance
    assert torch.equal(codec.decode(z), images)
    assert codec.decode(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


@torch.no_grad()
def test_codec_of_a_kl_autoencoder_encodes_to_the_mean() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    codec = LatentCodec(vae.eval())
    assert codec.factor == 8
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    z = codec.encode(images)
    mean = vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    assert z.shape == (1, 4, 2, 2) and torch.allclose(z, mean * 0.13025, atol=1e-5)
    assert codec.decode(z).shape == images.shape


# What a GPU would be made to wait for


class Crossing(TorchDispatchMode):
    """Notes operations that read from one device and write to another. "meta" stands for a GPU: the host can ask it
    for no value at all, so whatever would make a GPU wait fails."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.ndim]
        if len({t.device for t in tensors}) > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("controlled", [False, True])
@torch.no_grad()
def test_no_step_copies_between_host_and_device_or_waits(controlled: bool) -> None:
    network = build_sdxl_unet().to("meta")
    denoiser = StableDiffusion(network)
    adapter = ControlModel(build_adapter().to("meta"), torch.device("meta"))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    control = adapter.guide(image, [999, 749, 499, 249]) if controlled else None
    cond = condition(2).to("meta")
    noise = torch.empty(2, 4, 4, 8, 8, device="meta")
    sigmas = denoiser.table[[999, 749, 499, 249]].tolist()
    with Crossing() as crossing:
        x0 = sample_few_step(
            lambda x, s: denoiser(x, s, cond, control), denoiser.scale_initial_noise, noise.unbind(1), sigmas
        )
    assert x0.shape == (2, 4, 8, 8) and x0.is_meta
    assert crossing.found == []


def test_a_wait_would_be_found() -> None:
    x = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError), Crossing():
        float(x.sum())
    with Crossing() as crossing:
        torch.ones(2).to("meta")
    assert len(crossing.found) == 1
