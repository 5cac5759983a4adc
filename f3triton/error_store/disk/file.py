"""The rows as memory-mapped files: more of them than memory holds, and still there after a crash.

Every epoch has a file of its own. That of the last epoch is only read, that of this one is written; at the epoch's end the
new file is put on disk, then named in the manifest, and only then read. A crash at any moment leaves the generation before.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...base.exceptions import InputError
from ...base.faults import fault
from ...base.files import open_regular
from ...base.text import readable_bytes
from ..store import ErrorStore, Rows
from . import mapped
from .ahead import Ahead
from .folder import check_new, lock_for_a_run, loose_files, require_same
from .format import (
    CHUNK,
    Generation,
    Kind,
    Manifest,
    check_file,
    header,
    os_errors_named,
    read_manifest,
    rows_file,
    sync_folder,
    verify,
    write_manifest,
)
from .mapped import MappedRows

# In the order in which an epoch of a store in a file meets them.
STORE_LABELS = (
    "store:begin",  # a file is about to become that of the epoch which begins
    "store:begun",  # its header is written
    "store:wrote",  # rows of a batch are written
    "store:commit",  # the epoch's end
    "store:carried",  # rows that had no visit are copied
    "store:data-synced",
    "store:manifest-written",  # under its temporary name
    "store:manifest-synced",
    "store:manifest-renamed",
    "store:folder-synced",
    "store:committed",  # the next epoch reads what this one wrote
    "store:release",  # older generations are about to leave the manifest, which is written as above
    "store:released",  # they are spare files
)


class FileStore(ErrorStore):
    """A store in a folder, from `create` or `open`. One run at a time; the folder is locked until `close`.

    Of the generations before the last, those are kept to which somebody may go back, by `open` or `restore` with an epoch:
    `release` says which are not needed any more. Files that are not needed are kept for epochs to come.
    """

    def __init__(self, folder: Path, rows: Rows, manifest: Manifest, lock: int, files: int) -> None:
        """Use `create` or `open`. `files`: how many generations there is always space for."""
        super().__init__(rows)
        self.home, self.folder, self.files = str(folder), folder, files
        self.manifest, self.kind = manifest, manifest.kind
        self.unlock = weakref.finalize(self, os.close, lock)
        self.spares: list[str] = []
        self.previous: MappedRows | None = None  # None before the first epoch's end: the targets
        self.current: MappedRows | None = None  # from the first write on
        self.ahead: Ahead | None = None  # from the first plan on
        self.visited = torch.zeros(self.samples, dtype=torch.bool)  # in this epoch

    @classmethod
    def create(cls, path: str | Path, rows: Rows, generations: int = 2) -> FileStore:
        """A new store in the folder `path`, made if needed, with space for `generations` (at least 2) on disk.

        Raises InputError where there is a store already, or no space, or no permission; then nothing is left behind.
        """
        folder = Path(path).expanduser()
        kind = _kind_of(rows)
        header(kind, 0)  # raises where it has no room
        made = not folder.exists()
        with os_errors_named(folder, "create the folder"):
            folder.mkdir(parents=True, exist_ok=True)
        store = None
        try:
            check_new(folder, kind.file_bytes, generations)
            store = cls(folder, rows, Manifest(kind), lock_for_a_run(folder), max(2, generations))
            store._tidy()
            write_manifest(folder, store.manifest)
        except BaseException:
            if store is not None:
                store.close()
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        return store

    @classmethod
    def open(cls, path: str | Path, rows: Rows, epoch: int | None = None, generations: int = 2) -> FileStore:
        """The store in the folder `path`, to go on at the beginning of `epoch`: by default the one after the last commit.

        Generations from `epoch` on are dropped. Raises InputError, and changes nothing, where the store is of another data
        set or codec, is damaged, is in use, or does not keep the generation that `epoch` reads.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise InputError(f"error store {str(folder)!r} does not exist")
        lock = lock_for_a_run(folder)
        try:
            manifest = read_manifest(folder)
            require_same(folder, manifest.kind, _kind_of(rows))
        except BaseException:
            os.close(lock)
            raise
        store = cls(folder, rows, manifest, lock, max(2, generations))
        try:
            store._go_to(max(manifest.generations, default=-1) + 1 if epoch is None else epoch)
        except BaseException:
            store.unlock()
            raise
        return store

    # --- rows ---

    @property
    def rows(self) -> Tensor:
        """All rows as errors `[samples, C]`, in memory."""
        return self.read(torch.arange(self.samples))

    @property
    def reads_ahead(self) -> bool:
        return True

    def plan(self, batches: Iterable[Tensor], device: torch.device) -> Iterable[Tensor]:
        """Reads the rows of batches to come, and writes those of batches gone by, while a step runs; see `ahead`."""
        if self.ahead is None:
            ask = self._will_need if self.kind.file_bytes > mapped.MAPPED_BYTES else None
            self.ahead = Ahead(self.samples, ask, self._stored, self._put)
        return self.ahead.plan(batches, device)

    def read(self, index: Tensor) -> Tensor:
        if self._is_now(index):
            rows, unvisited = self.ahead.read()
        else:
            self._drain()
            rows, unvisited = self._stored(index.cpu())
        device = self.spec.device
        if rows is not None:
            rows = rows.to(device, non_blocking=True)
        if unvisited is not None:  # never in an epoch but the first
            first = self.spec.first(index.to(device))
            rows = first if rows is None else torch.where(unvisited.to(device)[:, None], first, rows)
        return self.codec.decode(rows)

    def write(self, index: Tensor, errors: Tensor, target: Tensor | None = None) -> None:
        rows = self.spec.encode(index, errors, target)
        if not self._is_now(index):
            self._drain()
            self._put(index.cpu(), rows.cpu())
            return
        if rows.data_ptr() == errors.data_ptr():
            rows = rows.clone()  # it is written later
        self.ahead.write(rows)

    def _is_now(self, index: Tensor) -> bool:
        """Whether it is the batch of the plan whose turn it is; others are read and written at once."""
        return self.ahead is not None and self.ahead.now is not None and self.ahead.now.index is index

    def _drain(self) -> None:
        if self.ahead is not None:
            self.ahead.drain()

    def _stored(self, there: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(rows `[M, columns]`, which of them are not there `[M]`) of the samples `there [M]`; None for none of them.

        What is not there are the targets, before the first epoch's end.
        """
        visited = self.visited.index_select(0, there)  # [M]
        if self.previous is None:
            if not visited.any():
                return None, ~visited
            return self._written().gather(there), None if visited.all() else ~visited
        if visited.all() and len(there):
            return self._written().gather(there), None
        rows = self.previous.gather(there)
        if visited.any():
            rows[visited] = self._written().gather(there[visited])
        return rows, None

    def _will_need(self, there: Tensor) -> None:
        for file in (self.previous, self.current):
            if file is not None:
                file.will_need(there)

    def _put(self, there: Tensor, rows: Tensor) -> None:
        self._written().scatter(there, rows)
        self.visited.index_fill_(0, there, True)
        fault("store:wrote")

    def _written(self) -> MappedRows:
        """The file of the epoch under way, which is made at its first write."""
        if not self.unlock.alive:
            raise RuntimeError(f"the error store {self.home!r} is closed")
        if self.current is None:
            fault("store:begin")
            self._reserve(1)
            name = rows_file(self.epoch)
            path = self.folder / name
            with os_errors_named(path, "make"):
                (self.folder / self.spares.pop(0)).rename(path)
                descriptor = open_regular(path, os.O_RDWR)
                try:
                    os.pwrite(descriptor, header(self.kind, self.epoch), 0)
                finally:
                    os.close(descriptor)
            self.current = MappedRows(path, self.kind, self.codec.storage, writable=True)
            fault("store:begun")
        return self.current

    # --- generations ---

    def commit(self) -> int:
        self._drain()
        current = self._written()
        fault("store:commit")
        carried = 0
        for missing in (~self.visited).nonzero()[:, 0].split(max(1, CHUNK // self.kind.row_bytes)):
            if not len(missing):
                continue
            if self.previous is not None:
                rows = self.previous.gather(missing)
            else:
                rows = self.spec.first(missing.to(self.spec.device)).cpu()
            current.scatter(missing, rows)
            carried += len(missing)
        current.written.copy_(torch.from_numpy(np.packbits(self.visited.numpy(), bitorder="little")))
        fault("store:carried")
        current.sync()
        fault("store:data-synced")
        name = rows_file(self.epoch)
        crc = check_file(self.folder / name, self.kind, self.epoch)
        generation = Generation(self.epoch, name, self.kind.file_bytes, crc, carried)
        self._write_manifest({**self.manifest.generations, self.epoch: generation})
        self._close_files()
        self.previous = MappedRows(self.folder / name, self.kind, self.codec.storage, writable=False)
        self.visited.zero_()
        self.epoch += 1
        fault("store:committed")
        return carried

    def release(self, epoch: int) -> None:
        old = [g for g in self.manifest.generations.values() if g.epoch < min(epoch, self.epoch) - 1]
        if old:
            fault("store:release")
            self._drop(old)
            fault("store:released")

    def state(self) -> dict[str, Tensor]:
        """The rows that this epoch has written so far, and which they are; those of epochs before are in their files."""
        self._drain()
        there = self.visited.nonzero()[:, 0]
        rows = self._written().gather(there) if len(there) else torch.empty(0, self.codec.columns, dtype=self.codec.storage)
        return {"rows": rows, "visited": self.visited.clone()}

    def restore(self, state: dict[str, Tensor], epoch: int) -> None:
        """Raises InputError where the state is of another store, or the generation before `epoch` is not kept."""
        rows, visited = state.get("rows"), state.get("visited")
        fits = visited is not None and visited.shape == (self.samples,) and visited.dtype == torch.bool
        fits = fits and rows is not None and rows.shape == (int(visited.sum()), self.codec.columns)
        if not fits or rows.dtype != self.codec.storage:
            raise InputError(f"the state does not belong to the error store {self.home!r}")
        self._go_to(epoch)
        if len(rows):
            self._written().scatter(visited.nonzero()[:, 0], rows)
            self.visited.copy_(visited)

    def close(self) -> None:
        """Give back the lock and all files but those of the generations that are kept; what was not committed is lost."""
        if not self.unlock.alive:
            return
        if self.ahead is not None:
            self.ahead.close()
        self._close_files()
        with contextlib.suppress(OSError):
            for name in loose_files(self.folder, self.manifest):
                (self.folder / name).unlink(missing_ok=True)
        self.unlock()

    def describe(self) -> dict[str, object]:
        waited = 0.0 if self.ahead is None else round(self.ahead.waited, 3)
        return {**super().describe(), "generations": sorted(self.manifest.generations), "waited_seconds": waited}

    def _go_to(self, epoch: int) -> None:
        """To the beginning of `epoch`, after everything that it needs has been checked."""
        before = self.manifest.generations.get(epoch - 1)
        if epoch < 0 or (epoch > 0 and before is None):
            kept = ", ".join(map(str, sorted(self.manifest.generations))) or "none"
            raise InputError(f"error store {self.home!r} cannot go to epoch {epoch}; it keeps the rows of epochs: {kept}")
        if before is not None and (self.previous is None or self.epoch != epoch):
            verify(self.folder, self.kind, before)
        self._drain()
        self._close_files()
        self._drop([g for g in self.manifest.generations.values() if g.epoch >= epoch])
        self._tidy()
        if before is not None:
            self.previous = MappedRows(self.folder / before.file, self.kind, self.codec.storage, writable=False)
        self.visited.zero_()
        self.epoch = epoch

    def _close_files(self) -> None:
        for file in (self.previous, self.current):
            if file is not None:
                file.close()
        self.previous = self.current = None

    def _write_manifest(self, generations: dict[int, Generation]) -> None:
        manifest = Manifest(self.kind, generations)
        write_manifest(self.folder, manifest)
        self.manifest = manifest

    # --- files that no generation needs ---

    def _drop(self, old: list[Generation]) -> None:
        """These generations leave the manifest; after that, their files are free."""
        if not old:
            return
        gone = {generation.epoch for generation in old}
        self._write_manifest({e: g for e, g in self.manifest.generations.items() if e not in gone})
        for generation in old:
            self._free(generation.file)

    def _free(self, name: str) -> None:
        """Keep a file's space for an epoch to come, where there is not enough of it yet."""
        with os_errors_named(self.folder / name, "free"):
            in_use = len(self.manifest.generations) + (self.current is not None)
            if in_use + len(self.spares) >= self.files:
                (self.folder / name).unlink()
                return
            spare = next(s for n in range(10**6) if not os.path.lexists(self.folder / (s := f"spare-{n}.f3e")))
            (self.folder / name).rename(self.folder / spare)
            self.spares.append(spare)

    def _tidy(self) -> None:
        """Clear away what an earlier run left half-done, and see that there is space for all the files that will be needed."""
        with os_errors_named(self.folder, "tidy"):
            for name in loose_files(self.folder, self.manifest):
                (self.folder / name).unlink()
            self.spares.clear()
        self._reserve(self.files - len(self.manifest.generations))

    def _reserve(self, files: int) -> None:
        """Have at least so many spare files, with all of their space: a full disk is found now, and not by a crash later."""
        while len(self.spares) < files:
            name = next(s for n in range(10**6) if not os.path.lexists(self.folder / (s := f"spare-{n}.f3e")))
            path = self.folder / name
            try:
                with open(path, "xb") as file:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, self.kind.file_bytes)
                    else:  # macOS: bytes are the only way to be sure
                        for start in range(0, self.kind.file_bytes, CHUNK):
                            file.write(bytes(min(CHUNK, self.kind.file_bytes - start)))
            except OSError as error:
                path.unlink(missing_ok=True)
                needed = readable_bytes(self.kind.file_bytes)
                raise InputError(
                    f"error store {self.home!r} cannot reserve {needed} for a generation of rows: {error.strerror}; free some "
                    "space, choose another folder or a smaller error dtype"
                ) from None
            self.spares.append(name)
        sync_folder(self.folder)


def _kind_of(rows: Rows) -> Kind:
    return Kind(rows.samples, rows.codec.width, rows.codec.word, rows.codec.row_bytes, rows.data)
