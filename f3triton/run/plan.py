"""What a run will do: everything is checked and the network made ready, before anything is learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..base.exceptions import InputError
from ..base.precision import autocast, working_dtype
from ..base.seeds import derived_seed
from ..data import Dataset, StreamDataset
from ..data.augment import Augmentation
from ..data.preprocessing import TENSORS
from ..error_store import Codec, is_folder, make_codec, pick_home
from ..error_store.codecs import ByPosition
from ..kernels.dispatch import Choice
from ..kernels.times import Work
from ..learn.epoch import refusal
from ..learn.peers import require_linear
from ..learn.signal import Signal, resolve_loss
from ..network.feedback import error_projection
from ..network.layers import Layers
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..visits.streams import check_stream
from ..visits.windows import check_epochs, steps_per_epoch
from .schedule import make_schedule
from .settings import Settings

Kept = tuple[str, int, Codec]  # (home, samples, codec) of an error store


@dataclass(frozen=True)
class Plan:
    """What `fit` will do, after everything was checked: data on its device, the loss, the signal with its projection, the
    backend, and what is kept of `errors`, None where the method needs none."""

    train: Dataset
    test: Dataset | None
    epochs: int
    eval_every: int
    loss: str
    signal: Signal | None
    errors: Kept | None
    augment: Augmentation | None
    steps_per_epoch: int
    lr_at: Callable[[int], float]  # by steps, counted from 1
    choice: Choice
    split: list[int] | None = None  # how many stages each worker of a pipeline has
    launched: bool = False  # whether many steps are one launch


def make_plan(trainer: Any, train: Dataset, test: Dataset | None, epochs: int, eval_every: int) -> Plan:
    """The plan of a trainer, whose model gets its feedback, and the readings that local errors need. Raises InputError where
    anything does not fit."""
    own, model, signal = trainer.settings, trainer.model, trainer.signal
    check_epochs(epochs, own.windows)
    if not isinstance(eval_every, int) or eval_every < 1:
        raise InputError(f"eval every must be a whole number of at least 1, got {eval_every!r}")
    if test is not None and (test.task, test.outputs) != (train.task, train.outputs):
        raise InputError(
            f"the test set is {test.task} with {test.outputs} outputs, the training set {train.task} with {train.outputs}"
        )
    if isinstance(train, StreamDataset):
        check_stream(train, own.windows)
    loss = resolve_loss(own.loss, train.task)
    steps = steps_per_epoch(len(train), own.batch_size, own.windows)
    lr_at = make_schedule(own.lr_schedule, own.rule.lr, epochs * steps, own.warmup_steps)
    if signal is not None and signal.mask and train.task == "regression":
        raise InputError("mask target needs one-hot targets, but the task is regression; leave the mask off")
    if own.method == "fa":
        require_linear(model)
    dtype = working_dtype(model)
    if own.error_rank is not None:
        projection = error_projection(train.outputs, own.error_rank, own.seed)
        signal = replace(signal, projection=projection.to(trainer.device, dtype))
    last = model.stages[-1]
    if isinstance(last, Linear) and last.activation != "identity":
        raise InputError(
            f"the last stage has the activation {last.activation!r}; it must be 'identity', for the loss has its own "
            "sigmoid (bce) or softmax (cross-entropy)"
        )
    augment = None if own.augment == "none" else Augmentation(own.augment, train.shape, own.seed)
    example = train.fetch(torch.zeros(1, dtype=torch.int64, device=train.device), dtype)
    with autocast(trainer.device, trainer.compute_dtype):
        seed = own.seed if signal is not None and signal.through_feedback else None
        try:
            model.prepare(example.to(trainer.device), train.outputs, seed, train.positions, own.error_rank)
        except InputError as error:
            like_ids = train.preprocessing.kind == TENSORS and train.task == "regression" and train.outputs == 1
            like_ids = like_ids and bool((train.targets == train.targets.round()).all())
            hint = "; float targets are numbers to predict: give class ids as integers (int64)" * like_ids
            raise InputError(f"{error}{hint}") from None
    choice = own.choose(work_of(model, own.batch_size * train.positions))
    if signal is not None and signal.local:
        add_readings(model, own, train.outputs, train.positions)
        check_narrow(model, own, loss, train.outputs, train.positions)
    errors = errors_of(own, train, dtype)
    plan = Plan(train, test, epochs, eval_every, loss, signal, errors, augment, steps, lr_at, choice)
    if launch_fault(trainer, plan) is not None:
        return plan
    return replace(plan, choice=replace(choice, why=f"{choice.why}; hundreds of steps in one launch"), launched=True)


def launch_fault(trainer: Any, plan: Plan) -> str | None:
    """Why an epoch's steps are not done in few launches; None where they are. Raises InputError where they were to be."""
    own, device = trainer.settings, trainer.device
    if own.epoch_launch == "off" or (own.epoch_launch == "auto" and (device.type != "cuda" or trainer.cuda_graph != "auto")):
        return "it was not asked for"
    alone = trainer.seat.workers == 1 and trainer.replicas is None
    if plan.choice.backend != "triton" or own.precision != "float32" or own.moments != "float32":
        why = "backend triton and precision and moments float32 are needed"
    elif own.clip_norm is not None:
        why = "a limited norm has to be known before an update"
    elif not alone or own.windows is not None or own.sampling != "uniform" or plan.augment is not None:
        why = "every sample must be visited once an epoch, as it is, by one worker"
    elif plan.train.device != device or (plan.errors is not None and is_folder(plan.errors[0])):
        why = "samples must be on the device, and errors in memory"
    else:
        why = refusal(trainer.model, plan.signal, plan.loss, own.rule, own.batch_size, device)
    if why is not None and own.epoch_launch == "on":
        raise InputError(f"epoch launch 'on' cannot be: {why}; use 'auto'")
    return why


def errors_of(settings: Settings, train: Dataset, dtype: torch.dtype) -> Kept | None:
    """What is kept of errors of that type: a row for each position of a sample. None where the method needs none. Raises
    InputError for an error dtype that does not fit."""
    if not settings.keeps_errors:
        return None
    classes, seed = settings.error_rank is None and train.task != "regression", derived_seed(settings.seed, "sampled errors")
    codec = make_codec(settings.error_dtype, settings.error_rank or train.outputs, dtype, classes, seed)
    codec = codec if train.positions == 1 else ByPosition(codec, train.positions)
    samples = len(train) if settings.windows is None else settings.windows.rows(len(train))
    return pick_home(settings.error_store, samples * codec.row_bytes, settings.resolved_device), samples, codec


def work_of(model: Sequential, rows: int) -> list[Work]:
    """The operations of a step on `rows` of a network whose stages are all Linear, by which a backend is chosen; none for
    others."""
    layers = [(stage.in_features, stage.out_features) for stage in model.stages if isinstance(stage, Linear)]
    if len(layers) < len(model):
        return []
    hidden, last = layers[:-1], layers[-1]
    return [*(Work("step", rows, *sizes) for sizes in hidden), Work("forward", rows, *last), Work("update", rows, *last)]


def add_readings(model: Sequential, settings: Settings, outputs: int, positions: int) -> None:
    """Give a prepared model the heads, or the shared reading, that local errors need. Raises InputError where it cannot have
    them.

    A model that has them already keeps them.
    """
    hidden, depth = list(model.stages[:-1]), settings.local_head_depth
    if any(isinstance(stage, Layers) for stage in hidden):
        raise InputError("granularity 'layer' does not go with local errors, which need a block's exact gradient; use 'block'")
    if model.heads is not None or model.reading or not hidden:
        return
    kind = settings.local_head
    if kind == "auto":
        kind = "shared" if positions > 1 and settings.local_feedback == "head" else "own"
    if kind == "shared":
        model.read_by(depth + 1)
        return
    law = next(stage.feedback_law for stage in hidden) if settings.local_feedback == "random" else None
    model.add_heads([list(stage.output_shape) for stage in hidden], outputs, positions, depth, law, settings.seed)


def check_narrow(model: Sequential, settings: Settings, loss: str, outputs: int, positions: int) -> None:
    """Raise InputError where readings cannot look at a part of the positions or classes only."""
    share, candidates = settings.local_positions, settings.local_candidates
    if share < 1 and positions == 1:
        raise InputError(f"local positions {share:g} needs a model that predicts something at each token; leave it out")
    if share < 1 and model.heads is not None and settings.local_head_depth:
        raise InputError(f"local positions {share:g} does not go with own heads behind stages; use local head 'shared'")
    if candidates is None:
        return
    if loss != "cross-entropy" or not model.reading or candidates >= outputs:
        raise InputError(
            f"local candidates {candidates} needs shared heads, the loss cross-entropy, and more classes than that; got "
            f"{'shared' if model.reading else 'own'} heads, {loss}, {outputs} classes"
        )
