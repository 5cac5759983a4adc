"""The figures of a finished run, and their curves."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata

import torch

from ..data import Dataset
from ..data.identity import digest
from ..data.targets import LANGUAGE_MODELING
from .console import shown
from .dry_run import budget_of
from .folder import RunFolder
from .guess import guess_of
from .records import figure_of
from .result import FitResult
from .trainer import Trainer


def summarise(trainer: Trainer, train: Dataset, test: Dataset, result: FitResult, seconds: float) -> dict:
    """What `summary.json` holds: the last evaluation's figures, the best ones, speed, memory and circumstances.

    `test_error` is in percent wrong, `test_mse` in units of the training targets' variance, `test_mse_in_units` in the
    targets' own, the loss of a text in nats a token; `seconds` is the whole run's, `steps_per_second` counts the time of
    learning only; `peak_memory_bytes` is the device's where it is a GPU, else the whole process's; `activation_bytes` is what a
    step's activations need by arithmetic, as in `--dry-run`; `guess` has the test figures of one answer to everything.
    """
    last = result.history[-1] if result.history else {}
    best = result.best or {}
    figure = figure_of(best) or "test_loss"
    store = trainer.learner.store
    return {
        "method": trainer.method,
        "error_store": None if store is None else store.describe(),
        "signal": None if trainer.signal is None else trainer.signal.source,
        "status": result.status,
        "dataset": train.name,
        "task": train.task,
        "train_samples": len(train),
        "test_samples": len(test),
        "test_data": digest(test),
        "epochs": result.epochs,
        "steps": result.steps,
        "train_loss": last.get("train_loss"),
        "train_error": last.get("train_error"),
        "test_loss": last.get("test_loss"),
        **{key: value for key, value in last.items() if key.startswith("test_") and key != "test_loss"},
        f"best_{figure}": best.get(figure),
        "best_epoch": best.get("epoch"),
        "best": {key: value for key, value in best.items() if key.startswith("test_")} or None,
        "guess": guess_of(train, test),
        "exits": None if result.status == "diverged" else exits_of(trainer, test, figure),
        "workers": result.workers or None,
        "seconds": round(seconds, 3),
        "steps_per_second": round(result.steps / result.learning_seconds, 1) if result.learning_seconds else None,
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "activation_bytes": budget_of(trainer.settings, trainer.model.config(), (train, test)).memory["activations"],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": trainer.seed,
        "device": device_name(trainer.device),
        "backend": trainer.choice.backend,
        "backend_why": trainer.choice.why,
        "precision": trainer.precision,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def exits_of(trainer: Trainer, test: Dataset, figure: str) -> dict[str, float] | None:
    """The test figure by what answers, of a network that has learned from local errors: each stage, by its number, and the
    mean."""
    model, found = trainer.model, {}
    if model.exits == 1:
        return None
    for place in (*range(1, model.exits + 1), "mean"):
        model.exit = place
        found[str(place)] = trainer.evaluate(test)[figure]
    model.exit = None
    return found


def write_summary(
    folder: RunFolder, trainer: Trainer, data: tuple[Dataset, Dataset], seconds: float, others: Sequence[Trainer] = ()
) -> dict:
    """Write `summary.json` and `curves.png`, with the runs of `others` beside it; returns the summary."""
    summary = summarise(trainer, *data, trainer.result, seconds)
    runs = {trainer.method: trainer.result.history}
    for other in others:
        runs[other.method] = other.result.history
        against = summarise(other, *data, other.result, other.result.learning_seconds)
        wanted = ("method", *shown(against), "steps_per_second", "activation_bytes")
        found = {key: against[key] for key in wanted if not key.startswith("train")}
        summary.setdefault("comparison", []).append(found)
    folder.mend(None if trainer.result.status == "diverged" else trainer.model)
    folder.write_json("summary.json", summary)
    figure, label = _figure_of(data[0])
    keys = {"train": "train_loss" if figure == "mse" else f"train_{figure}", "test": f"test_{figure}"}
    curves = {
        f"{method}, {part}": [(r["epoch"], r[key]) for r in history if (key := keys[part]) in r]
        for method, history in runs.items()
        for part in ("train", "test")
    }
    title = f"{data[0].name}, {summary['parameters']:,} parameters"
    folder.draw(title, "epoch", label, {name: curve for name, curve in curves.items() if curve})
    return summary


def _figure_of(data: Dataset) -> tuple[str, str]:
    """The figure that the curves show, by the end of its name, and its label."""
    if data.task == LANGUAGE_MODELING:
        unit = data.preprocessing.tokenizer.unit
        return f"bits_per_{unit}", f"bits per {unit}"
    return ("error", "percent wrong") if data.task == "classification" else ("mse", "mean squared error")


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use so far: allocated on the GPU, or resident in the process; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """`cuda (NVIDIA H200)`, or `cpu (N threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = {name: version(name) for name in ("f3triton", "torch", "triton", "datasets", "numpy")}
    return {"python": platform.python_version(), **packages}
