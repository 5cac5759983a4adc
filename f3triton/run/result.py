"""How far a run has come, and what it has found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO

from torch import Tensor

from .console import shown
from .curves import draw_curves
from .records import Record, figure_of


@dataclass(repr=False)
class FitResult:
    """What `fit` did: epochs and steps done, one record an evaluation (`history`), and the seconds spent learning.

    Kept up to date step by step, so that it is true also when the run is cut short. `status` is `completed`, `interrupted`
    after Ctrl-C, `diverged`, or `running`. `workers`: of a pipeline's, the milliseconds a step that each was busy and waited.
    """

    epochs: int = 0
    steps: int = 0
    history: list[Record] = field(default_factory=list)
    learning_seconds: float = 0.0
    status: str = "running"
    workers: list[dict[str, float]] = field(default_factory=list)
    began: float | None = None  # when the learning that goes on now did

    def __repr__(self) -> str:
        figures = [
            f"{name.replace('_', ' ')} {self.history[-1][name]:.4g}" for name in shown(self.history[-1] if self.history else {})
        ]
        if self.best is not None:
            figures.append(f"best {self.best[figure_of(self.best)]:.4g} in epoch {self.best['epoch']}")
        done = f"{self.status}, {self.epochs} epochs, {self.steps:,} steps, {self.learning_seconds:.1f} s"
        return f"FitResult({done}{': ' * bool(figures)}{', '.join(figures)})"

    def _repr_png_(self) -> bytes | None:
        """The curves, for notebooks; None before the first evaluation."""
        figure = figure_of(self.history[-1]) if self.history else None
        name = "loss" if figure is None else figure.removeprefix("test_")
        curves = {
            f"result, {part}": [(r["epoch"], r[f"{part}_{name}"]) for r in self.history if f"{part}_{name}" in r]
            for part in ("train", "test")
        }
        picture = BytesIO()
        draw_curves(picture, self.status, "epoch", "percent wrong" if name == "error" else name, curves)
        return picture.getvalue() or None

    @property
    def best(self) -> Record | None:
        """The first of the evaluations with the smallest figure (see `figure_of`); None where nothing was tested."""
        tested = [record for record in self.history if figure_of(record)]
        return min(tested, key=lambda record: record[figure_of(record)], default=None)

    @property
    def stale(self) -> int:
        """The number of evaluations since the best one."""
        return 0 if self.best is None else len(self.history) - 1 - self.history.index(self.best)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Its time counts."""
        self.began = time.perf_counter()
        yield
        self.learning_seconds += time.perf_counter() - self.began
        self.began = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(no tensors, numbers) that `restore` takes."""
        running = 0.0 if self.began is None else time.perf_counter() - self.began
        return {}, {
            "epoch": self.epochs,
            "steps": self.steps,
            "epochs_done": self.epochs,
            "history": self.history,
            "learning_seconds": self.learning_seconds + running,
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
        """Go on from a `state`."""
        self.steps, self.epochs = state["steps"], state["epoch"]
        self.history, self.learning_seconds = list(state["history"]), state["learning_seconds"]
