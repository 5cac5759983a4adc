"""Errors at the stage itself: every hidden stage learns from what its own output says of the target, and from nothing later.

Not F3 but its neighbour (local learning: Nokland and Eidnes, arXiv 1901.06656; Belilovsky et al., arXiv 1901.08164;
Mono-Forward, arXiv 2501.09238), with what it promises: no backward pass beyond a stage, activations of one stage, no stage
waits for the output. And no delay: nothing is kept from one visit to the next.

With a reach of R the gradient of a stage's reading goes back through R stages and no further (1: the stage alone; the depth:
backpropagation with a head at every stage). A stage is updated when the R - 1 stages behind it have been heard, by the sum of
their gradients and its own; activations of R stages are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..base.seeds import drawing
from ..network.head import Head
from ..network.sequential import Sequential
from ..network.stage import Stage
from ..network.updater import Step
from .narrow import Ending, Narrow


class Local:
    """Where the hidden stages of a `model` get their errors: from heads of their own, or from the network's last stages.

    Its `heads` are those of every hidden stage but the last, whose head is the output. With `reading`, so many last stages, the
    output among them, read every earlier stage's output; that does not change them, and they learn together, from the output.
    `reach`: see above. `narrow`: what a reading looks at; other than everything only where each token has its own target, and
    candidates with the network's own last stages as readers only.
    """

    def __init__(self, loss: str, model: Sequential, reach: int = 1, narrow: Narrow | None = None) -> None:
        self.loss, self.heads, self.reach, self.narrow = loss, model.heads, reach, narrow or Narrow()
        self.reader = list(model.stages[len(model) - model.reading :])
        own = [] if model.heads is None else list(model.heads)[model.unread :]
        self.direct = not self.reader and all(isinstance(head, Head) for head in own)
        self.ending = Ending(self.reader[-1]) if self.reader and not self.narrow.all else None
        self.unread, self.read = model.unread, model.read  # those between are read; those behind them learn from the output

    def begin(self, target: Tensor, step: Step) -> Hearing:
        """Begin a step with `target [M, C]`."""
        return Hearing(self, target, step)

    def gradient(self, place: int, h: Tensor, target: Tensor, step: Step) -> Tensor:
        """The gradient at the output `h [M, ...]` of the hidden stage in that place; a head of its own is updated."""
        if step.replicas is not None:  # a reading's gradient is a mean over the whole batch, which is read everywhere
            whole = step.replicas.gather(h)
            with drawing(h.device, self.narrow.seed, "dropout of readings", step.number, place):  # the same masks everywhere
                return step.replicas.own(self.gradient(place, whole, target, step.alone()))
        if self.direct:
            head = self.heads[place]
            if self.narrow.all:
                return head.visit(h, target, self.loss, step)
            return self._narrowly(
                h, target, place, step, lambda rows, target, _: head.visit(rows[:, None], target, self.loss, step).flatten(0, 1)
            )
        path: Sequence[Stage] = self.reader or [self.heads[place]]
        a, passed = h, []
        for part in path if self.ending is None else path[:-1]:
            a, kept = part.keep(a, step, wants_input=True)
            passed.append((part, kept))
        if self.ending is None:
            rows = a.flatten(0, -2).to(target.dtype)  # [M, C]
            gradient = step.ops.output_step(rows, target, self.loss, "none")[0].view(a.shape)
        else:
            gradient = self._narrowly(a, target, place, step, lambda *of: self.ending.gradient(*of, self.loss, step))
        for part, kept in reversed(passed):
            gradient = part.back(kept, gradient, step) if self.reader else part.finish(kept, gradient, step, wants_input=True)
        return gradient

    def _narrowly(
        self, h: Tensor, target: Tensor, place: int, step: Step, read: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        """The gradient at `h [batch, tokens, N]` of what `read` gives at the rows that are drawn, 0 at others. It gets those
        rows `[P, N]` and targets `[P, C]`, and candidates."""
        rows = h.flatten(0, -2)  # [M, N]
        which, chosen = self.narrow.draw(len(rows), target.shape[-1], h.device, step.number, place)
        return torch.zeros_like(rows).index_copy_(0, which, read(rows[which], target[which], chosen)).view(h.shape)


class Hearing:
    """The hidden stages of one step that are still to be updated: what they have heard of the readings behind them."""

    def __init__(self, local: Local, target: Tensor, step: Step) -> None:
        self.local, self.target, self.step = local, target, step
        self.open: list[tuple[Stage, object]] = []  # with what each kept
        self.heard: list[Tensor] = []  # the sum of the gradients at each one's output

    def pass_through(self, place: int, stage: Stage, x: Tensor) -> Tensor:
        """The output `h` of the hidden stage in that place for `x [M, ...]`; stages that have heard all are updated."""
        h, kept = stage.keep(x, self.step, wants_input=bool(self.open))
        self.open.append((stage, kept))
        self.heard.append(h.new_zeros(()).expand(h.shape))
        unread = self.local.unread
        if unread <= place < self.local.read:
            self._hear(self.local.gradient(place, h, self.target, self.step))
            first = place + 1 - len(self.open)  # that is open
            while self.open and max(first, unread) <= place + 1 - self.local.reach:
                self._finish(1)
                first += 1
        return h

    def close(self, gradient: Tensor) -> None:
        """The gradient of the whole batch at the last hidden stage's output, from the network's own; the stages that are left
        are updated."""
        self._hear(gradient if self.step.replicas is None else self.step.replicas.own(gradient))
        self._finish(len(self.open))

    def _hear(self, gradient: Tensor) -> None:
        """A gradient at the last open stage's output goes back through all that are open."""
        for number in reversed(range(len(self.open))):
            self.heard[number] = self.heard[number] + gradient.view(self.heard[number].shape)
            if number:
                stage, kept = self.open[number]
                gradient = stage.back(kept, gradient, self.step)

    def _finish(self, count: int) -> None:
        """Update the first stages that are open."""
        for (stage, kept), gradient in zip(self.open[:count], self.heard[:count], strict=True):
            stage.finish(kept, gradient, self.step)
        del self.open[:count], self.heard[:count]
