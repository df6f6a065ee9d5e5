"""How good images are: features of images, and the metrics that compare two sets of features.

Features come from Inception (a TorchScript file, given by path) or, where none is at hand, from this project's own
small classifier. Figures of the two cannot be compared, so their names differ: FID is Inception's only; the other is
FD-small. FID itself is `dmd2.evaluation.frechet.frechet_distance`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dmd2.evaluation.classifiers import load_classifier_file
from dmd2.evaluation.image_classifier import ImageClassifier
from dmd2.runtime.errors import InvalidInput, UserError, first_line
from dmd2.runtime.files import read_object, sha256_file

INCEPTION_FEATURES = 2048
PATCH = 299
"""side of patch-FID's crops, in pixels: what Inception sees without resizing"""
NEIGHBOURS = 3, 5
"""k of precision and recall (Kynkäänniemi et al. 2019), k of density and coverage (Naeem et al. 2020)"""
KID_SUBSETS, KID_SUBSET = 100, 1000  # Bińkowski et al. 2018, sec. 4
SPLITS = 10  # of the Inception score (Salimans et al. 2016)
DISTANCE_ROWS = 512  # rows of a distance matrix that are held at once

# Metrics of features


def kernel_distance(real: Tensor, fake: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): the unbiased squared MMD of the kernel (xᵀy/F + 1)³, which may fall below 0.

    Args:
        real, fake: (N, F) and (M, F).
        seed: of the 100 subsets of at most 1000 samples.

    Returns:
        mean and standard deviation over the subsets.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError:
        raise InvalidInput("metric", "torchmetrics is not installed; pip install 'dmd2[train]'", "kid") from None

    size = min(KID_SUBSET, len(real), len(fake))
    # torchmetrics uses torch's global generator, and warns that it keeps features, which are kept anyway.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features", UserWarning)
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(nn.Identity(), KID_SUBSETS, size, sync_on_compute=False)
        metric.update(real.cpu(), real=True)
        metric.update(fake.cpu(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(log_probabilities: Tensor) -> tuple[float, float]:
    """IS (Salimans et al. 2016): exp E[KL(p(y|x) ‖ p(y))], 1 … C, of ten parts of the samples, in the order given.

    Args:
        log_probabilities: (N, C), N at least 10.

    Returns:
        mean and standard deviation over the parts.
    """
    if len(log_probabilities) < SPLITS:
        raise ValueError(f"expected at least {SPLITS} samples, not {len(log_probabilities)}")
    scores = []
    for part in log_probabilities.double().clamp_min(-500).tensor_split(SPLITS):  # e⁻⁵⁰⁰ is still above 0
        p = part.exp()
        scores.append((p * (part - p.mean(0).log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


def prdc(real: Tensor, fake: Tensor, k: tuple[int, int] = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019, eqs. 1-3), density and coverage (Naeem et al. 2020, eqs. 3, 4).

    The manifold of a set is the union of balls around its samples that reach to their k-th nearest neighbour.
    Precision is the share of fake samples on the real manifold, recall that of real ones on the fake manifold.
    Density counts in how many real samples' balls a fake one lies, over k, and may exceed 1; coverage is the share of
    real samples whose ball holds a fake one.

    Args:
        real, fake: (N, F) and (M, F).
        k: of precision and recall, and of density and coverage.

    Raises:
        ValueError: N or M is not above both k.
    """
    if min(len(real), len(fake)) <= max(k):
        raise ValueError(f"expected more than {max(k)} samples, not {len(real)} and {len(fake)}")
    reach_real, reach_dc = _reach(real, k)
    reach_fake, _ = _reach(fake, k)
    on_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    on_fake, covered, inside = 0, 0, 0
    for rows, squares in _squared_distances(real, fake):
        on_real |= (squares <= reach_real[rows, None]).any(0)
        on_fake += int((squares <= reach_fake[None]).any(1).sum())
        within = squares < reach_dc[rows, None]
        covered += int(within.any(1).sum())
        inside += int(within.sum())
    return {
        "precision": float(on_real.double().mean()),
        "recall": on_fake / len(real),
        "density": inside / (k[1] * len(fake)),
        "coverage": covered / len(real),
    }


def _reach(samples: Tensor, k: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Squared distances (N,) of each sample to its k-th nearest neighbour, itself left out, for both k."""
    parts = [d.topk(max(k) + 1, largest=False).values[:, list(k)] for _, d in _squared_distances(samples, samples)]
    first, second = torch.cat(parts).unbind(1)
    return first, second


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances between (N, F) and (M, F), a block of rows at a time: which rows, and (rows, M)."""
    centre = b.float().mean(0)  # ‖a‖² + ‖b‖² − 2ab is the more exact the smaller the norms are
    b = b.float() - centre
    b_norms = b.square().sum(1)
    for start in range(0, len(a), DISTANCE_ROWS):
        rows = slice(start, min(start + DISTANCE_ROWS, len(a)))
        block = a[rows].float() - centre
        yield rows, torch.addmm(b_norms[None], block, b.T, alpha=-2).add_(block.square().sum(1, keepdim=True))


# Features of images


class Inception:
    """Inception v3 of 2015 as the TorchScript file that FID is defined by in EDM and StyleGAN.

    The script is called as `net(images, return_features=True)` → (B, 2048) and `net(images, no_output_bias=True)` →
    class probabilities, with uint8 images of any size, which it resizes to 299×299 itself.

    Raises:
        UserError: there is no such file, or it is something else.
    """

    name, width = "inception", INCEPTION_FEATURES

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        if not path.is_file():
            raise InvalidInput(
                "inception",
                "no such file; scripts/download-metrics fetches it. "
                "Without it: features small (FD-small, which is not FID)",
                path,
            )
        self.path, self.device = path, torch.device(device)
        try:
            self.net = torch.jit.load(path, map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise InvalidInput(
                "inception", f"not a TorchScript file, or damaged ({first_line(error)})", path
            ) from error
        self.sha256 = sha256_file(path)

    @torch.inference_mode()
    def __call__(self, images: Tensor, *, answers: bool = False) -> tuple[Tensor, Tensor | None]:
        features = self._run(images, "return_features")
        if features.shape != (len(images), self.width):
            expected = (len(images), self.width)
            raise InvalidInput("inception", f"gives features {tuple(features.shape)}; expected {expected}", self.path)
        return features, self._log_probabilities(images) if answers else None

    def _log_probabilities(self, images: Tensor) -> Tensor:
        given = self._run(images, "no_output_bias")
        if given.ndim != 2 or len(given) != len(images):
            expected = f"({len(images)}, classes)"
            raise InvalidInput("inception", f"gives answers {tuple(given.shape)}; expected {expected}", self.path)
        # The published script ends in a softmax; one that gives logits serves as well.
        if given.min() >= 0 and torch.allclose(given.sum(1), torch.ones_like(given[:, 0]), atol=1e-3):
            return given.clamp_min(1e-30).log()
        return given.log_softmax(1)

    def _run(self, images: Tensor, option: str) -> Tensor:
        try:
            return self.net(images.to(self.device), **{option: True}).float()
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InvalidInput(
                "inception", f"cannot be called with {option} ({first_line(error)})", self.path
            ) from error


class SmallFeatures:
    """This project's classifier of small images: class accuracy, and features for FD-small.

    Raises:
        UserError: there is no such file, or it is something else.
    """

    name = "small"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device = path, torch.device(device)
        model, config = load_classifier_file(
            path, "image", lambda c: ImageClassifier(len(c["classes"]), tuple(c["widths"]), c["features"])
        )
        self.net = model.to(device).eval().requires_grad_(False)
        self.classes: list[str] = config["classes"]
        """in the order of the logits"""
        self.size: int = config["size"]
        """side of the images that it was trained on, in pixels"""
        self.width = self.net.head.in_features
        self.sha256 = sha256_file(path)

    @torch.inference_mode()
    def __call__(self, images: Tensor, *, answers: bool = False) -> tuple[Tensor, Tensor | None]:
        side = self.size
        if images.shape[1:] != (3, side, side):
            found = f"{images.shape[-1]}x{images.shape[-2]}"
            raise UserError(
                f"{self.path}: takes images of {side}x{side} pixels, not {found}; resizing to {side} makes them so"
            )
        x = images.to(self.device).float() / 127.5 - 1
        features = self.net.features(x.contiguous(memory_format=torch.channels_last))
        return features, self.net.head(features).log_softmax(1) if answers else None


Extractor = Inception | SmallFeatures
"""A frozen network that features come from: uint8 (B, 3, H, W) → features (B, F), F being its `width`, and with
`answers` log p(class | image) (B, C); both fp32"""


class ClipScore:
    """Cosine of an image and its prompt in a CLIP model (Hessel et al. 2021, without their factor 2.5).

    Args:
        folder: a transformers CLIP model with its tokenizer, as on the Hugging Face hub.

    Raises:
        UserError: there is no such folder, or it is something else.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path = folder / "config.json"
        if not path.is_file():
            raise InvalidInput("clip", "holds no CLIP model; scripts/download-metrics --clip fetches one", folder)
        self.path, self.device = folder, torch.device(device)
        try:
            kind = read_object(path).get("model_type")
            if kind != "clip":
                raise InvalidInput("clip", f"is a model of the type {kind!r}; expected 'clip'", folder)
            model, info = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except UserError:
            raise
        except Exception as error:  # transformers raises many kinds for damaged files
            raise InvalidInput("clip", f"damaged, or no CLIP model ({first_line(error)})", folder) from error
        if info["missing_keys"]:  # transformers has made up their values
            raise InvalidInput("clip", f"lacks {min(info['missing_keys'])}: no CLIP model, or damaged", folder)
        self.net: Any = model.requires_grad_(False).eval().to(self.device)
        self.sha256 = {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """uint8 (B, 3, H, W) and B prompts, of which the first 77 tokens count → cosines (B,), fp32."""
        pixels = self.processor(list(images.cpu()), return_tensors="pt", input_data_format="channels_first")
        length = self.net.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        answer = self.net(pixel_values=pixels["pixel_values"].to(self.device), **tokens)
        return F.cosine_similarity(answer.image_embeds, answer.text_embeds).float()


# Images


def centre_crop(images: Tensor, side: int = PATCH) -> Tensor:
    """uint8 (B, 3, H, W) → (B, 3, side, side): what patch-FID looks at (Lin et al. 2024, SDXL-Lightning, sec. 4).

    Raises:
        UserError: the images are smaller.
    """
    height, width = images.shape[2:]
    if min(height, width) < side:
        raise UserError(f"patch-fid: images of {width}x{height} pixels; expected at least {side}x{side}")
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) → (B, 3, side, side) on the CPU, by Pillow's Lanczos filter, which does not alias."""
    if images.shape[2:] == (side, side):
        return images

    def one(image: Tensor) -> Tensor:
        pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        return torch.from_numpy(np.array(pixels.resize((side, side), Image.Resampling.LANCZOS))).permute(2, 0, 1)

    return torch.stack([one(image) for image in images.cpu()])
