"""Diffusion in pixel space: EDM's networks (DDPM++, NCSN++, ADM), their preconditioning.

Written from the papers: Karras et al. 2022 (EDM, arXiv 2206.00364), Song et al. 2021 (DDPM++ and NCSN++, 2011.13456),
Dhariwal & Nichol 2021 (ADM, 2105.05233). Parameters have the names of EDM's published checkpoints, so those load.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Condition
from dmd2.diffusion.noise import karras_sigmas, per_image
from dmd2.models.edm.layers import STYLES, Block, Conv, Fourier, Norm, Sinusoids, adm_heads, linear
from dmd2.models.edm.preconditioning import Kind, precondition
from dmd2.runtime.errors import UserError

Count = Annotated[int, Field(ge=1, le=16)]
Level = Annotated[float, Field(gt=0, le=1e6)]


class EdmConfig(BaseModel):
    """`config.json` of an EDM network: all that it takes to build it and to use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    architecture: Literal["ddpmpp", "ncsnpp", "adm"]
    resolution: int = Field(ge=4, le=1024)
    """side of the square images, in pixels"""
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
    preconditioning: Kind = "edm"
    """what surrounds the raw network; see `dmd2.models.edm.preconditioning`"""
    embedding_mult: Count = 4
    """channels of the embedding, in units of `model_channels`"""
    sigmas: tuple[Level, ...] = ()
    """descending levels that a student was distilled for, one a step; empty: a teacher"""

    @model_validator(mode="after")
    def _check(self) -> EdmConfig:
        last = self.resolution / 2 ** (len(self.channel_mult) - 1)
        if last < 1 or last != int(last):
            raise ValueError(f"resolution {self.resolution} cannot be halved {len(self.channel_mult) - 1} times")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        if self.boundary and self.preconditioning != "edm":
            raise ValueError(
                f"boundary {self.boundary:g}: expected 0 with the preconditioning {self.preconditioning}"
            )
        if any(a <= b for a, b in pairwise(self.sigmas)):
            raise ValueError("sigmas: expected descending levels")
        widths = [self.model_channels * m for m in self.channel_mult]
        # A norm has min(32, channels / 4) groups. It sees any width, and in the decoder the sum of any two.
        if any((a + b) % min(32, (a + b) // 4) for a in (0, self.model_channels, *widths) for b in widths):
            raise ValueError(f"model_channels {self.model_channels}: cannot be split into groups of normalisation")
        attending = [w for i, w in enumerate(widths) if self.resolution >> i in self.attention] + widths[-1:]
        for w in attending if self.architecture == "adm" else ():
            if w % max(1, adm_heads(w)):
                raise ValueError(f"model_channels {self.model_channels}: {w} do not make {adm_heads(w)} equal heads")
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


class UNet(nn.Module):
    """The raw network F (Karras et al. 2022, eq. 7): DDPM++, NCSN++ or ADM."""

    def __init__(self, config: EdmConfig) -> None:
        super().__init__()
        style = STYLES[config.architecture]
        self.adm, self.classes = style.adm, config.classes
        c, embedding = config.model_channels, config.embedding_mult * config.model_channels
        width = 2 * c if style.fourier else c

        self.map_noise = Fourier(width) if style.fourier else Sinusoids(width, style.adm)
        self.map_augment = self.map_label = None
        if config.augment_dim:
            gain = 0.0 if style.adm else 1.0
            self.map_augment = linear(style, config.augment_dim, width, bias=False, gain=gain)
        if config.classes and style.adm:
            self.map_label = nn.Linear(config.classes, embedding, bias=False)
            nn.init.normal_(self.map_label.weight)  # an embedding: a one-hot vector picks one column
        elif config.classes:
            self.map_label = linear(style, config.classes, width)
        self.map_layer0 = linear(style, width, embedding)
        self.map_layer1 = linear(style, embedding, embedding)

        def block(inputs: int, outputs: int, **options: Any) -> Block:
            return Block(style, inputs, outputs, embedding, dropout=config.dropout, **options)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [(config.resolution >> i, c * m) for i, m in enumerate(config.channel_mult)]
        skips: list[int] = []  # channels of what the decoder takes over, in the encoder's order
        here, pyramid = config.channels, config.channels
        for level, (r, channels) in enumerate(levels):
            if level == 0:
                here = channels if style.adm else c
                self.enc[f"{r}x{r}_conv"] = Conv(style, config.channels, here, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(here, here, resample="down")
                if style.pyramid:
                    down = Conv(style, pyramid, here, 3, resample="down", fused=True)
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
        norm = Norm(here, style.eps)
        # iDDPM's networks also predict a variance, which nothing here reads.
        outputs = config.channels * (2 if config.preconditioning == "iddpm" else 1)
        conv = Conv(style, here, outputs, 3, gain=0.0 if style.adm else 1e-5)
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
        self, x: Tensor, c_noise: Tensor, labels: Tensor, augment: Tensor | None = None, first: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """F(x) (B, C, H, W) and the encoder's last activations (B, C', h, w), in x's dtype. See `embed`.

        With `first` only that many rows are decoded.
        """
        embedding = self.embed(c_noise, labels, augment)
        skips = self.encode(x, embedding)
        bottleneck = skips[-1]
        if first is not None:
            skips, embedding = [skip[:first] for skip in skips], embedding[:first]
        x = skips[-1]
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            if isinstance(layer, Block):
                x = layer(x, embedding)
            elif isinstance(layer, Norm):
                x = F.silu(layer(x))
            else:
                x = layer(x)
        if self.adm:
            x = self.out_conv(F.silu(self.out_norm(x)))
        return x, bottleneck

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """What the decoder takes over, finest first."""
        skips: list[Tensor] = []
        pyramid = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = pyramid = (x + layer(pyramid)) * math.sqrt(0.5)
                skips[-1] = x
            else:
                x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        return skips


def channels_last(module: Any) -> Any:
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
        channels_last(self)

    def cast(self, dtype: torch.dtype) -> None:
        """Has convolutions and norms hold their parameters, and compute, in `dtype`."""
        self.dtype = dtype
        for module in self.modules():
            if isinstance(module, (Conv, Norm)):
                module.to(dtype)

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor, augment: Tensor | None = None, first: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """x0 and the bottleneck.

        Args:
            x: (B, C, H, W) fp32, images in [−1, 1] plus σ·n.
            sigma: (B,) > 0.
            labels: (B, classes) one-hot, zeros for no class; (B, 0) where there are no classes.
            augment: (B, augment_dim) what was done to the images; None for nothing.
            first: how many rows are denoised, the first ones; None for all. The others end at the bottleneck.

        Returns:
            x0 (B, C, H, W), or of fewer rows, and the last activations of the encoder (B, C', h, w), fp32.

        Raises:
            ValueError: a shape is not as above.
        """
        scaled, c_skip, c_out, c_noise = self._precondition(x, sigma, labels)
        output, bottleneck = self.model(scaled, c_noise, labels.float(), augment, first)
        kept = c_skip[:first] * x[:first]
        return kept + c_out[:first] * output[:, : x.shape[1]].float(), bottleneck.float()

    entry_points = ("bottleneck",)
    """what else it is called by than as a whole"""

    def bottleneck(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """What `forward` returns beside x0; the decoder is not run."""
        scaled, _, _, c_noise = self._precondition(x, sigma, labels)
        embedding = self.model.embed(c_noise, labels.float(), None)
        return self.model.encode(scaled, embedding)[-1].float()

    def _precondition(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The raw network's input, c_skip, c_out and c_noise."""
        config = self.config
        shape = (len(x), config.channels, config.resolution, config.resolution)
        if x.shape != shape or sigma.shape != shape[:1] or labels.shape != (len(x), config.classes):
            raise ValueError(
                f"expected x {shape}, sigma {shape[:1]} and labels {(len(x), config.classes)}, not "
                f"{tuple(x.shape)}, {tuple(sigma.shape)} and {tuple(labels.shape)}"
            )
        c_skip, c_out, c_in, c_noise = precondition(config.preconditioning, sigma, config.sigma_data, config.boundary)
        scaled = (x * per_image(c_in, x)).to(self.dtype).contiguous(memory_format=torch.channels_last)
        return scaled, per_image(c_skip, x), per_image(c_out, x), c_noise


# The adapter


@dataclass(frozen=True)
class ClassCondition(Condition):
    """What an EDM network is conditioned on, for a batch of B."""

    labels: Tensor
    """(B, classes) fp32, one-hot; zeros for no class"""
    augment: Tensor | None = None
    """(B, augment_dim) what was done to the images, in a teacher's training"""

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

    def augmented(self, augment: Tensor) -> ClassCondition:
        return ClassCondition(self.labels, augment)

    @property
    def length(self) -> int:
        """All go into one batch."""
        return 1

    def unconditional(self) -> ClassCondition:
        """No class."""
        return ClassCondition(torch.zeros_like(self.labels))

    def masked(self, keep: Tensor) -> ClassCondition:
        """Unconditional wherever bool (B,) `keep` is false."""
        return ClassCondition(self.labels * keep[:, None])


class Edm:
    """An `EdmNetwork` as x0(x, σ, cond). See `dmd2.diffusion.denoiser.Denoiser`.

    Args:
        network: its `dtype` says what it runs in.
        compile: compile the network at its first call (one graph for each new shape).
    """

    inpaints = False
    takes_first = True

    def __init__(self, network: EdmNetwork, *, compile: bool = False) -> None:
        self.network, self.config = network, network.config
        self.device = next(network.parameters()).device
        self.table = karras_sigmas(1000, self.config.sigma_min, self.config.sigma_max)
        self.sigmas = self.table.float().to(self.device)
        self._network: Any = torch.compile(network) if compile else network
        self._encoder: Any = torch.compile(network.bottleneck) if compile else network.bottleneck

    def __call__(self, x: Tensor, sigma: Tensor, cond: ClassCondition) -> Tensor:
        return self.features(x, sigma, cond)[0]

    def features(
        self, x: Tensor, sigma: Tensor, cond: ClassCondition, *, first: int | None = None
    ) -> tuple[Tensor, Tensor]:
        fewer = {} if first is None else {"first": first}
        x0, bottleneck = self._network(x, sigma, cond.labels, cond.augment, **fewer)
        return x0, bottleneck

    def bottleneck(self, x: Tensor, sigma: Tensor, cond: ClassCondition) -> Tensor:
        """The second of `features`, for half of the work: the decoder is not run."""
        bottleneck: Tensor = self._encoder(x, sigma, cond.labels)
        return bottleneck

    def recording(self) -> AbstractContextManager[None]:
        """As `StableDiffusion.recording`; there is nothing to record."""
        return nullcontext()

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """σ·n: at σ_max = 80 the image below it is lost."""
        return per_image(sigma, noise) * noise

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,) λ(σ) = (σ² + σ_data²)/(σ·σ_data)²: every level then weighs the same at first (Karras et al. 2022,
        eq. 8)."""
        return sigma**-2 + self.config.sigma_data**-2


class RgbCodec:
    """Pixels themselves, as a `Codec`: 0 … 255 ↔ [−1, 1]."""

    factor = 1
    channels = 3

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → fp32 in [−1, 1]."""
        return images.float() / 127.5 - 1

    def decode(self, x: Tensor) -> Tensor:
        """fp32 (B, 3, H, W) → uint8; what is beyond [−1, 1] is clipped."""
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
