"""Visits by the launch: where the rows that teach are known before, a small network does hundreds of steps at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..base.exceptions import InputError
from ..kernels import dispatch
from ..kernels.rules import Layer, Rule, Update
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..network.updater import Updater
from .signal import Signal

BYTES = 1 << 26  # of inputs, outputs and all between them, in one launch


def refusal(model: Sequential, signal: Signal | None, loss: str, rule: Rule, batch: int, device: torch.device) -> str | None:
    """Why a run's steps of `batch` samples, in float32, cannot be few launches on the device; None where they can. The model is
    prepared."""
    if signal is None or signal.source not in ("delayed-error", "target"):
        return "what teaches the hidden stages must be known before a step, and not depend on its size"
    hidden, stages = list(model.stages[:-1]), list(model.stages)
    if not all(isinstance(stage, Linear) and stage.norm == "none" and not stage.residual for stage in stages):
        return "all stages must be Linear, without norm and residual"
    plain = all(stage.feedback_at == "output" and len(stage.output_shape) == 1 for stage in stages)
    if not hidden or not plain or len({stage.activation for stage in hidden}) > 1:
        return "there must be hidden stages, of one activation, taught at their outputs"
    if any(stage.feedback_matrix is None or stage.feedback_matrix.dtype != torch.float32 for stage in hidden):
        return "feedback must be stored in float32"
    if len({stage.bias is None for stage in stages}) > 1:
        return "all stages must have a bias, or none"
    sizes = (stages[0].in_features, *(stage.out_features for stage in stages))
    about = hidden[0].feedback_matrix.shape[0], batch, rule, loss, hidden[0].activation, stages[0].bias is not None
    return dispatch.network_fault(device, sizes, *about)


class EpochLaunch:
    """Steps of `batch` samples each, no row of which occurs twice, in one launch: `steps` at most."""

    def __init__(self, model: Sequential, updater: Updater, signal: Signal, loss: str, scale: float | str, batch: int) -> None:
        self.updater, self.signal, self.loss, self.batch = updater, signal, loss, batch
        self.scale = 1 / batch if scale == "mean" else scale
        stages, states = list(model.stages), updater.states
        self.layers = [
            Layer(stage.weight, stage.bias, states[stage.weight], states.get(stage.bias), stage.feedback_matrix)
            for stage in stages
        ]
        self.activation = stages[0].activation
        numbers = stages[0].in_features + sum(stage.out_features for stage in stages) + 4 * stages[-1].out_features
        self.steps = max(1, BYTES // (4 * batch * numbers))
        self.failed = torch.zeros(1, dtype=torch.int32, device=updater.step.device)

    @torch.no_grad()
    def __call__(self, x: Tensor, row: Tensor, target: Tensor, rates: Sequence[float]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A step for each of the learning rates, of S batches' samples in order: `x [S batch, K]`, what teaches `row [S batch,
        R]`, `target [S batch, C]`. Returns what they leave behind `[S batch, C]`, and losses and hits, `[S batch]` each."""
        updater, count = self.updater, len(rates)
        update = Update(updater.rule, self._rates(rates), updater.step + 1)
        by_step = (tensor.contiguous().view(count, self.batch, -1) for tensor in (x, row, target))
        steps = dispatch.network_steps()
        a = steps(*by_step, self.layers, self.loss, update, self.activation, self.scale, failed=self.failed).flatten(0, 1)
        updater.step += count
        updater.number += count
        _, error, figures = updater.ops.output_step(a, target, self.loss, self.signal.source, self.signal.link)
        return error, figures

    def _rates(self, rates: Sequence[float]) -> Tensor:
        """On the device; the host does not wait."""
        device = self.updater.step.device
        if len(set(rates)) == 1:
            return torch.full((len(rates),), rates[0], device=device)
        there = torch.tensor(rates, dtype=torch.float32)
        return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, a loss that is NaN because programs of a launch waited in vain for each other is told as that."""
        try:
            yield
        except RuntimeError:
            if int(self.failed):
                raise InputError("programs of a launch waited in vain for each other; use --epoch-launch off") from None
            raise
