"""One case of a fuzzer in a process of its own: bounded memory and time, and what it may end in."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

MEMORY = 2 << 30  # bytes that a case may take beside what the process has mapped already
SECONDS = 20.0
LONGEST = 2000  # characters of a message


class Outcome(NamedTuple):
    """How a case ended; `wrong` says what must not be, and is empty for a good run and for one line with exit code 2."""

    code: int  # the exit code, or minus the signal
    out: str
    err: str
    seconds: float
    peak: int  # bytes resident, at most, beside what was so before

    @property
    def wrong(self) -> str:
        said = [line for line in self.err.splitlines() if ": warning: " not in line]
        if self.code == -signal.SIGALRM:
            return "no end in time"
        if self.code < 0:
            return f"killed by signal {-self.code}"
        if "Traceback" in self.err or self.code not in (0, 2):
            return f"exit code {self.code} with a traceback"
        if self.code == 2 and len(said) != 1:
            return f"{len(said)} lines where one is due"
        if any(len(line) > LONGEST or not line.replace("\t", " ").isprintable() for line in said):
            return "a line that is not printable, or long"
        return ""

    def __str__(self) -> str:
        return f"{self.wrong}\n{self.seconds:.1f} s, {self.peak >> 20} MiB, exit code {self.code}\n{self.out}\n{self.err}"


def _memory() -> tuple[int, int]:
    """Bytes that this process has mapped, and those that are resident."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped, resident = file.read().split()[:2]
    return int(mapped) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _run(call: Callable[[], int], folder: Path, seconds: float, memory: int) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_memory()[0] + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    for number, name in ((0, os.devnull), (1, folder / "out"), (2, folder / "err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    faulthandler.disable()
    os.fsync = lambda descriptor: None  # no power fails here
    try:
        return call()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()


def attempt(call: Callable[[], int], seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """What becomes of `call`, which returns an exit code as `train.main` does, in a forked process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, began, before = Path(name), time.perf_counter(), _memory()[1]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _run(call, folder, seconds, memory)
            finally:
                os._exit(code)
        _, status, used = os.wait4(child, 0)
        spent = time.perf_counter() - began
        said = [(folder / part).read_text(errors="replace") if (folder / part).exists() else "" for part in ("out", "err")]
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, *said, spent, max(0, used.ru_maxrss * 1024 - before))
