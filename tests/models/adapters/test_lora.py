"""LoRAs: in every naming the same as in diffusers' own pipeline, and out again without a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from dmd2.diffusion.sampling import conditioned, sample_few_step
from dmd2.models.adapters.lora import Fused, Lora, read_lora
from dmd2.models.stable_diffusion.text import TextEncoder
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.compiled import fuse_projections, quantize_linears
from dmd2.runtime.errors import UserError
from tests.tiny_sdxl import PROMPTS, SIDE, STUDENTS, build_sdxl_unet, build_vae, noise, noise_for_diffusers, pipeline

Texts = tuple[Any, Any, Any]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALPHA, RANK = 2.0, 4


@pytest.fixture(scope="module")
def unet() -> Any:
    return build_sdxl_unet()


def layers(network: nn.Module, *endings: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(endings):
            yield name, module


def factors(module: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Down and up, of about the weight's own size."""
    weight = module.weight
    kernel = weight.shape[2:]
    down = torch.randn(RANK, weight.shape[1], *kernel, generator=generator) * 0.1
    up = torch.randn(weight.shape[0], RANK, *(1 for _ in kernel), generator=generator) * 0.1
    return down, up


def peft_style(network: nn.Module, prefix: str, endings: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, module in layers(network, *endings):
        down, up = factors(module, generator)
        state |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    return state


def kohya_style(network: nn.Module, prefix: str, endings: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, module in layers(network, *endings):
        down, up = factors(module, generator)
        key = f"{prefix}_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
    return state


def ldm_style(network: Any, seed: int) -> dict[str, Tensor]:
    """As kohya's trainer names SDXL's layers: after Stability's own code. The table is that of two layers a block."""
    table = {
        "down_blocks_0_resnets_0_conv1": "input_blocks_1_0_in_layers_2",
        "down_blocks_0_resnets_1_conv2": "input_blocks_2_0_out_layers_3",
        "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op",
        "down_blocks_2_resnets_0_conv_shortcut": "input_blocks_7_0_skip_connection",
        "down_blocks_1_resnets_1_time_emb_proj": "input_blocks_5_0_emb_layers_1",
        "down_blocks_1_attentions_0_proj_in": "input_blocks_4_1_proj_in",
        "down_blocks_2_attentions_1_transformer_blocks_0_attn1_to_q": (
            "input_blocks_8_1_transformer_blocks_0_attn1_to_q"
        ),
        "mid_block_resnets_0_conv1": "middle_block_0_in_layers_2",
        "mid_block_attentions_0_transformer_blocks_0_ff_net_2": "middle_block_1_transformer_blocks_0_ff_net_2",
        "mid_block_resnets_1_conv2": "middle_block_2_out_layers_3",
        "up_blocks_0_attentions_2_transformer_blocks_0_attn2_to_k": (
            "output_blocks_2_1_transformer_blocks_0_attn2_to_k"
        ),
        "up_blocks_0_upsamplers_0_conv": "output_blocks_2_2_conv",
        "up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0": (
            "output_blocks_3_1_transformer_blocks_0_attn1_to_out_0"
        ),
        "up_blocks_2_resnets_2_conv1": "output_blocks_8_0_in_layers_2",
    }
    modules = {name.replace(".", "_"): module for name, module in network.named_modules()}
    generator, state = torch.Generator().manual_seed(seed), {}
    for ours, theirs in table.items():
        down, up = factors(modules[ours], generator)
        key = f"lora_unet_{theirs}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
    return state


def old_style(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """diffusers' first naming: of attention processors."""
    state = {}
    for key, value in peft_style(network, "unet", ATTENTION, seed).items():
        stem, _, which = key.removesuffix(".weight").rpartition(".lora_")
        stem, _, layer = stem.removesuffix(".0").rpartition(".")
        state[f"{stem}.processor.{layer}_lora.{'down' if which == 'A' else 'up'}.weight"] = value
    return state


def with_text(network: nn.Module, text_models: Texts, seed: int) -> dict[str, Tensor]:
    state = kohya_style(network, "lora_unet", ATTENTION, seed)
    for number, encoder in enumerate(text_models[1:], 1):
        body = encoder.text_model if number == 2 else encoder  # transformers' two classes differ in a prefix
        endings = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
        state |= kohya_style(body, f"lora_te{number}_text_model", endings, seed + number)
    return state


def saved(path: Path, state: dict[str, Tensor], **metadata: str) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata=metadata or None)
    return path


def generate(unet: Any, text_models: Texts, loras: list[tuple[Lora, float]]) -> Tensor:
    tokenizer, first, second = text_models
    unets, texts = Fused({"unet": unet}), Fused({"text_encoder": first, "text_encoder_2": second})
    try:
        unets.use(loras)
        texts.use(loras)
        denoiser = StableDiffusion(unet)
        cond = TextEncoder([tokenizer, tokenizer], [first, second])(PROMPTS, (SIDE, SIDE))
        sigmas = [float(denoiser.sigmas[t]) for t in STUDENTS[4]]
        return sample_few_step(conditioned(denoiser, cond), denoiser.scale_initial_noise, noise(4), sigmas)
    finally:
        unets.use([])
        texts.use([])


def draw_with_diffusers(unet: Any, text_models: Texts, files: list[tuple[Path, float]]) -> Tensor:
    tokenizer, *encoders = text_models
    copies = (tokenizer, *(deepcopy(encoder) for encoder in encoders))
    pipe = pipeline(StableDiffusionXLPipeline, copies, deepcopy(unet), build_vae())
    names = [f"a{i}" for i in range(len(files))]
    for name, (file, _) in zip(names, files, strict=True):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, local_files_only=True)
    if names:
        pipe.set_adapters(names, [scale for _, scale in files])
    drawn = noise(4)
    settings: dict[str, Any] = {"width": SIDE, "height": SIDE, "guidance_scale": 1.0, "output_type": "latent"}
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        return pipe(PROMPTS, latents=drawn[0].clone(), timesteps=STUDENTS[4], **settings).images


NAMINGS = {
    "peft": lambda unet, texts: peft_style(unet, "unet", (*ATTENTION, "proj_in", "ff.net.2", "conv1"), 1),
    "old": lambda unet, texts: old_style(unet, 2),
    "kohya": lambda unet, texts: kohya_style(unet, "lora_unet", (*ATTENTION, "proj_out", "ff.net.0.proj"), 3),
    "ldm": lambda unet, texts: ldm_style(unet, 4),
    "text": lambda unet, texts: with_text(unet, texts, 5),
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_a_lora_is_that_of_diffusers(unet: Any, text_models: Texts, tmp_path: Path, naming: str) -> None:
    file = saved(tmp_path / "some.safetensors", NAMINGS[naming](unet, text_models))
    theirs = draw_with_diffusers(unet, text_models, [(file, 0.7)])
    lora = read_lora(file)
    ours = generate(unet, text_models, [(lora, 0.7)])
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((ours - generate(unet, text_models, [])).abs().max()) > 0.05  # it does something
    assert lora.changes_text == (naming == "text")


@torch.no_grad()
def test_several_at_once_are_those_of_diffusers(unet: Any, text_models: Texts, tmp_path: Path) -> None:
    one = saved(tmp_path / "one.safetensors", NAMINGS["peft"](unet, text_models))
    two = saved(tmp_path / "two.safetensors", NAMINGS["kohya"](unet, text_models))
    theirs = draw_with_diffusers(unet, text_models, [(one, 0.5), (two, 0.9)])
    ours = generate(unet, text_models, [(read_lora(one), 0.5), (read_lora(two), 0.9)])
    assert float((ours - theirs).abs().max()) < 1e-4


@torch.no_grad()
def test_pefts_metadata_tell_the_alphas(unet: Any, text_models: Texts, tmp_path: Path) -> None:
    settings = {
        "unet.r": RANK,
        "unet.lora_alpha": ALPHA,
        "unet.target_modules": list(ATTENTION),
        "unet.alpha_pattern": {},
        "unet.rank_pattern": {},
    }
    state = peft_style(unet, "unet", ATTENTION, 6)
    file = saved(tmp_path / "some.safetensors", state, format="pt", lora_adapter_metadata=json.dumps(settings))
    theirs = draw_with_diffusers(unet, text_models, [(file, 1.0)])
    assert {f.alpha for f in read_lora(file).layers.values()} == {ALPHA}
    assert float((generate(unet, text_models, [(read_lora(file), 1.0)]) - theirs).abs().max()) < 1e-4
    for wrong in ('{"unet.r": 4, "unet.use_dora": true}', '{"unet.r": 5}', "{", '{"unet.lora_alpha": "x"}'):
        other = saved(tmp_path / "wrong.safetensors", state, format="pt", lora_adapter_metadata=wrong)
        with pytest.raises(UserError, match=r"LoRA wrong\.safetensors: "):
            read_lora(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_weights_come_back_to_the_bit_however_often_loras_change(
    text_models: Texts, tmp_path: Path, dtype: torch.dtype
) -> None:
    unet = build_sdxl_unet().to(dtype)
    before = deepcopy(unet.state_dict())
    loras = [
        read_lora(saved(tmp_path / f"{naming}.safetensors", NAMINGS[naming](unet, text_models)))
        for naming in ("peft", "kohya", "ldm")
    ]
    fused = Fused({"unet": unet})
    assert not fused

    def weights(use: list[tuple[Lora, float]]) -> dict[str, Tensor]:
        fused.use(use)
        assert bool(fused) == bool(use)
        return deepcopy(unet.state_dict())

    alone = weights([(loras[0], 0.8)])
    addresses = {name: value.data_ptr() for name, value in unet.state_dict().items()}
    for n in range(6):
        weights([(loras[n % 3], 0.1 * n), (loras[(n + 1) % 3], -1.0)])
    again = weights([(loras[0], 0.8)])
    assert all(torch.equal(alone[name], again[name]) for name in before)
    assert any(not torch.equal(alone[name], before[name]) for name in before)
    after = weights([])
    assert all(torch.equal(after[name], before[name]) for name in before)
    # In place: what was compiled or captured for these weights goes on being right.
    assert addresses == {name: value.data_ptr() for name, value in unet.state_dict().items()}


@torch.no_grad()
def test_a_lora_goes_to_the_device_as_its_file_has_it(
    unet: Any, text_models: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half the bytes, from pages that are copied while the host goes on: it becomes fp32 there."""
    network = deepcopy(unet)
    lora = read_lora(saved(tmp_path / "half.safetensors", NAMINGS["peft"](unet, text_models)))
    for layer in lora.layers.values():
        layer.tensors = {name: value.half() for name, value in layer.tensors.items()}
    sent: list[Tensor] = []

    def upload(tensor: Tensor, device: torch.device) -> Tensor:
        sent.append(tensor)
        return tensor.to(device)

    monkeypatch.setattr("dmd2.models.adapters.lora_factors.upload", upload)
    Fused({"unet": network}).use([(lora, 1.0)])
    count = sum(len(layer.tensors) for (part, _), layer in lora.layers.items() if part == "unet")
    assert len(sent) == count > 0 and {value.dtype for value in sent} == {torch.float16}


@torch.no_grad()
def test_an_error_half_way_leaves_the_original_weights(
    unet: Any, text_models: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmd2.models.adapters.lora import Factors

    before = deepcopy(unet.state_dict())
    lora = read_lora(saved(tmp_path / "some.safetensors", NAMINGS["peft"](unet, text_models)))
    fused, calls, change = Fused({"unet": unet}), [], Factors.change

    def fails(self: Factors, weight: Tensor, scale: float) -> Tensor:
        calls.append(weight)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("too much")
        return change(self, weight, scale)

    monkeypatch.setattr(Factors, "change", fails)
    with pytest.raises(torch.OutOfMemoryError):
        fused.use([(lora, 1.0)])
    assert not fused and all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    fused.use([(lora, 1.0)])  # and the next time it works
    assert fused
    fused.use([])
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@torch.no_grad()
def test_fused_projections_follow(text_models: Texts, tmp_path: Path) -> None:
    unet = build_sdxl_unet()
    lora = read_lora(saved(tmp_path / "some.safetensors", NAMINGS["peft"](unet, text_models)))
    expected, plain = generate(unet, text_models, [(lora, 1.0)]), generate(unet, text_models, [])
    unet.set_default_attn_processor()
    fuse_projections(unet)
    assert torch.allclose(generate(unet, text_models, [(lora, 1.0)]), expected, atol=1e-4)
    assert torch.allclose(generate(unet, text_models, []), plain, atol=1e-4)


@torch.no_grad()
def test_8_bit_layers_are_rounded_from_the_merged_weights(text_models: Texts, tmp_path: Path) -> None:
    """Merge, then quantise: as if the LoRA had been there first."""
    unet, merged = build_sdxl_unet(), build_sdxl_unet()
    lora = read_lora(saved(tmp_path / "some.safetensors", NAMINGS["peft"](unet, text_models)))
    Fused({"unet": merged}).use([(lora, 0.7)])
    for network in (unet, merged):
        fuse_projections(network)
        assert quantize_linears(network)
    original, fused = deepcopy(unet.state_dict()), Fused({"unet": unet})
    addresses = {name: value.data_ptr() for name, value in unet.state_dict().items()}

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name].float(), b[name].float()) for name in a)

    fused.use([(lora, 0.3)])
    fused.use([(lora, 0.7)])
    assert same(unet.state_dict(), merged.state_dict()) and not same(unet.state_dict(), original)
    fused.use([])
    assert same(unet.state_dict(), original)
    assert addresses == {name: value.data_ptr() for name, value in unet.state_dict().items()}


def test_loras_for_another_model_are_refused_by_name(unet: Any, tmp_path: Path) -> None:
    def refused(state: dict[str, Tensor]) -> str:
        file = saved(tmp_path / "other.safetensors", state)
        with pytest.raises(UserError) as error:
            Fused({"unet": unet}).use([(read_lora(file), 1.0)])
        assert str(error.value).startswith("LoRA other.safetensors: made for another model: ")
        return str(error.value)

    whole = kohya_style(unet, "lora_unet", ("attn1.to_q",), 0)
    assert "this one's unet has no layer down_blocks_9_x" in refused(
        whole
        | {"lora_unet_down_blocks_9_x.lora_down.weight": torch.zeros(4, 4)}
        | {"lora_unet_down_blocks_9_x.lora_up.weight": torch.zeros(4, 4)}
    )
    name = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    wide = {f"lora_unet_{name}.lora_down.weight": torch.zeros(4, 33)}
    assert f"{name} is [32, 32] here, the LoRA's factors down [4, 33], up [32, 4]" in refused(whole | wide)
    five = {f"lora_unet_{name}.lora_down.weight": torch.zeros(5, 32)}
    with pytest.raises(UserError, match=rf"unet {name}: its factors do not match: down \[5, 32\], up \[32, 4\]"):
        read_lora(saved(tmp_path / "other.safetensors", whole | five))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_x.dora_scale", "unet x: expected a pair of matrices"),
        ("lora_unet_x.hada_w1_a", "unet x: is LoHa without hada_w1_b, hada_w2_a, hada_w2_b"),
        ("lora_unet_x.lokr_w1", "unet x: is LoKr without lokr_w2"),
        ("lora_unet_x.oft_blocks", "is OFT; expected LoRA, LoCon, DoRA"),
        ("unet.x.weight", r"is no name of a LoRA for Stable Diffusion \(whole weights, as of modules_to_save"),
        ("base_model.model.conv_in.bias", r"is no name of a LoRA for Stable Diffusion \(whole weights"),
        ("base_model.model.conv_in.modules_to_save.weight", r"is a whole weight \(modules_to_save\)"),
        ("transformer.x.lora_A.weight", "is no name of a LoRA for Stable Diffusion"),
        ("conv_in.weight", "is no name of a LoRA for Stable Diffusion"),
        ("lora_unet_x.lora_down.weight", "unet x: expected a pair of matrices"),
        ("lora_unet_x.alpha", "unet x: expected a pair of matrices"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, key: str, message: str) -> None:
    value = torch.tensor(1.0) if key.endswith("alpha") else torch.zeros(4, 4)
    with pytest.raises(UserError, match=message):
        read_lora(saved(tmp_path / "x.safetensors", {key: value}))


def test_only_safetensors_are_read(unet: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save(kohya_style(unet, "lora_unet", ATTENTION, 0), path)  # a pickle by any other name
    for content in (path.read_bytes(), b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"LoRA mine: cannot be read as safetensors .*; no other format is read"):
            read_lora(path, "mine")
    with pytest.raises(UserError, match="cannot be read"):
        read_lora(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds nothing"):
        read_lora(saved(tmp_path / "empty.safetensors", {}))
