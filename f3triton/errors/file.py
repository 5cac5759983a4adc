"""The rows as memory-mapped files: more of them than memory holds, and still there after a crash.

Every epoch has a file of its own. That of the last epoch is only read, that of this one is written; at the epoch's end the
new file is put on disk, then named in the manifest, and only then read. A crash at any moment leaves the generation before.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import warnings
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..budget import readable_bytes
from ..exceptions import InputError
from .faults import fault
from .format import (
    CHUNK,
    MANIFEST,
    ROWS_AT,
    ROWS_FILE,
    SPARE_FILE,
    TEMPORARY_FILE,
    Generation,
    Kind,
    Manifest,
    check_file,
    header,
    open_regular,
    os_errors_named,
    read_manifest,
    rows_file,
    sync_folder,
    verify,
    write_manifest,
)
from .store import ErrorStore, Rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SPARE_BYTES = 1 << 20  # for manifests, old and new
MAPPED_BYTES = 1 << 28  # of a file's pages that may be in this process's resident memory, about


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
        self.row_pages = 2 + kind.row_bytes // mmap.PAGESIZE if size > MAPPED_BYTES else 0  # of a row, at most
        self.touched = 0

    def gather(self, index: Tensor) -> Tensor:
        """The rows `[M, columns]` of the samples `index [M]`, copied."""
        self._touch(len(index))
        return self.rows.index_select(0, index)

    def scatter(self, index: Tensor, rows: Tensor) -> None:
        """Put `rows [M, columns]` in the places of the samples `index [M]`."""
        self._touch(len(index))
        self.rows.index_copy_(0, index, rows)

    def _touch(self, rows: int) -> None:
        """Keep resident memory bounded: pages leave this process's tables, not the system's cache, and nothing is lost."""
        self.touched += rows * self.row_pages * mmap.PAGESIZE
        if self.touched > MAPPED_BYTES:
            self.forget()

    def forget(self) -> None:
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
            store = cls(folder, rows, Manifest(kind), _lock(folder), max(2, generations))
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
        lock = _lock(folder)
        try:
            manifest = read_manifest(folder)
            _require_same(folder, manifest.kind, _kind_of(rows))
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

    def read(self, index: Tensor) -> Tensor:
        there = index.cpu()
        visited = self.visited.index_select(0, there)  # [M]
        if visited.all() and len(there):
            rows = self._written().gather(there)
        elif self.previous is not None:
            rows = self.previous.gather(there)
            if visited.any():
                rows[visited] = self._written().gather(there[visited])
        else:
            rows = self.spec.first(index.to(self.spec.device))
            if visited.any():
                rows[visited.to(rows.device)] = self._written().gather(there[visited]).to(rows.device)
        return self.codec.decode(rows.to(self.spec.device))

    def write(self, index: Tensor, errors: Tensor) -> None:
        rows = self.spec.encode(index, errors)
        there = index.cpu()
        self._written().scatter(there, rows.cpu())
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
        self._close_files()
        with contextlib.suppress(OSError):
            for name in self._loose_files():
                (self.folder / name).unlink(missing_ok=True)
        self.unlock()

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "generations": sorted(self.manifest.generations)}

    def _go_to(self, epoch: int) -> None:
        """To the beginning of `epoch`, after everything that it needs has been checked."""
        before = self.manifest.generations.get(epoch - 1)
        if epoch < 0 or (epoch > 0 and before is None):
            kept = ", ".join(map(str, sorted(self.manifest.generations))) or "none"
            raise InputError(f"error store {self.home!r} cannot go to epoch {epoch}; it keeps the rows of epochs: {kept}")
        if before is not None and (self.previous is None or self.epoch != epoch):
            verify(self.folder, self.kind, before)
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

    def _loose_files(self) -> list[str]:
        """Names of the store's files that are not those of a generation: spare, begun and not committed, temporary."""
        kept = {generation.file for generation in self.manifest.generations.values()}
        patterns = (ROWS_FILE, SPARE_FILE, TEMPORARY_FILE)
        return sorted(n for n in os.listdir(self.folder) if n not in kept and any(p.fullmatch(n) for p in patterns))

    def _tidy(self) -> None:
        """Clear away what an earlier run left half-done, and see that there is space for all the files that will be needed."""
        with os_errors_named(self.folder, "tidy"):
            for name in self._loose_files():
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


def check_new(folder: Path, file_bytes: int, generations: int = 2) -> None:
    """Raise InputError where no new store can be made in `folder`, as far as that can be told without writing."""
    if os.path.lexists(folder / MANIFEST):
        raise InputError(f"error store {str(folder)!r} exists already ({MANIFEST}); choose another folder, or remove it")
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise InputError(f"error store {str(folder)!r} cannot be made: {str(there)!r} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"error store {str(folder)!r} cannot be made: {str(there)!r} cannot be written")
    needed, free = max(2, generations) * file_bytes + SPARE_BYTES, shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"error store {str(folder)!r} needs {readable_bytes(needed)} for {max(2, generations)} generations of rows, and "
            f"{readable_bytes(free)} are free; free some space, choose another folder or a smaller error dtype"
        )


def remove_store(path: str | Path) -> None:
    """Remove the files of the store in the folder `path`, if there is one; the manifest goes first. Raises InputError."""
    folder = Path(path).expanduser()
    if not os.path.lexists(folder / MANIFEST):
        return
    lock = _lock(folder)
    try:
        read_manifest(folder)  # whatever else has such a name stays
        with os_errors_named(folder, "remove"):
            (folder / MANIFEST).unlink()
            for name in os.listdir(folder):
                if any(pattern.fullmatch(name) for pattern in (ROWS_FILE, SPARE_FILE, TEMPORARY_FILE)):
                    (folder / name).unlink()
    finally:
        os.close(lock)


def _kind_of(rows: Rows) -> Kind:
    return Kind(rows.samples, rows.codec.width, rows.codec.word, rows.codec.row_bytes, rows.data)


def _require_same(folder: Path, there: Kind, wanted: Kind) -> None:
    """Raise InputError, naming the difference, where a store holds other rows than the run needs."""
    for what, found, needed in (
        ("the data set's identity", there.data, wanted.data),
        ("samples", there.samples, wanted.samples),
        ("entries in a row", there.width, wanted.width),
        ("error dtype", there.codec, wanted.codec),
    ):
        if found == needed:
            continue
        if isinstance(found, dict) and isinstance(needed, dict):
            name = next(key for key in (*needed, *found) if found.get(key) != needed.get(key))
            what, found, needed = f"the data set's {name}", found.get(name), needed.get(name)
        raise InputError(f"error store {str(folder)!r} is of another run: {what} is {found!r} there, and {needed!r} here")


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock of a store until it is closed. Raises InputError where a run has it."""
    if fcntl is None:
        raise InputError("error stores in files need a POSIX system; use the home 'memory'")
    with os_errors_named(folder, "open"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        busy = isinstance(error, BlockingIOError)
        reason = "is in use by another run" if busy else f"cannot be locked: {error.strerror}"
        raise InputError(f"error store {str(folder)!r} {reason}") from None
    return descriptor
