"""Stochastic rounding to bfloat16: unbiased, and the same in every run, for its bits come from (seed, step, element).

Rounding to nearest would lose every update smaller than half a unit in the last of bfloat16's eight bits; a number between two
neighbours `l < w < u` becomes `u` with probability `(w - l) / (u - l)` instead (arXiv 2010.06192). The bits are those of an
integer hash (two rounds of the 32-bit mixer known as lowbias32), not of a generator: elements may be rounded in any order, by
any number of programs. `gpu.math` has the same in Triton, equal bit for bit.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
STEP_FACTOR = 0x9E3779B9  # 2^32 over the golden ratio: spreads consecutive steps

Word = TypeVar("Word", int, Tensor)


def _mix(h: Word) -> Word:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def parameter_seed(seed: int, place: int) -> int:
    """The seed (31 bits) of one parameter's rounding, from that of the run and the parameter's place in the whole model."""
    return _mix(_mix((seed & _MASK) ^ _mix(seed >> 32 & _MASK)) ^ (place & _MASK)) >> 1


def random_bits(element: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """32 bits for each `element` (int64, any shape), as int64; `seed` has 31 bits, `step` counts from 1."""
    h = _mix((element & _MASK) ^ seed)
    return _mix(h ^ (((step * STEP_FACTOR & _MASK) + (element >> 32)) & _MASK))


def _mix_(h: Tensor) -> Tensor:
    """`_mix` in place, of 32 bits in int32, whose products wrap and whose shifts bring in signs."""
    high = torch.empty_like(h)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
        h ^= torch.bitwise_right_shift(h, shift, out=high).bitwise_and_(_MASK >> shift)
        h *= factor
    return h


def bits_of(like: Tensor, seed: int, step: int | Tensor, first: int = 0) -> Tensor:
    """`random_bits` for the elements of a tensor, numbered from `first` in memory order; int32, the highest bit its sign."""
    last = first + like.numel()
    element = torch.arange(first, last, device=like.device).view(like.shape)
    h = _mix_(element.to(torch.int32).bitwise_xor_(seed))
    above = element >> 32 if first >> 32 != (last - 1) >> 32 else first >> 32
    word = ((step * STEP_FACTOR & _MASK) + above) & _MASK
    h ^= word.to(torch.int32) if isinstance(word, Tensor) else (word ^ 1 << 31) - (1 << 31)
    return _mix_(h)


def further_bits(bits: Tensor) -> Tensor:
    """Sixteen more bits for each 32 random ones (int32)."""
    return _mix_(bits ^ 0x5BD1E995).bitwise_and_(0xFFFF)


def cut_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """`values` (float32) as bfloat16: sixteen random `bits` (int32) are added below its last one, and the lower half is cut.

    Infinities and NaN stay what they are.
    """
    rounded = (values.contiguous().view(torch.int32) + bits).bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
