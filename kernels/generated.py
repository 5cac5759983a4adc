"""A feedback matrix that is nowhere: each entry comes from a hash of (seed, row, column) when it is needed.

The entries are those of the laws whose entries are independent: `trinomial` {-1, 0, 1}, `binomial` {0, 1}, and `uniform` in
[-1, 1). The Triton kernels make them in registers; `columns` is the same in torch, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import random_bits

KINDS = {"trinomial": 1, "binomial": 2, "uniform": 3}


@dataclass(frozen=True)
class GeneratedFeedback:
    """`B [C, units]`, `amplitude` times entries of a `kind`; `seed` has 31 bits. Stands where a feedback tensor may stand."""

    kind: str
    outputs: int
    units: int
    seed: int
    amplitude: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.units

    def columns(self, start: int, stop: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """`B[:, start:stop]  [C, stop - start]`."""
        c, n = torch.arange(self.outputs, device=device)[:, None], torch.arange(start, stop, device=device)
        bits = random_bits(c * self.units + n, self.seed, 0)  # [C, stop - start]
        if self.kind == "trinomial":
            entries = bits % 3 - 1
        elif self.kind == "binomial":
            entries = bits & 1
        else:
            entries = (bits >> 8).float() / (1 << 23) - 1
        return entries.to(dtype) * self.amplitude

    def dense(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix."""
        return self.columns(0, self.units, device, dtype)

    def project(self, error: Tensor, chunk: int = 1 << 20) -> Tensor:
        """`e B  [M, units]` for `error [M, C]`, with about `chunk` entries of `B` in memory at a time."""
        step = max(1, chunk // self.outputs)
        parts = [
            error @ self.columns(start, min(start + step, self.units), error.device, error.dtype)
            for start in range(0, self.units, step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
