"""Trainer: settings in, a trained model and its history out."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..base.choices import plain
from ..base.data import Data, Visit
from ..base.exceptions import InputError
from ..base.precision import matmul_precision, working_dtype
from ..data import Dataset, StreamDataset
from ..data.arrays import Arrays, as_dataset
from ..data.identity import identity
from ..distributed.devices import join_devices
from ..distributed.mesh import agree, join
from ..distributed.ring import Alone
from ..distributed.split import parts_of
from ..error_store import ErrorStore, Rows, is_folder, make_store
from ..kernels.rules import Rule
from ..learn.local import Local
from ..learn.loss import error_sizes, losses_by_sample
from ..learn.narrow import Narrow
from ..learn.peers import make_learner
from ..learn.signal import resolve_loss
from ..learn.step import Learner, Output
from ..network.sequential import Sequential
from ..network.updater import Arithmetic
from ..visits.epochs import EpochOrder
from ..visits.order import Order, planned
from ..visits.sampled import SampledOrder
from ..visits.streams import StreamOrder, StreamWindows
from ..visits.windows import WindowOrder
from .checkpoint import Checkpoints, Snapshot
from .gathered import Gathered
from .identity import settings_of
from .lock import FolderLock
from .plan import Kept, Plan, errors_of, make_plan, work_of
from .records import Record, test_record, train_record
from .result import FitResult
from .settings import Settings, takes_settings
from .state import Errors, Generators, Keeper, Moments, Network, Part, Sampling, Stream
from .tally import Diverged, Tally, evaluate, slots
from .workers import arrange, describe, help_along, lead, replicas_of


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
        self.loss, self.lr_schedule, self.seed, self.precision = own.loss, own.lr_schedule, own.seed, own.precision
        self.batch_size, self.eval_batch_size, self.error_rank = own.batch_size, own.eval_batch_size, own.error_rank
        self.seat = join(own.pipeline, own.data_parallel)  # a GPU of its own is chosen here
        self.device, self.compute_dtype = own.resolved_device, own.types.products
        self.device_links = join_devices(self.seat, self.device, own.pipeline_link)
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
        torch, which are read once, before training. Every `eval_every` epochs (and after the last) a record is made, and given
        to `on_record`. `batches(epoch)` (epochs from 0) replaces the seeded order with sample indices of your own, int64
        `[batch]` each. `on_step(samples)` is called after every step.

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
        if self.method == "bp" or not work_of(self.model, 1):
            # Autograd imports at its first gradient, 0.3 s that are none of learning.
            x = torch.zeros(1, requires_grad=True)
            torch.autograd.grad(x * 1, x, torch.zeros(1))
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
        learnt = {"network": Network(self.model), "moments": Moments(self.learner, *others)}
        parts: dict[str, Part] = {**learnt, "progress": self.result}
        parts |= {} if store is None else {"errors": Errors(store)}
        parts |= {} if stream is None else {"stream": Stream(stream)}
        parts |= {"sampling": Sampling(order), "tally": tally, "random": Generators(device)}
        known = order.steps_per_epoch if batches is None else None
        keeper = Keeper(parts, settings, self.result, store, checkpoints, flow, known, self.replicas)
        cleanup.callback(keeper.abandon)
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
        own, local = self.settings, None
        if plan.signal is not None and plan.signal.local:
            narrow = Narrow(own.local_positions, own.local_candidates, self.seed)
            local = Local(plan.loss, self.model, own.reach, narrow)
        part = None if self.seat.workers == 1 else parts_of(plan.split)[worker]
        taught = plan.loss, self.arithmetic(), plan.signal, own.hidden_scale
        learner = make_learner(self.method, self.model, data, *taught, store, local, part, self.replicas)
        learner.augment = plan.augment
        if part is not None and self.cuda_graph == "on":  # auto: not before that has run on several GPUs
            learner.use_part_graph(self.batch_size)
        return learner

    def arithmetic(self) -> Arithmetic:
        """How its updates are computed."""
        own, where = self.settings, (self.choice.operations, self.device)
        return Arithmetic(self.rule, *where, self.compute_dtype, self.seed, own.moments, own.clip_norm)

    def _visits(self, order: Order, epoch: int, skip: int, plan: Plan, steps: int, flow: Alone) -> Iterator[Visit]:
        """An epoch's visits after the first `skip`, after so many `steps` of the run; the error store may look ahead in a part
        of the order."""
        store, numbers = self.learner.store, itertools.count(steps)
        plans = store is not None and store.reads_ahead and self.seat.workers == 1
        for part in order.parts(epoch, skip, flow.drain):
            visits = (Visit(*visit[:-1], number) for visit, number in zip(part, numbers, strict=False))
            yield from planned(visits, store.plan, plan.train.device) if plans else visits

    def check(self, train: Dataset | Arrays, test: Dataset | Arrays | None, epochs: int, eval_every: int = 1) -> Plan:
        """Raise InputError where anything does not fit, draw the feedback, and say what `fit` will do with the same
        arguments."""
        if test is None and self.settings.patience is not None:
            raise InputError(f"patience {self.settings.patience} needs test data to look at; give some, or leave it out")
        train = as_dataset(train)  # of arrays anew each time: they may have changed in place
        test = None if test is None else as_dataset(test, train)
        epochs, eval_every = plain(epochs), plain(eval_every)
        asked = train, test, epochs, eval_every
        if self._plan is None or any(a is not b for a, b in zip(self._planned, asked, strict=True)):
            train, test = self.place(train), None if test is None else self.place(test)
            plan = make_plan(self, train, test, epochs, eval_every)
            self.choice = plan.choice
            self._plan, self._planned = replace(plan, split=arrange(self, plan)), asked
        return self._plan

    def store_for(self, train: Dataset) -> Kept | None:
        """(home, samples, codec) of the error store that `fit` will make; None where the method needs none."""
        return errors_of(self.settings, train, working_dtype(self.model))

    def _make_store(self, plan: Plan, data: Data, generations: int, resume: bool) -> ErrorStore | None:
        if plan.errors is None:
            return None
        home, samples, codec = plan.errors

        def targets(index: Tensor) -> Tensor:
            hot = data.one_hot(index.to(data.device), codec.dtype).to(self.device)
            return plan.signal.kept(hot, hot)

        rows = Rows(samples, codec, self.device, targets, identity(plan.train) if is_folder(home) else None)
        return make_store(home, rows, generations, resume)

    def __getstate__(self) -> dict[str, object]:
        """What a copy or a pickle has: all but what `fit` makes anew, which holds modules of Python."""
        return vars(self) | {"choice": None, "learner": None, "_plan": None, "_planned": ()}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.choice = self.settings.choose()

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
        return [] if self._plan is None else describe(self, self._plan)

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
