"""Everything that needs a GPU, in one command: the tests, then the benchmarks; JSON and pictures of all of it.

    python -m bench.gpu                 every part
    python -m bench.gpu --quick         the tests, and the benchmarks at small sizes

Every part runs in a process of its own, and one that fails or hangs keeps none of the others from running. The output folder
then holds `kernels-gpu.json`, `tiles-gpu.json`, `step-gpu.json`, `memory-scaling-cuda.json`, and `gpu.json`, which is written
after each part: exit status and seconds of the parts, outcomes of the tests, and the last lines of what failed. Exits with 1 if
a part failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from .common import RESULTS, needs_gpu, result, row, write_result

ROOT = Path(__file__).resolve().parents[1]
LINES = 40  # that are kept of a part that failed


def parts(output: Path, quick: bool, log: Path) -> dict[str, list[str]]:
    """The arguments of `python -m`, by part; the tests leave their outcomes in `log`."""
    small = ["--quick"] if quick else []
    return {
        "tests": ["pytest", "-m", "gpu", "-p", "no:cacheprovider", "--junit-xml", str(log), "tests"],
        "kernels": ["bench.kernels", *small, "--output", str(output / "kernels-gpu.json")],
        "tiles": ["bench.tiles", *small, "--output", str(output / "tiles-gpu.json")],
        "step": ["bench.step", "--device", "cuda", *small, "--output", str(output / "step-gpu.json")],
        "memory": ["bench.memory_scaling", "--device", "cuda", *small, "--output", str(output / "memory-scaling-cuda.json")],
    }


def run(arguments: list[str], minutes: float) -> tuple[int, float, list[str]]:
    """(exit status, seconds, last lines) of `python -m ...`, shown as it goes and ended after so many minutes."""
    began = time.perf_counter()
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    limit = threading.Timer(60 * minutes, process.kill)
    limit.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines = [*lines[1 - LINES :], line.rstrip()]
    status = process.wait()
    limit.cancel()
    return status, time.perf_counter() - began, lines


def outcomes(log: Path) -> dict[str, object]:
    """From pytest's XML: how many tests passed, which failed, and the reasons of those that were skipped."""
    found = {"passed": 0, "failed": [], "skipped": {}}
    for case in ElementTree.parse(log).iter("testcase") if log.exists() else ():
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(name)
        elif (skipped := case.find("skipped")) is not None:
            found["skipped"][name] = skipped.get("message", "")
        else:
            found["passed"] += 1
    return found


def run_all(output: Path, quick: bool, minutes: float, device: torch.device) -> list[str]:
    """Run every part; the names of those that failed."""
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tests.xml"
        for name, arguments in parts(output, quick, log).items():
            print(f"--- {name}: python -m {' '.join(arguments)}", flush=True)
            status, seconds, lines = run(arguments, minutes)
            more: dict[str, object] = {"exit_status": status}
            if name == "tests":
                more |= outcomes(log)
            if status:
                failed.append(name)
                more["last_lines"] = lines
            rows.append(row("bench.gpu", name, "seconds", seconds, part="parts", **more))
            write_result(output / "gpu.json", result("gpu", rows, {"quick": quick}, device))
    return failed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=60, help="a part is ended after so many; default 60")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default bench/results")
    options = parser.parse_args(arguments)
    needs_gpu("bench.gpu")
    failed = run_all(options.output.resolve(), options.quick, options.minutes, torch.device("cuda"))
    print(f"results in {options.output}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
