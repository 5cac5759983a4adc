"""The order of a run's visits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..base.data import Visit


class Order(Protocol):
    """The visits of a run, epoch by epoch. An epoch has as many sample visits as the data set has samples."""

    steps_per_epoch: int

    def visits(self, epoch: int, skip: int = 0) -> Iterator[Visit]:
        """The visits of an epoch, counted from 0, after its first `skip`."""


def planned(
    visits: Iterable[Visit], plan: Callable[[Iterable[Tensor], torch.device], Iterable[Tensor]], device: torch.device
) -> Iterator[Visit]:
    """The same visits with their tensors on `device`, by the `plan` of an error store, which may look ahead at the rows."""
    waiting: deque[Visit] = deque()

    def rows() -> Iterator[Tensor]:
        for visit in visits:
            waiting.append(visit)
            yield visit.row

    for row in plan(rows(), device):
        visit = waiting.popleft()
        index = row if visit.index is visit.row else visit.index.to(device)
        yield visit._replace(index=index, row=row)
