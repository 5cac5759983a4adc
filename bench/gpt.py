"""A small language model by F3, its peers and backpropagation: bits per character of the same text after the same visits.

    python -m bench.gpt --text path/to/tiny-shakespeare/input.txt
    python -m bench.gpt --text FILE --only f3-block bp
    python -m bench.gpt --quick                      two short runs on this repository's README

Every run is what `train.py` does with the options that are stored beside its figures. All methods have the same first weights,
order, learning rate and number of token visits; with windows the first of the visits of a window teaches only the head. A run
that is in the result file already is not repeated, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from f3triton import Predictor, Trainer
from f3triton.base.exceptions import InputError
from f3triton.run.options import make_settings, parse
from f3triton.run.parts import load_data, make_network, network_of

from .common import RESULTS, result, row, runs_in, save, table

# What is the same in all runs; chosen so that a run takes a few minutes on one core of a CPU.
COMMON = [
    "--dim", "64", "--depth", "2", "--heads", "4", "--context", "64", "--batch-size", "32", "--max-train-samples", "9600",
    "--lr", "3e-3", "--epochs", "5",
]  # fmt: skip
WINDOWS = ["--window", "64", "--visits", "5"]
QUICK = [
    "--tokenizer",
    "bytes",
    "--dim",
    "16",
    "--depth",
    "1",
    "--heads",
    "2",
    "--context",
    "16",
    "--max-train-samples",
    "64",
    "--epochs",
    "5",
]
RUNS = {
    "bp": ["--method", "bp"],
    "dfa-block": ["--method", "dfa"],
    "dfa-layer": ["--method", "dfa", "--granularity", "layer"],
    "f3-block-windows": WINDOWS,
    "f3-layer-windows": ["--granularity", "layer", *WINDOWS],
    "f3-block": [],
    "f3-layer": ["--granularity", "layer"],
    "drtp-block": ["--method", "drtp"],
    "last-layer": ["--method", "last-layer"],
    "f3-block-windows-rank-16": [*WINDOWS, "--error-rank", "16"],
    "f3-block-windows-sampled-8": [*WINDOWS, "--error-dtype", "sampled-8"],
    "f3-block-windows-top-8": [*WINDOWS, "--error-dtype", "top-8"],
    "dfa-block-at-output": ["--method", "dfa", "--feedback-at", "output"],
}
PROMPT = "ROMEO:"


def run(text: str, extra: list[str], common: list[str], data: list) -> dict:
    """One training run; its figures by epoch, and a sample. `data` keeps the text that was read."""
    options = parse(["--text", text, *common, *extra])
    data[:] = data or [load_data(options)]
    train_set, test_set = data[0]
    trainer = Trainer(make_network(options, network_of(options, train_set)), settings=make_settings(options))
    found = trainer.fit(train_set, options.epochs, test_set)
    store = getattr(trainer.learner, "store", None)
    predictor = Predictor(trainer.model, train_set.preprocessing, "cross-entropy")
    return {
        "options": extra,
        "test_bits": [round(record["test_loss"] / math.log(2), 4) for record in found.history],
        "train_bits": [round(record["train_loss"] / math.log(2), 4) for record in found.history],
        "test_perplexity": round(found.history[-1]["test_perplexity"], 3),
        "steps": found.steps,
        "steps_per_second": round(found.steps / found.learning_seconds, 2),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "bytes_per_token": None if store is None else store.bytes_per_sample // train_set.positions,
        "sample": predictor.generate(PROMPT, 200, 0.8, 0),
    }


def rows_of(runs: dict[str, dict]) -> list[dict]:
    """The last figures as bars, and the curves."""
    metric = "test bits per character"
    rows = [row(name, "last epoch", metric, found["test_bits"][-1], part="after training") for name, found in runs.items()]
    for name, found in runs.items():
        for epoch, bits in enumerate(found["test_bits"], 1):
            rows.append(row(name, epoch, metric, bits, x_name="visits of every token", part="over training"))
    return rows


def show(runs: dict[str, dict]) -> str:
    """Bits per character after the last visit, by method."""
    lines = [
        [name, f"{found['test_bits'][-1]:.3f}", f"{found['train_bits'][-1]:.3f}", f"{found['test_perplexity']:.2f}",
         found["bytes_per_token"] or "", f"{found['steps_per_second']:.1f}"]
        for name, found in runs.items()
    ]  # fmt: skip
    return table(["run", "test bits", "training bits", "test perplexity", "error bytes a token", "steps/s"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="FILE", help="Tiny Shakespeare")
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), metavar="RUN", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="default: bench/results/gpt.json; with --quick, gpt-quick.json")
    options = parser.parse_args()
    if options.text is None and not options.quick:
        parser.error("needs --text FILE, or --quick")
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / ("gpt-quick.json" if options.quick else "gpt.json")
    text = options.text or str(Path(__file__).resolve().parents[1] / "README.md")
    common, names = (QUICK, ["bp", "f3-block-windows"]) if options.quick else (COMMON, list(RUNS))
    runs = runs_in(output)
    data: list = []
    try:
        for name in options.only or names:
            if name in runs:
                continue
            runs[name] = run(text, RUNS[name], common, data)
            print(f"{name}: {runs[name]['test_bits'][-1]} bits per character", flush=True)
            runs = {known: runs[known] for known in RUNS if known in runs}
            save(output, result("gpt", rows_of(runs), {"threads": options.threads, "options": common}, runs=runs))
    except InputError as error:
        parser.error(str(error))
    print(f"\n{show(runs)}\n")
    best = min((name for name in runs if name.startswith("f3")), key=lambda name: runs[name]["test_bits"][-1], default=None)
    if best is not None:
        print(f"a sample of {best}:\n{runs[best]['sample']}")


if __name__ == "__main__":
    main()
