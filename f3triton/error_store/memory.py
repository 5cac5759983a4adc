"""The rows as one tensor in the memory of a device, or of the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.exceptions import InputError
from .store import ErrorStore, Rows

FILL = 1 << 24  # bytes of rows that are made at a time, about


class MemoryStore(ErrorStore):
    """One row per sample. A row is read before it is written in the same visit, so one copy stands for two epochs'."""

    def __init__(self, rows: Rows, home: torch.device | None = None) -> None:
        super().__init__(rows)
        where = home or rows.device
        self.home = "memory" if where.type == "cpu" else "device"
        self.encoded = torch.empty(rows.samples, rows.codec.columns, dtype=rows.codec.storage, device=where)
        self.visited = torch.zeros(rows.samples, dtype=torch.bool, device=where)  # in this epoch
        step = max(1, FILL // (8 * rows.codec.width * rows.codec.positions))
        for start in range(0, rows.samples, step):
            index = torch.arange(start, min(start + step, rows.samples), device=rows.device)
            self.encoded[start : start + step] = rows.first(index)

    @property
    def rows(self) -> Tensor:
        """All rows as errors `[samples, C]`."""
        return self.codec.decode(self.encoded)

    @property
    def on_device(self) -> bool:
        return self.encoded.device == self.spec.device

    def read(self, index: Tensor) -> Tensor:
        if index.device != self.encoded.device:
            index = index.to(self.encoded.device)
        rows = self.encoded.index_select(0, index)
        if rows.device != self.spec.device:
            rows = rows.to(self.spec.device, non_blocking=True)
        return self.codec.decode(rows)

    def write(self, index: Tensor, errors: Tensor, target: Tensor | None = None) -> None:
        rows = self.spec.encode(index, errors, target)
        if index.device != self.encoded.device:
            index, rows = index.to(self.encoded.device), rows.to(self.encoded.device)
        self.encoded.index_copy_(0, index, rows)
        self.visited.index_fill_(0, index, True)

    def commit(self) -> int:
        carried = self.samples - int(self.visited.sum())
        self.visited.zero_()
        self.epoch += 1
        return carried

    def state(self) -> dict[str, Tensor]:
        return {"rows": self.encoded.cpu(), "visited": self.visited.cpu()}

    def restore(self, state: dict[str, Tensor], epoch: int) -> None:
        """Raises InputError where the state is of another store."""
        for name, mine in (("rows", self.encoded), ("visited", self.visited)):
            if name not in state or (state[name].shape, state[name].dtype) != (mine.shape, mine.dtype):
                raise InputError(f"the state does not belong to this error store: its {name}")
        self.encoded.copy_(state["rows"])
        self.visited.copy_(state["visited"])
        self.epoch = epoch
