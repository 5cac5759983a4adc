"""A module in which every layer is taught directly, at its own output."""

from __future__ import annotations

from torch import Tensor, nn

from ..base.exceptions import InputError
from ..base.precision import autocast
from ..base.seeds import derived_seed
from . import inside
from .block import one_tensor
from .stage import Stage
from .updater import Step


class _Teaching(inside.Inside):
    """Every stage inside learns from the error while the forward pass goes through it."""

    def __init__(self, row: Tensor, step: Step) -> None:
        self.row, self.step = row, step

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        return stage.learn(x, self.row, self.step)


class _Keeping(inside.Inside):
    """Every stage inside keeps what it needs to be taught later."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.kept: list[tuple[Stage, object]] = []

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        h, kept = stage.keep(x, self.step)
        self.kept.append((stage, kept))
        return h


class _Preparing(inside.Inside):
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
        return one_tensor(self.module(x), self.module)

    def prepare(self, x: Tensor, outputs: int, seed: int | None, positions: int = 1) -> Tensor:
        preparing = _Preparing(outputs, seed, positions)
        with inside.active(preparing, self.module):
            h = self.compute(x)
        taught = {id(p) for stage in preparing.seen for p in stage.parameters()}
        for name, p in self.named_parameters():
            if id(p) not in taught and p.requires_grad:
                raise InputError(
                    f"parameter {name!r} is in no Linear or LayerNorm of f3triton; nothing teaches it, use a Block"
                )
        self.output_shape = h.shape[1:]
        return h

    def learn(self, x: Tensor, row: Tensor, step: Step) -> Tensor:
        with autocast(x.device, step.compute_dtype), inside.active(_Teaching(row, step), self.module):
            return self.compute(x)

    def keep(self, x: Tensor, step: Step, wants_input: bool = False) -> tuple[Tensor, list[tuple[Stage, object]]]:
        keeping = _Keeping(step)
        with autocast(x.device, step.compute_dtype), inside.active(keeping, self.module):
            h = self.compute(x)
        return h, keeping.kept

    def teach(self, kept: list[tuple[Stage, object]], row: Tensor, step: Step) -> None:
        for stage, own in kept:
            stage.teach(own, row, step)

    def finish(self, kept: object, gradient: Tensor, step: Step, wants_input: bool = False) -> None:
        raise InputError("Layers cannot be the last stage, which needs an exact gradient; use a Linear or a Block")
