"""Update rules as plain settings: what a kernel has to know to turn a gradient into a new weight.

A rule is a frozen dataclass of numbers; the moments it needs live in tensors that the caller owns, and the
arithmetic is in the kernels (`reference.update_` is the specification). The formulas are those of `torch.optim`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .moments import new_moments


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


@dataclass(frozen=True)
class Update:
    """What one step does to every parameter: the rule, its learning rate, and which step it is.

    `step` counts from 1; it is a number, or an int64 scalar on the parameters' device. `lr` is a number or a scalar there. A
    bfloat16 parameter is rounded to nearest, or with a `seed` (a whole number of at least 0) stochastically: see `rounding`.
    """

    rule: Rule
    lr: float | Tensor
    step: int | Tensor
    seed: int | None = None


@dataclass
class State:
    """What one parameter keeps between steps; its tensors are changed in place.

    `moments` are the rule's buffers (none, momentum, or Adam's m and v), each of the parameter's shape, with `scales` `[rows,
    blocks]` where they are int8: see `moments`. `shadow` is a copy of
    the parameter in half precision, for products; an update writes it too. `place` is the parameter's place in the whole model
    (any whole number that no other parameter has): from it, and the update's seed, come its random bits.
    """

    moments: Moments
    shadow: Tensor | None = None
    place: int = 0
    scales: Moments = ()


def new_state(
    parameter: Tensor, rule: Rule, place: int = 0, shadow: torch.dtype | None = None, moments: str = "float32"
) -> State:
    """The state of a parameter before the first step: zeroed moments of the given type, one of `moments.MOMENTS`.

    With `shadow`, a type, also a copy of the parameter in it, unless that is the parameter's own type.
    """
    own, scales = new_moments(parameter, rule.moments, moments)
    copy = None if shadow in (None, parameter.dtype) else parameter.detach().to(shadow)
    return State(own, copy, place, scales)


class Layer(NamedTuple):
    """A linear layer as `network_steps_` takes it, in the places of its arguments; `feedback [R, N]` of hidden ones."""

    weight: Tensor  # [N, K], changed
    bias: Tensor | None  # [N], changed
    weight_state: State  # changed
    bias_state: State | None
    feedback: Tensor | None = None
