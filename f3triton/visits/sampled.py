"""Samples drawn by the size of the error that they left at their last visit: those that are learnt already come seldom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from ..base.data import Visit
from ..base.seeds import derived_seed
from .epochs import EpochOrder

QUARTERS = 4  # of an epoch, with a draw each
FLOOR = 0.25  # of the mean size, is added to every sample's


def draw(sizes: Tensor, batches: int, batch_size: int, seed: int) -> Tensor:
    """Samples `[batches, batch_size]` (int64), on the CPU as `sizes [samples]` are: each as often as is its share of the sizes,
    to which a quarter of their mean is added, rounded up or down; and at most once a batch, if it is not drawn more often than
    there are batches.

    Systematic sampling: equidistant points on the samples' shares, which lie side by side in an order of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sizes), generator=generator)
    ends = (sizes.double() + FLOOR * sizes.double().mean() + 1e-12)[order].cumsum(0)  # of the shares
    count = batches * batch_size
    points = (torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)) * (ends[-1] / count)
    drawn = order[torch.searchsorted(ends, points, right=True).clamp_(max=len(sizes) - 1)]
    return drawn.view(batch_size, batches).T[torch.randperm(batches, generator=generator)].contiguous()


class SampledOrder(EpochOrder):
    """The first epoch is every sample once. Then, at each quarter of an epoch, the samples of its batches are drawn by `draw`.

    `sizes [samples]` (float32) are those of the last errors, and `drawn_by` those that the quarter under way was drawn by: with
    both, an order goes on in the middle of a quarter.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, device: torch.device, sizes_on: torch.device) -> None:
        super().__init__(samples, batch_size, seed, device)
        self.sizes = torch.ones(samples, device=sizes_on)
        self.drawn_by = torch.ones(samples)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"sizes": self.sizes, "drawn_by": self.drawn_by}

    def note(self, index: Tensor, sizes: Callable[[], Tensor]) -> None:
        """Of a sample that is in a batch twice, either size is kept."""
        self.sizes.index_copy_(0, index.to(self.sizes.device), sizes().to(self.sizes.dtype))

    def visits(self, epoch: int, skip: int = 0) -> Iterator[Visit]:
        for part in self.parts(epoch, skip, lambda: None):
            yield from part

    def parts(self, epoch: int, skip: int, settle: Callable[[], None]) -> Iterator[Iterator[Visit]]:
        if epoch == 0:
            yield super().visits(epoch, skip)
            return
        steps = self.steps_per_epoch
        for quarter in range(QUARTERS):
            first, end = quarter * steps // QUARTERS, (quarter + 1) * steps // QUARTERS
            if max(first, skip) >= end:
                continue
            settle()
            if skip <= first:
                self.drawn_by.copy_(self.sizes)
            seed = derived_seed(self.seed, "draw", epoch, quarter)
            batches = draw(self.drawn_by, end - first, self.batch_size, seed).to(self.device).unbind()
            if end == steps:  # an epoch has as many visits as there are samples
                batches = *batches[:-1], batches[-1][: self.samples - (steps - 1) * self.batch_size]
            yield (Visit(index, index) for index in islice(batches, max(0, skip - first), None))
