"""Trainer: settings in, a trained model and its history out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..base.choices import check_word
from ..base.data import Data
from ..base.device import pick_device
from ..base.exceptions import InputError
from ..base.precision import autocast, matmul_precision, resolve_precision, working_dtype
from ..base.seeds import check_seed, derived_seed, sample_order
from ..data import Dataset, StreamDataset
from ..data.identity import identity
from ..error_store import Codec, ErrorStore, Rows, is_folder, make_codec, make_store, pick_home
from ..error_store.codecs import ByPosition, check_error_dtype
from ..kernels.dispatch import backend as kernel_backend
from ..kernels.rules import Adam, Rule
from ..learn.peers import FeedbackAlignmentLearner, require_linear
from ..learn.signal import resolve_loss, resolve_signal
from ..learn.step import F3Learner, Learner, make_learner
from ..network.feedback import error_projection
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..network.updater import Updater, make_rule
from ..visits.streams import StreamOrder, StreamView, check_stream
from ..visits.windows import WindowOrder, WindowView, check_epochs, resolve_windows, steps_per_epoch
from .checkpoint import Checkpoints, Snapshot
from .records import Record, test_record, train_record
from .schedule import make_schedule
from .state import RunState
from .tally import Diverged, Progress, evaluate, run_epoch

SWITCH = ("auto", "on", "off")


@dataclass
class FitResult(Progress):
    """What `fit` did: epochs and steps done, one record an evaluation (`history`), and the seconds spent learning.

    `status` is `completed`, `interrupted` after Ctrl-C, or `running`.
    """

    history: list[Record] = field(default_factory=list)
    learning_seconds: float = 0.0
    status: str = "running"


class Trainer:
    """Trains a `Sequential` of stages, by F3 or one of its peers.

    - `loss`: auto, bce, cross-entropy, mse; `optimizer`: a word or a rule such as `Adam(lr=5e-4)`
    - `method`: f3, drtp, dfa, sdfa, fa (feedback alignment), bp, last-layer; `signal`, `link`, `mask_target`: see `Signal`
    - `hidden_scale`: a factor on the hidden layers' gradient, which is summed over the batch; `mean` divides by the batch
    - `lr_schedule`: constant, cosine, linear, after `warmup_steps`; cosine, the default, removes much of what a stale
      error costs, but the schedule needs to know the run's length: `fit` takes `epochs`
    - `batch_size`, `eval_batch_size`, `seed` (sample order and feedback), `device`, `backend`, `precision`
    - `window`, `visits`, `first_visit`: a number of samples (or auto, off) that are visited so many times in a row before the
      next ones, and what the first of these visits teaches the hidden layers; see `windows.Windows`
    - `error_store`: where the error of every sample's last visit is kept: auto (the first that fits), device, memory, or a
      folder that holds no store yet, such as `./errors`; `error_dtype`: how: auto (exactly), float32, float16, bfloat16,
      int8, ternary, top-K, sampled-K (see `errors.codecs`); `error_rank`: keep `e R` with a fixed random `R [C, error_rank]`,
      through which all feedback goes then (see `feedback.error_projection`)
    - `cuda_graph`: auto, on, off; by default every step of F3 and its kin on a CUDA device is one graph, where all stages
      are Linear and the data is on the device

    Raises InputError for settings that are unknown or do not fit one another.
    """

    def __init__(
        self,
        model: Sequential,
        loss: str = "auto",
        optimizer: str | Rule | None = None,
        *,
        method: str = "f3",
        signal: str | None = None,
        link: str = "auto",
        mask_target: bool = False,
        hidden_scale: float | str = 1.0,
        lr_schedule: str = "cosine",
        warmup_steps: int = 0,
        batch_size: int = 50,
        eval_batch_size: int = 1000,
        seed: int = 0,
        device: str | torch.device = "auto",
        backend: str = "auto",
        precision: str = "float32",
        window: int | str = "off",
        visits: int | None = None,
        first_visit: str | None = None,
        error_store: str | Path = "auto",
        error_dtype: str = "auto",
        error_rank: int | None = None,
        cuda_graph: str = "auto",
    ) -> None:
        if not isinstance(model, Sequential):
            raise InputError(f"a Trainer needs an f3triton Sequential (or a model made of one), got a {type(model).__name__}")
        for name, value in (("batch size", batch_size), ("eval batch size", eval_batch_size)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        check_seed(seed)
        if hidden_scale != "mean" and not (isinstance(hidden_scale, int | float) and math.isfinite(hidden_scale)):
            raise InputError(f"hidden scale must be a finite number or 'mean', got {hidden_scale!r}")
        self.method = method
        self.signal = resolve_signal(method, signal, link, mask_target)
        self.loss, self.hidden_scale = loss, hidden_scale
        resolve_loss(loss, "classification")  # an unknown word is an error now, not at fit
        self.rule = make_rule(optimizer or Adam(lr=5e-4))
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        make_schedule(lr_schedule, 1.0, warmup_steps, warmup_steps)
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        delayed = self.signal is not None and self.signal.delayed
        self.windows = resolve_windows(window, visits, first_visit, batch_size, delayed)
        for name, value in (("store", error_store), ("dtype", check_error_dtype(error_dtype))):
            if value != "auto" and not delayed:
                raise InputError(f"error {name} {value!r} has no effect where no error is kept between visits; leave it out")
        if error_rank is not None and (self.signal is None or self.signal.source == "none"):
            raise InputError(f"error rank {error_rank!r} has no effect with the method {method!r}; leave it out")
        self.error_store, self.error_dtype, self.error_rank = error_store, error_dtype, error_rank
        self.device = pick_device(device)
        self.precision = precision
        types = resolve_precision(precision, self.device, method)
        try:
            self.ops = kernel_backend(backend, self.device, precision)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.compute_dtype = types.products
        if check_word("cuda graph", cuda_graph, SWITCH) == "on" and self.device.type != "cuda":
            raise InputError(f"cuda graph 'on' needs a CUDA device, got {self.device.type!r}; use 'auto'")
        self.cuda_graph = cuda_graph if self.device.type == "cuda" else "off"
        self.model = model.to(self.device)
        if precision == "float64":
            model.double()
        elif precision == "bfloat16-weights":
            for parameter in model.parameters():
                parameter.data = parameter.data.to(types.parameters)  # buffers, such as running statistics, stay float32
        self.learner: Learner | None = None
        self.result = FitResult()

    def fit(
        self,
        train: Dataset | tuple[Tensor, Tensor],
        epochs: int,
        test: Dataset | tuple[Tensor, Tensor] | None = None,
        *,
        eval_every: int = 1,
        batches: Callable[[int], Iterable[Tensor]] | None = None,
        on_record: Callable[[Record], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        checkpoints: Checkpoints | None = None,
        resume: Snapshot | None = None,
    ) -> FitResult:
        """Train for `epochs` visits of every sample; moments and errors start afresh.

        `train` and `test` are data sets or pairs of tensors `(inputs [N, ...], targets)`. Every `eval_every` epochs (and
        after the last) a record is made, and given to `on_record`. `batches(epoch)` (epochs from 0) replaces the seeded
        order with sample indices of your own, int64 `[batch]` each. `on_step(samples)` is called after every step.

        With `checkpoints` the whole run is written down now and then, and `resume` goes on from one of them
        (`checkpoint.newest`): the result is that of a run that was never interrupted, bit for bit, on the same machine and
        backend. Records made before are in `history` and are not given to `on_record` again.

        The training figures in a record are the mean over the epoch's batches, each taken before its own update.
        Ctrl-C ends the run after a last evaluation, and where there are checkpoints a last one. Raises InputError where the
        data does not fit the model, Diverged where the loss is not finite.
        """
        train, test = self.place(_as_dataset(train)), self.place(_as_dataset(test))
        self.check(train, test, epochs, eval_every)
        loss = resolve_loss(self.loss, train.task)
        self.model.train()
        view = self._view(train, epochs)
        store = self._make_store(train, view or train, 2 if checkpoints is None else 3, resume is not None)
        rounding = derived_seed(self.seed, "rounding")
        if self.method == "fa":
            updater = Updater(self.rule, list(self.model.parameters()), self.ops, self.device, self.compute_dtype, rounding)
            self.learner = FeedbackAlignmentLearner(self.model, view or train, updater, loss, self.seed)
        else:
            self.learner = make_learner(
                self.model, view or train, self.rule, self.ops, self.device, loss, self.signal, self.hidden_scale,
                self.compute_dtype, rounding, store, self._projection(train),
            )  # fmt: skip
        if self.cuda_graph != "off":
            graphed = isinstance(self.learner, F3Learner) and self.learner.use_graph(self.batch_size)
            if self.cuda_graph == "on" and not graphed:
                raise InputError(
                    "cuda graph 'on' needs stages that are all Linear, data that fits on the device, and a method other than "
                    "'bp'; use 'auto'"
                )
        if self.windows is not None and batches is not None:
            raise InputError("batches of your own and windows cannot go together; leave one out")
        epoch_steps = steps_per_epoch(len(train), self.batch_size, self.windows)
        lr_at = make_schedule(self.lr_schedule, self.rule.lr, epochs * epoch_steps, self.warmup_steps)
        where = torch.device("cpu") if store is not None and store.reads_ahead else train.device  # are the sample indices
        if self.windows is None:
            ordered = batches or (lambda epoch: self._batches(train, epoch, where))
            choose = lambda epoch, skip: islice(ordered(epoch), skip, None)  # noqa: E731
        else:
            make_order = StreamOrder if isinstance(train, StreamDataset) else WindowOrder
            windowed = make_order(len(train), self.batch_size, self.windows, self.seed, where)
            choose = lambda epoch, skip: windowed.batches(epoch, self.learner, view, skip)  # noqa: E731
        self.result = result = FitResult()
        stream = view if isinstance(view, StreamView) else None
        run = RunState(self, identity(train), epochs, eval_every, checkpoints, stream)
        try:
            with run.interrupts_between_steps():
                begin, tally = (0, None) if resume is None else run.restore(resume)
                for epoch in range(begin, epochs):
                    began = time.perf_counter()
                    skip = 0 if tally is None else tally.batches
                    with matmul_precision(self.precision):
                        # The order of windows tells the learner when hidden layers learn. When always, it may run ahead.
                        if store is None or (self.windows is not None and self.windows.local):
                            order = (index.to(train.device) for index in choose(epoch, skip))
                        else:
                            order = store.plan(choose(epoch, skip), train.device)
                        after = run.after_step(epoch)
                        figures = run_epoch(self.learner, _count(order, on_step), lr_at, result, tally, after)
                        tally = None
                        carried = self._end_epoch(store, epoch)
                        run.release(store)
                    result.learning_seconds += time.perf_counter() - began
                    if (epoch + 1) % eval_every == 0 or epoch + 1 == epochs:
                        record = {"epoch": epoch + 1, "step": result.steps, "lr": lr_at(result.steps)}
                        self._record(record | train_record(train, figures) | carried, test, loss, on_record)
                    run.after_epoch(epoch)
            result.status = "completed"
        except KeyboardInterrupt:
            result.status = "interrupted"
            if result.steps > (result.history[-1]["step"] if result.history else 0):
                record = {"epoch": round(result.steps / epoch_steps, 3), "step": result.steps, "lr": lr_at(result.steps)}
                self._record(record, test, loss, on_record)
        finally:
            if store is not None:
                store.close()
            if stream is not None:
                stream.close()
        return result

    def check(
        self,
        train: Dataset | tuple[Tensor, Tensor],
        test: Dataset | tuple[Tensor, Tensor] | None,
        epochs: int,
        eval_every: int = 1,
    ) -> None:
        """What `fit` does before it trains: raise InputError where anything does not fit, and draw the feedback."""
        train, test = _as_dataset(train), _as_dataset(test)
        check_epochs(epochs, self.windows)
        if not isinstance(eval_every, int) or eval_every < 1:
            raise InputError(f"eval every must be a whole number of at least 1, got {eval_every!r}")
        if test is not None and (test.task, test.outputs) != (train.task, train.outputs):
            raise InputError(
                f"the test set is {test.task} with {test.outputs} outputs, the training set {train.task} with {train.outputs}"
            )
        if isinstance(train, StreamDataset):
            check_stream(train, self.windows)
        resolve_loss(self.loss, train.task)
        steps = epochs * steps_per_epoch(len(train), self.batch_size, self.windows)
        make_schedule(self.lr_schedule, self.rule.lr, steps, self.warmup_steps)
        if self.signal is not None and self.signal.mask and train.task == "regression":
            raise InputError("mask target needs one-hot targets, but the task is regression; leave the mask off")
        if self.method == "fa":
            require_linear(self.model)
        self._projection(train)  # a rank that does not fit is an error
        last = self.model.stages[-1]
        if isinstance(last, Linear) and last.activation != "identity":
            raise InputError(
                f"the last stage has the activation {last.activation!r}; it must be 'identity', for the loss has its own "
                "sigmoid (bce) or softmax (cross-entropy)"
            )
        dtype = working_dtype(self.model)
        example = train.fetch(torch.zeros(1, dtype=torch.int64, device=train.device), dtype)
        uses_feedback = self.signal is not None and self.signal.source != "none"
        with autocast(self.device, self.compute_dtype):
            seed = self.seed if uses_feedback else None
            self.model.prepare(example.to(self.device), train.outputs, seed, train.positions, self.error_rank)
        self.store_for(train)

    def store_for(self, train: Dataset) -> tuple[str, int, Codec] | None:
        """(home, samples, codec) of the error store that `fit` will make; None where the method needs none."""
        if self.signal is None or not self.signal.delayed:
            return None
        codec = error_codec(self.error_dtype, train, working_dtype(self.model), self.error_rank, self.seed)
        local = self.windows is not None and self.windows.local
        samples = min(self.windows.size, len(train)) if local else len(train)
        return pick_home(self.error_store, samples * codec.row_bytes, self.device), samples, codec

    def _make_store(self, train: Dataset, data: Data, generations: int, resume: bool) -> ErrorStore | None:
        chosen = self.store_for(train)
        if chosen is None:
            return None
        home, samples, codec = chosen

        projection = self._projection(train)

        def targets(index: Tensor) -> Tensor:
            hot = data.one_hot(index.to(data.device), codec.dtype).to(self.device)
            return hot if projection is None else hot @ projection

        rows = Rows(samples, codec, self.device, targets, identity(train) if is_folder(home) else None)
        return make_store(home, rows, generations, resume)

    def _projection(self, train: Dataset) -> Tensor | None:
        if self.error_rank is None:
            return None
        return error_projection(train.outputs, self.error_rank, self.seed).to(self.device, working_dtype(self.model))

    def describe(self) -> str:
        """The settings that matter most, in one line."""
        rule = type(self.rule).__name__
        signal = "" if self.signal is None else f", signal {self.signal.source}{' masked by the target' * self.signal.mask}"
        signal += "" if self.windows is None else f", {self.windows}"
        return f"method {self.method}{signal}, {rule} lr {self.rule.lr:g} {self.lr_schedule}, device {self.device}"

    def evaluate(self, data: Dataset | tuple[Tensor, Tensor]) -> Record:
        """`test_loss`, and `test_error` (percent wrong) for classes or `test_mse` for values, in eval mode.

        `test_mse` is in units of the training targets' variance, `test_mse_in_units` in the targets' own, by name.
        """
        data = self.place(_as_dataset(data))
        return self._test_figures(data, resolve_loss(self.loss, data.task), 0)

    def _end_epoch(self, store: ErrorStore | None, epoch: int) -> Record:
        """Tell the store, at the end of a pass, and count the samples that kept an older error because they had no visit."""
        if store is None or (self.windows is not None and (self.windows.local or (epoch + 1) % self.windows.visits)):
            return {}
        carried = store.commit()
        return {"carried_rows": carried} if carried else {}

    def _record(self, record: Record, test: Dataset | None, loss: str, on_record: Callable[[Record], None] | None) -> None:
        if test is not None:
            record |= self._test_figures(test, loss, record["step"])
        record["learning_seconds"] = round(self.result.learning_seconds, 3)
        self.result.history.append(record)
        if on_record is not None:
            on_record(record)

    def _test_figures(self, test: Dataset, loss: str, step: int) -> Record:
        with matmul_precision(self.precision):
            figures = evaluate(self.model, test, loss, self.eval_batch_size, self.device, self.compute_dtype)
        if not math.isfinite(figures.loss):
            raise Diverged(step, figures.loss)
        return test_record(test, figures)

    def _view(self, data: Dataset, epochs: int) -> WindowView | StreamView | None:
        """The data set by windows, where its error rows are kept for one window only, or where it is a stream."""
        if isinstance(data, StreamDataset):
            return StreamView(data, self.windows, self.seed, self.device, epochs // self.windows.visits)
        local = self.windows is not None and self.windows.local and self.signal is not None and self.signal.delayed
        return WindowView(data, min(self.windows.size, len(data))) if local else None

    def _batches(self, data: Dataset, epoch: int, device: torch.device) -> Iterable[Tensor]:
        return sample_order(len(data), self.seed, epoch).to(device).split(self.batch_size)

    def place(self, data: Dataset | None) -> Dataset | None:
        """The data set on the trainer's device, or where it is, should it take more than half of the memory that is free."""
        if data is None or data.device == self.device:
            return data
        fits = self.device.type != "cuda" or 2 * data.nbytes < torch.cuda.mem_get_info(self.device)[0]
        return data.to(self.device) if fits else data


def error_codec(error_dtype: str, data: Dataset, dtype: torch.dtype, rank: int | None = None, seed: int = 0) -> Codec:
    """How the errors of a sample are kept: a row for each of its positions. Raises InputError for a word that does not fit."""
    classes = rank is None and data.task != "regression"
    codec = make_codec(error_dtype, rank or data.outputs, dtype, classes, derived_seed(seed, "sampled errors"))
    return codec if data.positions == 1 else ByPosition(codec, data.positions)


def _as_dataset(data: Dataset | tuple[Tensor, Tensor] | None) -> Dataset | None:
    return data if data is None or isinstance(data, Dataset) else Dataset.from_tensors(*data)


def _count(batches: Iterable[Tensor], on_step: Callable[[int], None] | None) -> Iterable[Tensor]:
    for index in batches:
        yield index
        if on_step is not None:
            on_step(len(index))
