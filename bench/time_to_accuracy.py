"""Time to a test error of 2 percent on MNIST: F3, local errors, DFA and backpropagation, with and without sampling by error.

    python -m bench.time_to_accuracy --mnist ylecun/mnist
    python -m bench.time_to_accuracy --quick                 5 percent on the bundled digits

Every method has the same choice: three learning rates, and runs of 2, 3, 5 and 10 epochs of sample visits with a cosine
schedule each, until a length gets to the target on a validation split (a twelfth of the training images, which nobody trains
on). Of that length the rate counts that got there in the fewest steps; its first evaluation on the test set at or below the
target is what is shown. Steps are turned into seconds of one thread by the step rates of all methods, measured in turn, in
processor time, so that other programs do not count. A method that does not get there has no bar. A run that is in the result
file is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import f3triton as f3
from f3triton.base.data import Visit
from f3triton.learn.loss import error_sizes, losses_by_sample

from .common import RESULTS, result, row, runs_in, save, table

METHODS = {
    "f3, windows of 50 x 2": {"window": 50, "visits": 2},
    "f3, windows of 500 x 5": {"window": 500, "visits": 5},
    "f3": {},
    "f3, drawn by error": {"sampling": "error"},
    "local": {"method": "local"},
    "local, drawn by error": {"method": "local", "sampling": "error"},
    "dfa": {"method": "dfa"},
    "bp": {"method": "bp"},
    "bp, drawn by error": {"method": "bp", "sampling": "error"},
}
NETWORKS = {  # (hidden layers of 500, activation, norm)
    "1 tanh": (1, "tanh", "none"),
    "1 ReLU, layer norm": (1, "relu", "layer"),
    "3 ReLU, layer norm": (3, "relu", "layer"),
}
RATES = (5e-4, 1e-3, 2e-3)
LENGTHS = (2, 3, 5, 10)

Data = tuple[f3.Dataset, f3.Dataset, f3.Dataset]  # training, validation, test


def divided(data: tuple[f3.Dataset, f3.Dataset]) -> Data:
    """A twelfth of the training set, at random, for validation."""
    whole, test = data
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    parts = order[len(whole) // 12 :], order[: len(whole) // 12]
    return *(f3.Dataset(whole.name, whole.inputs[i], whole.targets[i], whole.preprocessing) for i in parts), test


def trainer(data: Data, network: str, settings: dict) -> f3.Trainer:
    hidden, activation, norm = NETWORKS[network]
    sizes = [data[0].in_features, *[500] * hidden, data[0].outputs]
    return f3.Trainer(f3.models.MLP(sizes, activation, norm=norm, seed=1), "bce", seed=1, device="cpu", **settings)


def run(data: Data, network: str, settings: dict, epochs: int, lr: float) -> dict:
    """One run: [step, validation error, test error] after each epoch."""
    made, curve = trainer(data, network, settings | {"lr": lr}), []
    made.fit(
        data[0],
        epochs,
        data[1],
        on_record=lambda record: curve.append(
            [record["step"], round(record["test_error"], 3), round(made.evaluate(data[2])["test_error"], 3)]
        ),
    )
    return {"curve": curve}


def reached(curve: list[list[float]], which: int, target: float) -> int | None:
    """The first step with an error at or below the target: 1 on the validation split, 2 on the test set."""
    return next((point[0] for point in curve if point[which] <= target), None)


def rates(data: Data, network: str, methods: list[str], rounds: int, steps: int) -> dict[str, list[float]]:
    """Steps of every method in a second of the processor, in turn; what sampling by error costs is part of them."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    learners = {}
    for name in methods:
        made = trainer(data, network, {key: value for key, value in METHODS[name].items() if key == "method"})
        made.fit(data[0], 1, batches=lambda epoch: [torch.arange(50)])
        learners[name] = made.learner
    sizes = torch.ones(len(data[0]))
    for _ in range(rounds):
        for name, learner in learners.items():
            batches = [torch.randint(0, len(data[0]), (50,)) for _ in range(steps)]
            began = time.process_time()
            for index in batches:
                output = learner.visit(Visit(index, index), 1e-6)
                if "sampling" in METHODS[name]:
                    losses = output.sample_losses
                    losses = losses_by_sample(output.a, output.target, learner.loss) if losses is None else losses
                    sizes.index_copy_(0, index, error_sizes(losses, learner.loss, data[0].outputs).float())
            found[name].append(steps / (time.process_time() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--target", type=float, default=2.0, help="test error in percent")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="of the step rates")
    parser.add_argument("--quick", action="store_true", help="the bundled digits, 5 percent")
    parser.add_argument("--output", type=Path, help="default: bench/results/time-to-accuracy.json; with --quick -quick.json")
    options = parser.parse_args()
    if (options.mnist is None) != options.quick:
        parser.error("give --mnist DATASET or --quick")
    torch.set_num_threads(1)
    target, lengths, learning = (5.0, (30,), RATES[1:2]) if options.quick else (options.target, LENGTHS, RATES)
    networks = ["1 tanh"] if options.quick else options.networks
    output = options.output or RESULTS / ("time-to-accuracy-quick.json" if options.quick else "time-to-accuracy.json")
    runs = runs_in(output)
    data = divided(f3.load_dataset("digits" if options.quick else options.mnist))
    rows, lines = [], []
    for network in networks:
        speeds = rates(data, network, options.methods, 3 if options.quick else options.rounds, 50 if options.quick else 200)
        for name in options.methods:
            for epochs in (n for n in lengths if n % METHODS[name].get("visits", 1) == 0):
                keys = {lr: f"{network}: {name}, lr {lr:g}, {epochs} epochs" for lr in learning}
                for lr, key in keys.items():
                    if key not in runs:
                        runs[key] = run(data, network, METHODS[name], epochs, lr)
                there = {lr: step for lr, key in keys.items() if (step := reached(runs[key]["curve"], 1, target))}
                if there:
                    break
            lr = min(there, key=there.get) if there else min(keys, key=lambda lr: runs[keys[lr]]["curve"][-1][1])
            curve, speed = runs[keys[lr]]["curve"], statistics.median(speeds[name])
            steps, part = reached(curve, 2, target), f"{data[0].name}, {network}"
            for step, _, error in curve:
                place = {"x_name": "seconds", "part": f"{part}: the run that got there, or the longest", "scale": "log"}
                rows.append(row(name, round(step / speed, 2), "test error, %", error, **place))
            if steps is not None:
                seconds = [steps / rate for rate in speeds[name]]
                more = {"steps": steps, "epochs": epochs, "lr": lr, "network": network}
                rows.append(
                    row(name, f"{target:g} %", "seconds to the target", seconds, part=f"{part}: to {target:g} %", **more)
                )
                taken = f"{statistics.median(seconds):.1f}"
            else:
                taken = ""
            lines.append([network, name, f"{lr:g}", epochs, "not reached" if steps is None else steps, f"{speed:.0f}", taken])
            save(output, result("time_to_accuracy", rows, {"threads": 1, "target": target}, runs=runs))
            print(" | ".join(map(str, lines[-1])), flush=True)
    print(table(["hidden layers", "method", "lr", "epochs of the run", f"steps to {target:g} %", "steps/s", "seconds"], lines))


if __name__ == "__main__":
    main()
