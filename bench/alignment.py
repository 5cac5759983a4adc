"""The alignment bound through training: how often F3's update is within 90 degrees of the true gradient, by depth and network.

    python -m bench.alignment --mnist ylecun/mnist
    python -m bench.alignment --quick                        the bundled digits, few networks

Below 90 degrees an update still lowers the loss, which the paper's argument needs at every layer. `run.diagnostics` takes the
angle at each hidden layer after every epoch (see there), against the gradient of backpropagation at the same weights. A network
that is in the result file is not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch

import f3triton as f3

from .common import RESULTS, result, row, runs_in, save, table

METHODS = {"f3": {}, "dfa": {"method": "dfa"}}
EXTRAS = {
    "tanh": {},
    "ReLU": {"activation": "relu"},
    "GELU": {"activation": "gelu"},
    "tanh, skips": {"residual": True},
    "ReLU, layer norm, skips": {"activation": "relu", "norm": "layer", "residual": True},
}
DEPTHS = (1, 2, 5, 10, 25, 50, 100)
BATCHNORM, VIT = "ReLU, BatchNorm", "ViT"


def networks(quick: bool) -> list[tuple[str, int]]:
    """(kind, depth) of each; depth counts hidden layers, or blocks of a transformer."""
    depths = DEPTHS[:3] if quick else DEPTHS
    kinds = ["tanh", BATCHNORM] if quick else [*EXTRAS, BATCHNORM]
    found = [(kind, depth) for depth in depths for kind in kinds if depth > 1 or "skips" not in kind]
    return found if quick else sorted([*found, (VIT, 2), (VIT, 4)], key=lambda one: one[1])  # the cheapest first


def network(kind: str, depth: int, data: f3.Dataset, width: int) -> f3.Sequential:
    """Layers of `width` units; a vision transformer of the paper's kind, smaller."""
    inputs, outputs = data.in_features, data.outputs
    if kind == VIT:
        return f3.models.ViT(28, 1, outputs, 7, depth=depth, heads=4, dim=32, mlp_width=64, seed=1)
    if kind != BATCHNORM:
        return f3.models.MLP([inputs, *[width] * depth, outputs], seed=1, **EXTRAS[kind])
    torch.manual_seed(1)
    sizes = [inputs, *[width] * depth]
    stages = [
        f3.Block(torch.nn.Sequential(torch.nn.Linear(i, o), torch.nn.BatchNorm1d(o), torch.nn.ReLU()))
        for i, o in itertools.pairwise(sizes)
    ]
    return f3.Sequential(*stages, f3.Linear(width, outputs))


def run(kind: str, depth: int, method: str, data: tuple[f3.Dataset, f3.Dataset], epochs: int, width: int) -> dict:
    """Angles by epoch and hidden stage, in degrees (None: no gradient), and the test error at the end."""
    began = time.process_time()
    model = network(kind, depth, data[0], width)
    trainer = f3.Trainer(model, "cross-entropy", seed=1, lr=5e-4, device="cpu", **METHODS[method])
    look = f3.Diagnostics(trainer, data[0], 128)
    found = trainer.fit(data[0], epochs, data[1], on_record=look).history
    angles = [[stage.get("angle") for stage in record["stages"][:-1]] for record in look.records]
    return {
        "angles": [[None if a is None else round(a, 2) for a in epoch] for epoch in angles],
        "test_error": round(found[-1]["test_error"], 2),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def known(one: dict) -> list[float]:
    """All angles of a run."""
    return [angle for epoch in one["angles"] for angle in epoch if angle is not None]


def below(one: dict) -> float:
    """Percent of (layer, epoch) with an angle below 90 degrees."""
    angles = known(one)
    return 100 * sum(angle < 90 for angle in angles) / len(angles)


def by_layer(one: dict) -> list[float]:
    """The mean angle of each hidden layer over training, first layer first."""
    layers = zip(*one["angles"], strict=True)
    return [statistics.mean(found) for layer in layers if (found := [a for a in layer if a is not None])]


def show(runs: dict[str, dict]) -> str:
    """A line for each network: share below 90 degrees, mean angle of the first and last hidden layer, test error; by method."""
    lines = []
    for name in dict.fromkeys(key.partition(" | ")[0] for key in runs):
        cells = []
        for method in METHODS:
            one = runs.get(f"{name} | {method}")
            if one is not None:
                layers = by_layer(one)
                cells.append(f"{below(one):.0f} % ({layers[0]:.0f}, {layers[-1]:.0f}); {one['test_error']:.1f}")
        lines.append([name, *cells])
    return table(["network, hidden layers", *METHODS], lines)


def rows_of(runs: dict[str, dict]) -> list[dict]:
    """Shares against depth, a panel for each kind of network."""
    rows = []
    for key, one in runs.items():
        name, _, method = key.partition(" | ")
        kind, _, depth = name.rpartition(", ")
        x = int(depth)
        rows.append(row(method, x, "below 90 degrees, %", below(one), x_name="hidden layers", part=kind))
    return sorted(rows, key=lambda one: one["part"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--rows", type=int, default=2000, help="training images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=100, help="units of a hidden layer")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="default: bench/results/alignment.json; with --quick alignment-quick.json")
    options = parser.parse_args()
    if (options.mnist is None) != options.quick:
        parser.error("give --mnist DATASET or --quick")
    torch.set_num_threads(1)
    output = options.output or RESULTS / ("alignment-quick.json" if options.quick else "alignment.json")
    runs = runs_in(output)
    limits = {} if options.quick else {"max_train_samples": options.rows, "max_test_samples": 2000}
    data = f3.load_dataset("digits" if options.quick else options.mnist, **limits)
    epochs = 2 if options.quick else options.epochs
    for kind, depth in networks(options.quick):
        for method in METHODS:
            key = f"{kind}, {depth} | {method}"
            if key not in runs:
                runs[key] = one = run(kind, depth, method, data, epochs, options.width)
                print(f"{key}: {below(one):.0f} % below 90 degrees, error {one['test_error']}", flush=True)
        settings = {"threads": 1, "epochs": epochs, "width": options.width, "training images": len(data[0]), "seed": 1}
        save(output, result("alignment", rows_of(runs), settings, runs=runs))
    print(show(runs))


if __name__ == "__main__":
    main()
