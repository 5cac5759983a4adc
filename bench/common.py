"""What every benchmark's result says of where it comes from."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

from f3triton.summary import device_name, versions

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
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "device": device_name(device or torch.device("cpu")),
        "versions": versions(),
    }


def write_result(path: Path, content: dict) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(header: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
