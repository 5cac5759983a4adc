"""The error store and its peers, each with the same few methods, used as its own documentation advises.

Two generations of float16 rows `[samples, width]`: `read` gives those of the old one as float32, `write` puts float32 rows
into the new one. `prepare` fills the old one, `begin` opens both with the new one empty. Conversions are torch's, everywhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from f3triton.error_store import FileStore, Rows, make_codec

CHUNK = 1 << 14  # rows at a time, while the files are filled


def make_rows(index: Tensor, width: int) -> Tensor:
    """Rows `[M, width]` that tell which sample they are of, and are exact in float16."""
    return ((index[:, None] * 7 + torch.arange(width)) % 2048).float()


class Provider:
    """Batches one after the other; the peers' way."""

    def __init__(self, folder: Path, samples: int, width: int) -> None:
        self.folder, self.samples, self.width = folder, samples, width
        folder.mkdir(parents=True, exist_ok=True)

    def chunks(self) -> Iterable[tuple[int, np.ndarray]]:
        """(first sample, float16 rows) of the old generation."""
        for start in range(0, self.samples, CHUNK):
            index = torch.arange(start, min(start + CHUNK, self.samples))
            yield start, make_rows(index, self.width).half().numpy()

    def plan(self, batches: Iterable[Tensor]) -> Iterable[Tensor]:
        return batches

    def drain(self) -> None:
        """Return when all that was written is where a reader would find it."""

    def check(self, index: Tensor, rows: Tensor) -> None:
        """Raise AssertionError where the new rows of the last batch are not what was written."""
        raise NotImplementedError

    def end(self) -> None:
        """Close, and remove the new generation."""


class Store(Provider):
    """The error store, one batch after the other."""

    def rows(self) -> Rows:
        codec = make_codec("float16", self.width, torch.float32)
        return Rows(self.samples, codec, torch.device("cpu"), lambda index: torch.zeros(len(index), self.width))

    def prepare(self) -> None:
        store = FileStore.create(self.folder / "store", self.rows())
        for start, rows in self.chunks():
            store.write(torch.arange(start, start + len(rows)), torch.from_numpy(rows).float())
        store.commit()
        store.close()

    def begin(self) -> None:
        self.store = FileStore.open(self.folder / "store", self.rows())

    def read(self, index: Tensor) -> Tensor:
        return self.store.read(index)

    def write(self, index: Tensor, rows: Tensor) -> None:
        self.store.write(index, rows)

    def check(self, index: Tensor, rows: Tensor) -> None:
        assert torch.equal(self.store.read(index.clone()), rows)

    def end(self) -> None:
        self.store.close()


class StoreAhead(Store):
    """The error store as training uses it: the order is known."""

    def plan(self, batches: Iterable[Tensor]) -> Iterable[Tensor]:
        return self.store.plan(batches, torch.device("cpu"))

    def drain(self) -> None:
        self.store.ahead.drain()


class Memmap(Provider):
    """`numpy.memmap`, the shape known, indexed by arrays."""

    def open(self, name: str, mode: str) -> np.memmap:
        return np.memmap(self.folder / name, np.float16, mode, shape=(self.samples, self.width))

    def prepare(self) -> None:
        old = self.open("old", "w+")
        for start, rows in self.chunks():
            old[start : start + len(rows)] = rows
        old.flush()

    def begin(self) -> None:
        self.old, self.new = self.open("old", "r"), self.open("new", "w+")

    def read(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self.old[index.numpy()]).float()

    def write(self, index: Tensor, rows: Tensor) -> None:
        self.new[index.numpy()] = rows.half().numpy()

    def check(self, index: Tensor, rows: Tensor) -> None:
        assert (self.new[index.numpy()] == rows.numpy()).all()

    def end(self) -> None:
        (self.folder / "new").unlink()


class Hdf5(Provider):
    """h5py: contiguous data sets, indexed by sorted lists, which is all that it takes."""

    def open(self, name: str, mode: str) -> object:
        import h5py

        file = h5py.File(self.folder / name, mode)
        return file["rows"] if mode == "r" else file.create_dataset("rows", (self.samples, self.width), np.float16)

    def prepare(self) -> None:
        old = self.open("old", "w")
        for start, rows in self.chunks():
            old[start : start + len(rows)] = rows
        old.file.close()

    def begin(self) -> None:
        self.old, self.new = self.open("old", "r"), self.open("new", "w")

    def read(self, index: Tensor) -> Tensor:
        there, order = index.sort()
        rows = torch.empty(len(index), self.width, dtype=torch.float16)
        rows[order] = torch.from_numpy(self.old[there.numpy()])
        return rows.float()

    def write(self, index: Tensor, rows: Tensor) -> None:
        there, order = index.sort()
        self.new[there.numpy()] = rows[order].half().numpy()

    def drain(self) -> None:
        self.new.file.flush()

    def check(self, index: Tensor, rows: Tensor) -> None:
        self.old, old = self.new, self.old
        assert torch.equal(self.read(index), rows)
        self.old = old

    def end(self) -> None:
        self.old.file.close()
        self.new.file.close()
        (self.folder / "new").unlink()


class Zarr(Provider):
    """zarr: 64 rows a chunk, not compressed, indexed by `oindex`."""

    ROWS = 64

    def create(self, name: str) -> object:
        import zarr

        shape, chunks = (self.samples, self.width), (self.ROWS, self.width)
        return zarr.create_array(self.folder / name, shape=shape, chunks=chunks, dtype="float16", compressors=None)

    def prepare(self) -> None:
        old = self.create("old")
        for start, rows in self.chunks():
            old[start : start + len(rows)] = rows

    def begin(self) -> None:
        import zarr

        self.old, self.new = zarr.open_array(self.folder / "old", mode="r"), self.create("new")

    def read(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self.old.oindex[index.numpy()]).float()

    def write(self, index: Tensor, rows: Tensor) -> None:
        self.new.oindex[index.numpy()] = rows.half().numpy()

    def check(self, index: Tensor, rows: Tensor) -> None:
        assert (self.new.oindex[index.numpy()] == rows.numpy()).all()

    def end(self) -> None:
        shutil.rmtree(self.folder / "new")


class Lmdb(Provider):
    """LMDB: a key for each row, a transaction for each batch, no sync before the end."""

    def open(self, name: str, **settings: object) -> object:
        import lmdb

        size = 4 * self.samples * (self.width * 2 + 64) + (1 << 26)
        return lmdb.open(str(self.folder / name), map_size=size, sync=False, **settings)

    def keys(self, index: Tensor) -> list[bytes]:
        return [number.to_bytes(4, "big") for number in index.tolist()]

    def prepare(self) -> None:
        old = self.open("old")
        for start, rows in self.chunks():
            with old.begin(write=True) as transaction, transaction.cursor() as cursor:
                keys = self.keys(torch.arange(start, start + len(rows)))
                cursor.putmulti(zip(keys, map(bytes, rows), strict=True), append=True)
        old.sync(True)
        old.close()

    def begin(self) -> None:
        self.old, self.new = self.open("old", readonly=True, readahead=False), self.open("new")

    def read(self, index: Tensor) -> Tensor:
        with self.old.begin(buffers=True) as transaction:
            parts = b"".join(map(transaction.get, self.keys(index)))
        return torch.from_numpy(np.frombuffer(parts, np.float16).reshape(len(index), -1)).float()

    def write(self, index: Tensor, rows: Tensor) -> None:
        with self.new.begin(write=True) as transaction:
            for key, row in zip(self.keys(index), rows.half().numpy(), strict=True):
                transaction.put(key, row.tobytes())

    def check(self, index: Tensor, rows: Tensor) -> None:
        self.old, old = self.new, self.old
        assert torch.equal(self.read(index), rows)
        self.old = old

    def end(self) -> None:
        self.old.close()
        self.new.close()
        shutil.rmtree(self.folder / "new")


PROVIDERS = {
    "error store": StoreAhead,
    "error store in turn": Store,
    "numpy memmap": Memmap,
    "h5py": Hdf5,
    "zarr": Zarr,
    "lmdb": Lmdb,
}
