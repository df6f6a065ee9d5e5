"""Where a run's batches come from: what was named on the command line, and the kinds of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dmd2.data.captioned import CaptionedImages
from dmd2.data.embeddings import TEXT, VAE, sha256_of
from dmd2.data.images import ImageSet
from dmd2.data.prompts import read_prompts
from dmd2.data.shards import Shards, batch_rows
from dmd2.emoji.scenes import EmojiScenes
from dmd2.emoji.scores import EmojiClassifier
from dmd2.models.family import Family, Labels
from dmd2.runtime.errors import DataError, InvalidInput
from dmd2.runtime.paths import EMOJI
from dmd2.runtime.terminal import say
from dmd2.training.parallel.group import ALONE, Parallel
from dmd2.training.preview import CaptionPreview, ClassPreview, ClassScore, Preview, RowsPreview, TextScore
from dmd2.weights.manifest import read_manifest

PREVIEWED = 16
"""texts whose images a run shows"""


@dataclass(frozen=True)
class Inputs:
    """The files and folders of a run, by option: data, init, classifier, prompts, student, pairs, lpips, …"""

    paths: Mapping[str, Path | None]
    device: torch.device
    parallel: Parallel = ALONE

    def get(self, name: str) -> Path | None:
        return self.paths.get(name)

    def need(self, name: str, why: str = "this recipe needs it") -> Path:
        """Raises UserError if it was not given."""
        path = self.get(name)
        if path is None:
            raise InvalidInput(name, f"missing; {why}")
        return path

    def rows(self, n: int) -> slice:
        """Of a step's batch of `n`, those that are this process's."""
        return self.parallel.ranks.rows(n)

    def with_defaults(self, defaults: Mapping[str, Path]) -> Inputs:
        given = {name: path for name, path in self.paths.items() if path is not None}
        return replace(self, paths={**defaults, **given})


@dataclass(frozen=True)
class Examples:
    """What one step works on."""

    labels: Labels
    """of the images to generate"""
    images: Tensor | None = None
    """uint8 (B, 3, H, W): real ones; None unless they were asked for"""
    image_labels: Labels = None
    """of the real ones"""
    latents: Tensor | None = None
    """float (B, C, h, w): real images instead of `images`, where these were encoded before"""

    def x0(self, family: Family, device: torch.device) -> Tensor | None:
        """The real images in the family's x0 space, fp32 (B, C, h, w) on `device`."""
        if self.latents is not None:
            return self.latents.to(device, torch.float32)
        return None if self.images is None else family.codec.encode(self.images.to(device))


class Source(Protocol):
    """Batches that are a pure function of (seed, step).

    `n` is a step's whole batch; what comes back are the rows of it that are this process's, `Inputs.rows(n)`.
    """

    defaults: ClassVar[Mapping[str, Path]]
    """what inputs are unless they are named"""
    precomputed: ClassVar[bool]
    """whether labels are conditions already, and images latents: text encoders and VAE stay off the device"""

    def __init__(self, inputs: Inputs, family: Family, needs_images: bool) -> None:
        """Raises UserError: what is given is not for this family, or lacks real images where these are needed."""

    def batch(self, n: int, *, seed: int, step: int, images: bool, paired: bool) -> Examples:
        """For `n` images of a student. `images`: also real ones; `paired`: generate with the labels of these."""
        ...

    def lesson(self, n: int, *, seed: int, step: int, freedom: float) -> Examples:
        """`n` real images for a teacher; `freedom` in [0, 1] is how far scenes may vary."""
        ...

    def preview(self) -> Preview:
        """What the run shows of its images."""
        ...


class EmojiSource:
    """Scenes of emoji with their captions. See `dmd2.emoji.scenes`."""

    defaults: ClassVar[Mapping[str, Path]] = {
        "data": EMOJI / "emoji.zip",
        "init": EMOJI,
        "classifier": EMOJI / "classifier.safetensors",
    }
    precomputed: ClassVar = False

    def __init__(self, inputs: Inputs, family: Family, needs_images: bool) -> None:
        if family.takes_classes:
            raise InvalidInput(
                "set", f"{family.name} takes classes, not captions; expected data=images", "data=emoji"
            )
        self.scenes = EmojiScenes(inputs.need("data"), family.shape[1] * family.codec.factor)
        path = inputs.need("classifier")
        classifier = EmojiClassifier.load(path, inputs.device) if path.is_file() else None
        self._classifier = classifier if classifier and classifier.judges(self.scenes.size) else None
        self.rows = inputs.rows
        if self._classifier is None:
            side = self.scenes.size
            say(f"{path}: no classifier of images of {side}x{side} pixels; samples get no scores")

    def batch(self, n: int, *, seed: int, step: int, images: bool, paired: bool) -> Examples:
        # One caption in ten is empty: a student is never asked for "no text", so more are drawn than are kept.
        batch = self.scenes.batch(n + n // 2, seed=seed + 1, step=step)
        kept = [i for i, caption in enumerate(batch.captions) if caption][:n][self.rows(n)]
        captions = [batch.captions[i] for i in kept]
        return Examples(captions, batch.images[kept], captions) if images else Examples(captions)

    def lesson(self, n: int, *, seed: int, step: int, freedom: float) -> Examples:
        batch, rows = self.scenes.batch(n, seed=seed, step=step, freedom=freedom), self.rows(n)
        return Examples(batch.captions[rows], batch.images[rows], batch.captions[rows])

    def preview(self) -> Preview:
        return CaptionPreview(self.scenes, self._classifier)


class ImageSource:
    """Images with their classes, if there are any. See `dmd2.data.images.ImageSet`."""

    defaults: ClassVar[Mapping[str, Path]] = {}
    precomputed: ClassVar = False

    def __init__(self, inputs: Inputs, family: Family, needs_images: bool) -> None:
        self.family, self.inputs = family, inputs
        if not family.takes_classes:
            raise InvalidInput(
                "set", f"{family.name} takes captions, not classes; expected data=emoji", "data=images"
            )
        path = inputs.get("data")
        if path is None and needs_images:
            raise InvalidInput("data", "missing; this recipe learns from real images, a zip or a folder")
        self.images = None if path is None else ImageSet(path, family.shape[1], family.classes)

    def batch(self, n: int, *, seed: int, step: int, images: bool, paired: bool) -> Examples:
        """Classes are drawn uniformly, but where they are `paired` with those of real images."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        classes = torch.randint(self.family.classes, (n,), generator=generator) if self.family.classes else None
        rows = self.inputs.rows(n)
        labels = self.family.any_labels(rows.stop - rows.start) if classes is None else classes[rows]
        if not images:
            return Examples(labels)
        real = self.lesson(n, seed=seed, step=step, freedom=1.0)
        return replace(real, labels=real.image_labels if paired else labels)

    def lesson(self, n: int, *, seed: int, step: int, freedom: float) -> Examples:
        assert self.images is not None
        rows = self.images.batch(n, seed, step)[self.inputs.rows(n)]
        known = self.images.labels if self.family.classes else None
        labels = self.family.any_labels(len(rows)) if known is None else known[rows]
        return Examples(labels, self.images.images(rows), labels)

    def preview(self) -> Preview:
        names, classes = self.family.class_names, self.family.classes
        score = ClassScore.find(self.inputs.get("classifier"), self.family, self.images, self.inputs.device)
        return ClassPreview(names, classes, score)


class LatentSource:
    """Embeddings of prompts, and latents of images where the method needs some, from `dmd2 data`.

    What is generated are the `prompts`, if they are given, else the texts of `data`.
    """

    defaults: ClassVar[Mapping[str, Path]] = {}
    precomputed: ClassVar = True

    def __init__(self, inputs: Inputs, family: Family, needs_images: bool) -> None:
        self.family, self.inputs = family, inputs
        folder = inputs.need("data", "a folder that `dmd2 data prompts` or `dmd2 data latents` made")
        self.shards = Shards(folder, "latents", *([] if needs_images else ["prompts"]))
        asked = inputs.get("prompts")
        self.prompts = self.shards if asked is None else Shards(asked, "prompts", "latents")
        manifest = read_manifest(inputs.need("init"))
        for given in (self.shards, self.prompts):
            for name, parts in (("text_encoders", TEXT), ("vae", VAE)):
                if given.index.made.get(name, own := sha256_of(manifest, parts)) != own:
                    told = f"made with other networks ({name}) than {family.name}'s; make it anew"
                    raise DataError(told, given.folder)
            row = given.rows(torch.tensor([0]))
            family.embedded(_texts(row))
            self._check_latents(row, given.folder)

    def _check_latents(self, row: Mapping[str, Tensor], folder: Path) -> None:
        family = self.family
        if "latents" in row and row["latents"].shape[1:] != family.shape:
            shapes = f"latents of {tuple(row['latents'].shape[1:])}; expected {tuple(family.shape)}"
            raise DataError(f"{shapes} of {family.name}", folder)

    def batch(self, n: int, *, seed: int, step: int, images: bool, paired: bool) -> Examples:
        """Real images are others than those whose captions are generated, but where they are `paired`."""
        lesson = self.lesson(n, seed=seed, step=step, freedom=1.0) if images else None
        if lesson is not None and paired:
            return lesson
        rows = self.prompts.rows(self._rows(self.prompts, n, seed + 1, step))
        return replace(lesson or Examples(None), labels=self.family.embedded(_texts(rows)))

    def lesson(self, n: int, *, seed: int, step: int, freedom: float) -> Examples:
        rows = self.shards.rows(self._rows(self.shards, n, seed, step))
        labels = self.family.embedded(_texts(rows))
        return Examples(labels, image_labels=labels, latents=rows["latents"].float())

    def _rows(self, shards: Shards, n: int, seed: int, step: int) -> Tensor:
        return batch_rows(len(shards), n, seed, step)[self.inputs.rows(n)]

    def preview(self) -> Preview:
        return RowsPreview(self._first(PREVIEWED), judge=self._judge())

    def _first(self, n: int) -> Any:
        return self.family.embedded(_texts(self.prompts.rows(torch.arange(min(n, len(self.prompts))))))

    def _judge(self) -> TextScore | None:
        clip, inception = self.inputs.get("clip"), self.inputs.get("inception")
        if clip is None and inception is None:
            return None
        texts = self.prompts.index.made.get("texts")
        if not isinstance(texts, list) or not texts:
            told = f"scores by texts, which {self.prompts.folder} lacks; make it anew"
            raise InvalidInput("clip" if clip else "inception", told, clip or inception)
        latents = "latents" in self.shards.index.columns
        if inception is not None and not latents:
            told = "patch-FID compares with real images; expected `data` of `dmd2 data latents` with it"
            raise InvalidInput("inception", told, inception)
        prompts, count = [str(text) for text in texts], len(self.shards) if latents else 0
        embedded = self._first(len(prompts))
        return TextScore(prompts, clip, inception, self._real, count, self.inputs.device, embedded)

    @torch.no_grad()
    def _real(self, rows: list[int]) -> Tensor:
        """What the VAE makes of the latents: it is loaded for these, and freed."""
        x0 = self.shards.rows(torch.tensor(rows))["latents"].to(self.inputs.device, torch.float32)
        images = self.family.rgb("kl", one_by_one=True)(x0)
        return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


class PromptSource:
    """Prompts from a file, and real images with captions where the method needs some.

    What is generated are the prompts, or without any the captions of the images.
    """

    defaults: ClassVar[Mapping[str, Path]] = {}
    precomputed: ClassVar = False

    def __init__(self, inputs: Inputs, family: Family, needs_images: bool) -> None:
        if family.takes_classes:
            told = f"{family.name} takes classes, not captions; expected data=images"
            raise InvalidInput("set", told, "data=prompts")
        self.inputs, self.rows, (_, height, width) = inputs, inputs.rows, family.shape
        self.size = width * family.codec.factor, height * family.codec.factor
        path, images = inputs.get("prompts"), inputs.get("data")
        if needs_images and images is None:
            raise InvalidInput("data", "missing; this recipe learns from real images with captions, too")
        if path is None and images is None:
            raise InvalidInput("prompts", "missing; expected a file of prompts: text, .jsonl, .parquet or .pkl")
        self.images = None if images is None else CaptionedImages(images)
        found = [] if self.images is None else self.images.captions(range(len(self.images)))
        self.prompts = [text for text in found if text] if path is None else read_prompts(path)
        if not self.prompts:
            raise DataError("has no captions; expected some, or `prompts`", images or "prompts")

    def batch(self, n: int, *, seed: int, step: int, images: bool, paired: bool) -> Examples:
        """Real images are others than those whose captions are generated, but where they are `paired`."""
        lesson = self.lesson(n, seed=seed, step=step, freedom=1.0) if images else None
        if lesson is not None and paired:
            return lesson
        rows = batch_rows(len(self.prompts), n, seed + 1, step)[self.rows(n)]
        return replace(lesson or Examples(None), labels=[self.prompts[i] for i in rows.tolist()])

    def lesson(self, n: int, *, seed: int, step: int, freedom: float) -> Examples:
        if self.images is None:
            raise InvalidInput("data", "missing; this recipe learns from real images with captions")
        rows = batch_rows(len(self.images), n, seed, step)[self.rows(n)].tolist()
        captions = self.images.captions(rows)
        return Examples(captions, self.images.images(rows, self.size), captions)

    def preview(self) -> Preview:
        clip, inception = self.inputs.get("clip"), self.inputs.get("inception")
        judge = None
        if inception is not None and self.images is None:
            raise InvalidInput("inception", "patch-FID compares with real images; expected `data` with it", inception)
        if clip is not None or inception is not None:
            images = self.images or ()
            judge = TextScore(self.prompts, clip, inception, self._real, len(images), self.inputs.device)
        return RowsPreview(self.prompts[:PREVIEWED], judge=judge)

    def _real(self, rows: list[int]) -> Tensor:
        assert self.images is not None
        return self.images.images(rows, self.size)


def _texts(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in rows.items() if name != "latents"}


SOURCES: dict[str, type[Source]] = {
    "emoji": EmojiSource,
    "images": ImageSource,
    "latents": LatentSource,
    "prompts": PromptSource,
}
"""by what a recipe's `data` says"""
