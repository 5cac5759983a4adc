"""The linear stage: taught through the fused operations, it never enters autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..kernels import eager
from ..kernels.reference import ACTIVATIONS
from .feedback import Feedback
from .stage import Stage
from .updater import Updater

KEEPS_OUTPUT = ("identity", "tanh", "sigmoid", "relu")  # their slopes come from the output; those of others from its input


_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu-tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "silu": functional.silu,
}


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name."""
    return _FORWARD[activation](x)


class Linear(Stage):
    """`h = phi(x W^T + b)`, with torch's default initialisation; updated by the outer product of `(e B) * phi'(a)` and `x`.

    `x` is `[..., in_features]`, `h` `[..., out_features]`. `activation` is one of identity, tanh, sigmoid, relu, gelu,
    gelu-tanh, silu. Raises InputError for sizes below 1, unknown words, or an input of another shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "identity",
        feedback: str | Feedback | Tensor = "trinomial",
        bias: bool = True,
        feedback_shape: str = "full",
    ) -> None:
        super().__init__(feedback, feedback_shape)
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} of a Linear stage must be a whole number of at least 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation = check_word("activation", activation, ACTIVATIONS)
        fresh = nn.Linear(in_features, out_features, bias=bias)
        self.weight, self.bias = fresh.weight, fresh.bias  # [out, in], [out]
        self._act = _FORWARD[self.activation]

    def check_input(self, x: Tensor) -> None:
        """Raise InputError for an input of another shape."""
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise InputError(f"a Linear stage needs an input of shape [batch, {self.in_features}], got {list(x.shape)}")

    def compute(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self._act(functional.linear(x, self.weight, self.bias))

    def learn(self, x: Tensor, error: Tensor, updater: Updater, scale: float) -> Tensor:
        u = updater
        shape = x.shape[:-1]
        direct = self.feedback_at == "output" and self.feedback.shape[1] == self.out_features and len(error) == shape.numel()
        if not direct:
            return super().learn(x, error, updater, scale)
        if u.compute_dtype is not None:
            x = x.to(u.compute_dtype)
        h = u.ops.linear_step_(
            x if x.dim() == 2 else x.flatten(0, -2),
            self.weight,
            self.bias,
            error,
            self.feedback,
            u.rule,
            u.moments(self.weight),
            u.moments(self.bias),
            u.lr,
            u.step,
            self.activation,
            scale,
            **u.halves(self.weight),
        )
        return h if x.dim() == 2 else h.view(*shape, -1)

    def keep(self, x: Tensor, updater: Updater) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, kept = keep_linear(self, x, updater, self.activation)
        if h.dim() > 2:
            self.check_shape(h)
        return h, kept

    def teach(self, kept: tuple[Tensor, Tensor], error: Tensor, updater: Updater, scale: float) -> None:
        slope_from = kept[1]  # [rows, N]
        h = slope_from if self.feedback_at == "output" or self.activation in KEEPS_OUTPUT else self._act(slope_from)
        h = h if self.output_shape is None else h.view(-1, *self.output_shape)
        self._update(kept, self.signal(error, h, scale).reshape(slope_from.shape), updater)

    def finish(self, kept: tuple[Tensor, Tensor], gradient: Tensor, updater: Updater) -> None:
        if kept[0].dtype == torch.float16:  # a mean over batch and outputs would fall below float16's smallest numbers
            kept = kept[0].float(), kept[1].float()
        self._update(kept, gradient.reshape(kept[1].shape), updater)

    def _update(self, kept: tuple[Tensor, Tensor], gradient: Tensor, updater: Updater) -> None:
        x, slope_from = kept
        if gradient.dtype != slope_from.dtype:
            gradient = gradient.to(slope_from.dtype)
        update_linear(self, eager.times_slope(gradient, slope_from, self.activation), x, updater, wants_input=False)

    def extra_repr(self) -> str:
        law = "given" if self.feedback_law is None else self.feedback_law.law
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, activation={self.activation!r}, feedback={law!r}, bias={self.bias is not None}"


def keep_linear(
    layer: Linear | nn.Linear, x: Tensor, updater: Updater, activation: str = "identity"
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The output for `x [..., K]`, and what an update needs, as matrices: the input, and what the slope comes from."""
    if updater.compute_dtype is not None:
        x = x.to(updater.compute_dtype)
    leading = x.shape[:-1]
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    weight = updater.halves(layer.weight).get("shadow", layer.weight)
    h, kept = updater.ops.linear_keep(x, weight, layer.bias, activation)
    return h if len(leading) == 1 else h.view(*leading, -1), (x, kept)


def update_linear(layer: Linear | nn.Linear, delta: Tensor, x: Tensor, updater: Updater, wants_input: bool) -> Tensor | None:
    """Update from `delta^T x`; with `wants_input` returns the input's gradient `delta W`, taken from the old weight."""
    u = updater
    operation = u.ops.linear_backward_update_ if wants_input else u.ops.outer_product_update_
    return operation(
        layer.weight,
        layer.bias,
        delta,
        x,
        u.rule,
        u.moments(layer.weight),
        u.moments(layer.bias),
        u.lr,
        u.step,
        **u.halves(layer.weight),
    )
