"""Checkpoints that differ from SDXL's own, held against diffusers' pipelines through the whole engine.

VAEs with `latents_mean` and `latents_std`, UNets that inpaint, v-prediction with zero terminal SNR. What is refused.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img as img2img_module
import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint as inpaint_module
import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import numpy
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from dmd2.diffusion.noise import zero_snr_sigmas
from dmd2.inference.conditioning import TEXT_TO_IMAGE, ImageConditioning
from dmd2.inference.engine import Engine
from dmd2.inference.inputs import fitted
from dmd2.models.stable_diffusion.codec import LatentCodec
from dmd2.models.stable_diffusion.configs import Schedule, check_configs, read_schedule
from dmd2.models.stable_diffusion.text import TextCondition
from dmd2.runtime.errors import UserError
from dmd2.runtime.loading import build_network
from dmd2.weights.manifest import read_manifest, write_manifest
from tests.tiny_sdxl import (
    PROMPTS,
    SCHEDULE,
    SEEDS,
    SIDE,
    SIZE,
    STUDENTS,
    build_sdxl_unet,
    build_vae,
    difference,
    frozen,
    noise,
    noise_for_diffusers,
    photograph,
    pipeline,
    pixels,
    save_sdxl,
)

MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]  # Playground 2.5's


def playground_vae() -> Any:
    vae = build_vae()
    vae.register_to_config(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    return vae


def inpainting_unet() -> Any:
    torch.manual_seed(11)
    return frozen(UNet2DConditionModel.from_config(build_sdxl_unet().config, in_channels=9))


def save(path: Path, text_models: tuple[Any, Any, Any], unet: Any, vae: Any) -> Engine:
    return Engine(save_sdxl(path, text_models, vae, four=unet, one=unet), "cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory, text_models: tuple[Any, Any, Any]) -> Engine:
    return save(tmp_path_factory.mktemp("inpainting") / "sdxl", text_models, inpainting_unet(), build_vae())


# latents_mean and latents_std


@torch.no_grad()
def test_latents_with_mean_and_std_are_those_of_diffusers(text_models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    engine = save(tmp_path / "playground", text_models, build_sdxl_unet(), playground_vae())
    plain = pipeline(StableDiffusionXLPipeline, text_models, build_sdxl_unet(), playground_vae())
    drawn = noise(4)
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        settings: dict[str, Any] = {"timesteps": STUDENTS[4], "guidance_scale": 1.0, "output_type": "np"}
        theirs = plain(PROMPTS, latents=drawn[0], width=SIDE, height=SIDE, **settings).images
    assert difference(engine.generate(PROMPTS, SEEDS, "4", SIZE), pixels(theirs)) <= 1

    drawn = noise(2)
    again = pipeline(StableDiffusionXLImg2ImgPipeline, text_models, build_sdxl_unet(), playground_vae())
    with noise_for_diffusers(drawn, img2img_module, scheduling_lcm):
        theirs = again(PROMPTS, image=[photograph()] * 2, strength=0.6, **settings).images
    ours = engine.generate(
        PROMPTS, SEEDS, "4", SIZE, ImageConditioning(image=fitted(photograph(), SIZE), strength=0.6)
    )
    assert pixels(theirs).float().std() > 5 and difference(ours, pixels(theirs)) <= 2


def test_decoding_undoes_the_scaling_of_encoding() -> None:
    with_mean, plain = LatentCodec(playground_vae()), LatentCodec(build_vae())
    image = fitted(photograph(), SIZE)[None]
    x = with_mean.encode(image)
    per_channel = [torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD)]
    assert torch.allclose(x * per_channel[1] / 0.5 + per_channel[0], plain.encode(image) / 0.13025, atol=1e-4)
    assert difference(with_mean.decode(x), plain.decode(plain.encode(image))) <= 1


# UNets that inpaint


def mask() -> Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[13:37, 5:50] = True  # not on the borders of latents
    return mask


@torch.no_grad()
@pytest.mark.parametrize(("strength", "steps"), [(1.0, 4), (0.6, 2)])
def test_an_inpainted_image_is_that_of_diffusers(
    inpainting: Engine, text_models: tuple[Any, Any, Any], strength: float, steps: int
) -> None:
    drawn = noise(steps)
    pipe = pipeline(StableDiffusionXLInpaintPipeline, text_models, inpainting_unet(), build_vae())
    of_mask = Image.fromarray((mask().numpy() * 255).astype(numpy.uint8))
    with noise_for_diffusers(drawn, inpaint_module, scheduling_lcm):
        theirs = pipe(
            PROMPTS,
            image=[photograph()] * 2,
            mask_image=[of_mask] * 2,
            strength=strength,
            timesteps=STUDENTS[4],
            guidance_scale=1.0,
            width=SIDE,
            height=SIDE,
            output_type="np",
        ).images
    image = fitted(photograph(), SIZE)
    ours = inpainting.generate(
        PROMPTS, SEEDS, "4", SIZE, ImageConditioning(image=image, mask=mask(), strength=strength)
    )
    inside = mask().expand(2, 3, -1, -1)
    assert pixels(theirs).float().std() > 5
    assert difference(ours[inside], pixels(theirs)[inside]) <= 2
    assert torch.equal(ours[~inside], image.expand(2, -1, -1, -1)[~inside])


def test_what_an_inpainting_unet_is_given(inpainting: Engine) -> None:
    """Mask, and latents of the image with the masked part grey; without a mask all is masked."""
    seen: list[Tensor] = []
    inpainting.generate(["an owl"], [0], "4")
    denoiser: Any = inpainting.model.denoisers["unet"]
    handle = denoiser.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    image = fitted(photograph(), SIZE)
    for edit in (
        TEXT_TO_IMAGE,
        ImageConditioning(image=image, strength=0.5),
        ImageConditioning(image=image, mask=mask()),
    ):
        inpainting.generate(["an owl"], [0], "4", SIZE, edit)
    handle.remove()
    assert [x.shape for x in seen] == [(1, 9, 8, 8)] * 10  # four, two and four steps
    vae = denoiser_vae = inpainting.model.codec.vae  # type: ignore[union-attr]
    with torch.no_grad():
        grey = denoiser_vae.encode(torch.zeros(1, 3, SIDE, SIDE)).latent_dist.mode() * vae.config.scaling_factor
        hidden = (image[None].float() / 127.5 - 1) * ~mask()
        masked = vae.encode(hidden).latent_dist.mode() * vae.config.scaling_factor
    for x in seen[:6]:
        assert (x[:, 4] == 1).all() and torch.allclose(x[:, 5:], grey, atol=1e-5)
    for x in seen[6:]:
        assert torch.equal(x[0, 4] == 1, mask()[::8, ::8]) and torch.allclose(x[:, 5:], masked, atol=1e-5)


def test_an_inpainting_unet_follows_a_control_net(inpainting: Engine, tmp_path: Path) -> None:
    """Which is given the four channels of what is denoised, as in diffusers' pipelines."""
    torch.manual_seed(6)
    network = ControlNetModel.from_unet(build_sdxl_unet(), conditioning_embedding_out_channels=(8, 8, 16, 16))
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    network.save_pretrained(tmp_path)
    image = fitted(photograph(), SIZE)
    plain = inpainting.generate(["an owl"], [0], "4", SIZE, ImageConditioning(image=image, mask=mask()))
    edit = ImageConditioning(image=image, mask=mask(), control=tmp_path, control_image=image)
    assert difference(inpainting.generate(["an owl"], [0], "4", SIZE, edit), plain) > 2


def test_an_inpainting_unet_is_recorded_and_follows_no_mask_in_training(inpainting: Engine) -> None:
    recorded = Engine(inpainting.folder, "cpu", dtype=torch.float32, trace=True)
    recorded.warm_up(("4",), [SIZE])
    edit = ImageConditioning(image=fitted(photograph(), SIZE), mask=mask())
    expected = inpainting.generate(PROMPTS, SEEDS, "4", SIZE, edit)
    assert difference(recorded.generate(PROMPTS, SEEDS, "4", SIZE, edit), expected) <= 2
    denoiser: Any = inpainting.model.denoisers["unet"]
    cond = TextCondition(torch.zeros(1, 4, 256), torch.zeros(1, 128), torch.zeros(1, 6))
    with pytest.raises(UserError, match="it can only be sampled, not trained"):
        denoiser(noise(1, [0])[0], torch.ones(1), cond)


# v-prediction, zero terminal SNR


def test_zero_snr_levels_are_those_of_diffusers() -> None:
    theirs = LCMScheduler(**SCHEDULE, rescale_betas_zero_snr=True)
    expected = ((1 - theirs.alphas_cumprod.double()) / theirs.alphas_cumprod.double()).sqrt()
    assert torch.allclose(zero_snr_sigmas()[:-1], expected[:-1], rtol=1e-3)
    assert zero_snr_sigmas()[-1] > 1e6 and (zero_snr_sigmas().diff() > 0).all()


@torch.no_grad()
def test_an_image_of_zero_terminal_snr_is_that_of_diffusers(
    text_models: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    settings = SCHEDULE | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    engine = save(tmp_path / "v", text_models, build_sdxl_unet(), build_vae())
    plain = engine.generate(PROMPTS, SEEDS, "4", SIZE)
    LCMScheduler(**settings).save_pretrained(engine.folder / "scheduler")
    write_manifest(engine.folder, read_manifest(engine.folder))
    pipe = pipeline(StableDiffusionXLPipeline, text_models, build_sdxl_unet(), build_vae())
    pipe.scheduler = LCMScheduler(**settings)
    drawn = noise(4)
    with noise_for_diffusers(drawn[1:], scheduling_lcm):
        theirs = pipe(
            PROMPTS,
            latents=drawn[0],
            width=SIDE,
            height=SIDE,
            timesteps=STUDENTS[4],
            guidance_scale=1.0,
            output_type="np",
        ).images
    ours = Engine(engine.folder, "cpu", dtype=torch.float32).generate(PROMPTS, SEEDS, "4", SIZE)
    assert pixels(theirs).float().std() > 5 and difference(ours, pixels(theirs)) <= 1
    assert difference(ours, plain) > 5


# What is refused, and what is said


@pytest.fixture
def folder(inpainting: Engine, tmp_path: Path) -> Path:
    """Configurations only: that is all that is needed to check them."""
    for config in inpainting.folder.glob("*/*config.json"):
        path = tmp_path / config.relative_to(inpainting.folder)
        path.parent.mkdir(exist_ok=True)
        path.write_text(config.read_text())
    check_configs(tmp_path, ["unet"], tmp_path / "vae")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("unet", {"in_channels": 8}, r"8 input \(InstructPix2Pix\) and 4 output channels; expected 4 and 4"),
        ("unet", {"in_channels": 5}, r"5 input \(depth\)"),
        ("unet", {"in_channels": 16}, "16 input and 4 output"),
        ("unet", {"in_channels": "nine"}, "nine input"),
        ("unet", {"in_channels": None}, "None input"),
        ("unet", {"out_channels": 8}, "8 output channels"),
        ("unet", {"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel; expected one of"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim: 256; expected none"),
        ("unet", {"class_embed_type": "projection"}, "class_embed_type: projection; expected none"),
        ("unet", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type: ip_image_proj; expected none"),
        ("unet", {"addition_embed_type": None}, "addition_embed_type: None; expected text_time, as in SDXL"),
        ("unet", {"cross_attention_dim": 768}, r"cross_attention_dim: 768; the text encoders give 128 \+ 128"),
        ("unet", {"projection_class_embeddings_input_dim": 288}, "288; expected 320, .*a refiner has five"),
        ("vae", {"_class_name": "AutoencoderKLWan"}, "describes a AutoencoderKLWan; expected one of AutoencoderKL"),
        ("vae", {"latent_channels": 16}, "16 latent channels; expected 4"),
        ("unet", {"in_channels": 8, "out_channels": 8}, "8 output channels; the latents of vae have 4"),
        ("vae", {"shift_factor": 0.1159}, "shift_factor: 0.1159; expected none"),
        ("vae", {"scaling_factor": 0}, "scaling_factor: 0; expected a number above 0"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor: nan"),
        ("vae", {"latents_mean": MEAN}, "expected both latents_mean and latents_std, or neither"),
        ("vae", {"latents_mean": MEAN, "latents_std": [1, 1, 1]}, r"latents_std: \[1, 1, 1\]; expected 4 numbers"),
        ("vae", {"latents_mean": MEAN, "latents_std": [1, 1, 0, 1]}, "latents_std"),
        ("vae", {"latents_mean": "0000", "latents_std": STD}, "latents_mean: 0000"),
        ("text_encoder", {"hidden_size": 768}, r"the text encoders give 768 \+ 128"),
        ("text_encoder", {"hidden_size": "x" * 9_000_000}, "hidden_size: xxx"),
        ("scheduler", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "noise levels of EDM's, as Playground"),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "noise levels of flow matching's"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type: sample; expected epsilon or v_prediction"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "expected v_prediction with it"),
        ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule: squaredcos_cap_v2"),
        ("scheduler", {"beta_end": 0.02}, "beta_end: 0.02; expected 0.012"),
        ("scheduler", {"trained_betas": [0.1]}, "expected scaled_linear"),
        ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("scheduler", {"_class_name": None}, "expected one of diffusers' schedulers"),
    ],
)  # fmt: skip
def test_what_a_folder_is_is_known_before_it_is_loaded(
    folder: Path, name: str, change: dict[str, Any], named: str
) -> None:
    path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=named) as error:
        check_configs(folder, ["unet"], folder / "vae")
    message = str(error.value)
    assert message.startswith(str(folder)) and message.isprintable() and len(message) < 600


def test_configurations_as_they_are_published_are_taken(tmp_path: Path) -> None:
    """Those of SDXL and its inpainting UNet, with their nulls and notes; networks of full size, without memory."""
    published: dict[str, dict[str, Any]] = {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "class_embed_type": None,
            "cross_attention_dim": 2048,
            "decay": 0.9999,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "encoder_hid_dim": None,
            "in_channels": 9,
            "mid_block_only_cross_attention": None,
            "num_attention_heads": None,
            "optimization_step": 37000,
            "projection_class_embeddings_input_dim": 2816,
            "time_cond_proj_dim": None,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "upcast_attention": None,
            "use_linear_projection": True,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "force_upcast": True,
            "latents_mean": None,
            "latents_std": None,
            "layers_per_block": 2,
            "scaling_factor": 0.13025,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        "text_encoder": {"dropout": 0.0, "hidden_size": 768, "projection_dim": 768, "torch_dtype": "float16"},
        "text_encoder_2": {"dropout": 0.0, "hidden_size": 1280, "projection_dim": 1280, "torch_dtype": "float16"},
        "scheduler": SCHEDULE
        | {
            "_class_name": "EulerDiscreteScheduler",
            "interpolation_type": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "trained_betas": None,
        },
    }
    tokens = {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "vocab_size": 49408,
        "model_type": "clip_text_model",
    }
    heads = {"text_encoder": 12, "text_encoder_2": 20}
    for name, config in published.items():
        if name in heads:
            config |= tokens | {"num_attention_heads": heads[name]}
        (tmp_path / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name / file).write_text(json.dumps(config))
    assert check_configs(tmp_path, ["unet"], tmp_path / "vae") == Schedule()
    unet = build_network(UNet2DConditionModel, tmp_path / "unet" / "config.json")
    assert len(unet.state_dict()) == 1680 and unet.conv_in.weight.shape == (320, 9, 3, 3)
    for kind, name in ((AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"), (CLIPTextModel, "text_encoder_2")):
        build_network(kind, tmp_path / name / "config.json")


def test_another_scheduler_is_said_in_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_schedule(folder / "scheduler")
        assert not caplog.records
        EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
            folder / "scheduler"
        )
        schedule = read_schedule(folder / "scheduler")
    assert "EulerDiscreteScheduler is not used" in caplog.text
    assert schedule.prediction_type == "epsilon" and not schedule.zero_snr


def test_an_unknown_family_is_named(inpainting: Engine, tmp_path: Path) -> None:
    manifest = read_manifest(inpainting.folder).model_copy(update={"family": "sd3"})
    write_manifest(tmp_path, manifest)
    with pytest.raises(UserError, match=r"dmd2\.json: family: sd3; expected sdxl, sd15 or edm"):
        Engine(tmp_path, "cpu")
