"""Test error of a vision transformer on MNIST by F3 and its peers, in the authors' setting and with a decaying learning rate.

    python -m bench.vit --mnist ylecun/mnist

The authors' setting (Helmholtz-AI-Energy/f3): images of 28x28 in patches of 7, 16 tokens of 32, 4 transformer blocks of 8
heads of 64, perceptrons of 128 tanh units, a head of two layers; cross-entropy, batch 100, Adam at a constant 3e-3. Here for 10
epochs; the runs that do not say otherwise have 1e-3 with cosine decay.
`--mnist` takes what `train.py --dataset` takes. A run that is in the result file already is not repeated, so the command can be
stopped and started again. `--quick` is a smaller network on the bundled digits, in a file of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import f3triton as f3

from .common import RESULTS, result, row, runs_in, save, table

MNIST = {
    "image_size": 28, "channels": 1, "classes": 10, "patch_size": 7, "depth": 4, "heads": 8, "dim": 32, "head_dim": 64,
    "mlp_width": 128,
}  # fmt: skip
DIGITS = MNIST | {"image_size": 8, "patch_size": 2, "depth": 2, "heads": 2, "dim": 16, "head_dim": 16, "mlp_width": 64}
CONSTANT, DECAYING = {"lr": 3e-3, "lr_schedule": "constant"}, {"lr": 1e-3, "lr_schedule": "cosine"}
WINDOWS = {"window": 100, "visits": 2}
# the most telling first
RUNS = {
    "f3, windows of 100 x 2": {"method": "f3", **WINDOWS, **DECAYING},
    "bp": {"method": "bp", **DECAYING},
    "dfa": {"method": "dfa", **DECAYING},
    "drtp": {"method": "drtp", **DECAYING},
    "f3, authors' setting": {"method": "f3", **CONSTANT},
    "bp, authors' setting": {"method": "bp", **CONSTANT},
    "f3": {"method": "f3", **DECAYING},
    "f3, every layer taught directly, windows of 100 x 2": {"method": "f3", "granularity": "layer", **WINDOWS, **DECAYING},
}


def run(data: tuple[f3.Dataset, f3.Dataset], network: dict, epochs: int, seed: int, settings: dict) -> dict:
    """One training run: loss and error by epoch."""
    settings = dict(settings)
    torch.manual_seed(seed)
    model = f3.models.ViT(**network, granularity=settings.pop("granularity", "block"))
    rule = f3.Adam(lr=settings.pop("lr"))
    trainer = f3.Trainer(model, "cross-entropy", rule, batch_size=100, seed=seed, device="cpu", **settings)
    found = trainer.fit(data[0], epochs, data[1])
    errors = [round(record["test_error"], 4) for record in found.history]
    return {
        "last": errors[-1],
        "best": min(errors),
        "by_epoch": errors,
        "train_loss": [float(f"{record['train_loss']:.5g}") for record in found.history],
        "steps": found.steps,
        "steps_per_second": round(found.steps / found.learning_seconds, 2),
    }


def rows_of(runs: dict[str, dict]) -> list[dict]:
    """Bars of the last epoch, and the curves."""
    rows = [row(name, "last epoch", "test error, %", found["last"], part="ViT") for name, found in runs.items()]
    for name, found in runs.items():
        for epoch, error in enumerate(found["by_epoch"], 1):
            rows.append(row(name, epoch, "test error, %", error, x_name="epoch", part="ViT, over training", scale="log"))
    return rows


def show(runs: dict[str, dict]) -> str:
    """The table of the runs."""
    lines = [
        [name, *(f"{found['by_epoch'][epoch - 1]:.2f}" for epoch in (1, 5) if epoch <= len(found["by_epoch"])),
         f"{found['last']:.2f}", f"{found['best']:.2f}", f"{found['steps_per_second']:.1f}"]
        for name, found in runs.items()
    ]  # fmt: skip
    return table(["run", "epoch 1", "epoch 5", "last epoch", "best", "steps/s"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--quick", action="store_true", help="a smaller network on the bundled digits")
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=tuple(RUNS), help="these runs only")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--output", type=Path, help="default: bench/results/vit.json, vit-quick.json with --quick")
    options = parser.parse_args()
    if (options.mnist is None) != options.quick:
        parser.error("give --mnist DATASET or --quick")
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / ("vit-quick.json" if options.quick else "vit.json")
    data = f3.load_dataset("digits" if options.quick else options.mnist)
    network = DIGITS if options.quick else MNIST
    runs = runs_in(output)
    settings = {"network": network, "epochs": options.epochs, "seed": options.seed, "threads": options.threads}
    for name in options.only or RUNS:
        if name not in runs:
            runs[name] = run(data, network, options.epochs, options.seed, RUNS[name])
            save(output, result("vit", rows_of(runs), settings, runs=runs))
        print(f"{name}: last {runs[name]['last']:.2f}, best {runs[name]['best']:.2f}", flush=True)
    print(f"\ntest error in percent\n\n{show(runs)}")


if __name__ == "__main__":
    main()
