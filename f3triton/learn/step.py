"""The step: what happens to a network and to the errors of a batch of samples when their turn has come."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..base.data import Data, Visit, batch
from ..base.precision import autocast, working_dtype
from ..base.seeds import drawing
from ..error_store.store import ErrorStore
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..network.updater import Updater
from .cuda_graph import GraphedStep
from .local import Local
from .signal import Signal


class Output(NamedTuple):
    """A batch's last output from before its update, `a [M, C]`, and its `target [M, C]`; or, where the operations have them for
    nothing, the loss and the hit of each prediction, `[M]` each. M counts predictions: one a sample, or one for each
    token of a text window."""

    a: Tensor | None
    target: Tensor | None
    sample_losses: Tensor | None = None
    sample_hits: Tensor | None = None


Augment = Callable[[Tensor, int], Tensor]  # of a batch `[batch, ...]` at the visit of that number


class Learner(Protocol):
    """A way to learn from visits, with the loss of that name."""

    loss: str
    signal: Signal | None  # None: the error goes backward
    store: ErrorStore | None  # where the signal is delayed
    augment: Augment | None  # how inputs are seen at a visit

    def visit(self, visit: Visit, lr: float) -> Output:
        """Learn from a batch of samples."""

    def use_graph(self, batch: int, slots: int) -> bool:
        """Run visits of `batch` samples as CUDA graphs from now on, results being kept for `slots` visits; False where they
        cannot be."""

    def state(self) -> dict[str, Tensor]:
        """What the update rule keeps between steps, by name: the very tensors that it works on."""

    def resumed(self, steps: int) -> None:
        """Go on after the tensors of `state`, and the weights, were filled with those of a run of so many steps."""


class F3Learner:
    """F3 and its kin: every hidden stage is taught by `e B`, the last one by the exact gradient at its own output.

    With a delayed signal (arXiv 2304.13372, alg. 1) a stage is updated while the forward pass goes through it. With a
    current one (DFA) the forward pass goes through all stages once, its activations are kept, and then every stage is
    updated from the error at the output. Runs without autograd, but for what is inside a `Block`.

    With a `local` one they learn from readings of their own outputs instead, see there.

    `scale` is a factor on the hidden stages' gradient, or `mean`: one over the batch. Raises ValueError for a delayed signal
    without a store: it would learn from targets only.
    """

    augment: Augment | None = None

    def __init__(
        self,
        model: Sequential,
        data: Data,
        updater: Updater,
        loss: str,
        signal: Signal,
        scale: float | str = 1.0,
        store: ErrorStore | None = None,
        seed: int = 0,
        local: Local | None = None,
    ) -> None:
        if signal.delayed and store is None:
            raise ValueError(f"signal {signal.source!r} needs an error store, got none")
        if signal.local and local is None:
            raise ValueError(f"signal {signal.source!r} needs readings of the hidden stages (local), got none")
        self.model, self.data, self.updater, self.loss, self.signal = model, data, updater, loss, signal
        self.hidden, self.last = list(model.stages[:-1]), model.stages[-1]
        self.scale, self.store, self.seed, self.local = scale, store, seed, local
        self.dtype, self.device = working_dtype(model), updater.step.device
        self.graphs: dict[str, GraphedStep] = {}  # by what teaches in a visit

    def visit(self, visit: Visit, lr: float) -> Output:
        """See `Learner`: what is read and written around `learn`."""
        if visit.window is not None:
            self.data.load(visit.window)
        graph = self.graphs.get(visit.teach)
        if graph is not None and len(visit.index) == graph.batch:
            return Output(*graph(visit, lr))
        return self._visit(visit, lr)

    def _visit(self, visit: Visit, lr: float | Tensor) -> Output:
        x, target = batch(self.data, visit.index, self.dtype, self.device)  # [batch, ...], [M, C]
        x = x if self.augment is None else self.augment(x, visit.number)
        row = self.signal.before(visit, target, self.store)  # [M, R]; None: not known yet
        hidden = visit.teach != "nothing" and self.signal.source != "none"
        output, left = self.learn(x, target, row, hidden, lr)
        self.signal.after(visit, left, target, self.store)
        return output

    @torch.no_grad()
    def learn(
        self, x: Tensor, target: Tensor, row: Tensor | None, hidden: bool, lr: float | Tensor
    ) -> tuple[Output, Tensor | None]:
        """One step on `x [batch, ...]`: tensors in, tensors out.

        `target [M, C]`; `row [M, R]` are the errors where they are known before, `hidden` says whether hidden stages learn.
        Returns the output, and the rows `[M, R]` that the samples leave behind (None where the signal needs none).
        """
        step = self.updater.begin(lr, 1 / len(target) if self.scale == "mean" else self.scale)
        hearing = self.local.begin(target, step) if self.local is not None else None
        source = "none" if self.local is not None else self.signal.source
        waiting = []
        for place, stage in enumerate(self.hidden):
            with self._drawing(place, stage.draws, step.number):
                if not hidden:
                    with autocast(x.device, step.compute_dtype):
                        x = stage(x)
                elif hearing is not None:
                    x = hearing.pass_through(place, stage, x)
                elif row is not None:
                    x = stage.learn(x, row, step)
                else:
                    x, kept = stage.keep(x, step)
                    waiting.append((stage, kept))
        with self._drawing(len(self.hidden), self.last.draws, step.number):
            a, kept = self.last.keep(x, step, wants_input=hearing is not None)  # [M, C], or [batch, tokens, C]
        shape = a.shape
        if len(shape) > 2:
            a = a.flatten(0, -2)  # [M, C]
        a = a.to(self.dtype)
        gradient, error, figures = step.ops.output_step(a, target, self.loss, source, self.signal.link)
        at_input = self.last.finish(kept, gradient.view(shape), step, wants_input=hearing is not None)
        if hearing is not None:
            hearing.close(at_input)
        left = self.signal.kept(error, target) if self.store is not None or self.signal.current else None
        for stage, kept in waiting:
            stage.teach(kept, self.signal.taught(left, target), step)
        return (Output(a, target) if figures is None else Output(None, None, *figures)), left

    def _drawing(self, place: int, draws: bool, number: int) -> object:
        """Random numbers of a stage: of the seed, the step and the stage's place, whatever was drawn before and elsewhere."""
        return drawing(self.device, self.seed, "dropout", number, place) if draws and self.model.training else nullcontext()

    def use_graph(self, batch: int, slots: int) -> bool:
        """See `Learner`: where all stages are Linear, and data and errors are on the device."""
        linear = all(isinstance(stage, Linear) for stage in self.model.stages)
        if linear and self.augment is None and self.data.device == self.device and (self.store is None or self.store.on_device):
            self.graphs = {
                teach: GraphedStep(self._visit, teach, batch, slots, self.device) for teach in ("signal", "target", "nothing")
            }
        return bool(self.graphs)

    def state(self) -> dict[str, Tensor]:
        """See `Learner`."""
        return self.updater.state()

    def resumed(self, steps: int) -> None:
        """See `Learner`."""
        self.updater.resumed(steps)
