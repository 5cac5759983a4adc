"""The step and the epoch: the one place that knows the order of things."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from ..base.data import Data, batch
from ..base.precision import autocast, working_dtype
from ..error_store import ErrorStore
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..network.updater import Updater, torch_optimizer
from .cuda_graph import GraphedStep
from .loss import mean_loss
from .signal import Signal

CHECK_EVERY = 500  # steps between looks at the loss: one synchronisation each


KEPT_OUTPUTS = 1 << 20  # elements of outputs that wait for their loss to be taken


class Learner(Protocol):
    """A way to learn from one batch, with the loss of that name."""

    loss: str

    def step(self, index: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Learn from the samples `index [batch]`; returns the output from before the update and the target, `[M, C]`.

        M counts predictions: one a sample, or one for each token of a text window.
        """


class F3Learner:
    """F3 and its kin: every hidden stage is taught by `e B`, the last one by the exact gradient at its own output.

    With a delayed signal (arXiv 2304.13372, alg. 1) a stage is updated while the forward pass goes through it. With a
    current one (DFA) the forward pass goes through all stages once, its activations are kept, and then every stage is
    updated from the error at the output. Runs without autograd, but for what is inside a `Block`.
    """

    def __init__(
        self,
        model: Sequential,
        data: Data,
        updater: Updater,
        loss: str,
        signal: Signal,
        scale: float | str,
        store: ErrorStore | None,
        projection: Tensor | None = None,
    ) -> None:
        self.model, self.data, self.updater, self.loss, self.signal = model, data, updater, loss, signal
        self.hidden, self.last = list(model.stages[:-1]), model.stages[-1]
        self.scale = scale
        self.dtype, self.device = working_dtype(model), updater.step.device
        self.hidden_learn = True  # off on a window's first visit, where there is no error yet
        self.graphs: dict[bool, GraphedStep] = {}  # by `hidden_learn`
        self.store = store  # where the signal is delayed
        self.projection = projection  # [C, rank], see `error_projection`

    def use_graph(self, batch: int) -> bool:
        """Run steps of `batch` samples as a CUDA graph from now on (see `graphs`); returns False where they cannot be."""
        linear = all(isinstance(stage, Linear) for stage in self.model.stages)
        if linear and self.data.device == self.device and (self.store is None or self.store.on_device):
            slots = min(CHECK_EVERY, KEPT_OUTPUTS // (batch * self.last.out_features) + 1) + 1  # what a Tally keeps waiting
            self.graphs = {learn: GraphedStep(self._learn, batch, slots, self.device) for learn in (True, False)}
        return bool(self.graphs)

    def step(self, index: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        graph = self.graphs.get(self.hidden_learn)
        if graph is not None and len(index) == graph.batch:
            return graph(index, lr)
        return self._learn(index, lr)

    @torch.no_grad()
    def _learn(self, index: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor]:
        updater, signal = self.updater, self.signal
        updater.next_step(lr)
        x, target = batch(self.data, index, self.dtype, self.device)  # [batch, ...], [M, C]
        scale = 1 / len(target) if self.scale == "mean" else self.scale
        kept_stages = []
        if signal.current:
            for stage in self.hidden:
                x, kept = stage.keep(x, updater)
                kept_stages.append(kept)
        elif signal.source == "none" or not self.hidden_learn:
            with autocast(x.device, updater.compute_dtype):
                for stage in self.hidden:
                    x = stage(x)
        else:
            error = self.reduce(target, target) if self.store is None else self.store.read(index)  # [M, C or rank]
            if signal.mask and self.projection is None:
                error = error * target
            for stage in self.hidden:
                x = stage.learn(x, error, updater, scale)
        a, kept = self.last.keep(x, updater)  # [M, C], or [batch, tokens, C]
        shape = a.shape
        if len(shape) > 2:
            a = a.flatten(0, -2)  # [M, C]
        if a.dtype != self.dtype:
            a = a.to(self.dtype)
        gradient, error = updater.ops.output_error(a, target, self.loss, signal.source, signal.link)
        self.last.finish(kept, gradient.view(shape), updater)
        if self.store is not None:
            self.store.write(index, self.reduce(error, target))
        elif signal.current:
            error = self.reduce(error, target)
            if signal.mask and self.projection is None:
                error = error * target
            for stage, kept in zip(self.hidden, kept_stages, strict=True):
                stage.teach(kept, error, updater, scale)
        return a, target

    def reduce(self, error: Tensor, target: Tensor) -> Tensor:
        """What is kept of `error [M, C]`: with a projection its product with it `[M, rank]`, after the mask, else all of it."""
        if self.projection is None:
            return error
        return (error * target if self.signal.mask else error) @ self.projection


class BackpropLearner:
    """Backpropagation by autograd with torch's fused optimizer: what F3 is compared with."""

    def __init__(self, model: Sequential, data: Data, rule: object, loss: str, compute_dtype: torch.dtype | None) -> None:
        self.model, self.data, self.loss, self.compute_dtype = model, data, loss, compute_dtype
        self.dtype, self.device = next(model.parameters()).dtype, next(model.parameters()).device
        self.optimizer = torch_optimizer(rule, [p for p in model.parameters() if p.requires_grad])

    def step(self, index: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        x, target = batch(self.data, index, self.dtype, self.device)  # [batch, ...], [M, C]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(x.device, self.compute_dtype):
            a = self.model(x)  # [M, C], or [batch, tokens, C]
        a = a.flatten(0, -2).to(self.dtype)
        mean_loss(a, target, self.loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return a.detach(), target


def make_learner(
    model: Sequential,
    data: Data,
    rule: object,
    ops: ModuleType,
    device: torch.device,
    loss: str,
    signal: Signal | None,
    scale: float | str,
    compute_dtype: torch.dtype | None,
    rounding_seed: int = 0,
    store: ErrorStore | None = None,
    projection: Tensor | None = None,
) -> Learner:
    """The learner of a signal, with a `store` where that is delayed; backpropagation where it is None."""
    if signal is None:
        return BackpropLearner(model, data, rule, loss, compute_dtype)
    taught = list(model.stages[-1].parameters()) if signal.source == "none" else list(model.parameters())
    updater = Updater(rule, taught, ops, device, compute_dtype, rounding_seed)
    return F3Learner(model, data, updater, loss, signal, scale, store, projection)
