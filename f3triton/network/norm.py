"""Normalisations as stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .feedback import Feedback
from .stage import Stage
from .updater import Step


class LayerNorm(Stage):
    """Layer normalisation of `x [..., features]`, with a scale and a shift that can be taught directly (see `Layers`)."""

    def __init__(
        self, features: int, feedback: str | Feedback | Tensor = "trinomial", eps: float = 1e-5, feedback_shape: str = "full"
    ) -> None:
        super().__init__(feedback, feedback_shape)
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def normalise(self, x: Tensor) -> Tensor:
        """`x` with mean 0 and variance 1 over its features."""
        return functional.layer_norm(x, self.weight.shape, eps=self.eps)

    def compute(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def keep(self, x: Tensor, step: Step, wants_input: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        normal = self.normalise(x)
        h = normal * self.weight if self.bias is None else torch.addcmul(self.bias, normal, self.weight)
        self.check_shape(h)
        return h, (normal, x if wants_input else None)

    def teach(self, kept: tuple[Tensor, Tensor | None], row: Tensor, step: Step) -> None:
        normal = kept[0]
        h = normal if self.feedback_at == "output" else normal * self.weight + self.bias
        self.finish(kept, self.error_signal(row, h, step.scale), step)

    def back(self, kept: tuple[Tensor, Tensor | None], gradient: Tensor, step: Step) -> Tensor:
        with torch.enable_grad():
            x = kept[1].detach().requires_grad_()
            return torch.autograd.grad(self.normalise(x), x, gradient * self.weight)[0]

    def finish(
        self, kept: tuple[Tensor, Tensor | None], gradient: Tensor, step: Step, wants_input: bool = False
    ) -> Tensor | None:
        dx = self.back(kept, gradient, step) if wants_input else None
        gradient, normal = gradient.reshape(-1, len(self.weight)), kept[0].reshape(-1, len(self.weight))  # [rows, features]
        step.apply(self.weight, (gradient * normal).sum(0).to(self.weight.dtype))
        if self.bias is not None:
            step.apply(self.bias, gradient.sum(0).to(self.bias.dtype))
        return dx

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class RMSNorm(LayerNorm):
    """`x / sqrt(mean(x^2) + eps)` over the features, with a scale (arXiv 1910.07467)."""

    def __init__(
        self, features: int, feedback: str | Feedback | Tensor = "trinomial", eps: float = 1e-5, feedback_shape: str = "full"
    ) -> None:
        super().__init__(features, feedback, eps, feedback_shape)
        self.bias = None

    def normalise(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, eps=self.eps)

    def compute(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
