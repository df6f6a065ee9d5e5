"""ControlNet and T2I-Adapter, against diffusers' own pipelines with the same timesteps and noise."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
)
from PIL import Image
from torch import Tensor

from dmd2.diffusion.sampling import sample_few_step
from dmd2.inference.inputs import fitted
from dmd2.models.adapters.control import ControlModel, grey, load_control
from dmd2.models.stable_diffusion.text import TextCondition, TextEncoder
from dmd2.models.stable_diffusion.unet import StableDiffusion
from dmd2.runtime.errors import UserError
from tests.tiny_sdxl import (
    PROMPTS,
    SIDE,
    STUDENTS,
    build_adapter,
    build_sdxl_unet,
    build_vae,
    frozen,
    noise,
    noise_for_diffusers,
    photograph,
    pipeline,
)

Texts = tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def unet() -> Any:
    return build_sdxl_unet()


@pytest.fixture(scope="module")
def control_net(unet: Any) -> ControlModel:
    torch.manual_seed(6)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    for parameter in network.parameters():  # a new one adds nothing: its last layers are zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return ControlModel(frozen(network), torch.device("cpu"))


@pytest.fixture(scope="module")
def adapter() -> ControlModel:
    return ControlModel(build_adapter(), torch.device("cpu"))


def condition(text_models: Texts) -> TextCondition:
    tokenizer, first, second = text_models
    return TextEncoder([tokenizer, tokenizer], [first, second])(PROMPTS, (SIDE, SIDE))


def generate(unet: Any, model: ControlModel | None, cond: TextCondition, steps: int, **settings: Any) -> Tensor:
    denoiser = StableDiffusion(unet)
    timesteps = STUDENTS[steps]
    image = fitted(photograph(), (SIDE, SIDE))
    control = None if model is None else model.guide(image, timesteps, **settings)
    sigmas = [float(denoiser.sigmas[t]) for t in timesteps]
    return sample_few_step(
        lambda x, s: denoiser(x, s, cond, control), denoiser.scale_initial_noise, noise(steps), sigmas
    )


def check(ours: Tensor, theirs: Tensor, plain: Tensor) -> None:
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((ours - plain).abs().max()) > 0.05  # the control does something


@pytest.mark.parametrize("steps", [4, 1])
@torch.no_grad()
def test_a_control_net_is_that_of_diffusers(
    unet: Any, control_net: ControlModel, text_models: Texts, steps: int
) -> None:
    drawn = noise(steps)
    pipe = pipeline(
        StableDiffusionXLControlNetPipeline, text_models, unet, build_vae(), controlnet=control_net.network
    )
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        theirs = pipe(
            PROMPTS,
            image=[photograph()] * 2,
            controlnet_conditioning_scale=0.8,
            latents=drawn[0].clone(),
            timesteps=STUDENTS[steps],
            guidance_scale=1.0,
            output_type="latent",
        ).images
    cond = condition(text_models)
    check(generate(unet, control_net, cond, steps), theirs, generate(unet, None, cond, steps))


@pytest.mark.parametrize(("steps", "part"), [(4, 0.5), (1, 1.0)])
@torch.no_grad()
def test_an_adapter_is_that_of_diffusers(
    unet: Any, adapter: ControlModel, text_models: Texts, steps: int, part: float
) -> None:
    drawn = noise(steps)
    pipe = pipeline(StableDiffusionXLAdapterPipeline, text_models, unet, build_vae(), adapter=adapter.network)
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        theirs = pipe(
            PROMPTS,
            image=[photograph()] * 2,
            adapter_conditioning_scale=0.8,
            adapter_conditioning_factor=part,
            latents=drawn[0].clone(),
            timesteps=STUDENTS[steps],
            guidance_scale=1.0,
            output_type="latent",
        ).images
    cond = condition(text_models)
    check(generate(unet, adapter, cond, steps), theirs, generate(unet, None, cond, steps))


@torch.no_grad()
def test_a_scale_of_nothing_changes_nothing(
    unet: Any, control_net: ControlModel, adapter: ControlModel, text_models: Texts
) -> None:
    cond = condition(text_models)
    plain = generate(unet, None, cond, 4)
    for model in (control_net, adapter):
        assert torch.allclose(generate(unet, model, cond, 4, scale=0.0), plain, atol=1e-5)


@torch.no_grad()
def test_part_says_how_many_steps_are_guided(unet: Any, adapter: ControlModel, text_models: Texts) -> None:
    denoiser, cond = StableDiffusion(unet), condition(text_models)
    image, timesteps = fitted(photograph(), (SIDE, SIDE)), STUDENTS[4]
    for part, cfg_denoise in ((None, 2), (0.5, 2), (1.0, 4), (0.75, 3), (0.1, 1)):
        control = adapter.guide(image, timesteps, part=part)
        added = [control(torch.zeros(1), torch.tensor([float(t)]), cond) for t in timesteps]
        given = [any(bool(state.any()) for state in states) for each in added for states in each.values()]
        assert given == [True] * cfg_denoise + [False] * (4 - cfg_denoise)
    control = adapter.guide(image, [399])
    added = control(torch.zeros(1), denoiser.timestep(denoiser.sigmas[399:400]), cond)
    assert all(bool(state.any()) for states in added.values() for state in states)


def test_images_of_another_size_are_refused(adapter: ControlModel, control_net: ControlModel) -> None:
    assert (adapter.unit, control_net.unit) == (16, 8)
    for model, unit in ((adapter, 16), (control_net, 8)):
        with pytest.raises(UserError, match=f"control_image: 36x{SIDE}.*multiples of {unit} pixels"):
            model.guide(fitted(Image.new("RGB", (36, SIDE)), (36, SIDE)), [999])


def test_both_are_loaded_from_a_folder(control_net: ControlModel, adapter: ControlModel, tmp_path: Path) -> None:
    for name, model in (("net", control_net), ("adapter", adapter)):
        model.network.save_pretrained(tmp_path / name)
        loaded = load_control(tmp_path / name, torch.device("cpu"), torch.float32)
        assert loaded.is_adapter == model.is_adapter and not loaded.network.training
        for key, value in model.network.state_dict().items():
            assert torch.equal(loaded.network.state_dict()[key], value)


@pytest.mark.parametrize(("name", "task"), [("depth", 1), ("union-lineart", 3)])
@torch.no_grad()
def test_a_union_is_that_of_diffusers(unet: Any, text_models: Texts, tmp_path: Path, name: str, task: int) -> None:
    torch.manual_seed(8)
    made = ControlNetUnionModel(
        **{key: unet.config[key] for key in signature(ControlNetUnionModel).parameters if key in unet.config},
        conditioning_embedding_out_channels=(8, 8, 16, 16),
        num_trans_channel=32,
        num_proj_channel=32,
        num_trans_head=2,
    )
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    made.save_pretrained(tmp_path / name)
    if task == 1:  # as the published ones are: their config is that of a plain ControlNet, and says nothing of tasks
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text()) | {"_class_name": "ControlNetModel"}
        path.write_text(json.dumps({key: value for key, value in config.items() if key != "num_control_type"}))
    model = load_control(tmp_path / name, torch.device("cpu"), torch.float32, unet.config)
    assert model.task == task and not model.is_adapter
    drawn = noise(4)
    pipe = pipeline(StableDiffusionXLControlNetUnionPipeline, text_models, unet, build_vae(), controlnet=frozen(made))
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        theirs = pipe(
            PROMPTS,
            control_image=[photograph()],
            control_mode=[task],
            controlnet_conditioning_scale=0.8,
            latents=drawn[0].clone(),
            timesteps=STUDENTS[4],
            guidance_scale=1.0,
            output_type="latent",
        ).images
    cond = condition(text_models)
    check(generate(unet, model, cond, 4), theirs, generate(unet, None, cond, 4))
    (tmp_path / name).rename(tmp_path / "promax")
    with pytest.raises(UserError, match="folder's name must say what its images are: expected one of openpose"):
        load_control(tmp_path / "promax", torch.device("cpu"), torch.float32, unet.config)


@torch.no_grad()
def test_an_adapter_of_one_channel_is_that_of_diffusers(unet: Any, text_models: Texts, tmp_path: Path) -> None:
    torch.manual_seed(7)
    settings: dict[str, Any] = {"num_res_blocks": 1, "downscale_factor": 16, "adapter_type": "full_adapter_xl"}
    T2IAdapter(in_channels=1, channels=[32, 32, 64, 64], **settings).save_pretrained(tmp_path)
    model = load_control(tmp_path, torch.device("cpu"), torch.float32, unet.config)
    assert model.channels == 1
    drawn = noise(4)
    pipe = pipeline(StableDiffusionXLAdapterPipeline, text_models, unet, build_vae(), adapter=model.network)
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        theirs = pipe(
            PROMPTS,
            image=[photograph().convert("L")] * 2,
            adapter_conditioning_scale=0.8,
            adapter_conditioning_factor=0.5,
            latents=drawn[0].clone(),
            timesteps=STUDENTS[4],
            guidance_scale=1.0,
            output_type="latent",
        ).images
    cond = condition(text_models)
    check(generate(unet, model, cond, 4), theirs, generate(unet, None, cond, 4))


def test_grey_is_that_of_pillow() -> None:
    image = photograph(size=(40, 30))
    expected = fitted(image.convert("L").convert("RGB"), (40, 30))
    assert torch.equal(grey(fitted(image, (40, 30)))[0], expected[0])
    assert torch.equal(grey(expected)[0], expected[0])


def test_what_was_made_for_another_unet_is_refused_before_it_is_loaded(
    unet: Any, control_net: ControlModel, adapter: ControlModel, tmp_path: Path
) -> None:
    def refused(model: ControlModel, **change: Any) -> str:
        model.network.save_config(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))  # and no weights at all
        with pytest.raises(UserError) as error:
            load_control(tmp_path, torch.device("cpu"), torch.float32, unet.config)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 600
        return message

    assert "cross_attention_dim is 768; this one's is 256" in refused(control_net, cross_attention_dim=768)
    wide = {"block_out_channels": [32, 32, 32]}
    assert "block_out_channels is [32, 32, 32]; this one's is [32, 32, 64]" in refused(control_net, **wide)
    assert "images of 6 channels; expected 1 or 3" in refused(control_net, conditioning_channels=6)
    assert "9 latent channels; expected 4" in refused(control_net, in_channels=9)
    assert "images of 4 channels; expected 1 or 3" in refused(adapter, in_channels=4)
    other = refused(adapter, channels=[32, 64, 64, 64])
    assert "gives [32, 64, 64, 64] channels; this one's blocks have [32, 32, 64]" in other
    assert "describes no T2IAdapter" in refused(adapter, adapter_type="heavy")
    assert "describes no ControlNetModel" in refused(control_net, down_block_types="x")
    assert "describes no T2IAdapter" in refused(adapter, channels={"a": []})


def test_other_folders_are_refused(adapter: ControlModel, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            load_control(folder, torch.device("cpu"), torch.float32)
        return str(error.value)

    assert "expected a folder with a config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json: holds a list; expected a JSON object" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert "describes a AutoencoderKL; expected one of ControlNetModel, T2IAdapter" in refused(tmp_path)
    adapter.network.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert str(tmp_path) in refused(tmp_path)
