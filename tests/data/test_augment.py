"""Augmentation: identities of the transformation, and labels that say what was done."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dmd2.data.augment import AUGMENT_DIM, LOW_PASS, _generate, _rotation, augment, transform


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(n: int = 3, side: int = 16) -> torch.Tensor:
    x = torch.randn(n, 3, 4, 4, generator=generator())
    return F.interpolate(x, size=(side, side), mode="bicubic").clamp(-1, 1)


def test_the_filter_is_orthogonal() -> None:
    f = torch.tensor(LOW_PASS, dtype=torch.float64)
    assert math.isclose(float(f.sum()), math.sqrt(2), abs_tol=1e-10)
    for shift in range(0, len(f), 2):
        assert math.isclose(float((f[: len(f) - shift] * f[shift:]).sum()), float(shift == 0), abs_tol=1e-10)


def test_the_identity_gives_the_image_back() -> None:
    x = torch.rand(3, 3, 16, 16, generator=generator()) * 2 - 1
    assert torch.allclose(transform(x, torch.eye(3).repeat(3, 1, 1)), x, atol=2e-6)


def test_mirroring_turning_and_moving_do_what_they_say() -> None:
    x = smooth()
    interior = (..., slice(3, -3), slice(3, -3))

    def close(forward: torch.Tensor, expected: torch.Tensor) -> bool:
        return float((transform(x, forward.repeat(3, 1, 1)) - expected)[interior].abs().mean()) < 0.03

    assert close(torch.diag(torch.tensor([-1.0, 1.0, 1.0])), x.flip(3))
    assert close(torch.diag(torch.tensor([1.0, -1.0, 1.0])), x.flip(2))
    # image coordinates: x to the right, y down, so that a positive angle turns clockwise
    assert close(_rotation(torch.tensor([math.pi / 2]))[0], x.rot90(-1, (2, 3)))
    right = torch.eye(3)
    right[0, 2] = 2 * 2 / 16  # by two of 16 pixels, in half sides
    assert close(right, x.roll(2, 3))
    assert not close(right, x)


def test_labels_say_what_was_done() -> None:
    forward, labels = _generate(4000, 0.5, generator())
    assert labels.shape == (4000, AUGMENT_DIM)
    a0, a1, a2, cosine, sine, stretch_x, stretch_y, a6, a7 = labels.unbind(1)
    # The product's determinant is what flips and scaling say, whatever rotations and stretching do
    expected = (1 - 2 * a0) * (1 - 2 * a1) * (2**0.2) ** (2 * a2)
    assert torch.allclose(torch.linalg.det(forward), expected, rtol=1e-4)
    assert torch.allclose(forward[:, :2, 2], torch.stack([a6, a7], 1) / 4, atol=1e-6)
    assert torch.allclose((cosine + 1) ** 2 + sine**2, torch.ones(4000), atol=1e-5)
    plain = (stretch_x == 0) & (stretch_y == 0) & (a2 == 0) & (a0 == 0) & (a1 == 0)
    assert torch.allclose(forward[plain, 1, 0], -sine[plain], atol=1e-6) and int(plain.sum()) > 100
    for happens, share in ((a0 != 0, 0.5), (a1 != 0, 0.25), (a2 != 0, 0.5), (sine != 0, 0.5), (a6 != 0, 0.5)):
        assert abs(float(happens.float().mean()) - share) < 0.03


def test_images_are_stretched_along_the_labelled_direction_half_of_them_along_an_axis() -> None:
    forward, labels = _generate(4000, 0.5, generator())
    a0, a1, a2, cosine, _, stretch_x, stretch_y = labels.unbind(1)[:7]
    alone = (a0 == 0) & (a1 == 0) & (a2 == 0) & (cosine == 0) & (stretch_x.hypot(stretch_y) > 0.1)
    assert int(alone.sum()) > 100
    linear, labelled = forward[alone, :2, :2], torch.stack([stretch_x, -stretch_y], 1)[alone]  # y down
    amount = labelled.norm(dim=1)
    along = labelled / amount[:, None]
    moved = torch.einsum("nij,nj->ni", linear, along)
    # a5 may be negative: then it is turned by half a turn, and shrinks.
    factors = (moved * along).sum(1)
    assert torch.allclose(moved, factors[:, None] * along, atol=1e-5)  # an eigenvector
    assert torch.allclose(factors.log2().abs(), 0.2 * amount, atol=1e-4)
    straight = float((stretch_y[alone] == 0).float().mean())
    assert abs(straight - 0.5) < 0.1
    positive = stretch_x[alone][stretch_y[alone] == 0] > 0
    assert torch.equal(linear[stretch_y[alone] == 0, 0, 0] > 1, positive)


def test_nothing_done_is_labelled_zero_and_leaves_the_image_alone() -> None:
    x = smooth(64)
    out, labels = augment(x, 0.0, generator())
    kept = labels.abs().sum(1) == 0
    assert 20 < int(kept.sum()) < 44  # the others are mirrored
    assert torch.allclose(out[kept], x[kept], atol=2e-6)
    assert torch.equal(labels[~kept, 0], torch.ones(int((~kept).sum()))) and not labels[:, 1:].any()
    assert not torch.allclose(out[~kept], x[~kept], atol=0.1)


def test_draws_depend_on_the_generator_alone() -> None:
    x = smooth(8)
    (one, labels), (two, again) = augment(x, 0.5, generator(3)), augment(x, 0.5, generator(3))
    assert torch.equal(one, two) and torch.equal(labels, again)
    assert not torch.equal(labels, augment(x, 0.5, generator(4))[1])
