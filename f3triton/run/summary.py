"""The figures of a finished run."""

from __future__ import annotations

import platform
import sys
import time
from importlib import metadata

import torch

from ..data import Dataset
from .trainer import FitResult, Trainer


def summarise(trainer: Trainer, train: Dataset, test: Dataset, result: FitResult, seconds: float) -> dict:
    """What `summary.json` holds: the last evaluation's figures, the best ones, speed, memory and circumstances.

    `test_error` is in percent wrong, `test_mse` in units of the training targets' variance, `test_mse_in_units` in the
    targets' own, the loss of a text in nats a token; `seconds` is the whole run's, `steps_per_second` counts the time of
    learning only; `peak_memory_bytes` is the device's where it is a GPU, else the whole process's.
    """
    last = result.history[-1] if result.history else {}
    figure = {"classification": "test_error", "regression": "test_mse"}.get(train.task, "test_loss")
    store = getattr(trainer.learner, "store", None)
    best = min((r for r in result.history if figure in r), key=lambda r: r[figure], default={})
    return {
        "method": trainer.method,
        "error_store": None if store is None else store.describe(),
        "signal": None if trainer.signal is None else trainer.signal.source,
        "status": result.status,
        "dataset": train.name,
        "task": train.task,
        "train_samples": len(train),
        "test_samples": len(test),
        "epochs": result.epochs,
        "steps": result.steps,
        "train_loss": last.get("train_loss"),
        "train_error": last.get("train_error"),
        "test_loss": last.get("test_loss"),
        **{key: value for key, value in last.items() if key.startswith("test_") and key != "test_loss"},
        f"best_{figure}": best.get(figure),
        "best_epoch": best.get("epoch"),
        "seconds": round(seconds, 3),
        "steps_per_second": round(result.steps / result.learning_seconds, 1) if result.learning_seconds else None,
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": trainer.seed,
        "device": device_name(trainer.device),
        "precision": trainer.precision,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


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
