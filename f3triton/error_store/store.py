"""What every store of delayed errors can do, wherever it keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .codecs import Codec


@dataclass(frozen=True)
class Rows:
    """What is kept: a row of `codec` for each of `samples`, read and written on `device`.

    `targets(index [M])` gives `[M, R]` on that device (see `ErrorStore`): the rows of the first visit, which makes the first
    epoch DRTP.
    `data` identifies the data set (see `data.identity`).
    """

    samples: int
    codec: Codec
    device: torch.device
    targets: Callable[[Tensor], Tensor]
    data: dict[str, object] | None = None

    def encode(self, index: Tensor, errors: Tensor, target: Tensor | None = None) -> Tensor:
        """Rows `[M, columns]` for `errors [M, R]` of the samples `index [M]`, whose targets are `target [M, C]`."""
        if self.codec.needs_target and target is None:
            target = self.targets(index)
        return self.codec.encode(errors, target, index if self.codec.needs_index else None)

    def first(self, index: Tensor) -> Tensor:
        """The rows `[M, columns]` of samples that were never visited: their targets."""
        target = self.targets(index)
        return self.codec.encode(target, target, index)


class ErrorStore:
    """The error row that each sample left at its last visit, `[samples, R]`.

    R is the number of outputs C, or the rank of errors that are kept as `e R`. A sample of T positions (a text window of T
    tokens) has as many errors: wherever it says `[M, R]` or `[M, C]` for M samples, there are `M T` lines then, in the order of
    the samples and within each in that of its tokens.

    Epoch t reads the rows of epoch t-1 (at first: the targets) and writes its own; a sample visited twice in an epoch
    reads what its first visit wrote. A row that an epoch did not write is carried forward, and counted.
    """

    home: str
    epoch = 0  # the one under way

    def __init__(self, rows: Rows) -> None:
        self.spec = rows
        self.samples, self.width, self.codec = rows.samples, rows.codec.width, rows.codec

    @property
    def bytes_per_sample(self) -> int:
        return self.codec.row_bytes

    @property
    def bytes(self) -> int:
        """Of the rows of one epoch."""
        return self.samples * self.codec.row_bytes

    def read(self, index: Tensor) -> Tensor:
        """The errors `[M, R]` that the samples `index [M]` (int64) left at their last visit, on the learner's device."""
        raise NotImplementedError

    def write(self, index: Tensor, errors: Tensor, target: Tensor | None = None) -> None:
        """Keep `errors [M, R]` for the next visit of the samples `index [M]`, whose targets are `target [M, C]`."""
        raise NotImplementedError

    def as_kept(self, index: Tensor, errors: Tensor, target: Tensor) -> Tensor:
        """What reading `[M, R]` would give after `errors [M, R]` were written."""
        return self.codec.decode(self.spec.encode(index, errors, target))

    @property
    def on_device(self) -> bool:
        """Whether reading and writing need the device only, so that they can be part of a CUDA graph."""
        return False

    @property
    def reads_ahead(self) -> bool:
        """Whether `plan` takes batches long before their turn, and wants them on the host."""
        return False

    def plan(self, batches: Iterable[Tensor], device: torch.device) -> Iterable[Tensor]:
        """The same batches of sample indices `[M]` in the same order, on `device`, to learn from; a store may look ahead."""
        return (index.to(device) for index in batches)

    def commit(self) -> int:
        """End the epoch: what it wrote is what the next one reads, and in a file is safe from a crash from now on.

        Returns how many rows were not written, and carried forward.
        """
        raise NotImplementedError

    def release(self, epoch: int) -> None:
        """Nobody will go back to an epoch before `epoch`; what only they would read may go."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the store, by name, on the host; for `restore`."""
        raise NotImplementedError

    def restore(self, state: dict[str, Tensor], epoch: int) -> None:
        """Go back to a `state` that was taken in `epoch`."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back files and threads; the store cannot be used any more."""

    def describe(self) -> dict[str, object]:
        """Home, error dtype and bytes, for reports."""
        return {
            "home": self.home,
            "error_dtype": self.codec.word,
            "bytes": self.bytes,
            "bytes_per_sample": self.bytes_per_sample,
        }
