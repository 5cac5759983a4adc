"""Moments in fewer bytes: float32, bfloat16, or int8 with the largest magnitude of each block of a row.

A row is a parameter's along its first dimension, all others flattened; a block is `BLOCK` of its columns, the last one what is
left. With `L` 127 levels of a number with a sign (int8: a momentum, Adam's m) or 255 of one without (uint8: Adam's v), and `s`
the largest magnitude of the block, kept in float32,

    value = s sign(q) (q / L)^2,

so `q` is a square root: of Adam's v what it divides by. Levels lie close near zero, where m over sqrt(v) needs them: levels one
apart would let a small v lose its m's last bits, or vanish under an m that did not. An entry of v above zero keeps at least
level 1 for that reason. A value between two levels becomes the upper one with the probability that makes the mean right, for a
decay of 0.1 % moves no level by itself; bfloat16 is rounded as `rounding.cut_to_bfloat16`. The bits are those of the weight's
own hash: its lower half is the weight's, its upper half the first moment's, and a further mix of it gives the second's.

Moments of a vector (biases, scales of norms) stay float32: their scales would weigh as much as they save. Anchors: 8-bit
optimizers (arXiv 2110.02861), whose blocks have a map of unevenly spaced levels too, rounded to the nearest.
`gpu.math` has the same in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .rounding import cut_to_bfloat16, further_bits
from .words import MOMENTS

BLOCK = 32  # columns; each tile of the kernels has a multiple of it
LEVELS = {torch.int8: 127, torch.uint8: 255}


def new_moments(parameter: Tensor, count: int, word: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`count` zeroed moments of the parameter's shape, and their scales `[rows, blocks]`, one for each where they are int8.

    float32 is the parameter's own type where that is wider. Raises ValueError for another word.
    """
    if word not in MOMENTS:
        raise ValueError(f"moments {word!r} are unknown; allowed: {', '.join(MOMENTS)}")
    wide = torch.promote_types(parameter.dtype, torch.float32)
    types = [wide] * count
    if word != "float32" and parameter.dim() > 1:
        types = [torch.bfloat16] * count if word == "bfloat16" else [torch.int8, torch.uint8][:count]
    moments = tuple(torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for dtype in types)
    shape = len(parameter), -(-parameter[0].numel() // BLOCK) if parameter.dim() > 1 else 1
    scales = tuple(torch.zeros(shape, dtype=torch.float32, device=parameter.device) for dtype in types if dtype in LEVELS)
    return moments, scales


def moment_bytes(shape: torch.Size, count: int, word: str, wide: int = 4) -> int:
    """What `new_moments` of a parameter of that shape take; `wide`: bytes of a number that is not narrow."""
    if word == "float32" or len(shape) < 2:
        return count * shape.numel() * wide
    if word == "bfloat16":
        return count * shape.numel() * 2
    return count * (shape.numel() + 4 * shape[0] * -(-shape[1:].numel() // BLOCK))


def is_narrow(moments: tuple[Tensor, ...]) -> bool:
    """Whether they have to be widened for the rule's arithmetic."""
    return any(moment.dtype in (torch.bfloat16, *LEVELS) for moment in moments)


def _by_block(values: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of `values [rows, columns]` as `[rows, blocks, BLOCK]` with their scales `[rows, blocks, 1]`; then the last block,
    where it is shorter."""
    whole = values.shape[1] // BLOCK
    if whole:
        yield values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), scale[:, :whole, None]
    if values.shape[1] % BLOCK:
        yield values[:, None, whole * BLOCK :], scale[:, whole:, None]


def widened(moment: Tensor, scale: Tensor | None) -> Tensor:
    """The values in float32, or in the moment's own type where that is not narrow."""
    if moment.dtype not in LEVELS:
        return moment.float() if moment.dtype == torch.bfloat16 else moment
    q = moment.flatten(1).float()
    q.mul_(q.abs() if moment.dtype == torch.int8 else q).mul_(LEVELS[moment.dtype] ** -2)
    for part, own in _by_block(q, scale):
        part.mul_(own)
    return q.view(moment.shape)


def narrow_(moment: Tensor, scale: Tensor | None, values: Tensor, bits: Tensor | None) -> None:
    """Write `values` (float32, of the moment's shape), rounded by 16 `bits` for each element, or to the nearest without."""
    if moment.dtype not in LEVELS:
        if moment is not values:
            moment.copy_(values if bits is None or moment.dtype != torch.bfloat16 else cut_to_bfloat16(values, bits))
        return
    values, levels = values.flatten(1), LEVELS[moment.dtype]
    square = values.abs()
    for part, own in _by_block(square, scale):
        torch.amax(part, 2, keepdim=True, out=own)
        part.div_(own.clamp(min=torch.finfo(torch.float32).tiny))
    square *= levels**2
    q = square.sqrt().floor_()
    # 0 to 2: twice the part of the way from this level's value, q^2, to the next one's, q^2 + 2q + 1
    above = square.addcmul_(q, q, value=-1).div_(q.add_(0.5))
    q -= 0.5
    if bits is None:
        q += above >= 1
    else:  # above * 32768 > bits, without the comparison, which takes several times as long
        q += above.mul_(32768).ceil_().sub_(bits.view(values.shape)).clamp_(0, 1)
    q.clamp_(max=levels)
    q = torch.maximum(q, values.sign(), out=q) if moment.dtype == torch.uint8 else q.copysign_(values)
    moment.copy_(q.view(moment.shape))


def narrow_all_(moments: tuple[Tensor, ...], scales: tuple[Tensor, ...], values: list[Tensor], bits: Tensor | None) -> None:
    """`narrow_` of each, with its own part of the weight's 32 random `bits` (int32)."""
    own: tuple[Tensor | None, ...] = (None, None)
    if bits is not None:
        own = (bits >> 16).bitwise_and_(0xFFFF), further_bits(bits) if len(moments) > 1 else None
    for i, (moment, value) in enumerate(zip(moments, values, strict=True)):
        narrow_(moment, scales[i] if scales else None, value, own[i])
