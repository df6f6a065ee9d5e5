"""Recipes in pixel space: EDM's teachers, DMD, DMD2, GDD and GDD-I on them, and the classifier of CIFAR-10."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from dmd2.data.cifar10 import CLASSES as CIFAR10
from dmd2.training.loop import LoopSettings
from dmd2.training.methods.classifier import ImageClassifierRecipe
from dmd2.training.methods.common import Recipe
from dmd2.training.methods.denoising import DenoisingRecipe
from dmd2.training.methods.dmd import DmdRecipe
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.methods.gdd import GddRecipe


def _loop(iterations: int, batch_size: int, every: int, **others: Any) -> LoopSettings:
    return LoopSettings(iterations, batch_size, sample_every=every, checkpoint_every=every, **others)


def _small(iterations: int) -> LoopSettings:
    return _loop(iterations, 32, 100, warmup=20, max_grad_norm=10.0, ema_decay=0.99)


def _unclipped(mimg: int, batch_size: int, every: int, ema_half_life: float = 5e5, warmup: int = 0) -> LoopSettings:
    """EDM's training from scratch (Karras et al. 2022, app. F.3) and GDD's (app. C): no decay, no clipping."""
    others: Any = {"warmup": warmup, "decay": False, "max_grad_norm": 0, "zero_nans": True}
    return _loop(mimg * 10**6 // batch_size, batch_size, every, ema_half_life=ema_half_life, **others)


def _edm(mimg: int, batch_size: int, ema_half_life: float = 5e5) -> LoopSettings:
    return _unclipped(mimg, batch_size, 5000, ema_half_life, warmup=10**7 // batch_size)  # 10 Mimg of warm-up


_gdd = partial(_unclipped, every=1000)


def dmd_loop(iterations: int, batch_size: int, ema_decay: float = 0.0) -> LoopSettings:
    """DMD's and DMD2's (app. B of both): 500 steps of warm-up, no decay, gradient norm at most 10, no average."""
    return _loop(iterations, batch_size, 5000, warmup=500, decay=False, max_grad_norm=10.0, ema_decay=ema_decay)


_FP32: dict[str, Any] = {"precision": "fp32"}
_FASTGEN: dict[str, Any] = {"generator_every": 5, "disjoint": True, "gan_features": "teacher"}


def _gdd_both(name: str, recipe: GddRecipe) -> dict[str, Recipe]:
    return {f"{name}-gdd": recipe, f"{name}-gdd-i": replace(recipe, freeze=True)}


_published_gdd = partial(GddRecipe, freeze=False, discriminator="published")

GAN: Any = {"gan_generator": 3e-3, "gan_critic": 1e-2}
VGG = ("vgg16_bn", "tf_efficientnet_lite0")
DEIT = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")

EDM_RECIPES: dict[str, Recipe] = {
    # 16 epochs
    "cifar10-classifier": ImageClassifierRecipe(
        LoopSettings(6000, batch_size=128, warmup=800, max_grad_norm=5.0, ema_decay=0.995, sample_every=1000),
        lr=0.15,
        weight_decay=5e-4,
        widths=(32, 64, 128),
        features=128,
        held_out=1000,
        classes=CIFAR10,
    ),
    # An hour on two idle cores: nine epochs
    "cifar10-small-teacher": DenoisingRecipe(
        LoopSettings(7000, batch_size=64, warmup=100, ema_decay=0.998, checkpoint_every=250),
        network="cifar10-small",
        lr=4e-3,
        optimizer="muon",
        class_names=CIFAR10,
    ),
    # Students of cifar10-small-teacher, about twelve minutes on one core each. Muon: after a few hundred steps, Adam
    # is still on its way.
    "cifar10-small-dmd": DmdRecipe(
        _small(460), lr=7e-4, lr_critic=2e-3, regression_weight=0.25, pairs_batch=16, optimizer="muon"
    ),
    "cifar10-small-dmd2": Dmd2Recipe(_small(720), lr=7e-4, lr_critic=2e-3, generator_every=2, optimizer="muon"),
    "cifar10-small-dmd2-gan": Dmd2Recipe(
        _small(580), lr=7e-4, lr_critic=2e-3, generator_every=2, **GAN, optimizer="muon"
    ),
    **_gdd_both("cifar10-small", GddRecipe(_small(660), lr=1e-3, lr_critic=2e-3, freeze=False, r1_gamma=1e-4)),
    # Teachers in pixel space, EDM's own recipe (Karras et al. 2022, table 7): FID 1.79 and 1.97 with Heun 18
    "cifar10-teacher": DenoisingRecipe(
        _edm(200, 512),
        network="edm-cifar10-32x32-cond-vp",
        lr=1e-3,
        augment=0.12,
        class_names=CIFAR10,
        precision="fp32",
    ),
    "cifar10-uncond-teacher": DenoisingRecipe(
        _edm(200, 512), network="edm-cifar10-32x32-uncond-vp", lr=1e-3, augment=0.12, precision="fp32"
    ),
    # And at NCSN++, FFHQ, AFHQv2 and ImageNet (tables 2, 3 and 7); the published ImageNet run is in fp16.
    **{
        f"{name}-teacher": DenoisingRecipe(
            _edm(mimg, batch, half_life), network=f"edm-{network}", lr=lr, augment=augment, **others
        )
        for name, network, mimg, batch, lr, augment, half_life, others in (
            ("cifar10-ve", "cifar10-32x32-cond-ve", 200, 512, 1e-3, 0.12, 5e5, _FP32 | {"class_names": CIFAR10}),
            ("cifar10-uncond-ve", "cifar10-32x32-uncond-ve", 200, 512, 1e-3, 0.12, 5e5, _FP32),
            ("ffhq", "ffhq-64x64-uncond-vp", 200, 256, 2e-4, 0.15, 5e5, _FP32),
            ("ffhq-ve", "ffhq-64x64-uncond-ve", 200, 256, 2e-4, 0.15, 5e5, _FP32),
            ("afhqv2", "afhqv2-64x64-uncond-vp", 200, 256, 2e-4, 0.15, 5e5, _FP32),
            ("afhqv2-ve", "afhqv2-64x64-uncond-ve", 200, 256, 2e-4, 0.15, 5e5, _FP32),
            ("imagenet64", "imagenet-64x64-cond-adm", 2500, 4096, 1e-4, 0.0, 5e7, {}),
        )
    },
    # What published recipes have in common that the published runs had otherwise: one seeded order of the data on
    # any number of processes; precision is what is faster ("auto") where theirs is fixed.
    # DMD (Yin et al. 2311.18828, app. B and tables 1 and 2). FID 2.66 (with L2 2.78), 3.77, 2.62
    # --init: edm-cifar10-32x32-cond-vp; --pairs: 100,000 by Heun 18
    "cifar10-dmd": DmdRecipe(
        dmd_loop(300_000, 392), lr=5e-5, lr_critic=5e-5, regression_weight=0.25, pairs_batch=392
    ),
    # --init: edm-cifar10-32x32-uncond-vp; --pairs: 500,000 by Heun 18
    "cifar10-uncond-dmd": DmdRecipe(
        dmd_loop(300_000, 392), lr=5e-5, lr_critic=5e-5, regression_weight=0.5, pairs_batch=392
    ),
    # --init: edm-imagenet-64x64-cond-adm; --pairs: 25,000 by Heun 256
    "imagenet64-dmd": DmdRecipe(
        dmd_loop(350_000, 336), lr=2e-6, lr_critic=2e-6, regression_weight=0.25, pairs_batch=336
    ),
    # DMD2 (Yin et al. 2405.14867, tables 1 and 3). FID 2.61, 1.51, 1.28. The published runs are in bf16,
    # and their critic judges generated images with noise of its own; here it sees those that its score denoises.
    # --init: edm-imagenet-64x64-cond-adm
    "imagenet64-dmd2": Dmd2Recipe(dmd_loop(410_000, 280), lr=2e-6, lr_critic=2e-6, generator_every=5),
    "imagenet64-dmd2-gan": Dmd2Recipe(dmd_loop(200_000, 280), lr=2e-6, lr_critic=2e-6, generator_every=5, **GAN),
    # --student: model/ of a run of imagenet64-dmd2; its fake_score/ goes on, too, and only the head is new
    "imagenet64-dmd2-gan-resumed": Dmd2Recipe(
        dmd_loop(140_000, 280), lr=5e-7, lr_critic=5e-7, generator_every=5, **GAN, resumed=True
    ),
    # NVIDIA's FastGen, which gets FID 1.99 with EMAs of 0.9996 … 0.99995 (here one between) and 1.12: the head on the
    # frozen teacher's features, student and critic on disjoint iterations, no warm-up, CIFAR-10 in fp32. Its optional
    # R1 is off (`--set r1=…`). It names no weight for the critic's GAN loss: DMD2's.
    "cifar10-dmd2": Dmd2Recipe(
        replace(dmd_loop(100_000, 2048, ema_decay=0.9999), warmup=0),
        lr=1e-4,
        lr_critic=1e-4,
        gan_generator=1e-3,
        gan_critic=1e-2,
        **_FASTGEN,
        **_FP32,
    ),
    # It names no EMA for its ImageNet run: as in CIFAR-10's
    "imagenet64-dmd2-fastgen": Dmd2Recipe(
        replace(dmd_loop(600_000, 512, ema_decay=0.9999), warmup=0), lr=2e-6, lr_critic=2e-6, **GAN, **_FASTGEN
    ),
    # GDD (Zheng & Yang 2405.20750, tables 1 to 5). GDD-I's FID: 1.54, 1.23, 0.85, 1.16. The published runs add up the
    # losses of a GPU's images and of the feature networks, but take R1's mean: with 64 images on each GPU (ImageNet:
    # 128) R1 weighs 1/128 (1/256) of what γ = 1e-4 says. Losses are means here, so γ is divided by that. Where the
    # embeddings of classes come from, `dmd2.training.discriminators.published` says.
    # --init: edm-cifar10-32x32-uncond-ve or -cond-ve
    **_gdd_both("cifar10", _published_gdd(_gdd(5, 256), lr=1e-4, lr_critic=1e-4, backbones=VGG)),
    # --init: edm-afhqv2-64x64-uncond-ve
    **_gdd_both("afhqv2", _published_gdd(_gdd(10, 256), lr=2e-5, lr_critic=4e-5, backbones=DEIT)),
    # --init: edm-ffhq-64x64-uncond-ve
    **_gdd_both("ffhq", _published_gdd(_gdd(10, 256), lr=2e-5, lr_critic=4e-5, backbones=DEIT)),
    # --init: edm-imagenet-64x64-cond-adm
    **_gdd_both(
        "imagenet64",
        _published_gdd(
            _gdd(10, 512, ema_half_life=5e7), lr=8e-6, lr_critic=4e-5, backbones=DEIT, r1_gamma=1e-4 / 256
        ),
    ),
}
