"""Memory of training against depth, width, batch, sequence length and data-set size; bytes a weight; and the largest model for
a budget.

    python -m bench.memory_scaling              about half an hour on two cores; --device cuda on a GPU
    python -m bench.memory_scaling --jobs 16    the same figures sooner, where there are cores and memory for so many at once
    python -m bench.memory_scaling --quick

Every figure comes from a process of its own (`bench.memory_child`), in which a first small step has made everything that lasts.
`step` is the peak of resident memory (CUDA: of allocated memory) over three steps, less what was in use before: activations
and gradients. `kept for the way back` counts what autograd holds. `total` is the peak over what was in use before there was a
network. What lasts is counted exactly: weights, moments, feedback.

Against backpropagation with activation checkpointing the gap is smaller, for a third more arithmetic; with the optimizer in
backward as well, it is smaller still. DFA waits for the output and keeps all activations, as backpropagation does. Adam in 8
bits is torchao's (`pip install torchao`); without it those rows are left out, and said to be.

The largest depth that fits a budget is found by measured totals (to a hundredth, see `largest`) and by formula
(`total_by_formula`). Beside the result are written two more, each with its picture: `-bytes`, bytes a weight in training and in
inference, and `-largest`, the largest model of each budget.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path

import torch

import f3triton as f3
from f3triton.error_store import make_codec

from .common import RESULTS, needs_gpu, noted, result, row, save, table, write_result
from .memory_child import (
    EIGHT_BIT,
    HAS_8BIT,
    INFERENCE,
    METHODS,
    OURS,
    RUNS,
    build,
    figures_of,
    measure,
    measure_run,
    precision_of,
)

MIB = 2**20
COMPILED_DEPTH = 24  # compiling more layers takes minutes; nor is it done for every sequence length


@dataclass(frozen=True)
class Setting:
    kind: str = "mlp"
    depth: int = 20  # hidden layers, or transformer blocks
    width: int = 256
    batch: int = 1024
    sequence: int = 0
    steps: int = 3


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
DEPTHS = ("hidden layers", "blocks")  # axes of all methods; the others have those that keep float32
WIDE = ("f3", "dfa", "bp", "bp-checkpoint", "bp-in-backward", "bp-checkpoint-in-backward", "bp-compiled")
# bytes a weight, where weights are most of it
BYTES = {
    "MLP of width 1024, batch 128": Setting("mlp", 32, 1024, 128),
    "transformer of width 512, 4 x 64 tokens": Setting("transformer", 12, 512, 4, 64),
}
QUICK_BYTES = {"MLP of width 512, batch 128": Setting("mlp", 8, 512, 128)}
LARGEST = Setting("mlp", 0, 512, 512, steps=1)
NOT_SEARCHED = ("dfa", "bp-in-backward", "bp-8bit", "bp-compiled")  # as bp or checkpoints have it, or too slow to compile
BUDGETED = ("f3", "f3-int8", "bp")  # methods of whole runs, held against their budgets
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
    return figures_of("bench.memory_scaling", "--device", device, "--child", json.dumps([method, *astuple(setting)]))


class Measured:
    """Figures by method and setting; each is measured once, and kept in a file beside the result until that is whole.

    Threads may ask for several at a time.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.failed: dict[str, str] = {}
        self.found: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.errors: dict[str, Exception] = {}
        self.lock = threading.Lock()

    def __call__(self, method: str, setting: Setting) -> dict[str, int]:
        key = json.dumps([method, *astuple(setting)])
        if key in self.errors:
            raise self.errors[key]
        if key not in self.found:
            try:
                figures = in_child(method, setting, self.device)
            except Exception as error:
                self.errors[key] = error
                raise
            with self.lock:
                self.found[key] = figures
                write_result(self.path, self.found)
        return self.found[key]

    def ahead(self, method: str, setting: Setting) -> None:
        """Measure what will be asked for, which is also when a failure will be told."""
        with contextlib.suppress(Exception):
            self(method, setting)


def measured_at(methods: tuple[str, ...], axis: str) -> dict[str, Callable[[Setting], bool]]:
    """The methods of an axis, and whether each is measured with a setting."""
    own = [method for method in methods if method in WIDE or axis in DEPTHS]
    slow = lambda setting: setting.depth <= COMPILED_DEPTH and axis != "sequence length"  # noqa: E731
    return {method: slow if method == "bp-compiled" else lambda setting: True for method in own}


def scaling(axes: dict, methods: tuple[str, ...], measured: Measured) -> list[dict]:
    """Rows of every axis."""
    rows = []
    for (kind, axis), settings in axes.items():
        lines = []
        for method, wanted in measured_at(methods, axis).items():
            line = []
            for x, setting in settings.items():
                if not wanted(setting):
                    line.append("")
                    continue
                found = None
                with noted(measured.failed, f"{kind}, {method}, {axis} {x}"):
                    found = measured(method, setting)
                if found is None:
                    line.append("failed")
                    continue
                parts = {name: found[name] for name in ("weights", "moments", "feedback", "saved", "total")}
                panel = {"x_name": axis, "part": f"{kind}, against {axis}"}
                rows.append(row(method, x, "activations and gradients, MiB", found["step"] / MIB, **panel, **parts))
                # of linear layers DFA itself keeps what autograd would
                counted = found["saved"] >= 0 and method in WIDE and (method, axis) != ("dfa", "hidden layers")
                if axis in DEPTHS and counted:
                    rows.append(row(method, x, "kept for the way back, MiB", found["saved"] / MIB, **panel))
                line.append(f"{found['step'] / MIB:.1f}")
            lines.append([method, *line])
        print(f"\n{kind}: activations and gradients of a step in MiB, by {axis}\n")
        print(table([axis, *map(str, settings)], lines), flush=True)
    return rows


def bytes_a_weight(settings: dict[str, Setting], methods: tuple[str, ...], measured: Measured) -> list[dict]:
    """Rows: all that training and inference hold, over the number of weights."""
    rows, lines = [], []
    for method in methods:
        line = []
        for name, setting in settings.items():
            found = None
            with noted(measured.failed, f"{name}, {method}"):
                found = measured(method, setting)
            if found is not None:
                each = {part: found[part] / found["parameters"] for part in ("total", "weights", "moments", "feedback")}
                rows.append(row(method, name, "bytes a weight", each["total"], part=f"{name}: bytes a weight", **each))
            line.append("failed" if found is None else f"{each['total']:.2f}")
        lines.append([method, *line])
    print("\nbytes a weight, everything included\n")
    print(table(["", *settings], lines), flush=True)
    return rows


def largest(total: Callable[[int], int], budget: int, guess: int) -> int:
    """The largest depth whose `total` of bytes is within the budget; 0 where none is.

    Two depths no further apart than a twentieth are found, of which one fits and one does not; between them totals are taken to
    grow evenly.
    """
    below, above, depth = (0, 0), None, max(1, guess)
    while True:
        size = total(depth)
        below, above = ((depth, size), above) if size <= budget else (below, (depth, size))
        if above is None:
            depth = max(depth + 1, math.ceil(1.02 * depth * budget / size))
            continue
        even = below[0] + (above[0] - below[0]) * (budget - below[1]) / (above[1] - below[1])
        if above[0] - below[0] <= max(1, above[0] // 20):
            return int(even)
        nearer_below = even - below[0] < above[0] - even
        depth = math.ceil(1.02 * even) if nearer_below else int(0.98 * even)
        depth = min(max(depth, below[0] + 1), above[0] - 1)


@cache
def memory_of(method: str, s: Setting) -> dict[str, int]:
    """Bytes by purpose of training, by the budget of `--dry-run`, under Adam; of backpropagation without what saves memory."""
    with torch.device("meta"):
        network, shape = build(s.kind, s.depth, s.width, s.sequence)
        x = torch.empty(s.batch, *shape)
    ours = precision_of(method) if method in OURS else {}
    return f3.memory(network, x, method.split("-")[0], samples=s.batch, loss="bce", optimizer="adam", **ours)


def total_by_formula(method: str, s: Setting) -> int:
    """Bytes of an MLP's training: every hidden layer adds the same, found between 10 and 20 of them.

    Of backpropagation, the optimizer in backward keeps the gradient of one weight, checkpoints keep the inputs of the segments,
    the outputs of one segment, and a gradient; bfloat16 halves weights, gradients and activations, and 8-bit moments take two
    bytes of a weight and two float32 of each 256.
    """
    few, more = (memory_of(method, replace(s, depth=depth)) for depth in (10, 20))
    memory = {name: max(0, count + (s.depth - 10) * (more[name] - count) // 10) for name, count in few.items()}
    if method in OURS:
        return sum(memory.values())
    if "checkpoint" in method:
        memory["gradients"] = memory["weights"]  # activations are gone before all gradients are there
        segment = math.isqrt(s.depth + 1)
        memory["activations"] = 4 * s.batch * s.width * (math.ceil((s.depth + 1) / segment) + segment + 1)
    if "in-backward" in method:
        memory["gradients"] = 4 * s.width * s.width
    if "8bit" in method:
        memory["moments"] = round(memory["moments"] * (2 + 8 / 256) / 8)
    halved = ("weights", "gradients", "activations") if "bf16" in method else ()
    return sum(count // 2 if name in halved else count for name, count in memory.items())


def formula_largest(method: str, start: Setting, budget: int) -> int:
    """The largest depth by `total_by_formula`."""
    return largest(lambda depth: total_by_formula(method, replace(start, depth=depth)), budget, 100)


def largest_models(
    budgets: list[int], start: Setting, methods: tuple[str, ...], found: Callable[[str, int], int], failed: dict[str, str]
) -> list[dict]:
    """Rows: the largest depth within each of the budgets (bytes), as `found` by measurement and by formula."""
    rows, lines = [], []
    for method in methods:
        line = []
        for budget in budgets:
            formula, measured = formula_largest(method, start, budget), None
            with noted(failed, f"largest in {budget // MIB} MiB, {method}"):
                measured = found(method, budget)
            part = f"largest MLP of width {start.width}, batch {start.batch}"
            for how, depth in (("measured", measured), ("by formula", formula)):
                if depth is not None:
                    with torch.device("meta"):
                        one, two = (build("mlp", n, start.width, 0)[0] for n in (1, 2))
                    first, second = (sum(p.numel() for p in model.parameters()) for model in (one, two))
                    weights = first + (depth - 1) * (second - first)
                    shown = {"x_name": "GiB", "part": f"{part}, {how}", "scale": "log", "parameters": weights}
                    rows.append(row(method, budget / 2**30, "hidden layers", depth, **shown))
            line.append(f"{'failed' if measured is None else measured} ({formula})")
        lines.append([method, *line])
    print(f"\nhidden layers that fit, measured (by formula): width {start.width}, batch {start.batch}\n")
    print(table(["", *(f"{budget / 2**30:g} GiB" for budget in budgets)], lines), flush=True)
    return rows


def budgets_of_runs(measured: Measured) -> list[dict]:
    """Rows: the most that a whole run holds beside its data, evaluation included, measured and by the budget of `--dry-run`."""
    rows, lines = [], []
    for kind in RUNS:
        for method in BUDGETED:
            found = None
            with noted(measured.failed, f"run of {kind}, {method}"):
                found = measured(method, Setting(kind))
            if found is not None:
                for how, size in (("measured", found["peak"]), ("budget", found["budget"])):
                    rows.append(row(f"{kind}, {method}", how, "MiB", size / MIB, part="peak of a run beside its data"))
                off = f"{100 * (found['budget'] / found['peak'] - 1):+.1f}"
                lines.append([f"{kind}, {method}", *(f"{found[name] / MIB:.1f}" for name in ("peak", "budget")), off])
    print("\npeak of a run beside its data, MiB\n")
    print(table(["", "measured", "budget", "budget over measured, %"], lines), flush=True)
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
    parser.add_argument(
        "--budget", type=int, nargs="+", default=[512, 1024, 2048, 4096], metavar="MIB", help="of the largest models"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time; no figure depends on it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one axis, few methods, small models")
    parser.add_argument("--output", type=Path, help="default: bench/results/memory-scaling.json, -cuda.json on CUDA")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        needs_gpu("bench.memory_scaling")
    if options.child:
        method, *setting = json.loads(options.child)
        s = Setting(*setting)
        if s.kind in RUNS:
            torch.set_num_threads(1)
            print(json.dumps(measure_run(s.kind, method)))
            return
        print(json.dumps(measure(s.kind, method, s.depth, s.width, s.batch, s.sequence, device, s.steps)))
        return
    methods = ("f3", "f3-bf16-int8", "bp", "bp-checkpoint-in-backward") if options.quick else tuple(options.methods)
    if not HAS_8BIT and not options.quick:
        print("rows of 8-bit Adam are left out: torchao is not installed (pip install torchao)", flush=True)
        methods = tuple(method for method in methods if method not in EIGHT_BIT)
    axes, settings = (QUICK, QUICK_BYTES) if options.quick else (FULL, BYTES)
    budgets = [MIB * size for size in ([64] if options.quick else options.budget)]
    name = "memory-scaling" + ("" if device.type == "cpu" else f"-{device.type}")
    output = options.output or RESULTS / f"{name}.json"
    measured = Measured(output.with_suffix(".partial.json"), options.device)
    start, one = LARGEST, tuple(method for method in methods if method not in NOT_SEARCHED)

    def search(method: str, budget: int) -> int:
        return largest(
            lambda depth: measured(method, replace(start, depth=depth))["total"],
            budget,
            formula_largest(method, start, budget),
        )

    with ThreadPoolExecutor(options.jobs) as pool:  # what takes longest first
        searches = {(name, size): pool.submit(search, name, size) for size in sorted(budgets, reverse=True) for name in one}
        for (_, axis), settings_ in axes.items():
            for method, wanted in reversed(measured_at(methods, axis).items()):
                for setting in filter(wanted, reversed(settings_.values())):
                    pool.submit(measured.ahead, method, setting)
        for method in (*methods, *INFERENCE):
            for setting in settings.values():
                if method != "bp-compiled":
                    pool.submit(measured.ahead, method, setting)
        for kind in () if options.quick or device.type != "cpu" else RUNS:
            for method in BUDGETED:
                pool.submit(measured.ahead, method, Setting(kind))
    rows = scaling(axes, methods, measured) + error_stores()
    rows += [] if options.quick or device.type != "cpu" else budgets_of_runs(measured)
    trained = tuple(method for method in methods if method != "bp-compiled")
    parts = {
        "": rows,
        "-bytes": bytes_a_weight(settings, (*trained, *INFERENCE), measured),
        "-largest": largest_models(budgets, start, one, lambda *which: searches[which].result(), measured.failed),
    }
    for suffix, found in parts.items():
        content = result("memory_scaling", found, {"threads": 1}, device, failed=measured.failed)
        save(output.with_stem(output.stem + suffix), content)
    measured.path.unlink(missing_ok=True)
    if measured.failed:
        sys.exit(f"failed: {', '.join(measured.failed)}")


if __name__ == "__main__":
    main()
