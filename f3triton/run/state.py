"""A run in the middle of `fit`: the parts that it consists of, when they are written down, and how it goes on from there."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.exceptions import InputError
from ..base.schema import check
from ..base.seeds import one_at_a_time
from ..base.text import short
from ..distributed.replicas import DataParallel
from ..distributed.ring import Alone, Files
from ..error_store import ErrorStore
from ..learn.step import Learner
from ..visits.order import Order
from ..visits.streams import StreamWindows
from . import checkpoint
from .checkpoint import STATE_HOLDS, Checkpoints, Snapshot, differences
from .result import FitResult

State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and what JSON can hold


class Part(Protocol):
    """Something of a run that changes while it trains."""

    def state(self) -> State:
        """What `restore` needs to go on from here."""

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from the part's own `tensors`, and the run's `state`."""


def fill(into: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy `saved` into tensors of the same names, shapes and types. Raises InputError where one does not fit."""
    for name, tensor in into.items():
        other = saved.get(name)
        counts = tensor.dim() == 0 and other is not None and other.dim() == 0  # a count of steps was a float once
        if other is None or other.shape != tensor.shape or (other.dtype != tensor.dtype and not counts):
            found = "missing" if other is None else f"{other.dtype} {list(other.shape)}"
            raise InputError(
                f"{what} of the checkpoint do not fit: {name} is {found}, needed {tensor.dtype} {list(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


class Network:
    """Parameters and buffers, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state(self) -> State:
        return self.model.state_dict(), {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        fill(self.model.state_dict(), tensors, "the weights")


class Moments:
    """What the learner's update rule keeps; restored after the weights."""

    def __init__(self, *learners: Learner) -> None:
        self.learners = learners  # of one network: each has the moments of its part

    def state(self) -> State:
        return {name: tensor for learner in self.learners for name, tensor in learner.state().items()}, {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        for learner in self.learners:
            fill(learner.state(), tensors, "the moments")
            learner.resumed(state["steps"])


class Errors:
    """The rows of the error store."""

    def __init__(self, store: ErrorStore) -> None:
        self.store = store

    def state(self) -> State:
        return self.store.state(), {"store_epoch": self.store.epoch}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.store.restore(tensors, state["store_epoch"])


class Stream:
    """The place in a stream."""

    def __init__(self, windows: StreamWindows) -> None:
        self.windows = windows

    def state(self) -> State:
        return {}, {"stream": self.windows.state()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.windows.restore(state["stream"])


class Sampling:
    """What an order keeps of the visits that were made: the sizes of errors by which samples are drawn."""

    def __init__(self, order: Order) -> None:
        self.tensors = order.tensors

    def state(self) -> State:
        return self.tensors, {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        fill(self.tensors, tensors, "the sizes of errors")


class Generators:
    """torch's global random generators, which a user's own modules and orders may draw from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state(self) -> State:
        with one_at_a_time:  # none of a stage that draws in another thread
            states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states, {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        torch.set_rng_state(tensors["cpu"])
        if self.device.type == "cuda" and "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"], self.device)


# What has gone ahead when the last worker has done a step; all else waits for it, but for what each has of its own.
AT_ONCE = ("stream", "random")
OWN = ("network", "moments")
AGAIN = 2.0  # seconds: a launcher sends the signal that its processes have got from the terminal once more


@contextlib.contextmanager
def handling(handler: Callable[[int, object], None], *signals: int) -> Iterator[None]:
    """`handler` for those of the signals that nobody handles yet; in the main thread only, as Python has it."""
    in_main = threading.current_thread() is threading.main_thread()
    usual = (signal.default_int_handler, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in signals if in_main and signal.getsignal(number) in usual}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


class Keeper:
    """Keeps checkpoints of a run's `parts`, and goes back to one; where `checkpoints` is None it only tells the store what no
    checkpoint needs any more."""

    def __init__(
        self,
        parts: dict[str, Part],
        settings: dict[str, object],
        result: FitResult,
        store: ErrorStore | None,
        checkpoints: Checkpoints | None,
        flow: Alone,
        steps_per_epoch: int | None = None,
        replicas: DataParallel | None = None,
    ) -> None:
        """`steps_per_epoch`: None where it is not known. `replicas`: all are to stop after the same step."""
        self.flow, self.replicas = flow, replicas
        self.asked: Callable[[], bool] = lambda: False  # whether a replica was to stop after the last step
        self.parts, self.settings, self.result, self.store, self.checkpoints = parts, settings, result, store, checkpoints
        self.steps_per_epoch = steps_per_epoch
        self.needs: dict[int, int] = {}  # the epochs of the store that the checkpoints in the folder are in, by their steps
        self.pressed, self.pressed_at = 0, -AGAIN  # times that somebody asked to stop
        self.draft: Path | None = None  # the folder of a checkpoint that is not whole yet

    def after_step(self, steps: int) -> None:
        """After so many steps, before the next: write a checkpoint if one is due. Raises KeyboardInterrupt after Ctrl-C."""
        self._keep(self.checkpoints is not None and self.checkpoints.due(steps))

    def after_epoch(self, epochs: int) -> None:
        """At the end of an epoch, after its record, likewise."""
        self._keep(self.checkpoints is not None and self.checkpoints.due_after_epoch(epochs))

    def _keep(self, due: bool) -> None:
        stop = self.pressed > 0
        if self.replicas is not None:
            stop, self.asked = self.asked(), self.replicas.ask(stop)
        if due or (stop and self.checkpoints is not None):
            self.save()
        if stop:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interrupts_between_steps(self) -> Iterator[None]:
        """Ctrl-C waits for the step's end and a last checkpoint, where there are any; a second Ctrl-C waits for nothing.

        With several processes it waits in any case, and SIGTERM is the same.
        """
        several = self.flow.elsewhere or self.replicas is not None

        def ask(number: int, frame: object) -> None:
            if several and time.monotonic() - self.pressed_at < AGAIN:
                return
            self.pressed, self.pressed_at = self.pressed + 1, time.monotonic()
            if self.pressed > 1:
                raise KeyboardInterrupt

        with handling(ask, signal.SIGINT, *[signal.SIGTERM] * several) if several or self.checkpoints else nullcontext():
            yield

    def save(self) -> None:
        """Write a checkpoint of this moment, as soon as all of it is there: other workers, and rows that are on their way, may
        be some steps behind. Where the one before is not whole yet, it is waited for."""
        if self.draft is not None:
            self.flow.drain()
        now = {name: part.state() for name, part in self.parts.items() if name in AT_ONCE}
        self.draft = checkpoint.begin(self.checkpoints.folder)
        self.flow.states(str(self.draft), partial(self._write, now))

    def _write(self, now: dict[str, State], files: Files) -> None:
        """Write the checkpoint of the step that has just come back from all workers, which have left `files`."""
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {"settings": self.settings}
        now |= dict.fromkeys(OWN, ({}, {})) if files else {}
        for name, part in self.parts.items():
            own, numbers = now[name] if name in now else part.state()
            tensors |= {f"{name}.{key}" if key else name: tensor for key, tensor in own.items()}
            state |= numbers
        steps = self.result.steps
        snapshot = Snapshot(tensors, state, self.checkpoints.best)
        checkpoint.finish(self.draft, files, snapshot, steps, self.checkpoints.keep)
        self.draft = None
        self.checkpoints.on_write()
        if self.store is not None:
            there = {number for number, _ in checkpoint.found_in(self.checkpoints.folder)}
            self.needs = {number: epoch for number, epoch in self.needs.items() if number in there} | {steps: self.store.epoch}
            self.release()

    def abandon(self) -> None:
        """Remove what there is of a checkpoint that could not be made; nobody writes any more."""
        if self.draft is not None:
            shutil.rmtree(self.draft, ignore_errors=True)

    def release(self) -> None:
        """Tell the store which epochs the checkpoints that are kept may go back to."""
        if self.store is not None:
            self.store.release(min([*self.needs.values(), self.store.epoch]))

    def restore(self, snapshot: Snapshot) -> None:
        """Put all parts in the state of a checkpoint.

        Raises InputError where it is one of another run, and says in what it differs.
        """
        require_same(snapshot, self.settings)
        state, each = snapshot.state, self.steps_per_epoch
        done = state["epoch"] * (each or 0) + state.get("tally", {}).get("batches", 0)
        if each is not None and state["steps"] != done:
            raise InputError(f"the checkpoint's state: steps are {state['steps']:,}, and its epochs and batches make {done:,}")
        restore(self.parts, snapshot)
        with complete():
            self._tidy(snapshot.state["steps"], snapshot.state.get("store_epoch", 0))

    def _tidy(self, steps: int, store_epoch: int) -> None:
        """Remove the checkpoints that the run would have removed, had it not been killed, and see what the others need.

        Those before this one are needed, should it be found damaged one day.
        """
        if self.checkpoints is None:
            return
        folder = self.checkpoints.folder
        if steps in dict(checkpoint.found_in(folder)):
            checkpoint.tidy(folder, steps, self.checkpoints.keep)
        self.needs = {steps: store_epoch}
        for number, path in checkpoint.found_in(folder):
            epoch = checkpoint.peek(path).get("store_epoch")
            if number < steps and isinstance(epoch, int):
                self.needs[number] = epoch
        self.release()


@contextlib.contextmanager
def complete() -> Iterator[None]:
    """Turn what comes of a checkpoint that lacks something into an InputError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = short(f"{type(error).__name__} {error}", 200)[1:-1]
        raise InputError(f"the checkpoint lacks a part of the run: {reason}") from None


def restore(parts: dict[str, Part], snapshot: Snapshot) -> None:
    """Put `parts` in the state of a checkpoint. Raises InputError where they do not fit."""
    with complete():
        for name, part in parts.items():
            own = {key.removeprefix(f"{name}."): t for key, t in snapshot.tensors.items() if key.startswith(f"{name}.")}
            if name in snapshot.tensors:
                own[""] = snapshot.tensors[name]
            part.restore(own, snapshot.state)


def require_same(snapshot: Snapshot, settings: dict[str, object]) -> None:
    """Raise InputError where a checkpoint is one of a run with other `settings_of`, and say in what it differs."""
    check(STATE_HOLDS, snapshot.state, "the checkpoint's state")
    then = dict(snapshot.state["settings"])
    if len(then.get("feedback", ())) == 1:  # once, a law that all stages have was written once
        then["feedback"] = then["feedback"] * len(settings["feedback"])
    if isinstance(then.get("data"), dict) and "content" not in then["data"]:  # once, it was not noted
        settings = settings | {"data": {k: v for k, v in settings["data"].items() if k != "content"}}
    other = differences(then, settings)
    if other:
        course = (
            "; its learning rate goes to zero with the last epoch: begin anew with --init-from RUN, or --lr-schedule constant"
        )
        way = course if then.get("epochs") != settings.get("epochs") else ""
        raise InputError(f"cannot resume from a checkpoint of another run: {'; '.join(other)}{way}")
