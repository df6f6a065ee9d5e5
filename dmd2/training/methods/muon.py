"""Muon (Jordan et al. 2024) for matrices and convolutions, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.training.parallel.group import fitted, local, whole_of

A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial whose five steps bring singular values near 1 (Jordan et al.)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps.

    The update is scaled to the size that Adam's would have (0.2·√max(rows, columns), Liu et al. 2025, eq. 4),
    so that a learning rate for AdamW does for both. Convolutions count as matrices of (out, in·h·w). Of parameters in
    shards only the momentum is: every process orthogonalises whole matrices, one by one.

    Args:
        module: whose parameters to train; embeddings, biases, norms and gains are left to AdamW.
        lr: learning rate.
        weight_decay: decoupled, for both.
        dtype: of the Newton-Schulz steps; bf16 does where the device is fast in it.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        parameters = list(module.parameters())
        matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
        chosen = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in chosen]
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "muon": True}
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "muon": False}]
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adam)(parameters, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            gradient = local(p.grad)
            buffer = local(state["momentum"]).lerp_(gradient, 1 - group["momentum"])
            update = whole_of(gradient.lerp(buffer, group["momentum"]), p).flatten(1)  # Nesterov
            shapes[(update.shape[0], update.shape[1])].append((p, update))
        for (rows, columns), entries in shapes.items():  # equal shapes in one batch of matrix products
            updates = orthogonalised(torch.stack([update for _, update in entries]).to(self._dtype)).float()
            scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            for (p, _), update in zip(entries, updates, strict=True):
                step = local(fitted(scale * update.view(p.shape), p))
                local(p).mul_(1 - group["lr"] * group["weight_decay"]).sub_(step)

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if "step" not in state:
                state |= {"step": torch.tensor(0.0), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            state["step"] += 1
            step = float(state["step"])
            gradient = local(p.grad)
            mean = local(state["mean"]).lerp_(gradient, 0.1)
            square = local(state["square"]).lerp_(gradient.square(), 0.01)
            root = (square / (1 - 0.99**step)).sqrt_().add_(1e-8)
            corrected, decay = mean / (1 - 0.9**step), 1 - group["lr"] * group["weight_decay"]
            local(p).mul_(decay).addcdiv_(corrected, root, value=-group["lr"])


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """(N, rows, columns) → about U·Vᵀ of each one's singular value decomposition, by a quintic Newton-Schulz.

    x ← (a + b·g + c·g²)·x with g = x·xᵀ, `steps` times, in their own dtype. Stepping on g alone, and multiplying x
    once, would take fewer products; but g rounded to bf16 has negative eigenvalues where a gradient is of low rank,
    which the steps blow up, and in fp32 it is, over all shapes, no faster.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x if wide else x.mT
