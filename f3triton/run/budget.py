"""What a run will need, by arithmetic: shapes, parameters, FLOPs a step, and memory by what it is for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..base.precision import FLOAT32, Precision
from ..base.text import readable_bytes
from ..kernels.eager import SCRATCH
from ..kernels.rules import Rule
from ..learn.signal import Signal


@dataclass(frozen=True)
class Budget:
    """The needs of a network's training. `flops` are those of one step's products, `memory` bytes by purpose."""

    layers: list[str]  # a table for people, a line a layer
    parameters: int
    flops: int
    memory: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """All of the memory that is listed."""
        return sum(self.memory.values())


def mlp_budget(
    sizes: Sequence[int],
    batch: int,
    samples: int,
    rule: Rule,
    signal: Signal | None,
    types: Precision = FLOAT32,
    data_bytes: int = 0,
    bias: bool = True,
    error_bytes: int | None = None,
    error_width: int | None = None,
) -> Budget:
    """The budget of an MLP of `sizes [inputs, hidden, ..., C]`, by `signal` (None: backpropagation).

    Matrix products of a layer with K inputs and N outputs (batch M, error width C): forward 2MKN; weight gradient 2MKN;
    feedback 2MCN in F3; input gradient 2MKN in backpropagation, but for the first layer. Activations count the tensors
    alive at once: one layer's input, output and error signal in F3; every layer's in backpropagation and DFA.
    `error_bytes` are those of the error store in memory, where that is not a row of the working type for each sample;
    `error_width` is C where that is not the number of outputs.
    """
    layers = list(itertools.pairwise(sizes))
    hidden, classes = layers[:-1], error_width or sizes[-1]
    weights = [k * n for k, n in layers]
    parameters = sum(weights) + (sum(n for _, n in layers) if bias else 0)
    forward = sum(2 * batch * weight for weight in weights)
    feedback_flops = sum(2 * batch * classes * n for _, n in hidden)
    every_layer = batch * (sizes[0] + sum(n for _, n in layers))
    largest = max(batch * (k + 2 * n) for k, n in layers)
    scratch = max(min(weight, max(k, SCRATCH)) for weight, (k, _) in zip(weights, layers, strict=True))
    feedback = sum(classes * n for _, n in hidden)
    taught = parameters

    if signal is None:
        flops = 3 * forward - 2 * batch * weights[0]
        feedback, activations, gradients = 0, every_layer + batch * max(sizes[1:]), parameters
    elif signal.source == "none":
        flops, feedback = forward + 2 * batch * weights[-1], 0
        activations, gradients = largest, scratch
        taught = weights[-1] + (classes if bias else 0)
    else:
        flops = 2 * forward + feedback_flops
        activations = every_layer + batch * max(sizes[1:]) if signal.current else largest
        gradients = scratch
    weight, state, product = types.parameters.itemsize, types.working.itemsize, (types.products or types.working).itemsize
    if error_bytes is None:
        error_bytes = samples * classes * state if signal is not None and signal.delayed else 0
    table = ["layer    inputs  outputs   parameters"]
    table += [f"{number:5d} {k:9,d} {n:8,d} {k * n + n:12,d}" for number, (k, n) in enumerate(layers, 1)]
    return Budget(
        table,
        parameters,
        flops,
        {
            "weights": parameters * weight,
            "moments": rule.moments * taught * state,
            "gradients": gradients * state,
            "feedback": feedback * weight,
            "errors": error_bytes,
            "activations": activations * product,
            "data": data_bytes,
        },
    )


def describe(budget: Budget) -> list[str]:
    """The budget as lines for people."""
    lines = [*budget.layers, f"parameters {budget.parameters:,}", f"FLOPs a step {budget.flops:,}", "memory"]
    lines += [f"  {name:12s} {readable_bytes(count):>12s}" for name, count in budget.memory.items()]
    return [*lines, f"  {'total':12s} {readable_bytes(budget.total_bytes):>12s}"]
