"""LoRAs of every kind, naming and strength change weights as PEFT and diffusers change them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from dmd2.models.adapters.lora import Fused, read_lora
from dmd2.runtime.errors import UserError
from tests.models.adapters.test_lora import RANK, factors, saved
from tests.tiny_sdxl import build_sdxl_unet, build_vae, pipeline

LINEARS = r"(mid_block|up_blocks\.0)\..*\.(to_q|to_out\.0|proj_in)"
BOTH = r"(mid_block|up_blocks\.0)\..*\.(to_q|to_k|to_out\.0|conv1|conv_shortcut|ff\.net\.2)"


@pytest.fixture(scope="module")
def unet() -> Any:
    return build_sdxl_unet()


def saved_by_peft(network: nn.Module, config: Any, folder: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """Writes an adapter with random factors; returns the network's weights after PEFT read and merged it."""
    model = peft.get_peft_model(deepcopy(network), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
                drawn = torch.randn(value.shape, generator=generator) * 0.1
                value.copy_(value * (1 + drawn) if "magnitude" in name else drawn)
    model.save_pretrained(folder)
    if getattr(config, "alpha_pattern", None):  # the file has its entries in another order
        model = peft.PeftModel.from_pretrained(deepcopy(network), folder)
    if scale != 1:
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.set_scale("default", scale)
    return model.merge_and_unload().state_dict()


def changed(network: nn.Module, path: Path, scale: float = 1.0, part: str = "unet") -> dict[str, Tensor]:
    copy = deepcopy(network)
    Fused({part: copy}).use([(read_lora(path), scale)])
    return copy.state_dict()


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Up to fp32's rounding, and something changed."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(not torch.equal(ours[name], before[name]) for name in ours) > 2


CONFIGS = {
    "a quarter": lambda: peft.LoraConfig(r=8, lora_alpha=2, target_modules=BOTH),
    "double": lambda: peft.LoraConfig(r=2, lora_alpha=4, target_modules=BOTH),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=BOTH),
    "fan in": lambda: peft.LoraConfig(r=4, lora_alpha=3, fan_in_fan_out=True, target_modules=LINEARS),
    "bias": lambda: peft.LoraConfig(r=4, lora_alpha=3, lora_bias=True, target_modules=["proj_in", "ff.net.2"]),
    "gaussian": lambda: peft.LoraConfig(r=4, lora_alpha=3, init_lora_weights="gaussian", target_modules=LINEARS),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=3,
        rank_pattern={"attn1.to_q": 2, r"up_blocks\.\d+\..*conv1": 6, "^mid_block.attentions.0.proj_in": 3},
        alpha_pattern={
            "to_q": 1,
            "attn1.to_q": 100,
            ".*conv[12]": 5,
            "^conv1": 100,
            "o_k": 100,
            "up_blocks.*to_k": 7,
        },
        target_modules=BOTH,
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=BOTH),
    "dora and rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=LINEARS
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=3, rank_pattern={"to_q": 2}, target_modules=BOTH),
    "loha tucker": lambda: peft.LoHaConfig(r=4, alpha=3, use_effective_conv2d=True, target_modules=BOTH),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, alpha_pattern={"to_q": 1}, target_modules=BOTH),
    "lokr both": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=BOTH),
    "lokr tucker": lambda: peft.LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=BOTH),
    "lokr whole": lambda: peft.LoKrConfig(r=32, alpha=8, decompose_factor=4, target_modules=BOTH),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_changes_weights_as_peft_does(unet: Any, tmp_path: Path, name: str) -> None:
    scale = 0.6 if "dora" in name or "rslora" in name else 1.0
    expected = saved_by_peft(unet, CONFIGS[name](), tmp_path, scale)
    ours = changed(unet, tmp_path / "adapter_model.safetensors", scale)
    assert_same(ours, expected, unet.state_dict())


def test_a_text_encoders_adapter_knows_which_it_is_of(text_models: Any, tmp_path: Path) -> None:
    for number, (part, encoder) in enumerate(zip(("text_encoder", "text_encoder_2"), text_models[1:], strict=True)):
        config = peft.LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "fc1"])
        expected = saved_by_peft(encoder, config, tmp_path / str(number))
        lora = read_lora(path := tmp_path / str(number) / "adapter_model.safetensors")
        assert {of for of, _ in lora.layers} == {part}
        assert_same(changed(encoder, path, part=part), expected, encoder.state_dict())


Networks = dict[str, Any]
"""unet, text_encoder and text_encoder_2"""


@pytest.fixture(scope="module")
def networks(unet: Any, text_models: Any) -> Networks:
    return {"unet": unet, "text_encoder": text_models[1], "text_encoder_2": text_models[2]}


def all_changed(networks: Networks, path: Path, scale: float = 1.0) -> dict[str, Tensor]:
    lora = read_lora(path)
    copies = {part: deepcopy(network) for part, network in networks.items() if part in {of for of, _ in lora.layers}}
    Fused(copies).use([(lora, scale)])
    return weights_of(networks | copies)


def weights_of(networks: Networks) -> dict[str, Tensor]:
    return {f"{part}.{key}": value for part, net in networks.items() for key, value in net.state_dict().items()}


def fused_by_diffusers(networks: Networks, tokenizer: Any, path: Path) -> dict[str, Tensor]:
    copies = {part: deepcopy(network) for part, network in networks.items()}
    unet, *encoders = copies.values()
    pipe = pipeline(StableDiffusionXLPipeline, (tokenizer, *encoders), unet, build_vae())
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return weights_of(copies)


UNET_LAYERS = {  # and Stability's names
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "middle_block.1.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (
        "middle_block.1.transformer_blocks.0.attn2.to_out.0"
    ),
    "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj": (
        "output_blocks.2.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "conv_out": "out.2",
}
TEXT_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj", "encoder.layers.0.mlp.fc1")
Pairs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def pairs(networks: Networks) -> dict[str, Pairs]:
    """part → layer → down and up."""
    generator = torch.Generator().manual_seed(3)
    wanted = {"unet": list(UNET_LAYERS), "text_encoder": list(TEXT_LAYERS), "text_encoder_2": list(TEXT_LAYERS)}
    return {
        part: {
            name: factors(
                networks[part].get_submodule(("text_model." if part == "text_encoder_2" else "") + name), generator
            )
            for name in names
        }
        for part, names in wanted.items()
    }


def spelled(pairs: dict[str, Pairs], part: str, form: str, rename: Any = str) -> dict[str, Tensor]:
    """`form` has {layer}, {flat} (with _ for dots) and {which}, which is "down|up" or "A|B"."""
    form, _, which = form.partition(" ")
    state = {}
    for layer, pair in pairs[part].items():
        name = rename(layer)
        for word, value in zip(which.split("|"), pair, strict=True):
            state[form.format(layer=name, flat=name.replace(".", "_"), which=word)] = value.clone()
    return state


def stability(layer: str) -> str:
    return UNET_LAYERS[layer]


def old(layer: str) -> str:
    """diffusers' first names, which only attention has: the rest in those that came after."""
    for name in ("q", "k", "v", "out"):
        layer = layer.replace(f".self_attn.{name}_proj", f".self_attn.to_{name}")
    return layer.replace(".to_q", ".processor.to_q").replace("to_out.0", "processor.to_out")


SPELLINGS = {
    "kohya": ("unet", "lora_unet_{flat}.lora_{which}.weight down|up", str),
    "kohya with Stability's names": ("unet", "lora_unet_{flat}.lora_{which}.weight down|up", stability),
    "kohya with A and B": ("unet", "lora_unet_{flat}.lora_{which}.weight A|B", str),
    "lycoris": ("unet", "lycoris_{flat}.lora_{which}.weight down|up", str),
    "ComfyUI": ("unet", "diffusion_model.{layer}.lora_{which}.weight A|B", stability),
    "ComfyUI with diffusers' names": ("unet", "diffusion_model.{layer}.lora_{which}.weight down|up", str),
    "of a checkpoint": ("unet", "model.diffusion_model.{layer}.lora_{which}.weight down|up", stability),
    "unprefixed": ("unet", "{layer}.lora_{which}.weight A|B", str),
    "unprefixed, Stability's": ("unet", "{layer}.lora_{which}.weight A|B", stability),
    "PEFT": ("unet", "base_model.model.{layer}.lora_{which}.weight A|B", str),
    "PEFT within unet": ("unet", "base_model.model.unet.{layer}.lora_{which}.weight A|B", str),
    "unet within PEFT": ("unet", "unet.base_model.model.{layer}.lora_{which}.weight A|B", str),
    "an adapter's name": ("unet", "unet.{layer}.lora_{which}.default_0.weight A|B", str),
    "unprefixed, an adapter's name": ("unet", "{layer}.lora_{which}.my-style.weight A|B", str),
    "diffusers": ("unet", "unet.{layer}.lora_{which}.weight A|B", str),
    "diffusers before": ("unet", "unet.{layer}.lora.{which}.weight down|up", str),
    "text, kohya": ("text_encoder", "lora_te1_text_model_{flat}.lora_{which}.weight down|up", str),
    "text, kohya 1.5": ("text_encoder", "lora_te_text_model_{flat}.lora_{which}.weight down|up", str),
    "text, flat": ("text_encoder", "lora_te1_{flat}.lora_{which}.weight down|up", str),
    "text, diffusers": ("text_encoder", "text_encoder.text_model.{layer}.lora_{which}.weight A|B", str),
    "text, without text_model": ("text_encoder", "text_encoder.{layer}.lora_{which}.weight A|B", str),
    "text, linear": ("text_encoder", "text_encoder.text_model.{layer}.lora_linear_layer.{which}.weight down|up", str),
    "text, ComfyUI": (
        "text_encoder",
        "text_encoders.clip_l.transformer.text_model.{layer}.lora_{which}.weight A|B",
        str,
    ),
    "text, unprefixed": ("text_encoder", "text_model.{layer}.lora_{which}.weight A|B", str),
    "text 2, kohya": ("text_encoder_2", "lora_te2_text_model_{flat}.lora_{which}.weight down|up", str),
    "text 2, diffusers": ("text_encoder_2", "text_encoder_2.text_model.{layer}.lora_{which}.weight A|B", str),
    "text 2, without text_model": ("text_encoder_2", "text_encoder_2.{layer}.lora_{which}.weight A|B", str),
    "text 2, linear": (
        "text_encoder_2",
        "text_encoder_2.text_model.{layer}.lora_linear_layer.{which}.weight down|up",
        str,
    ),
    "text 2, ComfyUI": (
        "text_encoder_2",
        "text_encoders.clip_g.transformer.text_model.{layer}.lora_{which}.weight down|up",
        str,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_means_the_same_layers(
    networks: Networks, pairs: dict[str, Pairs], tmp_path: Path, name: str
) -> None:
    part, form, rename = SPELLINGS[name]
    lora = read_lora(saved(tmp_path / "x.safetensors", spelled(pairs, part, form, rename)))
    assert {of for of, _ in lora.layers} == {part}
    fused = Fused({part: networks[part]})
    fused.check(lora)
    modules = {id(module): key for key, module in networks[part].named_modules()}
    found = {modules[id(fused._modules[key])]: value for key, value in lora.layers.items()}
    assert {key.removeprefix("text_model.") for key in found} == pairs[part].keys()
    for key, value in found.items():
        down, up = pairs[part][key.removeprefix("text_model.")]
        assert torch.equal(value.tensors["down"], down) and torch.equal(value.tensors["up"], up)


def test_diffusers_first_names_of_attention_layers_are_known(
    networks: Networks, pairs: dict[str, Pairs], text_models: Any, tmp_path: Path
) -> None:
    """Of processors; in text encoders, to_q for q_proj. Held against diffusers, which still reads them."""
    of_attention = {
        part: {layer: pair for layer, pair in of.items() if "attn" in layer} for part, of in pairs.items()
    }
    state: dict[str, Tensor] = {}
    for part, prefix in (("unet", ""), ("text_encoder", "text_model."), ("text_encoder_2", "text_model.")):
        state |= spelled(of_attention, part, f"{part}.{prefix}{{layer}}_lora.{{which}}.weight down|up", old)
    path = saved(tmp_path / "old.safetensors", state)
    assert len(state) == 2 * 6
    expected = fused_by_diffusers(networks, text_models[0], path)
    assert_same(all_changed(networks, path), expected, weights_of(networks))


SETTINGS = {
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"alpha_pattern": {"to_q": 1, "conv_in": 9, r".*\.to_out\.\d": 2}, "lora_alpha": 5},
    "default alpha": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_in_diffusers_metadata(
    networks: Networks, pairs: dict[str, Pairs], text_models: Any, tmp_path: Path, name: str
) -> None:
    settings = {"r": RANK, **SETTINGS[name]}
    state = spelled(pairs, "unet", "unet.{layer}.lora_{which}.weight A|B")
    told = {f"unet.{key}": value for key, value in settings.items()}
    told["unet.target_modules"] = list(UNET_LAYERS)
    path = saved(tmp_path / "x.safetensors", state, format="pt", lora_adapter_metadata=json.dumps(told))
    expected = fused_by_diffusers(networks, text_models[0], path)
    assert_same(all_changed(networks, path), expected, weights_of(networks))


def scalings(path: Path) -> set[float]:
    return {factors.scaling for factors in read_lora(path).layers.values()}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"lora_alpha": "2"}, {0.5}),
        ({"unet.lora_alpha": "8", "lora_alpha": "2"}, {2.0}),
        ({"ss_network_alpha": "1.0", "ss_network_dim": "4"}, {0.25}),
        ({"ss_network_alpha": "1", "ss_network_args": '{"conv_dim": "4", "conv_alpha": "8"}'}, {0.25, 2.0}),
        ({"lora_alpha": "2", "use_rslora": "True"}, {1.0}),
        ({"ss_network_alpha": "None"}, {1.0}),
        ({"text_encoder.lora_alpha": "2", "modelspec.title": "x"}, {1.0}),
    ],
)
def test_plain_metadata_say_the_strength(
    pairs: dict[str, Pairs], tmp_path: Path, metadata: dict[str, str], expected: set[float]
) -> None:
    state = spelled(pairs, "unet", "lora_unet_{flat}.lora_{which}.weight down|up")
    assert scalings(saved(tmp_path / "x.safetensors", state, **metadata)) == expected
    alphas = {
        key.replace("lora_down.weight", "alpha"): torch.tensor(3.0)
        for key in state
        if key.endswith("lora_down.weight")
    }
    assert scalings(saved(tmp_path / "x.safetensors", state | alphas, **metadata)) == {0.75}  # tensors come first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "OFT"}, "peft_type OFT; expected LORA, LOHA or LOKR"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4: its factors belong to a network"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora: its factors belong to a network"),
        ({"use_dora": True}, "use_dora, but .* has no magnitudes"),
        ({"r": 3}, "says rank 3 of .*, which has 4: another file's"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha: Input should be a finite number"),
        ({"lora_alpha": [1]}, "lora_alpha: Input should be a valid number"),
        ({"layer_replication": [[0, 4]]}, "layer_replication: not supported"),
        ({"alpha_pattern": {"(a+)+b": 2}}, r"alpha_pattern: pattern \(a\+\)\+b: too complex"),
        ({"alpha_pattern": {"a?" * 30 + "a" * 30: 2}}, "too complex"),
        ({"rank_pattern": {"(to_q": 2}}, r"rank_pattern: pattern \(to_q: is no regular expression"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    pairs: dict[str, Pairs], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = saved(
        tmp_path / "adapter_model.safetensors",
        spelled(pairs, "unet", "base_model.model.{layer}.lora_{which}.weight A|B"),
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, **settings}))
    with pytest.raises(UserError, match=rf"^LoRA adapter_model\.safetensors: adapter_config\.json: .*{message}"):
        read_lora(path)


def test_another_files_settings_are_left_alone_and_none_is_said(
    pairs: dict[str, Pairs], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    assert scalings(
        saved(tmp_path / "x.safetensors", spelled(pairs, "unet", "unet.{layer}.lora_{which}.weight A|B"))
    ) == {1}
    assert not caplog.records
    pefts = saved(tmp_path / "y.safetensors", spelled(pairs, "unet", "{layer}.lora_{which}.weight A|B"))
    with pytest.raises(UserError, match=r"adapter_config\.json: no JSON"):
        read_lora(pefts)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    strong = read_lora(pefts)
    assert {factors.scaling for factors in strong.layers.values()} == {0.5}
    (tmp_path / "adapter_config.json").unlink()
    weak = read_lora(pefts)
    assert (
        "y.safetensors: no adapter_config.json and no alpha: its strength is taken to be alpha = rank" in caplog.text
    )
    assert strong.sha256 != weak.sha256  # they are not the same LoRA


def test_extras_are_skipped_and_named(
    pairs: dict[str, Pairs], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = spelled(pairs, "unet", "lora_unet_{flat}.lora_{which}.weight down|up")
    adapters = {"bundle_emb.mine.string_to_param.*": torch.zeros(2, 4), "emb_params": torch.zeros(2, 4)}
    lora = read_lora(saved(tmp_path / "x.safetensors", state | adapters))
    assert len(lora.layers) == len(UNET_LAYERS)
    assert "LoRA x.safetensors: 2 skipped: bundle_emb.mine.string_to_param.*, emb_params" in caplog.text
    with pytest.raises(UserError, match=r"holds nothing: bundle_emb\.mine is no name of a LoRA"):
        read_lora(saved(tmp_path / "x.safetensors", {"bundle_emb.mine": torch.zeros(2)}))
    both = spelled(pairs, "unet", "lora_unet_{flat}.lora_{which}.weight down|up", stability) | state
    assert len(read_lora(saved(tmp_path / "x.safetensors", both)).layers) == len(UNET_LAYERS)


def test_a_layer_twice_is_refused(networks: Networks, pairs: dict[str, Pairs], tmp_path: Path) -> None:
    forms = ("unet.{layer}.lora_{which}.weight A|B", "unet.{layer}.lora_{which}.other.weight A|B")
    state = spelled(pairs, "unet", forms[0]) | spelled(pairs, "unet", forms[1])
    with pytest.raises(UserError, match="is there twice, by two names or adapters"):
        read_lora(saved(tmp_path / "x.safetensors", state))
    forms = ("lora_te1_text_model_{flat}.lora_{which}.weight down|up", "lora_te1_{flat}.lora_{which}.weight down|up")
    state = spelled(pairs, "text_encoder", forms[0]) | spelled(pairs, "text_encoder", forms[1])
    with pytest.raises(UserError, match="is the same layer as"):
        Fused(networks).check(read_lora(saved(tmp_path / "x.safetensors", state)))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def test_the_kinds_that_only_lycoris_writes(unet: Any, tmp_path: Path) -> None:
    """By the formulas, written out: what PEFT knows not."""
    q, conv, norm = (
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        "mid_block_resnets_0_conv1",
        "conv_norm_out",
    )
    modules = {name.replace(".", "_"): module for name, module in unet.named_modules()}

    def change(layer: str, field: str = "weight", **tensors: Tensor) -> Tensor:
        copy = deepcopy(unet)
        path = saved(
            tmp_path / "x.safetensors", {f"lora_unet_{layer}.{k.replace('__', '.')}": v for k, v in tensors.items()}
        )
        Fused({"unet": copy}).use([(read_lora(path), 0.5)])
        after = {name.replace(".", "_"): module for name, module in copy.named_modules()}[layer]
        return getattr(after, field) - getattr(modules[layer], field)

    def close(one: Tensor, two: Tensor) -> bool:
        return torch.allclose(one, two, atol=1e-6, rtol=1e-4)

    alpha, weight, kernel = torch.tensor(2.0), modules[q].weight, modules[conv].weight
    out, inputs = weight.shape
    outs, ins = kernel.shape[:2]
    pair = {"lora_up__weight": random(out, 4), "lora_down__weight": random(4, inputs), "alpha": alpha}
    plain = 0.5 * 0.5 * pair["lora_up__weight"] @ pair["lora_down__weight"]
    assert close(change(q, **pair), plain)
    for axis, shape in ((0, (out, 1)), (1, (1, inputs))):  # DoRA's norm of rows, and of columns
        changed = weight + plain
        magnitude = 1 + random(*shape)
        expected = magnitude * changed / changed.norm(dim=1 - axis, keepdim=True) - weight
        assert close(change(q, **pair, dora_scale=magnitude), expected)
    core = {"lora_up__weight": random(outs, 4, 1, 1), "lora_down__weight": random(3, ins, 1, 1)}
    core["lora_mid__weight"] = random(4, 3, 3, 3)
    expected = torch.einsum("or,rskl,si->oikl", *(core[f"lora_{n}__weight"].squeeze() for n in ("up", "mid", "down")))
    assert close(change(conv, **core), 0.5 * expected)
    # Conv by LoHa and LoKr in Tucker form are PEFT's, too; LoKr's alpha counts with a rank alone.
    whole = {"lokr_w1": random(4, 2), "lokr_w2": random(out // 4, inputs // 2)}
    assert close(change(q, **whole, alpha=alpha), 0.5 * torch.kron(whole["lokr_w1"], whole["lokr_w2"]))
    apart = {"lokr_w1": random(4, 2), "lokr_w2_a": random(outs // 4, 3), "lokr_w2_b": random(3, ins // 2 * 9)}
    product = (apart["lokr_w2_a"] @ apart["lokr_w2_b"]).reshape(outs // 4, ins // 2, 3, 3)
    expected = torch.kron(apart["lokr_w1"][:, :, None, None], product)
    assert close(change(conv, **apart, alpha=alpha), 0.5 * 2 / 3 * expected)
    assert close(change(conv, diff=kernel, alpha=alpha), 0.5 * kernel)
    assert close(change(conv, "bias", diff=kernel, diff_b=random(outs)), 0.5 * random(outs))
    assert close(change(conv, "bias", diff_b=random(outs)), 0.5 * random(outs))
    assert close(change(norm, w_norm=random(32), b_norm=random(32)), 0.5 * random(32))
    with pytest.raises(UserError, match=r"to_q is \[64, 64\] here, the LoRA's factors diff_b \[32\]"):
        change(q, diff_b=random(32))  # has no bias


def test_magnitudes_and_alphas_in_files_as_diffusers_takes_them(
    networks: Networks, pairs: dict[str, Pairs], text_models: Any, tmp_path: Path
) -> None:
    """DoRA's among diffusers' names; kohya's, of another alpha and rank in each layer."""
    state = spelled(pairs, "unet", "unet.{layer}.lora_{which}.weight A|B")
    for layer in UNET_LAYERS:
        weight = networks["unet"].get_submodule(layer).weight
        norm = weight.flatten(1).norm(dim=1)
        magnitude = norm * (1 + random(len(norm)))
        state[f"unet.{layer}.lora_magnitude_vector"] = (
            magnitude if weight.ndim == 2 else magnitude[None, :, None, None]
        )
    path = saved(tmp_path / "dora.safetensors", state)
    expected = fused_by_diffusers(networks, text_models[0], path)
    assert_same(all_changed(networks, path), expected, weights_of(networks))

    state = {}
    for rank, layer in enumerate(
        ("down_blocks.1.attentions.0.proj_in", "mid_block.attentions.0.proj_out", "conv_in"), 2
    ):
        weight, key = networks["unet"].get_submodule(layer).weight, f"lora_unet_{layer.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = random(rank, *weight.shape[1:])
        state[f"{key}.lora_up.weight"] = random(len(weight), rank, *(1 for _ in weight.shape[2:]))
        state[f"{key}.alpha"] = torch.tensor(7.0 - rank)
    path = saved(tmp_path / "kohya.safetensors", state)
    expected = fused_by_diffusers(networks, text_models[0], path)
    assert_same(all_changed(networks, path), expected, weights_of(networks))
