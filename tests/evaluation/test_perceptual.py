"""LPIPS over a TorchScript file: a small stand-in with the interface of NVIDIA's vgg16.pt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.evaluation.perceptual import Lpips
from dmd2.runtime.errors import UserError
from dmd2.training.losses import l2
from dmd2.training.methods.dmd import regression_distance

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Features(nn.Module):
    """Random features; refuses what it should not be called with."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 3, 16, 16, generator=generator) / 1000)

    def forward(self, images: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        if resize_images or not return_lpips or list(images.shape[1:]) != [3, 224, 224]:
            raise ValueError("called in another way")
        if images.min() < -1e-3 or images.max() > 255.001:
            raise ValueError("beyond 0 to 255")
        return F.conv2d(images, self.weight, stride=16).relu().flatten(1)


class OneImage(nn.Module):
    """Answers with one vector, whatever the number of images."""

    def forward(self, images: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        return images.sum((0, 2, 3))


class Other(nn.Module):
    """Any network: has no such options."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(Features(), tmp_path_factory.mktemp("lpips") / "vgg16.pt")


def samples(seed: int, n: int = 3) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_distance_is_the_squared_difference_of_the_features(vgg: Path) -> None:
    lpips, x, y = Lpips(vgg, "cpu"), samples(0), samples(1)
    reference = Features()

    def features(images: Tensor) -> Tensor:
        large = F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False)
        return F.conv2d((large * 0.5 + 0.5) * 255, reference.weight, stride=16).relu().flatten(1)

    with torch.no_grad():
        expected = sum(float((a - b).square().sum()) for a, b in zip(features(x), features(y), strict=True)) / 3
    assert float(lpips(x, y)) == pytest.approx(expected, rel=1e-4)
    assert float(lpips(y, x)) == pytest.approx(expected, rel=1e-4)
    assert float(lpips(x, x.clone())) == 0


def test_distance_is_differentiable_and_its_network_frozen(vgg: Path) -> None:
    lpips, x, y = Lpips(vgg, "cpu"), samples(0).requires_grad_(), samples(1)
    before = lpips(x, y)
    before.backward()
    assert x.grad is not None and bool(x.grad.any(dim=0).any())
    nearer = (x - 0.1 * x.grad / x.grad.abs().max()).detach().clamp(-1, 1)
    assert float(lpips(nearer, y)) < float(before.detach())
    assert all(not p.requires_grad for p in lpips.network.parameters())


def test_which_distance_it_is_gets_said(vgg: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert regression_distance(None, "cpu") is l2
    assert "L2" in capsys.readouterr().out
    distance, x, y = regression_distance(vgg, "cpu", lambda x: x / 2), samples(0), samples(1)
    assert f"LPIPS, {vgg}" in capsys.readouterr().out
    assert torch.equal(distance(x, y), Lpips(vgg, "cpu")(x / 2, y / 2))  # of the images that latents decode to


def test_wrong_files_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a network at all")
    cases = {
        tmp_path / "absent.pt": "no such file",
        broken: "not a TorchScript network",
        scripted(Other(), tmp_path / "other.pt"): "not a TorchScript network of this kind",
        scripted(OneImage(), tmp_path / "one.pt"): "one vector for each image",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            Lpips(path, "cpu")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
