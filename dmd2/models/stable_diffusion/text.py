"""Prompts to what Stable Diffusion's UNets are conditioned on: one CLIP text encoder, or SDXL's two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Condition
from dmd2.diffusion.noise import per_image
from dmd2.runtime.compiled import Compiler
from dmd2.runtime.errors import InvalidInput
from dmd2.runtime.loading import Deferred
from dmd2.runtime.offload import upload

MOST_TOKENS = 1500
"""of a prompt, at most: 20 chunks of CLIP's window. A rare character is up to four tokens"""


@dataclass(frozen=True)
class TextCondition(Condition):
    """What an SD-family UNet is conditioned on, for a batch of B."""

    context: Tensor
    """(B, L, D) token embeddings for cross-attention"""
    pooled: Tensor | None = None
    """(B, P) pooled text embedding (SDXL only)"""
    time_ids: Tensor | None = None
    """(B, 6) original height and width, crop top and left, target height and width, in pixels (SDXL only)"""

    def cat(self, *others: TextCondition) -> TextCondition:
        """The conditions one after another in one batch. Their contexts must be equally long.

        Raises:
            ValueError: they are not. (Padding would not do: a UNet's attention sees it.)
        """
        lengths = {one.length for one in (self, *others)}
        if len(lengths) > 1:
            raise ValueError(f"contexts of unequal length in one batch: {sorted(lengths)}")
        return super().cat(*others)

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


class TextEncoder:
    """Prompts to a `TextCondition`: one CLIP encoder (SD 1.5) or two (SDXL).

    SDXL concatenates the penultimate hidden states of both and takes the second one's projected embedding as
    `pooled`. Prompts longer than the window (77 tokens in SDXL) are encoded window by window and concatenated
    along the sequence; `pooled` is then the first window's.

    Args:
        encoders: transformers' own; or `Deferred` ones, with a device.
        runs: what else than torch runs each encoder while its weights are as they are: see `States`.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[Any],
        *,
        compiler: Compiler | None = None,
        device: torch.device | None = None,
        runs: Sequence[Callable[..., Any]] = (),
    ) -> None:
        if len(tokenizers) != len(encoders) or len(encoders) not in (1, 2):
            raise ValueError(f"expected one or two tokenizers and as many encoders, not {len(tokenizers)}")
        self.tokenizers, self._device = list(tokenizers), device
        self._encoders = [Deferred.of(encoder) for encoder in encoders]
        self._run: list[Any] = list(runs) or self._plain
        if compiler:  # only captured: compiling gains little on top, and takes its time
            self._run = [compiler(function, compile=False) for function in self._run]
        self._kept = bool(runs)
        self.weights_changed = False
        """set by who changes the encoders' weights for a while: what `runs` has the old ones"""

    @property
    def encoders(self) -> list[Any]:
        """transformers' own."""
        return [encoder.network for encoder in self._encoders]

    @property
    def _plain(self) -> list[Any]:
        alone = len(self._encoders) == 1
        return [lambda tokens, one=one: _states(one.network, alone, tokens) for one in self._encoders]

    def __call__(self, prompts: list[str], size: tuple[int, int]) -> TextCondition:
        """Encodes B prompts for images of `size` (width, height) in pixels. An empty prompt is "no text"."""
        device = self._device or next(self.encoders[0].parameters()).device
        ids = [self._chunks(tokenizer, prompts) for tokenizer in self.tokenizers]
        chunks = max(t.shape[1] for t in ids)
        hidden, pooled = [], None
        runs = self._plain if self._kept and self.weights_changed else self._run
        for tokens, tokenizer, run in zip(ids, self.tokenizers, runs, strict=True):
            if tokens.shape[1] < chunks:
                empty = self._chunks(tokenizer, [""])[:, :1].expand(len(prompts), chunks - tokens.shape[1], -1)
                tokens = torch.cat([tokens, empty], dim=1)
            states, *embeds = run(upload(tokens.flatten(0, 1), device))
            hidden.append(states.unflatten(0, tokens.shape[:2]).flatten(1, 2))
            pooled = embeds[0].unflatten(0, tokens.shape[:2])[:, 0] if embeds else None
        keep = upload(torch.tensor([bool(p.strip()) for p in prompts]), device)
        context = torch.cat(hidden, dim=-1)
        if len(self._encoders) == 1:
            return TextCondition(context)
        return TextCondition(context, pooled, time_ids(size, context)).masked(keep)

    def token_chunks(self, prompt: str) -> int:
        """How many chunks of CLIP's window the prompt fills. Prompts of unequal numbers do not go into one batch.

        Raises:
            UserError: it has more than `MOST_TOKENS` tokens.
        """
        counts = [-(-self._count(t, prompt) // (t.model_max_length - 2)) for t in self.tokenizers]
        return max(1, *counts)

    def count_tokens(self, prompt: str) -> int:
        """How many tokens the prompt has. Raises as `token_chunks`."""
        return max(self._count(tokenizer, prompt) for tokenizer in self.tokenizers)

    @staticmethod
    def _count(tokenizer: Any, prompt: str) -> int:
        count = len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
        if count > MOST_TOKENS:
            raise InvalidInput(
                "prompt", f"{count} tokens (of {len(prompt)} characters); expected at most {MOST_TOKENS}"
            )
        return count

    def unconditional(self, cond: TextCondition, empty: Callable[[], TextCondition]) -> TextCondition:
        """What guidance leads away from: SD 1.5 was trained with an empty prompt there, SDXL with zeros."""
        if len(self._encoders) > 1:
            return cond.unconditional()
        one = empty()
        return TextCondition(one.context.repeat(len(cond), cond.length // one.length, 1))

    @staticmethod
    def _chunks(tokenizer: Any, prompts: list[str]) -> Tensor:
        """Token ids, int64 (B, chunks, window length), each chunk with its own begin and end mark."""
        length = tokenizer.model_max_length
        body = length - 2
        rows = [tokenizer(p, add_special_tokens=False, verbose=False).input_ids for p in prompts]
        chunks = max(1, *(-(-len(row) // body) for row in rows))
        out = torch.full((len(rows), chunks, length), tokenizer.pad_token_id, dtype=torch.int64)
        for i, row in enumerate(rows):
            for w in range(chunks):
                part = [tokenizer.bos_token_id, *row[w * body : (w + 1) * body], tokenizer.eos_token_id]
                out[i, w, : len(part)] = torch.tensor(part)
        return out


def time_ids(size: tuple[int, int], context: Tensor) -> Tensor:
    """SDXL's (B, 6) sizes for uncropped images of `size` (width, height), as many as contexts (B, L, D)."""
    width, height = size
    row = torch.tensor([height, width, 0, 0, height, width], dtype=context.dtype)
    return upload(row, context.device).expand(len(context), -1)


class States(nn.Module):
    """What one text encoder gives the UNet as a network of its own, which can be converted."""

    def __init__(self, encoder: nn.Module, alone: bool) -> None:
        super().__init__()
        self.encoder, self._alone = encoder, alone

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """int64 (B, L) → states (B, L, D), and the projected embedding (B, P) if the encoder has one."""
        return _states(self.encoder, self._alone, tokens)


class KeptTokenizer:
    """What transformers made of a tokenizer's files, by `tokenizers` alone.

    Args:
        settings: as `described` gives them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(settings["tokenizer"])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.model_max_length: int = settings["model_max_length"]
        self.pad_token_id: int = settings["pad_token_id"]
        self.bos_token_id: int = settings["bos_token_id"]
        self.eos_token_id: int = settings["eos_token_id"]

    @staticmethod
    def described(tokenizer: Any) -> dict[str, Any]:
        """A tokenizer of transformers' as JSON."""
        names = ("model_max_length", "pad_token_id", "bos_token_id", "eos_token_id")
        return {
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            **{name: getattr(tokenizer, name) for name in names},
        }

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(self, text: str, **_: Any) -> Any:
        """As transformers' own, without marks of begin and end; for what has `input_ids`."""
        return SimpleNamespace(input_ids=self._tokenizer.encode(text, add_special_tokens=False).ids)


def _states(encoder: nn.Module, alone: bool, tokens: Tensor) -> tuple[Tensor, ...]:
    """Token ids (B, L) → what the UNet is conditioned on, and the projected embedding if the encoder has one."""
    out = encoder(tokens, output_hidden_states=True)
    # SDXL's two encoders give their penultimate layer; SD 1.5's only one gives its normalised last.
    states = out.last_hidden_state if alone else out.hidden_states[-2]
    embeds = getattr(out, "text_embeds", None)
    return (states,) if embeds is None else (states, embeds)
