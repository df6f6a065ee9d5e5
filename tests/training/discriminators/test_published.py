"""GDD's discriminator as published: sides, widths and numbers of parameters, what is frozen, what a class does."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd2.diffusion.denoiser import Cond
from dmd2.models.edm.network import ClassCondition
from dmd2.runtime.errors import UserError
from dmd2.training.discriminators.published import PublishedDiscriminator, class_embeddings
from dmd2.training.losses import r1

SHAPES = {  # of the maps of 224×224 pixels, as timm has them
    "vgg16_bn": [(128, 112), (256, 56), (512, 28), (512, 14)],
    "tf_efficientnet_lite0": [(24, 56), (40, 28), (112, 14), (320, 7)],
    "deit_base_distilled_patch16_224": [(768, 14)] * 4,
}


class Maps:
    """Maps of a network's shapes, each a mix of the image's colours."""

    def __init__(self, name: str) -> None:
        g = torch.Generator().manual_seed(0)
        self.weights = [(torch.randn(c, 3, 1, 1, generator=g), side) for c, side in SHAPES[name]]

    def __call__(self, images: Tensor, cond: Cond) -> list[Tensor]:
        resized = (nn.functional.interpolate(images, size=(side, side)) for _, side in self.weights)
        return [torch.conv2d(x, weight).tanh() for x, (weight, _) in zip(resized, self.weights, strict=True)]


def discriminator(name: str, **options: Any) -> PublishedDiscriminator:
    torch.manual_seed(0)
    return PublishedDiscriminator([Maps(name)], torch.zeros(1, 3, 32, 32), None, **options)


def samples(n: int) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) * 2 - 1


@pytest.mark.parametrize("name", SHAPES)
def test_heads_have_the_published_sides_widths_and_number_of_parameters(name: str) -> None:
    d = discriminator(name)
    branch: Any = d.branches[0]
    maps = Maps(name)(samples(1), None)
    inputs = [tuple(x.shape[1:]) for x in branch.mix(maps)]
    assert inputs == [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14)]
    assert sum(p.numel() for p in d.parameters()) == pytest.approx(10.3e6, rel=0.01)
    logits = [m for m in d.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1]
    assert len(logits) == 4 and all(m.bias is None and m.in_channels == 512 for m in logits)
    assert d(samples(2), None).shape == (2, 64)


def test_mixing_goes_from_coarse_to_fine() -> None:
    branch: Any = discriminator("tf_efficientnet_lite0").branches[0]
    maps = Maps("tf_efficientnet_lite0")(samples(1), None)
    plain = branch.mix(maps)
    for i in range(4):
        other = branch.mix([2 * m if k == i else m for k, m in enumerate(maps)])
        assert [not torch.allclose(a, b) for a, b in zip(plain, other, strict=True)] == [k <= i for k in range(4)]


def test_only_heads_learn_and_what_is_random_is_saved() -> None:
    d = discriminator("deit_base_distilled_patch16_224")
    assert all(".heads." in name for name, _ in d.named_parameters())
    frozen = {name for name, _ in d.named_buffers() if ".heads." not in name}
    assert frozen <= d.state_dict().keys()
    # a weight and a bias each: 4 of the transformer's and 3 that resample them, 4 across channels, 4 across scales
    assert len(frozen) == 2 * (4 + 3 + 4 + 4)


def test_real_images_are_penalised_through_everything() -> None:
    d = discriminator("tf_efficientnet_lite0")
    real = samples(2).requires_grad_()
    r1(d(real, None), real).backward()
    assert real.grad is not None and all(p.grad is not None for p in d.parameters())


def test_classes_are_judged_by_projection_alone_and_their_embeddings_learn() -> None:
    table = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    d = discriminator("tf_efficientnet_lite0", embeddings=table, labels_of=lambda c: c.labels)  # type: ignore[union-attr]
    d.eval()
    cond = ClassCondition.of(torch.tensor([0, 1, 2]), 3)
    logits = d(samples(1).expand(3, -1, -1, -1), cond)
    assert logits.shape == (3, 64) and not torch.allclose(logits[0], logits[1])
    logits.square().sum().backward()
    assert d.embeddings is not None and torch.equal(d.embeddings.detach(), table)
    assert d.embeddings.grad is not None and bool((d.embeddings.grad != 0).all())
    head: Any = d.branches[0].heads[0]  # type: ignore[union-attr,index]
    assert head.logits.out_channels == 64 and head.logits.bias is None
    for other in d.branches[0].heads:  # type: ignore[union-attr]
        nn.init.zeros_(other.project.weight)
        nn.init.zeros_(other.project.bias)
    assert not bool(d(samples(3), cond).any())  # no term of the image alone


def test_embeddings_are_a_pretrained_network_s_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(7, 1000)
    network = SimpleNamespace(get_classifier=lambda: layer)
    fake = SimpleNamespace(create_model=lambda name, pretrained: network if pretrained else None)
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert torch.equal(class_embeddings(10), layer.weight[:10])
    with pytest.raises(UserError, match="embeddings of 1000 classes, not 1001"):
        class_embeddings(1001)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="cannot be had from timm"):
        class_embeddings(10)


def test_a_network_of_other_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="3 maps; expected 4"):
        PublishedDiscriminator([lambda images, cond: Maps("vgg16_bn")(images, cond)[:3]], samples(1), None)
    with pytest.raises(ValueError, match="both or neither"):
        discriminator("vgg16_bn", embeddings=torch.zeros(2, 3))
