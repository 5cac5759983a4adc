"""The one form of every result: where it comes from, and rows.

A result is a JSON file: `benchmark, command, date, processor, device, versions, settings`, and `rows`. A row is one measured
figure: `part` (a panel of the picture, such as a data set or an operation), `method`, `x` (a number or a name) on the axis
`x_name`, `metric` with its unit, `median, p20, p80` over `n` measurements, and whatever else the benchmark wants to keep.
`bench.draw` draws any such file, `bench.report` cites it.
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from f3triton.run.summary import device_name, versions

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, as well as it can be had."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def origin(module: str, device: torch.device | None = None) -> dict:
    """Machine, versions, date and command of a measurement."""
    words = iter(sys.argv[1:])
    arguments = []
    for word in words:  # where the result was written is of no use to a reader
        if word in ("--output", "--folder"):
            next(words, None)
        else:
            arguments.append(word)
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "device": device_name(device or torch.device("cpu")),
        "versions": versions(),
    }


def row(
    method: str,
    x: float | str,
    metric: str,
    values: Sequence[float] | float,
    *,
    x_name: str = "",
    part: str = "",
    **more: object,
) -> dict:
    """One figure of a result; `values` are its measurements, or the one there is."""
    found = list(values) if isinstance(values, Sequence) else [values]
    low, high = (statistics.quantiles(found, n=5)[i] for i in (0, 3)) if len(found) > 1 else found * 2
    spread = {"median": statistics.median(found), "p20": low, "p80": high}
    place = {"part": part, "method": method, "x": x, "x_name": x_name, "metric": metric}
    return place | {key: float(f"{value:.6g}") for key, value in spread.items()} | {"n": len(found), **more}


def result(
    benchmark: str, rows: list[dict], settings: dict | None = None, device: torch.device | None = None, **more: object
) -> dict:
    """The content of a result file."""
    return {"benchmark": benchmark, **origin(f"bench.{benchmark}", device), "settings": settings or {}, **more, "rows": rows}


def read_result(name: str) -> dict:
    """A committed result, by its file's name."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def write_result(path: Path, content: dict) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def save(path: Path, content: dict) -> None:
    """Write a result, and its picture beside it where matplotlib is there."""
    write_result(path, content)
    try:
        from .draw import draw

        draw(content, path.with_suffix(".png"))
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'f3triton[plots]')")


def table(header: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
