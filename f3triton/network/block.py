"""A stage made of any module, with exact gradients inside it and none beyond its input."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from ..base.exceptions import InputError
from ..base.precision import autocast
from ..kernels import eager
from . import inside
from .feedback import Feedback
from .linear import Linear, keep_linear
from .stage import Stage
from .updater import Step


class _FusedLinear(torch.autograd.Function):
    """A linear layer under autograd whose backward updates weight and bias itself: their gradients never exist."""

    @staticmethod
    def forward(
        ctx: object,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Linear | nn.Linear,
        activation: str,
        learning: _Learning,
    ) -> Tensor:
        h, (rows, slope_from, ctx.shape) = keep_linear(layer, x, learning.step, activation)
        ctx.save_for_backward(rows, slope_from)
        ctx.layer, ctx.activation, ctx.learning, ctx.dtype = layer, activation, learning, x.dtype
        return h

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, slope_from = ctx.saved_tensors  # [rows, K], [rows, N]
        layer, learning = ctx.layer, ctx.learning
        gradient = gradient.reshape(slope_from.shape).to(slope_from.dtype)
        delta = eager.times_slope(gradient, slope_from, ctx.activation)
        wants_input = ctx.needs_input_grad[0]
        weight_gradient = bias_gradient = None
        if not learning.updates:
            dx = learning.step.input_gradient(layer, delta)
        elif learning.fused(layer):
            dx = learning.step.teach(layer, delta, x, wants_input)
        else:  # used twice, or by others too: all of its gradients have to come together before it changes
            dx = learning.step.input_gradient(layer, delta) if wants_input else None
            weight_gradient, bias_gradient = learning.step.ops.outer_product(delta, x)
            weight_gradient = weight_gradient.to(layer.weight.dtype)
            bias_gradient = None if layer.bias is None else bias_gradient.to(layer.bias.dtype)
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, weight_gradient, bias_gradient, None, None, None


class _Learning(inside.Inside):
    """How a `Block`'s parts run in a pass that learns: its linear layers run through `_FusedLinear`."""

    def __init__(self, step: Step, shared: set[int] | None) -> None:
        self.step, self.shared = step, shared  # ids of parameters with more than one use
        self.updates = True  # off while only the input's gradient is asked for
        self.updated: set[int] = set()  # ids of those that were updated inside the backward pass

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        if not isinstance(stage, Linear) or not self._learns(stage):
            return stage.compute(x)
        return stage.compute(x, lambda x: _FusedLinear.apply(x, stage.weight, stage.bias, stage, stage.activation, self))

    def run_linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if x.dim() < 2 or not self._learns(layer):
            return super().run_linear(layer, x)
        return _FusedLinear.apply(x, layer.weight, layer.bias, layer, "identity", self)

    def fused(self, layer: Linear | nn.Linear) -> bool:
        """Whether this is the only use of the layer's parameters, so that they can be updated here."""
        own = {id(p) for p in (layer.weight, layer.bias) if p is not None}
        if own & self.shared:
            return False
        self.updated |= own
        return True

    @staticmethod
    def _learns(layer: Linear | nn.Linear) -> bool:
        return torch.is_grad_enabled() and layer.weight.requires_grad and (layer.bias is None or layer.bias.requires_grad)


def _used_again(h: Tensor) -> set[int]:
    """The ids of the parameters that come into `h` in more than one place, by a walk through its graph."""
    uses: Counter[int] = Counter()
    waiting, seen = [h.grad_fn], {h.grad_fn}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if hasattr(node, "variable"):
                uses[id(node.variable)] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return {key for key, count in uses.items() if count > 1}


def one_tensor(h: object, module: nn.Module) -> Tensor:
    if isinstance(h, Tensor):
        return h
    raise InputError(f"the module of a Block must return one tensor, but {type(module).__name__} returned a {type(h).__name__}")


Kept = tuple[Tensor, _Learning, Tensor]  # the output under autograd, how its parts learn, and the input


class Block(Stage):
    """Any module as a stage: exact gradients inside, seeded at its output with `e B` in the output's shape.

    The module runs under autograd on a detached input; its parameters are updated, and its gradients and activations freed,
    before the next stage runs. The weight gradients of linear layers in it (`f3.Linear`, `nn.Linear`) never exist: the layer is
    updated where they would be formed, after its input's gradient was taken from the old weight. All other parameters, and
    those of a linear layer that is used twice, are updated as soon as their gradient is complete. The output must be one
    floating tensor `[M, ...]` of a fixed shape.

    `feedback_shape`: see `Stage`.
    """

    def __init__(
        self, module: nn.Module, feedback: str | Feedback | Tensor = "trinomial", feedback_shape: str = "full"
    ) -> None:
        super().__init__(feedback, feedback_shape)
        self.module = module
        self.shared: set[int] | None = None  # ids of parameters with more than one use, known after the first learning pass

    def prepare(self, x: Tensor, outputs: int, seed: int | None, positions: int = 1) -> Tensor:
        self.shared = None
        return super().prepare(x, outputs, seed, positions)

    def compute(self, x: Tensor) -> Tensor:
        return one_tensor(self.module(x), self.module)

    def keep(self, x: Tensor, step: Step, wants_input: bool = False) -> tuple[Tensor, Kept]:
        learning = _Learning(step, self.shared)
        x = x.detach().requires_grad_() if wants_input else x.detach()
        with torch.enable_grad(), autocast(x.device, step.compute_dtype), inside.active(learning, self.module):
            h = self.compute(x)
        self.check_shape(h)
        if self.shared is None and h.requires_grad:
            self.shared = learning.shared = _used_again(h)
        return h.detach(), (h, learning, x)

    def teach(self, kept: Kept, row: Tensor, step: Step) -> None:
        self._backward(kept, self.error_signal(row, kept[0], step.scale), step)

    def finish(self, kept: Kept, gradient: Tensor, step: Step, wants_input: bool = False) -> Tensor | None:
        if kept[0].dtype == torch.float16:  # a mean over batch and outputs would fall below float16's smallest numbers
            raise InputError("a Block as last stage needs more range than float16 has; use precision 'bfloat16', or a Linear")
        self._backward(kept, gradient, step)
        return kept[2].grad if wants_input else None

    def back(self, kept: Kept, gradient: Tensor, step: Step) -> Tensor:
        h, learning, x = kept
        learning.updates = False
        try:
            with inside.active(learning, self.module):
                return torch.autograd.grad(h, x, gradient.to(h.dtype), retain_graph=True)[0]
        finally:
            learning.updates = True

    def _backward(self, kept: Kept, gradient: Tensor, step: Step) -> None:
        h, learning, _ = kept
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            return
        if not h.requires_grad:
            raise InputError(f"{type(self.module).__name__} in a Block cuts the gradient between its parameters and its output")

        def update(parameter: nn.Parameter) -> None:
            if parameter.grad is not None:  # it is, where a linear layer was updated already
                if id(parameter) in learning.updated:
                    raise InputError(
                        f"the module of a Block, {type(self.module).__name__}, uses a weight more often than before"
                    )
                step.apply(parameter, parameter.grad)
                parameter.grad = None

        for p in parameters:
            p.grad = None  # should the user have left one there
        handles = [p.register_post_accumulate_grad_hook(update) for p in parameters]
        try:
            with inside.active(learning, self.module):  # activation checkpoints inside run forward again
                torch.autograd.backward(h, gradient.to(h.dtype))
        finally:
            for handle in handles:
                handle.remove()
