"""Visits that wait until there are enough of them for one launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..base.data import Visit
from ..distributed.ring import Alone, Files
from ..learn.step import Learner
from ..network.sequential import Sequential


class Gathered(Alone):
    """As `Alone`, for visits of which no two have a row in common before `then` is called: those of `batch` samples wait until
    there are as many as the learner takes, or something is asked for that comes after them. The `done` of the last one gets the
    outputs of all together, and how many there are; when the next launch is under way, so that the device has work meanwhile.
    """

    def __init__(self, learner: Learner, model: Sequential, batch: int) -> None:
        super().__init__(learner, model)
        self.batch, self.most = batch, learner.use_launches(batch)
        self.visits: list[Visit] = []
        self.rates: list[float] = []
        self.finish: Callable[[], None] | None = None  # hands on the outputs of the last launch

    def visit(self, visit: Visit, lr: float, done: Callable[..., None]) -> None:
        if visit.index.size(0) != self.batch:
            self.drain()
            super().visit(visit, lr, done)
            return
        self.visits.append(visit)
        self.rates.append(lr)
        self.done = done
        if len(self.visits) == self.most:
            self._launch()

    def _launch(self) -> None:
        finish, self.finish = self.finish, None
        if self.visits:
            visits, rates = self.visits, self.rates
            self.visits, self.rates = [], []
            self.finish = partial(self.done, self.learner.visits(visits, rates), len(visits))
        if finish is not None:
            with self.learner.launch.explained():
                finish()

    def then(self, work: Callable[[], None]) -> None:
        self.drain()
        with self.learner.launch.explained():
            work()

    def states(self, folder: str, done: Callable[[Files], None]) -> None:
        self.drain()
        super().states(folder, done)

    def drain(self) -> None:
        while self.visits or self.finish is not None:
            self._launch()

    def whole(self) -> None:
        self.drain()
