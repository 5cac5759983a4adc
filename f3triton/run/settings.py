"""Settings: everything that decides how a network is trained, written once.

A field of `Settings` is a keyword of `Trainer`, an option of `train.py` with its help, an entry in `config.json`, and one in
checkpoints. So a new setting is one new field, and the place that uses it. Nothing here imports torch before settings are made,
so that `train.py --help` is there at once: words are those of `base.words`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.choices import check_word, plain
from ..base.exceptions import InputError
from ..base.text import typed
from ..base.words import (
    AUGMENTATIONS,
    AUTO_BATCHES,
    BY,
    DEFAULT_VISITS,
    ERROR_DTYPES,
    FIRST_VISITS,
    METHODS,
    OPTIMIZERS,
    ORDERS,
    PIPELINE_LINKS,
    PRECISIONS,
    RATES,
    SAMPLINGS,
    SIGNALS,
)
from ..kernels.words import BACKENDS, LINKS, LOSSES, MOMENTS
from .schedule import SCHEDULES, make_schedule

if TYPE_CHECKING:
    import torch

    from ..base.precision import Precision
    from ..kernels.dispatch import Choice
    from ..kernels.rules import Rule
    from ..kernels.times import Work
    from ..learn.signal import Signal
    from ..visits.windows import Windows

RATES_SAID = f"{', '.join(f'{rate:g} for {method}' for method, rate in RATES.items())}; with sgd 0.01"
SWITCH = ("auto", "on", "off")
LOCAL_HEADS = ("auto", "own", "shared")
LOCAL_FEEDBACK = ("head", "random")


def number_or_word(text: str) -> float | str:
    """`0.5` as a number, `mean` as a word."""
    try:
        return float(text)
    except ValueError:
        return text


def count_or_word(text: str) -> int | str:
    """`500` as a whole number, `auto` as a word."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def about(
    group: str,
    *,
    help: str,
    choices: Iterable[str] | None = None,
    parse: Callable[[str], object] | None = None,
    metavar: str | None = None,
    within: str | None = None,
    free: bool = False,
) -> dict[str, object]:
    """What is known of a setting beside its default: its group and help in `train.py --help`, and

    - `choices`: the words that it takes; `parse`: its value from the command line, by default of the default's type
    - `within`: what it is a part of (signal, rule, windows, ...); `free`: whether a resumed run may have another value
    """
    choices = None if choices is None else tuple(choices)
    return {
        "group": group,
        "help": help,
        "choices": choices,
        "parse": parse,
        "metavar": metavar,
        "within": within,
        "free": free,
    }


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a network is trained. Every choice is a word, the same in Python, on the command line and in JSON.

    `rule`, `resolved_signal`, `windows`, `resolved_device` and `types` are what the words and numbers stand for.

    Raises InputError for settings that are unknown, out of range, or do not fit one another.
    """

    # fmt: off
    method: str = field(default="f3", metadata=about("method", choices=METHODS, help=
        "what layers learn by: f3; its peers drtp, dfa, sdfa, last-layer; local (errors of each stage's own); fa (feedback "
        "alignment) and bp, which go backward"))
    signal: str | None = field(default=None, metadata=about("method", choices=SIGNALS, within="signal", help=
        "what teaches the hidden layers; default: the method's own (f3: delayed-error)"))
    link: str = field(default="auto", metadata=about("method", choices=LINKS, within="signal", help=
        "function of the output, before the error is taken; auto: the loss's own"))
    mask_target: bool = field(default=False, metadata=about("method", within="signal", help=
        "multiply the error by the one-hot target"))
    error_rank: int | None = field(default=None, metadata=about("method", parse=int, metavar="R", help=
        "keep errors times a fixed random matrix of R columns, which all feedback then goes through"))
    hidden_scale: float | str = field(default=1.0, metadata=about("method", parse=number_or_word, metavar="S", help=
        "factor on the hidden layers' gradient, which is summed over the batch; mean: 1/batch"))

    local_head: str = field(default="auto", metadata=about("method", choices=LOCAL_HEADS, within="local", help=
        "what reads the hidden stages' outputs in the method local: a head of each one's own, or the network's last stages, "
        "shared; auto: shared for language models"))
    local_head_depth: int = field(default=0, metadata=about("method", metavar="N", within="local", help=
        "stages in front of the reading: copies of the next N stages, or with shared heads the network's own last N"))
    local_feedback: str = field(default="head", metadata=about("method", choices=LOCAL_FEEDBACK, within="local", help=
        "what brings a head's error to its stage: the head's weight, or a fixed random matrix by the law of --feedback"))
    local_positions: float = field(default=1.0, metadata=about("method", metavar="F", within="local", help=
        "share of the tokens at which hidden stages are read, drawn anew at each step"))
    local_candidates: int | None = field(default=None, metadata=about("method", parse=int, metavar="K", within="local", help=
        "classes, drawn anew at each step, among which hidden stages are read by shared heads, beside the target; "
        "default: all"))
    reach: int = field(default=1, metadata=about("method", metavar="R", within="local", help=
        "stages that the gradient of a stage's reading goes back through, in the method local"))

    loss: str = field(default="auto", metadata=about("training", choices=("auto", *LOSSES), help=
        "loss of the output; auto: bce for classification, mse for regression, cross-entropy for text"))
    optimizer: str | Rule = field(default="adam", metadata=about("training", choices=OPTIMIZERS, within="rule", help=
        "update rule"))
    lr: float | None = field(default=None, metadata=about("training", parse=float, metavar="RATE", within="rule", help=
        f"learning rate; default: {RATES_SAID}"))
    momentum: float | None = field(default=None, metadata=about("training", parse=float, metavar="M", within="rule", help=
        "momentum of sgd; default: 0"))
    nesterov: bool = field(default=False, metadata=about("training", within="rule", help=
        "use Nesterov's form of the momentum in sgd"))
    weight_decay: float | None = field(default=None, metadata=about("training", parse=float, metavar="D", within="rule", help=
        "weight decay of the update rule; default: 1e-2 for adamw, else 0"))
    moments: str = field(default="float32", metadata=about("training", choices=MOMENTS, within="moments", help=
        "type of what the update rule keeps of each weight: float32, bfloat16, or int8 with a scale for each 32 of a row; "
        "biases and other vectors keep float32"))
    clip_norm: float | None = field(default=None, metadata=about("training", parse=float, metavar="X", within="clip", help=
        "limit the norm of each layer's gradient to X, before the update rule; default: no limit"))
    lr_schedule: str = field(default="cosine", metadata=about("training", choices=SCHEDULES, help=
        "course of the learning rate after the warmup"))
    warmup_steps: int = field(default=0, metadata=about("training", metavar="N", help=
        "number of steps in which the learning rate rises from zero, linearly"))
    batch_size: int = field(default=50, metadata=about("training", metavar="N", help=
        "number of samples in a step"))
    eval_batch_size: int = field(default=1000, metadata=about("training", metavar="N", free=True, help=
        "number of predictions (samples, or tokens of a text) made at once in evaluation"))
    error_store: str | Path = field(default="auto", metadata=about("training", metavar="WHERE", free=True, help=
        "where each sample's error is kept from visit to visit: auto (the first that fits), device, memory, or a folder, "
        "with a slash: ./errors"))
    error_dtype: str = field(default="auto", metadata=about("training", metavar="TYPE", help=
        f"type of the entries of kept errors: auto (exact), {', '.join(ERROR_DTYPES)}, top-K, sampled-K"))
    window: int | str = field(default="off", metadata=about("training", parse=count_or_word, metavar="N", within="windows",
        help=f"visit N samples several times in a row before the next N; auto: {AUTO_BATCHES} batches; off: no windows"))
    visits: int | None = field(default=None, metadata=about("training", parse=int, metavar="K", within="windows", help=
        f"number of visits in a row of every window; default: {DEFAULT_VISITS}"))
    first_visit: str | None = field(default=None, metadata=about("training", choices=FIRST_VISITS, within="windows", help=
        "what a window's first visit teaches the hidden layers; default: skip (nothing)"))
    augment: str = field(default="none", metadata=about("training", choices=AUGMENTATIONS, within="augment", help=
        "how training images are changed at each visit: shift (by up to an eighth of their side), crop-flip (and mirrored)"))
    window_order: str | None = field(default=None, metadata=about("training", choices=ORDERS, within="windows", help=
        "windows one after the other, or two at a time in turns (A B A B), so that a pipeline does not wait; default: one"))
    patience: int | None = field(default=None, metadata=about("training", parse=int, metavar="N", free=True, help=
        "stop after N evaluations that are no better than the best before them; default: never"))
    sampling: str = field(default="uniform", metadata=about("training", choices=SAMPLINGS, within="sampling", help=
        "samples of an epoch: uniform (each once), or error (drawn by the size of their last error, anew at each quarter of an "
        "epoch, after a first epoch of all)"))
    seed: int = field(default=0, metadata=about("training", metavar="N", help=
        "seed of weights, feedback, sample order and splits; several (--seed 0 1 2): a run with each, mean and deviation"))

    device: str | torch.device = field(default="auto", metadata=about("run", metavar="NAME", free=True, help=
        "device to train on: auto, cpu, cuda, cuda:1, mps, ..."))
    backend: str = field(default="auto", metadata=about("run", choices=BACKENDS, free=True, help=
        "implementation of the layers; auto: triton on a GPU where its kernels pass their check, else torch"))
    cuda_graph: str = field(default="auto", metadata=about("run", choices=SWITCH, free=True, help=
        "run a step as one CUDA graph, where all stages are Linear; auto: not in a pipeline"))
    epoch_launch: str = field(default="auto", metadata=about("run", choices=SWITCH, free=True, help=
        "run hundreds of steps of a small network of Linear stages in one launch of a Triton kernel, where what teaches them "
        "is known before; auto: on a GPU where that passes its check"))
    precision: str = field(default="float32", metadata=about("run", choices=PRECISIONS, help=
        "precision of the matrix products; weights are float32, but for float64 and bfloat16-weights"))
    pipeline: int | str = field(default="off", metadata=about("run", parse=count_or_word, metavar="N", free=True, help=
        "the network's stages on N processes that torchrun has started, or auto: on all of them; threads:N: on N threads of "
        "this process; off: on one"))
    pipeline_split: str | Sequence[int] | None = field(default=None, metadata=about("run", metavar="N,N", free=True, help=
        "numbers of stages of the pipeline's workers, such as 5,6; default: by the stages' measured times"))
    pipeline_link: str = field(default="host", metadata=about("run", choices=PIPELINE_LINKS, free=True, help=
        "how a pipeline's processes send activations: host (through the host's memory), or nccl (from GPU to GPU; not tried on "
        "several GPUs yet)"))
    data_parallel: int = field(default=1, metadata=about("run", metavar="R", free=True, help=
        "divide every batch among R replicas, each a process or a pipeline"))
    data_parallel_by: str = field(default="auto", metadata=about("run", choices=BY, free=True, help=
        "what replicas exchange: factors (inputs and errors; linear layers learn exactly what one worker learns), gradients "
        "(to rounding), auto: what is less"))
    # fmt: on

    def __post_init__(self) -> None:
        from ..base.seeds import check_seed
        from ..error_store.codecs import check_error_dtype
        from ..kernels.rules import Rule

        for one in fields(self):
            value, choices = plain(getattr(self, one.name)), one.metadata["choices"]
            object.__setattr__(self, one.name, value)
            if choices is None or isinstance(value, Rule) or (value is None and one.default is None):
                continue
            also = "or a rule such as f3triton.Adam(lr=5e-4)" if one.name == "optimizer" else ""
            object.__setattr__(self, one.name, check_word(one.name.replace("_", " "), value, choices, also))
        for name, value in (("batch size", self.batch_size), ("eval batch size", self.eval_batch_size)):
            if not isinstance(value, int) or not 1 <= value < 1 << 31:
                raise InputError(f"{name} must be a whole number of at least 1 and below 2^31, got {typed(value)}")
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise InputError(f"patience must be a whole number of at least 1, got {self.patience!r}")
        limit = self.clip_norm
        if limit is not None and not (isinstance(limit, int | float) and 0 < limit < math.inf):
            raise InputError(f"clip norm must be a finite number above 0, got {limit!r}")
        check_seed(self.seed)
        scale = self.hidden_scale
        if scale != "mean" and not (isinstance(scale, int | float) and math.isfinite(scale)):
            raise InputError(f"hidden scale must be a finite number or 'mean', got {scale!r}")
        make_schedule(self.lr_schedule, 1.0, self.warmup_steps, self.warmup_steps)
        object.__setattr__(self, "error_dtype", check_error_dtype(self.error_dtype))
        _ = self.rule, self.windows, self.types  # raise what there is to raise
        for name, value in (("store", self.error_store), ("dtype", self.error_dtype)):
            if value != "auto" and not self.keeps_errors:
                raise InputError(f"error {name} {value!r} has no effect where no error is kept between visits; leave it out")
        if self.error_rank is not None and (self.resolved_signal is None or not self.resolved_signal.through_feedback):
            raise InputError(f"error rank {self.error_rank!r} has no effect with the method {self.method!r}; leave it out")
        self._check_local()
        self._check_workers()
        if self.sampling == "error" and (self.windows is not None or self.data_parallel > 1):
            other = "windows" if self.windows is not None else "data parallel"
            raise InputError(f"sampling 'error' does not go with {other}; use sampling 'uniform'")
        if self.moments != "float32" and (self.method == "bp" or self.rule.moments == 0 or self.precision == "float64"):
            at = "method 'bp'" if self.method == "bp" else "precision 'float64'" if self.rule.moments else f"rule {self.rule}"
            raise InputError(f"moments {self.moments!r} do not go with the {at}; leave it out")
        if self.cuda_graph == "on" and self.resolved_device.type != "cuda":
            raise InputError(f"cuda graph 'on' needs a CUDA device, got {self.resolved_device.type!r}; use 'auto'")

    def _check_local(self) -> None:
        local = self.resolved_signal is not None and self.resolved_signal.local
        for one in fields(self):
            value = getattr(self, one.name)
            idle = one.metadata["within"] == "local" if not local else one.name in ("link", "mask_target", "hidden_scale")
            if idle and value != one.default:
                name = one.name.replace("_", " ")
                raise InputError(f"{name} {value!r} has no effect with the method {self.method!r}; leave it out")
        for name, value, least in (("reach", self.reach, 1), ("local head depth", self.local_head_depth, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
        share, count = self.local_positions, self.local_candidates
        if not (isinstance(share, int | float) and 0 < share <= 1):
            raise InputError(f"local positions must be a share above 0 and up to 1, got {share!r}")
        if count is not None and (not isinstance(count, int) or count < 1):
            raise InputError(f"local candidates must be a whole number of at least 1, got {count!r}")
        if self.local_feedback == "random" and (self.local_head == "shared" or self.local_head_depth):
            raise InputError("local feedback 'random' needs heads of the stages' own, without stages in front of them")

    def _check_workers(self) -> None:
        from ..distributed.mesh import parse_pipeline
        from ..error_store import is_folder

        workers, threads = parse_pipeline(self.pipeline)
        if not isinstance(self.data_parallel, int) or self.data_parallel < 1:
            raise InputError(f"data parallel must be a whole number of at least 1, got {self.data_parallel!r}")
        if workers == "off" and self.pipeline_split is not None:
            raise InputError(f"pipeline split {self.pipeline_split!r} has no effect without a pipeline; leave it out")
        if self.pipeline_link == "nccl" and (workers == "off" or threads):
            raise InputError(f"pipeline link 'nccl' needs a pipeline of processes, got pipeline {self.pipeline!r}; use 'host'")
        if self.data_parallel == 1 and self.data_parallel_by != "auto":
            raise InputError(f"data parallel by {self.data_parallel_by!r} has no effect without data parallel; leave it out")
        _ = self.split
        signal = self.resolved_signal
        if workers != "off" and (signal is None or signal.current):
            raise InputError(
                f"pipeline {self.pipeline!r} needs stages that do not wait for later ones, and with the method {self.method!r} "
                "they do; use f3, drtp, local or last-layer"
            )
        if workers != "off" and signal.local and (self.reach > 1 or self.local_head == "shared"):
            wrong = f"reach {self.reach}" if self.reach > 1 else "local head 'shared'"
            raise InputError(
                f"{wrong} needs weights or gradients of later stages, which other workers have; use heads of the stages' own, "
                "and reach 1"
            )
        if self.data_parallel > 1:
            if self.method != "bp" and (signal is None or signal.current):
                raise InputError(f"data parallel is for the methods f3, drtp, local, last-layer and bp, got {self.method!r}")
            if self.batch_size % self.data_parallel:
                raise InputError(f"batch size {self.batch_size} cannot be divided among {self.data_parallel} replicas")
            if self.clip_norm is not None and self.method != "bp" and self.data_parallel_by != "factors":
                raise InputError(
                    f"clip norm {self.clip_norm!r} with data parallel needs whole errors; use data parallel by 'factors'"
                )
            if is_folder(self.error_store):
                raise InputError(f"error store {str(self.error_store)!r} cannot be written by several replicas; use memory")
        if self.cuda_graph == "on" and (threads or self.data_parallel > 1):
            raise InputError("cuda graph 'on' does not go with threads or data parallel; use 'auto'")

    @cached_property
    def split(self) -> list[int] | None:
        """The numbers of stages of a pipeline's workers, where they were given."""
        given = self.pipeline_split
        if given is None:
            return None
        try:
            return [int(part) for part in (given.split(",") if isinstance(given, str) else given)]
        except (TypeError, ValueError):
            raise InputError(f"pipeline split {given!r} is not understood; allowed: numbers of stages, such as 5,6") from None

    @cached_property
    def resolved_signal(self) -> Signal | None:
        """What teaches the hidden layers; None for backpropagation and feedback alignment."""
        from ..learn.signal import resolve_signal

        return resolve_signal(self.method, self.signal, self.link, self.mask_target)

    @property
    def keeps_errors(self) -> bool:
        """Whether the error of every sample is kept from one visit to the next."""
        return self.resolved_signal is not None and self.resolved_signal.delayed

    @cached_property
    def rule(self) -> Rule:
        """The update rule."""
        from ..network.updater import make_rule

        own = {"lr": self.lr, "momentum": self.momentum, "nesterov": self.nesterov or None, "weight_decay": self.weight_decay}
        for name, value in own.items():
            if value is not None and not isinstance(self.optimizer, str):
                raise InputError(f"{name} {value!r} has no effect with the optimizer {self.optimizer}; leave it out")
        if self.lr is None and self.optimizer in ("adam", "adamw"):
            own["lr"] = RATES.get(self.method, RATES["others"])
        return make_rule(self.optimizer, **own)

    @cached_property
    def windows(self) -> Windows | None:
        """The windows in which samples are visited; None where they are not."""
        from ..visits.windows import resolve_windows

        return resolve_windows(
            self.window, self.visits, self.first_visit, self.batch_size, self.keeps_errors, self.window_order
        )

    @cached_property
    def resolved_device(self) -> torch.device:
        """The device, with its number."""
        from ..base.device import pick_device

        return pick_device(self.device)

    @cached_property
    def types(self) -> Precision:
        """The types of parameters and products."""
        from ..base.precision import resolve_precision

        return resolve_precision(self.precision, self.resolved_device, self.method)

    def choose(self, work: Sequence[Work] = ()) -> Choice:
        """The operations that run, and why: see `kernels.dispatch.choose`. On a GPU, Triton's are checked first.

        Raises InputError where they cannot run.
        """
        from ..kernels.dispatch import choose

        try:
            return choose(self.backend, self.resolved_device, self.precision, work)
        except ValueError as error:
            raise InputError(str(error)) from None

    def fixed(self) -> dict[str, object]:
        """Everything in them that the result depends on, as JSON has it: what a resumed run must have the same."""
        own = [one.name for one in fields(self) if not (one.metadata["free"] or one.metadata["within"])]
        signal = self.resolved_signal
        words = None if signal is None else {"source": signal.source, "link": signal.link, "mask": signal.mask}
        windows = None if self.windows is None else asdict(self.windows)
        if windows is not None and windows["order"] == "one":
            del windows["order"]  # as it was when there was no other
        resolved = {"signal": words, "windows": windows}
        if signal is not None and signal.local:
            resolved["local"] = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["within"] == "local"}
        if self.moments != "float32":
            resolved["moments"] = self.moments
        if self.clip_norm is not None:
            resolved["clip_norm"] = self.clip_norm
        if self.augment != "none":
            resolved["augment"] = self.augment
        if self.sampling != "uniform":
            resolved["sampling"] = self.sampling
        return {name: getattr(self, name) for name in own} | resolved | {"rule": repr(self.rule)}


LOCAL = tuple(one.name for one in fields(Settings) if one.metadata["within"] == "local")  # those of the method local


def takes_settings(cls: type) -> type:
    """Show, in the signature and the docstring of a class, the settings that its `**changes` are."""
    own = [p for p in inspect.signature(cls).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    others = [one for one in fields(Settings) if one.name not in {p.name for p in own}]
    keywords = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type) for one in others
    ]
    cls.__signature__ = inspect.Signature([*own, *keywords])
    lines = [f"- `{one.name}`: {one.metadata['help']}" for one in fields(Settings)]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", *lines])
    return cls
