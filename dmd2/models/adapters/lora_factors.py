"""The change of one layer's weight from the tensors that a LoRA file holds for it: LoRA and its relatives.

Formulas: LoRA W + s·B·A (Hu et al. 2021, eq. 3); rsLoRA s = α/√r (Kalajdzievski 2023); DoRA m·V/‖V‖, V = W + s·B·A
(Liu et al. 2024, eq. 5); LoHa (W₁ₐ·W₁ᵦ) ∘ (W₂ₐ·W₂ᵦ) (FedPara, Hyeon-Woo et al. 2022, prop. 1); LoKr W₁ ⊗ W₂ (Yeh et
al. 2024, eq. 6); a convolution's kernel in Tucker form (FedPara, prop. 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dmd2.runtime.offload import upload

LARGEST_CORE = 4096
"""rank of a factor in Tucker form, at most: what comes between grows with it"""

_NEEDED = {
    "LoRA": {"down", "up"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "LoKr": {"lokr_w1", "lokr_w2"},
    "a difference": {"diff"},
}
_OF = {"down": "LoRA", "up": "LoRA", "mid": "LoRA", "diff": "a difference"}


@dataclass
class Factors:
    """A LoRA's tensors for one layer, named as in the file, without the layer."""

    layer: str
    """its name, with dots where the file has them"""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """LoRA: down (rank, in), up (out, rank), of a convolution down (rank, in, k, k) or, with mid (rank, rank, k, k),
    (rank, in, 1, 1); bias (out). LoHa: hada_w1_a (out, rank), hada_w1_b (rank, in), … LoKr: lokr_w1 (a, b) or
    lokr_w1_a (a, rank), lokr_w1_b (rank, b), lokr_w2 … Any of these with dora_scale or lora_magnitude_vector. Or
    diff, as the weight; diff_b (out)."""
    alpha: float | None = None
    """None: the rank"""
    stabilised: bool = False
    """whether √rank divides alpha"""
    rank: int | None = None
    """as the settings say, for LoKr, whose tensors need not tell"""

    @property
    def kinds(self) -> set[str]:
        names = {_OF.get(name) or {"hada": "LoHa", "lokr": "LoKr"}.get(name[:4]) for name in self.tensors}
        return {kind for kind in names if kind}

    @property
    def has_bias(self) -> bool:
        return bool(self._biases())

    @property
    def magnitude(self) -> Tensor | None:
        return self.tensors.get("lora_magnitude_vector", self.tensors.get("dora_scale"))

    def fault(self) -> str:
        """What is wrong with these tensors, whatever the layer; "" if nothing is."""
        kinds = self.kinds
        if len(kinds) > 1:
            return f"is {' and '.join(sorted(kinds))} at once; expected one of them"
        whole = {name.removesuffix("_a") for name in self.tensors if f"{name[:-1]}b" in self.tensors}
        if not kinds and not self.tensors.keys() & {"diff_b"}:
            return "expected a pair of matrices, down and up"
        for kind in kinds:
            missing = _NEEDED[kind] - self.tensors.keys() - (whole if kind == "LoKr" else set())
            if missing and kind == "LoRA":
                return "expected a pair of matrices, down and up"
            if missing:
                return f"is {kind} without {', '.join(sorted(missing))}"
        for name, value in self.tensors.items():
            if 0 in value.shape:
                return f"{name} is {list(value.shape)}: empty"
        cores = [value for name, value in self.tensors.items() if name == "mid" or "_t" in name]
        if any(max(core.shape[:2], default=0) > LARGEST_CORE for core in cores):
            return f"a rank over {LARGEST_CORE}"
        return "" if not kinds or self._shape else f"its factors do not match: {self.shapes()}"

    def shapes(self) -> str:
        """The tensors' shapes as text, for messages."""
        return ", ".join(f"{name} {list(value.shape)}" for name, value in self.tensors.items())

    def fits(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether these tensors fit this weight and this bias. `fault` must have found nothing."""
        if any(bias is None or self.tensors[name].shape != bias.shape for name in self._biases()):
            return False
        if not self.kinds:
            return True
        shape = self._shape
        fits = shape is not None and shape[0] == len(weight) and math.prod(shape) == weight.numel()
        if fits and shape is not None and len(shape) > 2 and weight.ndim > 2:
            fits = list(shape) == list(weight.shape)
        return fits and (self.magnitude is None or self._axis(weight) is not None)

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied with, before the user's own scale."""
        rank = self.rank
        for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if rank is None and name in self.tensors:
                rank = len(self.tensors[name])
        if self.alpha is None or rank is None or "diff" in self.tensors:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.stabilised else rank)

    def change(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """What to add to this weight, fp32 on its device. `scale` is the user's; with DoRA it is within the norm."""
        exact = weight.float()
        if not self.kinds or scale == 0:
            return torch.zeros_like(exact)
        tensors = {name: upload(value, weight.device).float() for name, value in self.tensors.items()}
        change = scale * self.scaling * _product(tensors).reshape(weight.shape)
        magnitude, axis = self.magnitude, self._axis(weight)
        if magnitude is None or axis is None:
            return change
        shape = [1] * weight.ndim
        shape[axis] = weight.shape[axis]
        changed = exact + change
        norm = torch.linalg.vector_norm(changed.transpose(0, axis).flatten(1), dim=1).clamp(min=1e-12)
        ratio = upload(magnitude, weight.device).float().reshape(shape) / norm.reshape(shape)
        return ratio * changed - exact

    def bias_change(self, bias: Tensor, scale: float = 1.0) -> Tensor:
        """What to add to the layer's bias; arguments as for `change`."""
        total = torch.zeros_like(bias, dtype=torch.float32)
        for name in self._biases():
            own = self.scaling if name == "bias" else 1.0
            total += scale * own * upload(self.tensors[name], bias.device).float()
        return total

    def _biases(self) -> list[str]:
        return [name for name in ("bias", "diff_b") if name in self.tensors]

    def _axis(self, weight: Tensor) -> int | None:
        """DoRA: the weight's axis that has a magnitude for each entry. None: there is none, or of another shape."""
        magnitude = self.magnitude
        if magnitude is None:
            return None
        shape = magnitude.shape
        if magnitude.numel() != max(shape, default=0):
            return None
        # LyCORIS has one for each input, (1, in, …), unless told otherwise; PEFT one for each output, (1, out, 1, 1).
        inputs = "lora_magnitude_vector" not in self.tensors and len(shape) > 1 and shape[0] == 1
        if inputs and magnitude.numel() == weight.shape[1]:
            return 1
        return 0 if magnitude.numel() == len(weight) else None

    @cached_property
    def _shape(self) -> torch.Size | None:
        """The product's shape, without computing it. All tensors must be there."""
        try:
            return _product(
                {name: torch.empty(value.shape, device="meta") for name, value in self.tensors.items()}
            ).shape
        except (RuntimeError, IndexError, ValueError):  # torch's for shapes that do not match
            return None


def _product(tensors: dict[str, Tensor]) -> Tensor:
    """The product of one layer's factors: (out, in), (out, in·k·k) or (out, in, k, k)."""
    if "diff" in tensors:
        return tensors["diff"]
    if "down" in tensors:
        down, up = tensors["down"].flatten(1), tensors["up"].flatten(1)
        return _tucker(tensors["mid"], up.t(), down) if "mid" in tensors else up @ down
    if "hada_w1_a" in tensors:
        first, second = (
            _tucker(tensors[f"hada_t{n}"], tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"])
            if f"hada_t{n}" in tensors
            else tensors[f"hada_w{n}_a"] @ tensors[f"hada_w{n}_b"]
            for n in (1, 2)
        )
        if first.shape != second.shape:
            raise ValueError("LoHa's two products differ in shape")
        return first * second
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            factors.append(tensors[name])
        elif (core := f"lokr_t{name[-1]}") in tensors:
            factors.append(_tucker(tensors[core], tensors[f"{name}_a"], tensors[f"{name}_b"]))
        else:
            factors.append(tensors[f"{name}_a"] @ tensors[f"{name}_b"])
    first, second = factors
    return torch.kron(
        first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim)).contiguous(), second.contiguous()
    )


def _tucker(core: Tensor, out: Tensor, inputs: Tensor) -> Tensor:
    """A kernel (out, in, k, k) of its core (rank, rank, k, k), (rank, out) and (rank, in)."""
    return torch.einsum("ijkl,ip,jr->prkl", core, out, inputs)
