"""Diffusion in pixel space: EDM's networks (DDPM++, NCSN++, ADM), their preconditioning, and folders of them.

Written from the papers: Karras et al. 2022 (EDM, arXiv 2206.00364), Song et al. 2021 (DDPM++ and NCSN++, 2011.13456),
Dhariwal & Nichol 2021 (ADM, 2105.05233). Parameters have the names of EDM's published checkpoints, so those load.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.fileio import atomic_text, write_atomically
from dmd2.noise import karras_sigmas, per_image
from dmd2.weights import Manifest, read_manifest, verify, write_manifest

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MAX_POSITIONS = 10_000  # longest period of the sinusoidal embedding (Vaswani et al. 2017, sec. 3.5)
FOURIER_SCALE = 16.0  # standard deviation of the random frequencies (Song et al. 2021, app. C)
ADM_HEAD_CHANNELS = 64  # Dhariwal & Nichol 2021, sec. 3

Resample = Literal["up", "down"]
Count = Annotated[int, Field(ge=1, le=16)]
Level = Annotated[float, Field(gt=0, le=1e6)]


@dataclass(frozen=True)
class _Style:
    """Where the three architectures differ (Karras et al. 2022, table 1 and app. C)."""

    adm: bool
    """scale and shift from the embedding, heads of 64 channels, PyTorch's initialisation, zero last layers"""
    fourier: bool
    """random Fourier features of the noise level, twice as wide; else sinusoids at fixed frequencies"""
    taps: tuple[int, ...]
    """1-d filter around resampling by two"""
    pyramid: bool
    """the noisy picture itself, ever smaller, is added to every level of the encoder"""
    eps: float
    """of group normalisation"""
    residual_scale: float
    """what a sum of two branches is multiplied by"""


STYLES = {
    "ddpmpp": _Style(False, False, (1, 1), False, 1e-6, math.sqrt(0.5)),
    "ncsnpp": _Style(False, True, (1, 3, 3, 1), True, 1e-6, math.sqrt(0.5)),
    "adm": _Style(True, False, (1, 1), False, 1e-5, 1.0),
}


class EdmConfig(BaseModel):
    """`config.json` of an EDM network: all that it takes to build it and to use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    architecture: Literal["ddpmpp", "ncsnpp", "adm"]
    resolution: int = Field(ge=4, le=1024)
    """side of the square pictures, in pixels"""
    channels: int = Field(default=3, ge=1, le=16)
    classes: int = Field(default=0, ge=0, le=1_000_000)
    """0: not conditioned on a class"""
    augment_dim: int = Field(default=0, ge=0, le=64)
    """length of the augmentation label that it was trained with; 0: none"""
    model_channels: int = Field(ge=4, le=4096, multiple_of=4)
    channel_mult: tuple[Count, ...] = Field(min_length=1, max_length=8)
    """channels of each level, finest first, in units of `model_channels`"""
    blocks: Count
    """residual blocks in a level of the encoder; the decoder has one more"""
    attention: tuple[int, ...]
    """resolutions that attend"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    sigma_min: Level = 0.002
    sigma_max: Level = 80.0
    sigma_data: Level = 0.5
    boundary: float = Field(default=0.0, ge=0, le=1)
    """ε of consistency models' preconditioning (Song et al. 2023, app. C), which GDD's students use with 0.002: the
    network is the identity at σ = ε. 0: EDM's preconditioning"""
    sigmas: tuple[Level, ...] = ()
    """descending levels that a student was distilled for, one a step; empty: a teacher"""

    @model_validator(mode="after")
    def _check(self) -> EdmConfig:
        last = self.resolution / 2 ** (len(self.channel_mult) - 1)
        if last < 1 or last != int(last):
            raise ValueError(f"resolution {self.resolution} cannot be halved {len(self.channel_mult) - 1} times")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        if any(a <= b for a, b in pairwise(self.sigmas)):
            raise ValueError("sigmas: expected descending levels")
        widths = [self.model_channels * m for m in self.channel_mult]
        # A norm has min(32, channels / 4) groups. It sees any width, and in the decoder the sum of any two.
        if any((a + b) % min(32, (a + b) // 4) for a in (0, self.model_channels, *widths) for b in widths):
            raise ValueError(f"model_channels {self.model_channels}: cannot be split into groups of normalisation")
        attending = [w for i, w in enumerate(widths) if self.resolution >> i in self.attention] + widths[-1:]
        if self.architecture == "adm" and any(w % ADM_HEAD_CHANNELS for w in attending):
            raise ValueError(f"model_channels {self.model_channels}: cannot be split into heads of 64 channels")
        return self


def _published() -> dict[str, EdmConfig]:
    small: dict[str, Any] = {"model_channels": 128, "blocks": 4, "attention": (16,), "augment_dim": 9}
    cifar10 = small | {"resolution": 32, "channel_mult": (2, 2, 2), "dropout": 0.13}
    faces = small | {"resolution": 64, "channel_mult": (1, 2, 2, 2)}
    sets: dict[str, dict[str, Any]] = {
        "cifar10-32x32-cond": cifar10 | {"classes": 10},
        "cifar10-32x32-uncond": cifar10,
        "ffhq-64x64-uncond": faces | {"dropout": 0.05},
        "afhqv2-64x64-uncond": faces | {"dropout": 0.25},
    }
    configs = {
        f"edm-{name}-{suffix}": EdmConfig.model_validate({"architecture": architecture, **values})
        for name, values in sets.items()
        for suffix, architecture in (("vp", "ddpmpp"), ("ve", "ncsnpp"))
    }
    configs["edm-imagenet-64x64-cond-adm"] = EdmConfig(
        architecture="adm",
        resolution=64,
        classes=1000,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        blocks=3,
        attention=(32, 16, 8),
        dropout=0.1,
    )
    return configs


PUBLISHED = _published()
"""EDM's published models (Karras et al. 2022, table 7), by the names of their files"""


def published(name: str) -> EdmConfig:
    """The configuration of one of EDM's published models.

    Raises:
        UserError: there is none of that name.
    """
    if name not in PUBLISHED:
        raise UserError(f"{name}: no such EDM model; expected one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


# Layers. Each works in the dtype of its input, whatever the dtype of its weights.


def _initialise(style: _Style, weight: Tensor, bias: Tensor | None, gain: float) -> None:
    if style.adm:  # PyTorch's own default: both uniform in ±1/√(fan in)
        bound = gain / math.sqrt(weight[0].numel())
        nn.init.uniform_(weight, -bound, bound)
        if bias is not None:
            nn.init.uniform_(bias, -bound, bound)
    else:
        nn.init.xavier_uniform_(weight, gain)
        if bias is not None:
            nn.init.zeros_(bias)


def _linear(style: _Style, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias)
    _initialise(style, layer.weight, layer.bias, gain)
    return layer


class _Norm(nn.GroupNorm):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def resample_filter(taps: tuple[int, ...]) -> Tensor:
    """The 2-d filter (1, 1, k, k), fp32, that sums to 1, of the 1-d one."""
    f = torch.tensor(taps, dtype=torch.float32)
    return (f.outer(f) / f.sum() ** 2)[None, None]


class _Conv(nn.Module):
    """A convolution, of a picture filtered and resampled by two if asked. Kernel 0: only resamples.

    `fused` convolves before it filters and drops pixels. The picture's surroundings are then zeros to the
    convolution but not to the filter, so the numbers at the border differ.
    """

    resample_filter: Tensor

    def __init__(
        self,
        style: _Style,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        resample: Resample | None = None,
        fused: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.resample, self.fused, self.box = resample, fused, style.taps == (1, 1)
        self.padding, self.filter_padding = kernel // 2, (len(style.taps) - 1) // 2
        self.kernel = kernel
        if kernel:
            self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(outputs))
            _initialise(style, self.weight, self.bias, gain)
        if resample:
            self.register_buffer("resample_filter", resample_filter(style.taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self._down(self._convolve(x, self.padding + self.filter_padding), padding=0)
        if self.resample == "up":
            x = self._up(x)
        elif self.resample == "down":
            x = self._down(x, self.filter_padding)
        return self._convolve(x, self.padding)

    def _convolve(self, x: Tensor, padding: int) -> Tensor:
        if not self.kernel:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)

    def _up(self, x: Tensor) -> Tensor:
        if self.box:  # the same as the filter, several times as fast
            return F.interpolate(x, scale_factor=2, mode="nearest")
        # ×4: only a quarter of the pixels that the filter sums over are not zero
        return F.conv_transpose2d(x, 4 * self._depthwise(x), stride=2, padding=self.filter_padding, groups=x.shape[1])

    def _down(self, x: Tensor, padding: int) -> Tensor:
        if self.box:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self._depthwise(x), stride=2, padding=padding, groups=x.shape[1])

    def _depthwise(self, x: Tensor) -> Tensor:
        return self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)


class _Block(nn.Module):
    """Residual block, then self-attention if asked (Song et al. 2021, app. H; Dhariwal & Nichol 2021, sec. 3)."""

    def __init__(
        self,
        style: _Style,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        attention: bool = False,
        resample: Resample | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.adm, self.residual_scale, self.dropout = style.adm, style.residual_scale, dropout
        last_gain = 0.0 if style.adm else 1e-5  # a new block does next to nothing
        self.norm0 = _Norm(inputs, style.eps)
        self.conv0 = _Conv(style, inputs, outputs, 3, resample=resample)
        self.affine = _linear(style, embedding, outputs * (2 if style.adm else 1))
        self.norm1 = _Norm(outputs, style.eps)
        self.conv1 = _Conv(style, outputs, outputs, 3, gain=last_gain)
        self.skip = None
        if inputs != outputs or resample:
            self.skip = _Conv(style, inputs, outputs, 0 if style.adm and inputs == outputs else 1, resample=resample)
        self.heads = (outputs // ADM_HEAD_CHANNELS if style.adm else 1) if attention else 0
        if self.heads:
            self.norm2 = _Norm(outputs, style.eps)
            self.qkv = _Conv(style, outputs, 3 * outputs, 1, gain=1.0 if style.adm else math.sqrt(0.2))
            self.proj = _Conv(style, outputs, outputs, 1, gain=last_gain)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, E) fp32 → (B, C', H', W') in x's dtype."""
        h = self.conv0(F.silu(self.norm0(x)))
        parameters = self.affine(embedding).to(h.dtype)[:, :, None, None]
        if self.adm:
            scale, shift = parameters.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + parameters))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self._sum(h, x if self.skip is None else self.skip(x))
        return self._sum(self._attend(x), x) if self.heads else x

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self.residual_scale == 1 else (a + b) * self.residual_scale

    def _attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        heads, width = self.heads, c // self.heads
        tokens = self.norm2(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        # EDM lays these channels out as (heads, width, 3). Fused attention wants q, k and v each in one piece, and
        # reordering the weight is cheaper than reordering what it makes.
        weight = self.qkv.weight.to(x.dtype).reshape(heads, width, 3, c).permute(2, 0, 1, 3).reshape(3 * c, c)
        bias = self.qkv.bias.to(x.dtype).reshape(heads, width, 3).permute(2, 0, 1).reshape(3 * c)
        qkv = F.linear(tokens, weight, bias).reshape(b, h * w, 3, heads, width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c)
        return self.proj(attended.permute(0, 3, 1, 2))


class _Sinusoids(nn.Module):
    """Sines and cosines of c_noise at fixed frequencies (Vaswani et al. 2017, sec. 3.5)."""

    def __init__(self, channels: int, adm: bool) -> None:
        super().__init__()
        self.frequencies, self.adm = channels // 2, adm

    def forward(self, c_noise: Tensor) -> Tensor:
        """(B,) fp32 → (B, C)."""
        index = torch.arange(self.frequencies, dtype=torch.float32, device=c_noise.device)
        # DDPM++ reaches 1/10000 at the last frequency, ADM would at the one after; they order the halves differently.
        last = self.frequencies if self.adm else self.frequencies - 1
        phase = c_noise[:, None] * MAX_POSITIONS ** (-index / last)
        return torch.cat([phase.cos(), phase.sin()] if self.adm else [phase.sin(), phase.cos()], dim=1)


class _Fourier(nn.Module):
    """Sines and cosines of c_noise at random frequencies (Tancik et al. 2020; Song et al. 2021, app. C)."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * FOURIER_SCALE)

    def forward(self, c_noise: Tensor) -> Tensor:
        """(B,) fp32 → (B, C)."""
        phase = c_noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class UNet(nn.Module):
    """The raw network F (Karras et al. 2022, eq. 7): DDPM++, NCSN++ or ADM."""

    def __init__(self, config: EdmConfig) -> None:
        super().__init__()
        style = STYLES[config.architecture]
        self.adm, self.classes = style.adm, config.classes
        c, embedding = config.model_channels, 4 * config.model_channels
        width = 2 * c if style.fourier else c

        self.map_noise = _Fourier(width) if style.fourier else _Sinusoids(width, style.adm)
        self.map_augment = self.map_label = None
        if config.augment_dim:
            gain = 0.0 if style.adm else 1.0
            self.map_augment = _linear(style, config.augment_dim, width, bias=False, gain=gain)
        if config.classes and style.adm:
            self.map_label = nn.Linear(config.classes, embedding, bias=False)
            nn.init.normal_(self.map_label.weight)  # an embedding: a one-hot vector picks one column
        elif config.classes:
            self.map_label = _linear(style, config.classes, width)
        self.map_layer0 = _linear(style, width, embedding)
        self.map_layer1 = _linear(style, embedding, embedding)

        def block(inputs: int, outputs: int, **options: Any) -> _Block:
            return _Block(style, inputs, outputs, embedding, dropout=config.dropout, **options)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [(config.resolution >> i, c * m) for i, m in enumerate(config.channel_mult)]
        skips: list[int] = []  # channels of what the decoder takes over, in the encoder's order
        here, pyramid = config.channels, config.channels
        for level, (r, channels) in enumerate(levels):
            if level == 0:
                here = channels if style.adm else c
                self.enc[f"{r}x{r}_conv"] = _Conv(style, config.channels, here, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(here, here, resample="down")
                if style.pyramid:
                    down = _Conv(style, pyramid, here, 3, resample="down", fused=True)
                    self.enc[f"{r}x{r}_aux_residual"] = down
                    pyramid = here
            skips.append(here)
            for i in range(config.blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(here, channels, attention=r in config.attention)
                here = channels
                skips.append(here)
        for level, (r, channels) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{r}x{r}_in0"] = block(here, here, attention=True)
                self.dec[f"{r}x{r}_in1"] = block(here, here)
            else:
                self.dec[f"{r}x{r}_up"] = block(here, here, resample="up")
            for i in range(config.blocks + 1):
                # DDPM++ and NCSN++ attend once a level on the way up, ADM after every block.
                attends = r in config.attention and (style.adm or i == config.blocks)
                self.dec[f"{r}x{r}_block{i}"] = block(here + skips.pop(), channels, attention=attends)
                here = channels
        norm = _Norm(here, style.eps)
        conv = _Conv(style, here, config.channels, 3, gain=0.0 if style.adm else 1e-5)
        if style.adm:
            self.out_norm, self.out_conv = norm, conv
        else:
            r = config.resolution
            self.dec[f"{r}x{r}_aux_norm"], self.dec[f"{r}x{r}_aux_conv"] = norm, conv

    def embed(self, c_noise: Tensor, labels: Tensor, augment: Tensor | None) -> Tensor:
        """c_noise (B,), labels (B, classes), augment (B, augment_dim) → (B, 4·model_channels), all fp32."""
        embedding = self.map_noise(c_noise)
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        if self.map_label is not None and not self.adm:
            embedding = embedding + self.map_label(labels * math.sqrt(self.classes))
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None and self.adm:
            embedding = embedding + self.map_label(labels)
        return F.silu(embedding)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor, augment: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """F(x) (B, C, H, W) and the encoder's last activations (B, C', h, w), in x's dtype. See `embed`."""
        embedding = self.embed(c_noise, labels, augment)
        skips: list[Tensor] = []
        pyramid = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = pyramid = (x + layer(pyramid)) * math.sqrt(0.5)
                skips[-1] = x
            else:
                x = layer(x, embedding) if isinstance(layer, _Block) else layer(x)
                skips.append(x)
        bottleneck = x
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            if isinstance(layer, _Block):
                x = layer(x, embedding)
            elif isinstance(layer, _Norm):
                x = F.silu(layer(x))
            else:
                x = layer(x)
        if self.adm:
            x = self.out_conv(F.silu(self.out_norm(x)))
        return x, bottleneck


def _channels_last(module: Any) -> Any:
    return module.to(memory_format=torch.channels_last)


class EdmNetwork(nn.Module):
    """The preconditioned network D (Karras et al. 2022, eq. 7), trainable, newly initialised.

    Args:
        config: what to build.
        dtype: what convolutions and attention run in. Parameters stay fp32 (see `load_edm` for others), and the
            embedding is always fp32: bf16 has too few digits for its phases.
    """

    def __init__(self, config: EdmConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = UNet(config)
        _channels_last(self)

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor, augment: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x0 and the bottleneck.

        Args:
            x: (B, C, H, W) fp32, pictures in [−1, 1] plus σ·n.
            sigma: (B,) > 0.
            labels: (B, classes) one-hot, zeros for no class; (B, 0) where there are no classes.
            augment: (B, augment_dim) what was done to the pictures; None for nothing.

        Returns:
            x0 (B, C, H, W) and the last activations of the encoder (B, C', h, w), fp32.

        Raises:
            ValueError: a shape is not as above.
        """
        config = self.config
        shape = (len(x), config.channels, config.resolution, config.resolution)
        if x.shape != shape or sigma.shape != shape[:1] or labels.shape != (len(x), config.classes):
            raise ValueError(
                f"expected x {shape}, sigma {shape[:1]} and labels {(len(x), config.classes)}, not "
                f"{tuple(x.shape)}, {tuple(sigma.shape)} and {tuple(labels.shape)}"
            )
        # Karras et al. 2022, table 1, with ε of Song et al. 2023, app. C, where `boundary` is not 0
        s, d, epsilon = per_image(sigma.float(), x), config.sigma_data, config.boundary
        norm = (s**2 + d**2).sqrt()
        c_skip = d**2 / ((s - epsilon) ** 2 + d**2)
        c_out = (s - epsilon) * d / norm
        scaled = (x / norm).to(self.dtype).contiguous(memory_format=torch.channels_last)
        output, bottleneck = self.model(scaled, sigma.float().log() / 4, labels.float(), augment)
        return c_skip * x + c_out * output.float(), bottleneck.float()


# The adapter


@dataclass(frozen=True)
class ClassCondition:
    """What an EDM network is conditioned on, for a batch of B."""

    labels: Tensor
    """(B, classes) fp32, one-hot; zeros for no class"""

    @classmethod
    def of(cls, indices: Tensor, classes: int) -> ClassCondition:
        """Of int64 (B,) class numbers, −1 for none, on their device.

        Raises:
            UserError: there is no such class.
        """
        wrong = [i for i in indices.tolist() if not -1 <= i < classes]
        if wrong:
            expected = f"expected 0 to {classes - 1}, or -1 for any" if classes else "these weights know no classes"
            raise UserError(f"class {wrong[0]}: {expected}")
        return cls((indices[:, None] == torch.arange(classes, device=indices.device)).float())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> ClassCondition:
        return ClassCondition(self.labels[index])

    def to(self, device: torch.device | str) -> ClassCondition:
        return ClassCondition(self.labels.to(device))

    def detach(self) -> ClassCondition:
        return ClassCondition(self.labels.detach())

    def cat(self, *others: ClassCondition) -> ClassCondition:
        """The conditions one after another in one batch."""
        return ClassCondition(torch.cat([self.labels, *(other.labels for other in others)]))

    def unconditional(self) -> ClassCondition:
        """No class."""
        return ClassCondition(torch.zeros_like(self.labels))

    def masked(self, keep: Tensor) -> ClassCondition:
        """Unconditional wherever bool (B,) `keep` is false."""
        return ClassCondition(self.labels * keep[:, None])


class Edm:
    """An `EdmNetwork` as x0(x, σ, cond). See `dmd2.denoiser.Denoiser`.

    Args:
        network: its `dtype` says what it runs in.
        compile: compile the network at its first call (one graph for each new shape).
    """

    def __init__(self, network: EdmNetwork, *, compile: bool = False) -> None:
        self.network, self.config = network, network.config
        self.device = next(network.parameters()).device
        table = karras_sigmas(1000, self.config.sigma_min, self.config.sigma_max)
        self.sigmas = table.float().to(self.device)
        self._network: Any = torch.compile(network) if compile else network

    def __call__(self, x: Tensor, sigma: Tensor, cond: ClassCondition) -> Tensor:
        return self.features(x, sigma, cond)[0]

    def features(self, x: Tensor, sigma: Tensor, cond: ClassCondition) -> tuple[Tensor, Tensor]:
        x0, bottleneck = self._network(x, sigma, cond.labels)
        return x0, bottleneck

    def start(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """σ·n: at σ_max = 80 the picture below it is lost."""
        return per_image(sigma, noise) * noise

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,) λ(σ) = (σ² + σ_data²)/(σ·σ_data)²: every level then weighs the same at first (Karras et al. 2022,
        eq. 8)."""
        return sigma**-2 + self.config.sigma_data**-2


class RgbCodec:
    """Pixels themselves, as a `Codec`: 0 … 255 ↔ [−1, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → fp32 in [−1, 1]."""
        return images.float() / 127.5 - 1

    def decode(self, x: Tensor) -> Tensor:
        """fp32 (B, 3, H, W) → uint8; what is beyond [−1, 1] is clipped."""
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


# Folders


def expect_new(folder: Path) -> None:
    """Raises UserError if there is anything at `folder`, but for an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; expected a new or empty folder to write to")


def save_edm(folder: Path, network: EdmNetwork, *, name: str, licence: str, recipe: Mapping[str, Any]) -> None:
    """Writes a new `folder`: the network's `config.json`, its weights in their own dtype, and `dmd2.json`.

    The folder appears whole or not at all. `recipe` goes into the safetensors metadata.

    Raises:
        UserError: `folder` is a file, or a folder that is not empty.
    """
    expect_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    metadata = {"format": "pt", "recipe": json.dumps(recipe)}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        atomic_text(new / CONFIG_FILE, network.config.model_dump_json(indent=2) + "\n")
        write_atomically(new / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata))
        (new / WEIGHTS_FILE).chmod(0o644)  # safetensors makes files that only their owner can read
        size = (network.config.resolution, network.config.resolution)
        write_manifest(new, Manifest(name=name, family="edm", native_size=size, licence=licence))
        new.rename(folder)


def load_edm(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    dropout: float = 0.0,
    compile: bool = False,
) -> Edm:
    """The network in a folder that `save_edm` wrote, frozen.

    Args:
        folder: holds `dmd2.json`, `config.json` and `model.safetensors`.
        device: where to.
        dtype: of convolutions and norms, and what they run in. To train in bf16, load fp32, which keeps the
            parameters fp32, and set `network.dtype` to bf16.
        dropout: of a network in training mode, instead of what it was first trained with. Distillation uses none.
        compile: see `Edm`.

    Raises:
        UserError: a file is missing, damaged or not what it should be.
    """
    manifest = read_manifest(folder)
    if manifest.family != "edm":
        raise UserError(f"{folder}: weights of the family {manifest.family!r}; expected 'edm'")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; these weights are incomplete")
    verify(folder, manifest)
    config = _read_config(folder / CONFIG_FILE)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: not safetensors, or damaged ({error})") from error
    network = network_of(config.model_copy(update={"dropout": dropout}), tensors, folder / WEIGHTS_FILE)
    network.to(device, torch.float32)
    network.dtype = dtype
    for module in network.modules():
        if isinstance(module, (_Conv, _Norm)):
            module.to(dtype)
    return Edm(_channels_last(network).requires_grad_(False).eval(), compile=compile)


def _read_config(path: Path) -> EdmConfig:
    try:
        return EdmConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}") from None


def first_error(error: ValidationError) -> str:
    """The first of pydantic's complaints, as part of a line."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")


def network_of(config: EdmConfig, tensors: Mapping[str, Tensor], source: Path) -> EdmNetwork:
    """The network of `config` with `tensors`, which must be its parameters and buffers, all and only, by name.

    Raises:
        UserError: naming `source` and the first tensor that lacks, is too many or does not fit.
    """
    with torch.device("meta"):
        network = EdmNetwork(config)
    expected = network.state_dict()
    what = f"{config.architecture} network of {config.resolution}x{config.resolution} pixels"
    for name in expected:
        if name not in tensors:
            raise UserError(f"{source}: lacks the tensor {name} of the {what}")
    for name, value in tensors.items():
        if name not in expected:
            raise UserError(f"{source}: holds the tensor {name[:200]!r}, which the {what} does not have")
        if value.shape != expected[name].shape or not value.is_floating_point():
            raise UserError(
                f"{source}: the tensor {name} is {value.dtype} {tuple(value.shape)}; "
                f"the {what} needs floats {tuple(expected[name].shape)}"
            )
        taps = STYLES[config.architecture].taps
        if name.endswith(".resample_filter") and not torch.allclose(value.float(), resample_filter(taps)):
            raise UserError(f"{source}: the tensor {name} is not the filter {taps} of the {what}")
    network.load_state_dict(dict(tensors), assign=True)
    return network
