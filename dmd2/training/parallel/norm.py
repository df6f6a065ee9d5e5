"""Batch normalisation by the statistics of a batch that lies on several processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SharedBatchNorm(nn.BatchNorm2d):
    """As `nn.BatchNorm2d` on the whole batch.

    torch's SyncBatchNorm runs on GPUs alone, and has no second derivative, which R1 needs.
    """

    processes = 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same; every process has as many rows."""
        if not self.training:
            return super().forward(x)
        mean = self._mean(x)
        centred = x - mean[:, None, None]
        variance = self._mean(centred.square())
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            count = self.processes * x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
        out = centred / (variance + self.eps).sqrt()[:, None, None]
        return out if self.weight is None else out * self.weight[:, None, None] + self.bias[:, None, None]

    def _mean(self, x: Tensor) -> Tensor:
        return all_reduce(x.mean((0, 2, 3))) / self.processes


def share_batch_norms(network: nn.Module, processes: int) -> None:
    """Has every batch normalisation of a network look at the whole batch, in place."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and processes > 1:
            module.__class__, module.processes = SharedBatchNorm, processes  # type: ignore[assignment]
