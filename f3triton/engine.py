"""The step and the epoch: the one place that knows the order of things."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ErrorStore
from .graphs import GraphedStep
from .layers import Linear, Sequential, autocast
from .rules import Updater, torch_optimizer
from .signals import Signal


class Data(Protocol):
    """What the engine asks of a data set: inputs and targets by sample index, and nothing else."""

    device: torch.device
    positions: int  # predictions a sample: 1, or as many as a text window has tokens

    def __len__(self) -> int: ...

    def fetch(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Inputs `[batch, ...]` of the samples `index [batch]`."""

    def one_hot(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Targets `[batch * positions, C]`: one-hot for classes, values for regression."""


def batch(data: Data, index: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs `[batch, ...]` and targets `[batch * positions, C]` on `device`, from wherever the data (and `index`) is."""
    x, target = data.fetch(index, dtype), data.one_hot(index, dtype)
    if data.device != device:
        x, target = x.to(device, non_blocking=True), target.to(device, non_blocking=True)
    return x, target


class Learner(Protocol):
    """A way to learn from one batch, with the loss of that name."""

    loss: str

    def step(self, index: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Learn from the samples `index [batch]`; returns the output from before the update and the target, `[M, C]`.

        M counts predictions: one a sample, or one for each token of a text window.
        """


class F3Learner:
    """F3 and its kin: every hidden stage is taught by `e B`, the last one by the exact gradient at its own output.

    With a delayed signal (arXiv 2304.13372, alg. 1) a stage is updated while the forward pass goes through it. With a
    current one (DFA) the forward pass goes through all stages once, its activations are kept, and then every stage is
    updated from the error at the output. Runs without autograd, but for what is inside a `Block`.
    """

    def __init__(
        self,
        model: Sequential,
        data: Data,
        updater: Updater,
        loss: str,
        signal: Signal,
        scale: float | str,
        store: ErrorStore | None,
        projection: Tensor | None = None,
    ) -> None:
        self.model, self.data, self.updater, self.loss, self.signal = model, data, updater, loss, signal
        self.hidden, self.last = list(model.stages[:-1]), model.stages[-1]
        self.scale = scale
        self.dtype, self.device = working_dtype(model), updater.step.device
        self.hidden_learn = True  # off on a window's first visit, where there is no error yet
        self.graphs: dict[bool, GraphedStep] = {}  # by `hidden_learn`
        self.store = store  # where the signal is delayed
        self.projection = projection  # [C, rank], see `error_projection`

    def use_graph(self, batch: int) -> bool:
        """Run steps of `batch` samples as a CUDA graph from now on (see `graphs`); returns False where they cannot be."""
        linear = all(isinstance(stage, Linear) for stage in self.model.stages)
        if linear and self.data.device == self.device and (self.store is None or self.store.on_device):
            slots = min(CHECK_EVERY, KEPT_OUTPUTS // (batch * self.last.out_features) + 1) + 1  # what a Tally keeps waiting
            self.graphs = {learn: GraphedStep(self._learn, batch, slots, self.device) for learn in (True, False)}
        return bool(self.graphs)

    def step(self, index: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        graph = self.graphs.get(self.hidden_learn)
        if graph is not None and len(index) == graph.batch:
            return graph(index, lr)
        return self._learn(index, lr)

    @torch.no_grad()
    def _learn(self, index: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor]:
        updater, signal = self.updater, self.signal
        updater.next_step(lr)
        x, target = batch(self.data, index, self.dtype, self.device)  # [batch, ...], [M, C]
        scale = 1 / len(target) if self.scale == "mean" else self.scale
        kept_stages = []
        if signal.current:
            for stage in self.hidden:
                x, kept = stage.keep(x, updater)
                kept_stages.append(kept)
        elif signal.source == "none" or not self.hidden_learn:
            with autocast(x.device, updater.compute_dtype):
                for stage in self.hidden:
                    x = stage(x)
        else:
            error = self.reduce(target, target) if self.store is None else self.store.read(index)  # [M, C or rank]
            if signal.mask and self.projection is None:
                error = error * target
            for stage in self.hidden:
                x = stage.learn(x, error, updater, scale)
        a, kept = self.last.keep(x, updater)  # [M, C], or [batch, tokens, C]
        shape = a.shape
        if len(shape) > 2:
            a = a.flatten(0, -2)  # [M, C]
        if a.dtype != self.dtype:
            a = a.to(self.dtype)
        gradient, error = updater.ops.output_error(a, target, self.loss, signal.source, signal.link)
        self.last.finish(kept, gradient.view(shape), updater)
        if self.store is not None:
            self.store.write(index, self.reduce(error, target))
        elif signal.current:
            error = self.reduce(error, target)
            if signal.mask and self.projection is None:
                error = error * target
            for stage, kept in zip(self.hidden, kept_stages, strict=True):
                stage.teach(kept, error, updater, scale)
        return a, target

    def reduce(self, error: Tensor, target: Tensor) -> Tensor:
        """What is kept of `error [M, C]`: with a projection its product with it `[M, rank]`, after the mask, else all of it."""
        if self.projection is None:
            return error
        return (error * target if self.signal.mask else error) @ self.projection


class BackpropLearner:
    """Backpropagation by autograd with torch's fused optimizer: what F3 is compared with."""

    def __init__(self, model: Sequential, data: Data, rule: object, loss: str, compute_dtype: torch.dtype | None) -> None:
        self.model, self.data, self.loss, self.compute_dtype = model, data, loss, compute_dtype
        self.dtype, self.device = next(model.parameters()).dtype, next(model.parameters()).device
        self.optimizer = torch_optimizer(rule, [p for p in model.parameters() if p.requires_grad])

    def step(self, index: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        x, target = batch(self.data, index, self.dtype, self.device)  # [batch, ...], [M, C]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(x.device, self.compute_dtype):
            a = self.model(x)  # [M, C], or [batch, tokens, C]
        a = a.flatten(0, -2).to(self.dtype)
        mean_loss(a, target, self.loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return a.detach(), target


def working_dtype(model: nn.Module) -> torch.dtype:
    """The type of a model's inputs, outputs, losses and errors: that of its parameters, but never narrower than float32."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def mean_loss(a: Tensor, target: Tensor, loss: str) -> Tensor:
    """torch's own mean loss of the last stage's output `a [M, C]`, under autograd where that is on."""
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(a, target)
    if loss == "cross-entropy":
        return functional.cross_entropy(a, target)
    return functional.mse_loss(a, target)


def make_learner(
    model: Sequential,
    data: Data,
    rule: object,
    ops: ModuleType,
    device: torch.device,
    loss: str,
    signal: Signal | None,
    scale: float | str,
    compute_dtype: torch.dtype | None,
    rounding_seed: int = 0,
    store: ErrorStore | None = None,
    projection: Tensor | None = None,
) -> Learner:
    """The learner of a signal, with a `store` where that is delayed; backpropagation where it is None."""
    if signal is None:
        return BackpropLearner(model, data, rule, loss, compute_dtype)
    taught = list(model.stages[-1].parameters()) if signal.source == "none" else list(model.parameters())
    updater = Updater(rule, taught, ops, device, compute_dtype, rounding_seed)
    return F3Learner(model, data, updater, loss, signal, scale, store, projection)


@dataclass
class Figures:
    """Over some predictions: the mean loss, how many were right, and for values the mean squared error of each target."""

    samples: int
    loss: float
    correct: int
    mse: list[float] | None = None


@dataclass
class Progress:
    """How far a run has come; kept up to date step by step, so that it is true also when the run is cut short."""

    epochs: int = 0
    steps: int = 0


class Diverged(RuntimeError):
    """The loss became NaN or infinite; `step` counts from 1 over the whole run."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(f"the loss became {value} at step {step}; try a smaller learning rate")
        self.step = step


CHECK_EVERY = 500  # steps between looks at the loss: one synchronisation each
KEPT_OUTPUTS = 1 << 20  # elements of outputs that wait for their loss to be taken


class Tally:
    """Loss and correct answers of an epoch's batches, looked at together: step by step they would cost a dozen small operations
    each. Nothing waits for the device but `look`, every `CHECK_EVERY` batches.

    What it says does not depend on when it was saved and restored in between (`state`, `restore`): batches are taken together
    in the same groups, and summed one by one.
    """

    def __init__(self, loss: str) -> None:
        self.loss = loss
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.elements = 0
        self.losses: list[Tensor] = []  # of finished batches: sums over samples, [batches] each
        self.correct: list[Tensor] = []
        self.sizes: list[int] = []  # of batches not looked at yet
        self.samples, self.total, self.hits, self.batches = 0, 0.0, 0, 0  # of those looked at; `batches` counts all

    def add(self, a: Tensor, target: Tensor, step: int) -> None:
        """One batch: the last stage's output `a [M, C]` from before the update, and `target [M, C]`; `step` counts from 1."""
        self.waiting.append((a, target))
        self.sizes.append(len(a))
        self.batches += 1
        self.elements += a.numel()
        if self.elements >= KEPT_OUTPUTS:
            self._finish()
        if len(self.sizes) == CHECK_EVERY:
            self.look(step)

    def _finish(self) -> None:
        if not self.waiting:
            return
        sizes = [len(a) for a, _ in self.waiting]
        a, target = (torch.cat(tensors) for tensors in zip(*self.waiting, strict=True))  # [samples, C]
        by_sample = losses_by_sample(a, target, self.loss).double()  # [samples]
        batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(a.device)  # [samples]
        self.losses.append(torch.zeros(len(sizes), dtype=torch.float64, device=a.device).index_add_(0, batch, by_sample))
        self.correct.append((a.argmax(-1) == target.argmax(-1)).sum())
        self.waiting.clear()
        self.elements = 0

    def look(self, step: int) -> None:
        """Add up what has waited, up to `step`. Raises Diverged where a loss is not finite."""
        self._finish()
        if not self.sizes:
            return
        sums = torch.cat(self.losses).cpu()
        finite = sums.isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise Diverged(step - len(sums) + first + 1, float(sums[first]))
        for value in sums.tolist():
            self.total += value
        self.hits += int(torch.stack(self.correct).sum())
        self.samples += sum(self.sizes)
        self.losses.clear(), self.correct.clear(), self.sizes.clear()

    def figures(self, step: int) -> Figures:
        """Of the whole epoch."""
        self.look(step)
        return Figures(self.samples, self.total / max(self.samples, 1), self.hits)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(tensors, numbers) that `restore` takes."""
        tensors = {}
        if self.waiting:
            outputs, targets = zip(*self.waiting, strict=True)
            tensors = {"a": torch.cat(outputs).cpu(), "target": torch.cat(targets).cpu()}
        if self.losses:
            tensors |= {"losses": torch.cat(self.losses).cpu(), "correct": torch.stack(self.correct).cpu()}
        numbers = {"sizes": self.sizes, "waiting": [len(a) for a, _ in self.waiting], "samples": self.samples,
                   "total": self.total.hex(), "hits": self.hits, "batches": self.batches}  # fmt: skip
        return tensors, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, object], device: torch.device) -> None:
        """Go on from a `state`."""
        if numbers["waiting"]:
            parts = (tensors[name].to(device).split(numbers["waiting"]) for name in ("a", "target"))
            self.waiting = list(zip(*parts, strict=True))
        self.elements = sum(a.numel() for a, _ in self.waiting)
        if "losses" in tensors:
            self.losses, self.correct = [tensors["losses"].to(device)], list(tensors["correct"].to(device))
        self.sizes, self.samples, self.hits = list(numbers["sizes"]), numbers["samples"], numbers["hits"]
        self.total, self.batches = float.fromhex(numbers["total"]), numbers["batches"]


@torch.no_grad()
def losses_by_sample(a: Tensor, target: Tensor, loss: str) -> Tensor:
    """The loss of each sample, `[M]`: its mean over samples is the training loss."""
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(a, target, reduction="none").mean(-1)
    if loss == "cross-entropy":
        return functional.cross_entropy(a, target, reduction="none")
    return (a - target).square().mean(-1)


def run_epoch(
    learner: Learner,
    batches: Iterable[Tensor],
    lr_at: Callable[[int], float],
    progress: Progress,
    tally: Tally | None = None,
    after_step: Callable[[Tally], None] | None = None,
) -> Figures:
    """Learn from the batches in order; `lr_at(step)` gives a step's learning rate, steps counted from 1 over the run.

    The figures are those of each batch before its own update. They stay on the device and are looked at every
    `CHECK_EVERY` steps. `tally` is that of the epoch's steps before, where it was begun already; `after_step` gets it after
    every step. Raises Diverged where a loss is not finite.
    """
    tally = tally or Tally(learner.loss)
    for index in batches:
        a, target = learner.step(index, lr_at(progress.steps + 1))  # [M, C]
        progress.steps += 1
        tally.add(a, target, progress.steps)
        if after_step is not None:
            after_step(tally)
    figures = tally.figures(progress.steps)
    progress.epochs += 1
    return figures


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, loss: str, batch_size: int, device: torch.device, compute_dtype: torch.dtype | None = None
) -> Figures:
    """The figures of a whole data set, in its own order and in eval mode; sums are in float64.

    `batch_size` counts predictions.
    """
    was_training = model.training
    model.eval()
    dtype = working_dtype(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    samples = max(1, batch_size // data.positions)
    for start in range(0, len(data), samples):
        index = torch.arange(start, min(start + samples, len(data)), device=data.device)
        x, target = batch(data, index, dtype, device)
        with autocast(device, compute_dtype):
            a = model(x)
        a = a.flatten(0, -2).to(dtype)  # [M, C]
        total += mean_loss(a, target, loss).double() * len(a)
        hits += (a.argmax(-1) == target.argmax(-1)).sum()
        if loss == "mse":
            squares = squares + (a - target).double().square().sum(0)  # [targets]
    model.train(was_training)
    mse = (squares / len(data)).tolist() if loss == "mse" else None
    count = len(data) * data.positions
    return Figures(count, float(total) / count, int(hits), mse)
