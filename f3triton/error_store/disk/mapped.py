"""A generation's file as tensors."""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ...base.exceptions import InputError
from ...base.files import open_regular
from .format import ROWS_AT, Kind, os_errors_named

MAPPED_BYTES = 1 << 28  # of a file's pages that may be in this process's resident memory, about
AROUND = 1 << 16  # bytes that the system maps around one that is touched
PROBES = 8  # rows of a batch that are tried


class MappedRows:
    """The file of one generation: `rows [samples, columns]` and `written`, a bit for each, in memory that is the file."""

    def __init__(self, path: Path, kind: Kind, storage: torch.dtype, writable: bool) -> None:
        self.path, self.samples = path, kind.samples
        self.descriptor = open_regular(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            size = os.fstat(self.descriptor).st_size
            if size != kind.file_bytes:  # a mapping beyond a file's end is a crash on the first touch
                raise InputError(f"{str(path)!r} has {size:,} bytes, but its rows need {kind.file_bytes:,}")
            protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
            with os_errors_named(path, "map"):
                self.map = mmap.mmap(self.descriptor, size, mmap.MAP_SHARED, protection)
        except BaseException:
            os.close(self.descriptor)
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch cannot know that nothing writes to a read-only mapping
            all_bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.rows = all_bytes[ROWS_AT : kind.bitmap_at].view(storage).view(kind.samples, -1)
        self.written = all_bytes[kind.bitmap_at :]  # uint8 [ceil(samples / 8)], the first sample in the lowest bit
        self.row_bytes = kind.row_bytes
        self.touches = kind.row_bytes + AROUND if size > MAPPED_BYTES else 0  # bytes mapped for a row, at most
        self.touched = 0

    def gather(self, index: Tensor) -> Tensor:
        """The rows `[M, columns]` of the samples `index [M]`, copied."""
        self.touch(len(index))
        return self.rows.index_select(0, index)

    def scatter(self, index: Tensor, rows: Tensor) -> None:
        """Put `rows [M, columns]` in the places of the samples `index [M]`."""
        self.touch(len(index))
        self.rows.index_copy_(0, index, rows)

    def touch(self, rows: int) -> None:
        """Keep resident memory bounded: pages leave this process's tables, not the system's cache, and nothing is lost."""
        self.touched += rows * self.touches
        if self.touched > MAPPED_BYTES:
            self.forget()

    def will_need(self, index: Tensor) -> None:
        """Ask the system to read the rows of the samples `index [M]` from disk, all at once, where they are not in memory.

        A page that is not there costs a visit to the disk when it is touched, one page after the other: 150 us each on the
        disk of `bench.error_store`, and 25 us when they were asked for together before.
        """
        if self._on_disk(index[:: max(1, len(index) // PROBES)]):
            for sample in index.tolist():
                os.posix_fadvise(self.descriptor, self._at(sample), self.row_bytes, os.POSIX_FADV_WILLNEED)

    def _on_disk(self, index: Tensor) -> bool:
        """Whether one of these rows is not in the system's cache; False where the system cannot say."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        byte = bytearray(1)
        try:
            for sample in index.tolist():
                os.preadv(self.descriptor, [byte], self._at(sample), os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:  # the file system does not know the flag
            return False
        return False

    def _at(self, sample: int) -> int:
        return ROWS_AT + sample * self.row_bytes

    def forget(self) -> None:
        """Leave no page of the file in this process's tables."""
        self.touched = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def sync(self) -> None:
        """Return when all of the file is on disk. Raises InputError where it cannot be put there; that is not tried again."""
        with os_errors_named(self.path, "write"):
            self.map.flush()
            os.fsync(self.descriptor)

    def close(self) -> None:
        """The mapping itself goes with the last tensor that looks into it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1
        del self.rows, self.written, self.map
