"""One run at a time in a folder. The lock is the system's own, on the folder itself, and goes with the process that has it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..base.exceptions import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None

_HELD: set[Path] = set()  # folders that this process has locked


class FolderLock:
    """The lock of `folder`, which is made where it is not there; held until `release`. A folder inside of one that is locked is
    locked with it.

    Raises InputError where another run has it, with its process id. Where the file system has no locks nothing is locked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._descriptor = folder.resolve(), None
        self.hold()

    def hold(self) -> None:
        """Take the lock; again, where the folder was removed since and made anew."""
        if fcntl is None or any(parent in _HELD for parent in self.folder.parents):
            return
        if self._descriptor is not None:
            if self.folder.exists() and os.path.samestat(self.folder.stat(), os.fstat(self._descriptor)):
                return
            self.release()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # whoever writes there will say why it cannot be
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = _holder(os.fstat(descriptor).st_ino)
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise InputError(f"folder {str(self.folder)!r} is in use by another run ({who})") from None
            return
        self._descriptor = descriptor
        _HELD.add(self.folder)

    def release(self) -> None:
        """Let go; nothing where nothing is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _HELD.discard(self.folder)


def _holder(inode: int) -> str:
    """Who has locked the file of that number, where the system says so."""
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except (OSError, ValueError):
        locks = ""
    found = re.search(rf"FLOCK .* (\d+) \w+:\w+:{inode} ", locks)
    return f"process {found[1]}" if found else "another process"
