"""LoRAs of every kind, naming and strength change weights as PEFT and diffusers change them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from dmd2.lora import Fused, read_lora
from tests.tiny_sdxl import build_sdxl_unet

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
    assert sum(not torch.equal(ours[name], before[name]) for name in ours) > 3


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
