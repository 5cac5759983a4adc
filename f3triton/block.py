"""Stages made of any module: `Block`, with exact gradients inside, and `Layers`, in which every layer is taught directly."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from . import modes
from .exceptions import InputError
from .feedback import Feedback
from .kernels import eager
from .layers import Linear, Stage, autocast
from .rules import Updater
from .seeds import derived_seed


class _FusedLinear(torch.autograd.Function):
    """A `Linear` under autograd whose backward updates weight and bias itself: their gradients never exist."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Linear, mode: _Learning) -> Tensor:
        h, kept = layer.keep(x, mode.updater)
        ctx.save_for_backward(*kept)
        ctx.layer, ctx.mode, ctx.shape, ctx.dtype = layer, mode, x.shape, x.dtype
        return h

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, slope_from = ctx.saved_tensors  # [rows, K], [rows, N]
        layer, mode = ctx.layer, ctx.mode
        gradient = gradient.reshape(slope_from.shape).to(slope_from.dtype)
        delta = eager.times_slope(gradient, slope_from, layer.activation)
        wants_input = ctx.needs_input_grad[0]
        weight_gradient = bias_gradient = None
        if mode.fused(layer):
            dx = layer.update(delta, x, mode.updater, wants_input)
        else:  # used twice, or by others too: all of its gradients have to come together before it changes
            dx = delta @ layer.weight.to(delta.dtype) if wants_input else None
            weight_gradient, bias_gradient = mode.updater.ops.outer_product(delta, x)
            weight_gradient = weight_gradient.to(layer.weight.dtype)
            bias_gradient = None if layer.bias is None else bias_gradient.to(layer.bias.dtype)
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, weight_gradient, bias_gradient, None, None


class _Learning(modes.Mode):
    """The mode of a `Block`'s pass: its `Linear`s run through `_FusedLinear`."""

    def __init__(self, updater: Updater, owners: Counter[int]) -> None:
        self.updater, self.owners = updater, owners
        self.calls: Counter[int] = Counter()  # of each Linear in this pass

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        if not isinstance(stage, Linear) or not torch.is_grad_enabled():
            return stage.compute(x)
        self.calls[id(stage)] += 1
        return _FusedLinear.apply(x, stage.weight, stage.bias, stage, self)

    def fused(self, layer: Linear) -> bool:
        """Whether the layer is the only user of its parameters, and was called once."""
        alone = all(self.owners[id(p)] == 1 and p.requires_grad for p in (layer.weight, layer.bias) if p is not None)
        return alone and self.calls[id(layer)] == 1


class Block(Stage):
    """Any module as a stage: exact gradients inside, seeded at its output with `e B` in the output's shape.

    The module runs under autograd on a detached input; its parameters are updated, and its gradients and activations
    freed, before the next stage runs. The weight gradients of an `f3.Linear` inside it never exist: the layer is updated where
    they would be formed, after its input's gradient was taken from the old weight. All other parameters are updated as soon
    as their gradient is complete. The output must be one floating tensor `[M, ...]` of a fixed shape.

    `feedback_shape`: see `Stage`.
    """

    def __init__(
        self, module: nn.Module, feedback: str | Feedback | Tensor = "trinomial", feedback_shape: str = "full"
    ) -> None:
        super().__init__(feedback, feedback_shape)
        self.module = module

    def compute(self, x: Tensor) -> Tensor:
        h = self.module(x)
        if not isinstance(h, Tensor):
            name = type(self.module).__name__
            raise InputError(f"the module of a Block must return one tensor, but {name} returned a {type(h).__name__}")
        return h

    def keep(self, x: Tensor, updater: Updater) -> tuple[Tensor, tuple[Tensor, _Learning]]:
        owners = Counter(id(p) for module in self.modules() for p in module._parameters.values() if p is not None)
        mode = _Learning(updater, owners)
        with torch.enable_grad(), autocast(x.device, updater.compute_dtype), modes.active(mode):
            h = self.compute(x.detach())
        self.check_shape(h)
        return h.detach(), (h, mode)

    def teach(self, kept: tuple[Tensor, _Learning], error: Tensor, updater: Updater, scale: float) -> None:
        self.finish(kept, self.signal(error, kept[0], scale), updater)

    def finish(self, kept: tuple[Tensor, _Learning], gradient: Tensor, updater: Updater) -> None:
        h, mode = kept
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            return
        if not h.requires_grad:
            raise InputError(f"{type(self.module).__name__} in a Block cuts the gradient between its parameters and its output")

        def update(parameter: nn.Parameter) -> None:
            if parameter.grad is not None:  # a fused Linear's never are
                updater.apply(parameter, parameter.grad)
                parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(update) for p in parameters]
        try:
            with modes.active(mode):  # activation checkpoints inside run forward again
                torch.autograd.backward(h, gradient.to(h.dtype))
        finally:
            for handle in handles:
                handle.remove()


class _Teaching(modes.Mode):
    """Every stage inside learns from the error while the forward pass goes through it."""

    def __init__(self, error: Tensor, updater: Updater, scale: float) -> None:
        self.error, self.updater, self.scale = error, updater, scale

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        return stage.learn(x, self.error, self.updater, self.scale)


class _Keeping(modes.Mode):
    """Every stage inside keeps what it needs to be taught later."""

    def __init__(self, updater: Updater) -> None:
        self.updater = updater
        self.kept: list[tuple[Stage, object]] = []

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        h, kept = stage.keep(x, self.updater)
        self.kept.append((stage, kept))
        return h


class _Preparing(modes.Mode):
    """Every stage inside draws its own feedback matrix."""

    def __init__(self, outputs: int, seed: int | None, positions: int) -> None:
        self.outputs, self.seed, self.positions = outputs, seed, positions
        self.seen: list[Stage] = []

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        if any(stage is other for other in self.seen):
            raise InputError(f"a {type(stage).__name__} is called twice in one pass; Layers teach each layer at one output")
        seed = None if self.seed is None else derived_seed(self.seed, len(self.seen))
        self.seen.append(stage)
        return stage.prepare(x, self.outputs, seed, self.positions)


class Layers(Stage):
    """A module in which every `Linear` and `LayerNorm` is taught directly at its own output: nothing runs backward, not even
    through attention.

    Each of them has a feedback matrix of its own, drawn by its own law. Raises InputError when it is prepared, where a
    parameter belongs to anything else, which nothing would teach, or a layer is called twice.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__("trinomial")
        self.module = module

    def compute(self, x: Tensor) -> Tensor:
        return self.module(x)

    def prepare(self, x: Tensor, outputs: int, seed: int | None, positions: int = 1) -> Tensor:
        preparing = _Preparing(outputs, seed, positions)
        with modes.active(preparing):
            h = self.compute(x)
        taught = {id(p) for stage in preparing.seen for p in stage.parameters()}
        for name, p in self.named_parameters():
            if id(p) not in taught and p.requires_grad:
                raise InputError(
                    f"parameter {name!r} is in no Linear or LayerNorm of f3triton; nothing teaches it, use a Block"
                )
        self.output_shape = h.shape[1:]
        return h

    def learn(self, x: Tensor, error: Tensor, updater: Updater, scale: float) -> Tensor:
        with autocast(x.device, updater.compute_dtype), modes.active(_Teaching(error, updater, scale)):
            return self.compute(x)

    def keep(self, x: Tensor, updater: Updater) -> tuple[Tensor, list[tuple[Stage, object]]]:
        keeping = _Keeping(updater)
        with autocast(x.device, updater.compute_dtype), modes.active(keeping):
            h = self.compute(x)
        return h, keeping.kept

    def teach(self, kept: list[tuple[Stage, object]], error: Tensor, updater: Updater, scale: float) -> None:
        for stage, own in kept:
            stage.teach(own, error, updater, scale)

    def finish(self, kept: object, gradient: Tensor, updater: Updater) -> None:
        raise InputError("Layers cannot be the last stage, which needs an exact gradient; use a Linear or a Block")
