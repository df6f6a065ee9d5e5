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


_SD15, _SDXL, _PROMPTS = "sd15", "sdxl", "prompts"
_IMAGES = "prompts, and real images with captions"
_CARD = "one card: one frozen network and two LoRAs on it; ours"
_OF_DMD, _OF_DMD2 = "(DMD, 2311.18828)", "(DMD2, 2405.14867)"

AFTER_DMD2 = {
    "f-distill": "f-distill (2502.15681)",
    "dmd2-teacher-head": "DMD2, GAN on the teacher's activations, approximate R1",
    "decoupled": "Decoupled DMD (2511.22677)",
    "sid": "SiD (2404.04057)",
    "sida": "SiDA (2410.14919)",
    "gdd": "GDD (2405.20750)",
    "gdd-i": "GDD-I (2405.20750)",
}

STABLE_DIFFUSION: dict[str, Note] = {
    "sd15-dmd": Note(
        "DMD", _SD15, _PROMPTS, "500,000 --pairs by pndm 50 at guidance 3; --lpips", f"COCO-30k FID 11.49 {_OF_DMD}"
    ),
    "sd15-dmd-cfg8": Note(
        "DMD",
        _SD15,
        _PROMPTS,
        "12 million --pairs by pndm 50 at guidance 8; --lpips",
        f"COCO-30k FID 14.93 {_OF_DMD}",
    ),
    "sd15-dmd2": Note("DMD2 without GAN, 1 step", _SD15, _PROMPTS, "SD 1.5 as --init", f"COCO FID 9.28 {_OF_DMD2}"),
    "sd15-dmd2-gan": Note(
        "DMD2 with GAN, 1 step", _SD15, _IMAGES, "the model of sd15-dmd2 as --student", f"COCO FID 8.35 {_OF_DMD2}"
    ),
    "sdxl-regression": Note("regression", _SDXL, _PROMPTS, "10,000 --pairs by euler-trailing at guidance 8; --lpips"),
    "sdxl-dmd2-1step": Note(
        "DMD2 with GAN, 1 step",
        _SDXL,
        _IMAGES,
        "the model of sdxl-regression as --student",
        f"COCO FID 19.01, patch FID 26.98, CLIP score .336 {_OF_DMD2}",
    ),
    "sdxl-dmd2-4step": Note(
        "DMD2 with GAN, 4 steps",
        _SDXL,
        _IMAGES,
        "57 hours of 64 A100 (published)",
        f"COCO FID 19.32, patch FID 20.86, CLIP score .332 {_OF_DMD2}",
    ),
    "sdxl-dmd2-4step-lora": Note(
        "DMD2 with GAN, 4 steps, LoRA",
        _SDXL,
        _IMAGES,
        "63 hours of 64 A100 (published)",
        f"COCO FID 19.68 {_OF_DMD2}",
    ),
    "sd15-dmd2-low-memory": Note("DMD2 without GAN, 1 step, LoRAs", _SD15, _PROMPTS, _CARD),
    "sdxl-dmd2-1step-low-memory": Note("DMD2 with GAN, 1 step, LoRAs", _SDXL, _IMAGES, _CARD),
    "sdxl-dmd2-4step-low-memory": Note("DMD2 with GAN, 4 steps, LoRAs", _SDXL, _IMAGES, _CARD),
}

NOTES: dict[str, Note] = {
    "emoji-vae": Note("autoencoder", EMOJI, SCENES, "0.8 core hours"),
    "emoji-vae-enlarged": Note("autoencoder of the latents of --init", EMOJI, SCENES, "0.8 core hours"),
    "emoji-classifier": Note("classifier", EMOJI, SCENES, "0.8 core hours"),
    "emoji-second-opinion": Note("classifier", EMOJI, SCENES, "0.8 core hours"),
    "emoji-teacher": Note("denoising", EMOJI, SCENES, "12 core hours (estimated)"),
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
    **{
        f"{name}-teacher": Note(
            "denoising", EDM, data, f"{mimg} million images", f"FID {fid} (Karras et al. 2022, {table})"
        )
        for name, data, mimg, fid, table in (
            ("cifar10-ve", CIFAR, 200, "1.79 with Heun 18", "table 2"),
            ("cifar10-uncond-ve", CIFAR, 200, "1.98 with Heun 18", "table 2"),
            ("ffhq", "FFHQ 64x64", 200, "2.39 with Heun 40", "table 2"),
            ("ffhq-ve", "FFHQ 64x64", 200, "2.53 with Heun 40", "table 2"),
            ("afhqv2", "AFHQv2 64x64", 200, "1.96 with Heun 40", "table 2"),
            ("afhqv2-ve", "AFHQv2 64x64", 200, "2.16 with Heun 40", "table 2"),
            ("imagenet64", IMAGENET, 2500, "1.36 with Heun 256 and churn", "sec. 5"),
        )
    },
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
        "FID 1.99 (FastGen)",
    ),
    "imagenet64-dmd2-fastgen": Note(
        "DMD2 with GAN",
        EDM,
        IMAGENET,
        f"--init {_ADM}",
        "FID 1.12 (FastGen)",
    ),
    "cifar10-f-distill": Note("f-distill (2502.15681)", EDM, CIFAR, f"--init {_COND}", "FID 1.85 (FastGen)"),
    "imagenet64-f-distill": Note("f-distill (2502.15681)", EDM, IMAGENET, f"--init {_ADM}", "FID 1.11 (FastGen)"),
    **_gdd("cifar10", CIFAR, "edm-cifar10-32x32-uncond-ve or -cond-ve", "1.54"),
    **_gdd("afhqv2", "AFHQv2 64x64", "edm-afhqv2-64x64-uncond-ve", "1.23"),
    **_gdd("ffhq", "FFHQ 64x64", "edm-ffhq-64x64-uncond-ve", "0.85"),
    **_gdd("imagenet64", IMAGENET, _ADM, "1.16"),
    "lora-dmd2": Note(
        "DMD2 as a LoRA, 4 steps", "sdxl or sd15", "`dmd2 data prompts`, `latents`", "any teacher as --init"
    ),
    **STABLE_DIFFUSION,
    **{
        f"{model}-{name}": Note(f"{method}, {steps}", family, data, takes)
        for model, family, data, takes, steps_of in (
            ("emoji", EMOJI, SCENES, "the embedded teacher", {"sid": 1, "sida": 1, "gdd": 1, "gdd-i": 1}),
            ("cifar10-small", EDM, CIFAR, f"{_TEACHER}; as long as cifar10-small-dmd2-gan", {}),
        )
        for name, method in AFTER_DMD2.items()
        if model == "emoji" or name not in ("decoupled", "gdd", "gdd-i")
        for steps in ("4 steps" if model == "emoji" and name not in steps_of else "1 step",)
    },
}


def note_of(name: str, recipe: Recipe) -> Note:
    """What is noted of a recipe; else what it says itself."""
    return NOTES.get(name, Note(recipe.kind, "any", recipe.data, ""))
