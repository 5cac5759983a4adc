"""What narrow moments cost in accuracy: the same runs with moments in float32, bfloat16 and int8, and with bfloat16 weights.

    python -m bench.moments --mnist FOLDER --text FILE [--cifar10 FOLDER] [--only RUN ...]
    python -m bench.moments --quick                    the bundled digits

Every run is what `train.py` does with the options that are stored beside its figures; precisions differ in nothing else. A run
that is in the result file already is not repeated, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from f3triton import Trainer
from f3triton.base.exceptions import InputError
from f3triton.run.options import make_settings, parse
from f3triton.run.parts import load_data, make_network, network_of

from .common import RESULTS, result, row, runs_in, table, write_result

MLP = ["--lr", "5e-4", "--epochs", "5"]
GPT = [
    "--dim", "64", "--depth", "2", "--heads", "4", "--context", "64", "--batch-size", "32", "--max-train-samples", "3200",
    "--lr", "3e-3", "--epochs", "2",
]  # fmt: skip
RUNS = {
    "mlp f3": ("mnist", MLP),
    "mlp local": ("mnist", ["--method", "local", *MLP]),
    "mlp f3, sgd": ("mnist", ["--optimizer", "sgd", "--momentum", "0.9", "--lr", "1e-3", "--epochs", "5"]),
    "gpt local": ("text", ["--method", "local", *GPT]),
    "convnet f3": ("cifar10", ["--model", "convnet", "--max-train-samples", "5000", "--epochs", "2"]),
}
QUICK = {"mlp f3": ("digits", ["--epochs", "5"])}
KINDS = {
    "float32": [],
    "bfloat16": ["--moments", "bfloat16"],
    "int8": ["--moments", "int8"],
    "bfloat16 weights": ["--precision", "bfloat16-weights"],
    "bfloat16 weights, int8": ["--precision", "bfloat16-weights", "--moments", "int8"],
}


def run(arguments: list[str]) -> dict:
    """One training run's test error in percent, or bits per token of a text, at each epoch."""
    options = parse(arguments)
    train_set, test_set = load_data(options)
    trainer = Trainer(make_network(options, network_of(options, train_set)), settings=make_settings(options))
    found = trainer.fit(train_set, options.epochs, test_set)
    text = "--text" in arguments
    values = [r["test_loss"] / math.log(2) if text else r["test_error"] for r in found.history]
    state = [s for s in trainer.learner.updater.states.values() if s.moments]
    bytes_ = sum(t.nbytes for s in state for t in (*s.moments, *s.scales))
    return {
        "metric": "test bits per token" if text else "test error, percent",
        "values": [round(value, 4) for value in values],
        "moment_bytes": bytes_,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def rows_of(runs: dict[str, dict[str, dict]]) -> list[dict]:
    """The last values, one panel for each network."""
    return [
        row(kind, "last epoch", found["metric"], found["values"][-1], part=name, moment_bytes=found["moment_bytes"])
        for name, kinds in runs.items()
        for kind, found in kinds.items()
    ]


def show(runs: dict[str, dict[str, dict]]) -> str:
    """A line for each network, a column for each kind of moments."""
    lines = [[f"{name} ({next(iter(kinds.values()))['metric']})", *(f"{kinds[k]['values'][-1]:.3f}" if k in kinds else ""
             for k in KINDS)] for name, kinds in runs.items()]  # fmt: skip
    return table(["", *(f"{kind} moments" if "weights" not in kind else kind for kind in KINDS)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("mnist", "FOLDER"), ("cifar10", "FOLDER"), ("text", "FILE")):
        parser.add_argument(f"--{name}", metavar=what)
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), metavar="RUN", help=f"some of: {'; '.join(RUNS)}")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=None, help="default: bench/results/moments.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / ("moments-quick.json" if options.quick else "moments.json")
    sources = {"digits": ["--dataset", "digits"]}
    sources |= {name: ["--dataset", getattr(options, name)] for name in ("mnist", "cifar10") if getattr(options, name)}
    sources |= {"text": ["--text", options.text]} if options.text else {}
    runs = runs_in(output)
    try:
        for name, (data, own) in (QUICK if options.quick else RUNS).items():
            if data not in sources or (options.only and name not in options.only):
                continue
            for kind, changes in KINDS.items():
                if kind in runs.get(name, {}):
                    continue
                runs.setdefault(name, {})[kind] = run([*sources[data], *own, *changes])
                print(f"{name}, {kind}: {runs[name][kind]['values'][-1]}", flush=True)
                settings = {"threads": options.threads, "options": {name: own for name, (_, own) in RUNS.items()}}
                write_result(output, result("moments", rows_of(runs), settings, runs=runs))
    except InputError as error:
        parser.error(str(error))
    print(show(runs))


if __name__ == "__main__":
    main()
