"""Which implementation runs: a backend is a module with the functions of `reference`."""

from __future__ import annotations

import importlib
import os
from types import ModuleType, SimpleNamespace

import torch

BACKENDS = ("auto", "torch", "triton")


def backend(name: str, device: torch.device, precision: str = "float32") -> ModuleType | SimpleNamespace:
    """The operations that run on `device`: `torch`, `triton`, or `auto`, which today means `torch` everywhere.

    Raises ValueError where the name is unknown or the Triton backend cannot run: it needs a CUDA or ROCm device, or
    Triton's interpreter (`TRITON_INTERPRET=1` in the environment) on a CPU, and has no float64.
    """
    if name in ("auto", "torch"):
        from . import eager

        return eager
    if name != "triton":
        raise ValueError(f"backend {name!r} is unknown; allowed: {', '.join(BACKENDS)}")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs a CUDA or ROCm device, got {device.type!r}; "
            "set TRITON_INTERPRET=1 to run its kernels in Triton's (slow) interpreter, or use backend 'torch'"
        )
    if precision == "float64":
        raise ValueError("backend 'triton' has no precision 'float64'; use backend 'torch', or another precision")
    try:
        operations = importlib.import_module("f3triton.kernels.triton_ops")
        return operations.with_precision("tf32") if precision == "tf32" else operations
    except ImportError as error:
        raise ValueError(f"backend 'triton' needs the triton package, which cannot be imported: {error}") from error
