"""The projected discriminator: what is frozen, what learns, and its two kinds of backbones."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Cond
from dmd2.models.edm.family import encoder_levels
from dmd2.models.edm.network import ClassCondition, Edm, EdmConfig, EdmNetwork
from dmd2.runtime.errors import UserError
from dmd2.training.discriminators.projected import (
    DenoiserFeatures,
    ProjectedDiscriminator,
    TimmFeatures,
)
from dmd2.training.losses import gan_critic


class Pyramid(nn.Module):
    """A frozen random network with a map at 16×16 and one at 8×8."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 20, 4, 2, 1)
        self.requires_grad_(False)

    def forward(self, images: Tensor, cond: Cond) -> list[Tensor]:
        fine = self.fine(images).relu()
        return [fine, self.coarse(fine).relu()]


def labels_of(cond: Cond) -> Tensor:
    labels: Tensor = cond.labels
    return labels


def condition(*indices: int, classes: int = 3) -> ClassCondition:
    return ClassCondition.of(torch.tensor(indices), classes)


def discriminator(backbones: int = 1, **options: Any) -> tuple[ProjectedDiscriminator, list[Pyramid]]:
    torch.manual_seed(0)
    pyramids = [Pyramid() for _ in range(backbones)]
    return ProjectedDiscriminator(pyramids, torch.zeros(1, 3, 16, 16), None, channels=16, **options), pyramids


def samples(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def stripes(n: int, seed: int, axis: int) -> Tensor:
    """Noisy images with horizontal or vertical stripes: of one mean, told apart by structure."""
    wave = torch.arange(16).div(2, rounding_mode="floor") % 2 - 0.5
    return 0.5 * samples(n, seed) + (wave[:, None] if axis else wave[None, :])


def test_logits_are_5_by_5_from_each_scale_of_each_backbone() -> None:
    for backbones in (1, 2):
        d, _ = discriminator(backbones)
        assert d(samples(4, 0), None).shape == (4, backbones * 2 * 25)


def test_an_image_s_logits_do_not_depend_on_its_neighbours() -> None:
    d, _ = discriminator()
    d.eval()  # spectral norm's estimate stands still
    images = samples(4, 0)
    assert torch.allclose(d(images, None)[1:2], d(images[1:2], None), atol=1e-5)
    assert float(d(images, None).detach().std(0).min()) > 1e-4


def test_every_scale_reaches_every_coarser_and_finer_head() -> None:
    """Across scales information flows from coarse to fine; the coarsest head sees its own scale alone."""
    d, _ = discriminator()
    branch: Any = d.branches[0]
    fine, coarse = torch.randn(1, 12, 16, 16), torch.randn(1, 20, 8, 8)
    mixed = branch.mix([fine, coarse])
    other_fine, other_coarse = branch.mix([2 * fine, coarse]), branch.mix([fine, 2 * coarse])
    assert [m.shape for m in mixed] == [(1, 16, 16, 16), (1, 16, 8, 8)]
    assert not torch.allclose(mixed[0], other_fine[0]) and torch.equal(mixed[1], other_fine[1])
    assert not torch.allclose(mixed[0], other_coarse[0]) and not torch.allclose(mixed[1], other_coarse[1])


def test_mixing_keeps_variance() -> None:
    d, _ = discriminator()
    branch: Any = d.branches[0]
    mixed = branch.mix([torch.randn(64, 12, 16, 16), torch.randn(64, 20, 8, 8)])
    for m in mixed:  # random weights, enlarging and the border take and give some of it
        assert 0.3 < float(m.var()) < 2


def test_heads_learn_and_nothing_else() -> None:
    d, pyramids = discriminator()
    frozen = {name: buffer.clone() for name, buffer in d.named_buffers() if ".across_" in name}
    features = [p.clone() for p in pyramids[0].parameters()]
    assert len(frozen) == 4 and frozen.keys() <= d.state_dict().keys()
    assert all(name.startswith("branches.0.heads.") for name, _ in d.named_parameters())
    assert not any("fine" in name or "coarse" in name for name in d.state_dict())  # backbones are not saved

    optimizer = torch.optim.Adam(d.parameters(), 2e-3, betas=(0.0, 0.99))
    losses = []
    for step in range(25):
        real, fake = stripes(16, 2 * step, 0), stripes(16, 2 * step + 1, 1)
        loss = gan_critic(d(real, None), d(fake, None))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.2 and sum(losses[-5:]) / 5 < 0.5 * losses[0]
    unseen_real, unseen_fake = d(stripes(32, 1000, 0), None).mean(1), d(stripes(32, 1001, 1), None).mean(1)
    assert float((unseen_real > 0).float().mean()) > 0.95 and float((unseen_fake < 0).float().mean()) > 0.95

    buffers = dict(d.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in frozen.items())
    assert all(torch.equal(p, old) for p, old in zip(pyramids[0].parameters(), features, strict=True))
    assert all(p.grad is None for p in pyramids[0].parameters())


def test_images_are_told_where_to_go() -> None:
    d, _ = discriminator()
    images = samples(2, 0).requires_grad_()
    d(images, None).sum().backward()
    assert images.grad is not None and float((images.grad != 0).float().mean()) > 0.99


def test_class_and_image_must_agree() -> None:
    d, _ = discriminator(classes=3, labels_of=labels_of)
    d.eval()
    images = samples(1, 0).expand(3, -1, -1, -1)
    logits = d(images, condition(0, 1, 2)).detach()
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
    no_class = d(images[:1], condition(-1))
    plain: Any = d.branches[0]
    for head in plain.heads:
        nn.init.zeros_(head.embed.weight)
    assert torch.allclose(d(images[:1], condition(0)), no_class)  # what is left judges the image alone


@pytest.mark.parametrize("options", [{"classes": 3}, {"labels_of": labels_of}])
def test_classes_need_labels(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="both or neither"):
        discriminator(**options)


# A denoiser as backbone


def edm(architecture: str = "ddpmpp", **change: Any) -> EdmNetwork:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "architecture": architecture,
        "resolution": 16,
        "classes": 3,
        "model_channels": 64 if architecture == "adm" else 8,
        "channel_mult": (1, 2),
        "blocks": 2,
        "attention": (8,),
    }
    return EdmNetwork(EdmConfig(**values | change)).requires_grad_(False).eval()


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_encoder_levels_are_its_last_blocks(architecture: str) -> None:
    network = edm(architecture)
    names = {id(module): name for name, module in network.named_modules()}
    assert [names[id(m)] for m in encoder_levels(network)] == ["model.enc.16x16_block1", "model.enc.8x8_block1"]


def test_encoder_levels_of_another_network() -> None:
    with pytest.raises(ValueError, match="EDM network"):
        encoder_levels(nn.Sequential(nn.Linear(2, 2)))


def test_denoiser_features_are_the_activations_of_its_forward_pass() -> None:
    network = edm()
    backbone = DenoiserFeatures(Edm(network), encoder_levels(network), sigma=0.3)
    images, cond = samples(2, 0), condition(0, 2)
    maps = backbone(images, cond)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 16), (2, 16, 8, 8)]
    _, bottleneck = Edm(network).features(images, torch.full((2,), 0.3), cond)
    assert torch.equal(maps[-1], bottleneck)
    assert not torch.equal(backbone(images, condition(1, 1))[-1], maps[-1])  # it sees the class
    assert all(not module._forward_hooks for module in network.modules())


def test_the_decoder_is_not_run() -> None:
    network = edm()
    ran: list[str] = []
    for name, module in network.named_modules():
        if name.startswith("model.dec.") and name.count(".") == 2:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    DenoiserFeatures(Edm(network), encoder_levels(network))(samples(1, 0), condition(0))
    assert ran == []
    Edm(network)(samples(1, 0), torch.ones(1), condition(0))
    assert len(ran) > 5


def test_layers_that_do_not_run_are_an_error() -> None:
    network = edm()
    backbone = DenoiserFeatures(Edm(network), [*encoder_levels(network), nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="only 2 of 3"):
        backbone(samples(1, 0), condition(0))
    assert all(not module._forward_hooks for module in network.modules())


def test_a_discriminator_on_a_denoiser_tells_images_where_to_go() -> None:
    network = edm()
    backbone = DenoiserFeatures(Edm(network), encoder_levels(network))
    cond = condition(0, 1)
    d = ProjectedDiscriminator([backbone], samples(1, 0), cond[:1], channels=16)
    images = samples(2, 1).requires_grad_()
    d(images, cond).sum().backward()
    assert images.grad is not None and bool(images.grad.any())
    assert all(p.grad is None for p in network.parameters())


# timm, which cannot be installed everywhere: its documented interface, played by a fake


class FakeTimm(nn.Module):
    """Maps with timm's strides for a picture of 224×224, made of the normalised image itself."""

    def __init__(self, reductions: list[int], mean: tuple[float, ...]) -> None:
        super().__init__()
        self.reductions, self.scale = reductions, nn.Parameter(torch.ones(()))
        self.pretrained_cfg = {"mean": mean, "std": (0.5, 0.25, 0.125)}
        self.feature_info = SimpleNamespace(reduction=lambda: reductions)

    def forward(self, x: Tensor) -> list[Tensor]:
        assert x.shape[1:] == (3, 224, 224)
        return [F.avg_pool2d(x, reduction) * self.scale for reduction in self.reductions]


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Puts the fake in timm's place; the calls of `create_model`."""
    calls: list[tuple[str, dict[str, Any]]] = []
    reductions = {
        "tf_efficientnet_lite0": [2, 4, 8, 16, 32],
        "vgg16_bn": [1, 2, 4, 8, 16, 32],
        "deit_base_distilled_patch16_224": [16, 16, 16, 16],
        "fine_only": [1, 2, 4],
    }

    def create_model(name: str, **options: Any) -> nn.Module:
        calls.append((name, options))
        if name not in reductions:
            raise RuntimeError(f"Unknown model ({name})")
        return FakeTimm(reductions[name], (0.5, 0.25, 0.75))

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    return calls


@pytest.mark.parametrize("name", ["vgg16_bn", "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"])
def test_timm_s_maps_are_normalised_and_have_four_scales(timm: list[Any], name: str) -> None:
    backbone = TimmFeatures(name, "cpu")
    images = torch.tensor([1.0, 0.0, -1.0])[None, :, None, None].expand(2, 3, 32, 32)
    maps = backbone(images, None)
    sides = {"vgg16_bn": [112, 56, 28, 14], "tf_efficientnet_lite0": [56, 28, 14, 7]}.get(name, [14] * 4)
    assert [m.shape[2] for m in maps] == sides
    for m in maps:  # ((1, ½, 0) − mean) / std
        assert torch.allclose(m.mean((0, 2, 3)), torch.tensor([1.0, 1.0, -6.0]), atol=1e-4)
    assert not any(p.requires_grad for p in backbone.network.parameters()) and not backbone.network.training
    ((called, options),) = timm
    assert called == name and options["pretrained"] is True and options["features_only"] is True
    assert ("out_indices" in options) == name.startswith("deit")

    d = ProjectedDiscriminator([backbone], images[:1], None, channels=16)
    assert d(images, None).shape[0] == 2


def test_networks_that_timm_cannot_give_are_one_line(timm: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (("vgg17", "cannot make it .Unknown model"), ("fine_only", r"strides \[1, 2, 4\]")):
        with pytest.raises(UserError, match=message):
            TimmFeatures(name, "cpu")
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(UserError, match="needs timm and torchvision"):
        TimmFeatures("vgg16_bn", "cpu")
