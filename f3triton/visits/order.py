"""The order of a run's visits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..base.data import Visit


class Order:
    """The visits of a run, epoch by epoch. An epoch has as many sample visits as the data set has samples."""

    steps_per_epoch: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps of the visits that were made, and goes on from: the very tensors in use."""
        return {}

    def visits(self, epoch: int, skip: int = 0) -> Iterator[Visit]:
        """The visits of an epoch, counted from 0, after its first `skip`."""
        raise NotImplementedError

    def parts(self, epoch: int, skip: int, settle: Callable[[], None]) -> Iterator[Iterator[Visit]]:
        """The same in parts, none of which is known before the one before it was made. An order that depends on what was learnt
        calls `settle`, after which all visits before are noted."""
        yield self.visits(epoch, skip)

    def note(self, index: Tensor, sizes: Callable[[], Tensor]) -> None:
        """The samples `index [M]` have left errors of these `sizes`, `[M]`."""


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
