"""What text encoders and VAE make of prompts and images, once for all training.

Embeddings are of CLIP's first window: a longer prompt is cut, as in DMD2's published runs. Latents are the mean of
the VAE's distribution. Both are kept in fp16. The index has the first `SHOWN` texts, by which a training is scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from dmd2.data.captioned import CaptionedImages
from dmd2.data.shards import Column, Index, Part, Rows, make_shards
from dmd2.models.stable_diffusion.folder import TextToImage, load_text_to_image
from dmd2.weights.manifest import Manifest, read_manifest

SHARD = 1000
"""rows in a file: what a stop costs at most"""
SHOWN, MOST_SHOWN = 128, 1000
"""texts, and characters of one, that an index has; CLIP sees fewer of these"""
TEXT, VAE = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), ("vae",)


def sha256_of(manifest: Manifest, subfolders: Sequence[str]) -> str:
    """Of the networks in these subfolders of weights."""
    files = [(name, sum) for name, sum in sorted(manifest.files.items()) if name.split("/")[0] in subfolders]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def make_prompts(
    weights: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    batch: int = 16,
    device: torch.device | str = "cpu",
    shard: int = SHARD,
    part: Part | None = None,
) -> bool:
    """The embeddings of prompts: `context` (L, D), and SDXL's `pooled` (P,). See `make_shards`.

    Raises:
        UserError: `weights` are of no text-to-image model; `out` holds something else.
    """
    model = load_text_to_image(weights, [], torch.device(device), torch.float32)
    of_texts = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    made: dict[str, JsonValue] = {"prompts": of_texts, "texts": _shown(prompts[:SHOWN])}
    index = _index("prompts", len(prompts), shard, _embed(model, [""]), model.manifest, made)
    return make_shards(out, index, lambda rows: _embed(model, prompts[rows.start : rows.stop]), batch, part=part)


def make_latents(
    weights: Path,
    images: Path,
    out: Path,
    *,
    batch: int = 4,
    device: torch.device | str = "cpu",
    shard: int = SHARD,
    part: Part | None = None,
) -> bool:
    """As `make_prompts`, of captioned images, with their `latents` (C, h, w) at the weights' own size.

    Raises:
        UserError: as `make_prompts`; an image or a caption is missing or damaged.
    """
    found = CaptionedImages(images)
    size = read_manifest(weights).native_size
    model = load_text_to_image(weights, [], torch.device(device), torch.float32)

    @torch.no_grad()
    def make(rows: range) -> Rows:
        latents = model.codec.encode(found.images(rows, size)).half()
        return {"latents": latents, **_embed(model, found.captions(rows))}

    blank = model.codec.encode(torch.zeros(1, 3, size[1], size[0], dtype=torch.uint8)).half()
    made: dict[str, JsonValue] = {"images": found.sha256, "vae": sha256_of(model.manifest, VAE)}
    made |= {"size": f"{size[0]}x{size[1]}", "texts": _shown(found.captions(range(min(SHOWN, len(found)))))}
    row = {"latents": blank, **_embed(model, [""])}
    return make_shards(out, _index("latents", len(found), shard, row, model.manifest, made), make, batch, part=part)


@torch.no_grad()
def _embed(model: TextToImage, prompts: Sequence[str]) -> dict[str, Tensor]:
    cond = model.encode_text(list(prompts), model.manifest.native_size)
    window = model.encode_text.tokenizers[0].model_max_length
    return embedding_columns(replace(cond, context=cond.context[:, :window]))


def embedding_columns(cond: Any) -> dict[str, Tensor]:
    """A `TextCondition` as columns of shards: `Family.embedded` makes one of them again."""
    columns = {"context": cond.context.half()}
    return columns if cond.pooled is None else columns | {"pooled": cond.pooled.half()}


def _shown(texts: Sequence[str]) -> list[JsonValue]:
    return [text[:MOST_SHOWN] for text in texts]


def _index(
    kind: str, count: int, shard: int, row: Mapping[str, Tensor], manifest: Manifest, made: Mapping[str, JsonValue]
) -> Index:
    """`row`: of one image or prompt."""
    columns = {
        name: Column(dtype=str(value.dtype).removeprefix("torch."), shape=list(value.shape[1:]))
        for name, value in row.items()
    }
    text: dict[str, JsonValue] = {"text_encoders": sha256_of(manifest, TEXT)}
    return Index(kind=kind, count=count, shard=shard, columns=columns, made={**text, **made})
