"""The folder of a store: who may use it, what may be made or removed there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ...base.exceptions import InputError
from ...base.text import readable_bytes, short
from .format import MANIFEST, ROWS_FILE, SPARE_FILE, TEMPORARY_FILE, Kind, Manifest, os_errors_named, read_manifest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SPARE_BYTES = 1 << 20  # for manifests, old and new


def loose_files(folder: Path, manifest: Manifest | None = None) -> list[str]:
    """Names of a store's files that are not those of a generation: spare, begun and not committed, temporary."""
    kept = {generation.file for generation in manifest.generations.values()} if manifest else set()
    patterns = (ROWS_FILE, SPARE_FILE, TEMPORARY_FILE)
    return sorted(name for name in os.listdir(folder) if name not in kept and any(p.fullmatch(name) for p in patterns))


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
    lock = lock_for_a_run(folder)
    try:
        read_manifest(folder)  # whatever else has such a name stays
        with os_errors_named(folder, "remove"):
            (folder / MANIFEST).unlink()
            for name in loose_files(folder):
                (folder / name).unlink()
    finally:
        os.close(lock)


def require_same(folder: Path, there: Kind, wanted: Kind) -> None:
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
            name = next(key for key in (*needed, *found) if found.get(key, "not said") != needed.get(key, "not said"))
            what, found, needed = f"the data set's {name}", found.get(name, "not said"), needed.get(name, "not said")
        raise InputError(
            f"error store {str(folder)!r} is of another run: {ascii(what)[1:-1]} is {short(found)} there, "
            f"and {short(needed)} here"
        )


def take_lock(folder: Path, shared: bool = False) -> int | None:
    """A descriptor that holds the lock of a store until it is closed; None where another process has it.

    Raises InputError where the folder cannot be locked at all.
    """
    if fcntl is None:
        raise InputError("error stores in files need a POSIX system; use the home 'memory'")
    with os_errors_named(folder, "open"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise InputError(f"error store {str(folder)!r} cannot be locked: {error.strerror}") from None
    return descriptor


def lock_for_a_run(folder: Path) -> int:
    """The lock, for the one run that may have it. Raises InputError where another has."""
    lock = take_lock(folder)
    if lock is None:
        raise InputError(f"error store {str(folder)!r} is in use by another run")
    return lock
