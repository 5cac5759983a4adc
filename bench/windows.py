"""Test error on MNIST by window size and visits, at the same number of sample visits, beside plain F3 and its peers.

    python -m bench.windows --mnist ylecun/mnist

`--mnist` takes what `train.py --dataset` takes. Hidden layers of 500 tanh units, batch 50, Adam 5e-4 with cosine decay,
trinomial feedback. A run that is already in the result file is not repeated, so the command can be stopped and started
again. `--quick` is a grid of minutes on the bundled digits, in a file of its own, to see that all of it works.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import f3triton as f3

from .common import RESULTS, result, row, runs_in, save

OFF = {"window": "off"}
PEERS = {"bp": {"method": "bp"}, "dfa": {"method": "dfa"}, "f3": OFF}


def cell(window: int, visits: int, first_visit: str = "skip") -> dict:
    return {"window": window, "visits": visits, "first_visit": first_visit}


# (hidden layers, epochs, seeds, settings), the most telling first
GRID = [
    (1, 20, (1, 2, 3), [OFF, cell(2000, 10), cell(500, 5)]),
    (1, 20, (1,), [{"method": "bp"}, {"method": "dfa"}]),
    (1, 20, (1,), [cell(50, 2), cell(200, 2), cell(200, 5), cell(200, 10), cell(2000, 2), cell(2000, 5), cell(2000, 20)]),
    (1, 20, (1,), [cell(20000, 2), cell(20000, 5), cell(20000, 10), cell(20000, 20), cell(500, 2), cell(500, 10)]),
    (1, 20, (1,), [cell(2000, 10, "target"), cell(2000, 10, "stale"), cell(500, 5, "stale"), cell(500, 5, "target")]),
    (3, 20, (1,), [OFF, cell(500, 5), cell(2000, 10), cell(50, 2), {"method": "bp"}, {"method": "dfa"}, cell(200, 5)]),
    (10, 20, (1,), [OFF, cell(500, 5), {"method": "dfa"}, {"method": "bp"}, {"method": "bp", "lr": 1e-4}]),
    (10, 20, (1,), [cell(50, 2), cell(200, 2)]),
    (3, 20, (2, 3), [OFF, cell(50, 2), cell(500, 5)]),
    (1, 20, (2, 3), [cell(50, 2), {"method": "bp"}, {"method": "dfa"}]),
    (3, 20, (1,), [cell(200, 2), cell(500, 2), cell(2000, 5), cell(500, 5, "stale")]),
    (1, 100, (1,), [cell(500, 5), cell(50, 2), cell(2000, 10)]),
    (3, 100, (1,), [cell(50, 2), cell(500, 5)]),
    (10, 20, (1,), [cell(2000, 10)]),
    (3, 20, (1,), [cell(20000, 10)]),
]
QUICK = [
    (1, 20, (1, 2), [OFF, {"method": "bp"}, cell(100, 2), cell(100, 5), cell(500, 5)]),
    (3, 20, (1,), [OFF, cell(100, 5), cell(500, 5, "target"), cell(500, 5, "stale")]),
]


def name_of(hidden: int, epochs: int, seed: int, settings: dict) -> str:
    """`3 hidden, 20 epochs, 500x5 skip, seed 1`"""
    kind = settings.get("method", "f3")
    if "visits" in settings:
        kind = f"{settings['window']}x{settings['visits']} {settings['first_visit']}"
    if "lr" in settings:
        kind += f" lr {settings['lr']:g}"
    return f"{hidden} hidden, {epochs} epochs, {kind}, seed {seed}"


def run(train: f3.Dataset, test: f3.Dataset, hidden: int, epochs: int, seed: int, settings: dict) -> dict:
    """One training run: the best and the last test error in percent."""
    torch.manual_seed(seed)
    model = f3.models.MLP([train.in_features, *[500] * hidden, train.outputs])
    others = {key: value for key, value in settings.items() if key != "lr"}
    result = f3.Trainer(model, "bce", f3.Adam(lr=settings.get("lr", 5e-4)), seed=seed, **others).fit(train, epochs, test)
    errors = [record["test_error"] for record in result.history]
    return {
        "hidden": hidden,
        "epochs": epochs,
        "seed": seed,
        **settings,
        "last": round(errors[-1], 4),
        "best": round(min(errors), 4),
        "steps": result.steps,
        "seconds": round(result.learning_seconds, 1),
    }


def rows_of(runs: dict[str, dict]) -> list[dict]:
    """Rows: the last epoch's test error of every setting, over its seeds."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for name, found in runs.items():
        part, kind = ", ".join(name.split(", ")[:2]), name.split(", ")[2]
        groups.setdefault((part, kind), []).append(found)
    return [
        row(kind, "last epoch", "test error, %", [found["last"] for found in group], part=part)
        for (part, kind), group in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--quick", action="store_true", help="a small grid on the bundled digits")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--output", type=Path, help="default: bench/results/windows.json, windows-quick.json with --quick")
    options = parser.parse_args()
    if (options.mnist is None) != options.quick:
        parser.error("give --mnist DATASET or --quick")
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / ("windows-quick.json" if options.quick else "windows.json")
    runs = runs_in(output)
    train, test = f3.load_dataset("digits" if options.quick else options.mnist)
    for hidden, epochs, seeds, cells in QUICK if options.quick else GRID:
        for settings in cells:
            for seed in seeds:
                name = name_of(hidden, epochs, seed, settings)
                if name not in runs:
                    runs[name] = run(train, test, hidden, epochs, seed, settings)
                    save(output, result("windows", rows_of(runs), {"threads": options.threads}, runs=runs))
                print(f"{name}: last {runs[name]['last']:.2f}, best {runs[name]['best']:.2f}", flush=True)


if __name__ == "__main__":
    main()
