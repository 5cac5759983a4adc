"""Learning rates, losses and batch sizes of four methods on three data sets: where the defaults come from.

    python -m bench.rates --mnist ylecun/mnist --wine path/to/wine-quality
    python -m bench.rates --quick                                            a small grid on the bundled digits

The default network (two hidden layers of 500, tanh, for local errors relu and a layer normalisation), Adam, cosine decay, one
seed, every combination of method, rate and case.
The figure is the error after the last epoch on a validation split, the last sixth of the training samples after a shuffle; no
test set is looked at. A run that is in the result file is not repeated, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import f3triton as f3
from f3triton.run.tally import Diverged

from .common import RESULTS, result, row, runs_in, save, table
from .local import split

METHODS = ("f3", "local", "dfa", "bp")
RATES = (5e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Case:
    """A data set and how it is learned; `data` is the name of an option, or digits."""

    data: str
    epochs: int
    loss: str = "bce"
    batch: int = 50
    samples: int | None = None


SIZES = {"digits": {"epochs": 20}, "mnist": {"epochs": 8, "samples": 6000}, "wine": {"epochs": 10}}
CASES = {
    **{name: Case(name, **size) for name, size in SIZES.items()},
    **{f"{name}, cross-entropy": Case(name, loss="cross-entropy", **size) for name, size in SIZES.items()},
    **{
        f"{name}, cross-entropy, batch 200": Case(name, loss="cross-entropy", batch=200, **size) for name, size in SIZES.items()
    },
    "digits, cross-entropy, 100 epochs": Case("digits", 100, loss="cross-entropy"),
}


def run(case: Case, data: tuple[f3.Dataset, f3.Dataset], method: str, rate: float) -> float | None:
    """The validation error in percent after the last epoch; None where the run diverged."""
    train, held_out = data
    torch.manual_seed(0)
    local = {"activation": "relu", "norm": "layer"} if method == "local" else {}  # as train.py has it
    model = f3.models.MLP([train.in_features, 500, 500, train.outputs], **local)
    trainer = f3.Trainer(model, case.loss, f3.Adam(lr=rate), method=method, batch_size=case.batch, device="cpu")
    try:
        found = trainer.fit(train, case.epochs, held_out, eval_every=case.epochs)
    except Diverged:
        return None
    return round(found.history[-1]["test_error"], 3)


def show(runs: dict[str, dict[str, float | None]]) -> str:
    """A line for each case and method, a column for each rate, the best in bold."""
    lines, rates = [], list(dict.fromkeys(rate for found in runs.values() for rate in found))
    for name, found in runs.items():
        best = min((value for value in found.values() if value is not None), default=None)
        cells = {rate: "diverged" if found.get(rate) is None else f"{found[rate]:.2f}" for rate in rates}
        lines.append([name, *(f"**{cell}**" if found.get(rate) == best else cell for rate, cell in cells.items())])
    return table(["validation error, %, by learning rate", *rates], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--wine", metavar="DATASET", help="Wine Quality, with the column `quality`: a folder")
    parser.add_argument("--quick", action="store_true", help="the bundled digits, two epochs, two rates")
    parser.add_argument("--output", type=Path, help="default: bench/results/rates.json; with --quick rates-quick.json")
    options = parser.parse_args()
    if not options.quick and None in (options.mnist, options.wine):
        parser.error("give --mnist DATASET and --wine DATASET, or --quick")
    torch.set_num_threads(1)
    output = options.output or RESULTS / ("rates-quick.json" if options.quick else "rates.json")
    runs = runs_in(output)
    cases, rates = ({"digits": Case("digits", 2)}, RATES[:2]) if options.quick else (CASES, RATES)
    for name, case in cases.items():
        source = "digits" if case.data == "digits" else getattr(options, case.data)
        wanted = {"target": "quality", "task": "classification"} if case.data == "wine" else {}
        data = split(f3.load_dataset(source, max_train_samples=case.samples, **wanted)[0])
        for method in METHODS:
            found = runs.setdefault(f"{name}, {method}", {})
            for rate in rates:
                if f"{rate:g}" not in found:
                    found[f"{rate:g}"] = run(case, data, method, rate)
            print(name, method, found, flush=True)
        rows = [
            row(method, float(rate), "validation error, %", error, x_name="learning rate", part=part)
            for part in cases
            for method in METHODS
            for rate, error in runs.get(f"{part}, {method}", {}).items()
            if error is not None
        ]
        save(output, result("rates", rows, {"seed": 0, "threads": 1, "hidden": [500, 500]}, runs=runs))
    print(f"\n{show(runs)}")


if __name__ == "__main__":
    main()
