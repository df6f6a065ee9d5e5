"""Builds the embedded emoji model, untrained: SDXL's UNet, text encoders and tokenizer, all small."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WINDOW = 32  # tokens; the longest caption of the data has about half of that
END = "</w>"  # CLIP's mark of a word's end
TEXT_WIDTH = 128
TIME_ID_WIDTH = 32


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs are merged until each of `words` is one token; others fall into pieces.

    The same words give the same tokens in every process, which a run that goes on relies on. (The trainer of the
    `tokenizers` package breaks ties by the order of a hash table that is seeded anew each time.)
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(sorted({word.lower() for word in words}))
    tokens = [*alphabet, *(f"{c}{END}" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=WINDOW)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al. 2016, algorithm 1): the most frequent pair first, ties by alphabet."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [
        [*spelled[:-1], f"{spelled[-1]}{END}"] for word in words for spelled, _ in to_bytes.pre_tokenize_str(word)
    ]
    counts: Counter[tuple[str, str]] = Counter(pair for parts in pieces for pair in pairwise(parts))
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for i, parts in enumerate(pieces):
        for pair in pairwise(parts):
            where[pair].add(i)
    merges = []
    while counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for i in where.pop(best):
            for pair in pairwise(pieces[i]):
                counts[pair] -= 1
                if not counts[pair]:
                    del counts[pair]
            pieces[i] = _merged(pieces[i], best)
            for pair in pairwise(pieces[i]):
                counts[pair] += 1
                where[pair].add(i)
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    rest = iter(range(len(parts)))
    for i in rest:
        if tuple(parts[i : i + 2]) == pair:
            merged.append("".join(pair))
            next(rest, None)
        else:
            merged.append(parts[i])
    return merged


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two small CLIP text encoders, the second with a projection, as in SDXL."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # see trainable_attention
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_unet(channels: tuple[int, ...] = (96, 128, 128), latent_channels: int = 4) -> UNet2DConditionModel:
    """SDXL's UNet with small numbers: no attention at the top level, text_time embedding, linear projections."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * TEXT_WIDTH,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(c // 32 for c in channels),  # diffusers' name for the number of heads
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_ID_WIDTH,
    )
    trainable_attention(unet)
    return unet


def trainable_attention(unet: Any) -> None:
    """Plain matrix products for attention: with 16 to 64 tokens the fused kernel's backward is slow on a CPU."""
    unet.set_attn_processor(AttnProcessor())


def build_models(tokenizer: CLIPTokenizer, seed: int, latent_channels: int) -> nn.ModuleDict:
    """{"unet", "text_encoder", "text_encoder_2"}, initialised from `seed`."""
    torch.manual_seed(seed)
    first, second = build_text_encoders(tokenizer)
    unet = build_unet(latent_channels=latent_channels)
    # SDXL's UNet is trained on embeddings of about unit size; CLIP's initial token embeddings are 50 times smaller.
    return nn.ModuleDict({"unet": unet, "text_encoder": first, "text_encoder_2": second})
