"""A run and its checkpoints: what is written down in the middle of `fit`, and how it goes on from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import checkpoint
from .checkpoint import Checkpoints, Snapshot, differences
from .engine import Tally
from .exceptions import InputError

if TYPE_CHECKING:
    from .errors import ErrorStore
    from .streaming import StreamView
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
        self.saved_at = -1  # steps
        self.needs: list[int] = []  # the epochs that the kept checkpoints are in

    def after_step(self, epoch: int) -> Callable[[Tally], None] | None:
        """What `run_epoch` calls after every step of an epoch."""
        self.at = (epoch, None)
        if self.checkpoints is None:
            return None

        def stepped(tally: Tally) -> None:
            self.at = (epoch, tally)
            if self.checkpoints.due(self.trainer.result.steps):
                self.save()

        return stepped

    def after_epoch(self, epoch: int) -> None:
        """At the end of an epoch, after its record."""
        self.at = (epoch + 1, None)
        if self.checkpoints is not None and self.checkpoints.due_after_epoch(epoch + 1):
            self.save()

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
            "learning_seconds": result.learning_seconds,
        }
        if store is not None:
            tensors |= {f"errors.{name}": tensor for name, tensor in store.state().items()}
            state["store_epoch"] = store.epoch
        if tally is not None:
            own, numbers = tally.state()
            tensors |= {f"tally.{name}": tensor for name, tensor in own.items()}
            state["tally"] = numbers
        if self.stream is not None:
            state["stream"] = self.stream.state()
        checkpoint.write(self.checkpoints.folder, Snapshot(tensors, state), result.steps, self.checkpoints.keep)
        if store is not None:
            self.needs = [*self.needs, store.epoch][-self.checkpoints.keep :]
            self.release(store)

    def release(self, store: ErrorStore | None) -> None:
        """Tell the store which epochs the checkpoints that are kept may go back to."""
        if store is not None:
            store.release(min([*self.needs, store.epoch]))

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
                self.needs = [store.epoch]
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
            return state["epoch"], tally
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"the checkpoint lacks a part of the run: {type(error).__name__} {error}") from None


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
        "windows": None if windows is None else dataclasses.asdict(windows),
        "eval_every": eval_every,
        "data": data,
    }
    return settings if trainer.lr_schedule == "constant" else settings | {"epochs": epochs}
