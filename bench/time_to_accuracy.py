"""Time to a test error of 2 percent on MNIST: F3 in windows, F3, DFA and backpropagation, 784-500-10, one thread.

    python -m bench.time_to_accuracy --mnist ylecun/mnist
    python -m bench.time_to_accuracy --quick                 5 percent on the bundled digits

Every method is run for 2, 5, 10 and 20 epochs of sample visits, a cosine schedule each, until one of these runs gets
there; what counts are its steps to the first evaluation at or below the target. They are turned into seconds by the step rates
of all methods, measured in turn at the end, so that a busy machine is as unfair to the one as to the other. A method that does
not get there has no bar. A run that is in the result file is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import f3triton as f3
from f3triton.base.data import Visit

from .common import RESULTS, result, row, save, table

METHODS = {
    "f3, windows of 50 x 2": {"window": 50, "visits": 2},
    "f3, windows of 500 x 5": {"window": 500, "visits": 5},
    "f3": {},
    "dfa": {"method": "dfa"},
    "bp": {"method": "bp"},
}
LENGTHS = (2, 5, 10, 20)


def trainer(data: tuple[f3.Dataset, f3.Dataset], settings: dict) -> f3.Trainer:
    torch.manual_seed(1)
    model = f3.models.MLP([data[0].in_features, 500, data[0].outputs])
    return f3.Trainer(model, "bce", f3.Adam(lr=5e-4), seed=1, device="cpu", **settings)


def run(data: tuple[f3.Dataset, f3.Dataset], settings: dict, epochs: int, target: float) -> dict:
    """One run: its curve, and the step at which it got to the target, if it did."""
    history = trainer(data, settings).fit(data[0], epochs, data[1]).history
    there = next((record["step"] for record in history if record["test_error"] <= target), None)
    return {"steps_to_target": there, "curve": [[record["step"], round(record["test_error"], 3)] for record in history]}


def rates(data: tuple[f3.Dataset, f3.Dataset], rounds: int, steps: int) -> dict[str, list[float]]:
    """Steps a second of every method, in turn."""
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    learners = {}
    for name, settings in METHODS.items():
        made = trainer(data, {key: value for key, value in settings.items() if key == "method"})
        made.fit(data[0], 1, batches=lambda epoch: [torch.arange(50)])
        learners[name] = made.learner
    for _ in range(rounds):
        for name, learner in learners.items():
            batches = [torch.randint(0, len(data[0]), (50,)) for _ in range(steps)]
            began = time.perf_counter()
            for index in batches:
                learner.visit(Visit(index, index), 1e-6)
            found[name].append(steps / (time.perf_counter() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--target", type=float, default=2.0, help="test error in percent")
    parser.add_argument("--rounds", type=int, default=9, help="of the step rates")
    parser.add_argument("--quick", action="store_true", help="the bundled digits, 5 percent")
    parser.add_argument("--output", type=Path, help="default: bench/results/time-to-accuracy.json; with --quick -quick.json")
    options = parser.parse_args()
    if (options.mnist is None) != options.quick:
        parser.error("give --mnist DATASET or --quick")
    torch.set_num_threads(1)
    target, lengths = (5.0, (50,)) if options.quick else (options.target, LENGTHS)
    output = options.output or RESULTS / ("time-to-accuracy-quick.json" if options.quick else "time-to-accuracy.json")
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if output.exists() else {}
    data = f3.load_dataset("digits" if options.quick else options.mnist)
    speeds = rates(data, 3 if options.quick else options.rounds, 50 if options.quick else 300)
    rows, lines = [], []
    for name, settings in METHODS.items():
        for epochs in (n for n in lengths if n % settings.get("visits", 1) == 0):
            key = f"{name}, {epochs} epochs"
            if key not in runs:
                runs[key] = run(data, settings, epochs, target)
            found = runs[key]
            if found["steps_to_target"] is not None:
                break
        speed = statistics.median(speeds[name])
        curve = [(step / speed, error) for step, error in found["curve"]]
        part = f"{data[0].name}, the run that got there, or the longest"
        rows += [row(name, round(x, 2), "test error, %", error, x_name="seconds", part=part, scale="log") for x, error in curve]
        if found["steps_to_target"] is not None:
            seconds = [found["steps_to_target"] / rate for rate in speeds[name]]
            more = {"steps": found["steps_to_target"], "epochs": epochs}
            rows.append(
                row(name, f"{target:g} %", "seconds to the target", seconds, part=f"{data[0].name}, to {target:g} %", **more)
            )
            lines.append([name, epochs, found["steps_to_target"], f"{speed:.0f}", f"{statistics.median(seconds):.1f}"])
        else:
            lines.append([name, epochs, "not reached", f"{speed:.0f}", ""])
        save(output, result("time_to_accuracy", rows, {"threads": 1, "target": target}, runs=runs))
        print(" | ".join(map(str, lines[-1])), flush=True)
    print(table(["method", "epochs of the run", f"steps to {target:g} %", "steps/s", "seconds"], lines))


if __name__ == "__main__":
    main()
