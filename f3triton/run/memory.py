"""The memory that training a network will need, asked for in Python."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..error_store import make_codec
from ..network.block import Block
from ..network.sequential import Sequential
from .dry_run import budget_by, rehearsed_too
from .settings import Settings


def memory(model: nn.Module, example: Tensor, method: str = "f3", samples: int = 0, **settings: object) -> dict[str, int]:
    """Bytes by purpose of training `model`: `weights`, `moments`, `gradients`, `feedback`, `errors`, `activations`, and the
    `rest` of a step.

    `example [M, ...]` is a batch, of which only shape and type count; `samples` are those that have an error row at a time.
    `settings` are those of `Trainer`. A module that is no `Sequential` counts as one stage. Nothing is allocated, nor is the
    model changed; the table is that of `train.py --dry-run`, less the data and evaluations. Raises InputError for settings that
    do not fit.
    """
    own = Settings(method=method, **settings)
    x = example.to("meta")
    shapes: dict[int, object] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    shapes |= {id(b): b.to("meta") for b in model.buffers()}
    model = copy.deepcopy(model, shapes).to("meta")  # copies no weights
    network = model if isinstance(model, Sequential) else Sequential(Block(model))
    with torch.device("meta"), torch.no_grad():
        shape = network(x).shape
    outputs, positions = shape[-1], shape[1:-1].numel()
    errors = 0
    if own.keeps_errors:
        classes = own.error_rank is None and own.loss != "mse"
        codec = make_codec(own.error_dtype, own.error_rank or outputs, own.types.working, classes, 0)
        errors = samples * positions * codec.row_bytes
    budget = budget_by(own, network, x, outputs, positions, errors)
    budget = rehearsed_too(budget, own, network, x, outputs, positions, max(1, samples // len(x)))
    return {name: count for name, count in budget.memory.items() if name != "data"}
