"""Trainer: settings in, a trained model and its history out."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..base.data import Data, Visit
from ..base.exceptions import InputError
from ..base.precision import autocast, matmul_precision, working_dtype
from ..base.seeds import derived_seed
from ..data import Dataset, StreamDataset
from ..data.arrays import Arrays, as_dataset
from ..data.augment import Augmentation
from ..data.identity import identity
from ..distributed.mesh import agree, join
from ..distributed.ring import Alone
from ..distributed.split import parts_of
from ..error_store import Codec, ErrorStore, Rows, is_folder, make_codec, make_store, pick_home
from ..error_store.codecs import ByPosition
from ..kernels.rules import Rule
from ..kernels.times import Work
from ..learn.epoch import refusal
from ..learn.local import Local
from ..learn.loss import error_sizes, losses_by_sample
from ..learn.narrow import Narrow
from ..learn.peers import make_learner, require_linear
from ..learn.signal import Signal, resolve_loss
from ..learn.step import Learner, Output
from ..network.feedback import error_projection
from ..network.layers import Layers
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..network.updater import Arithmetic
from ..visits.epochs import EpochOrder
from ..visits.order import Order, planned
from ..visits.sampled import SampledOrder
from ..visits.streams import StreamOrder, StreamWindows, check_stream
from ..visits.windows import WindowOrder, check_epochs, steps_per_epoch
from .checkpoint import Checkpoints, Snapshot
from .gathered import Gathered
from .identity import settings_of
from .lock import FolderLock
from .records import Record, test_record, train_record
from .result import FitResult
from .schedule import make_schedule
from .settings import Settings, takes_settings
from .state import Errors, Generators, Keeper, Moments, Network, Part, Sampling, Stream
from .tally import Diverged, Tally, evaluate, slots
from .workers import arrange, help_along, lead, replicas_of, reuse_lines, rows_are_alike


@dataclass(frozen=True)
class Plan:
    """What `fit` will do, after everything was checked: data on its device, the loss, the signal with its projection, and
    `errors`: (home, samples, codec) of the error store, None where the method needs none."""

    train: Dataset
    test: Dataset | None
    epochs: int
    eval_every: int
    loss: str
    signal: Signal | None
    errors: tuple[str, int, Codec] | None
    augment: Augmentation | None
    steps_per_epoch: int
    lr_at: Callable[[int], float]  # by steps, counted from 1
    split: list[int] | None = None  # how many stages each worker of a pipeline has
    launched: bool = False  # whether many steps are one launch


@takes_settings
class Trainer:
    """Trains a `Sequential` of stages, by F3 or one of its peers.

    Every setting is a keyword, or a field of `settings`, which keywords change; `loss` and `optimizer` (a word, or a rule such
    as `Adam(lr=5e-4)`) are positional too. Raises InputError for settings that are unknown or do not fit one another.

    The settings:
    """

    def __init__(
        self,
        model: Sequential,
        loss: str | None = None,
        optimizer: str | Rule | None = None,
        *,
        settings: Settings | None = None,
        **changes: object,
    ) -> None:
        if not isinstance(model, Sequential):
            raise InputError(f"a Trainer needs an f3triton Sequential (or a model made of one), got a {type(model).__name__}")
        changes |= {name: value for name, value in (("loss", loss), ("optimizer", optimizer)) if value is not None}
        self.settings = own = Settings(**changes) if settings is None else replace(settings, **changes)
        self.method, self.signal, self.windows, self.rule = own.method, own.resolved_signal, own.windows, own.rule
        self.loss, self.hidden_scale, self.seed, self.precision = own.loss, own.hidden_scale, own.seed, own.precision
        self.lr_schedule, self.warmup_steps = own.lr_schedule, own.warmup_steps
        self.batch_size, self.eval_batch_size = own.batch_size, own.eval_batch_size
        self.error_store, self.error_dtype, self.error_rank = own.error_store, own.error_dtype, own.error_rank
        self.seat = join(own.pipeline, own.data_parallel)  # a GPU of its own is chosen here
        self.device, self.compute_dtype = own.resolved_device, own.types.products
        self.choice = own.choose()  # of the backend; again when the layers' sizes are known
        self.cuda_graph = own.cuda_graph if self.device.type == "cuda" else "off"
        self.model = model.to(self.device)
        if own.precision == "float64":
            model.double()
        elif own.precision == "bfloat16-weights":
            for parameter in model.parameters():
                parameter.data = parameter.data.to(own.types.parameters)  # buffers, such as running statistics, stay float32
        self.replicas = replicas_of(self.seat, own)
        self.learner: Learner | None = None
        self.stage_milliseconds: list[float] = []  # by which a pipeline was divided
        self.result = FitResult()
        self._plan: Plan | None = None
        self._planned: tuple[object, ...] = ()  # the arguments of that plan

    def fit(
        self,
        train: Dataset | Arrays,
        epochs: int,
        test: Dataset | Arrays | None = None,
        *,
        eval_every: int = 1,
        batches: Callable[[int], Iterable[Tensor]] | None = None,
        on_record: Callable[[Record], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        checkpoints: Checkpoints | None = None,
        resume: Snapshot | None = None,
    ) -> FitResult:
        """Train for `epochs` visits of every sample; moments and errors start afresh.

        `train` and `test` are data sets, pairs of tensors or arrays `(inputs [N, ...], targets)`, or map-style data sets of
        torch, which are read once, before training. Every `eval_every` epochs (and
        after the last) a record is made, and given to `on_record`. `batches(epoch)` (epochs from 0) replaces the seeded
        order with sample indices of your own, int64 `[batch]` each. `on_step(samples)` is called after every step.

        With `checkpoints` the whole run is written down now and then, and `resume` goes on from one of them
        (`checkpoint.newest`): the result is that of a run that was never interrupted, bit for bit, on the same machine and
        backend. Records made before are in `history` and are not given to `on_record` again.

        The training figures in a record are the mean over the epoch's batches, each taken before its own update.
        Ctrl-C ends the run after a last evaluation, and where there are checkpoints a last one. Raises InputError where the
        data does not fit the model, Diverged where the loss is not finite.
        """
        plan = self.check(train, test, epochs, eval_every)
        self.result = result = FitResult()
        whole = checkpoints is not None or resume is not None  # the data must be the same to the last row then
        settings = settings_of(self, identity(plan.train, whole), plan.epochs, plan.eval_every)
        agree(self.seat, {"the checkpoint to go on from": None if resume is None else resume.state.get("steps")})
        if self.seat.worker > 0:
            help_along(self, plan, settings, resume)
            return result
        with contextlib.ExitStack() as cleanup:
            flow, order, keeper, tally = self._begin(plan, settings, batches, checkpoints, resume, cleanup)
            steps, behind = result.steps, tally.batches  # of an epoch that was begun before

            def done(index: Tensor, output: Output, batches: int = 1) -> None:
                result.steps += batches
                tally.add(output, result.steps, batches)
                order.note(index, partial(sizes_of, output, plan))
                if on_step is not None:
                    for _ in range(batches):
                        on_step(index.size(0))

            try:
                for epoch in range(result.epochs, epochs):
                    if self.settings.patience is not None and result.stale >= self.settings.patience:
                        break
                    figures: Record = {}
                    with result.learning(), matmul_precision(self.precision):
                        for visit in self._visits(order, epoch, behind, plan, steps, flow):
                            steps += 1
                            flow.visit(visit, plan.lr_at(steps), partial(done, visit.index))
                            keeper.after_step(steps)
                        behind = 0
                        if self.learner.store is not None and self.learner.store.reads_ahead:
                            flow.drain()  # what an epoch has written to a file is read when all of it is there
                        flow.then(partial(self._end_epoch, epoch, plan, tally, keeper, figures))
                        recorded = (epoch + 1) % eval_every == 0 or epoch + 1 == epochs
                        if recorded:
                            flow.drain()
                    if recorded:
                        self._record(plan, epoch + 1, figures, on_record, flow)
                    keeper.after_epoch(epoch + 1)
                flow.drain()
                result.status = "completed"
            except KeyboardInterrupt:
                if keeper.pressed > 1 and flow.elsewhere:
                    raise
                flow.drain()
                result.status = "interrupted"
                if result.steps > (result.history[-1]["step"] if result.history else 0):
                    self._record(plan, round(result.steps / plan.steps_per_epoch, 3), {}, on_record, flow)
            flow.whole()
        return result

    def _begin(
        self,
        plan: Plan,
        settings: dict[str, object],
        batches: Callable[[int], Iterable[Tensor]] | None,
        checkpoints: Checkpoints | None,
        resume: Snapshot | None,
        cleanup: contextlib.ExitStack,
    ) -> tuple[Alone, Order, Keeper, Tally]:
        """Make the learner and everything around it, as at the start of the run or where `resume` left it."""
        train, device = plan.train, self.device
        if checkpoints is not None:
            cleanup.callback(FolderLock(checkpoints.folder).release)
        if self.windows is not None and batches is not None:
            raise InputError("batches of your own and windows cannot go together; leave one out")
        if self.settings.sampling != "uniform" and batches is not None:
            raise InputError("batches of your own and sampling 'error' cannot go together; leave one out")
        if self.settings.epoch_launch == "on" and batches is not None:
            raise InputError("batches of your own and epoch launch 'on' cannot go together; leave one out")
        self.model.train()
        stream = None
        if isinstance(train, StreamDataset):
            stream = StreamWindows(train, self.windows, self.seed, device, plan.epochs // self.windows.visits)
            cleanup.callback(stream.close)
        data = train if stream is None else stream
        store = self._make_store(plan, data, 2 if checkpoints is None else 3, resume is not None)
        if store is not None:
            cleanup.callback(store.close)
        self.learner = self.learner_of(plan, 0, data, store)
        launched = plan.launched and batches is None
        if self.cuda_graph != "off" and self.seat.workers == 1 and not launched:
            graphed = self.learner.use_graph(self.batch_size, slots(self.batch_size, train.outputs))
            if self.cuda_graph == "on" and not graphed:
                raise InputError(
                    "cuda graph 'on' needs stages that are all Linear, data that fits on the device, and a method other than "
                    "'bp'; use 'auto'"
                )
        flow, others, leave = lead(self, plan)
        if launched:
            flow = Gathered(self.learner, self.model, self.batch_size)
        on_host = flow.elsewhere or (store is not None and store.reads_ahead)
        where = torch.device("cpu") if on_host else train.device  # are the sample indices
        order = self.order_of(plan, where, batches)
        tally = Tally(plan.loss, train.outputs, device)
        parts: dict[str, Part] = {
            "network": Network(self.model),
            "moments": Moments(self.learner, *others),
            "progress": self.result,
        }
        parts |= {} if store is None else {"errors": Errors(store)}
        parts |= {} if stream is None else {"stream": Stream(stream)}
        parts |= {"sampling": Sampling(order), "tally": tally, "random": Generators(device)}
        known = order.steps_per_epoch if batches is None else None
        keeper = Keeper(parts, settings, self.result, store, checkpoints, flow, known, self.replicas)
        cleanup.enter_context(keeper.interrupts_between_steps())
        cleanup.push(leave)
        if resume is not None:
            keeper.restore(resume)
        return flow, order, keeper, tally

    def order_of(self, plan: Plan, where: torch.device, batches: Callable[[int], Iterable[Tensor]] | None = None) -> Order:
        """The order of the run's visits, their tensors on the device `where`."""
        count = len(plan.train)
        if self.settings.sampling == "error":
            return SampledOrder(count, self.batch_size, self.seed, where, self.device)
        if self.windows is None:
            return EpochOrder(count, self.batch_size, self.seed, where, batches)
        kind = StreamOrder if isinstance(plan.train, StreamDataset) else WindowOrder
        return kind(count, self.batch_size, self.windows, self.seed, plan.errors is not None, where)

    def learner_of(self, plan: Plan, worker: int, data: Data | None = None, store: ErrorStore | None = None) -> Learner:
        """What learns at a worker: a part of the network where there are several, else all of it."""
        local = None
        if plan.signal is not None and plan.signal.local:
            own = self.settings
            narrow = Narrow(own.local_positions, own.local_candidates, self.seed)
            local = Local(plan.loss, self.model, own.reach, narrow)
        part = None if self.seat.workers == 1 else parts_of(plan.split)[worker]
        how = self.arithmetic()
        scale = self.hidden_scale
        learner = make_learner(
            self.method, self.model, data, plan.loss, how, plan.signal, scale, store, local, part, self.replicas
        )
        learner.augment = plan.augment
        return learner

    def arithmetic(self) -> Arithmetic:
        """How its updates are computed."""
        own = self.settings
        narrow = own.moments, own.clip_norm
        return Arithmetic(self.rule, self.choice.operations, self.device, self.compute_dtype, self.seed, *narrow)

    def _visits(self, order: Order, epoch: int, skip: int, plan: Plan, steps: int, flow: Alone) -> Iterator[Visit]:
        """An epoch's visits after the first `skip`, after so many `steps` of the run; the error store may look ahead in a part
        of the order."""
        store, numbers = self.learner.store, itertools.count(steps)
        plans = store is not None and store.reads_ahead and self.seat.workers == 1
        for part in order.parts(epoch, skip, flow.drain):
            visits = (Visit(*visit[:-1], number) for visit, number in zip(part, numbers, strict=False))
            yield from planned(visits, store.plan, plan.train.device) if plans else visits

    def check(
        self,
        train: Dataset | Arrays,
        test: Dataset | Arrays | None,
        epochs: int,
        eval_every: int = 1,
    ) -> Plan:
        """Raise InputError where anything does not fit, draw the feedback, and say what `fit` will do with the same
        arguments."""
        if test is None and self.settings.patience is not None:
            raise InputError(f"patience {self.settings.patience} needs test data to look at; give some, or leave it out")
        train = as_dataset(train)  # of arrays anew each time: they may have changed in place
        test = None if test is None else as_dataset(test, train)
        asked = train, test, epochs, eval_every
        if self._plan is not None and all(a is b for a, b in zip(self._planned, asked, strict=True)):
            return self._plan
        train, test = self.place(train), self.place(test)
        check_epochs(epochs, self.windows)
        if not isinstance(eval_every, int) or eval_every < 1:
            raise InputError(f"eval every must be a whole number of at least 1, got {eval_every!r}")
        if test is not None and (test.task, test.outputs) != (train.task, train.outputs):
            raise InputError(
                f"the test set is {test.task} with {test.outputs} outputs, the training set {train.task} with {train.outputs}"
            )
        if isinstance(train, StreamDataset):
            check_stream(train, self.windows)
        loss = resolve_loss(self.loss, train.task)
        epoch_steps = steps_per_epoch(len(train), self.batch_size, self.windows)
        lr_at = make_schedule(self.lr_schedule, self.rule.lr, epochs * epoch_steps, self.warmup_steps)
        signal = self.signal
        if signal is not None and signal.mask and train.task == "regression":
            raise InputError("mask target needs one-hot targets, but the task is regression; leave the mask off")
        if self.method == "fa":
            require_linear(self.model)
        dtype = working_dtype(self.model)
        if self.error_rank is not None:
            projection = error_projection(train.outputs, self.error_rank, self.seed)
            signal = replace(signal, projection=projection.to(self.device, dtype))
        last = self.model.stages[-1]
        if isinstance(last, Linear) and last.activation != "identity":
            raise InputError(
                f"the last stage has the activation {last.activation!r}; it must be 'identity', for the loss has its own "
                "sigmoid (bce) or softmax (cross-entropy)"
            )
        kind = self.settings.augment
        augment = None if kind == "none" else Augmentation(kind, train.shape, self.seed)
        example = train.fetch(torch.zeros(1, dtype=torch.int64, device=train.device), dtype)
        with autocast(self.device, self.compute_dtype):
            seed = self.seed if signal is not None and signal.through_feedback else None
            self.model.prepare(example.to(self.device), train.outputs, seed, train.positions, self.error_rank)
        self.choice = self.settings.choose(work_of(self.model, self.batch_size * train.positions))
        if signal is not None and signal.local:
            add_readings(self.model, self.settings, train.outputs, train.positions)
            check_narrow(self.model, self.settings, loss, train.outputs, train.positions)
        plan = Plan(train, test, epochs, eval_every, loss, signal, self.store_for(train), augment, epoch_steps, lr_at)
        launched = self.launch_fault(plan) is None
        if launched:
            self.choice = replace(self.choice, why=f"{self.choice.why}; hundreds of steps in one launch")
        self._plan, self._planned = replace(plan, split=arrange(self, plan), launched=launched), asked
        return self._plan

    def launch_fault(self, plan: Plan) -> str | None:
        """Why an epoch's steps are not done in few launches; None where they are. Raises InputError where they were to be."""
        own, device = self.settings, self.device
        if own.epoch_launch == "off" or (own.epoch_launch == "auto" and (device.type != "cuda" or self.cuda_graph != "auto")):
            return "it was not asked for"
        alone = self.seat.workers == 1 and self.replicas is None
        if self.choice.backend != "triton" or own.precision != "float32" or own.moments != "float32":
            why = "backend triton and precision and moments float32 are needed"
        elif own.clip_norm is not None:
            why = "a limited norm has to be known before an update"
        elif not alone or self.windows is not None or own.sampling != "uniform" or plan.augment is not None:
            why = "every sample must be visited once an epoch, as it is, by one worker"
        elif plan.train.device != device or (plan.errors is not None and is_folder(plan.errors[0])):
            why = "samples must be on the device, and errors in memory"
        else:
            why = refusal(self.model, plan.signal, plan.loss, self.rule, self.batch_size, device)
        if why is not None and own.epoch_launch == "on":
            raise InputError(f"epoch launch 'on' cannot be: {why}; use 'auto'")
        return why

    def store_for(self, train: Dataset) -> tuple[str, int, Codec] | None:
        """(home, samples, codec) of the error store that `fit` will make; None where the method needs none."""
        if self.signal is None or not self.signal.delayed:
            return None
        codec = error_codec(self.error_dtype, train, working_dtype(self.model), self.error_rank, self.seed)
        samples = len(train) if self.windows is None else self.windows.rows(len(train))
        return pick_home(self.error_store, samples * codec.row_bytes, self.device), samples, codec

    def _make_store(self, plan: Plan, data: Data, generations: int, resume: bool) -> ErrorStore | None:
        if plan.errors is None:
            return None
        home, samples, codec = plan.errors

        def targets(index: Tensor) -> Tensor:
            hot = data.one_hot(index.to(data.device), codec.dtype).to(self.device)
            return plan.signal.kept(hot, hot)

        rows = Rows(samples, codec, self.device, targets, identity(plan.train) if is_folder(home) else None)
        return make_store(home, rows, generations, resume)

    def __repr__(self) -> str:
        numbers = sum(parameter.numel() for parameter in self.model.parameters())
        network = f"{type(self.model).__name__} of {len(self.model)} stages, {numbers:,} parameters"
        return f"Trainer({network}; {self.describe()}; {self.result})"

    def describe(self) -> str:
        """The settings that matter most, in one line."""
        rule = type(self.rule).__name__
        signal = "" if self.signal is None else f", signal {self.signal.source}{' masked by the target' * self.signal.mask}"
        signal += "" if self.windows is None else f", {self.windows}"
        return f"method {self.method}{signal}, {rule} lr {self.rule.lr:g} {self.lr_schedule}, device {self.device}"

    def describe_workers(self) -> list[str]:
        """What each of several workers does, after `check`: a line for a pipeline, and one for replicas."""
        plan, lines = self._plan, []
        if plan is not None and plan.split is not None:
            kind = "threads" if self.seat.threads else "processes"
            each = ", ".join(f"{cost:g}" for cost in self.stage_milliseconds)
            why = f"; by the milliseconds of a batch in each stage: {each}" if each else ""
            lines.append(f"pipeline of {self.seat.workers} {kind}: {', '.join(map(str, plan.split))} stages{why}")
            lines += reuse_lines(self, plan)
        if self.replicas is not None and self.method != "bp":
            alike = rows_are_alike(self, plan)
            lines.append(self.replicas.describe(self.model, self.batch_size * plan.train.positions, alike))
        return lines

    def evaluate(self, data: Dataset | Arrays) -> Record:
        """`test_loss`, and `test_error` (percent wrong) for classes or `test_mse` for values, in eval mode.

        `test_mse` is in units of the training targets' variance, `test_mse_in_units` in the targets' own, by name.
        """
        data = self.place(as_dataset(data, None if self._plan is None else self._plan.train))
        return self._test_figures(data, resolve_loss(self.loss, data.task), 0)

    def _end_epoch(self, epoch: int, plan: Plan, tally: Tally, keeper: Keeper, found: Record) -> None:
        """After the last step of an epoch: what is `found` of it, for its record.

        The store is told at the end of a pass, and the samples that kept an older error because they had no visit are counted.
        """
        found |= train_record(plan.train, tally.figures(self.result.steps))
        self.result.epochs += 1
        store = self.learner.store
        if store is not None and (self.windows is None or not (self.windows.local or (epoch + 1) % self.windows.visits)):
            carried = store.commit()
            found |= {"carried_rows": carried} if carried else {}
        keeper.release()

    def _record(
        self, plan: Plan, epoch: float, figures: Record, on_record: Callable[[Record], None] | None, flow: Alone
    ) -> None:
        """Add an evaluation to the history; all steps are done."""
        steps = self.result.steps
        record = {"epoch": epoch, "step": steps, "lr": plan.lr_at(steps), **figures}
        if plan.test is not None:
            record |= self._test_figures(plan.test, plan.loss, steps, flow if flow.elsewhere else None)
        record["learning_seconds"] = round(self.result.learning_seconds, 3)
        self.result.history.append(record)
        if on_record is not None:
            flow.whole()
            on_record(record)

    def _test_figures(self, test: Dataset, loss: str, step: int, flow: Alone | None = None) -> Record:
        with matmul_precision(self.precision):
            figures = evaluate(self.model, test, loss, self.eval_batch_size, self.device, self.compute_dtype, flow)
        if not math.isfinite(figures.loss):
            raise Diverged(step, figures.loss)
        return test_record(test, figures)

    def place(self, data: Dataset | None) -> Dataset | None:
        """The data set on the trainer's device, or where it is, should it take more than half of the memory that is free."""
        if data is None or data.device == self.device:
            return data
        fits = self.device.type != "cuda" or 2 * data.nbytes < torch.cuda.mem_get_info(self.device)[0]
        return data.to(self.device) if fits else data


def sizes_of(output: Output, plan: Plan) -> Tensor:
    """How large the errors are that a batch's samples have left, `[M]`."""
    losses = output.sample_losses
    losses = losses_by_sample(output.a, output.target, plan.loss) if losses is None else losses
    return error_sizes(losses, plan.loss, plan.train.outputs, plan.train.positions)


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


def error_codec(error_dtype: str, data: Dataset, dtype: torch.dtype, rank: int | None = None, seed: int = 0) -> Codec:
    """How the errors of a sample are kept: a row for each of its positions. Raises InputError for a word that does not fit."""
    classes = rank is None and data.task != "regression"
    codec = make_codec(error_dtype, rank or data.outputs, dtype, classes, derived_seed(seed, "sampled errors"))
    return codec if data.positions == 1 else ByPosition(codec, data.positions)
