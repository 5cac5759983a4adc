"""What F3 is compared with: backpropagation, and feedback alignment; and every learner by the name of its method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..base.data import Data, Visit, batch
from ..base.exceptions import InputError
from ..base.precision import autocast, working_dtype
from ..base.seeds import derived_seed, drawing
from ..error_store.store import ErrorStore
from ..kernels import eager
from ..network.clip import clip_
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..network.updater import Arithmetic, Replicas, Updater, torch_optimizer
from .local import Local
from .loss import mean_loss
from .signal import Signal
from .step import Augment, F3Learner, Learner, Output


class _Backward:
    """What methods have in common whose error goes backward: no signal, no store, no graph."""

    signal: Signal | None = None
    store: ErrorStore | None = None
    augment: Augment | None = None

    def use_graph(self, batch: int, slots: int) -> bool:
        """See `Learner`."""
        return False

    def use_launches(self, batch: int) -> int:
        """See `Learner`."""
        raise NotImplementedError

    def visits(self, visits: Sequence[Visit], rates: Sequence[float]) -> Output:
        """See `Learner`."""
        raise NotImplementedError


class BackpropLearner(_Backward):
    """Backpropagation by autograd with torch's fused optimizer; with `replicas` by torch's DistributedDataParallel."""

    def __init__(self, model: Sequential, data: Data, loss: str, how: Arithmetic, replicas: Replicas | None = None) -> None:
        self.replicas, self.run = replicas, model if replicas is None else replicas.average_gradients(model)
        self.model, self.data, self.loss, self.compute_dtype = model, data, loss, how.compute_dtype
        self.dtype, self.device = next(model.parameters()).dtype, how.device
        self.optimizer = torch_optimizer(how.rule, [p for p in model.parameters() if p.requires_grad])
        self.clip_norm, self.layers = how.clip_norm, _layers(model) * (how.clip_norm is not None)
        self.seed, self.steps = how.seed, 0
        self.draws = any(stage.draws for stage in model.stages)

    def visit(self, visit: Visit, lr: float) -> Output:
        """See `Learner`."""
        if visit.window is not None:
            self.data.load(visit.window)
        x, target = batch(self.data, visit.index, self.dtype, self.device)  # [batch, ...], [M, C]
        x = x if self.augment is None else self.augment(x, visit.number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.steps += 1
        split = self.replicas is not None and self.replicas.divide(len(x))
        own = (self.replicas.number,) if split else ()
        draws = drawing(self.device, self.seed, "dropout", self.steps, *own) if self.draws else nullcontext()
        with nullcontext() if self.replicas is None else self.replicas.watching():
            with draws, autocast(x.device, self.compute_dtype):
                a = self.run(self.replicas.own(x) if split else x)  # [M, C], or [batch, tokens, C]
            a = a.flatten(0, -2).to(self.dtype)
            mean_loss(a, self.replicas.own(target) if split else target, self.loss).backward()
        for layer in self.layers:  # none where nothing is limited
            clip_([p.grad for p in layer if p.grad is not None], self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Output(self.replicas.gather(a) if split else a.detach(), target)

    def state(self) -> dict[str, Tensor]:
        """See `Learner`."""
        found = {}
        for name, p in self.model.named_parameters():
            if not self.optimizer.state.get(p) and p.requires_grad:  # torch makes a parameter's buffers at its first step
                _make_torch_state(self.optimizer, p)
            kept = self.optimizer.state.get(p, {})
            found |= {f"{name}.{key}": value for key, value in kept.items() if isinstance(value, Tensor)}
        return found

    def resumed(self, steps: int) -> None:
        """See `Learner`."""
        self.steps = steps


def _layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters whose gradients have one norm: a linear layer's weight and bias together, any other alone."""
    found: list[list[nn.Parameter]] = []
    seen: set[nn.Parameter] = set()
    for part in model.modules():
        own = [p for p in part.parameters(recurse=False) if p.requires_grad and p not in seen]
        found += [own] if isinstance(part, Linear | nn.Linear) else [[p] for p in own]
        seen.update(own)
    return found


def _make_torch_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """The state that torch's optimizer begins with."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        if group["momentum"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return
    device = parameter.device if group["fused"] else torch.device("cpu")
    optimizer.state[parameter] |= {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def require_linear(model: Sequential) -> None:
    """Raise InputError where a stage is not a `Linear`."""
    for number, stage in enumerate(model.stages):
        if type(stage) is not Linear:
            raise InputError(f"method 'fa' needs a sequence of Linear stages, stage {number} is a {type(stage).__name__}")


class FeedbackAlignmentLearner(_Backward):
    """The error goes backward layer by layer, as in backpropagation, but through `F [N, K]`, drawn once from the law of torch's
    initial weights (uniform in +-1/sqrt(K)), instead of `W` (Lillicrap et al. 2016). No weight transport, but update locking
    and all activations are as in backpropagation. Without autograd, for sequences of `Linear` stages.

    Raises InputError where a stage is something else.
    """

    def __init__(self, model: Sequential, data: Data, updater: Updater, loss: str, seed: int) -> None:
        require_linear(model)
        self.model, self.data, self.updater, self.loss = model, data, updater, loss
        self.dtype, self.device = working_dtype(model), updater.step.device
        self.backward_weights: list[Tensor] = []
        for number, stage in enumerate(model.stages):
            generator = torch.Generator().manual_seed(derived_seed(seed, "backward weights", number))
            matrix = torch.empty(stage.weight.shape).uniform_(-1, 1, generator=generator) / math.sqrt(stage.in_features)
            self.backward_weights.append(matrix.to(self.device, updater.compute_dtype or self.dtype))

    @torch.no_grad()
    def visit(self, visit: Visit, lr: float) -> Output:
        """See `Learner`."""
        if visit.window is not None:
            self.data.load(visit.window)
        stages, step = list(self.model.stages), self.updater.begin(lr)
        x, target = batch(self.data, visit.index, self.dtype, self.device)
        x = x if self.augment is None else self.augment(x, visit.number)
        kept_stages = []
        for stage in stages:
            x, kept = stage.keep(x, step)
            kept_stages.append(kept)
        a = x.to(self.dtype)
        gradient, _, _ = step.ops.output_step(a, target, self.loss, "current-error", "auto")
        for number in reversed(range(len(stages))):
            inputs, slope_from, _ = kept_stages[number]
            delta = eager.times_slope(gradient.to(slope_from.dtype), slope_from, stages[number].activation)
            if number:
                gradient = delta @ self.backward_weights[number]
            step.teach(stages[number], delta, inputs)
        return Output(a, target)

    def state(self) -> dict[str, Tensor]:
        """See `Learner`."""
        return self.updater.state()

    def resumed(self, steps: int) -> None:
        """See `Learner`."""
        self.updater.resumed(steps)


def make_learner(
    method: str,
    model: Sequential,
    data: Data,
    loss: str,
    how: Arithmetic,
    signal: Signal | None = None,
    scale: float | str = 1.0,
    store: ErrorStore | None = None,
    local: Local | None = None,
    part: range | None = None,
    replicas: Replicas | None = None,
) -> Learner:
    """The learner of a method, with the `signal` that it stands for (None: its error goes backward) and, where that is
    delayed, a `store`. `part`, `replicas`: see `F3Learner`."""
    if method == "fa":
        return FeedbackAlignmentLearner(model, data, Updater(model, how), loss, how.seed)
    if signal is None:
        return BackpropLearner(model, data, loss, how, replicas)
    taught = None
    if part is not None or signal.source == "none":
        first = len(model) - 1 if signal.source == "none" else 0
        places = range(len(model)) if part is None else part
        taught = [p for place in places if place >= first for p in model.of(place).parameters()]
    return F3Learner(model, data, Updater(model, how, taught), loss, signal, scale, store, how.seed, local, part, replicas)
