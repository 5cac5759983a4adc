"""Losses and hits of batches, added up: of an epoch's steps, or of a whole test set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..base.data import Data, batch
from ..base.exceptions import InputError
from ..base.precision import autocast, working_dtype
from ..distributed.ring import Alone
from ..learn.loss import hits, losses_by_sample, mean_loss
from ..learn.step import Output

CHECK_EVERY = 500  # steps between looks at the loss: one synchronisation each
KEPT_OUTPUTS = 1 << 20  # elements of outputs that wait for their loss to be taken


@dataclass
class Figures:
    """Over some predictions: the mean loss, how many were right, and for values the mean squared error of each target."""

    samples: int
    loss: float
    correct: int
    mse: list[float] | None = None


class Diverged(RuntimeError):
    """The loss became NaN or infinite; `step` counts from 1 over the whole run."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(f"the loss became {value} at step {step}; try a smaller learning rate")
        self.step, self.value = step, value


def slots(batch: int, outputs: int) -> int:
    """How many batches' outputs `[batch, outputs]` a `Tally` keeps waiting, at most, and the coming one's."""
    return min(CHECK_EVERY, KEPT_OUTPUTS // (batch * outputs) + 1) + 1


class Tally:
    """Loss and hits of an epoch's batches, each from before its own update, looked at together: step by step they would cost a
    dozen small operations each. Nothing waits for the device but `look`, every `CHECK_EVERY` batches.

    What it says does not depend on when it was saved and restored in between (`state`, `restore`): batches are taken together
    in the same groups, and summed one by one.
    """

    def __init__(self, loss: str, outputs: int, device: torch.device) -> None:
        self.loss, self.outputs, self.device = loss, outputs, device
        self._begin()

    def _begin(self) -> None:
        self.waiting: list[Output] = []
        self.waits = 0  # batches that these are of
        self.elements = 0
        self.losses: list[Tensor] = []  # of finished batches: sums over samples, [batches] each
        self.correct: list[Tensor] = []
        self.sizes: list[int] = []  # of batches not looked at yet
        self.samples, self.total, self.hits, self.batches = 0, 0.0, 0, 0  # of those looked at; `batches` counts all

    def add(self, output: Output, step: int, batches: int = 1) -> None:
        """The output of one batch, or of several of one size, the last of them that of `step`, counted from 1. Raises Diverged,
        see `look`."""
        rows = (output.sample_losses if output.a is None else output.a).size(0) // batches
        while batches:
            room = min(CHECK_EVERY - len(self.sizes), math.ceil((KEPT_OUTPUTS - self.elements) / (rows * self.outputs)))
            now, batches = min(room, batches), max(0, batches - room)
            self.waiting.append(output if not batches else output.part(0, now * rows))
            output = output if not batches else output.part(now * rows)
            self.sizes += [rows] * now
            self.waits += now
            self.batches += now
            self.elements += now * rows * self.outputs
            if self.elements >= KEPT_OUTPUTS:
                self._finish()
            if len(self.sizes) == CHECK_EVERY:
                self.look(step - batches)

    def _finish(self) -> None:
        if not self.waiting:
            return
        sizes = self._waiting_sizes()
        a, target, losses, right = self._together()
        if a is not None:
            losses, right = losses_by_sample(a, target, self.loss), hits(a, target)  # [samples]
        # sums of slices, and no scattered additions, whose order is anybody's on a GPU; of those alike all at once
        alike = next((place for place, size in enumerate(sizes) if size != sizes[0]), len(sizes))
        first, others = losses.double().tensor_split([alike * sizes[0]])
        sums = [part.sum(0, keepdim=True) for part in others.split(sizes[alike:])]
        self.losses.append(torch.cat([first.view(alike, -1).sum(1), *sums]))
        self.correct.append(right.sum())
        self.waiting.clear()
        self.elements = self.waits = 0

    def _waiting_sizes(self) -> list[int]:
        return self.sizes[len(self.sizes) - self.waits :]

    def _together(self) -> Output:
        """The outputs that wait, as one."""
        return Output(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*self.waiting, strict=True)))

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
        """Of the whole epoch, after `step`; the next epoch begins at zero. Raises Diverged, see `look`."""
        self.look(step)
        found = Figures(self.samples, self.total / max(self.samples, 1), self.hits)
        self._begin()
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(tensors, numbers) that `restore` takes; nothing between two epochs."""
        if not self.batches:
            return {}, {}
        tensors = {}
        if self.waiting:
            tensors = {name: t.cpu() for name, t in self._together()._asdict().items() if t is not None}
        if self.losses:
            tensors |= {"losses": torch.cat(self.losses).cpu(), "correct": torch.stack(self.correct).cpu()}
        numbers = {"sizes": self.sizes, "waiting": self._waiting_sizes(), "samples": self.samples,
                   "total": self.total.hex(), "hits": self.hits, "batches": self.batches}  # fmt: skip
        return tensors, {"tally": numbers}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
        """Go on from a `state`."""
        self._begin()
        numbers = state.get("tally")
        if not numbers:
            return
        waiting, sizes, outputs = numbers["waiting"], numbers["sizes"], [name for name in Output._fields if name in tensors]
        looked_at = len(sizes) - len(waiting)
        fits = outputs in (([], ["a", "target"], ["sample_losses", "sample_hits"]) if waiting else ([],))
        fits = fits and sizes[looked_at:] == waiting and len(tensors.get("losses", ())) == looked_at <= numbers["batches"]
        wide = [sum(waiting), self.outputs]
        if not fits or any(list(tensors[name].shape) != (wide if name in ("a", "target") else wide[:1]) for name in outputs):
            raise InputError("the checkpoint's tally does not fit its tensors")
        if numbers["waiting"]:
            parts = ([None] * len(numbers["waiting"]) if name not in tensors
                     else tensors[name].to(self.device).split(numbers["waiting"]) for name in Output._fields)  # fmt: skip
            self.waiting = [Output(*each) for each in zip(*parts, strict=True)]
            self.waits = len(waiting)
        self.elements = sum(numbers["waiting"]) * self.outputs
        if "losses" in tensors:
            self.losses, self.correct = [tensors["losses"].to(self.device)], list(tensors["correct"].to(self.device))
        self.sizes, self.samples, self.hits = list(numbers["sizes"]), numbers["samples"], numbers["hits"]
        self.total, self.batches = float.fromhex(numbers["total"]), numbers["batches"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    loss: str,
    batch_size: int,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    flow: Alone | None = None,
) -> Figures:
    """The figures of a whole data set, in its own order and in eval mode; sums are in float64.

    `batch_size` counts predictions. With a `flow` of several workers the network is theirs. Raises InputError where the data
    have other outputs than the model.
    """
    was_training = model.training
    if flow is None:
        model.eval()
    dtype = working_dtype(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(target: Tensor, a: Tensor) -> None:
        nonlocal total, right, squares
        a = a.flatten(0, -2).to(dtype)  # [M, C]
        if a.shape != target.shape:
            raise InputError(f"the model gives {a.shape[-1]} outputs, and the data to evaluate have {target.shape[-1]}")
        total += mean_loss(a, target, loss).double() * len(a)
        right += hits(a, target).sum()
        if loss == "mse":
            squares = squares + (a - target).double().square().sum(0)  # [targets]

    samples = max(1, batch_size // data.positions)
    for start in range(0, len(data), samples):
        index = torch.arange(start, min(start + samples, len(data)), device=data.device)
        x, target = batch(data, index, dtype, device)
        if flow is not None:
            flow.forward(x, partial(add, target))
            continue
        with autocast(device, compute_dtype):
            a = model(x)
        add(target, a)
    if flow is not None:
        flow.drain()
    else:
        model.train(was_training)
    mse = (squares / len(data)).tolist() if loss == "mse" else None
    count = len(data) * data.positions
    return Figures(count, float(total) / count, int(right), mse)
