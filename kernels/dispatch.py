"""Which implementation runs: a backend is a module with the functions of `reference`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from . import eager
from .times import Work, measured
from .words import BACKENDS

# the precisions of the Triton kernels, and the type of their products
FEW_ROWS = 64  # of which float32 products are bound by memory
PRODUCTS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "bfloat16-weights": torch.bfloat16,
}


@dataclass(frozen=True)
class Choice:
    """The operations that run, the word of their backend, and why it is that one."""

    backend: str
    operations: ModuleType | SimpleNamespace
    why: str

    def __str__(self) -> str:
        return f"backend {self.backend}: {self.why}"


def backend(name: str, device: torch.device, precision: str = "float32") -> ModuleType | SimpleNamespace:
    """The operations alone, see `choose`."""
    return choose(name, device, precision).operations


def choose(name: str, device: torch.device, precision: str = "float32", work: Sequence[Work] = ()) -> Choice:
    """The operations that run on `device`: `torch`, `triton`, or by `auto` the faster of those that are right.

    `auto` is torch where Triton cannot run: without CUDA or ROCm, in float64, and, which is warned of, where the kernels fail
    their check on that very device (`selfcheck`). Else it is what took less time for `work`, the operations of a step, where
    all of that has been measured on this device (see `tune`), and otherwise goes by rule (see `_by_rule`).

    Raises ValueError where the name is unknown or the Triton backend cannot run: it needs a CUDA or ROCm device, or
    Triton's interpreter (`TRITON_INTERPRET=1` in the environment) on a CPU, and has no float64; or where its kernels fail
    the check.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; allowed: {', '.join(BACKENDS)}")
    likely, why = _faster(device, precision, work) if name == "auto" else (name, "as asked for")
    if likely == "torch":
        return Choice("torch", eager, why)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs a CUDA or ROCm device, got {device.type!r}; "
            "set TRITON_INTERPRET=1 to run its kernels in Triton's (slow) interpreter, or use backend 'torch'"
        )
    if precision == "float64":
        raise ValueError("backend 'triton' has no precision 'float64'; use backend 'torch', or another precision")
    fault = _fault(device, precision)
    if fault is None:
        operations = importlib.import_module(".gpu.ops", __package__)
        return Choice("triton", operations.with_precision("tf32") if precision == "tf32" else operations, why)
    if name == "triton":
        raise ValueError(f"backend 'triton' {fault}; use backend 'torch'")
    if importlib.util.find_spec("triton") is not None:
        warnings.warn(f"backend 'triton' {fault}; 'torch' is used instead", stacklevel=2)
    return Choice("torch", eager, f"backend 'triton' {fault}")


def _faster(device: torch.device, precision: str, work: Sequence[Work]) -> tuple[str, str]:
    """(the backend that is faster if its kernels are right, why), measured or by rule."""
    if device.type != "cuda":
        return "torch", f"the Triton kernels need a CUDA or ROCm device, this is {device.type!r}"
    if precision == "float64":
        return "torch", "the Triton kernels have no float64"
    times = measured(device, precision, work)
    if times is None:
        backend, why = _by_rule(precision, max((one.rows for one in work), default=0))
        return backend, f"{why} (a rule; python -m f3triton.kernels.tune measures)"
    faster, slower = sorted(times, key=times.get)
    ours, theirs = (f"{1e6 * times[name]:.1f} us" for name in (faster, slower))
    return faster, f"a step's products and updates take {ours} by it and {theirs} by {slower}, measured on this device"


def _by_rule(precision: str, rows: int) -> tuple[str, str]:
    """(the backend that is likely faster for products of up to so many rows, why).

    What Triton saves is memory traffic: with Adam a step moves 28 bytes a weight, and torch's, with the gradient in memory, 36.
    What it may lose is the speed of products, 4 FLOPs a weight and row. On tensor cores (half precision, tf32) both reach
    about the same, so bytes decide. Exact float32 products run on plain FMA units, which cuBLAS fills better; Triton wins only
    where memory is the bound all the same, with few rows: 64 are 9 FLOPs a byte, and an A100 does 10 to 13 in the time of a
    byte, an H100 20. More rows are bound by the products.
    """
    less = "its fused update moves fewer bytes"
    if precision != "float32":
        return "triton", f"{precision} products are on tensor cores either way, and {less}"
    if rows <= FEW_ROWS:
        return "triton", f"float32 steps of up to {FEW_ROWS} rows are bound by memory, and {less}"
    return "torch", f"float32 products of {rows} rows are bound by plain FMA, which cuBLAS does faster than Triton"


def _fault(device: torch.device, precision: str) -> str | None:
    """Why the Triton kernels cannot be used on this device; None where they can."""
    try:
        from . import selfcheck
        from .gpu import ops as triton_ops  # noqa: F401 - whether it can be imported at all
    except ImportError as error:
        return f"needs the triton package, which cannot be imported: {error}"
    if device.type != "cuda":
        return None  # the interpreter: its results are for tests, which check them
    try:
        wrong = selfcheck.fault(device, PRODUCTS[precision], "tf32" if precision == "tf32" else "ieee")
    except Exception as error:
        return f"does not run on this device: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None if wrong is None else f"gives wrong results on this device ({wrong})"


def network_steps() -> Callable[..., Tensor]:
    """`reference.network_steps_` in one launch, with `failed`; see `gpu.steps`."""
    return importlib.import_module(".gpu.steps", __package__).network_steps_


def network_fault(device: torch.device, *about: object) -> str | None:
    """Why steps of a network cannot be one launch on this device; None where they can. `about`: see `selfcheck.network_fault`.

    What the kernel does not do is an answer, and what goes wrong is warned of.
    """
    from . import selfcheck

    try:
        why, wrong = selfcheck.network_fault(device, *about)
    except Exception as error:
        why, wrong = None, f"does not run: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if wrong is not None:
        warnings.warn(f"a launch of many steps {wrong} on this device; steps are launched one by one", stacklevel=2)
    return why or wrong
