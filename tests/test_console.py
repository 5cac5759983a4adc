"""What a run says: a bar on a terminal that keeps what is wanted at 80 columns, plain lines in a log, and no more."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from f3triton.run import console as console_of
from f3triton.run.console import Console

RECORD = {"epoch": 7, "train_loss": 0.012345, "train_error": 0.51234, "test_loss": 0.098765, "test_error": 3.2123,
          "learning_seconds": 1.0}  # fmt: skip
RUN = f"""
from f3triton.run.console import Console
console = Console(False, 100, 1000, "f3")
for _ in range(7):
    console.step(1000)
console.record({RECORD!r})
console.bar.close()
"""


def on_terminal(columns: int) -> list[str]:
    """The states of the bar on a terminal so wide, in which a run reports `RECORD`."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(
        [sys.executable, "-c", RUN], stdin=theirs, stdout=theirs, stderr=theirs, cwd=Path(__file__).parents[1], env=environment
    )
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 1 << 16):
            written += piece
    except OSError:  # the child has ended
        pass
    assert child.wait() == 0, written.decode()
    os.close(ours)
    return [line for line in re.split(r"[\r\n]|\x1b\[A", written.decode()) if line.strip()]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_error_and_remaining_time_come_first(columns: int) -> None:
    lines = on_terminal(columns)
    assert all(len(line) <= columns for line in lines)
    last = next(line for line in reversed(lines) if "test error" in line)
    assert re.match(r"f3: test error 3\.212  [\d:?]+ left +7%\|", last), last
    figures = re.findall(r"(?:train|test) (?:loss|error) [\d.]+", last)
    whole = {"train loss 0.01235", "train error 0.5123", "test loss 0.09877", "test error 3.212"}
    assert set(figures) <= whole, "a figure is cut off"
    assert (set(figures) == whole) == (columns == 200)


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(False, 100, 1000, "f3")
    for epoch in (7, 10):
        console.record({**RECORD, "epoch": epoch})
    figures = "train loss 0.01235  train error 0.5123  test loss 0.09877  test error 3.212"
    assert capsys.readouterr().out == f"f3: epoch 10/100  {figures}  (1.0 s)\n"
    Console(True, 100, 1000).record(RECORD)
    assert capsys.readouterr() == ("", "")


def test_a_log_says_the_remaining_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the samples of this process: a resumed run has done the others earlier."""
    now = iter((100.0, 400.0, 400.0))
    monkeypatch.setattr(console_of.time, "monotonic", lambda: next(now))
    console = Console(False, 100, 1000, "f3")
    console.step(5000)
    for epoch in (90, 100):
        console.record({**RECORD, "epoch": epoch})
    assert [line.partition("  (")[2] for line in capsys.readouterr().out.splitlines()] == ["1.0 s, 0:10:00 left)", "1.0 s)"]


def test_a_notebook_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert Console(False, 1, 1).bar is not None
    assert Console(True, 1, 1).bar is None
