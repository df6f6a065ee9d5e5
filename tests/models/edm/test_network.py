"""EDM's networks against a second, slow derivation in float64; preconditioning, condition, codec, folders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import dmd2.models.edm.folder
from dmd2.diffusion.denoiser import cfg_denoise
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import Churn, conditioned, sample_heun, teacher_sigmas
from dmd2.models.edm.folder import heun_steps, load_edm, save_edm
from dmd2.models.edm.layers import Block
from dmd2.models.edm.network import PUBLISHED, ClassCondition, Edm, EdmConfig, EdmNetwork, RgbCodec
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import sha256_file
from dmd2.weights.manifest import read_manifest, write_manifest

Array = NDArray[np.float64]

TINY: dict[str, EdmConfig] = {
    name: EdmConfig(
        architecture=name,  # type: ignore[arg-type]
        resolution=8,
        classes=3,
        augment_dim=9,
        model_channels=64 if name == "adm" else 8,  # ADM's heads are 64 wide
        channel_mult=(1, 2),
        blocks=1,
        attention=(4,),
    )
    for name in ("ddpmpp", "ncsnpp", "adm")
}
ARCHITECTURES = pytest.mark.parametrize("name", list(TINY))


def shuffled(config: EdmConfig, seed: int = 0) -> EdmNetwork:
    """A network in which every parameter matters: new ones have last layers of zeros."""
    torch.manual_seed(seed)
    network = EdmNetwork(config)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if ".norm" in name or "_norm" in name:
                p.copy_(float(name.endswith("weight")) + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / (p[0].numel() ** 0.5 if p.ndim > 1 else 5))
    return network.eval().requires_grad_(False)


def inputs(config: EdmConfig, batch: int = 3) -> tuple[Tensor, Tensor, ClassCondition]:
    x = seeded_noise(list(range(batch)), (config.channels, config.resolution, config.resolution))
    sigma = torch.tensor([0.05, 0.7, 3.0])[:batch]
    return x * (0.25 + sigma[:, None, None, None] ** 2).sqrt(), sigma, ClassCondition.of(torch.arange(batch) - 1, 3)


# The second derivation: float64, one image, one head, one group, one tap of a filter at a time; no structure is
# computed, each network of TINY is written out.


def conv(x: Array, weight: Array, bias: Array, padding: int) -> Array:
    k = weight.shape[-1]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    height, width = x.shape[1] - k + 1, x.shape[2] - k + 1
    out = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for i in range(k):
        for j in range(k):
            out += np.einsum("oc,chw->ohw", weight[:, :, i, j], x[:, i : i + height, j : j + width])
    return out


def taps(name: str) -> Array:
    return np.array([1.0, 3, 3, 1]) / 8 if name == "ncsnpp" else np.array([0.5, 0.5])


def down(x: Array, f: Array, padding: int) -> Array:
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    side = (x.shape[1] - len(f)) // 2 + 1
    out = np.zeros((len(x), side, side))
    for i in range(side):
        for j in range(side):
            out[:, i, j] = np.einsum("a,b,cab->c", f, f, x[:, 2 * i : 2 * i + len(f), 2 * j : 2 * j + len(f)])
    return out


def up(x: Array, f: Array) -> Array:
    """Each pixel spreads 4 times its value with the filter; what falls off the double-sized image is lost."""
    side, margin = x.shape[1], (len(f) - 1) // 2
    out = np.zeros((len(x), 2 * side + 8, 2 * side + 8))
    for i in range(side):
        for j in range(side):
            spread = 4 * x[:, i, j, None, None] * np.outer(f, f)
            out[:, 4 + 2 * i - margin :, 4 + 2 * j - margin :][:, : len(f), : len(f)] += spread
    return out[:, 4 : 4 + 2 * side, 4 : 4 + 2 * side]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


class Slow:
    """One image through the network of TINY called `name`, with the parameters of `network`."""

    def __init__(self, name: str, network: EdmNetwork) -> None:
        self.name, self.adm = name, name == "adm"
        self.w = {k: v.double().numpy() for k, v in network.state_dict().items()}
        self.embedding: Array = np.zeros(0)

    def linear(self, x: Array, layer: str) -> Array:
        out = self.w[f"model.{layer}.weight"] @ x
        bias = self.w.get(f"model.{layer}.bias")
        return out if bias is None else out + bias

    def conv(self, x: Array, layer: str, padding: int | None = None) -> Array:
        weight = self.w[f"model.{layer}.weight"]
        default = (weight.shape[-1] - 1) // 2
        return conv(x, weight, self.w[f"model.{layer}.bias"], default if padding is None else padding)

    def norm(self, x: Array, layer: str) -> Array:
        size = len(x) // min(32, len(x) // 4)
        out = np.empty_like(x)
        for start in range(0, len(x), size):
            group = x[start : start + size]
            spread = ((group - group.mean()) ** 2).mean() + (1e-5 if self.adm else 1e-6)
            out[start : start + size] = (group - group.mean()) / spread**0.5
        return out * self.w[f"model.{layer}.weight"][:, None, None] + self.w[f"model.{layer}.bias"][:, None, None]

    def resampled(self, x: Array, how: str) -> Array:
        f = taps(self.name)
        return up(x, f) if how == "up" else down(x, f, (len(f) - 1) // 2) if how == "down" else x

    def block(self, x: Array, layer: str, how: str = "", attention: bool = False) -> Array:
        scale = 1.0 if self.adm else 0.5**0.5
        h = self.conv(self.resampled(silu(self.norm(x, f"{layer}.norm0")), how), f"{layer}.conv0")
        extra = self.linear(self.embedding, f"{layer}.affine")[:, None, None]
        if self.adm:
            times, plus = extra[: len(h)] + 1, extra[len(h) :]
            h = silu(self.norm(h, f"{layer}.norm1") * times + plus)
        else:
            h = silu(self.norm(h + extra, f"{layer}.norm1"))
        h = self.conv(h, f"{layer}.conv1")
        skip = self.resampled(x, how)
        if f"model.{layer}.skip.weight" in self.w:
            skip = self.conv(skip, f"{layer}.skip")
        x = (h + skip) * scale
        return (self.attention(x, layer) + x) * scale if attention else x

    def attention(self, x: Array, layer: str) -> Array:
        c, pixels = len(x), x[0].size
        heads = c // 64 if self.adm else 1
        qkv = self.conv(self.norm(x, f"{layer}.norm2"), f"{layer}.qkv").reshape(heads, c // heads, 3, pixels)
        out = np.zeros((heads, c // heads, pixels))
        for head in range(heads):
            q, k, v = qkv[head, :, 0], qkv[head, :, 1], qkv[head, :, 2]
            for pixel in range(pixels):
                score = np.exp(q[:, pixel] @ k / math.sqrt(c // heads))
                out[head, :, pixel] = v @ (score / score.sum())
        return self.conv(out.reshape(x.shape), f"{layer}.proj")

    def embed(self, c_noise: float, label: Array, augment: Array | None) -> Array:
        if self.name == "ncsnpp":
            # In float32, as the phases' rounding is the input's, not the network's.
            phase = np.float32(c_noise) * (np.float32(2 * np.pi) * self.w["model.map_noise.freqs"].astype(np.float32))
            e = np.concatenate([np.sin(phase.astype(float)), np.cos(phase.astype(float))])
        else:
            half = 32 if self.adm else 4
            phase = np.array([c_noise * 10000 ** (-i / (half if self.adm else half - 1)) for i in range(half)])
            e = np.concatenate([np.cos(phase), np.sin(phase)] if self.adm else [np.sin(phase), np.cos(phase)])
        if augment is not None:
            e = e + self.linear(augment, "map_augment")
        if not self.adm:
            e = e + self.linear(label * math.sqrt(3), "map_label")
        e = self.linear(silu(self.linear(e, "map_layer0")), "map_layer1")
        return silu(e + self.linear(label, "map_label")) if self.adm else silu(e)

    def run(self, x: Array, c_noise: float, label: Array, augment: Array | None) -> tuple[Array, Array]:
        self.embedding = self.embed(c_noise, label, augment)
        a = self.conv(x, "enc.8x8_conv")
        b = self.block(a, "enc.8x8_block0")
        c = self.block(b, "enc.4x4_down", "down")
        if self.name == "ncsnpp":
            # The convolution sees zeros around the image, the filter sees what the convolution made of them.
            shrunk = down(self.conv(x, "enc.4x4_aux_residual", padding=2), taps(self.name), 0)
            c = (c + shrunk) / math.sqrt(2)
        d = self.block(c, "enc.4x4_block0", attention=True)
        h = self.block(d, "dec.4x4_in0", attention=True)
        h = self.block(h, "dec.4x4_in1")
        h = self.block(np.concatenate([h, d]), "dec.4x4_block0", attention=self.adm)
        h = self.block(np.concatenate([h, c]), "dec.4x4_block1", attention=True)
        h = self.block(h, "dec.8x8_up", "up")
        h = self.block(np.concatenate([h, b]), "dec.8x8_block0")
        h = self.block(np.concatenate([h, a]), "dec.8x8_block1")
        last = ("out_norm", "out_conv") if self.adm else ("dec.8x8_aux_norm", "dec.8x8_aux_conv")
        return self.conv(silu(self.norm(h, last[0])), last[1]), d

    def x0(self, x: Array, sigma: float, label: Array, augment: Array | None = None) -> tuple[Array, Array]:
        s, d = sigma, 0.5
        f, bottleneck = self.run(x / math.sqrt(d**2 + s**2), math.log(s) / 4, label, augment)
        return d**2 / (s**2 + d**2) * x + s * d / math.sqrt(s**2 + d**2) * f, bottleneck


@ARCHITECTURES
@pytest.mark.parametrize("augmented", [False, True])
def test_network_is_what_a_slow_derivation_says(name: str, augmented: bool) -> None:
    network = shuffled(TINY[name])
    x, sigma, cond = inputs(TINY[name])
    augment = seeded_noise([5, 6, 7], (9,)) if augmented else None
    x0, bottleneck = network(x, sigma, cond.labels, augment)
    assert x0.dtype == bottleneck.dtype == torch.float32
    slow = Slow(name, network)
    for i in range(3):
        told = None if augment is None else augment[i].double().numpy()
        truth, middle = slow.x0(x[i].double().numpy(), float(sigma[i]), cond.labels[i].double().numpy(), told)
        assert truth.std() > 0.2 and middle.std() > 0.2  # there is something to compare
        assert np.abs(x0[i].numpy() - truth).max() < 1e-5
        assert np.abs(bottleneck[i].numpy() - middle).max() < 1e-5


@ARCHITECTURES
def test_every_input_and_parameter_matters(name: str) -> None:
    network = shuffled(TINY[name]).requires_grad_(True)
    x, sigma, cond = inputs(TINY[name])
    network(x, sigma, cond.labels, torch.ones(3, 9))[0].square().sum().backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert silent == []
    with torch.no_grad():
        one = network(x, sigma, cond.labels)[0]
        other = network(x, sigma, cond.labels.roll(1, 1))[0]
        assert torch.equal(one[0], other[0])  # the first image has no class
        assert float((one - other)[1:].abs().amax((1, 2, 3)).min()) > 1e-3


# Shapes and numbers of the published ones


def test_published_models_have_their_parameters() -> None:
    counts, names = {}, {}
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            network = EdmNetwork(config)
        counts[name] = sum(p.numel() for p in network.parameters())
        names[name] = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    # Karras et al. 2022, table 7 rounds: 56, 62 and 296 million
    assert counts == {
        "edm-cifar10-32x32-cond-vp": 55_735_299,
        "edm-cifar10-32x32-cond-ve": 56_400_643,
        "edm-cifar10-32x32-uncond-vp": 55_733_891,
        "edm-cifar10-32x32-uncond-ve": 56_397_827,
        "edm-ffhq-64x64-uncond-vp": 61_805_571,
        "edm-ffhq-64x64-uncond-ve": 62_761_091,
        "edm-afhqv2-64x64-uncond-vp": 61_805_571,
        "edm-afhqv2-64x64-uncond-ve": 62_761_091,
        "edm-imagenet-64x64-cond-adm": 295_899_267,
    }
    cifar, faces = names["edm-cifar10-32x32-cond-vp"], names["edm-ffhq-64x64-uncond-ve"]
    assert cifar["model.map_label.weight"] == (128, 10) and cifar["model.map_augment.weight"] == (128, 9)
    assert cifar["model.enc.16x16_block3.qkv.weight"] == (768, 256, 1, 1)
    assert cifar["model.dec.16x16_block4.qkv.weight"] == (768, 256, 1, 1)
    assert "model.dec.16x16_block3.qkv.weight" not in cifar  # only the last one of the decoder attends
    assert cifar["model.enc.16x16_down.skip.weight"] == (256, 256, 1, 1)
    assert cifar["model.enc.16x16_down.conv0.resample_filter"] == (1, 1, 2, 2)
    assert cifar["model.dec.8x8_in0.proj.bias"] == (256,)
    assert cifar["model.dec.32x32_aux_conv.weight"] == (3, 256, 3, 3)
    assert faces["model.map_noise.freqs"] == (128,) and faces["model.map_layer0.weight"] == (512, 256)
    assert faces["model.enc.32x32_aux_residual.weight"] == (128, 3, 3, 3)
    assert faces["model.enc.8x8_aux_residual.resample_filter"] == (1, 1, 4, 4)
    adm = names["edm-imagenet-64x64-cond-adm"]
    assert adm["model.map_label.weight"] == (768, 1000) and "model.map_label.bias" not in adm
    assert adm["model.enc.64x64_block0.affine.weight"] == (384, 768)
    assert adm["model.dec.16x16_block0.qkv.weight"] == (1728, 576, 1, 1)
    assert adm["model.enc.8x8_down.skip.resample_filter"] == (1, 1, 2, 2)
    assert "model.enc.8x8_down.skip.weight" not in adm
    assert adm["model.out_conv.weight"] == (3, 192, 3, 3)
    assert PUBLISHED["edm-afhqv2-64x64-uncond-vp"].dropout == 0.25


@ARCHITECTURES
def test_a_new_network_says_next_to_nothing(name: str) -> None:
    torch.manual_seed(0)
    network = EdmNetwork(TINY[name])
    x, sigma, cond = inputs(TINY[name])
    with torch.no_grad():
        output = network.model(x, sigma.log() / 4, cond.labels)[0]
    assert float(output.abs().max()) < 1e-3
    assert (float(output.abs().max()) == 0) == (name == "adm")
    layer = network.model.map_layer1
    weight, bias = layer.weight.detach(), layer.bias.detach()
    fan = weight.shape[1]
    bound = (1 / fan if name == "adm" else 6 / (2 * fan)) ** 0.5
    assert float(weight.abs().max()) == pytest.approx(bound, rel=0.02)
    assert float(bias.abs().max()) == pytest.approx(bound if name == "adm" else 0, rel=0.05)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.ndim == 4)


# Preconditioning and adapter


def test_preconditioning_keeps_variances_and_weighs_levels_alike() -> None:
    config = TINY["adm"]
    denoiser = Edm(EdmNetwork(config))  # new: F = 0
    sigma = torch.tensor([0.002, 0.5, 80.0])
    x = seeded_noise([0, 1, 2], (3, 8, 8))
    x0 = denoiser(x, sigma, ClassCondition(torch.zeros(3, 3)))
    c_skip = 0.25 / (sigma**2 + 0.25)
    assert torch.allclose(x0, c_skip[:, None, None, None] * x, rtol=1e-6)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    assert torch.allclose(denoiser.loss_weight(sigma) * c_out**2, torch.ones(3))
    assert torch.equal(denoiser.scale_initial_noise(x, sigma)[2], 80 * x[2])
    assert len(denoiser.sigmas) == 1000 and denoiser.sigmas.dtype == torch.float32
    assert float(denoiser.sigmas[0]) == pytest.approx(0.002) and float(denoiser.sigmas[-1]) == pytest.approx(80)


@ARCHITECTURES
def test_boundary_makes_the_network_the_identity_there(name: str) -> None:
    network = shuffled(TINY[name].model_copy(update={"boundary": 0.002}))
    x, _, cond = inputs(TINY[name])
    assert torch.equal(network(x, torch.full((3,), 0.002), cond.labels)[0], x)
    sigma = 0.3
    f = network.model(x / math.sqrt(0.34), torch.full((3,), sigma).log() / 4, cond.labels)[0]
    # Song et al. 2023 (consistency models), app. C
    truth = 0.25 / ((sigma - 0.002) ** 2 + 0.25) * x + 0.5 * (sigma - 0.002) / math.sqrt(sigma**2 + 0.25) * f
    assert torch.allclose(network(x, torch.full((3,), sigma), cond.labels)[0], truth, atol=1e-5)


@ARCHITECTURES
def test_bf16_is_near_fp32_and_leaves_the_embedding_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = shuffled(TINY[name])
    x, sigma, cond = inputs(TINY[name])
    exact = network(x, sigma, cond.labels)
    seen: list[torch.dtype] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.dtype)
        return attention(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    network.dtype = torch.bfloat16
    rough = network(x, sigma, cond.labels)
    assert seen == [torch.bfloat16] * (4 if name == "adm" else 3)
    embedding = network.model.embed(sigma.log() / 4, cond.labels, None)
    assert embedding.dtype == torch.float32 and all(p.dtype == torch.float32 for p in network.parameters())
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        assert 1e-5 < float((a - b).std() / a.std()) < 0.03


def test_wrong_shapes_are_refused() -> None:
    denoiser = Edm(shuffled(TINY["ddpmpp"]))
    x, sigma, cond = inputs(TINY["ddpmpp"])
    for wrong in (
        (x[:, :2], sigma, cond),
        (torch.zeros(3, 3, 16, 16), sigma, cond),
        (x, sigma[:1], cond),
        (x, sigma, ClassCondition(torch.zeros(3, 4))),
    ):
        with pytest.raises(ValueError, match=r"expected x \(3, \d, 8, 8\), sigma \(3,\) and labels \(3, 3\)"):
            denoiser(*wrong)


@ARCHITECTURES
def test_an_image_is_the_same_in_any_company_and_guidance_goes_through(name: str) -> None:
    denoiser = Edm(shuffled(TINY[name]))
    x, sigma, cond = inputs(TINY[name])
    together = denoiser(x, sigma, cond)
    alone = torch.cat([denoiser(x[i : i + 1], sigma[i : i + 1], cond[[i]]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    free = denoiser(x, sigma, cond.unconditional())
    pushed = cfg_denoise(denoiser, x, sigma, cond, cond.unconditional(), 3.0)
    assert torch.allclose(pushed, free + 3 * (together - free), atol=1e-4)
    x0, bottleneck = denoiser.features(x, sigma, cond)
    assert torch.equal(x0, together) and bottleneck.shape == (3, 2 * TINY[name].model_channels, 4, 4)
    ran: list[str] = []
    for layer, module in denoiser.network.model.dec.items():
        module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    assert torch.equal(denoiser.bottleneck(x, sigma, cond), bottleneck) and ran == []  # for half of the work


@ARCHITECTURES
def test_the_first_rows_are_decoded_alone_and_all_are_encoded(name: str) -> None:
    denoiser = Edm(shuffled(TINY[name]))
    x, sigma, cond = inputs(TINY[name])
    x0, bottleneck = denoiser.features(x, sigma, cond)
    decoded: list[int] = []
    for module in denoiser.network.model.dec.values():
        module.register_forward_hook(lambda _, given, out: decoded.append(len(out)))
    fewer, same = denoiser.features(x, sigma, cond, first=2)
    assert set(decoded) == {2} and fewer.shape == x0[:2].shape
    torch.testing.assert_close(fewer, x0[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, bottleneck, rtol=1e-4, atol=1e-5)


def test_heun_samples_from_a_network_and_each_image_keeps_its_seed() -> None:
    denoiser = Edm(shuffled(TINY["ncsnpp"]))
    sigmas, cond = teacher_sigmas(denoiser, 5), ClassCondition.of(torch.tensor([0, 2]), 3)
    assert sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002)

    def generate(seeds: list[int], cond: ClassCondition) -> Tensor:
        noise = seeded_noise(seeds, (6, 3, 8, 8)).unbind(1)
        start = sigmas[0] * noise[0]
        return sample_heun(conditioned(denoiser, cond), start, sigmas, noise[1:], Churn(4.0))

    both = generate([1, 2], cond)
    assert both.dtype == torch.float32 and both.isfinite().all()
    assert torch.allclose(both[1:], generate([2], cond[1:]), atol=1e-3)
    assert not torch.allclose(both[1:], generate([3], cond[1:]), atol=1e-1)


def test_dropout_works_in_training_only() -> None:
    network = shuffled(TINY["ddpmpp"].model_copy(update={"dropout": 0.5}))
    x, sigma, cond = inputs(TINY["ddpmpp"])
    plain = shuffled(TINY["ddpmpp"])(x, sigma, cond.labels)[0]
    assert torch.equal(network(x, sigma, cond.labels)[0], plain)
    network.train()
    torch.manual_seed(0)
    assert not torch.allclose(network(x, sigma, cond.labels)[0], plain, atol=1e-2)


# Condition and codec


def test_a_class_condition_is_one_hot_and_unconditional_is_zero() -> None:
    cond = ClassCondition.of(torch.tensor([2, -1, 0]), 3)
    assert cond.labels.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]] and cond.labels.dtype == torch.float32
    assert len(cond) == 3 and cond[1:].labels.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert cond.cat(cond[:1]).labels.shape == (4, 3)
    assert cond.masked(torch.tensor([False, True, True])).labels.sum() == 1
    assert not cond.unconditional().labels.any()
    assert cond.to("cpu").detach().labels.equal(cond.labels)
    assert ClassCondition.of(torch.tensor([-1, -1]), 0).labels.shape == (2, 0)
    for wrong in (3, -2):
        with pytest.raises(UserError, match=rf"class {wrong}: expected 0 to 2, or -1 for any"):
            ClassCondition.of(torch.tensor([0, wrong]), 3)
    with pytest.raises(UserError, match="class 0: these weights know no classes"):
        ClassCondition.of(torch.tensor([0]), 0)


def test_codec_keeps_every_byte_and_clips() -> None:
    codec = RgbCodec()
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    x = codec.encode(every)
    assert x.dtype == torch.float32 and float(x.min()) == -1 and float(x.max()) == 1
    assert torch.equal(codec.decode(x), every)
    assert codec.decode(torch.tensor([-9.0, 9.0, 0.5])).tolist() == [0, 255, 191]


# Configurations and folders


@pytest.mark.parametrize(("channels", "heads"), [(32, 0), (64, 1), (96, 1), (128, 2), (160, 2)])
def test_adm_attends_with_a_head_for_each_whole_64_channels(channels: int, heads: int) -> None:
    config = EdmConfig(
        architecture="adm",
        resolution=8,
        channels=3,
        classes=0,
        model_channels=channels,
        channel_mult=(1,),
        blocks=1,
        attention=(8,),
    )
    network = EdmNetwork(config)
    attending = [m for m in network.modules() if isinstance(m, Block) and m.heads]
    assert {block.heads for block in attending} == ({heads} if heads else set())
    x = torch.randn(2, 3, 8, 8)
    assert Edm(network)(x, torch.ones(2), ClassCondition.of(torch.tensor([-1, -1]), 0)).shape == x.shape


def test_teachers_are_sampled_in_as_many_steps_as_edm_s() -> None:
    counts = {name: heun_steps(config) for name, config in PUBLISHED.items()}
    assert set(counts.values()) == {18, 40}
    assert all(count == (18 if "cifar10" in name else 40) for name, count in counts.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "dit"}, "architecture: Input should be 'ddpmpp', 'ncsnpp' or 'adm'"),
        ({"resolution": 8.5}, "resolution: Input should be a valid integer"),
        ({"resolution": "8"}, "resolution: Input should be a valid integer"),
        ({"channel_mult": [1, 2, 2, 2, 2]}, "resolution 8 cannot be halved 4 times"),
        ({"channel_mult": []}, "channel_mult: Tuple should have at least 1 item"),
        ({"blocks": 0}, "blocks: Input should be greater than or equal to 1"),
        ({"blocks": 10**9}, "blocks: Input should be less than or equal to 16"),
        ({"model_channels": 6}, "model_channels: Input should be a multiple of 4"),
        ({"model_channels": 132}, "model_channels 132: cannot be split into groups of normalisation"),
        (
            {"architecture": "adm", "model_channels": 224, "attention": [8]},
            "model_channels 224: 224 do not make 3 equal heads",
        ),
        ({"sigma_min": 90.0}, "sigma_min 90.0 is not below sigma_max 80.0"),
        ({"sigma_data": 0.0}, "sigma_data: Input should be greater than 0"),
        ({"sigmas": [1.0, 2.0]}, "sigmas: expected descending levels"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1"),
        ({"heads": 4}, "heads: Extra inputs are not permitted"),
    ],
)
def test_wrong_configurations_are_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = saved(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(UserError, match="^" + str(path)) as caught:
        load_edm(folder, "cpu")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def saved(tmp_path: Path, name: str = "ddpmpp") -> Path:
    folder = tmp_path / "weights"
    save_edm(folder, shuffled(TINY[name]), name="tiny", licence="none", recipe={"name": "test"})
    return folder


@ARCHITECTURES
def test_a_folder_keeps_the_network_to_the_bit(tmp_path: Path, name: str) -> None:
    config = TINY[name].model_copy(update={"dropout": 0.3, "sigmas": (80.0, 1.5), "boundary": 0.002})
    network = shuffled(config)
    save_edm(tmp_path / "weights", network, name="tiny", licence="none", recipe={"name": "test"})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "dmd2.json", "model.safetensors", "weights"]
    manifest = read_manifest(tmp_path / "weights")
    assert (manifest.name, manifest.family, manifest.native_size) == ("tiny", "edm", (8, 8))
    for file in ("config.json", "model.safetensors"):
        assert manifest.files[file] == sha256_file(tmp_path / "weights" / file)
    assert (tmp_path / "weights" / "model.safetensors").stat().st_mode & 0o777 == 0o644

    loaded = load_edm(tmp_path / "weights", "cpu")
    assert loaded.config == config.model_copy(update={"dropout": 0.0})
    mine, theirs = network.state_dict(), loaded.network.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert not any(p.requires_grad for p in loaded.network.parameters()) and not loaded.network.training
    x, sigma, cond = inputs(config)
    assert torch.equal(loaded(x, sigma, cond), network(x, sigma, cond.labels)[0])

    # Converted to bf16 once or at every call: the same numbers.
    half = load_edm(tmp_path / "weights", "cpu", torch.bfloat16)
    dtypes = {k: p.dtype for k, p in half.network.named_parameters()}
    assert dtypes["model.enc.8x8_conv.weight"] == dtypes["model.enc.8x8_block0.norm0.bias"] == torch.bfloat16
    assert dtypes["model.map_layer0.weight"] == dtypes["model.enc.8x8_block0.affine.weight"] == torch.float32
    network.dtype = torch.bfloat16
    assert torch.equal(half(x, sigma, cond), network(x, sigma, cond.labels)[0])


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    before = sha256_file(folder / "dmd2.json")
    network = shuffled(TINY["ddpmpp"], 1)
    with pytest.raises(UserError, match="weights: exists already; expected a new or empty folder"):
        save_edm(folder, network, name="tiny", licence="none", recipe={})
    assert sha256_file(folder / "dmd2.json") == before

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(dmd2.models.edm.folder, "write_manifest", fail)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk full"):
        save_edm(tmp_path / "empty", network, name="tiny", licence="none", recipe={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "weights"]
    assert not any((tmp_path / "empty").iterdir())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    write_manifest(folder, read_manifest(folder))


def test_wrong_weights_are_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    first = "model.enc.8x8_conv.weight"
    filter_name = "model.enc.4x4_down.skip.resample_filter"

    def expect(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_edm(folder, "cpu")
        assert "\n" not in str(caught.value)

    original = (folder / "model.safetensors").read_bytes()
    edit(folder, lambda t: t.__delitem__(first))
    expect(rf"lacks the tensor {first} of the ddpmpp network of 8x8 pixels")
    (folder / "model.safetensors").write_bytes(original)
    edit(folder, lambda t: t.update(more=torch.zeros(1)))
    expect("holds the tensor 'more', which the ddpmpp network of 8x8 pixels does not have")
    (folder / "model.safetensors").write_bytes(original)
    edit(folder, lambda t: t.update({first: torch.zeros(8, 3, 1, 1)}))
    expect(r"weight is torch.float32 \(8, 3, 1, 1\); the .* needs floats \(8, 3, 3, 3\)")
    (folder / "model.safetensors").write_bytes(original)
    edit(folder, lambda t: t.update({first: torch.zeros(8, 3, 3, 3, dtype=torch.int8)}))
    expect("weight is torch.int8")
    (folder / "model.safetensors").write_bytes(original)
    edit(folder, lambda t: t.update({filter_name: 2 * t[filter_name]}))
    expect(rf"the tensor {filter_name} is not the filter \(1, 1\)")

    (folder / "model.safetensors").write_bytes(original[:-100])
    expect("sha256 is .* the file is damaged or was changed")
    write_manifest(folder, read_manifest(folder))
    expect("model.safetensors: not safetensors, or damaged")
    (folder / "model.safetensors").unlink()
    expect("model.safetensors: missing; these weights are incomplete")
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"family": "sdxl"}))
    expect("weights of the family 'sdxl'; expected 'edm'")
