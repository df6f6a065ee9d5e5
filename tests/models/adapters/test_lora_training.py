"""LoRAs in training: several on one frozen UNet, each seen by its own calls alone; and the file that others read."""

from __future__ import annotations

import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from dmd2.models.adapters.lora import Fused, read_lora
from dmd2.models.adapters.lora_training import Adapted, LoraShape, bare, checkpoint_activations, halve
from dmd2.models.stable_diffusion.text import TextCondition
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.errors import UserError
from tests.tiny_sdxl import build_sdxl_unet, frozen

SHAPE = LoraShape(4, 2.0)


def build_sd15_unet() -> Any:
    torch.manual_seed(0)
    return frozen(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=128,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    )


def adapted(unet: Any, name: str, seed: int, size: float = 0.3) -> Adapted:
    """An adapter that has learned something."""
    made = Adapted(unet, name, SHAPE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return made


def cond(unet: Any, n: int = 2) -> TextCondition:
    generator = torch.Generator().manual_seed(9)
    context = torch.randn(n, 4, unet.config.cross_attention_dim, generator=generator)
    if unet.config.addition_embed_type is None:
        return TextCondition(context)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return TextCondition(context, torch.randn(n, width, generator=generator), torch.full((n, 6), 64.0))


def denoiser(network: Any, **options: Any) -> StableDiffusion:
    if isinstance(network, Adapted):
        return StableDiffusion(network.unet, adapter=network.active, **options)
    return StableDiffusion(network, **options)


def x(n: int = 2) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))


SIGMA = torch.tensor([2.0, 0.5])


def test_each_call_sees_its_own_adapter_alone() -> None:
    unet = build_sdxl_unet()
    alone = {name: denoiser(adapted(build_sdxl_unet(), name, n)) for n, name in enumerate(("a", "b"))}
    c = cond(unet)
    with torch.no_grad():
        plain = denoiser(unet)(x(), SIGMA, c)
        expected = {name: each(x(), SIGMA, c) for name, each in alone.items()}
        new = Adapted(unet, "new", SHAPE)
        assert torch.equal(denoiser(new)(x(), SIGMA, c), plain)
        both = {name: denoiser(adapted(unet, name, n)) for n, name in enumerate(("a", "b"))}
        teacher = denoiser(unet)
        for name in ("a", "b", "a"):
            assert torch.allclose(both[name](x(), SIGMA, c), expected[name], atol=1e-5)
            assert torch.equal(teacher(x(), SIGMA, c), plain)
        assert torch.equal(denoiser(bare(unet))(x(), SIGMA, c), plain)
        assert not any("lora" in name for name in bare(unet).state_dict())
        with pytest.raises(ZeroDivisionError), both["a"]._adapter():
            assert 1 / 0
        assert torch.equal(teacher(x(), SIGMA, c), plain)
    assert max(float((value - plain).abs().max()) for value in expected.values()) > 0.1


def test_only_the_adapter_is_a_network_s_own() -> None:
    unet = build_sdxl_unet()
    one, other = adapted(unet, "a", 0), adapted(unet, "b", 1)
    base = {name: value.clone() for name, value in unet.state_dict().items() if ".lora_" not in name}
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    kept = {name: value.clone() for name, value in other.state_dict().items()}
    copy, begun = deepcopy(one), {name: value.clone() for name, value in one.state_dict().items()}
    one.requires_grad_(True)
    other.requires_grad_(False)
    denoiser(one)(x(), SIGMA, cond(unet)).square().mean().backward()
    assert all(p.grad is not None for p in one.parameters()) and all(p.grad is None for p in other.parameters())
    optimizer.step()
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())
    now = unet.state_dict()
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert any(not torch.equal(value, begun[name]) for name, value in one.state_dict().items())
    assert all(torch.equal(value, begun[name]) for name, value in copy.state_dict().items())


@pytest.mark.parametrize("build", [build_sdxl_unet, build_sd15_unet])
def test_checkpointed_blocks_run_again_with_the_adapter_that_they_ran_with(build: Any) -> None:
    """In backward, the graph crosses calls of two adapters while neither is in use any more."""
    gradients, logits = [], []
    for checkpointed in (False, True):
        unet = build()
        student, fake = adapted(unet, "student", 0, 0.1), adapted(unet, "fake_score", 1, 0.1)
        if checkpointed:
            checkpoint_activations(unet)
        c = cond(unet)
        made = denoiser(student)(x(), SIGMA, c)
        predicted, middle = denoiser(fake).features(made + 0.1, SIGMA, c)
        with torch.no_grad():
            real = denoiser(unet)(made, SIGMA, c)
        loss = (predicted - real).square().mean() + middle.square().mean()
        with fake.active():
            loss.backward()
        logits.append(float(loss.detach()))
        gradients.append(
            [p.grad.clone() for each in (student, fake) for p in each.parameters() if p.grad is not None]
        )
        assert len(gradients[-1]) == len(list(student.parameters())) * 2
    assert logits[0] == pytest.approx(logits[1], rel=1e-6)
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-6 * float(plain.abs().max()) + 1e-9)


def test_a_frozen_network_in_bf16_carries_adapters_in_fp32() -> None:
    unet = build_sdxl_unet()
    made = adapted(unet, "a", 0, 0.1)
    c, sharp = cond(unet), denoiser(made)
    with torch.no_grad():
        expected = sharp(x(), SIGMA, c)
    halve(unet, torch.bfloat16)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert {v.dtype for k, v in unet.state_dict().items() if ".lora_" not in k} == {torch.bfloat16}
    found = denoiser(made, autocast=torch.bfloat16)(x(), SIGMA, c)
    assert found.dtype == torch.float32 and float((found - expected).detach().abs().mean()) < 0.05
    found.square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in made.parameters()
    )


@pytest.mark.parametrize(
    ("build", "kind"), [(build_sdxl_unet, StableDiffusionXLPipeline), (build_sd15_unet, StableDiffusionPipeline)]
)
def test_diffusers_and_the_own_reader_make_of_the_file_what_was_trained(
    build: Any, kind: Any, tmp_path: Path, text_models: tuple[Any, Any, Any]
) -> None:
    trained = adapted(build(), "student", 3)
    c = cond(trained.unet)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    trained.save(path, {"recipe": "{}"})
    with torch.no_grad():
        expected = denoiser(trained)(x(), SIGMA, c)
        plain = denoiser(build())(x(), SIGMA, c)
        fused, lora = build(), read_lora(path)
        Fused({"unet": fused}).use([(lora, 1.0)])
        own = denoiser(fused)(x(), SIGMA, c)

        tokenizer, first, second = text_models
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4)
        parts = {"vae": vae, "text_encoder": first, "tokenizer": tokenizer, "unet": build(), "scheduler": None}
        if kind is StableDiffusionXLPipeline:
            parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = kind(**parts)
        pipeline.load_lora_weights(tmp_path)
        theirs = denoiser(pipeline.unet)(x(), SIGMA, c)
    scale = float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 0.05 * scale
    assert float((own - expected).abs().max()) < 1e-5 * scale
    assert float((theirs - expected).abs().max()) < 1e-5 * scale


A1111 = (
    r"lora_unet_(down_blocks_\d+|up_blocks_\d+|mid_block)_(attentions|resnets)_\d+_(proj_in|proj_out|time_emb_proj"
    r"|conv1|conv2|conv_shortcut|transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)))"
    r"\.(lora_(down|up)\.weight|alpha)"
)


@pytest.mark.parametrize("build", [build_sdxl_unet, build_sd15_unet])
def test_names_are_those_that_a1111_and_comfyui_map(build: Any, tmp_path: Path) -> None:
    """lora_unet_ and diffusers' name of the layer, in parts of the UNet whose places are alike in SD 1.5 and SDXL."""
    unet = build()
    layers = {name.replace(".", "_") for name, _ in unet.named_modules()}
    adapted(unet, "a", 0).save(tmp_path / "a.safetensors", {})
    names = list(load_file(tmp_path / "a.safetensors"))
    assert len(names) % 3 == 0 and all(re.fullmatch(A1111, name) for name in names)
    assert {name.partition(".")[0].removeprefix("lora_unet_") for name in names} <= layers


def test_what_has_no_adapter_needs_no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    unet = build_sdxl_unet()
    assert bare(unet).state_dict().keys() == unet.state_dict().keys()
    with pytest.raises(UserError, match="needs PEFT"):
        Adapted(unet, "student", LoraShape(2, 2.0))


def test_another_shape_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    trained = adapted(build_sdxl_unet(), "a", 0)
    trained.save(path, {})
    again = Adapted(build_sdxl_unet(), "a", SHAPE)
    again.load(path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())
    for unet, shape in (
        (build_sdxl_unet(), LoraShape(8, 2)),
        (build_sdxl_unet(), LoraShape(4, 4)),
        (build_sd15_unet(), SHAPE),
    ):
        with pytest.raises(
            UserError, match=r"a\.safetensors: a LoRA of other layers, another rank or alpha"
        ) as error:
            Adapted(unet, "a", shape).load(path)
        assert "\n" not in str(error.value)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        again.load(path)
