"""The benchmarks: what each measures, and all of them in one command.

    python -m bench                          list them
    python -m bench all --quick              each at a small size, into a folder of its own
    python -m bench all --full               each as its committed result was made; hours
    python -m bench.NAME --help

Those that need a GPU are left out where there is none, and said to be.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .common import RESULTS

HERE = Path(__file__).parent
NOT_ALONE = {"__init__", "__main__", "common", "draw", "report", "gpu", "step_gpu", "memory_child"}
NOT_ALONE |= {"error_store_peers", "local_tried", "tritons", "pipeline_simulation", "accuracy_memory", "claims", "roofline"}
NEEDS_GPU = {"kernels", "tiles"}
NEEDS = {"huggingface": "transformers"}  # packages that this project does not install
# arguments of the committed results, beside --output; of a benchmark of several tasks by each
FULL = {
    "alignment": ["--mnist", "{mnist}"],
    "depth": ["--data", "{sgemm}"],
    "error_codecs": ["--mnist", "{mnist}"],
    "gpt": ["--text", "{text}"],
    "kernel_report": ["--arch", "all"],
    "local mnist": ["mnist", "--data", "{mnist}"],
    "local cifar10": ["cifar10", "--data", "{cifar10}"],
    "local vit-mnist": ["vit-mnist", "--data", "{mnist}"],
    "local vit-cifar10": ["vit-cifar10", "--data", "{cifar10}"],
    "local text": ["text", "--data", "{text}"],
    "local tried": ["tried", "--data", "{cifar10}"],
    "moments": ["--mnist", "{mnist}", "--text", "{text}", "--cifar10", "{cifar10}"],
    "paper": ["--data", "mnist={mnist}", "wine-quality={wine}"],
    "rates": ["--mnist", "{mnist}", "--wine", "{wine}"],
    "vit": ["--mnist", "{mnist}"],
    "time_to_accuracy": ["--mnist", "{mnist}"],
    "windows": ["--mnist", "{mnist}"],
}


def benchmarks() -> dict[str, str]:
    """What each benchmark measures: the first line of its module."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in NOT_ALONE:
            first = path.read_text(encoding="utf-8").split('"""')[1].strip().splitlines()[0]
            found[path.stem] = first
    return found


def arguments_of(name: str, quick: bool, data: dict[str, str | None]) -> list[str] | None:
    """A benchmark's own arguments; None where it needs data that was not given."""
    if quick:
        return ["--quick"]
    arguments = []
    for text in FULL.get(name, ()):
        needed = re.search(r"{(\w+)}", text)
        if needed and data[needed[1]] is None:
            return None
        arguments.append(text.format(**data))
    return arguments


def missing_of(name: str, arguments: list[str] | None) -> str | None:
    """What a benchmark needs and has not; None where it has all."""
    if name in NEEDS_GPU and not torch.cuda.is_available():
        return "a GPU"
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        return f"pip install {NEEDS[name]}"
    return "data: see --help" if arguments is None else None


def run_all(quick: bool, output: Path, data: dict[str, str | None]) -> list[str]:
    """Run every benchmark in a process of its own, results into `output`; the names of those that failed."""
    failed = []
    names = benchmarks()
    if not quick:
        tasks = [name for name in FULL if " " in name]
        names = [name for name in names if not any(task.split()[0] == name for task in tasks)] + tasks
    for name in names:
        arguments = arguments_of(name, quick, data)
        if (missing := missing_of(name, arguments)) is not None:
            print(f"{name}: left out, needs {missing}", flush=True)
            continue
        began = time.perf_counter()
        path = output / f"{name.replace('_', '-').replace(' ', '-')}.json"
        command = [sys.executable, "-m", f"bench.{name.split()[0]}", *arguments, "--output", str(path)]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
        failed += [name] if done.returncode or not path.exists() else []
        print(f"{name}: {'FAILED' if name in failed else 'ok'}, {time.perf_counter() - began:.0f} s", flush=True)
        if name in failed:
            print("  " + "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-5:]), flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("all", nargs="?", choices=["all"], help="run them; without it they are listed")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--mnist", metavar="DATASET", help="hub name or folder, for --full")
    parser.add_argument("--wine", metavar="DATASET", help="folder of Wine Quality, for --full")
    parser.add_argument("--cifar10", metavar="DATASET", help="hub name or folder, for --full")
    parser.add_argument("--sgemm", metavar="PATH", help="SGEMM, a folder or a table, for --full")
    parser.add_argument("--text", metavar="FILE", help="Tiny Shakespeare, for --full")
    parser.add_argument("--output", type=Path, help="folder of the results; default: a new one, with --full bench/results")
    options = parser.parse_args()
    if options.all is None:
        for name, first in benchmarks().items():
            print(f"{name:16s} {first}{' (needs a GPU)' if name in NEEDS_GPU else ''}")
        return
    if not options.quick and not options.full:
        parser.error("all needs --quick or --full")
    output = options.output or (RESULTS if options.full else Path(tempfile.mkdtemp(prefix="f3triton-bench-")))
    output.mkdir(parents=True, exist_ok=True)
    failed = run_all(
        options.quick,
        output.resolve(),
        {name: getattr(options, name) for name in ("mnist", "wine", "cifar10", "sgemm", "text")},
    )
    print(f"results in {output}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
