"""The model card of the embedded model, written from what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmd2.emoji.scenes import BACKGROUNDS, EmojiScenes
from dmd2.models.stable_diffusion.codec import vae_factor
from dmd2.weights.manifest import Teacher, read_manifest

MODES = ("teacher", "4", "1", "teacher-4", "teacher-1", "real", "vae")
"""what is scored; the last two are ceilings: scenes of the data, and these through the autoencoder"""
NAMES = {
    "teacher": "teacher, 25 guided steps",
    "4": "**student, 4 steps**",
    "1": "**student, 1 step**",
    "teacher-4": "teacher, 4 guided steps",
    "teacher-1": "teacher, 1 guided step",
    "real": "real scenes",
    "vae": "real scenes through the autoencoder",
}


def model_card(out: Path, scores: Mapping[str, Any], seconds: Mapping[str, float], made_on: str) -> str:
    """Markdown.

    Args:
        out: the folder of `scripts/reproduce-emoji`, whose `weights` are complete.
        scores: by mode, what `scripts/score-emoji` printed.
        seconds: by stage, how long it took.
        made_on: machine, date and commits.
    """
    scenes = EmojiScenes(out / "weights" / "emoji.zip")
    config = json.loads((out / "weights" / "vae" / "config.json").read_text())
    factor = vae_factor(config)
    side, latent = scenes.size, scenes.size // factor
    teacher = read_manifest(out / "weights").teacher or Teacher(steps=25, guidance_scale=1.0)
    sampler = f"{teacher.steps} steps of DPM-Solver++(2M), guidance {teacher.guidance_scale:g}"
    rows = [_row(mode, scores[mode]) for mode in MODES]
    durations = [f"| {stage} | {spent / 60:.0f} min |" for stage, spent in seconds.items() if spent]
    learned = len({emoji for emoji, _ in scenes.pairs("all").tolist()})
    lowest, highest = scenes.scale
    mirrored = "half of the images are mirrored, " if scenes.mirrored else ""
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# dmd2-emoji

A text-to-image model of emoji at {side}×{side} pixels, in SDXL's own architecture, trained from scratch and distilled
to four steps and to one with DMD2 by the project whose repository it lies in. It is the default of `dmd2 generate`:
small enough for git and for a laptop's CPU, and on the same code path as SDXL.

| folder | what |
|---|---|
| `unet/`, `unet_1step/` | the students of four steps and of one |
| `unet_teacher/` | the undistilled teacher: {sampler} |
| `text_encoder/`, `text_encoder_2/` | two CLIP text encoders, the second with projection |
| `tokenizer/`, `tokenizer_2/` | CLIP's tokenizer with the data's own vocabulary |
| `vae/` | `AutoencoderTiny`, f{factor}, {latent}×{latent}×{config["latent_channels"]} latents |
| `classifier.safetensors`, `second-opinion.safetensors` | the classifiers behind the scores below |
| `emoji.zip` | the data: {len(scenes)} emoji with captions |

`dmd2.json` lists each file's sha256. What differs from SDXL, apart from size: the networks predict v, not eps
(`scheduler/scheduler_config.json` says so, and diffusers and this project both read it there), and latents have
{config["latent_channels"]} channels.

## What it can generate

{learned} of the {len(scenes)} emoji in `emoji.zip`, by English name, alias or kind, on one of nine backgrounds:
{", ".join(BACKGROUNDS)}. Size ({lowest:g} to {highest:g} of the frame), rotation (±{scenes.rotation_degrees:g}°) and
position vary, {mirrored}and so does whatever the caption leaves open.
One (emoji, background) pair in twenty was never shown in training. Anything else comes out as something it knows.

## Scores

By `scripts/score-emoji`, {scores["4"]["n"]} captions. A classifier names emoji and background of images asked for by
captions that name both; half of these pairs were never shown in training. It takes a melted owl for an owl: right
counts only images whose edges agree with the nearest scene of the asked emoji, too (likeness; how much is enough was
chosen by images rated by eye). fd is the Fréchet distance to real scenes of the same captions in its features, second
fd the same in those of a classifier that nothing was trained or chosen by; diversity is the mean distance between
images of one caption, relative to real scenes.

| | right, seen / held out | likeness | top1 | background | fd | second fd | diversity |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## How it was made

`scripts/reproduce-emoji`, by its commit's recipes: {made_on}.

| stage | duration |
|---|---|
{chr(10).join(durations)}

## Licence

Weights: Apache-2.0. The emoji it learned, and those in `emoji.zip`, are Noto Color Emoji, © Google, SIL Open Font
License 1.1; their names come from Unicode data and the `emoji` package on PyPI.
"""


def _row(mode: str, score: Mapping[str, Any]) -> str:
    right, opinion = score["right"], score.get("second_fd")
    cells = [
        NAMES[mode],
        f"{right['seen']:.3f} / {right['held_out']:.3f}",
        f"{score['likeness']:.3f}",
        f"{score['top1']['all']:.3f}",
        f"{score['background']['all']:.3f}",
        f"{score['fd']:.2f}",
        "" if opinion is None else f"{opinion:.2f}",
        f"{score['diversity']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"
