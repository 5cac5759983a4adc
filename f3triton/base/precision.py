"""Precisions by name: the type of the parameters, the type of the matrix products, and TensorFloat-32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from .choices import check_word
from .exceptions import InputError
from .words import PRECISIONS


@dataclass(frozen=True)
class Precision:
    """What a word stands for. `parameters` is their type in memory, `products` that of matrix products (None: the same)."""

    word: str
    parameters: torch.dtype = torch.float32
    products: torch.dtype | None = None

    @property
    def working(self) -> torch.dtype:
        """The type of inputs, outputs, losses and errors: never narrower than float32."""
        return torch.promote_types(self.parameters, torch.float32)


FLOAT32 = Precision("float32")
_ALL = (
    FLOAT32,
    Precision("float64", torch.float64),
    Precision("tf32"),
    Precision("bfloat16", products=torch.bfloat16),
    Precision("float16", products=torch.float16),
    Precision("bfloat16-weights", torch.bfloat16, torch.bfloat16),
)


def resolve_precision(word: str, device: torch.device, method: str) -> Precision:
    """The precision of that name. Raises InputError where it is unknown, or does not go with the device or the method."""
    word = check_word("precision", word, PRECISIONS)
    if word == "tf32" and device.type != "cuda":
        allowed = ", ".join(name for name in PRECISIONS if name != "tf32")
        raise InputError(f"precision 'tf32' needs a CUDA device, got {device.type!r}; allowed there: {allowed}")
    if (word, method) in (("float16", "bp"), ("float16", "fa"), ("bfloat16-weights", "bp")):
        lacks = "a scaled loss" if word == "float16" else "stochastic rounding"
        raise InputError(f"precision {word!r} needs {lacks}, which method {method!r} has not; use 'bfloat16'")
    return next(precision for precision in _ALL if precision.word == word)


class matmul_precision:
    """TensorFloat-32 products inside, where asked for; torch's own setting is restored outside."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def working_dtype(model: nn.Module) -> torch.dtype:
    """The type of a model's inputs, outputs, losses and errors: that of its parameters, but never narrower than float32."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """torch's mixed precision in `dtype`; nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
