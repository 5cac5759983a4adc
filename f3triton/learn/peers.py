"""Feedback alignment: backpropagation with fixed random matrices in place of the transposed weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base.data import Data, batch
from ..base.exceptions import InputError
from ..base.precision import working_dtype
from ..base.seeds import derived_seed
from ..kernels import eager
from ..network.linear import Linear, update_linear
from ..network.sequential import Sequential
from ..network.updater import Updater


def require_linear(model: Sequential) -> None:
    """Raise InputError where a stage is not a `Linear`."""
    for number, stage in enumerate(model.stages):
        if type(stage) is not Linear:
            raise InputError(f"method 'fa' needs a sequence of Linear stages, stage {number} is a {type(stage).__name__}")


class FeedbackAlignmentLearner:
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
    def step(self, index: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Learn from the samples `index [batch]`; returns the output from before the update and the target, `[M, C]`."""
        updater, stages = self.updater, list(self.model.stages)
        updater.next_step(lr)
        x, target = batch(self.data, index, self.dtype, self.device)
        kept_stages = []
        for stage in stages:
            x, kept = stage.keep(x, updater)
            kept_stages.append(kept)
        a = x.to(self.dtype)
        gradient, _ = updater.ops.output_error(a, target, self.loss, "current-error", "auto")
        for number in reversed(range(len(stages))):
            inputs, slope_from = kept_stages[number]
            delta = eager.times_slope(gradient.to(slope_from.dtype), slope_from, stages[number].activation)
            if number:
                gradient = delta @ self.backward_weights[number]
            update_linear(stages[number], delta, inputs, updater, wants_input=False)
        return a, target
