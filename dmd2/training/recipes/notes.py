"""What each recipe is of, what its paper reports, and what it takes: for `dmd2 recipes`."""

from __future__ import annotations

from dataclasses import dataclass

from dmd2.training.methods.common import Recipe


@dataclass(frozen=True)
class Note:
    """`published` is the paper's own figure with its source, "" where there is none; it was not reproduced here."""

    method: str
    family: str
    data: str
    takes: str
    """inputs beside the data; hours where they were measured"""
    published: str = ""


EMOJI, EDM = "sdxl, as small as the emoji", "edm"
SCENES, CIFAR, IMAGENET = "weights/emoji/emoji.zip", "CIFAR-10", "ImageNet 64x64"
_DMD, _DMD2, _GDD = "DMD, 2311.18828, table 1", "DMD2, 2405.14867, tables 1 and 3", "GDD, 2405.20750, tables 1 to 5"
_COND, _UNCOND, _ADM = "edm-cifar10-32x32-cond-vp", "edm-cifar10-32x32-uncond-vp", "edm-imagenet-64x64-cond-adm"
_TEACHER = "the model of cifar10-small-teacher as --init"
_MINUTES = f"{_TEACHER}; about 12 minutes of one core"


def _gdd(name: str, data: str, init: str, fid: str) -> dict[str, Note]:
    takes = f"--init {init}; pretrained feature networks"
    with_freezing = Note("GDD-I", EDM, data, takes, f"FID {fid} ({_GDD})")
    return {f"{name}-gdd": Note("GDD", EDM, data, takes), f"{name}-gdd-i": with_freezing}


NOTES: dict[str, Note] = {
    "emoji-vae": Note("autoencoder", EMOJI, SCENES, "1 core hour"),
    "emoji-classifier": Note("classifier", EMOJI, SCENES, "0.3 core hours"),
    "emoji-teacher": Note("denoising", EMOJI, SCENES, "2.5 core hours"),
    "emoji-dmd2-4step": Note("DMD2 with GAN, 4 steps", EMOJI, SCENES, "2.3 core hours"),
    "emoji-dmd2-1step": Note("DMD2 with GAN, 1 step", EMOJI, SCENES, "1.7 core hours"),
    "cifar10-classifier": Note("classifier", EDM, CIFAR, "16 epochs"),
    "cifar10-small-teacher": Note("denoising", EDM, CIFAR, "an hour of two cores"),
    "cifar10-small-dmd": Note("DMD", EDM, CIFAR, f"{_MINUTES}; --pairs"),
    "cifar10-small-dmd2": Note("DMD2 without GAN", EDM, CIFAR, _MINUTES),
    "cifar10-small-dmd2-gan": Note("DMD2 with GAN", EDM, CIFAR, _MINUTES),
    "cifar10-small-gdd": Note("GDD", EDM, CIFAR, _MINUTES),
    "cifar10-small-gdd-i": Note("GDD-I", EDM, CIFAR, _MINUTES),
    "cifar10-teacher": Note(
        "denoising", EDM, CIFAR, "200 million images", "FID 1.79 with Heun 18 (Karras et al. 2022, table 7)"
    ),
    "cifar10-uncond-teacher": Note(
        "denoising", EDM, CIFAR, "200 million images", "FID 1.97 with Heun 18 (Karras et al. 2022, table 7)"
    ),
    "cifar10-dmd": Note(
        "DMD", EDM, CIFAR, f"--init {_COND}; 100,000 --pairs by Heun 18", f"FID 2.66, with L2 2.78 ({_DMD})"
    ),
    "cifar10-uncond-dmd": Note(
        "DMD", EDM, CIFAR, f"--init {_UNCOND}; 500,000 --pairs by Heun 18", f"FID 3.77 ({_DMD})"
    ),
    "imagenet64-dmd": Note("DMD", EDM, IMAGENET, f"--init {_ADM}; 25,000 --pairs by Heun 256", f"FID 2.62 ({_DMD})"),
    "imagenet64-dmd2": Note("DMD2 without GAN", EDM, IMAGENET, f"--init {_ADM}", f"FID 2.61 ({_DMD2})"),
    "imagenet64-dmd2-gan": Note("DMD2 with GAN", EDM, IMAGENET, f"--init {_ADM}", f"FID 1.51 ({_DMD2})"),
    "imagenet64-dmd2-gan-resumed": Note(
        "DMD2 with GAN",
        EDM,
        IMAGENET,
        f"--init {_ADM}; the model of imagenet64-dmd2 as --student",
        f"FID 1.28 ({_DMD2})",
    ),
    "cifar10-dmd2": Note(
        "DMD2 with GAN",
        EDM,
        CIFAR,
        f"--init {_COND}",
        "FID 1.99 with FastGen, whose method differs in parts (FastGen)",
    ),
    **_gdd("cifar10", CIFAR, "edm-cifar10-32x32-uncond-ve or -cond-ve", "1.54"),
    **_gdd("afhqv2", "AFHQv2 64x64", "edm-afhqv2-64x64-uncond-ve", "1.23"),
    **_gdd("ffhq", "FFHQ 64x64", "edm-ffhq-64x64-uncond-ve", "0.85"),
    **_gdd("imagenet64", IMAGENET, _ADM, "1.16"),
    "lora-dmd2": Note(
        "DMD2 as a LoRA, 4 steps", "sdxl or sd15", "`dmd2 data prompts`, `latents`", "any teacher as --init"
    ),
}


def note_of(name: str, recipe: Recipe) -> Note:
    """What is noted of a recipe; else what it says itself."""
    return NOTES.get(name, Note(recipe.kind, "any", recipe.data, ""))
