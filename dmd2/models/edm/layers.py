"""The layers of EDM's networks, and where DDPM++, NCSN++ and ADM differ in them. See `dmd2/models/edm/network.py`.

Each layer works in the dtype of its input, whatever the dtype of its weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.runtime.loading import GroupNorm

MAX_POSITIONS = 10_000  # longest period of the sinusoidal embedding (Vaswani et al. 2017, sec. 3.5)
FOURIER_SCALE = 16.0  # standard deviation of the random frequencies (Song et al. 2021, app. C)
ADM_HEAD_CHANNELS = 64  # Dhariwal & Nichol 2021, sec. 3


def adm_heads(channels: int) -> int:
    """Of ADM's attention, as EDM's code counts them: 96 channels make one head of 96; fewer than 64 none."""
    return channels // ADM_HEAD_CHANNELS


Resample = Literal["up", "down"]


@dataclass(frozen=True)
class Style:
    """Where the three architectures differ (Karras et al. 2022, table 1 and app. C)."""

    adm: bool
    """scale and shift from the embedding, heads of 64 channels, PyTorch's initialisation, zero last layers"""
    fourier: bool
    """random Fourier features of the noise level, twice as wide; else sinusoids at fixed frequencies"""
    taps: tuple[int, ...]
    """1-d filter around resampling by two"""
    pyramid: bool
    """the noisy image itself, ever smaller, is added to every level of the encoder"""
    eps: float
    """of group normalisation"""
    residual_scale: float
    """what a sum of two branches is multiplied by"""


STYLES = {
    "ddpmpp": Style(False, False, (1, 1), False, 1e-6, math.sqrt(0.5)),
    "ncsnpp": Style(False, True, (1, 3, 3, 1), True, 1e-6, math.sqrt(0.5)),
    "adm": Style(True, False, (1, 1), False, 1e-5, 1.0),
}


def _initialise(style: Style, weight: Tensor, bias: Tensor | None, gain: float) -> None:
    if style.adm:  # PyTorch's own default: both uniform in ±1/√(fan in)
        bound = gain / math.sqrt(weight[0].numel())
        nn.init.uniform_(weight, -bound, bound)
        if bias is not None:
            nn.init.uniform_(bias, -bound, bound)
    else:
        nn.init.xavier_uniform_(weight, gain)
        if bias is not None:
            nn.init.zeros_(bias)


def linear(style: Style, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias)
    _initialise(style, layer.weight, layer.bias, gain)
    return layer


class Norm(GroupNorm):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalised(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def resample_filter(taps: tuple[int, ...]) -> Tensor:
    """The 2-d filter (1, 1, k, k), fp32, that sums to 1, of the 1-d one."""
    f = torch.tensor(taps, dtype=torch.float32)
    return (f.outer(f) / f.sum() ** 2)[None, None]


class Conv(nn.Module):
    """A convolution, of an image filtered and resampled by two if asked. Kernel 0: only resamples.

    `fused` convolves before it filters and drops pixels. The image's surroundings are then zeros to the
    convolution but not to the filter, so the numbers at the border differ.
    """

    resample_filter: Tensor

    def __init__(
        self,
        style: Style,
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


class Block(nn.Module):
    """Residual block, then self-attention if asked (Song et al. 2021, app. H; Dhariwal & Nichol 2021, sec. 3)."""

    def __init__(
        self,
        style: Style,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        attention: bool = False,
        resample: Resample | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.adm, self.residual_scale, self.dropout = style.adm, style.residual_scale, nn.Dropout(dropout)
        last_gain = 0.0 if style.adm else 1e-5  # a new block does next to nothing
        self.norm0 = Norm(inputs, style.eps)
        self.conv0 = Conv(style, inputs, outputs, 3, resample=resample)
        self.affine = linear(style, embedding, outputs * (2 if style.adm else 1))
        self.norm1 = Norm(outputs, style.eps)
        self.conv1 = Conv(style, outputs, outputs, 3, gain=last_gain)
        self.skip = None
        if inputs != outputs or resample:
            self.skip = Conv(style, inputs, outputs, 0 if style.adm and inputs == outputs else 1, resample=resample)
        self.heads = (adm_heads(outputs) if style.adm else 1) if attention else 0
        if self.heads:
            self.norm2 = Norm(outputs, style.eps)
            self.qkv = Conv(style, outputs, 3 * outputs, 1, gain=1.0 if style.adm else math.sqrt(0.2))
            self.proj = Conv(style, outputs, outputs, 1, gain=last_gain)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, E) fp32 → (B, C', H', W') in x's dtype."""
        h = self.conv0(F.silu(self.norm0(x)))
        parameters = self.affine(embedding).to(h.dtype)[:, :, None, None]
        if self.adm:
            scale, shift = parameters.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + parameters))
        h = self.conv1(self.dropout(h))
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


class Sinusoids(nn.Module):
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


class Fourier(nn.Module):
    """Sines and cosines of c_noise at random frequencies (Tancik et al. 2020; Song et al. 2021, app. C)."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * FOURIER_SCALE)

    def forward(self, c_noise: Tensor) -> Tensor:
        """(B,) fp32 → (B, C)."""
        phase = c_noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([phase.sin(), phase.cos()], dim=1)
