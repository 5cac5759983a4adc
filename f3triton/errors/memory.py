"""The delayed errors of a data set as one tensor, `[samples, C]`, in the memory of a device."""

from __future__ import annotations

import torch
from torch import Tensor


class MemoryStore:
    """One error row per sample. A row is read before it is written in the same visit, so one copy is enough.

    `initial [samples, C]` are the rows of the first visit: the targets, by which the first epoch equals DRTP.
    """

    def __init__(self, initial: Tensor) -> None:
        self.rows = initial.clone()  # [samples, C]

    def read(self, index: Tensor) -> Tensor:
        """The rows `[batch, C]` that the samples `index [batch]` left at their last visit."""
        return self.rows.index_select(0, index)

    def write(self, index: Tensor, errors: Tensor) -> None:
        """Keep `errors [batch, C]` for the next visit of the samples `index [batch]`."""
        self.rows.index_copy_(0, index, errors)

    @property
    def bytes(self) -> int:
        """Memory taken by the rows."""
        return self.rows.numel() * torch.finfo(self.rows.dtype).bits // 8
