"""Stable Diffusion as a `Denoiser`: diffusers' UNet (SD 1.5, SDXL), the text encoders, the latent codec.

This is the only file that knows integer timesteps, ᾱ, eps- and v-prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from dmd2.diffusion.noise import per_image, sd_sigmas
from dmd2.models.stable_diffusion.text import TextCondition
from dmd2.runtime.compiled import Compiler, Traced
from dmd2.runtime.errors import UserError
from dmd2.runtime.loading import Deferred

INPAINTING_CHANNELS = 9
"""latents to denoise, the mask, the latents of what is not masked"""

PredictionType = Literal["epsilon", "v_prediction"]

Control = Callable[[Tensor, Tensor, TextCondition], dict[str, Any]]
"""What the UNet is given besides in a step: (its input (B, C, h, w), timesteps (B,), condition) in its own dtype →
keyword arguments of its `forward`. See `dmd2.models.adapters.control`."""


class StableDiffusion:
    """A `UNet2DConditionModel` as x0(x, σ, cond). See `dmd2.diffusion.denoiser.Denoiser`.

    Args:
        unet: eps- or v-predicting, in any dtype; or a `Deferred` one, with `run`, `device` and `dtype`.
        prediction_type: what the UNet's output means: the scheduler's `prediction_type`.
        sigmas: (1000,) ascending; SD's own table by default.
        autocast: run the network in this dtype under autocast (for fp32 master weights); None runs it in
            the dtype of its weights.
        compile: compile the network at its first call (one graph for each new shape).
        trace: allow `recording()`: the same numbers without Python's overhead, for small networks on a CPU. No
            gradients. Needs no compiler.
        compiler: allow `recording()` on a GPU: see `dmd2.runtime.compiled`. No gradients.
        device: where the network runs, if its weights are not there yet.
        dtype: of its weights, if they are not there yet.
        run: what else than torch runs the network where it can: for sizes that the blocks halve without remainder,
            without control and with the weights as they are. Its arguments and results are `WithBottleneck`'s.
        adapter: what surrounds each call: a LoRA in training, see `Adapted.active`.
    """

    takes_first = True

    def __init__(
        self,
        unet: Any,
        prediction_type: PredictionType = "epsilon",
        sigmas: Tensor | None = None,
        *,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        trace: bool = False,
        compiler: Compiler | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        run: Callable[..., Any] | None = None,
        adapter: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type: expected 'epsilon' or 'v_prediction', not {prediction_type!r}")
        self._unet, self.prediction_type, self.autocast = Deferred.of(unet), prediction_type, autocast
        self._adapter, self._run = adapter, run
        if device is None or dtype is None:
            parameter = next(self.unet.parameters())
            device, dtype = device or parameter.device, parameter.dtype
        self.device, self.dtype = device, dtype
        self.config: Any = self._unet.config
        self.table = sd_sigmas() if sigmas is None else sigmas.double()
        """`sigmas` in float64, on the CPU"""
        self.sigmas = self.table.float().to(self.device)
        self._log_sigmas = self.table.log().to(self.device)
        self._half: Any = None
        self._compile = compile
        self._traced = Traced(self._plain) if trace and compiler is None and run is None else None
        self._recorder = compiler or self._traced
        self._compiler = compiler
        self._guided: dict[str, Any] = {}
        self._network: Any = self._traced or run or self._plain
        if compile:
            self._network = torch.compile(self._plain)
        elif compiler is not None:
            self._network = compiler(self._plain, blocks=self.unet)
        self.inpaints: bool = self.config.in_channels == INPAINTING_CHANNELS
        """whether each call needs what is known of the image, see `features`"""
        self.weights_changed = False
        """set by who changes the UNet's weights for a while: records of it, which hold the old ones, are not used"""

    @property
    def unet(self) -> Any:
        """diffusers' own."""
        return self._unet.network

    @cached_property
    def _plain(self) -> WithBottleneck:
        return WithBottleneck(self.unet)

    def recording(self) -> AbstractContextManager[None]:
        """Calls in here record the network for their shapes, where that was asked for; later ones replay it.

        A trace serves every batch size. It is made in about a second. Trace with a batch of two or more: sizes of
        one are taken for constants. What is compiled serves its own batch size and those put together from it.
        """
        return nullcontext() if self._recorder is None else self._recorder.recording()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) index in the σ table of each (B,) σ: exactly an integer at the table's own entries.

        All of it happens where the table is: a host that asked for a value would wait for all that a GPU has to do.
        """
        table = self._log_sigmas
        log_sigma = sigma.detach().to(table.device).double().log().clamp(table[0], table[-1])
        low = (torch.searchsorted(table, log_sigma, right=True) - 1).clamp(0, len(table) - 2)
        fraction = (log_sigma - table[low]) / (table[low + 1] - table[low])
        index = low + fraction
        nearest = index.round()
        # σ arrives in float32: what is within its rounding of a table entry is that entry.
        return torch.where((index - nearest).abs() < 1e-3, nearest, index).float()

    def __call__(self, x: Tensor, sigma: Tensor, cond: TextCondition, *given: Any, **named: Any) -> Tensor:
        """The first of `features`, of the same arguments."""
        return self.features(x, sigma, cond, *given, **named)[0]

    def features(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: TextCondition,
        control: Control | None = None,
        known: Tensor | None = None,
        *,
        first: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Denoiser`. With `control` no trace is used. `first` is for networks in training.

        `known` (1, 5, h, w) is for a network that inpaints (Rombach et al. 2022, sec. 4.5): the mask, 1 where to
        generate, and the latents of the image with that part grey. Its input are x's 4 channels and these.
        """
        if self.inpaints and known is None:
            raise UserError("an inpainting UNet (9 channels), and no mask: it can only be sampled, not trained")
        scaled, variance, condition = self._scaled(x, sigma, cond)
        with self._running(x):
            timestep = self.timestep(sigma)
            full = scaled
            if known is not None:
                full = torch.cat([scaled, known.to(scaled).expand(len(x), -1, -1, -1)], dim=1)
            inputs = (full, timestep, condition.context, condition.pooled, condition.time_ids)
            if control is not None:
                output, bottleneck = self._with(control(scaled, timestep, condition), inputs)
            elif (self.weights_changed and self._recorded) or not self._fits(full):
                output, bottleneck = self._plain(*inputs)
            elif first is not None:
                output, bottleneck = self._network(*inputs, first=first)
            else:
                output, bottleneck = self._network(*inputs)
        x0 = self._x0(x[:first], per_image(sigma[:first], x), variance[:first], output.float())
        return x0, bottleneck.float()

    def _with(self, residuals: dict[str, Any], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """The network with what a control adds: prepared like the network alone."""
        if self._compiler is None:
            return self._plain(*inputs, **residuals)
        flat, structure = tree_flatten(residuals)

        def run(*given: Tensor | None) -> Any:
            return self._plain(*given[: len(inputs)], **tree_unflatten(given[len(inputs) :], structure))

        key = str(structure)
        if key not in self._guided:
            self._guided[key] = self._compiler(run, blocks=self.unet)
        return self._guided[key](*inputs, *flat)

    def bottleneck(self, x: Tensor, sigma: Tensor, cond: TextCondition) -> Tensor:
        """The second of `features` alone, (B, C', h, w): the way up is not run."""
        if self._half is None:  # not before: adapters replace modules of the UNet
            self._half = torch.compile(_half(self.unet)) if self._compile else _half(self.unet)
        scaled, _, condition = self._scaled(x, sigma, cond)
        given = condition.context, condition.pooled, condition.time_ids
        with self._running(x):
            middle: Tensor = _call(self._half, scaled, self.timestep(sigma), *given)
        return middle.float()

    def _scaled(self, x: Tensor, sigma: Tensor, cond: TextCondition) -> tuple[Tensor, Tensor, TextCondition]:
        """x as the UNet sees it, its variance (B, 1, 1, 1) before that, and the condition in the UNet's dtype."""
        variance = 1 + per_image(sigma, x) ** 2  # of x, for latents of unit variance
        condition = cond if self.autocast else cond.map(lambda value: value.to(self.dtype))
        return (x / variance.sqrt()).to(self.dtype), variance, condition

    @contextmanager
    def _running(self, x: Tensor) -> Iterator[None]:
        with self._adapter(), torch.autocast(x.device.type, self.autocast) if self.autocast else nullcontext():
            yield

    @property
    def _recorded(self) -> bool:
        """Whether the weights are elsewhere, too."""
        return self._traced is not None or self._run is not None

    def _fits(self, x: Tensor) -> bool:
        """Whether the network as it is prepared takes inputs of this size."""
        unit = 2 ** (len(self.config.block_out_channels) - 1)
        return self._run is None or not any(side % unit for side in x.shape[2:])

    def _x0(self, x: Tensor, sigma: Tensor, variance: Tensor, output: Tensor) -> Tensor:
        # With ᾱ = 1/(1+σ²) and x_t = √ᾱ·x, DDPM's x0 = (x_t − √(1−ᾱ)·eps)/√ᾱ becomes x − σ·eps, and
        # x0 = √ᾱ·x_t − √(1−ᾱ)·v (Salimans & Ho 2022, app. D) becomes x/(1+σ²) − σ/√(1+σ²)·v.
        if self.prediction_type == "epsilon":
            return x - sigma * output
        return x / variance - sigma / variance.sqrt() * output

    def scale_initial_noise(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """√(1+σ²)·n: the UNet then sees unit noise, whatever the timestep (DMD2's SDXL students)."""
        return noise * (1 + per_image(sigma, noise) ** 2).sqrt()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,) weight of the squared x0 error that makes it the plain MSE of the UNet's output."""
        if self.prediction_type == "epsilon":
            return sigma**-2
        return (1 + sigma**2) / sigma**2


class WithBottleneck(nn.Module):
    """The UNet's output and its mid-block's, in one forward pass (hooks, not a copied forward)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self._caught: Tensor | None = None
        self._runs = False
        self._first: int | None = None
        unet.mid_block.register_forward_hook(self._catch)
        for block in unet.up_blocks:
            block.register_forward_pre_hook(self._cut, with_kwargs=True)

    def _catch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._runs:  # not in a call of another denoiser over the same UNet: it would keep that one's graph
            self._caught = output

    def _cut(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Of what a block on the way up is given, the rows that go up."""
        if self._first is None:
            return None
        rows = self._first
        return tree_map_only(Tensor, lambda given: given[:rows], (inputs, named))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        *,
        first: int | None = None,
        **residuals: Any,
    ) -> tuple[Tensor, Tensor]:
        self._runs, self._first = True, first
        try:
            output = _call(self.unet, x, timestep, context, pooled, time_ids, **residuals)
            caught = self._caught
        finally:
            self._runs, self._first, self._caught = False, None, None
        assert caught is not None, "the UNet's mid_block was not run"
        return output, caught


class OfWaves(nn.Module):
    """`WithBottleneck`, but for timesteps and sizes, in whose place their `waves` are given.

    What computes in bf16 throughout, as OpenVINO does, would round 999 to 1000 before it takes the sine.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.network = WithBottleneck(unet)
        self._given: dict[str, Tensor] = {}
        for name in ("time_proj", "add_time_proj"):
            if hasattr(unet, name):
                getattr(unet, name).register_forward_hook(lambda *_, name=name: self._given.get(name))

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Waves: `time` (B, D) and `sizes` (B, 6 · D')."""
        self._given = {"time_proj": time} | ({} if sizes is None else {"add_time_proj": sizes})
        try:
            output, bottleneck = self.network(x, time[:, 0], context, pooled, sizes)
        finally:
            self._given = {}
        return output, bottleneck

    @staticmethod
    def run_by(run: Callable[..., Any], config: Any) -> Callable[..., Any]:
        """With the arguments of `WithBottleneck`, a function that has this class's."""

        def call(
            x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
        ) -> Any:
            time = waves(timestep, config.block_out_channels[0], config)
            if sizes is not None:
                sizes = waves(sizes.flatten(), config.addition_time_embed_dim, config).reshape(len(sizes), -1)
            return run(x, time, context, pooled, sizes)

        return call


def waves(numbers: Tensor, count: int, config: Any) -> Tensor:
    """(N,) numbers as fp32 (N, count) sines and cosines (Vaswani et al. 2017, sec. 3.5), as the UNet makes them."""
    half = count // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32) / (half - config.freq_shift)
    angles = numbers.float()[:, None] * exponents.exp().to(numbers.device)
    return torch.cat([angles.cos(), angles.sin()] if config.flip_sin_to_cos else [angles.sin(), angles.cos()], dim=1)


def _call(
    unet: Any,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    pooled: Tensor | None = None,
    time_ids: Tensor | None = None,
    **residuals: Any,
) -> Tensor:
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
    output: Tensor = unet(x, timestep, context, added_cond_kwargs=added, return_dict=False, **residuals)[0]
    return output


def _half(unet: Any) -> Any:
    """The same UNet, not a copy, up to its middle: nothing of the way up is left in it."""
    fewer = {**unet._modules, "up_blocks": nn.ModuleList(), "conv_norm_out": None, "conv_out": nn.Identity()}
    half = object.__new__(type(unet))  # `copy` of what FSDP2 has sharded first makes a UNet of SD 1.5's size
    half.__dict__ = {**unet.__dict__, "_modules": fewer}
    return half
