"""Which home a store gets."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.memory import available_memory
from ..base.text import readable_bytes
from .codecs import Codec
from .disk.file import FileStore
from .disk.folder import check_new
from .disk.format import Kind
from .memory import MemoryStore
from .store import ErrorStore, Rows

HOMES = ("auto", "device", "memory")


def is_folder(home: str | Path) -> bool:
    """Whether a home is a path and no word: a `Path`, or text with a slash in it or at its start a dot or a tilde."""
    return isinstance(home, Path) or (isinstance(home, str) and ("/" in home or os.sep in home or home[:1] in (".", "~")))


def pick_home(home: str | Path, needed: int, device: torch.device) -> str:
    """`device`, `memory` or a path; `auto` is the first of the two that has twice the bytes `needed` free.

    On a CPU the two are the same. Raises InputError where neither has, or the word is unknown.
    """
    if is_folder(home):
        return str(home)
    home = check_word("error store", home, HOMES, "and a folder, with a slash in its name: ./errors")
    if home == "auto":
        if device.type == "cuda" and 2 * needed < torch.cuda.mem_get_info(device)[0]:
            return "device"
        if device.type not in ("cpu", "cuda"):
            return "device"
        free = available_memory()
        if 2 * needed > free:
            raise InputError(
                f"the error store needs {readable_bytes(needed)}, and {readable_bytes(free)} of memory are free; "
                "give it a folder (--error-store PATH), or choose a smaller error dtype"
            )
        return "memory"
    return "memory" if device.type == "cpu" else home


def check_home(home: str, samples: int, codec: Codec) -> None:
    """Raise InputError where a new store of these rows cannot be made at a home that `pick_home` gave."""
    if is_folder(home):
        kind = Kind(samples, codec.width, codec.word, codec.row_bytes, None)
        check_new(Path(home).expanduser(), kind.file_bytes)


def make_store(home: str | Path, rows: Rows, generations: int = 2, resume: bool = False) -> ErrorStore:
    """A store at a home (see `pick_home`). In a folder: a new one, with space for so many `generations`.

    To `resume` is to open the store that is in the folder already; `restore` then goes to the state of a checkpoint. Raises
    InputError; see `FileStore`.
    """
    home = pick_home(home, rows.samples * rows.codec.row_bytes, rows.device)
    if is_folder(home):
        if resume:
            return FileStore.open(home, rows, generations=generations)
        return FileStore.create(home, rows, generations)
    return MemoryStore(rows, torch.device("cpu") if home == "memory" else rows.device)
