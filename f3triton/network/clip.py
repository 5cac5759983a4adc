"""Gradients of limited norm, also where no gradient is ever formed."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..kernels import eager
from ..kernels.generated import GeneratedFeedback
from ..kernels.rules import State, Update


def _factor(squares: Tensor, limit: float) -> Tensor:
    """`min(1, limit / norm)`, a scalar on the device, for the square of a norm (which rounding may leave below 0)."""
    return (limit / squares.clamp_min(0).sqrt()).clamp_max(1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squared_norm(delta: Tensor, x: Tensor, bias: bool) -> Tensor:
    """`||delta^T x||^2` (Frobenius), with `bias` plus `||sum of delta||^2`: a scalar, for `delta [M, N]` and `x [M, K]`.

    By `sum((delta delta^T) * (x x^T))`, two products of `[M, M]`, where these cost less: M^2 (N + K) against M N K
    multiplications. Else, as for many tokens, the product `[N, K]` is formed, and released at once.
    """
    delta, x = _wide(delta), _wide(x)
    rows, outputs, inputs = len(x), delta.shape[1], x.shape[1]
    if rows * (outputs + inputs) <= outputs * inputs:
        squares = torch.mul(delta @ delta.t(), x @ x.t()).sum()
    else:
        squares = (delta.t() @ x).square().sum()
    return squares + delta.sum(0).square().sum() if bias else squares


def clip_(gradients: list[Tensor], limit: float) -> None:
    """Scale gradients in place so that the norm of all of them together is at most `limit`."""
    if not gradients:
        return
    factor = _factor(sum(_wide(gradient).square().sum() for gradient in gradients), limit)
    for gradient in gradients:
        gradient.mul_(factor)


class Clipped:
    """The operations `ops` of a backend, in whose updates the norm of a layer's gradient is at most `limit`: of a linear
    layer's weight and bias together, of any other parameter alone.

    `delta` is scaled before the operation that updates by `delta^T x`, with no synchronisation. What is fused beyond that
    (`linear_step_`, `head_step_`) runs in parts, for the norm has to be known first.
    """

    def __init__(self, ops: ModuleType, limit: float) -> None:
        self.ops, self.limit = ops, limit

    def __getattr__(self, name: str) -> object:
        return getattr(self.ops, name)

    def update_(self, parameter: Tensor, gradient: Tensor, state: State, update: Update) -> None:
        factor = _factor(_wide(gradient).square().sum(), self.limit)
        self.ops.update_(parameter, gradient * factor, state, update)

    def outer_product_update_(self, weight: Tensor, bias: Tensor | None, delta: Tensor, x: Tensor, *rest: object) -> None:
        factor = _factor(squared_norm(delta, x, bias is not None), self.limit)
        self.ops.outer_product_update_(weight, bias, delta * factor, x, *rest)

    def linear_backward_update_(
        self, weight: Tensor, bias: Tensor | None, delta: Tensor, x: Tensor, state: State, *rest: object
    ) -> Tensor:
        dx = delta @ (weight if state.shadow is None else state.shadow).to(delta.dtype)
        self.outer_product_update_(weight, bias, delta, x, state, *rest)
        return dx

    def linear_step_(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        error: Tensor,
        feedback: Tensor | GeneratedFeedback,
        state: State,
        bias_state: State | None,
        update: Update,
        activation: str,
        scale: float,
    ) -> Tensor:
        source = weight if state.shadow is None else state.shadow
        h, delta = self.ops.linear_forward(x, source, bias, activation, error, feedback, scale)
        self.outer_product_update_(weight, bias, delta, x, state, bias_state, update)
        return h

    def head_step_(self, *arguments: object) -> Tensor:
        return eager.head_step_(*arguments, ops=self)
