"""Memory of training against depth, width, batch, sequence length and data-set size, and the largest model for a budget.

    python -m bench.memory_scaling              about half an hour on two cores; --device cuda on a GPU
    python -m bench.memory_scaling --quick

Every figure comes from a process of its own (`bench.memory_child`), in which a first small step has made everything that lasts.
`step` is the peak of resident memory (CUDA: of allocated memory) over three steps, less what was in use before: activations
and gradients. `kept for the way back` counts what autograd holds. What lasts is counted exactly: weights, moments, feedback.

Against backpropagation with activation checkpointing the gap is smaller, for a third more arithmetic; with the optimizer in
backward as well, it is smaller still. DFA waits for the output and keeps all activations, as backpropagation does.

The largest depth that fits a budget is found by bisection over measured totals and by formula (`total_by_formula`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path

import torch

import f3triton as f3
from f3triton.error_store import make_codec
from f3triton.learn.signal import resolve_signal
from f3triton.run.budget import estimate

from .common import RESULTS, needs_gpu, noted, result, row, save, table, write_result
from .memory_child import CLASSES, METHODS, build, measure

MIB = 2**20
COMPILED_DEPTH = 24  # compiling more layers takes minutes; nor is it done for every sequence length


@dataclass(frozen=True)
class Setting:
    kind: str = "mlp"
    depth: int = 20  # hidden layers, or transformer blocks
    width: int = 256
    batch: int = 1024
    sequence: int = 0


MLP, TRANSFORMER = Setting(), Setting("transformer", 8, 128, 16, 64)
# (panel, axis): settings by the value on the axis
FULL = {
    ("MLP", "hidden layers"): {d: replace(MLP, depth=d, batch=4096) for d in (1, 10, 50, 100)},
    ("MLP", "width"): {w: replace(MLP, width=w) for w in (128, 512, 1024)},
    ("MLP", "batch"): {b: replace(MLP, batch=b) for b in (256, 1024, 4096)},
    ("transformer", "blocks"): {d: replace(TRANSFORMER, depth=d) for d in (1, 6, 12, 24)},
    ("transformer", "sequence length"): {s: replace(TRANSFORMER, sequence=s) for s in (16, 64, 256)},
}
QUICK = {("MLP", "hidden layers"): {d: replace(MLP, depth=d, batch=4096) for d in (1, 20)}}
# name: (samples, classes)
DATA_SETS = {
    "MNIST": (60_000, 10),
    "CIFAR-100": (50_000, 100),
    "ImageNet": (1_281_167, 1000),
    "ImageNet-21k": (14_197_122, 21_841),
}
CODECS = ("float32", "float16", "int8", "top-8")


def in_child(method: str, setting: Setting, device: str) -> dict[str, int]:
    """The figures of `memory_child.measure`, from a process of its own."""
    command = [
        sys.executable,
        "-m",
        "bench.memory_scaling",
        "--device",
        device,
        "--child",
        json.dumps([method, *astuple(setting)]),
    ]
    # Freed blocks go back to the system at once, so that resident memory is memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


class Measured:
    """Figures by method and setting; each is measured once, and kept in a file beside the result until that is whole."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.failed: dict[str, str] = {}
        self.found: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __call__(self, method: str, setting: Setting) -> dict[str, int]:
        key = json.dumps([method, *astuple(setting)])
        if key not in self.found:
            self.found[key] = in_child(method, setting, self.device)
            write_result(self.path, self.found)
        return self.found[key]


def scaling(axes: dict, methods: tuple[str, ...], measured: Measured) -> list[dict]:
    """Rows of every axis."""
    rows = []
    for (kind, axis), settings in axes.items():
        lines = []
        for method in methods:
            line = []
            for x, setting in settings.items():
                if method == "bp-compiled" and (setting.depth > COMPILED_DEPTH or axis == "sequence length"):
                    line.append("")
                    continue
                found = None
                with noted(measured.failed, f"{kind}, {method}, {axis} {x}"):
                    found = measured(method, setting)
                if found is None:
                    line.append("failed")
                    continue
                parts = {name: found[name] for name in ("parameters", "feedback", "lasting", "saved", "total")}
                panel = {"x_name": axis, "part": f"{kind}, against {axis}"}
                rows.append(row(method, x, "activations and gradients, MiB", found["step"] / MIB, **panel, **parts))
                # of linear layers DFA itself keeps what autograd would
                counted = found["saved"] >= 0 and (method, axis) != ("dfa", "hidden layers")
                if axis in ("hidden layers", "blocks") and counted:
                    rows.append(row(method, x, "kept for the way back, MiB", found["saved"] / MIB, **panel))
                line.append(f"{found['step'] / MIB:.1f}")
            lines.append([method, *line])
        print(f"\n{kind}: activations and gradients of a step in MiB, by {axis}\n")
        print(table([axis, *map(str, settings)], lines), flush=True)
    return rows


def largest(fits: Callable[[int], bool], limit: int = 1 << 14) -> int:
    """The largest depth from 1 to `limit` that fits, by bisection; 0 where none does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@cache
def memory_of(method: str, s: Setting) -> dict[str, int]:
    """Bytes by purpose, by the budget of `--dry-run`, for F3, DFA and plain backpropagation under Adam."""
    with torch.device("meta"):
        network, shape = build(s.kind, s.depth, s.width, s.sequence)
        x = torch.empty(s.batch, *shape)
    signal = resolve_signal(method, None)
    rows = 4 * CLASSES * s.batch if signal is not None and signal.delayed else 0
    return estimate(network, x, f3.Adam(), signal, error_bytes=rows).memory


def total_by_formula(method: str, s: Setting) -> int:
    """Bytes of an MLP's training: every hidden layer but the first adds the same.

    Of backpropagation, the optimizer in backward keeps the gradient of one weight, and checkpoints keep the inputs of the
    segments, the outputs of one segment, and a gradient.
    """
    method, *savings = method.split("-", 1)
    one, two = (memory_of(method, replace(s, depth=depth)) for depth in (1, 2))
    memory = {name: count + (s.depth - 1) * (two[name] - count) for name, count in one.items()}
    if "in-backward" in "".join(savings):
        memory["gradients"] = 4 * s.width * s.width
    if "checkpoint" in "".join(savings):
        segment = math.isqrt(s.depth + 1)
        memory["activations"] = 4 * s.batch * s.width * (math.ceil((s.depth + 1) / segment) + segment + 1)
    return sum(memory.values())


def largest_models(budget: int, start: Setting, methods: tuple[str, ...], measured: Measured) -> list[dict]:
    """Rows: the largest depth within `budget` bytes, measured and by formula."""
    rows, lines = [], []
    for method in methods:
        formula = largest(lambda depth, m=method: total_by_formula(m, replace(start, depth=depth)) <= budget)
        found = None
        with noted(measured.failed, f"largest, {method}"):
            found = largest(lambda depth, m=method: measured(m, replace(start, depth=depth))["total"] <= budget)
        if found is None:
            continue
        part = f"largest MLP of width {start.width} in {budget // MIB} MiB, batch {start.batch}"
        rows += [row(method, how, "hidden layers", n, part=part) for how, n in (("measured", found), ("formula", formula))]
        lines.append([method, found, formula])
    print(f"\nhidden layers that fit {budget // MIB} MiB: width {start.width}, batch {start.batch}\n")
    print(table(["", "measured", "by formula"], lines), flush=True)
    return rows


def error_stores() -> list[dict]:
    """Rows: bytes of the error store of well-known data sets; backpropagation has none."""
    rows, lines = [], []
    for name, (samples, classes) in DATA_SETS.items():
        sizes = {word: samples * make_codec(word, classes, torch.float32).row_bytes for word in CODECS}
        rows += [
            row(
                f"F3, {word}",
                f"{name}, {samples:,} x {classes:,}",
                "error store, MiB",
                size / MIB,
                part="error store",
                scale="log",
            )
            for word, size in sizes.items()
        ]
        lines.append([name, f"{samples:,}", f"{classes:,}", *(f"{size / MIB:,.1f}" for size in sizes.values())])
    print("\nerror store in MiB, by data set and type of its entries\n")
    print(table(["", "samples", "classes", *CODECS], lines), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budget", type=int, default=512, metavar="MIB", help="of the largest model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one axis, three methods")
    parser.add_argument("--output", type=Path, help="default: bench/results/memory-scaling.json, -cuda.json on CUDA")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        needs_gpu("bench.memory_scaling")
    if options.child:
        method, *setting = json.loads(options.child)
        s = Setting(*setting)
        print(json.dumps(measure(s.kind, method, s.depth, s.width, s.batch, s.sequence, device)))
        return
    methods = ("f3", "bp", "bp-checkpoint-in-backward") if options.quick else tuple(options.methods)
    name = "memory-scaling" + ("" if device.type == "cpu" else f"-{device.type}")
    output = options.output or RESULTS / f"{name}.json"
    measured = Measured(output.with_suffix(".partial.json"), options.device)
    rows = scaling(QUICK if options.quick else FULL, methods, measured)
    if not options.quick:
        candidates = tuple(m for m in methods if m not in ("dfa", "bp-compiled"))  # as bp, or too slow to compile
        rows += largest_models(options.budget * MIB, MLP, candidates, measured)
    rows += error_stores()
    save(output, result("memory_scaling", rows, {"threads": 1}, device, failed=measured.failed))
    measured.path.unlink(missing_ok=True)
    if measured.failed:
        sys.exit(f"failed: {', '.join(measured.failed)}")


if __name__ == "__main__":
    main()
