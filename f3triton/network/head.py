"""Heads of hidden stages: what a stage's output says of the target by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..kernels import eager
from .feedback import Feedback
from .stage import Stage
from .updater import Step

GRID = 4  # an image is read by the means over so many by so many regions
aten = torch.ops.aten

# what was read `[rows, F]`, before and after the normalisation; the stage's output's shape
Kept = tuple[Tensor, Tensor, torch.Size]


class Head(Stage):
    """Reads a stage's output `h`: a normalisation without scale and shift, and a linear layer to `outputs` numbers.

    Of tokens `[M, tokens, features]` each is read where each has its own target (`positions` of a sample), else their mean;
    of images `[M, channels, height, width]` the means over a grid of 4 x 4 regions, or of as many as there are pixels: where
    something is matters to early stages (as in Nokland and Eidnes, arXiv 1901.06656). `normal`: the output is normalised
    already. With a law of `feedback` the gradient comes to the stage through a fixed random matrix in place of the head's
    weight: no weight is transported even inside the stage.
    """

    draws = False

    def __init__(
        self, shape: torch.Size, outputs: int, positions: int = 1, normal: bool = False, feedback: str | Feedback | None = None
    ) -> None:
        super().__init__(feedback or "trinomial")
        self.by_token, self.normal, self.random = positions > 1, normal, feedback is not None
        self.grid = [min(GRID, side) for side in shape[1:]] if len(shape) == 3 else []
        features = shape[0] * math.prod(self.grid) if self.grid else shape[-1]
        self.linear = nn.Linear(features, outputs)

    def draw(self, seed: int) -> None:
        """Draw the feedback matrix `[outputs, features]`, where there is one."""
        if self.random:
            self.draw_feedback(self.linear.out_features, self.linear.in_features, seed)

    def _read(self, h: Tensor) -> Tensor:
        """What is read of `h`, `[rows, features]`."""
        if h.dim() == 4:
            return aten._adaptive_avg_pool2d(h, self.grid).flatten(1)
        if h.dim() == 3:
            return h.flatten(0, 1) if self.by_token else h.mean(1)
        return h

    def _normalise(self, rows: Tensor) -> Tensor:
        return rows if self.normal else eager.normalise(rows)

    def normal_rows(self, h: Tensor) -> Tensor:
        """What the linear layer gets of a stage's output `h [M, ...]`: `[rows, features]`, normalised."""
        return self._normalise(self._read(h))

    def compute(self, x: Tensor) -> Tensor:
        """What is said of `x [M, ...]`: `[M, outputs]`, or of tokens that have targets of their own `[M, tokens, outputs]`."""
        a = self.linear(self.normal_rows(x))
        return a.view(*x.shape[:2], -1) if self.by_token and x.dim() == 3 else a

    def keep(self, x: Tensor, step: Step, wants_input: bool = False) -> tuple[Tensor, Kept]:
        """The outputs `[rows, C]` for a stage's output `x [M, ...]`."""
        rows = self._read(x)
        normal = self._normalise(rows)
        output, _ = step.forward(self.linear, normal, "identity")
        return output, (rows, normal, x.shape)

    def finish(self, kept: Kept, gradient: Tensor, step: Step, wants_input: bool = False) -> Tensor | None:
        """Update from the gradient `[rows, C]` at the outputs; the gradient at the stage's output, in its shape."""
        rows, normal, shape = kept
        back = step.teach(self.linear, gradient, normal, wants_input and not self.random)  # [rows, features]
        if not wants_input:
            return None
        if self.random:
            back = gradient @ self.feedback_matrix.to(gradient.dtype)
        return self._at_output(back if self.normal else eager.through_norm(back, rows), shape)

    def visit(self, h: Tensor, target: Tensor, loss: str, step: Step) -> Tensor:
        """Read a stage's output `h [M, ...]` and learn from that: the gradient at `h` for `target [rows, C]`, in its shape.

        In as few launches as the operations have (`kernels.reference.head_step_`), but for random feedback.
        """
        if self.random:
            a, kept = self.keep(h, step)
            gradient = step.ops.output_step(a.to(target.dtype), target, loss, "none")[0]
            return self.finish(kept, gradient, step, wants_input=True)
        return self._at_output(step.read(self.linear, self._read(h), target, loss, not self.normal), h.shape)

    def _at_output(self, back: Tensor, shape: torch.Size) -> Tensor:
        """The gradient at a stage's output of that shape, for one at what was read of it, `[rows, features]`."""
        if len(shape) == 4:
            regions = back.reshape(len(back), -1, *self.grid)
            return aten._adaptive_avg_pool2d_backward(regions, back.new_empty(()).expand(shape))  # reads its shape only
        if len(shape) == 3 and not self.by_token:
            return (back / shape[1])[:, None].expand(shape)
        return back.view(shape)
