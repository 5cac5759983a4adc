"""Update rules as plain settings: what a kernel has to know to turn a gradient into a new weight.

A rule is a frozen dataclass of numbers; the moments it needs live in tensors that the caller owns, and the
arithmetic is in the kernels (`reference.update_` is the specification). The formulas are those of `torch.optim`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _check(rule: object, name: str, low: float, high: float = math.inf) -> None:
    value = getattr(rule, name)
    inside = isinstance(value, int | float) and math.isfinite(value) and low <= value < high
    if not inside:
        until = "" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{type(rule).__name__}: {name} must be a finite number >= {low:g}{until}, got {value!r}")


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent: `buf <- momentum buf + g`, `w <- w - lr buf` (Nesterov: `w <- w - lr (g + momentum buf)`).

    `weight_decay` is added to the gradient (`g + weight_decay w`), as in `torch.optim.SGD`. Raises ValueError for
    settings out of range.
    """

    lr: float = 1e-2
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "lr", 0.0)
        _check(self, "momentum", 0.0, 1.0)
        _check(self, "weight_decay", 0.0)
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD: nesterov needs momentum > 0, got momentum 0")

    @property
    def moments(self) -> int:
        """How many buffers of the parameter's shape the rule keeps."""
        return 1 if self.momentum else 0


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv 1412.6980): `w <- w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)`.

    `weight_decay` is added to the gradient (L2), as in `torch.optim.Adam`; see `AdamW` for the decoupled form.
    Raises ValueError for settings out of range.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    decoupled = False  # weight decay enters the gradient

    def __post_init__(self) -> None:
        _check(self, "lr", 0.0)
        _check(self, "eps", 0.0)
        _check(self, "weight_decay", 0.0)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"{type(self).__name__}: betas must be two numbers >= 0 and < 1, got {self.betas!r}")

    @property
    def moments(self) -> int:
        """How many buffers of the parameter's shape the rule keeps."""
        return 2


@dataclass(frozen=True)
class AdamW(Adam):
    """AdamW (arXiv 1711.05101): Adam with the decay applied to the weight itself, `w <- (1 - lr weight_decay) w`."""

    weight_decay: float = 1e-2

    decoupled = True


Rule = SGD | Adam | AdamW
Moments = tuple[Tensor, ...]


def new_moments(parameter: Tensor, rule: Rule) -> Moments:
    """Zeroed buffers for one parameter: none, one (momentum) or two (Adam's m and v), each of its shape.

    They are of the parameter's type, but never narrower than float32.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return tuple(torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for _ in range(rule.moments))
