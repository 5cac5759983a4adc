"""The step: what happens to a network and to the errors of a batch of samples when their turn has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..base.data import Data, Visit, batch
from ..base.precision import autocast, working_dtype
from ..base.seeds import drawing
from ..error_store.store import ErrorStore
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..network.stage import Stage
from ..network.updater import Replicas, Step, Updater
from .cuda_graph import GraphedStep
from .epoch import EpochLaunch
from .local import Hearing, Local
from .signal import Signal


class Output(NamedTuple):
    """A batch's last output from before its update, `a [M, C]`, and its `target [M, C]`; or, where the operations have them for
    nothing, the loss and the hit of each prediction, `[M]` each. M counts predictions: one a sample, or one for each
    token of a text window. Of a part of a network that has not the last stage, `a` is the part's output."""

    a: Tensor | None
    target: Tensor | None
    sample_losses: Tensor | None = None
    sample_hits: Tensor | None = None

    def part(self, start: int, end: int | None = None) -> Output:
        """That of some of the predictions."""
        return Output(*(None if tensor is None else tensor[start:end] for tensor in self))


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

    def use_launches(self, batch: int) -> int:
        """Get ready for `visits`, where `epoch.refusal` has nothing against it; returns how many they may be."""

    def visits(self, visits: Sequence[Visit], rates: Sequence[float]) -> Output:
        """Learn from several batches, of `batch` samples each, by their learning rates: what `visit` does, in one launch, with
        the outputs in the order of the visits. No row may occur twice."""

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

    `scale` is a factor on the hidden stages' gradient, or `mean`: one over the batch. `part`: the stages that learn here, all
    by default; what comes before them and behind them is the work of others, to whom a store belongs as well. `replicas`:
    those that learn from other rows of the same batches. Raises ValueError for a delayed signal without a store: it would
    learn from targets only.
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
        part: range | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        if signal.delayed and store is None and part is None:
            raise ValueError(f"signal {signal.source!r} needs an error store, got none")
        if signal.local and local is None:
            raise ValueError(f"signal {signal.source!r} needs readings of the hidden stages (local), got none")
        self.model, self.data, self.updater, self.loss, self.signal = model, data, updater, loss, signal
        self.part, self.replicas = range(len(model)) if part is None else part, replicas
        self.last = model.stages[-1] if self.part.stop == len(model) else None
        self.hidden = [model.stages[place] for place in self.part if place < len(model) - 1]
        self.scale, self.store, self.seed, self.local = scale, store, seed, local
        self.dtype, self.device = working_dtype(model), updater.step.device
        self.graphs: dict[str, GraphedStep] = {}  # by what teaches in a visit; of a part by `hidden`
        self.graphed = 0  # samples of a batch that a part takes as a graph
        self.launch: EpochLaunch | None = None

    def visit(self, visit: Visit, lr: float) -> Output:
        """See `Learner`: what is read and written around `learn`."""
        if visit.window is not None:
            self.data.load(visit.window)
        graph = self.graphs.get(visit.teach)
        if graph is not None and visit.index.shape == graph.inputs[0].shape:
            return Output(*graph(lr, visit.index, visit.row))
        return self._visit(visit, lr)

    def _visit_of(self, teach: str, lr: Tensor, index: Tensor, row: Tensor) -> Output:
        return self._visit(Visit(index, row, teach), lr)

    def _visit(self, visit: Visit, lr: float | Tensor) -> Output:
        x, target, row, split = self.given(visit)
        output, left = self.learn(x, target, row, self.teaches(visit), lr, split)
        self.signal.after(visit, left, target, self.store)
        return output

    def given(self, visit: Visit) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """`(x [batch, ...], target [M, C], row [M, R], split)`: what a visit begins with. `split`: x and row are one
        replica's."""
        x, target = batch(self.data, visit.index, self.dtype, self.device)
        x = x if self.augment is None else self.augment(x, visit.number)
        row = self.signal.before(visit, target, self.store)  # None: not known yet
        split = self.replicas is not None and self.replicas.divide(len(x))
        if split:
            x, row = self.replicas.own(x), None if row is None else self.replicas.own(row)
        return x, target, row, split

    def teaches(self, visit: Visit) -> bool:
        """Whether the hidden stages learn in a visit."""
        return visit.teach != "nothing" and self.signal.source != "none"

    @torch.no_grad()
    def learn(
        self, x: Tensor, target: Tensor, row: Tensor | None, hidden: bool, lr: float | Tensor, split: bool = False
    ) -> tuple[Output, Tensor | None]:
        """One step on `x [batch, ...]`: tensors in, tensors out.

        `target [M, C]`; `row [M, R]` are the errors where they are known before, `hidden` says whether hidden stages learn.
        `split`: `x` and `row` are those of one replica's samples. Returns the output, and the rows `[M, R]` that the samples
        leave behind (None where the signal needs none).
        """
        step = self.updater.begin(lr, 1 / len(target) if self.scale == "mean" else self.scale, self.replicas if split else None)
        hearing = self.local.begin(target, step) if self.local is not None else None
        waiting = []
        for place, stage in enumerate(self.hidden, self.part.start):
            with self._drawing(place, stage, step):
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
        if self.last is None:
            return Output(x, target), None
        if split:  # the last stage learns from the whole batch everywhere: its gradient is a mean
            x, step = self.replicas.gather(x), step.alone()
        output, left = self._end(x, target, step, hearing)
        for stage, kept in waiting:
            stage.teach(kept, self.signal.taught(left, target), step)
        return output, left

    def part_step(
        self, x: Tensor, target: Tensor, row: Tensor | None, hidden: bool, lr: float, split: bool = False
    ) -> tuple[Output, Tensor | None]:
        """`learn` as the step of a part in a pipeline: by a graph after `use_part_graph`, whose next step writes what this one
        has returned."""
        if len(x) != self.graphed:
            return self.learn(x, target, row, hidden, lr, split)
        key = f"hidden {hidden}"
        if key not in self.graphs:

            def learn(lr: Tensor, *given: Tensor | None) -> tuple[Tensor | None, ...]:
                output, left = self.learn(*given, hidden, lr)
                return output.a, output.sample_losses, output.sample_hits, left

            self.graphs[key] = GraphedStep(learn, (x, target, row), 1, self.device)
        a, losses, hits, left = self.graphs[key](lr, x, target, row)
        return Output(a, target, losses, hits), left

    def use_part_graph(self, batch: int) -> None:
        """Run steps of `batch` samples as graphs from now on, where all stages of the part are Linear."""
        if all(isinstance(self.model.stages[place], Linear) for place in self.part) and self.replicas is None:
            self.graphed = batch

    def _end(self, x: Tensor, target: Tensor, step: Step, hearing: Hearing | None) -> tuple[Output, Tensor | None]:
        """The last stage's part of a step."""
        with self._drawing(self.part.stop - 1, self.last, step):
            a, kept = self.last.keep(x, step, wants_input=hearing is not None)  # [M, C], or [batch, tokens, C]
        shape = a.shape
        if len(shape) > 2:
            a = a.flatten(0, -2)  # [M, C]
        a = a.to(self.dtype)
        source = "none" if hearing is not None else self.signal.source
        gradient, error, figures = step.ops.output_step(a, target, self.loss, source, self.signal.link)
        at_input = self.last.finish(kept, gradient.view(shape), step, wants_input=hearing is not None)
        if hearing is not None:
            hearing.close(at_input)
        left = self.signal.kept(error, target) if self.signal.delayed or self.signal.current else None
        return (Output(a, target) if figures is None else Output(None, None, *figures)), left

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The part's output for `x [M, ...]` in eval mode, and nothing learnt."""
        stages = [self.model.stages[place] for place in self.part]
        modes = [stage.training for stage in stages]
        with autocast(x.device, self.updater.compute_dtype):
            for stage, mode in zip(stages, modes, strict=True):
                x = stage.eval()(x)
                stage.train(mode)
        return x

    def _drawing(self, place: int, stage: Stage, step: Step) -> AbstractContextManager:
        """Random numbers of a stage: of the seed, the step and the stage's place, whatever was drawn before and elsewhere; and
        of the replica, where each has other rows."""
        if not (stage.draws and stage.training):
            return nullcontext()
        own = () if step.replicas is None else (step.replicas.number,)
        return drawing(self.device, self.seed, "dropout", step.number, place, *own)

    def use_graph(self, batch: int, slots: int) -> bool:
        """See `Learner`: where all stages are Linear, and data and errors are on the device."""
        linear = all(isinstance(stage, Linear) for stage in self.model.stages)
        plain = linear and self.replicas is None and self.augment is None
        if plain and self.data.device == self.device and (self.store is None or self.store.on_device):
            rows = torch.zeros(2, batch, dtype=torch.int64)
            self.graphs = {
                teach: GraphedStep(partial(self._visit_of, teach), tuple(rows), slots, self.device)
                for teach in ("signal", "target", "nothing")
            }
        return bool(self.graphs)

    def use_launches(self, batch: int) -> int:
        """See `Learner`."""
        self.launch = EpochLaunch(self.model, self.updater, self.signal, self.loss, self.scale, batch)
        return self.launch.steps

    def visits(self, visits: Sequence[Visit], rates: Sequence[float]) -> Output:
        """See `Learner`."""
        index = torch.cat([visit.index for visit in visits])
        whole = visits[0]._replace(index=index, row=index)
        x, target, row, _ = self.given(whole)
        error, figures = self.launch(x, row, target, rates)
        self.signal.after(whole, self.signal.kept(error, target) if self.signal.delayed else None, target, self.store)
        return Output(None, None, *figures)

    def state(self) -> dict[str, Tensor]:
        """See `Learner`."""
        return self.updater.state()

    def resumed(self, steps: int) -> None:
        """See `Learner`."""
        self.updater.resumed(steps)
