"""`dmd2 evaluate` and `dmd2 ref-stats`: images of any supported weights, or of a data set, against a reference.

Under torchrun each process takes every world-size-th batch, and the features are put together: the figures are
those of one process. The result holds everything that is needed to repeat it.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dmd2 import __version__
from dmd2.diffusion.sampling import Churn
from dmd2.evaluation.frechet import frechet_distance, moments
from dmd2.evaluation.metrics import (
    NEIGHBOURS,
    SPLITS,
    ClipScore,
    Extractor,
    Inception,
    SmallFeatures,
    centre_crop,
    inception_score,
    kernel_distance,
    prdc,
    resized,
)
from dmd2.evaluation.samples import DataSet, Images, open_images
from dmd2.inference.engine import resolve_device
from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.runtime.files import atomic_path, expect_place, sha256_file
from dmd2.runtime.paths import ROOT
from dmd2.runtime.terminal import Terminal

CLASSIFIER = ROOT / "weights" / "cifar10-classifier.safetensors"
INCEPTION = ROOT / "weights" / "metrics" / "inception-2015-12-05.pt"
METRICS = {"fid": 2, "kid": 2, "is": SPLITS, "prdc": max(NEIGHBOURS) + 1, "accuracy": 1, "clip": 1, "patch-fid": 2}
"""metric → the fewest images that it takes"""
MOST = 10_000_000  # images: 80 GB of Inception's features
REFERENCED = ("fid", "kid", "prdc", "patch-fid")  # those that compare with a reference


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how: the options of `dmd2 evaluate`."""

    weights: Path
    """folder of weights; or images, as a folder or a zip"""
    metrics: tuple[str, ...]
    reference: Path | None = None
    """images, or the mean and covariance of their features (.npz)"""
    n: int | None = None
    """None: 50,000; as many as there are prompts, or images"""
    features: str = "inception"
    inception: Path = INCEPTION
    classifier: Path = CLASSIFIER
    clip: Path | None = None
    prompts: Path | None = None
    steps: str | None = None
    seed: int = 0
    batch: int = 64
    resize: int | None = None
    """side in pixels that images, and the reference's, are brought to before all but patch-FID"""
    device: str = "auto"
    churn: Churn | None = None
    """of an EDM teacher's sampler"""


@dataclass(frozen=True)
class Place:
    """This process's rank and device in a run of several processes."""

    rank: int
    world: int
    device: torch.device


@dataclass(frozen=True)
class Networks:
    """The networks that the metrics need."""

    extractor: Extractor | None = None
    classifier: SmallFeatures | None = None
    clip: ClipScore | None = None


def evaluate(settings: Settings) -> dict[str, Any] | None:
    """Scores, with everything needed to repeat them, for JSON. None in all processes but the first.

    Raises:
        UserError: something is missing, unknown or does not fit.
    """
    _check(settings)
    began = time.monotonic()
    with process_group(settings.device) as place:
        networks = _load_networks(settings, place.device)
        side = None if "patch-fid" in settings.metrics else settings.resize
        what = (settings.weights, settings.n, settings.prompts, settings.steps, settings.seed)
        images = open_images(*what, place.device, side, settings.churn)
        _check_images(settings, images, networks)
        compared = set(settings.metrics) & set(REFERENCED)
        reference = _Reference(settings, networks, place, images) if compared else None
        rows = collect(images, _measure(settings, networks, images), settings.batch, place, "images")
    if place.rank:
        return None
    scores = _scores(settings, rows, reference)
    return {
        "scores": scores,
        "n": images.n,
        "batch": settings.batch,
        "resize": settings.resize and {"side": settings.resize, "filter": "lanczos"},
        "images": {"path": str(settings.weights), **images.metadata},
        "prompts": _file(settings.prompts),
        "reference": reference and reference.metadata,
        **_used(networks),
        **_circumstances(place, began),
    }


def reference_statistics(
    data: Path,
    out: Path,
    features: str = "inception",
    inception: Path = INCEPTION,
    classifier: Path = CLASSIFIER,
    *,
    resize: int | None = None,
    batch: int = 64,
    device: str = "auto",
) -> int:
    """Writes `mu` and `sigma` of the images' features, as EDM's .npz has them, and which features they are of.

    Returns the number of images.

    Raises:
        UserError: something is missing or does not fit.
    """
    if out.suffix != ".npz":
        raise InvalidInput("out", "expected a name that ends in .npz", out)
    settings = Settings(data, ("fid",), out, None, features, inception, classifier, resize=resize, batch=batch)
    _check(settings)
    expect_place(out, "out")
    with process_group(device) as place:
        networks = _load_networks(settings, place.device)
        images = DataSet(data, side=resize)
        _check_images(settings, images, networks)
        rows = collect(images, _measure(settings, networks, images), batch, place, "images")
        if place.rank == 0:
            mean, covariance = moments(rows["features"])
            assert networks.extractor is not None
            what = {"features": features, "features_sha256": networks.extractor.sha256, "n": images.n}
            with atomic_path(out) as temporary, temporary.open("wb") as file:
                np.savez(file, mu=mean.cpu().numpy(), sigma=covariance.cpu().numpy(), **what)  # type: ignore[arg-type]
        return images.n


@contextmanager
def process_group(device: str) -> Iterator[Place]:
    """torchrun's processes, by NCCL on GPUs and Gloo on CPUs; without torchrun, this one alone."""
    where = resolve_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Place(0, 1, where)
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Place(dist.get_rank(), world, where)
    finally:
        dist.destroy_process_group()


Measure = Callable[[Tensor, list[int]], dict[str, Tensor]]
"""images, uint8 (B, 3, H, W), and their numbers → what is kept of them, each (B, …)"""


def collect(images: Images, measure: Measure, batch: int, place: Place, what: str) -> dict[str, Tensor]:
    """`measure`'s results for all n images, each (n, …), fp32, in order, on every process.

    A batch is generated by one process, as it would be if there were only that: their number changes no figure.
    """
    n = images.n
    if n < place.world:
        raise InvalidInput("n", f"fewer images than processes ({place.world})", n)
    batch = min(batch, n // place.world)  # at least one batch for each process
    batches = [list(range(start, min(start + batch, n))) for start in range(0, n, batch)]
    kept: dict[str, Tensor] = {}
    interval = 0.5 if os.isatty(2) else 30
    mine = batches[place.rank :: place.world]
    for rows in tqdm(
        mine, what, unit="batch", disable=place.rank > 0, mininterval=interval, file=Terminal(sys.stderr)
    ):
        for name, values in measure(images.generate(rows), rows).items():
            if name not in kept:
                kept[name] = torch.zeros(n, *values.shape[1:], device=place.device)
            kept[name][rows] = values.to(place.device, torch.float32)
    if place.world > 1:
        for name in sorted(kept):
            dist.all_reduce(kept[name])  # each row is zero in all processes but one
    return kept


def _measure(settings: Settings, networks: Networks, samples: Images) -> Measure:
    """The function that computes, for a batch of images, what the metrics need: features, logits, cosines."""
    wanted = set(settings.metrics)

    def measure(images: Tensor, rows: list[int]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        answers = None
        if "patch-fid" in wanted and networks.extractor:
            kept["patch"], _ = networks.extractor(centre_crop(images))
        if settings.resize:
            images = resized(images, settings.resize)
        if wanted & {"fid", "kid", "prdc", "is"} and networks.extractor:
            need = "is" in wanted or networks.classifier is networks.extractor
            kept["features"], answers = networks.extractor(images, answers=need)
        if "is" in wanted and answers is not None:
            kept["log_probabilities"] = answers
        if networks.classifier and samples.labels is not None:
            if networks.classifier is not networks.extractor or answers is None:
                _, answers = networks.classifier(images, answers=True)
            assert answers is not None
            truth = torch.tensor([samples.labels[i] for i in rows], device=answers.device)
            kept["right"] = answers.argmax(1) == truth
        if networks.clip and samples.prompts is not None:
            kept["clip"] = networks.clip(images, [samples.prompts[i] for i in rows])
        return kept

    return measure


class _Reference:
    """What images are compared with: features of other images, or their mean and covariance.

    For patch-FID the others are brought to the size of the evaluated ones: patches show texture at a scale.
    """

    def __init__(self, settings: Settings, networks: Networks, place: Place, images: Images) -> None:
        path = settings.reference
        assert path is not None and networks.extractor is not None
        self.rows: dict[str, Tensor] = {}
        self.metadata: dict[str, Any] = {"path": str(path)}
        if path.suffix == ".npz":
            self._moments = _read_statistics(path, networks.extractor)
            self.metadata["sha256"] = sha256_file(path)
            return
        if not path.exists():
            raise InvalidInput("ref", "no such file or folder; expected images (zip, folder) or an .npz", path)
        wanted = {name for name in settings.metrics if name in REFERENCED}
        passes = [(wanted - {"patch-fid"}, settings.resize), (wanted & {"patch-fid"}, images.side)]
        for metrics, side in passes:
            if metrics:
                data = DataSet(path, side=side)
                if data.n < max(METRICS[name] for name in metrics):
                    raise InvalidInput("ref", f"{data.n} images are too few for {', '.join(sorted(metrics))}", path)
                measure = _measure(replace(settings, metrics=tuple(metrics)), Networks(networks.extractor), data)
                self.rows |= collect(data, measure, settings.batch, place, "reference")
                self.metadata |= {"n": data.n, **data.metadata}

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the features with this name."""
        return moments(self.rows[name]) if self.rows else self._moments


def _read_statistics(path: Path, extractor: Extractor) -> tuple[Tensor, Tensor]:
    """Mean and covariance from an .npz such as EDM's. Raises UserError for anything else, or of other features."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidInput("ref", f"not a readable .npz ({error})", path) from error
    if not {"mu", "sigma"} <= arrays.keys():
        raise InvalidInput("ref", f"holds {', '.join(arrays) or 'nothing'}; expected mu and sigma", path)
    mean, covariance = torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])
    width = extractor.width
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise InvalidInput(
            "ref",
            f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; "
            f"{extractor.name} features need ({width},) and ({width}, {width})",
            path,
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise InvalidInput("ref", "mu or sigma is not finite", path)
    made_by = str(arrays.get("features_sha256", extractor.sha256))
    if made_by != extractor.sha256:
        raise InvalidInput("ref", f"statistics of another network's features (its sha256 is {made_by})", path)
    return mean, covariance


def _scores(settings: Settings, rows: dict[str, Tensor], reference: _Reference | None) -> dict[str, float]:
    """Every score by name. Scores in the small classifier's features end in `_small`."""
    small = "_small" if settings.features == "small" else ""

    def distance(name: str) -> float:
        assert reference is not None
        parts = (*moments(rows[name]), *reference.moments(name))
        return frechet_distance(*(part.cpu() for part in parts))

    def compared(measure: Callable[[Tensor, Tensor], Any]) -> Any:
        assert reference is not None
        return measure(reference.rows["features"], rows["features"])

    def with_std(name: str, found: tuple[float, float]) -> dict[str, float]:
        return {f"{name}{small}": found[0], f"{name}{small}_std": found[1]}

    figures: dict[str, Callable[[], dict[str, float]]] = {
        "fid": lambda: {"fd_small" if small else "fid": distance("features")},
        "patch-fid": lambda: {"patch_fid": distance("patch")},
        "kid": lambda: with_std("kid", compared(kernel_distance)),
        "is": lambda: with_std("is", inception_score(rows["log_probabilities"])),
        "prdc": lambda: {f"{name}{small}": value for name, value in compared(prdc).items()},
        "accuracy": lambda: {"accuracy": float(rows["right"].double().mean())},
        "clip": lambda: {"clip_score": float(rows["clip"].double().mean())},
    }
    return {name: value for metric in settings.metrics for name, value in figures[metric]().items()}


# What can be asked for


def _check(settings: Settings) -> None:
    """Raises UserError for settings that cannot work, before anything is loaded."""
    for metric in settings.metrics:
        if metric not in METRICS:
            raise InvalidInput("metric", f"unknown; expected some of {', '.join(METRICS)}", metric)
        if settings.n is not None and settings.n < METRICS[metric]:
            raise InvalidInput("n", f"too few for {metric}; expected at least {METRICS[metric]}", settings.n)
    if settings.features not in ("inception", "small"):
        raise InvalidInput("features", "expected inception or small", settings.features)
    if not settings.metrics:
        raise InvalidInput("metric", f"empty; expected some of {', '.join(METRICS)}")
    if settings.n is not None and settings.n > MOST:
        raise InvalidInput("n", f"expected at most {MOST}", settings.n)
    if settings.batch < 1:
        raise InvalidInput("batch", "expected at least 1", settings.batch)
    if not 0 <= settings.seed < 2**62:
        raise InvalidInput("seed", "expected 0 to 2^62 - 1", settings.seed)
    if settings.resize is not None and not 1 <= settings.resize <= 8192:
        raise InvalidInput("resize", "expected 1 to 8192 pixels", settings.resize)
    compared = [metric for metric in settings.metrics if metric in REFERENCED]
    if compared and settings.reference is None:
        raise InvalidInput(
            "ref", f"missing; needed for {', '.join(compared)}: images (zip, folder), or for fid an .npz"
        )
    if settings.reference and settings.reference.suffix == ".npz" and compared != ["fid"][: len(compared)]:
        needy = ", ".join(metric for metric in compared if metric != "fid")
        raise InvalidInput("ref", f"mean and covariance only; {needy}: need images (zip, folder)", settings.reference)
    if "patch-fid" in settings.metrics and settings.features != "inception":
        raise InvalidInput("metric", "is of Inception's features only; expected features of inception", "patch-fid")
    if "clip" in settings.metrics and settings.clip is None:
        raise InvalidInput("clip", "missing; the metric clip needs a folder with a CLIP model")


def _load_networks(settings: Settings, device: torch.device) -> Networks:
    extractor: Extractor | None = None
    classifier = None
    if settings.features == "small" or "accuracy" in settings.metrics:
        classifier = SmallFeatures(settings.classifier, device)
    if set(settings.metrics) & {*REFERENCED, "is"}:
        extractor = classifier if settings.features == "small" else Inception(settings.inception, device)
    clip = ClipScore(settings.clip, device) if settings.clip and "clip" in settings.metrics else None
    return Networks(extractor, classifier if "accuracy" in settings.metrics else None, clip)


def _check_images(settings: Settings, images: Images, networks: Networks) -> None:
    for metric in settings.metrics:
        if images.n < METRICS[metric]:
            raise UserError(f"{settings.weights}: {images.n} images are too few for {metric}")
    if networks.clip and images.prompts is None:
        raise InvalidInput("metric", f"{settings.weights} has no prompts; expected a text-to-image model", "clip")
    if networks.classifier:
        known = networks.classifier.classes
        if images.labels is None:
            raise InvalidInput(
                "metric", f"{settings.weights} has no labels; expected one class for each image", "accuracy"
            )
        if max(images.labels) >= len(known):
            found = f"class {max(images.labels)}"
            raise InvalidInput("metric", f"{settings.classifier} knows {len(known)} classes, not {found}", "accuracy")


# What is written down


def _file(path: Path | None) -> dict[str, str] | None:
    return {"path": str(path), "sha256": sha256_file(path)} if path else None


def _used(networks: Networks) -> dict[str, Any]:
    """Path and sha256 of the networks that the scores depend on."""
    parts = {"features": networks.extractor, "classifier": networks.classifier, "clip": networks.clip}
    found: dict[str, Any] = {k: v and {"path": str(v.path), "sha256": v.sha256} for k, v in parts.items()}
    if networks.extractor:
        found["features"]["name"] = networks.extractor.name
    return found


def _circumstances(place: Place, began: float) -> dict[str, Any]:
    cuda = place.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(place.device) if cuda else platform.processor() or platform.machine(),
        "processes": place.world,
        "torch": torch.__version__,
        "dmd2": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
