"""How good the images of the embedded emoji model are.

Anything that generates images for captions and seeds can be scored. The images are compared with `RealScenes`, which
composes scenes of the data itself: the ceiling of every score.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.emoji.classifier import Classifier
from dmd2.emoji.likeness import GOOD, likeness
from dmd2.emoji.scenes import BACKGROUNDS, EmojiScenes, Split, with_article
from dmd2.evaluation.classifiers import load_classifier_file
from dmd2.evaluation.frechet import frechet_distance_of
from dmd2.evaluation.metrics import NEIGHBOURS, prdc
from dmd2.runtime.errors import UserError

Generate = Callable[[list[str], list[int]], Tensor]
"""(B captions, B seeds) → B images, uint8 (B, 3, S, S), on any device"""

View = Callable[[Tensor, slice], Tensor]
"""images and which of all captions they are of → (B, …)"""

BATCH = 64  # images asked of a `Generate` at once, at most
OPEN_CAPTIONS, SEEDS, REAL_SEEDS = 50, 4, 16  # of the diversity score


class EmojiClassifier:
    """Names an image's emoji and background, and gives the features of the scores. In fp32, without gradients.

    `names` and `backgrounds` are what the two heads tell apart, in the order of their logits; `size` is the
    side of the images, in pixels. Larger ones, of a multiple of it, are brought to it by averaging.
    """

    def __init__(self, model: Classifier, names: list[str], backgrounds: list[str], size: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.names, self.backgrounds, self.size = names, backgrounds, size

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> EmojiClassifier:
        """Read a `classifier.safetensors`, as the recipe "emoji-classifier" exports it.

        Raises:
            UserError: the file is missing, damaged or something else.
        """
        model, config = load_classifier_file(
            path,
            "emoji",
            lambda c: Classifier(len(c["emoji"]), len(c["backgrounds"]), tuple(c["widths"]), c["features"]),
        )
        names, backgrounds = config["emoji"], config["backgrounds"]
        return cls(model.to(device), names, backgrounds, config["size"])

    def judges(self, side: int) -> bool:
        """Whether it takes images of this side."""
        return side > 0 and side % self.size == 0

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images, uint8 (B, 3, S, S) with S a multiple of `size` → pooled features, fp32 (B, F), on the CPU.

        Raises:
            ValueError: `images` is something else.
        """
        side = images.shape[-1] if images.ndim == 4 else 0
        if images.dtype != torch.uint8 or not self.judges(side) or images.shape[1:] != (3, side, side):
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"expected images, uint8 (B, 3, {self.size}, {self.size}) or a multiple, not {found}")
        device = self.model.emoji.weight.device
        parts = [self.model.features(self._seen(part.to(device))) for part in images.split(BATCH)]
        return torch.cat(parts).cpu() if parts else torch.empty(0, self.model.emoji.in_features)

    def _seen(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float(), images.shape[-1] // self.size) / 127.5 - 1

    @torch.no_grad()
    def answers(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, F) → logits (B, emoji) and (B, backgrounds), on the CPU."""
        emoji, background = self.model.heads(features.to(self.model.emoji.weight.device))
        return emoji.cpu(), background.cpu()


class RealScenes:
    """A `Generate` that composes a scene of the training set which the caption describes.

    It knows plain captions ("a red apple on a blue background"), and those which leave things open, "a red
    apple" and "a fruit". What a caption leaves open is chosen by the image's seed, among the pairs that
    training has seen. `then` is applied to the images: an autoencoder's round trip, say.
    """

    def __init__(self, scenes: EmojiScenes, then: Callable[[Tensor], Tensor] | None = None) -> None:
        self.scenes, self.then = scenes, then
        self.pairs: dict[str, list[tuple[int, int]]] = {}
        """caption → the (emoji, background) pairs which it may mean"""
        for e, b in scenes.pairs("all").tolist():
            self.pairs[scenes.caption(e, b)] = [(e, b)]
        for e, b in scenes.pairs("seen").tolist():
            for thing in dict.fromkeys((scenes.names[e], scenes.kinds[e])):  # some kinds are also a name: "bird"
                self.pairs.setdefault(with_article(thing), []).append((e, b))

    def __call__(self, captions: list[str], seeds: list[int]) -> Tensor:
        """Images, uint8 (B, 3, size, size). Each depends on its own caption and seed only.

        Raises:
            ValueError: a caption of another form.
        """
        samples = []
        for caption, seed in zip(captions, seeds, strict=True):
            if caption not in self.pairs:
                raise ValueError(f"no scene answers to the caption {caption!r}")
            pair = random.Random(f"real {seed}").choice(self.pairs[caption])
            emoji, background = torch.tensor([pair]).unbind(1)
            samples.append(self.scenes.captioned(emoji, background, seed=seed, plain=True).images)
        images = torch.cat(samples)
        return self.then(images) if self.then else images


def score_emoji(
    generate: Generate,
    scenes: EmojiScenes,
    classifier: EmojiClassifier,
    n: int = 1000,
    seed: int = 0,
    *,
    real: Generate | None = None,
    second: EmojiClassifier | None = None,
) -> dict[str, int | float | dict[str, float]]:
    """Every score of a generator of emoji images. Asks it for n + 200 images.

    Half of the n captions name an (emoji, background) pair that training has seen, half one that was held
    out. The first four scores are shares in [0, 1], of "all" captions, the "seen" and the "held_out":

    - `top1`, `top5`: the classifier names the right emoji, first or among its five best guesses. It is kind: it
      names smears by their colours.
    - `right`: it names the right emoji first, and the image is like it enough (`dmd2.emoji.likeness`).
    - `background`: the classifier names the right background.
    - `fd`: Fréchet distance between the classifier's features of the n images and of n real scenes of the same
      captions. `fd_real`: the same of n other real scenes, the floor.
    - `likeness`: the mean of that.
    - `precision`, `recall`: shares of the images among the real scenes' features, and of these among the images'
      (see `prdc`); left out where n is too small for them.
    - `diversity`: mean distance, in the classifier's features, between four images of one caption, relative to
      that of real scenes. Most of these captions leave the background or the emoji open. 1 is as diverse as
      the data, 0 is no diversity.

    Args:
        generate: the generator; asked for up to 64 images at once.
        n: at least 4; `fd` of different n must not be compared.
        seed: of the captions and of the images' seeds.
        real: what to compare the images with, `RealScenes(scenes)` unless given.
        second: another classifier, which nothing was trained or chosen by. Its `fd` is called `second_fd`, and
            `second_fd_real` is its floor.

    Raises:
        UserError: the classifier knows other emoji than `scenes`.
        ValueError: n is too small, or `generate` returns something else than images.
    """
    real = real or RealScenes(scenes)
    emoji, background, held_out = _pairs(scenes, classifier, n, seed)
    captions = [scenes.caption(e, b) for e, b in zip(emoji.tolist(), background.tolist(), strict=True)]

    def alike(images: Tensor, rows: slice) -> Tensor:
        return likeness(images, emoji[rows], scenes)

    judges = [classifier] if second is None else [classifier, second]
    views: list[View] = [lambda images, _, judge=judge: judge.features(images) for judge in judges]  # type: ignore[misc]
    *drawn, like = _viewed(generate, captions, _seeds("drawn", seed, n), *views, alike)
    found, references = drawn[0], [_viewed(real, captions, _seeds(f"real {i}", seed, n), *views) for i in range(2)]

    emoji_logits, background_logits = classifier.answers(found)
    opinion = {}
    if second is not None:
        opinion = {
            "second_fd": frechet_distance_of(drawn[1], references[0][1]),
            "second_fd_real": frechet_distance_of(references[1][1], references[0][1]),
        }
    shares = prdc(references[0][0], found) if n > max(NEIGHBOURS) else {}
    best = emoji_logits.topk(min(5, len(classifier.names)), dim=1).indices == emoji[:, None]
    return {
        "n": n,
        "top1": _shares(best[:, 0], held_out),
        "top5": _shares(best.any(1), held_out),
        "right": _shares(best[:, 0] & (like >= GOOD), held_out),
        "likeness": float(like.double().mean()),
        "background": _shares(background_logits.argmax(1) == background, held_out),
        "fd": frechet_distance_of(found, references[0][0]),
        "fd_real": frechet_distance_of(references[1][0], references[0][0]),
        **opinion,
        **{name: shares[name] for name in ("precision", "recall") if name in shares},
        "diversity": _diversity(generate, real, scenes, classifier, seed),
    }


def quick_score(
    generate: Generate, scenes: EmojiScenes, classifier: EmojiClassifier, n: int = 128, seed: int = 0
) -> dict[str, float]:
    """What to watch while training: `score_emoji` without top5, fd_real and diversity, of n images.

    Flat: top1, top1_seen, top1_held_out, right, background and fd. Arguments and errors are those of `score_emoji`.
    """
    emoji, background, held_out = _pairs(scenes, classifier, n, seed)
    captions = [scenes.caption(e, b) for e, b in zip(emoji.tolist(), background.tolist(), strict=True)]
    views: tuple[View, View] = (
        lambda images, _: classifier.features(images),
        lambda images, rows: likeness(images, emoji[rows], scenes),
    )
    found, like = _viewed(generate, captions, _seeds("drawn", seed, n), *views)
    reference = _features(RealScenes(scenes), captions, _seeds("real 0", seed, n), classifier)
    emoji_logits, background_logits = classifier.answers(found)
    named = emoji_logits.argmax(1) == emoji
    top1 = _shares(named, held_out)
    return {
        "top1": top1.pop("all"),
        **{f"top1_{split}": share for split, share in top1.items()},
        "right": float((named & (like >= GOOD)).double().mean()),
        "background": float((background_logits.argmax(1) == background).double().mean()),
        "fd": frechet_distance_of(found, reference),
    }


def _pairs(scenes: EmojiScenes, classifier: EmojiClassifier, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n pairs: emoji (n,), background (n,), bool (n,) held out. None comes twice while others wait."""
    if n < 4:
        raise ValueError(f"n must be at least 4, not {n}")
    if classifier.names != scenes.names or classifier.backgrounds != list(BACKGROUNDS):
        raise UserError(
            "the classifier was trained on other emoji than these scenes hold; train it again on them "
            '(recipe "emoji-classifier")'
        )
    held_out = n // 2 if len(scenes.pairs("held-out")) else 0
    splits: list[tuple[Split, int]] = [("seen", n - held_out), ("held-out", held_out)]
    chosen = []
    for split, count in splits:
        if count:
            pairs = scenes.pairs(split)
            generator = torch.Generator().manual_seed(random.Random(f"pairs {split} {seed}").getrandbits(60))
            rounds = -(-count // len(pairs))
            order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(rounds)])
            chosen.append(pairs[order[:count]])
    emoji, background = torch.cat(chosen).unbind(1)
    return emoji, background, scenes.is_held_out(emoji, background)


def _seeds(purpose: str, seed: int, n: int) -> list[int]:
    rng = random.Random(f"{purpose} {seed}")
    return [rng.getrandbits(31) for _ in range(n)]


def _features(generate: Generate, captions: list[str], seeds: list[int], classifier: EmojiClassifier) -> Tensor:
    """The classifier's features (B, F) of one image for each caption and seed."""
    return _viewed(generate, captions, seeds, lambda images, _: classifier.features(images))[0]


def _viewed(generate: Generate, captions: list[str], seeds: list[int], *views: View) -> list[Tensor]:
    """What each view says, (B, …), of one image for each caption and seed."""
    parts = []
    for start in range(0, len(captions), BATCH):
        rows = slice(start, min(start + BATCH, len(captions)))
        images = generate(captions[rows], seeds[rows])
        if len(images) != rows.stop - start:
            raise ValueError(f"expected {rows.stop - start} images, not {len(images)}")
        parts.append([view(images, rows) for view in views])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _shares(right: Tensor, held_out: Tensor) -> dict[str, float]:
    """Shares of a bool (B,), in all and by split; a split without images is left out."""
    parts = {"all": right, "seen": right[~held_out], "held_out": right[held_out]}
    return {split: float(part.double().mean()) for split, part in parts.items() if len(part)}


def _diversity(
    generate: Generate, real: Generate, scenes: EmojiScenes, classifier: EmojiClassifier, seed: int
) -> float:
    """Of the captions, half name the emoji alone, a quarter its kind alone, a quarter leave nothing open."""
    rng = random.Random(f"diversity {seed}")
    seen = scenes.pairs("seen").tolist()
    captions = []
    for i in range(OPEN_CAPTIONS):
        emoji, background = rng.choice(seen)
        both = scenes.caption(emoji, background)
        name, kind = with_article(scenes.names[emoji]), with_article(scenes.kinds[emoji])
        captions.append((name, kind, name, both)[i % 4])

    def spread(source: Generate, purpose: str, images: int) -> float:
        repeated = [caption for caption in captions for _ in range(images)]
        features = _features(source, repeated, _seeds(purpose, seed, len(repeated)), classifier).double()
        return float(sum(torch.pdist(group).mean() for group in features.split(images)))

    return spread(generate, "diversity drawn", SEEDS) / spread(real, "diversity real", REAL_SEEDS)
