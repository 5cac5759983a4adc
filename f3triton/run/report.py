"""A run in words: what it begins with, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..base.text import readable_bytes
from ..error_store import Codec
from .folder import RunFolder


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
    others, lines = summary.get("comparison", []), []
    same = " (same network, seed, order and learning rate)"

    def beside(show: Callable[[Mapping[str, object]], str], note: str = "") -> str:
        return "".join(f"; {other['method']}: {show(other)}" for other in others) + (note if others else "")

    if summary.get("test_error") is not None:
        lines.append(f"{summary['method']}: {100 - summary['test_error']:.2f} % of the test samples right")
        lines[-1] += beside(lambda other: f"{100 - other['test_error']:.2f} %", same)
    elif summary.get("test_mse") is not None:
        own = ", ".join(f"{name} {summary['test_mse_in_units'][name]:.4g}" for name in targets)
        lines.append(f"{summary['method']}: test MSE {summary['test_mse']:.4f} (in the target's own units: {own})")
        lines[-1] += beside(lambda other: f"{other['test_mse']:.4f}")
    bits = next((key for key in summary if key.startswith("test_bits_per_")), None)
    if bits is not None:
        unit = bits.removeprefix("test_bits_per_")
        nats = f"{summary['test_loss']:.4f} nats, perplexity {summary['test_perplexity']:.2f}"
        lines.append(f"{summary['method']}: {summary[bits]:.4f} bits per {unit} of the test text ({nats})")
        lines[-1] += beside(lambda other: f"{other[bits]:.4f}", same)
    if summary.get("exits"):
        answers = ", ".join(
            f"{'the mean' if place == 'mean' else place} {value:.4g}" for place, value in summary["exits"].items()
        )
        lines.append(f"by the stage that answers (f3.load(..., exit=K), --evaluate RUN --exit K): {answers}")
    if summary["steps_per_second"]:
        lines.append("; ".join(f"{run['method']}: {run['steps_per_second']:,.0f} steps/s" for run in (summary, *others)))
    lines.append(f"written to {folder.path}: summary.json, metrics.jsonl, curves.png, model.safetensors, config.json")
    if others and bits is None:
        lines += [
            "next: python train.py --method local --lr 2e-3  errors of each layer's own, no delay: docs/local.md",
            "      python train.py --method drtp --compare  another method; also dfa, sdfa, last-layer",
            "      python train.py --dataset ylecun/mnist   any Hugging Face data set, or your own folder or file",
        ]
    return lines
