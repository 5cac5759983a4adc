"""Visits that wait until there are enough of them for one launch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..base.data import Visit
from ..distributed.ring import Alone
from ..learn.step import Learner, Output
from ..network.sequential import Sequential


class Gathered(Alone):
    """As `Alone`, for visits of which no two have a row in common before `then` is called: those of `batch` samples wait until
    there are as many as the learner takes, or something is asked for that comes after them."""

    def __init__(self, learner: Learner, model: Sequential, batch: int) -> None:
        super().__init__(learner, model)
        self.batch, self.most = batch, learner.use_launches(batch)
        self.waiting: list[tuple[Visit, float, Callable[[Output], None]]] = []

    def visit(self, visit: Visit, lr: float, done: Callable[[Output], None]) -> None:
        if len(visit.index) != self.batch:
            self.drain()
            super().visit(visit, lr, done)
            return
        self.waiting.append((visit, lr, done))
        if len(self.waiting) == self.most:
            self.drain()

    def then(self, work: Callable[[], None]) -> None:
        self.drain()
        with self.learner.launch.explained():
            work()

    def states(self, done: Callable[[dict[str, Tensor], dict[str, Tensor]], None]) -> None:
        self.drain()
        super().states(done)

    def drain(self) -> None:
        if not self.waiting:
            return
        visits, rates, each = zip(*self.waiting, strict=True)
        self.waiting = []
        with self.learner.launch.explained():
            for done, output in zip(each, self.learner.visits(visits, rates), strict=True):
                done(output)

    def whole(self) -> None:
        self.drain()
