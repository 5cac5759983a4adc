"""Test error on SGEMM by depth, 1 to 100 hidden layers: F3, DFA, local errors and backpropagation, each at its own best rate.

    python -m bench.depth --data path/to/sgemm           a folder of Parquet, or sgemm_product.csv
    python -m bench.depth --quick                        made-up rows, three depths

The paper trains layers of 500 units for 200 epochs; here they have 100 units, and a run is short (see `settings` there). At
every depth each method gets the same learning rates; that with the least error on a validation split, with seed 0, counts, and
test errors are shown for other seeds. Cells are done in the order of their depth, and a run that is in the result file is not
repeated.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import f3triton as f3

from .common import RESULTS, result, row, runs_in, save, table

DEPTHS = (1, 2, 5, 10, 25, 50, 100)
METHODS = ("f3", "dfa", "local", "bp")
SETTINGS = {
    "width": 100, "rows": 16_000, "epochs": 10, "batch_size": 128, "activation": "tanh",
    "rates": (1.25e-4, 5e-4, 2e-3, 8e-3, 3.2e-2), "seeds": (1, 2, 3),
}  # fmt: skip
QUICK = SETTINGS | {"width": 20, "rows": 1000, "epochs": 2, "batch_size": 50, "rates": (5e-4, 2e-3), "seeds": (1,)}

Arrays = tuple[Tensor, Tensor]


def read(path: Path) -> Arrays:
    """Settings `[rows, 14]` and the mean of the four run times `[rows, 1]`, float32."""
    import pandas

    frame = pandas.read_parquet(path) if path.is_dir() or path.suffix == ".parquet" else pandas.read_csv(path)
    values = torch.from_numpy(frame.to_numpy("float32", copy=True))
    return values[:, :-4], values[:, -4:].mean(1, keepdim=True)


def made_up() -> Arrays:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 14, generator=generator)
    return x, torch.sin(x @ torch.randn(14, 1, generator=generator))


def divided(data: Arrays, rows: int) -> list[Arrays]:
    """Training, validation and test part, standardised by the training part: `rows`, then twice a quarter."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))
    parts = [[t[part] for t in data] for part in order[: rows * 3 // 2].split([rows, rows // 4, rows - rows // 4 - rows // 2])]
    mean, scale = ([f(t) for t in parts[0]] for f in (lambda t: t.mean(0), lambda t: t.std(0).clamp_min(1e-6)))
    return [tuple((t - m) / s for t, m, s in zip(part, mean, scale, strict=True)) for part in parts]


def run(parts: list[Arrays], method: str, depth: int, lr: float, seed: int, settings: dict) -> dict:
    """Errors on validation and test part after the last epoch; None where the loss was infinite."""
    sizes = [parts[0][0].shape[1], *[settings["width"]] * depth, 1]
    model = f3.models.MLP(sizes, settings["activation"], seed=seed)
    trainer = f3.Trainer(model, "mse", method=method, lr=lr, batch_size=settings["batch_size"], seed=seed, device="cpu")
    began = time.process_time()
    try:
        trainer.fit(parts[0], settings["epochs"], eval_every=settings["epochs"])
        found = [trainer.evaluate(part)["test_mse"] for part in parts[1:]]
    except f3.Diverged:
        found = [None, None]
    seconds = round(time.process_time() - began, 1)
    return {"lr": lr, "validation": found[0], "test": found[1], "cpu_seconds": seconds, "load": round(os.getloadavg()[0], 1)}


def choices(runs: dict[str, dict], method: str, depth: int) -> dict[float, float]:
    """The validation error of each learning rate of a cell."""
    start = f"choice, {method}, {depth} hidden,"
    return {one["lr"]: math.inf if (e := one["validation"]) is None else e for k, one in runs.items() if k.startswith(start)}


def tests(runs: dict[str, dict], method: str, depth: int) -> list[float]:
    """The test errors of the seeds of a cell."""
    start = f"{method}, {depth} hidden,"
    return [math.inf if (e := one["test"]) is None else e for key, one in runs.items() if key.startswith(start)]


def show(runs: dict[str, dict]) -> str:
    """Test errors over the seeds, mean and standard deviation, with the learning rate that was chosen."""
    depths = [depth for depth in DEPTHS if tests(runs, METHODS[-1], depth)]
    lines = []
    for method in METHODS:
        cells = []
        for depth in depths:
            rates, found = choices(runs, method, depth), tests(runs, method, depth)
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 and max(found) < math.inf else ""
            cells.append(f"{statistics.mean(found):.3f}{spread} ({min(rates, key=rates.get):g})")
        lines.append([method, *cells])
    return table(["test MSE (learning rate), by hidden layers", *map(str, depths)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help="SGEMM: a folder of Parquet, or a table")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="default: bench/results/depth.json; with --quick, depth-quick.json")
    options = parser.parse_args()
    if (options.data is None) != options.quick:
        parser.error("give --data PATH or --quick")
    torch.set_num_threads(1)
    settings, depths = (QUICK, (1, 2, 5)) if options.quick else (SETTINGS, DEPTHS)
    output = options.output or RESULTS / ("depth-quick.json" if options.quick else "depth.json")
    runs = runs_in(output)
    parts = divided(made_up() if options.quick else read(options.data), settings["rows"])

    def once(key: str, method: str, depth: int, lr: float, seed: int) -> None:
        if key not in runs:
            runs[key] = run(parts, method, depth, lr, seed, settings)
            print(f"{key}: {runs[key]}", flush=True)

    for depth in depths:
        for method in METHODS:
            for lr in settings["rates"]:
                once(f"choice, {method}, {depth} hidden, lr {lr:g}", method, depth, lr, 0)
            rates = choices(runs, method, depth)
            for seed in settings["seeds"]:
                once(f"{method}, {depth} hidden, seed {seed}", method, depth, min(rates, key=rates.get), seed)
        rows = [
            row(method, at, "test MSE", found, x_name="hidden layers", part="SGEMM", scale="log")
            for method in METHODS
            for at in depths[: depths.index(depth) + 1]
            if max(found := tests(runs, method, at)) < math.inf
        ]
        save(output, result("depth", rows, {"threads": 1, **settings}, runs=runs))
    print(show(runs))


if __name__ == "__main__":
    main()
