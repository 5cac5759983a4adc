"""The linear stage: taught through the fused operations, it never enters autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..kernels import eager
from ..kernels.words import ACTIVATIONS
from .feedback import Feedback
from .stage import Stage
from .updater import Step

# the input `[rows, K]`, what the slope comes from `[rows, N]`, and the input's own shape
Kept = tuple[Tensor, Tensor, torch.Size]
NORMS = ("none", "layer")
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
    gelu-tanh, silu. After it comes, with `norm` layer, a layer normalisation without scale and shift, and then, with
    `residual`, `x` is added; errors and gradients at `h` go through both. Raises InputError for sizes below 1, unknown words, a
    residual between different sizes, or an input of another shape.
    """

    draws = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "identity",
        feedback: str | Feedback | Tensor = "trinomial",
        bias: bool = True,
        feedback_shape: str = "full",
        norm: str = "none",
        residual: bool = False,
    ) -> None:
        super().__init__(feedback, feedback_shape)
        self.norm, self.residual = check_word("norm", norm, NORMS), residual
        if residual and in_features != out_features:
            raise InputError(f"a residual needs as many inputs as outputs, got {in_features} and {out_features}")
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} of a Linear stage must be a whole number of at least 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation = check_word("activation", activation, ACTIVATIONS)
        fresh = nn.Linear(in_features, out_features, bias=bias)
        self.weight, self.bias = fresh.weight, fresh.bias  # [out, in], [out]

    def check_input(self, x: Tensor) -> None:
        """Raise InputError for an input of another shape."""
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise InputError(f"a Linear stage needs an input of shape [batch, {self.in_features}], got {list(x.shape)}")

    def compute(self, x: Tensor, activated: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The output for `x [..., in_features]`; `activated`: another way to `phi(x W^T + b)`."""
        self.check_input(x)
        h = activate(functional.linear(x, self.weight, self.bias), self.activation) if activated is None else activated(x)
        return self._output(h, x)

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        """What the stage gives for an activation `h`, normalised and added to its input `x`."""
        if self.norm == "layer":
            h = eager.normalise(h)
        return x + h if self.residual else h

    def learn(self, x: Tensor, row: Tensor, step: Step) -> Tensor:
        leading = x.shape[:-1]
        whole = self.feedback.shape[1] == self.out_features and len(row) == leading.numel()
        if self.feedback_at != "output" or self.norm != "none" or not whole:
            return super().learn(x, row, step)
        h = step.learn(self, as_matrix(x, step), row, self.feedback, self.activation)
        h = h if len(leading) == 1 else h.view(*leading, -1)
        return x + h if self.residual else h

    def keep(self, x: Tensor, step: Step, wants_input: bool = False) -> tuple[Tensor, Kept]:
        h, kept = keep_linear(self, x, step, self.activation)
        h = self._output(h, x)
        if h.dim() > 2:
            self.check_shape(h)
        return h, kept

    def teach(self, kept: Kept, row: Tensor, step: Step) -> None:
        h = self._activation(kept) if self.feedback_at == "normalised" else kept[1]  # [rows, N]
        h = h if self.output_shape is None else h.view(-1, *self.output_shape)
        self._update(kept, self.error_signal(row, h, step.scale), step)

    def finish(self, kept: Kept, gradient: Tensor, step: Step, wants_input: bool = False) -> Tensor | None:
        x, slope_from, shape = kept
        if x.dtype == torch.float16:  # a mean over batch and outputs would fall below float16's smallest numbers
            kept = x.float(), slope_from.float(), shape
        return self._update(kept, gradient, step, wants_input)

    def back(self, kept: Kept, gradient: Tensor, step: Step) -> Tensor:
        dx = self.at_input(step.input_gradient(self, self._delta(kept, gradient)), kept[2])
        return gradient + dx if self.residual else dx

    def at_input(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient `[rows, K]` of the product's input, for a stage's input of that shape."""
        return gradient.view(shape)

    def _activation(self, kept: Kept) -> Tensor:
        """`phi(a)  [rows, N]` of a forward pass that was kept."""
        return kept[1] if self.activation in KEEPS_OUTPUT else activate(kept[1], self.activation)

    def _delta(self, kept: Kept, gradient: Tensor) -> Tensor:
        """The gradient `[rows, N]` at the product, for one at the stage's output."""
        gradient = gradient.reshape(kept[1].shape).to(kept[1].dtype)
        if self.norm == "layer":
            gradient = eager.through_norm(gradient, self._activation(kept))
        return eager.times_slope(gradient, kept[1], self.activation)

    def _update(self, kept: Kept, gradient: Tensor, step: Step, wants_input: bool = False) -> Tensor | None:
        dx = step.teach(self, self._delta(kept, gradient), kept[0], wants_input)
        if dx is None:
            return None
        dx = self.at_input(dx, kept[2])
        return gradient + dx if self.residual else dx

    def extra_repr(self) -> str:
        law = "given" if self.feedback_law is None else self.feedback_law.law
        sizes = f"{self.in_features}, {self.out_features}"
        more = f", norm={self.norm!r}" * (self.norm != "none") + ", residual=True" * self.residual
        return f"{sizes}, activation={self.activation!r}, feedback={law!r}, bias={self.bias is not None}{more}"


def as_matrix(x: Tensor, step: Step) -> Tensor:
    """`x [..., K]` as `[rows, K]`, in the type of the step's products."""
    if step.compute_dtype is not None:
        x = x.to(step.compute_dtype)
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def keep_linear(layer: Linear | nn.Linear, x: Tensor, step: Step, activation: str = "identity") -> tuple[Tensor, Kept]:
    """The output for `x [..., K]`, and what an update needs, as matrices: the input, and what the slope comes from."""
    rows = as_matrix(x, step)
    h, slope_from = step.forward(layer, rows, activation)
    return h if x.dim() == 2 else h.view(*x.shape[:-1], -1), (rows, slope_from, x.shape)
