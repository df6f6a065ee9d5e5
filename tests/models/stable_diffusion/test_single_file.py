"""SDXL checkpoints in one file: what diffusers' layout was renamed to by hand comes back to the bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from dmd2.cli import app
from dmd2.inference.engine import Engine
from dmd2.models.locate import locate
from dmd2.models.stable_diffusion.convert import NETWORKS, convert_sdxl
from dmd2.runtime.errors import UserError
from dmd2.weights.manifest import read_manifest, verify
from tests.models.adapters.test_lora import ATTENTION, kohya_style
from tests.tiny_sdxl import build_sdxl_unet, build_vae, save_sdxl

State = dict[str, Tensor]
LAYERS = 2  # of a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_models: tuple[Any, Any, Any]) -> Path:
    """SDXL in small, in diffusers' layout. Not to be changed: copy it."""
    path = tmp_path_factory.mktemp("single") / "sdxl"
    unet = build_sdxl_unet(0)
    return save_sdxl(path, text_models, build_vae(), four=unet, one=unet)


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """Its configurations and tokenizers, without any weights."""
    ignore = shutil.ignore_patterns("*.safetensors", "dmd2.json")
    return Path(shutil.copytree(folder, folder.parent / "base", ignore=ignore))


def renamed(name: str, pairs: list[tuple[str, str | Callable[[re.Match[str]], str]]]) -> str:
    for pattern, new in pairs:
        name = re.sub(pattern, new, name)
    return name


def unet_keys(state: State) -> State:
    """generative-models' names of diffusers' UNet: a level has LAYERS blocks and one that halves or doubles."""
    attends = {m[1] for key in state if (m := re.match(r"up_blocks\.(\d+)\.attentions", key))}
    step = LAYERS + 1
    pairs: list[tuple[str, Any]] = [
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^add_embedding\.linear_1", "label_emb.0.0"),
        (r"^add_embedding\.linear_2", "label_emb.0.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"input_blocks.{step * int(m[1]) + int(m[2]) + 1}.0"),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"input_blocks.{step * int(m[1]) + int(m[2]) + 1}.1"),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{step * (int(m[1]) + 1)}.0.op"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"output_blocks.{step * int(m[1]) + int(m[2])}.0"),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"output_blocks.{step * int(m[1]) + int(m[2])}.1"),
        (
            r"^up_blocks\.(\d+)\.upsamplers\.0\.conv",
            lambda m: f"output_blocks.{step * int(m[1]) + LAYERS}.{1 + (m[1] in attends)}.conv",
        ),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    ]
    return {f"model.diffusion_model.{renamed_block(key, pairs)}": value for key, value in state.items()}


def renamed_block(key: str, pairs: list[tuple[str, Any]]) -> str:
    """Norms of transformer blocks keep their names; only a resnet's change."""
    if "resnets" in key:
        for old, new in (("norm1", "in_layers.0"), ("norm2", "out_layers.0")):
            key = key.replace(f".{old}.", f".{new}.")
    return renamed(key, pairs)


def vae_keys(state: State) -> State:
    levels = 1 + max(int(m[1]) for key in state if (m := re.match(r"decoder\.up_blocks\.(\d+)", key)))
    pairs: list[tuple[str, Any]] = [
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ]
    found = {f"first_stage_model.{renamed(key, pairs)}": value for key, value in state.items()}
    for key, value in found.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):
            found[key] = value[:, :, None, None]  # convolutions of one pixel
    return found


def clip_keys(state: State) -> State:
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    return {f"conditioner.embedders.0.transformer.text_model.{key}": value for key, value in bare.items()}


def open_clip_keys(state: State) -> State:
    prefix, found = "conditioner.embedders.1.model.", {}
    pairs: list[tuple[str, Any]] = [
        (r"^text_model\.", ""),
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"layer_norm1", "ln_1"),
        (r"layer_norm2", "ln_2"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"self_attn", "attn"),
        (r"^final_layer_norm", "ln_final"),
        (r"^embeddings\.token_embedding", "token_embedding"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    ]
    for key, value in state.items():
        name = renamed(key, pairs)
        if key == "text_projection.weight":
            found[f"{prefix}text_projection"] = value.T.contiguous()
        elif match := re.fullmatch(r"(.*attn)\.q_proj\.(weight|bias)", name):
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[f"{prefix}{match[1]}.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"[kv]_proj", name):
            found[prefix + name] = value
    return found


def in_one_file(folder: Path) -> State:
    """What a trainer's export of the folder to one file holds, with things of no matter here."""
    states = {name: load_file(folder / name / file) for name, file in NETWORKS.items()}
    return {
        **unet_keys(states["unet"]),
        **vae_keys(states["vae"]),
        **clip_keys(states["text_encoder"]),
        **open_clip_keys(states["text_encoder_2"]),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "denoiser.sigmas": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9),
    }


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    path = folder.parent / "someones.safetensors"
    save_file(in_one_file(folder), path)
    return path


def bare(state: State) -> State:
    return {key.removeprefix("text_model."): value for key, value in state.items()}


def test_every_weight_comes_back_to_the_bit(folder: Path, base: Path, file: Path, tmp_path: Path) -> None:
    manifest = convert_sdxl(file, None, tmp_path / "made", base=base)
    verify(tmp_path / "made", manifest)
    for name, of in NETWORKS.items():
        expected, found = bare(load_file(folder / name / of)), bare(load_file(tmp_path / "made" / name / of))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    (student,) = manifest.students.values()
    assert student.timesteps == [999, 749, 499, 249] and not student.lora
    expected = Engine(folder, "cpu", dtype=torch.float32).generate(["an owl"], [3], "4", (64, 64))
    assert torch.equal(
        Engine(tmp_path / "made", "cpu", dtype=torch.float32).generate(["an owl"], [3], "4", (64, 64)), expected
    )


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16),
        (torch.float8_e5m2, torch.float16),
    ],
)  # fmt: skip
def test_checkpoints_of_any_precision_keep_their_values(
    folder: Path, base: Path, tmp_path: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in in_one_file(folder).items()}
    save_file(cast, tmp_path / "cast.safetensors")
    convert_sdxl(tmp_path / "cast.safetensors", None, tmp_path / "made", base=base)
    for name, of in NETWORKS.items():
        expected, found = bare(load_file(folder / name / of)), bare(load_file(tmp_path / "made" / name / of))
        for key, value in expected.items():
            assert found[key].dtype == stored and torch.equal(found[key].float(), value.to(dtype).float()), key
    Engine(tmp_path / "made", "cpu").generate(["an owl"], [0], "4", (64, 64))


def test_scaled_8_bit_weights_are_multiplied(folder: Path, base: Path, tmp_path: Path) -> None:
    state = in_one_file(folder)
    key = "model.diffusion_model.time_embed.0"
    state[f"{key}.weight"] = torch.full_like(state[f"{key}.weight"], 3).to(torch.float8_e4m3fn)
    state |= {f"{key}.scale_weight": torch.tensor(0.5), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "scaled.safetensors")
    convert_sdxl(tmp_path / "scaled.safetensors", None, tmp_path / "made", base=base)
    found = load_file(tmp_path / "made" / "unet" / NETWORKS["unet"])["time_embedding.linear_1.weight"]
    assert found.dtype == torch.float16 and (found == 1.5).all()


def test_what_the_file_says_of_its_prediction_is_kept(folder: Path, base: Path, tmp_path: Path) -> None:
    def made(name: str, *marks: str, metadata: dict[str, str] | None = None, **settings: Any) -> tuple[str, bool]:
        path = tmp_path / f"{name}.safetensors"
        save_file(in_one_file(folder) | {mark: torch.zeros(1) for mark in marks}, path, metadata)
        convert_sdxl(path, None, tmp_path / name, base=base, **settings)
        config = json.loads((tmp_path / name / "scheduler" / "scheduler_config.json").read_text())
        return config["prediction_type"], config["rescale_betas_zero_snr"]

    assert made("plain") == ("epsilon", False)
    assert made("v", "v_pred") == ("v_prediction", False)
    assert made("zero", "v_pred", "ztsnr") == ("v_prediction", True)
    assert made("spec", metadata={"modelspec.prediction_type": "v"}) == ("v_prediction", False)
    assert made("told", prediction="v-zero-snr") == ("v_prediction", True)
    with pytest.raises(UserError, match=r"is Playground 2\.5, as edm_mean\* tells; expected SDXL"):
        made("playground", "edm_mean", "edm_std")
    with pytest.raises(UserError, match="prediction x: expected one of epsilon, v, v-zero-snr"):
        made("wrong", prediction="x")


def test_an_inpainting_checkpoint_in_one_file(folder: Path, base: Path, tmp_path: Path) -> None:
    state, first = in_one_file(folder), "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.cat([state[first], torch.zeros_like(state[first]), state[first][:, :1]], dim=1)
    save_file(state, tmp_path / "inpainting.safetensors")
    convert_sdxl(tmp_path / "inpainting.safetensors", None, tmp_path / "made", base=base)
    engine = Engine(tmp_path / "made", "cpu")
    engine.generate(["an owl"], [0], "4", (64, 64))
    assert engine.model.denoisers["unet"].inpaints  # type: ignore[union-attr]


def test_a_file_with_a_lora_and_one_used_as_weights(
    base: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = build_sdxl_unet(0)
    save_file(kohya_style(unet, "lora_unet", ATTENTION, 0), tmp_path / "dmd2.safetensors")
    paths = [str(file), str(tmp_path / "dmd2.safetensors"), str(tmp_path / "made")]
    result = CliRunner().invoke(app, ["convert", "sdxl", *paths, "--base", str(base), "--scale", "0.5"])
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "made").students[4].lora == "lora/dmd2.safetensors"
    environ = {"DMD2_CACHE": str(tmp_path / "cache"), "DMD2_BASE": str(base)}
    used = locate(file, environ)
    assert read_manifest(used).students[4].lora == "" and locate(file, environ) == used  # made once
    with pytest.raises(UserError, match=r"^base .*: lacks unet/config\.json"):
        locate(file, {"DMD2_CACHE": str(tmp_path / "cache")}, tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    options = ["--weights", str(file), "--size", "64x64", "--seed", "3", "--out", str(tmp_path / "images")]
    result = CliRunner().invoke(app, ["generate", "an owl", *options])
    assert result.exit_code == 0 and len(list((tmp_path / "images").glob("*.png"))) == 1, result.output


def without(prefix: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("first_stage_model."), r"holds no VAE \(first_stage_model\.\*\); .*\(vae\)"),
        (without("conditioner.embedders.1."), r"holds no conditioner\.embedders\.1\.model\.\*"),
        (without("model."), r"holds no model\.diffusion_model\.\*"),
        (without("model.diffusion_model.label_emb"), "not SDXL's unet: 'label_emb.0.0.weight'"),
        (without("model.diffusion_model.middle_block.1.norm"), "lacks mid_block.attentions.0.norm"),
        (without("conditioner.embedders.1.model.text_projection"), "lacks text_projection.weight"),
        (lambda s: s | {"cond_stage_model.x": torch.zeros(1)}, "is Stable Diffusion 1 or 2"),
        (lambda s: {"double_blocks.0.x": torch.zeros(1)}, "is FLUX"),
        (lambda s: s | {"model.diffusion_model.out.2.bias": torch.zeros(8)}, "has conv_out.bias as 8 instead of 4"),
        (lambda s: s | {"first_stage_model.encoder.mid.attn_1.q.weight": torch.zeros(1)}, "has encoder.mid_block"),
        (
            lambda s: s | {"conditioner.embedders.1.model.text_projection": torch.tensor(1.0)},
            r"conditioner\.embedders\.1\.model\.\*: not SDXL's text_encoder_2",
        ),
        (
            lambda s: s | {"model.diffusion_model.out.2.bias": torch.full((4,), float("nan"))},
            "not written, for conv_out.bias has values that are not finite",
        ),
        (
            lambda s: s | {"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int8)},
            "conv_out.bias: integers; expected floats",
        ),
        (lambda s: {"x" * 9_000_000: torch.zeros(1)}, r"holds no model\.diffusion_model\.\*"),
        (lambda s: {}, r"\(but nothing\)"),
    ],
)
def test_what_is_no_sdxl_is_one_line_and_leaves_nothing(
    folder: Path, base: Path, tmp_path: Path, change: Callable[[State], State], named: str
) -> None:
    save_file(change(in_one_file(folder)), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=named) as error:
        convert_sdxl(tmp_path / "other.safetensors", None, tmp_path / "made", base=base)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "other.safetensors")) and message.isprintable() and len(message) < 800
    assert [p.name for p in tmp_path.iterdir()] == ["other.safetensors"]


def test_what_else_is_needed_is_said(folder: Path, file: Path, base: Path, tmp_path: Path) -> None:
    def refused(source: Path = file, base: Path | None = base) -> str:
        with pytest.raises(UserError) as error:
            convert_sdxl(source, None, tmp_path / "made", base=base)
        assert not list(tmp_path.glob("*made*"))
        return str(error.value)

    assert "has neither configurations nor tokenizers; expected a folder" in refused(base=None)
    assert "lacks unet/config.json, vae/config.json, text_encoder/config.json; expected" in refused(base=tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02}q\x00.")
    assert "a.ckpt: not a whole safetensors file" in refused(tmp_path / "a.ckpt")
    assert "missing; expected an SDXL checkpoint, a folder in diffusers' layout or one file" in refused(
        tmp_path / "no"
    )
    save_file(without("first_stage_model.")(in_one_file(folder)), tmp_path / "no-vae.safetensors")
    convert_sdxl(tmp_path / "no-vae.safetensors", None, tmp_path / "new", base=base, vae=folder / "vae")
    expected, found = (load_file(path / "vae" / NETWORKS["vae"]) for path in (folder, tmp_path / "new"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
