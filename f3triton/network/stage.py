"""A stage: a part of a network that runs forward, and runs forward and learns; none ever looks at another."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.words import FEEDBACK_SHAPES
from ..kernels import eager
from ..kernels.generated import GeneratedFeedback
from .feedback import Feedback
from .inside import Part
from .updater import Step


def not_shared(feedback_shape: str) -> str:
    """The feedback shape of a stage whose outputs are no tokens or pixels: stored or not, as in the others."""
    return "generated" if feedback_shape.endswith("generated") else "full"


class Stage(Part):
    """A part of a network that learns on its own. Subclasses: `Linear`, `LayerNorm`, `Block`, `Layers`.

    `feedback` is a law (a word or a `Feedback`) or the matrix itself; `feedback_matrix` is the drawn one, `[C, units]`. With
    `feedback_shape` `full`, `units` are all elements of a sample's output; with `shared` the features of one token (the last of
    `[M, tokens, features]`, or the channels of `[M, channels, height, width]`), and all tokens or pixels share the matrix.
    `generated` and `shared-generated` are the same with a matrix that is not stored: its entries come from a hash.

    `feedback_at` is where `e B` is put: at the `output` h, or, with `normalised`, at its layer normalisation without scale and
    shift, through which it comes to h as a gradient does. Then nothing teaches h to grow.
    """

    feedback_at = "output"
    draws = True  # whether running it may draw random numbers (dropout)
    tied = False  # whether it reads a parameter of another stage

    def __init__(self, feedback: str | Feedback | Tensor, feedback_shape: str = "full") -> None:
        super().__init__()
        self.feedback_shape = check_word("feedback shape", feedback_shape, FEEDBACK_SHAPES)
        self.register_buffer("feedback_matrix", None, persistent=False)
        self.generated: GeneratedFeedback | None = None  # instead of the matrix
        self.output_shape: torch.Size | None = None  # of a sample, known after `prepare`
        if isinstance(feedback, Tensor):
            self.feedback_law = None
            self.feedback_matrix = feedback.detach().clone()
        else:
            self.feedback_law = feedback if isinstance(feedback, Feedback) else Feedback(feedback)

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

    def error_signal(self, row: Tensor, h: Tensor, scale: float = 1.0) -> Tensor:
        """What teaches the output `h`, in its shape: `scale (e B)`, at `h` or before its normalisation (see `feedback_at`).

        `row [rows, R]` holds the errors `e`, one for each of the M samples of `h [M, ...]`, or for each of their tokens; R is
        the number of outputs, or the rank of the errors.
        """
        signal = self._project(row, h, scale)
        return signal if self.feedback_at == "output" else eager.through_norm(signal, h)

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

    def learn(self, x: Tensor, row: Tensor, step: Step) -> Tensor:
        """Run forward on `x [M, ...]` and learn from the errors `row [rows, R]`; returns the output from before the update."""
        h, kept = self.keep(x, step)
        self.teach(kept, row, step)
        return h

    def keep(self, x: Tensor, step: Step, wants_input: bool = False) -> tuple[Tensor, object]:
        """Run forward on `x [M, ...]`; returns the output and what the methods below need, whatever that is.

        `wants_input`: whether the gradient at the input will be asked for, by `finish` or `back`.
        """
        raise NotImplementedError

    def teach(self, kept: object, row: Tensor, step: Step) -> None:
        """Update from `step.scale (e B)` at the output of a forward pass that was kept, `row [rows, R]` being the errors."""
        raise NotImplementedError

    def finish(self, kept: object, gradient: Tensor, step: Step, wants_input: bool = False) -> Tensor | None:
        """Update from the exact gradient at the output of a forward pass that was kept, in the output's shape.

        With `wants_input`, which `keep` has to be told too, returns the gradient at the input, by the weights from before.
        """
        raise NotImplementedError

    def back(self, kept: object, gradient: Tensor, step: Step) -> Tensor:
        """The gradient at the input of a forward pass that was kept with `wants_input`; nothing is updated."""
        raise InputError(f"a {type(self).__name__} passes no gradient to the stage before it; its errors cannot be local")
