"""Replicas: each learns from its own rows of every batch, and all come to the same weights.

By factors: the rows of `delta` and `x` are gathered, and every replica forms the product of the whole batch, the very one that
a single worker forms. By gradients: each forms the product of its own rows, and the sum is taken, to rounding. Of M rows of a
layer `[N, K]`, factors are `M (N + K)` numbers, gradients `2 N K`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..network.linear import Linear
from ..network.sequential import Sequential
from .links import watching


class DataParallel:
    """One of `count` replicas, the one of that `number`; see `updater.Replicas`. `by`: one of `BY`; auto sends the fewer
    bytes."""

    def __init__(self, group: dist.ProcessGroup, number: int, count: int, by: str, batch: int) -> None:
        self.group, self.number, self.count, self.by, self.batch = group, number, count, by, batch

    def divide(self, rows: int) -> bool:
        return rows == self.batch  # the last one of an epoch may be smaller, and have other bits in parts

    def own(self, rows: Tensor) -> Tensor:
        return rows.chunk(self.count)[self.number]

    def gather(self, own: Tensor) -> Tensor:
        mine = own.detach().cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        with self.watching():
            dist.all_gather([part.view(torch.uint8) for part in parts], mine.view(torch.uint8), group=self.group)
        return torch.cat(parts).to(own.device)

    def total(self, part: Tensor) -> Tensor:
        whole = part.detach().cpu().contiguous().clone()
        with self.watching():
            dist.all_reduce(whole, group=self.group)
        return whole.to(part.device)

    def average_gradients(self, model: nn.Module) -> nn.Module:
        with self.watching():
            return nn.parallel.DistributedDataParallel(model, process_group=self.group)

    def watching(self) -> AbstractContextManager[None]:
        return watching("another replica")

    def ask(self, this_one: bool) -> Callable[[], bool]:
        """What all replicas call after the same step; the answer, which can be had after the next one without waiting, is
        whether `this_one` or another is to stop."""
        flag = torch.tensor(int(this_one))
        with self.watching():
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True)

        def answer() -> bool:
            with self.watching():
                work.wait()
            return bool(flag)

        return answer

    def by_factors(self, shape: torch.Size, rows: int) -> bool:
        if self.by != "auto":
            return self.by == "factors"
        return self.count * rows * sum(shape) <= 2 * shape.numel()

    def describe(self, model: Sequential, rows: int, alike: bool) -> str:
        """What is sent for the hidden stages' weights, with so many rows of a batch, and whether the bits are those of one
        worker; `alike`: see `rows_alike`."""
        weights = [p for stage in model.stages[:-1] for p in stage.parameters() if p.dim() == 2]
        factors = sum(self.by_factors(weight.shape, rows // self.count) for weight in weights)
        others = sum(p.dim() != 2 for stage in model.stages[:-1] if not isinstance(stage, Linear) for p in stage.parameters())
        exact = factors == len(weights) and not others and alike
        return (
            f"data parallel {self.count}: {factors} weights by factors, {len(weights) - factors + others} parameters by "
            f"gradients; {'the bits of one worker' if exact else 'the numbers of one worker to rounding'}"
        )


@torch.no_grad()
def rows_alike(model: Sequential, x: Tensor, row: Tensor, parts: int) -> bool:
    """Whether the hidden stages give parts of a batch `x [M, ...]` with errors `row [rows, R]` the bits that they give them in
    the whole one. Libraries choose their products by the number of rows, and mostly they do."""
    for stage in model.stages[:-1]:
        h = stage.compute(x)
        pieces = list(zip(x.chunk(parts), row.chunk(parts), h.chunk(parts), strict=True))
        if not torch.equal(torch.cat([stage.compute(own) for own, _, _ in pieces]), h):
            return False
        if stage.feedback is not None:
            signals = [stage.error_signal(errors, own) for _, errors, own in pieces]
            if not torch.equal(torch.cat(signals), stage.error_signal(row, h)):
                return False
        x = h
    return True
