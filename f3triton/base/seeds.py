"""Random draws as pure functions of what they are for, so that nothing depends on what was drawn before."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .exceptions import InputError


def check_seed(seed: object) -> None:
    """Raise InputError for anything but a whole number that torch and NumPy can be seeded with."""
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed (--seed) is {seed!r}; allowed: a whole number from 0 to 2^63 - 1")


def derived_seed(*parts: object) -> int:
    """A seed (63 bits) from a seed and a purpose, for example `derived_seed(seed, "order", epoch)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of the samples in one epoch, `[samples]` int64 on the CPU."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derived_seed(seed, "order", epoch)))
