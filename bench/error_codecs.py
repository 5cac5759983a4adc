"""Test error on MNIST by the type of the stored errors' entries, and the bytes that a sample's row takes.

    python -m bench.error_codecs --mnist ylecun/mnist
    python -m bench.error_codecs --quick                 on the bundled digits

784-500-10, F3 delayed error, this library's defaults, 20 epochs, one seed: a difference of a tenth of a percent is chance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import f3triton as f3
from f3triton.error_store import make_codec

from .common import RESULTS, result, row, save, table

WORDS = ("float32", "float16", "bfloat16", "int8", "ternary", "top-4", "top-2", "sampled-4")


def show(rows: list[dict]) -> str:
    """The result as a Markdown table."""
    lines = [[r["method"], r["bytes_per_sample"], f"{r['median']:.2f}", f"{r['best']:.2f}"] for r in rows]
    return table(["error dtype", "bytes a sample", "test error in percent, last epoch", "best epoch"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="DATASET", help="MNIST: a hub name or a folder")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="the bundled digits")
    parser.add_argument("--output", type=Path, help="default: bench/results/error-codecs.json; with --quick -quick.json")
    options = parser.parse_args()
    if (options.mnist is None) != options.quick:
        parser.error("give --mnist DATASET or --quick")
    torch.set_num_threads(1)
    train, test = f3.load_dataset("digits" if options.quick else options.mnist)
    rows = []
    for word in WORDS:
        torch.manual_seed(1)
        model = f3.models.MLP([train.in_features, 500, train.outputs])
        trainer = f3.Trainer(model, "bce", f3.Adam(lr=5e-4), seed=1, device="cpu", error_dtype=word)
        errors = [record["test_error"] for record in trainer.fit(train, options.epochs, test).history]
        more = {"best": round(min(errors), 4), "bytes_per_sample": make_codec(word, train.outputs, torch.float32).row_bytes}
        rows.append(row(word, "last epoch", "test error, %", errors[-1], part=train.name, **more))
        output = options.output or RESULTS / ("error-codecs-quick.json" if options.quick else "error-codecs.json")
        save(output, result("error_codecs", rows, {"epochs": options.epochs, "threads": 1}))
    print(show(rows))


if __name__ == "__main__":
    main()
