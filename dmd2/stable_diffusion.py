"""Stable Diffusion as a `Denoiser`: diffusers' UNet (SD 1.5, SDXL), the text encoders, the latent codec.

This is the only file that knows integer timesteps, ᾱ, eps- and v-prediction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmd2.compiled import Compiler
from dmd2.errors import UserError
from dmd2.noise import per_image, sd_sigmas

LATENT_CHANNELS = 4
INPAINTING_CHANNELS = 9
"""latents to denoise, the mask, the latents of what is not masked"""

PredictionType = Literal["epsilon", "v_prediction"]


MOST_TOKENS = 1500
"""of a prompt: 20 windows of CLIP's. Rare characters are up to four tokens each, and all the others wait meanwhile"""


@dataclass(frozen=True)
class TextCondition:
    """What an SD-family UNet is conditioned on, for a batch of B."""

    context: Tensor
    """(B, L, D) token embeddings for cross-attention"""
    pooled: Tensor | None = None
    """(B, P) pooled text embedding (SDXL only)"""
    time_ids: Tensor | None = None
    """(B, 6) original height and width, crop top and left, target height and width, in pixels (SDXL only)"""

    def _map(self, function: Any) -> TextCondition:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {k: None if v is None else function(v) for k, v in values.items()}
        return TextCondition(**mapped)

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, index: Any) -> TextCondition:
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> TextCondition:
        return self._map(lambda value: value.to(device))

    def detach(self) -> TextCondition:
        return self._map(lambda value: value.detach())

    def cat(self, *others: TextCondition) -> TextCondition:
        """The conditions one after another in one batch. Their contexts must be equally long.

        Raises:
            ValueError: they are not. (Padding would not do: a UNet's attention sees it.)
        """
        conditions = (self, *others)
        lengths = {c.context.shape[1] for c in conditions}
        if len(lengths) > 1:
            raise ValueError(f"contexts of unequal length in one batch: {sorted(lengths)}")
        return TextCondition(
            torch.cat([c.context for c in conditions]),
            None if self.pooled is None else torch.cat([c.pooled for c in conditions]),  # type: ignore[misc]
            None if self.time_ids is None else torch.cat([c.time_ids for c in conditions]),  # type: ignore[misc]
        )

    @property
    def length(self) -> int:
        """In tokens. Conditions of unequal lengths do not go into one batch."""
        return self.context.shape[1]

    def unconditional(self) -> TextCondition:
        """SDXL's "no text": zeros for sequence and pooled embedding, the sizes stay."""
        return TextCondition(
            torch.zeros_like(self.context),
            None if self.pooled is None else torch.zeros_like(self.pooled),
            self.time_ids,
        )

    def masked(self, keep: Tensor) -> TextCondition:
        """Unconditional wherever bool (B,) `keep` is false."""
        return TextCondition(
            self.context * per_image(keep, self.context),
            None if self.pooled is None else self.pooled * per_image(keep, self.pooled),
            self.time_ids,
        )


Control = Callable[[Tensor, Tensor, TextCondition], dict[str, Any]]
"""What the UNet is given besides in a step: (its input (B, 4, h, w), timesteps (B,), condition) in its own dtype →
keyword arguments of its `forward`. See `dmd2.control`."""


class StableDiffusion:
    """A `UNet2DConditionModel` as x0(x, σ, cond). See `dmd2.denoiser.Denoiser`.

    Args:
        unet: eps- or v-predicting, in any dtype.
        prediction_type: what the UNet's output means: the scheduler's `prediction_type`.
        sigmas: (1000,) ascending; SD's own table by default.
        autocast: run the network in this dtype under autocast (for fp32 master weights); None runs it in
            the dtype of its weights.
        compile: compile the network at its first call (one graph for each new shape).
        trace: allow `recording()`: the same numbers without Python's overhead, for small networks on a CPU. No
            gradients. Needs no compiler.
        compiler: allow `recording()` on a GPU: see `dmd2.compiled`. No gradients.
        device: where the network runs, if its weights are not there yet.
    """

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
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type: expected 'epsilon' or 'v_prediction', not {prediction_type!r}")
        self.unet, self.prediction_type, self.autocast = unet, prediction_type, autocast
        parameter = next(unet.parameters())
        self.device, self.dtype = device or parameter.device, parameter.dtype
        self.table = sd_sigmas() if sigmas is None else sigmas.double()
        """`sigmas` in float64, on the CPU"""
        self.sigmas = self.table.float().to(self.device)
        self._log_sigmas = self.table.log()
        self._plain, self._compiler = _WithBottleneck(unet), compiler
        self._network: Any = self._plain
        if compile:
            self._network = torch.compile(self._network)
        elif compiler is not None:
            self._network = compiler(self._plain)
        elif trace:
            self._network = _Traced(self._network)
        self.inpaints: bool = unet.config.in_channels == INPAINTING_CHANNELS
        """whether each call needs what is known of the picture, see `features`"""
        self.weights_changed = False
        """set by who changes the UNet's weights for a while: records of it, which hold the old ones, are not used"""

    def recording(self) -> AbstractContextManager[None]:
        """Calls in here record the network for their shapes, where that was asked for; later ones replay it.

        A trace serves every batch size. It is made in about a second. Trace with a batch of two or more: sizes of
        one are taken for constants. What is compiled serves its own batch size and those put together from it.
        """
        if self._compiler is not None:
            return self._compiler.recording()
        return self._network.recorded() if isinstance(self._network, _Traced) else nullcontext()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) index in the σ table of each (B,) σ: exactly an integer at the table's own entries."""
        table = self._log_sigmas
        log_sigma = sigma.detach().cpu().double().log().clamp(table[0], table[-1])
        low = (torch.searchsorted(table, log_sigma, right=True) - 1).clamp(0, len(table) - 2)
        fraction = (log_sigma - table[low]) / (table[low + 1] - table[low])
        index = low + fraction
        nearest = index.round()
        # σ arrives in float32: what is within its rounding of a table entry is that entry.
        return torch.where((index - nearest).abs() < 1e-3, nearest, index).float().to(sigma.device)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: TextCondition,
        control: Control | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        return self.features(x, sigma, cond, control, known)[0]

    def features(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: TextCondition,
        control: Control | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `dmd2.denoiser.Denoiser`. With `control` the network runs as it is, neither compiled nor replayed.

        `known` (1, 5, h, w) is for a network that inpaints (Rombach et al. 2022, sec. 4.5): the mask, 1 where to
        generate, and the latents of the image with that part grey. Its input are x's 4 channels and these.
        """
        if self.inpaints and known is None:
            raise UserError("an inpainting UNet (9 channels), and no mask: it can only be sampled, not trained")
        variance = 1 + per_image(sigma, x) ** 2  # of x, for latents of unit variance
        scaled = (x / variance.sqrt()).to(self.dtype)
        condition = cond if self.autocast else cond._map(lambda value: value.to(self.dtype))
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            timestep = self.timestep(sigma)
            full = scaled
            if known is not None:
                full = torch.cat([scaled, known.to(scaled).expand(len(x), -1, -1, -1)], dim=1)
            inputs = (full, timestep, condition.context, condition.pooled, condition.time_ids)
            if control is not None:
                output, bottleneck = self._plain(*inputs, **control(scaled, timestep, condition))
            elif self.weights_changed and isinstance(self._network, _Traced):
                output, bottleneck = self._plain(*inputs)
            else:
                output, bottleneck = self._network(*inputs)
        return self._x0(x, per_image(sigma, x), variance, output.float()), bottleneck.float()

    def _x0(self, x: Tensor, sigma: Tensor, variance: Tensor, output: Tensor) -> Tensor:
        # With ᾱ = 1/(1+σ²) and x_t = √ᾱ·x, DDPM's x0 = (x_t − √(1−ᾱ)·eps)/√ᾱ becomes x − σ·eps, and
        # x0 = √ᾱ·x_t − √(1−ᾱ)·v (Salimans & Ho 2022, app. D) becomes x/(1+σ²) − σ/√(1+σ²)·v.
        if self.prediction_type == "epsilon":
            return x - sigma * output
        return x / variance - sigma / variance.sqrt() * output

    def start(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """√(1+σ²)·n: the UNet then sees unit noise, whatever the timestep (DMD2's SDXL students)."""
        return noise * (1 + per_image(sigma, noise) ** 2).sqrt()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,) weight of the squared x0 error that makes it the plain MSE of the UNet's output."""
        if self.prediction_type == "epsilon":
            return sigma**-2
        return (1 + sigma**2) / sigma**2


class _WithBottleneck(nn.Module):
    """The UNet's output and its mid-block's, in one forward pass (a hook, not a copied forward)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self._caught: Tensor | None = None
        unet.mid_block.register_forward_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._caught = output

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor | None,
        time_ids: Tensor | None,
        **residuals: Any,
    ) -> tuple[Tensor, Tensor]:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        output = self.unet(x, timestep, context, added_cond_kwargs=added, return_dict=False, **residuals)[0]
        caught, self._caught = self._caught, None
        assert caught is not None, "the UNet's mid_block was not run"
        return output, caught


class _Traced:
    """A network and TorchScript records of it, one for each combination of input shapes but for the batch size."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()
        self.recording = False
        self._records: dict[tuple[Any, ...], Any] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def __call__(self, *inputs: Tensor | None) -> Any:
        key = tuple(None if x is None else (x.shape[1:], x.dtype) for x in inputs)
        if self.recording and key not in self._records:
            self._records[key] = self._record(inputs)
        record = self._records.get(key)
        return self.network(*inputs) if record is None else record(*(x for x in inputs if x is not None))

    def _record(self, inputs: tuple[Tensor | None, ...]) -> Any:
        present = [x is not None for x in inputs]

        def run(*given: Tensor) -> Any:
            rest = iter(given)
            return self.network(*(next(rest) if there else None for there in present))

        given = tuple(x.clone() for x in inputs if x is not None)
        # Tracing warns of each branch on a shape; a record is only ever used for the shapes it was made with.
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.jit.freeze(torch.jit.trace(_Function(self.network, run).eval(), given, check_trace=False))


class _Function(nn.Module):
    """A function as a module that owns `network`, which is what tracing and freezing want."""

    def __init__(self, network: nn.Module, run: Any) -> None:
        super().__init__()
        self.network, self._run = network, run

    def forward(self, *given: Tensor) -> Any:
        return self._run(*given)


class TextEncoder:
    """Prompts to a `TextCondition`: one CLIP encoder (SD 1.5) or two (SDXL).

    SDXL concatenates the penultimate hidden states of both and takes the second one's projected embedding as
    `pooled`. Prompts longer than the window (77 tokens in SDXL) are encoded window by window and concatenated
    along the sequence; `pooled` is then the first window's.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[nn.Module],
        *,
        compiler: Compiler | None = None,
        device: torch.device | None = None,
    ) -> None:
        if len(tokenizers) != len(encoders) or len(encoders) not in (1, 2):
            raise ValueError(f"expected one or two tokenizers and as many encoders, not {len(tokenizers)}")
        self.tokenizers, self.encoders, self._device = list(tokenizers), list(encoders), device
        run: list[Any] = [partial(_states, encoder, len(encoders) == 1) for encoder in encoders]
        # Only captured: compiling gains little on top, and takes its time.
        self._run = [compiler(function, compile=False) for function in run] if compiler else run

    def __call__(self, prompts: list[str], size: tuple[int, int]) -> TextCondition:
        """Encodes B prompts for pictures of `size` (width, height) in pixels. An empty prompt is "no text"."""
        device = self._device or next(self.encoders[0].parameters()).device
        ids = [self._windows(tokenizer, prompts) for tokenizer in self.tokenizers]
        windows = max(t.shape[1] for t in ids)
        hidden, pooled = [], None
        for tokens, tokenizer, run in zip(ids, self.tokenizers, self._run, strict=True):
            if tokens.shape[1] < windows:
                empty = self._windows(tokenizer, [""])[:, :1].expand(len(prompts), windows - tokens.shape[1], -1)
                tokens = torch.cat([tokens, empty], dim=1)
            states, *embeds = run(tokens.flatten(0, 1).to(device))
            hidden.append(states.unflatten(0, tokens.shape[:2]).flatten(1, 2))
            pooled = embeds[0].unflatten(0, tokens.shape[:2])[:, 0] if embeds else None
        keep = torch.tensor([bool(p.strip()) for p in prompts], device=device)
        context = torch.cat(hidden, dim=-1)
        if len(self.encoders) == 1:
            return TextCondition(context)
        width, height = size
        ids_row = torch.tensor([height, width, 0, 0, height, width], dtype=context.dtype, device=device)
        return TextCondition(context, pooled, ids_row.expand(len(prompts), -1)).masked(keep)

    def windows(self, prompt: str) -> int:
        """How many windows the prompt fills. Prompts of unequal numbers do not go into one batch.

        Raises:
            UserError: it has more than `MOST_TOKENS` tokens.
        """
        most = 1
        for tokenizer in self.tokenizers:
            count = len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
            if count > MOST_TOKENS:
                raise UserError(
                    f"prompt: {count} tokens (of {len(prompt)} characters); expected at most {MOST_TOKENS}"
                )
            most = max(most, -(-count // (tokenizer.model_max_length - 2)))
        return most

    @staticmethod
    def _windows(tokenizer: Any, prompts: list[str]) -> Tensor:
        """Token ids, int64 (B, windows, window length), each window with its own begin and end mark."""
        length = tokenizer.model_max_length
        body = length - 2
        rows = [tokenizer(p, add_special_tokens=False, verbose=False).input_ids for p in prompts]
        windows = max(1, *(-(-len(row) // body) for row in rows))
        out = torch.full((len(rows), windows, length), tokenizer.pad_token_id, dtype=torch.int64)
        for i, row in enumerate(rows):
            for w in range(windows):
                part = [tokenizer.bos_token_id, *row[w * body : (w + 1) * body], tokenizer.eos_token_id]
                out[i, w, : len(part)] = torch.tensor(part)
        return out


def _states(encoder: nn.Module, alone: bool, tokens: Tensor) -> tuple[Tensor, ...]:
    """Token ids (B, L) → what the UNet is conditioned on, and the projected embedding if the encoder has one."""
    out = encoder(tokens, output_hidden_states=True)
    # SDXL's two encoders give their penultimate layer; SD 1.5's only one gives its normalised last.
    states = out.last_hidden_state if alone else out.hidden_states[-2]
    embeds = getattr(out, "text_embeds", None)
    return (states,) if embeds is None else (states, embeds)


class LatentCodec:
    """A diffusers VAE (`AutoencoderKL`, `AutoencoderTiny`) as a `Codec`: uint8 pictures to latents and back."""

    def __init__(self, vae: Any, *, compiler: Compiler | None = None, device: torch.device | None = None) -> None:
        self.vae = vae
        parameter = next(vae.parameters())
        self.device, self.dtype = device or parameter.device, parameter.dtype
        self._decode: Callable[[Tensor], Tensor] = lambda z: vae.decode(z).sample
        if compiler is not None:  # one picture fills a GPU, and takes gigabytes on the way
            self._decode = compiler(self._decode, most=1)
        config = vae.config
        channels = config.get("decoder_block_out_channels", config.get("block_out_channels"))
        self.factor: int = 2 ** (len(channels) - 1)
        """pixels per latent, along each side"""
        self.channels: int = config.get("latent_channels", LATENT_CHANNELS)
        # x = (z - mean) / std, of each channel. Most VAEs have one scaling factor, Playground 2.5's the others, too.
        mean, std = config.get("latents_mean"), config.get("latents_std")
        normalised = mean is not None and std is not None
        self._mean = torch.tensor(mean if normalised else [0.0], device=self.device).float().view(1, -1, 1, 1)
        self._std = torch.tensor(std if normalised else [1.0], device=self.device).float().view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor, shown: Tensor | None = None) -> Tensor:
        """uint8 (B, 3, H, W) → fp32 (B, 4, H/f, W/f), scaled to about unit variance.

        Where bool (H, W) `shown` is false, images are taken to be mid-grey.
        """
        x = images.to(self.device).float() / 127.5 - 1
        if shown is not None:
            x = x * shown.to(x)
        x = x.contiguous(memory_format=torch.channels_last)
        encoded = self.vae.encode(x.to(self.dtype))
        z = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (z.float() - self._mean) * self.vae.config.scaling_factor / self._std

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """fp32 (B, 4, h, w) → uint8 (B, 3, h·f, w·f).

        Raises:
            ArithmeticError: the pictures, or the latents, are not finite; in bytes they would be black.
        """
        x = x.to(self.device)
        z = (x * self._std / self.vae.config.scaling_factor + self._mean).to(self.dtype)
        images = self._decode(z.contiguous(memory_format=torch.channels_last)).float()
        if not images.isfinite().all():
            raise ArithmeticError(f"the decoded picture is not finite ({self.dtype}): a number was too large for it")
        return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
