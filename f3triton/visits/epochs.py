"""Every sample once an epoch, in an order that is drawn anew for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from ..base.data import Visit
from ..base.seeds import sample_order
from .order import Order


class EpochOrder(Order):
    """`samples` in batches of `batch_size`, shuffled by the seed and the epoch; or in the batches of `given(epoch)`, sample
    indices int64 `[batch]` each. The indices are on `device`."""

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        device: str | torch.device = "cpu",
        given: Callable[[int], Iterable[Tensor]] | None = None,
    ) -> None:
        self.samples, self.batch_size, self.seed, self.device, self.given = samples, batch_size, seed, device, given
        self.steps_per_epoch = math.ceil(samples / batch_size)

    def visits(self, epoch: int, skip: int = 0) -> Iterator[Visit]:
        """The epoch's visits after the first `skip`."""
        if self.given is None:
            batches = sample_order(self.samples, self.seed, epoch).to(self.device).split(self.batch_size)
        else:
            batches = (index.to(self.device) for index in self.given(epoch))
        return (Visit(index, index) for index in islice(batches, skip, None))
