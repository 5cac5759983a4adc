"""A run in words: what it begins with, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping

from ..base.text import readable_bytes
from ..error_store import Codec
from .folder import RunFolder

# What is shown of a run, by its key in a summary: its name and form; else bits per character, byte or token.
FIGURES = {"test_error": ("wrong", "{:.2f} %"), "test_mse": ("squared error", "{:.4f}")}


def title_of(network: Mapping[str, object]) -> str:
    """`MLP 64-500-10`, or the kind of network and its settings."""
    if network["model"] == "mlp":
        return f"MLP {'-'.join(map(str, network['sizes']))}"
    settings = (f"{name} {value}" for name, value in network.items() if name != "model" and value is not None)
    return f"{network['model']}: {', '.join(settings)}"


def store_line(home: str, samples: int, codec: Codec) -> str:
    """Where errors are kept, how, and how much that takes."""
    needed = readable_bytes(samples * codec.row_bytes)
    each = f" ({codec.row_bytes // codec.positions:,} a token)" * (codec.positions > 1)
    return f"error store: {home}, {codec.word}, {samples:,} rows of {codec.row_bytes:,} bytes{each}, {needed}"


def report(summary: Mapping[str, object], folder: RunFolder, targets: tuple[str, ...]) -> list[str]:
    """The result of a run from its `summary.json`, the comparison if there was one, and what to try next."""
    runs = [summary, *summary.get("comparison", [])]
    found = next((key for key in summary if key in FIGURES or key.startswith("test_bits_per_")), None)
    lines = []
    if found is not None and summary[found] is not None:
        name, shown = FIGURES.get(found, (found.removeprefix("test_").replace("_", " "), "{:.4f}"))
        rows = [("test:", name, "activations", "steps/s")]
        for run in runs:
            size, speed = run["activation_bytes"], run["steps_per_second"]
            rows.append(
                (run["method"], shown.format(run[found]), "" if size is None else readable_bytes(size), f"{speed or 0:,.0f}")
            )
        if (guess := summary["guess"]) is not None:
            answer = guess["answer"] if len(guess["answer"]) <= 30 else f"{guess['answer'][:27]}..."
            rows.append((answer, shown.format(guess[found]), "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            (row[0].ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))).rstrip()
            for row in rows
        ]
        if guess is not None and summary[found] >= guess[found]:
            also = "" if summary["method"] in ("bp", "local") else ", --method local or bp"
            lines.append(
                f"{summary['method']} is no better than one answer to everything after {summary['steps']:,} steps; to try: "
                f"more --epochs, a smaller --batch-size, another --lr{also}"
            )
    if summary.get("test_mse") is not None:
        own = ", ".join(_in_units(name, summary) for name in targets)
        lines.append(f"root mean squared error of {summary['method']} in the target's own units: {own}")
    if summary.get("test_perplexity") is not None:
        lines.append(
            f"{summary['method']}: {summary['test_loss']:.4f} nats a token, perplexity {summary['test_perplexity']:.2f}"
        )
    if summary.get("exits"):
        answers = ", ".join(
            f"{'the mean' if place == 'mean' else place} {value:.4g}" for place, value in summary["exits"].items()
        )
        lines.append(f"by the stage that answers (f3.load(..., exit=K), --evaluate RUN --exit K): {answers}")
    lines.append(f"written to {folder.path}: summary.json, metrics.jsonl, curves.png, model.safetensors, config.json")
    if len(runs) > 1 and summary["task"] != "language-modeling":
        bundled = summary["dataset"] == "digits"
        own = (
            "on your data: python train.py --compare --dataset data.csv (or a folder, a hub name)"
            if bundled
            else "--method local"
        )
        lines.append(f"next: {own}; --hidden 500x10, deeper at the same activations of f3; which method when: docs/methods.md")
    return lines


def _in_units(name: str, summary: Mapping[str, object]) -> str:
    """A target's root mean squared error, beside that of its training mean."""
    mse, guess = summary["test_mse_in_units"][name], summary["guess"]
    told = f"{name} {mse**0.5:.4g}"
    if guess is None or not (plain := guess["test_mse_in_units"][name]):
        return told
    return f"{told} (always the training mean: {plain**0.5:.4g}; R2 {1 - mse / plain:.2f})"
