"""What a data set has to be able to do, and a visit: a batch of its samples whose turn has come."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Visit(NamedTuple):
    """A batch of samples whose turn has come. All visits of a run are a pure function of its seed and settings.

    `index [batch]`: the samples, int64, as the data set numbers them; `row [batch]`: their rows in the error store. `teach`
    is what the hidden stages learn from: the `signal`, the `target` (as a window's first visit may), or `nothing`. Of a
    stream, `window` says which of its windows the samples are in, (pass, window). `number` counts the run's visits before it.
    """

    index: Tensor
    row: Tensor
    teach: str = "signal"
    window: tuple[int, int] | None = None
    number: int = 0


class Data(Protocol):
    """What the engine asks of a data set: inputs and targets by sample index, and nothing else."""

    device: torch.device
    positions: int  # predictions a sample: 1, or as many as a text window has tokens

    def __len__(self) -> int: ...

    def fetch(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Inputs `[batch, ...]` of the samples `index [batch]`."""

    def one_hot(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Targets `[batch * positions, C]`: one-hot for classes, values for regression."""


def batch(data: Data, index: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs `[batch, ...]` and targets `[batch * positions, C]` on `device`, from wherever the data (and `index`) is."""
    x, target = data.fetch(index, dtype), data.one_hot(index, dtype)
    if data.device != device:
        x, target = x.to(device, non_blocking=True), target.to(device, non_blocking=True)
    return x, target
