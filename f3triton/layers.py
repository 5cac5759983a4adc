"""Stages: what a network is made of. Each can run forward, and run forward and learn; none ever looks at another.

`Linear` is taught through the fused operations and never enters autograd; `Block` is any module, with an exact gradient
inside and none beyond its own input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from .exceptions import InputError
from .feedback import Feedback
from .kernels import eager
from .kernels.reference import ACTIVATIONS
from .rules import Updater
from .seeds import derived_seed
from .words import check_word

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu-tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "silu": functional.silu,
}


class Stage(nn.Module):
    """A part of a network that learns on its own. Subclasses: `Linear`, `Block`.

    `feedback` is a law (a word or a `Feedback`) or the matrix itself, `[C, units]`; `feedback_matrix` is the drawn one.
    """

    def __init__(self, feedback: str | Feedback | Tensor) -> None:
        super().__init__()
        self.register_buffer("feedback_matrix", None, persistent=False)
        if isinstance(feedback, Tensor):
            self.feedback_law = None
            self.feedback_matrix = feedback.detach().clone()
        else:
            self.feedback_law = feedback if isinstance(feedback, Feedback) else Feedback(feedback)

    def draw_feedback(self, outputs: int, units: int, seed: int) -> None:
        """Draw `B [outputs, units]` by the stage's law; a matrix that was given is checked and kept.

        Raises InputError where the matrix or the law does not fit.
        """
        like = next(self.parameters(), torch.empty(0))
        if self.feedback_law is not None:
            self.feedback_matrix = self.feedback_law.draw(outputs, units, seed).to(like)
        elif self.feedback_matrix.shape != (outputs, units):
            shape = list(self.feedback_matrix.shape)
            raise InputError(f"feedback matrix has shape {shape}; this stage needs [{outputs}, {units}]")
        elif self.feedback_matrix.is_floating_point():
            self.feedback_matrix = self.feedback_matrix.to(like)
        else:  # whole numbers stay as they are: a quarter of the memory, and the kernels read them
            self.feedback_matrix = self.feedback_matrix.to(like.device)

    def signal(self, error: Tensor, h: Tensor) -> Tensor:
        """`e B` in the shape of the output `h [M, ...]`."""
        return eager.project(error, self.feedback_matrix, 1.0, h.dtype).view_as(h)

    def learn(self, x: Tensor, error: Tensor, updater: Updater, scale: float) -> Tensor:
        """Run forward on `x [M, ...]` and learn from `error [M, C]`; returns the output from before the update."""
        h, kept = self.keep(x, updater)
        self.teach(kept, error, updater, scale)
        return h

    def keep(self, x: Tensor, updater: Updater) -> tuple[Tensor, object]:
        """Run forward and keep what `teach` needs, for signals that come only after the whole forward pass (DFA)."""
        raise NotImplementedError

    def teach(self, kept: object, error: Tensor, updater: Updater, scale: float) -> None:
        """Update from `scale (e B)` at the output of a forward pass that was kept."""
        raise NotImplementedError

    def finish(self, kept: object, gradient: Tensor, updater: Updater) -> None:
        """Update a last stage from the exact gradient at its output, `[M, C]`."""
        raise NotImplementedError


class Linear(Stage):
    """`h = phi(x W^T + b)`, with torch's default initialisation; updated by the outer product of `(e B) * phi'(a)` and `x`.

    `x` is `[M, in_features]`, `h` `[M, out_features]`. `activation` is one of identity, tanh, sigmoid, relu, gelu,
    gelu-tanh, silu. Raises InputError for sizes below 1, unknown words, or an input of another shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "identity",
        feedback: str | Feedback | Tensor = "trinomial",
        bias: bool = True,
    ) -> None:
        super().__init__(feedback)
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} of a Linear stage must be a whole number of at least 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation = check_word("activation", activation, ACTIVATIONS)
        fresh = nn.Linear(in_features, out_features, bias=bias)
        self.weight, self.bias = fresh.weight, fresh.bias  # [out, in], [out]
        self._act = _FORWARD[self.activation]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise InputError(f"a Linear stage needs an input of shape [batch, {self.in_features}], got {list(x.shape)}")
        return self._act(functional.linear(x, self.weight, self.bias))

    def learn(self, x: Tensor, error: Tensor, updater: Updater, scale: float) -> Tensor:
        u = updater
        if u.compute_dtype is not None:
            x = x.to(u.compute_dtype)
        return u.ops.linear_step_(
            x,
            self.weight,
            self.bias,
            error,
            self.feedback_matrix,
            u.rule,
            u.moments(self.weight),
            u.moments(self.bias),
            u.lr,
            u.step,
            self.activation,
            scale,
            **u.halves(self.weight),
        )

    def keep(self, x: Tensor, updater: Updater) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if updater.compute_dtype is not None:
            x = x.to(updater.compute_dtype)
        weight = updater.halves(self.weight).get("shadow", self.weight)
        h, kept = updater.ops.linear_keep(x, weight, self.bias, self.activation)
        return h, (x, kept)

    def teach(self, kept: tuple[Tensor, Tensor], error: Tensor, updater: Updater, scale: float) -> None:
        self._update(kept, eager.project(error, self.feedback_matrix, scale, kept[0].dtype), updater)

    def finish(self, kept: tuple[Tensor, Tensor], gradient: Tensor, updater: Updater) -> None:
        if kept[0].dtype == torch.float16:  # a mean over batch and outputs would fall below float16's smallest numbers
            kept = kept[0].float(), kept[1].float()
        self._update(kept, gradient, updater)

    def _update(self, kept: tuple[Tensor, Tensor], gradient: Tensor, updater: Updater) -> None:
        x, slope_from = kept
        u = updater
        if gradient.dtype != slope_from.dtype:
            gradient = gradient.to(slope_from.dtype)
        delta = eager.times_slope(gradient, slope_from, self.activation)
        u.ops.outer_product_update_(
            self.weight,
            self.bias,
            delta,
            x,
            u.rule,
            u.moments(self.weight),
            u.moments(self.bias),
            u.lr,
            u.step,
            **u.halves(self.weight),
        )

    def extra_repr(self) -> str:
        law = "given" if self.feedback_law is None else self.feedback_law.law
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, activation={self.activation!r}, feedback={law!r}, bias={self.bias is not None}"


class Block(Stage):
    """Any module as a stage: exact gradients inside, seeded at its output with `e B` in the output's shape.

    The module runs under autograd on a detached input; its parameters are updated, and its gradients and activations
    freed, before the next stage runs. Its output must be one floating tensor `[M, ...]` of a fixed shape.
    """

    def __init__(self, module: nn.Module, feedback: str | Feedback | Tensor = "trinomial") -> None:
        super().__init__(feedback)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        h = self.module(x)
        if not isinstance(h, Tensor):
            name = type(self.module).__name__
            raise InputError(f"the module of a Block must return one tensor, but {name} returned a {type(h).__name__}")
        return h

    def keep(self, x: Tensor, updater: Updater) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), autocast(x.device, updater.compute_dtype):
            h = self(x.detach())
        return h.detach(), h

    def teach(self, kept: Tensor, error: Tensor, updater: Updater, scale: float) -> None:
        signal = eager.project(error, self.feedback_matrix, scale, kept.dtype)
        self.finish(kept, signal.view_as(kept), updater)

    def finish(self, kept: Tensor, gradient: Tensor, updater: Updater) -> None:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            return
        if not kept.requires_grad:
            raise InputError(f"{type(self.module).__name__} in a Block cuts the gradient between its parameters and its output")
        gradients = torch.autograd.grad(kept, parameters, gradient.to(kept.dtype), allow_unused=True)
        for parameter, own in zip(parameters, gradients, strict=True):
            if own is not None:
                updater.apply(parameter, own)


class Sequential(nn.Module):
    """Stages in order. `forward` gives the last stage's output: logits for classification, values for regression.

    Raises InputError for an empty list, something that is not a stage, or a parameter shared by two stages.
    """

    def __init__(self, *stages: Stage) -> None:
        super().__init__()
        if not stages:
            raise InputError("a Sequential needs at least one stage, got none")
        owner: dict[nn.Parameter, int] = {}
        for position, stage in enumerate(stages):
            if not isinstance(stage, Stage):
                raise InputError(f"stage {position} is a {type(stage).__name__}; a Sequential takes Linear and Block stages")
            for parameter in stage.parameters():
                if owner.setdefault(parameter, position) != position:
                    raise InputError(f"stages {owner[parameter]} and {position} share a parameter; each must own its own")
        self.stages = nn.ModuleList(stages)

    def __getitem__(self, position: int) -> Stage:
        return self.stages[position]

    def __len__(self) -> int:
        return len(self.stages)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.no_grad()
    def prepare(self, example: Tensor, outputs: int, seed: int | None) -> None:
        """Run `example [1, ...]` through, and draw every hidden stage's feedback matrix for the size of its output.

        Nothing is drawn where `seed` is None.

        Raises InputError where an input does not fit a stage, or the last stage does not give `outputs` values.
        """
        was_training = self.training
        self.eval()
        x = example
        for position, stage in enumerate(self.stages):
            try:
                x = stage(x)
            except InputError as error:
                raise InputError(f"stage {position}: {error}") from None
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"stage {position} cannot take an input of shape {list(x.shape)}: {reason}") from None
            if seed is not None and position < len(self) - 1:
                stage.draw_feedback(outputs, math.prod(x.shape[1:]), derived_seed(seed, "feedback", position))
        self.train(was_training)
        if list(x.shape[1:]) != [outputs]:
            shape = list(x.shape[1:])
            raise InputError(f"the last stage's output for a sample has shape {shape}; the data set needs [{outputs}]")


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """torch's mixed precision in `dtype`; nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
