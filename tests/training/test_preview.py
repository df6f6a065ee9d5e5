"""Grids of samples."""

from __future__ import annotations

import torch

from dmd2.training.preview import tile


def test_pictures_lie_row_by_row_and_missing_ones_are_white() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 4)
    grid = tile(images, columns=3)
    assert grid.shape == (3, 4, 12)
    assert [int(grid[0, 0, 4 * column]) for column in range(3)] == [0, 1, 2]
    assert [int(grid[0, 2, 4 * column]) for column in range(3)] == [3, 4, 255]
