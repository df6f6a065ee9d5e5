"""Images that show no emoji properly: made of ones that do, none left as it was, the same for the same seed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.emoji.smears import WAYS, smeared


def images(n: int, side: int) -> torch.Tensor:
    """Each of another flat colour on black, with a bright bar that lies off its middle."""
    x = torch.zeros(n, 3, side, side)
    quarter = side // 4
    x[:, :, quarter:-quarter, quarter:-quarter] = torch.linspace(60, 200, n)[:, None, None, None]
    x[:, 0, quarter : quarter + 2, quarter:-quarter] = 255
    return x


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(2, 12), side=st.sampled_from([32, 48, 64]), seed=st.integers(0, 2**31))
def test_spoiled_images_differ_and_stay_in_range(n: int, side: int, seed: int) -> None:
    x = images(n, side)
    made = smeared(x, torch.Generator().manual_seed(seed))
    assert made.shape == x.shape and made.isfinite().all()
    assert made.min() > -40 and made.max() < 295, "bicubic overshoots a little, no more"
    assert ((made - x).abs().amax((1, 2, 3)) > 5).all(), "every image is changed"
    assert torch.equal(made, smeared(x, torch.Generator().manual_seed(seed)))


def test_all_ways_are_taken() -> None:
    x = images(2, 32).repeat(40, 1, 1, 1)
    made = smeared(x, torch.Generator().manual_seed(0))
    share_changed = ((made - x).abs().amax(1) > 1).float().mean((1, 2))
    assert WAYS == 6 and share_changed.unique().numel() > WAYS
