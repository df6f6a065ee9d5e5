"""What surrounds the raw network: D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise) (Karras et al. 2022, eq. 7, table 1).

EDM's own, consistency models' variant of it that GDD's students use, and the older ones of the checkpoints that EDM
compares with: VP and VE (Song et al. 2021), iDDPM (Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["edm", "vp", "ve", "iddpm"]
LEVELS = 1000
"""M of VP and iDDPM"""
BETA_D, BETA_MIN = 19.9, 0.1
"""of VP"""
C_1, C_2 = 0.001, 0.008
"""of iDDPM"""
RANGES: dict[Kind, tuple[float, float]] = {
    "edm": (0.002, 80.0),
    "vp": (0.002, 80.0),
    "ve": (0.02, 100.0),
    "iddpm": (0.0064, 80.0),
}
"""σ that a network is sampled and distilled at"""


def precondition(
    kind: Kind, sigma: Tensor, sigma_data: float, boundary: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in and c_noise, each (B,) fp32, at σ (B,).

    Args:
        boundary: ε of Song et al. 2023, app. C, of EDM's own; 0 is none.
    """
    sigma = sigma.float()
    if kind == "edm":
        norm = (sigma**2 + sigma_data**2).sqrt()
        skip = sigma_data**2 / ((sigma - boundary) ** 2 + sigma_data**2)
        return skip, (sigma - boundary) * sigma_data / norm, 1 / norm, sigma.log() / 4
    one = torch.ones_like(sigma)
    if kind == "ve":
        return one, sigma, one, (sigma / 2).log()
    scale = (sigma**2 + 1).rsqrt()
    if kind == "vp":  # (M − 1)·t, with t the inverse of σ(t)² = exp(½·β_d·t² + β_min·t) − 1
        time = ((BETA_MIN**2 + 2 * BETA_D * torch.log1p(sigma**2)).sqrt() - BETA_MIN) / BETA_D
        return one, -sigma, scale, (LEVELS - 1) * time
    nearest = (iddpm_levels().to(sigma)[None] - sigma[:, None]).abs().argmin(1)
    return one, -sigma, scale, (LEVELS - 1 - nearest).float()


@lru_cache(maxsize=1)
def iddpm_levels() -> Tensor:
    """u_0 … u_M (table 1, "time steps"), descending to 0, float64."""

    def alpha_bar(j: int) -> float:
        return math.sin(0.5 * math.pi * j / LEVELS / (C_2 + 1)) ** 2

    levels = [0.0] * (LEVELS + 1)
    for j in range(LEVELS, 0, -1):
        ratio = max(alpha_bar(j - 1) / alpha_bar(j), C_1)
        levels[j - 1] = math.sqrt((levels[j] ** 2 + 1) / ratio - 1)
    return torch.tensor(levels, dtype=torch.float64)
