"""The authors' experiments on MNIST and Wine Quality, in their setting and in this library's default one.

    python -m bench.paper --mnist ylecun/mnist --wine path/to/wine-quality

`--mnist` and `--wine` take what `train.py --dataset` takes. Every run is one seed; a run that is already in the result
file is not repeated, so the command can be stopped and started again. `--only` picks runs by name, `--list` names them.
"authors" is the figure of the authors' own code (Helmholtz-AI-Energy/f3, unchanged, seed 1) in the same setting: hidden
tanh, batch 50, Adam with a constant learning rate, 100 epochs (MNIST) or 200 (Wine Quality).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import f3triton as f3

from .common import RESULTS, origin, table, write_result

PAPER = {"lr": 1.5e-4, "lr_schedule": "constant", "epochs": 100}
WINE = {"lr": 1e-4, "lr_schedule": "constant", "epochs": 200}
OURS = {"lr": 5e-4, "lr_schedule": "cosine", "epochs": 100}
MASKED = {"mask_target": True}

# name: (settings, the authors' best, the authors' last)
MNIST = {
    "bp": ({**PAPER, "method": "bp"}, 1.53, 1.57),
    "dfa-trinomial": ({**PAPER, "method": "dfa"}, 1.64, 1.91),
    "f3-error-masked-trinomial": ({**PAPER, **MASKED}, 2.70, 2.79),
    "f3-error-trinomial": (PAPER, 2.79, 3.16),
    "f3-error-kaiming": ({**PAPER, "feedback": "kaiming"}, 2.53, 3.67),
    "f3-loss-trinomial": ({**PAPER, "signal": "delayed-loss"}, 3.62, 3.66),
    "drtp-trinomial": ({**PAPER, "method": "drtp"}, 4.21, 4.31),
    "drtp-kaiming": ({**PAPER, "method": "drtp", "feedback": "kaiming"}, 4.44, 4.50),
    "last-layer": ({**PAPER, "method": "last-layer", "lr": 1.5e-2}, 6.84, 7.60),
    "f3-error-masked-binomial": ({**PAPER, **MASKED, "feedback": "binomial", "epochs": 20}, None, 90.0),
    "f3-default": (OURS, None, None),
    "f3-default-3-hidden": ({**OURS, "hidden": 3}, None, None),
    "bp-default": ({**OURS, "method": "bp"}, None, None),
    "dfa-default": ({**OURS, "method": "dfa"}, None, None),
}
WINE_QUALITY = {
    "bp": ({**WINE, "method": "bp"}, None, 0.5942),
    "f3-error-kaiming": ({**WINE, "feedback": "kaiming"}, None, 0.5986),
    "f3-error-trinomial": (WINE, None, 0.6057),
    "f3-loss-trinomial": ({**WINE, "signal": "delayed-loss"}, None, 0.6120),
    "dfa-trinomial": ({**WINE, "method": "dfa"}, None, 0.6060),
    "last-layer": ({**WINE, "method": "last-layer"}, None, 0.6351),
    "drtp-trinomial": ({**WINE, "method": "drtp"}, None, 0.6619),
}
WATCHED = (1, 2, 5, 10, 20, 50, 100, 200)


def run(train: f3.Dataset, test: f3.Dataset, settings: dict, seed: int) -> dict:
    """One training run; returns its figures by epoch."""
    settings = dict(settings)
    epochs, lr, hidden = settings.pop("epochs"), settings.pop("lr"), settings.pop("hidden", 1)
    torch.manual_seed(seed)
    model = f3.models.MLP([train.in_features, *[500] * hidden, train.outputs], "tanh", settings.pop("feedback", "trinomial"))
    result = f3.Trainer(model, "auto", f3.Adam(lr=lr), seed=seed, **settings).fit(train, epochs, test)
    figure = "test_error" if train.task == "classification" else "test_mse"
    values = [record[figure] for record in result.history]
    return {
        "best": round(min(values), 4),
        "last": round(values[-1], 4),
        "by_epoch": {str(epoch): round(values[epoch - 1], 4) for epoch in WATCHED if epoch <= len(values)},
        "steps": result.steps,
        "steps_per_second": round(result.steps / result.learning_seconds, 1),
    }


def show(experiments: dict, results: dict) -> str:
    """Ours beside the authors', best and last epoch."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}" if value > 1 else f"{value:.4f}"

    rows = [
        [name, cell(best), cell(results[name]["best"]), cell(last), cell(results[name]["last"])]
        for name, (_, best, last) in experiments.items()
        if name in results
    ]
    return table(["run", "authors, best", "ours, best", "authors, last", "ours, last"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder; without it, no MNIST run")
    parser.add_argument("--wine", metavar="DATASET", help="Wine Quality: a folder; without it, no Wine run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--list", action="store_true", help="name the runs and stop")
    parser.add_argument("--output", type=Path, default=RESULTS / "paper.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {"runs": {}}
    for title, source, experiments, task, target in (
        ("mnist", options.mnist, MNIST, "classification", None),
        ("wine-quality", options.wine, WINE_QUALITY, "regression", "quality"),
    ):
        results = done["runs"].setdefault(title, {})
        if options.list:
            print(title, *experiments, sep="\n  ")
            continue
        todo = [name for name in experiments if name not in results and (not options.only or name in options.only)]
        if source is not None and todo:
            train, test = f3.load_dataset(source, task=task, target=target)
            for name in todo:
                settings = experiments[name][0]
                results[name] = {"settings": settings, "seed": options.seed, **run(train, test, settings, options.seed)}
                print(f"{title} {name}: best {results[name]['best']}, last {results[name]['last']}", flush=True)
                write_result(options.output, {**origin("bench.paper"), **done})
        if results:
            figure = "test error in percent" if task == "classification" else "test MSE"
            print(f"\n{title}: {figure}\n\n{show(experiments, results)}\n")


if __name__ == "__main__":
    main()
