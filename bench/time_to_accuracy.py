"""Time to a test error of 2 percent on MNIST: F3, local errors, DFA and backpropagation, with and without sampling by error.

    python -m bench.time_to_accuracy --mnist ylecun/mnist    two idle cores, for the step rates
    python -m bench.time_to_accuracy --quick                 5 percent on the bundled digits

Every method has the same choice, made with one seed: three learning rates, and runs of 2, 3, 5 and 10 epochs of sample visits
with a cosine schedule each, until a length gets to the target on a validation split (a twelfth of the training images, which
nobody trains on). Of that length the rate counts that got there in the fewest steps. What is shown are runs of three other
seeds: the first evaluation on the test set at or below the target, the median of them. Steps are turned into seconds by step
rates of the wall clock, each a process's own (or torchrun's), in turn: by one core, and by two in every form that a method
has, of which the fastest is shown. A method that does not get there has no bar. A run that is in the result file is not
repeated; step rates are measured anew.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import f3triton as f3

from .common import RESULTS, noted, result, row, runs_in, save, table, write_result
from .pipeline import by_trainer, launched, tell

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
CHOICE, SEEDS = 1, (2, 3, 4)  # the seed that chooses, and those that are shown
ONE = "one core"
FORMS: dict[str, tuple[int, int, dict[str, object]]] = {  # processes, torch's threads in each, settings
    ONE: (1, 1, {}),
    "two threads inside the products": (1, 2, {}),
    "pipeline of two processes": (2, 1, {"pipeline": 2}),
    "pipeline of two threads": (1, 2, {"pipeline": "threads:2"}),
    "two processes, DDP": (2, 1, {"data_parallel": 2}),
}

Data = tuple[f3.Dataset, f3.Dataset, f3.Dataset]  # training, validation, test


def divided(data: tuple[f3.Dataset, f3.Dataset]) -> Data:
    """A twelfth of the training set, at random, for validation."""
    whole, test = data
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    parts = order[len(whole) // 12 :], order[: len(whole) // 12]
    return *(f3.Dataset(whole.name, whole.inputs[i], whole.targets[i], whole.preprocessing) for i in parts), test


def model(network: str, inputs: int, outputs: int, seed: int) -> f3.models.MLP:
    hidden, activation, norm = NETWORKS[network]
    return f3.models.MLP([inputs, *[500] * hidden, outputs], activation, norm=norm, seed=seed)


def run(data: Data, network: str, settings: dict, epochs: int, lr: float, seed: int) -> dict:
    """One run: [step, validation error, test error] after each epoch."""
    made = model(network, data[0].in_features, data[0].outputs, seed)
    trainer, curve = f3.Trainer(made, "bce", seed=seed, device="cpu", lr=lr, **settings), []
    trainer.fit(
        data[0],
        epochs,
        data[1],
        on_record=lambda record: curve.append(
            [record["step"], round(record["test_error"], 3), round(trainer.evaluate(data[2])["test_error"], 3)]
        ),
    )
    return {"curve": curve}


def reached(curve: list[list[float]], which: int, target: float) -> int | None:
    """The first step with an error at or below the target: 1 on the validation split, 2 on the test set."""
    return next((point[0] for point in curve if point[which] <= target), None)


def forms_of(network: str, method: str) -> list[str]:
    """How a method can use a core, and two."""
    own = METHODS[method].get("method", "f3")
    if own == "bp":  # replicas do not draw by error
        return [*list(FORMS)[:2], *["two processes, DDP"] * ("sampling" not in METHODS[method])]
    # of one hidden layer, which local errors teach with the last one, there is nothing to divide
    divided = own == "f3" or (own == "local" and NETWORKS[network][0] > 1)
    return [form for form, (*_, settings) in FORMS.items() if not settings or (divided and "pipeline" in settings)]


def child(network: str, method: str, form: str, batches: int) -> None:
    """A process that measures the step rate of a method in a form."""
    processes, threads, settings = FORMS[form]
    torch.set_num_threads(threads)
    own = METHODS[method]
    epochs = max(2, own.get("visits", 1))
    found = by_trainer(lambda: model(network, 784, 10, 0), 50, max(5, batches // epochs), epochs, **own | settings)
    tell(*found, threads if processes == 1 else 1)


class Chosen(NamedTuple):
    """A method's run on a network: what was chosen, its curve, and the steps to the target by seed (inf: not in that run)."""

    network: str
    method: str
    epochs: int
    lr: float
    curve: list[list[float]]
    steps: list[float]

    @property
    def there(self) -> bool:
        """Whether most seeds got to the target."""
        return bool(self.steps) and statistics.median(self.steps) < math.inf


Speeds = dict[tuple[str, str, str], list[float]]  # steps a second by (network, method, form)


def speeds_of(
    cells: list[tuple[str, str, str]], rounds: int, batches: int, failed: dict[str, str]
) -> tuple[Speeds, list[float]]:
    """The cells' rates, in turn, and the load averages before them."""
    found: Speeds = {}
    loads = []
    for _ in range(rounds):
        for cell in cells:
            loads.append(round(os.getloadavg()[0], 2))
            with noted(failed, ", ".join(cell)):
                workers = launched(FORMS[cell[2]][0], "bench.time_to_accuracy", "--child", *cell, "--batches", str(batches))
                found.setdefault(cell, []).append(workers[0]["steps_per_second"])
                print(f"{', '.join(cell)}: {found[cell][-1]:.1f} steps/s", flush=True)
    return found, loads


def rows_of(c: Chosen, data: str, target: float, speeds: Speeds) -> list[dict]:
    """Rows of a method on a network: rates, its curve in seconds of one core, and seconds to the target."""
    own = {form: speeds[c.network, c.method, form] for form in FORMS if (c.network, c.method, form) in speeds}
    place = {"network": c.network, "part": f"{data}, {c.network}: steps a second"}
    rows = [row(c.method, form, "steps/s", found, **place) for form, found in own.items()]
    if ONE not in own:
        return rows
    rates = {form: statistics.median(found) for form, found in own.items()}
    place = {"x_name": "seconds", "part": f"{data}, {c.network}: the run that got there, or the longest", "scale": "log"}
    rows += [row(c.method, round(step / rates[ONE], 2), "test error, %", error, **place) for step, _, error in c.curve]
    if not c.there:
        return rows
    two = max(rates, key=rates.get)  # which may be one core: threads cost as well
    there = [step for step in c.steps if step < math.inf]
    more = {"steps": int(statistics.median(c.steps)), "epochs": c.epochs, "lr": c.lr, "network": c.network}
    for cores, form in ((ONE, ONE), ("two cores", two)):
        seconds = [step / rates[form] for step in there]
        place = {"part": f"{data}, {c.network}: to {target:g} %", "form": form}
        found = row(c.method, cores, "seconds to the target", seconds, **place, **more)
        rows.append(found | {"median": float(f"{statistics.median(c.steps) / rates[form]:.6g}")})  # of all seeds
    return rows


def show(rows: list[dict]) -> str:
    """The table of what got there."""
    lines = []
    ones = [row for row in rows if row["metric"] == "seconds to the target" and row["x"] == ONE]
    for one in ones:
        two = next(r for r in rows if r["x"] == "two cores" and (r["part"], r["method"]) == (one["part"], one["method"]))
        seconds = [f"{one['median']:.1f}", f"{two['median']:.1f}", two["form"]]
        lines.append([one["network"], one["method"], f"{one['lr']:g}", one["epochs"], f"{one['steps']:,}", one["n"], *seconds])
    header = ["hidden layers", "", "learning rate", "epochs of the run", "steps", f"seeds of {len(SEEDS)}", "seconds, one core"]
    return table([*header, "two cores", "by"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--target", type=float, default=2.0, help="test error in percent")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="of the step rates; 0: only the runs")
    parser.add_argument("--quick", action="store_true", help="the bundled digits, 5 percent")
    parser.add_argument("--output", type=Path, help="default: bench/results/time-to-accuracy.json; with --quick -quick.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=600, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.batches)
        return
    if (options.mnist is None) != options.quick:
        parser.error("give --mnist DATASET or --quick")
    torch.set_num_threads(1)
    target, lengths, learning = (5.0, (30,), RATES[1:2]) if options.quick else (options.target, LENGTHS, RATES)
    networks, methods, rounds, batches = options.networks, options.methods, options.rounds, options.batches
    if options.quick:
        networks, methods, rounds, batches = ["1 tanh"], ["f3", "local", "bp"], 1, 20  # what a form costs is its start
    output = options.output or RESULTS / ("time-to-accuracy-quick.json" if options.quick else "time-to-accuracy.json")
    runs = runs_in(output)
    settings: dict[str, object] = {"target": target, "seeds": SEEDS, "cores": os.cpu_count()}
    data = divided(f3.load_dataset("digits" if options.quick else options.mnist))

    def done(network: str, name: str, epochs: int, lr: float, seed: int) -> list[list[float]]:
        key = f"{network}: {name}, lr {lr:g}, {epochs} epochs" + f", seed {seed}" * (seed != CHOICE)
        if key not in runs:
            runs[key] = run(data, network, METHODS[name], epochs, lr, seed)
            write_result(output, result("time_to_accuracy", [], settings, runs=runs))
        return runs[key]["curve"]

    chosen: list[Chosen] = []
    for network, name in itertools.product(networks, methods):
        for epochs in (n for n in lengths if n % METHODS[name].get("visits", 1) == 0):
            curves = {lr: done(network, name, epochs, lr, CHOICE) for lr in learning}
            there = {lr: step for lr, curve in curves.items() if (step := reached(curve, 1, target))}
            if there:
                break
        lr = min(there, key=there.get) if there else min(curves, key=lambda lr: curves[lr][-1][1])
        steps = [reached(done(network, name, epochs, lr, seed), 2, target) or math.inf for seed in SEEDS] if there else []
        chosen.append(Chosen(network, name, epochs, lr, curves[lr], steps))
        print(f"{network}: {name}, lr {lr:g}, {epochs} epochs: steps {steps or 'not reached'}", flush=True)
    if not rounds:
        return
    failed: dict[str, str] = {}
    cells = [(c.network, c.method, form) for c in chosen for form in (forms_of(c.network, c.method) if c.there else [ONE])]
    speeds, loads = speeds_of(cells, rounds, batches, failed)
    settings |= {"load_average": [min(loads), max(loads)], "rounds": rounds}
    rows = [row for c in chosen for row in rows_of(c, data[0].name, target, speeds)]
    save(output, result("time_to_accuracy", rows, settings, runs=runs, failed=failed))
    print(show(rows))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
