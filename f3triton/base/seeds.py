"""Random draws as pure functions of what they are for, so that nothing depends on what was drawn before."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .exceptions import InputError

one_at_a_time = threading.RLock()  # held by whoever uses torch's global generators, which all threads share


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


def first_weights(seed: int | None) -> AbstractContextManager[None]:
    """A model's first weights are drawn from the seed inside; where it is None from torch's global generator, as torch's own
    modules do. Raises InputError for anything else."""
    if seed is None:
        return nullcontext()
    check_seed(seed)
    return _seeded([torch.default_generator], seed)


def drawing(device: torch.device, *parts: object) -> AbstractContextManager[None]:
    """torch's global generators begin at `derived_seed(*parts)` inside, so that what dropout draws there depends on nothing
    else. They belong to all threads, so one draws at a time."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return _seeded(generators, derived_seed(*parts))


@contextmanager
def _seeded(generators: list[torch.Generator], seed: int) -> Iterator[None]:
    """The generators begin at `seed` inside; outside they are as they were."""
    with one_at_a_time:
        before = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
