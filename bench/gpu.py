"""Everything that needs a GPU, in one command: the tests, then the benchmarks; JSON of all of it.

    python -m bench.gpu                 about ten minutes on a data-centre GPU
    python -m bench.gpu --quick         tests and small sizes only

Writes `gpu-tests.json`, `kernels-gpu.json` and `step-gpu.json` into the output folder. Exits with 1 if a test fails; the
benchmarks run all the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from .common import RESULTS, origin, write_result

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: error: needs a CUDA or ROCm device, and this machine has none", file=sys.stderr)
        sys.exit(2)
    quick = ["--quick"] if options.quick else []
    failed = []
    for name, command in {
        "tests": ["pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "tests"],
        "kernels": ["bench.kernels", *quick, "--output", str(options.output / "kernels-gpu.json")],
        "step": ["bench.step", "--device", "cuda", *quick, "--output", str(options.output / "step-gpu.json")],
    }.items():
        began = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        print(result.stdout, flush=True)
        failed += [name] if result.returncode else []
        if name == "tests":
            driver = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                                    capture_output=True, text=True).stdout.strip() if torch.version.cuda else ""  # fmt: skip
            content = {"returncode": result.returncode, "seconds": round(time.perf_counter() - began), "driver": driver}
            tail = result.stdout.splitlines()[-40:]
            write_result(
                options.output / "gpu-tests.json", {**origin("bench.gpu", torch.device("cuda")), **content, "tail": tail}
            )
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
