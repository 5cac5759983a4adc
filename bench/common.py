"""The one form of every result: where it comes from, and rows.

A result is a JSON file: `benchmark, command, date, processor, processor_family, vector_capability, device, versions` (on a GPU
with its driver), `settings`, and `rows`. A row is one measured figure: `part` (a panel of the picture, such as a data set or an
operation), `method`, `x` (a number or a name) on the axis `x_name`, `metric` with its unit, `median, p20, p80` over `n`
measurements, and whatever else the benchmark wants to keep. `bench.draw` draws any such file, `bench.report` cites it.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from f3triton.run.summary import device_name, versions

RESULTS = Path(__file__).parent / "results"


def processor() -> dict[str, str]:
    """The processor's name and family, as well as they can be had, and the vector instructions that torch uses on it."""
    found = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:  # not Linux
        pass
    return {
        "processor": found.get("model name") or platform.processor() or platform.machine(),
        "processor_family": f"{found['vendor_id']} family {found['cpu family']}" if "cpu family" in found else "",
        "vector_capability": torch.backends.cpu.get_cpu_capability(),
    }


def driver(device: torch.device) -> dict[str, str]:
    """The driver of a GPU, and the CUDA or ROCm of this torch; nothing for other devices."""
    if device.type != "cuda":
        return {}
    if torch.version.hip:
        return {"rocm": torch.version.hip}
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except OSError:
        found = []
    return {"driver": found[0] if found else "unknown", "cuda": str(torch.version.cuda)}


def origin(module: str, device: torch.device | None = None) -> dict:
    """Machine, versions, date and command of a measurement."""
    words = iter(sys.argv[1:])
    arguments = []
    for word in words:  # where the result was written is of no use to a reader
        if word in ("--output", "--folder"):
            next(words, None)
        else:
            arguments.append(word)
    device = device or torch.device("cpu")
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        **processor(),
        "device": device_name(device),
        "versions": versions() | driver(device),
    }


def where(content: dict) -> str:
    """The machine, torch and date of a result, as far as it names them: older ones have no family of the processor."""
    details = [content[key] for key in ("processor_family", "vector_capability") if content.get(key)]
    machine = content["processor"] + (f" ({', '.join(details)})" if details else "")
    found = content["versions"]
    device = content["device"] + (f" (driver {found['driver']})" if "driver" in found else "")
    return f"{machine}, {device}, torch {found['torch']}, {content['date']}"


def needs_gpu(module: str) -> None:
    """End with 2, and one line, on a machine that has none."""
    if not torch.cuda.is_available():
        print(f"{module}: error: needs a CUDA or ROCm device, and this machine has none", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def noted(failed: dict[str, str], name: str) -> Iterator[None]:
    """Keep why something failed in `failed`, so that it does not end what is measured beside it."""
    try:
        yield
    except Exception as error:
        failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"{name} FAILED: {failed[name]}", flush=True)


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


def runs_in(path: Path) -> dict:
    """The runs that a result file holds already, so that they are not repeated; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}


def write_result(path: Path, content: dict) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def save(path: Path, content: dict) -> None:
    """Write a result, and its picture beside it."""
    from .draw import draw  # which names a result's origin as this module does

    write_result(path, content)
    draw(content, path.with_suffix(".png"))


def table(header: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
