"""Stages: what a network is made of. Each can run forward, and run forward and learn; none ever looks at another.

`Linear` is taught through the fused operations and never enters autograd. Stages of any module are in `block`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .exceptions import InputError
from .feedback import Feedback
from .kernels import eager
from .kernels.generated import GeneratedFeedback
from .kernels.reference import ACTIVATIONS
from .modes import Mode
from .rules import Updater
from .seeds import derived_seed
from .words import check_word

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


FEEDBACK_SHAPES = ("full", "shared", "generated", "shared-generated")
FEEDBACK_AT = ("output", "normalised")
NORM_EPS = 1e-5


def not_shared(feedback_shape: str) -> str:
    """The feedback shape of a stage whose outputs are no tokens or pixels: stored or not, as in the others."""
    return "generated" if feedback_shape.endswith("generated") else "full"


class Stage(nn.Module):
    """A part of a network that learns on its own. Subclasses: `Linear`, `LayerNorm`, `Block`, `Layers`.

    `feedback` is a law (a word or a `Feedback`) or the matrix itself; `feedback_matrix` is the drawn one, `[C, units]`. With
    `feedback_shape` `full`, `units` are all elements of a sample's output; with `shared` the features of one token (the last of
    `[M, tokens, features]`, or the channels of `[M, channels, height, width]`), and all tokens or pixels share the matrix.
    `generated` and `shared-generated` are the same with a matrix that is not stored: its entries come from a hash.

    `feedback_at` is where `e B` is put: at the `output` h, or, with `normalised`, at its layer normalisation without scale and
    shift, through which it comes to h as a gradient does. Then nothing teaches h to grow.
    """

    feedback_at = "output"

    def __init__(self, feedback: str | Feedback | Tensor, feedback_shape: str = "full") -> None:
        super().__init__()
        self.feedback_shape = check_word("feedback shape", feedback_shape, FEEDBACK_SHAPES)
        self.register_buffer("feedback_matrix", None, persistent=False)
        self.generated: GeneratedFeedback | None = None  # instead of the matrix
        self.output_shape: torch.Size | None = None  # of a sample, known after `prepare`
        self.mode: Mode | None = None  # set while the stage is a part of another one that learns
        if isinstance(feedback, Tensor):
            self.feedback_law = None
            self.feedback_matrix = feedback.detach().clone()
        else:
            self.feedback_law = feedback if isinstance(feedback, Feedback) else Feedback(feedback)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x) if self.mode is None else self.mode.run(self, x)

    def compute(self, x: Tensor) -> Tensor:
        """The output for `x [M, ...]`, and nothing else."""
        raise NotImplementedError

    def prepare(self, x: Tensor, outputs: int, seed: int | None, positions: int = 1) -> Tensor:
        """Run `x [1, ...]` through, and draw the feedback matrix for errors of width `outputs`, `positions` a sample.

        Nothing is drawn where `seed` is None.
        """
        h = self.compute(x)
        self.output_shape = h.shape[1:]
        if seed is not None:
            units = self.output_shape.numel()
            if self.feedback_shape.startswith("shared"):
                units = self.output_shape[0 if len(self.output_shape) == 3 else -1]
            self.draw_feedback(outputs, units, seed)
        return h

    @property
    def feedback(self) -> Tensor | GeneratedFeedback | None:
        """The feedback matrix, stored or not."""
        return self.feedback_matrix if self.generated is None else self.generated

    def check_shape(self, h: Tensor) -> None:
        """Raise InputError where the output of a batch is not of the shape that it was prepared for."""
        if self.output_shape is not None and h.shape[1:] != self.output_shape:
            raise InputError(
                f"a {type(self).__name__} gave outputs of shape {list(self.output_shape)} a sample before, and now "
                f"{list(h.shape[1:])}; the shape must not change between batches"
            )

    def draw_feedback(self, outputs: int, units: int, seed: int) -> None:
        """Draw `B [outputs, units]` by the stage's law; a matrix that was given is checked and kept.

        Raises InputError where the matrix or the law does not fit.
        """
        like = next(self.parameters(), torch.empty(0))
        if self.feedback_shape.endswith("generated"):
            if self.feedback_law is None:
                raise InputError("a feedback matrix that is given cannot be generated; give a law, or another feedback shape")
            self.generated = self.feedback_law.generated(outputs, units, seed)
        elif self.feedback_law is not None:
            self.feedback_matrix = self.feedback_law.draw(outputs, units, seed).to(like)
        elif self.feedback_matrix.shape != (outputs, units):
            shape = list(self.feedback_matrix.shape)
            raise InputError(f"feedback matrix has shape {shape}; this stage needs [{outputs}, {units}]")
        elif self.feedback_matrix.is_floating_point():
            self.feedback_matrix = self.feedback_matrix.to(like)
        else:  # whole numbers stay as they are: a quarter of the memory, and the kernels read them
            self.feedback_matrix = self.feedback_matrix.to(like.device)

    def signal(self, error: Tensor, h: Tensor, scale: float = 1.0) -> Tensor:
        """What teaches the output `h`, in its shape: `scale (e B)`, at `h` or before its normalisation (see `feedback_at`).

        `error` has a row for each sample, or for each of its tokens.
        """
        signal = self._project(error, h, scale)
        return signal if self.feedback_at == "output" else through_norm(signal, h)

    def _project(self, error: Tensor, h: Tensor, scale: float) -> Tensor:
        matrix, tokens = self.feedback, h.numel() // len(error)  # what one error row has to teach
        units = matrix.shape[1]
        if units == tokens:
            return eager.project(error, matrix, scale, h.dtype).view(h.shape)
        if len(error) == len(h):  # shared: one error a sample, for each of its tokens or pixels
            signal = eager.project(error, matrix, scale, h.dtype)  # [M, features]
            return (signal[:, :, None, None] if h.dim() == 4 else signal[:, None]).expand_as(h)
        if isinstance(matrix, GeneratedFeedback):
            matrix = matrix.dense(h.device)  # for the time being: a matrix for each position
        by_position = rearrange(matrix.to(h.dtype), "c (t d) -> t c d", t=len(error) // len(h))
        errors = rearrange(error.to(h.dtype), "(m t) c -> t m c", m=len(h))
        return rearrange(errors @ by_position, "t m d -> m t d") * scale

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
        """Update a last stage from the exact gradient at its output, in the output's shape."""
        raise NotImplementedError


def through_norm(gradient: Tensor, h: Tensor) -> Tensor:
    """The gradient at `h [..., N]` for one at its layer normalisation over the last dimension."""
    shape = [h.shape[-1]]
    h = h.contiguous()
    _, mean, deviation = torch.ops.aten.native_layer_norm(h, shape, None, None, NORM_EPS)
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(gradient.contiguous(), h, shape, mean, deviation, None, None, [True, False, False])[0]


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

    def keep(self, x: Tensor, updater: Updater) -> tuple[Tensor, Tensor]:
        normal = self.normalise(x)
        h = normal * self.weight if self.bias is None else torch.addcmul(self.bias, normal, self.weight)
        self.check_shape(h)
        return h, normal

    def teach(self, kept: Tensor, error: Tensor, updater: Updater, scale: float) -> None:
        h = kept if self.feedback_at == "output" else kept * self.weight + self.bias
        self.finish(kept, self.signal(error, h, scale), updater)

    def finish(self, kept: Tensor, gradient: Tensor, updater: Updater) -> None:
        gradient, normal = gradient.reshape(-1, len(self.weight)), kept.reshape(-1, len(self.weight))  # [rows, features]
        updater.apply(self.weight, (gradient * normal).sum(0).to(self.weight.dtype))
        if self.bias is not None:
            updater.apply(self.bias, gradient.sum(0).to(self.bias.dtype))

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
    def prepare(
        self, example: Tensor, outputs: int, seed: int | None, positions: int = 1, error_width: int | None = None
    ) -> None:
        """Run `example [1, ...]` through, and draw every hidden stage's feedback matrix for the size of its output.

        Nothing is drawn where `seed` is None. `positions` is the number of predictions, each of `outputs` values, for a sample;
        an error has `error_width` entries, `outputs` by default.

        Raises InputError where an input does not fit a stage, or the last stage does not give such an output.
        """
        was_training = self.training
        self.eval()
        x = example
        for position, stage in enumerate(self.stages):
            try:
                taught = seed is not None and position < len(self) - 1
                own_seed = derived_seed(seed, "feedback", position) if taught else None
                x = stage.prepare(x, error_width or outputs, own_seed, positions)
            except InputError as error:
                raise InputError(f"stage {position}: {error}") from None
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"stage {position} cannot take an input of shape {list(x.shape)}: {reason}") from None
        self.train(was_training)
        shape, needed = list(x.shape[1:]), [outputs] if positions == 1 else [positions, outputs]
        if shape != needed:
            raise InputError(f"the last stage's output for a sample has shape {shape}; the data set needs {needed}")


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """torch's mixed precision in `dtype`; nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
