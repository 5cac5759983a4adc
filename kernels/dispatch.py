"""Which implementation runs: a backend is a module with the functions of `reference`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType, SimpleNamespace

import torch

BACKENDS = ("auto", "torch", "triton")


def backend(name: str, device: torch.device, precision: str = "float32") -> ModuleType | SimpleNamespace:
    """The operations that run on `device`: `torch`, `triton`, or `auto`.

    `auto` is Triton on CUDA and ROCm, after its kernels have been checked on that very device (`selfcheck`), and torch where
    there is none, where they fail, which is warned of, and in float64.

    Raises ValueError where the name is unknown or the Triton backend cannot run: it needs a CUDA or ROCm device, or
    Triton's interpreter (`TRITON_INTERPRET=1` in the environment) on a CPU, and has no float64; or where its kernels fail
    the check.
    """
    from . import eager

    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; allowed: {', '.join(BACKENDS)}")
    if name == "torch" or (name == "auto" and (device.type != "cuda" or precision == "float64")):
        return eager
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs a CUDA or ROCm device, got {device.type!r}; "
            "set TRITON_INTERPRET=1 to run its kernels in Triton's (slow) interpreter, or use backend 'torch'"
        )
    if precision == "float64":
        raise ValueError("backend 'triton' has no precision 'float64'; use backend 'torch', or another precision")
    reason = _fault(device, precision)
    if reason is None:
        operations = importlib.import_module("f3triton.kernels.gpu.ops")
        return operations.with_precision("tf32") if precision == "tf32" else operations
    if name == "triton":
        raise ValueError(f"backend 'triton' {reason}; use backend 'torch'")
    if importlib.util.find_spec("triton") is not None:
        warnings.warn(f"backend 'triton' {reason}; 'torch' is used instead", stacklevel=2)
    return eager


def _fault(device: torch.device, precision: str) -> str | None:
    """Why the Triton kernels cannot be used on this device; None where they can."""
    try:
        from . import selfcheck
        from .gpu import ops as triton_ops  # noqa: F401 - whether it can be imported at all
    except ImportError as error:
        return f"needs the triton package, which cannot be imported: {error}"
    if device.type != "cuda":
        return None  # the interpreter: its results are for tests, which check them
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "bfloat16-weights": torch.bfloat16}.get(precision)
    try:
        wrong = selfcheck.fault(device, dtype or torch.float32, "tf32" if precision == "tf32" else "ieee")
    except Exception as error:
        return f"does not run on this device: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None if wrong is None else f"gives wrong results on this device ({wrong})"
