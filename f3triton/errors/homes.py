"""Which home a store gets."""

from __future__ import annotations

import os

import torch

from ..budget import readable_bytes
from ..exceptions import InputError
from ..words import check_word
from .memory import MemoryStore
from .store import ErrorStore, Rows

HOMES = ("auto", "device", "memory")


def pick_home(home: str, needed: int, device: torch.device) -> str:
    """`device` or `memory`; `auto` is the first that has twice the bytes `needed` free. On a CPU the two are the same.

    Raises InputError where neither has.
    """
    home = check_word("error store", home, HOMES)
    if home == "auto":
        if device.type == "cuda" and 2 * needed < torch.cuda.mem_get_info(device)[0]:
            return "device"
        if device.type not in ("cpu", "cuda"):
            return "device"
        free = available_memory()
        if 2 * needed > free:
            raise InputError(
                f"the error store needs {readable_bytes(needed)}, and {readable_bytes(free)} of memory are free; "
                "choose a smaller error dtype"
            )
        return "memory"
    return "memory" if device.type == "cpu" else home


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping; all there is, where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


def make_store(home: str, rows: Rows) -> ErrorStore:
    """The store of a home that `pick_home` gave."""
    return MemoryStore(rows, torch.device("cpu") if home == "memory" else rows.device)
