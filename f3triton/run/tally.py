"""Losses and hits of batches, added up: of an epoch's steps, or of a whole test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.data import Data, batch
from ..base.precision import autocast, working_dtype
from ..learn.loss import losses_by_sample, mean_loss
from ..learn.step import CHECK_EVERY, KEPT_OUTPUTS, Learner


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
