"""Errors at the stage itself beside backpropagation, DFA and F3: test error with every method at its own best learning rate.

    python -m bench.local --mnist ylecun/mnist

Hidden layers of 500 units, relu and a layer normalisation without parameters for all methods alike, batch 100, Adam with cosine
decay. Each method's learning rate is the best of three on a validation split (the last sixth of the training samples after a
shuffle), with one seed; the runs that are shown train on all training samples, with other seeds. What each stage says by itself
(`exit`) is shown for local errors. A run that is in the result file already is not repeated. `--quick` is a small grid on the
bundled digits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import f3triton as f3

from .common import RESULTS, result, row, save

METHODS: dict[str, dict[str, object]] = {
    "local": {"method": "local"},
    "local, reach 2": {"method": "local", "reach": 2},
    "local, random feedback": {"method": "local", "local_feedback": "random"},
    "backprop": {"method": "bp"},
    "DFA": {"method": "dfa"},
    "F3 in windows": {"method": "f3", "window": 500, "visits": 2},
    "F3": {"method": "f3"},
}
RATES = (5e-4, 1e-3, 2e-3)
SHUFFLE = 7  # seed of the validation split


def run(data: tuple[f3.Dataset, f3.Dataset], hidden: list[int], epochs: int, seed: int, settings: dict) -> dict:
    """One training run: test error in percent, and that of every exit."""
    train, test = data
    torch.manual_seed(seed)
    model = f3.models.MLP([train.in_features, *hidden, train.outputs], "relu", norm="layer")
    trainer = f3.Trainer(model, batch_size=100, seed=seed, device="cpu", **settings)
    found = trainer.fit(train, epochs, test, eval_every=epochs)
    exits = {}
    if model.read:
        for place in (*range(1, model.read + 2), "mean"):
            model.exit = place
            exits[str(place)] = round(trainer.evaluate(test)["test_error"], 4)
        model.exit = None
    rate = found.steps / found.learning_seconds
    return {"error": round(found.history[-1]["test_error"], 4), "exits": exits, "steps_per_second": round(rate, 1)}


def split(train: f3.Dataset) -> tuple[f3.Dataset, f3.Dataset]:
    """The training samples in two parts: to train on, and to choose by."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SHUFFLE))
    parts = order[: len(train) * 5 // 6], order[len(train) * 5 // 6 :]
    return tuple(f3.Dataset(train.name, train.inputs[part], train.targets[part], train.preprocessing) for part in parts)


def rows_of(runs: dict[str, dict]) -> list[dict]:
    """Rows: test error of every method over its seeds, and of the exits."""
    groups: dict[str, list[dict]] = {}
    rates = [
        row(name.split(", lr ")[0].removeprefix("choice, "), float(name.split(", lr ")[1]), "validation error, %",
        found["error"],
            x_name="learning rate", part="the choice of a learning rate")
        for name, found in runs.items() if name.startswith("choice")
    ]  # fmt: skip
    for name, found in runs.items():
        if not name.startswith("choice"):
            groups.setdefault(name.split(", seed ")[0], []).append(found)
    rows = [row(name, "last epoch", "test error, %", [one["error"] for one in group]) for name, group in groups.items()]
    for name, group in groups.items():
        for place in group[0]["exits"]:
            errors = [one["exits"][place] for one in group]
            rows.append(row(name, f"exit {place}", "test error, %", errors, part="by what answers"))
    return rows + rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--quick", action="store_true", help="a small grid on the bundled digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--choose-epochs", type=int, default=6, help="epochs of the runs that choose a learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), metavar="METHOD", default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--output", type=Path, help="default: bench/results/local.json, local-quick.json with --quick")
    options = parser.parse_args()
    if (options.mnist is None) != options.quick:
        parser.error("give --mnist DATASET or --quick")
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / ("local-quick.json" if options.quick else "local.json")
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if output.exists() else {}
    data = f3.load_dataset("digits" if options.quick else options.mnist)
    hidden, epochs, choose, seeds = [500] * 3, options.epochs, options.choose_epochs, options.seeds
    if options.quick:
        hidden, epochs, choose, seeds = [32] * 3, 4, 2, [1]
    setting = {"hidden": hidden, "epochs": epochs, "choose_epochs": choose, "rates": RATES, "threads": options.threads}

    def once(name: str, *arguments: object) -> dict:
        if name not in runs:
            runs[name] = run(*arguments)
            save(output, result("local", rows_of(runs), setting, runs=runs))
        print(f"{name}: {runs[name]['error']:.2f} %", flush=True)
        return runs[name]

    for name in options.only:
        settings = METHODS[name]
        by_rate = {
            rate: once(
                f"choice, {name}, lr {rate:g}", split(data[0]), hidden, choose, 0, {**settings, "optimizer": f3.Adam(lr=rate)}
            )
            for rate in RATES
        }
        best = min(by_rate, key=lambda rate: by_rate[rate]["error"])
        for seed in seeds:
            once(f"{name}, seed {seed}", data, hidden, epochs, seed, {**settings, "optimizer": f3.Adam(lr=best)})


if __name__ == "__main__":
    main()
