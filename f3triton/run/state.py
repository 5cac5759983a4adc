"""A run and its checkpoints: what is written down in the middle of `fit`, and how it goes on from there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from ..base.exceptions import InputError
from ..network.stage import Stage
from . import checkpoint
from .checkpoint import Checkpoints, Snapshot, differences
from .tally import Tally

if TYPE_CHECKING:
    from ..error_store import ErrorStore
    from ..visits.streams import StreamView
    from .trainer import Trainer


class RunState:
    """The state of a `Trainer` in `fit`, to be saved at steps and at epochs' ends, and restored."""

    def __init__(
        self,
        trainer: Trainer,
        data: dict[str, object],
        epochs: int,
        eval_every: int,
        checkpoints: Checkpoints | None,
        stream: StreamView | None = None,
    ) -> None:
        self.trainer, self.checkpoints, self.stream = trainer, checkpoints, stream
        self.settings = settings_of(trainer, data, epochs, eval_every)
        self.at: tuple[int, Tally | None] = (0, None)  # (epoch, its tally so far)
        self.began: float | None = None  # when this epoch's part of the run did
        self.needs: dict[int, int] = {}  # the epochs of the store that the checkpoints in the folder are in, by their steps
        self.asked_to_stop = False

    def after_step(self, epoch: int) -> Callable[[Tally], None] | None:
        """What `run_epoch` calls after every step of an epoch, which begins now."""
        self.at, self.began = (epoch, None), time.perf_counter()
        if self.checkpoints is None:
            return None

        def stepped(tally: Tally) -> None:
            self.at = (epoch, tally)
            if self.checkpoints.due(self.trainer.result.steps) or self.asked_to_stop:
                self.save()
            self._stop()

        return stepped

    def after_epoch(self, epoch: int) -> None:
        """At the end of an epoch, after its record."""
        self.at, self.began = (epoch + 1, None), None
        if self.checkpoints is not None and (self.checkpoints.due_after_epoch(epoch + 1) or self.asked_to_stop):
            self.save()
        self._stop()

    def _stop(self) -> None:
        if self.asked_to_stop:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interrupts_between_steps(self) -> Iterator[None]:
        """Ctrl-C waits for the step's end and a last checkpoint, where there are any; a second Ctrl-C waits for nothing."""
        before = signal.getsignal(signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        if self.checkpoints is None or not in_main or before is not signal.default_int_handler:
            yield
            return

        def ask(number: int, frame: object) -> None:
            if self.asked_to_stop:
                raise KeyboardInterrupt
            self.asked_to_stop = True

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        trainer, (epoch, tally) = self.trainer, self.at
        result, learner = trainer.result, trainer.learner
        store = getattr(learner, "store", None)
        tensors = checkpoint.network_tensors(trainer.model) | checkpoint.moment_tensors(learner, trainer.model)
        tensors |= checkpoint.random_states(trainer.device)
        state = {
            "settings": self.settings,
            "epoch": epoch,
            "steps": result.steps,
            "epochs_done": result.epochs,
            "history": result.history,
            "learning_seconds": result.learning_seconds + (time.perf_counter() - self.began if self.began else 0.0),
        }
        if self.stream is not None:
            state["stream"] = self.stream.state()
        if store is not None:
            tensors |= {f"errors.{name}": tensor for name, tensor in store.state().items()}
            state["store_epoch"] = store.epoch
        if tally is not None:
            own, numbers = tally.state()
            tensors |= {f"tally.{name}": tensor for name, tensor in own.items()}
            state["tally"] = numbers
        checkpoint.write(self.checkpoints.folder, Snapshot(tensors, state), result.steps, self.checkpoints.keep)
        if store is not None:
            there = {steps for steps, _ in checkpoint.found_in(self.checkpoints.folder)}
            self.needs = {steps: epoch for steps, epoch in self.needs.items() if steps in there} | {result.steps: store.epoch}
            self.release(store)

    def release(self, store: ErrorStore | None) -> None:
        """Tell the store which epochs the checkpoints that are kept may go back to."""
        if store is not None:
            store.release(min([*self.needs.values(), store.epoch]))

    def restore(self, snapshot: Snapshot) -> tuple[int, Tally | None]:
        """Put the trainer in the state of a checkpoint; returns (epoch, its tally so far).

        Raises InputError where it is one of another run, and says in what it differs.
        """
        trainer, state, tensors = self.trainer, snapshot.state, snapshot.tensors
        require_same(snapshot, self.settings)
        learner, result = trainer.learner, trainer.result
        try:
            checkpoint.restore_tensors(checkpoint.network_tensors(trainer.model), tensors, "the weights")
            checkpoint.restore_tensors(checkpoint.moment_tensors(learner, trainer.model), tensors, "the moments")
            store = getattr(learner, "store", None)
            if store is not None:
                own = {name.removeprefix("errors."): t for name, t in tensors.items() if name.startswith("errors.")}
                store.restore(own, state["store_epoch"])
            if self.stream is not None:
                self.stream.restore(state["stream"])
            checkpoint.restore_random_states(tensors, trainer.device)
            result.steps, result.epochs = state["steps"], state["epochs_done"]
            result.history, result.learning_seconds = list(state["history"]), state["learning_seconds"]
            tally = None
            if "tally" in state:
                tally = Tally(learner.loss)
                own = {name.removeprefix("tally."): t for name, t in tensors.items() if name.startswith("tally.")}
                tally.restore(own, state["tally"], trainer.device)
            self._tidy(state["steps"], state.get("store_epoch", 0))
            return state["epoch"], tally
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"the checkpoint lacks a part of the run: {type(error).__name__} {error}") from None

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
        self.release(getattr(self.trainer.learner, "store", None))


def require_same(snapshot: Snapshot, settings: dict[str, object]) -> None:
    """Raise InputError where a checkpoint is one of a run with other `settings_of`, and say in what it differs."""
    check_state(snapshot.state)
    other = differences(snapshot.state["settings"], settings)
    if other:
        raise InputError(f"cannot resume from a checkpoint of another run: {'; '.join(other)}")


def check_state(state: dict[str, object]) -> None:
    """Raise InputError where `state.json` does not hold what `save` writes."""

    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62

    def wholes(value: object) -> bool:
        return isinstance(value, list) and all(map(whole, value))

    fits = {
        "settings": lambda value: isinstance(value, dict),
        "epoch": whole,
        "steps": whole,
        "epochs_done": whole,
        "history": lambda value: isinstance(value, list) and all(isinstance(r, dict) and whole(r.get("step")) for r in value),
        "learning_seconds": lambda value: isinstance(value, int | float),
    }
    numbers = {"sizes": wholes, "waiting": wholes, "samples": whole, "hits": whole, "batches": whole}
    wrong = [name for name, fit in fits.items() if not fit(state.get(name))]
    tally, store_epoch = state.get("tally", {}), state.get("store_epoch", 0)
    if not isinstance(tally, dict) or (tally and not all(fit(tally.get(name)) for name, fit in numbers.items())):
        wrong.append("tally")
    if not whole(store_epoch):
        wrong.append("store_epoch")
    stream = state.get("stream")
    if stream is not None and not (
        isinstance(stream, dict)
        and whole(stream.get("pass"))
        and whole(stream.get("block"))
        and isinstance(stream.get("reader"), dict)
    ):
        wrong.append("stream")
    if wrong:
        raise InputError(f"the checkpoint's state.json is not that of a run: {wrong[0]!r} is missing, or not what it has to be")


def settings_of(trainer: Trainer, data: dict[str, object], epochs: int, eval_every: int) -> dict[str, object]:
    """Everything that the result depends on, as JSON has it.

    With a constant learning rate the number of epochs is not among them: more of them only go on. The device is not, and not
    how much is evaluated at once.
    """
    signal, windows = trainer.signal, trainer.windows
    settings = {
        "method": trainer.method,
        "signal": None if signal is None else dataclasses.asdict(signal),
        "network": repr(trainer.model),
        "network_config": json.loads(json.dumps(trainer.model.config())) if hasattr(trainer.model, "config") else None,
        "loss": trainer.loss,
        "rule": repr(trainer.rule),
        "hidden_scale": trainer.hidden_scale,
        "lr_schedule": trainer.lr_schedule,
        "warmup_steps": trainer.warmup_steps,
        "batch_size": trainer.batch_size,
        "seed": trainer.seed,
        "precision": trainer.precision,
        "error_dtype": trainer.error_dtype,
        "error_rank": trainer.error_rank,
        "feedback": feedback_of(trainer.model),
        "windows": None if windows is None else dataclasses.asdict(windows),
        "eval_every": eval_every,
        "data": data,
    }
    return settings if trainer.lr_schedule == "constant" else settings | {"epochs": epochs}


def feedback_of(model: torch.nn.Module) -> list[str]:
    """The laws of a network's feedback matrices, and hashes of those that were given, in the order of their stages."""
    found = []
    for stage in model.modules():
        if isinstance(stage, Stage):
            given = stage.feedback_law is None and stage.feedback_matrix is not None
            matrix = stage.feedback_matrix.double().cpu().contiguous().view(torch.uint8).numpy().data if given else b""
            found.append(f"given, {hashlib.sha256(matrix).hexdigest()[:16]}" if given else str(stage.feedback_law))
    return list(dict.fromkeys(found))
