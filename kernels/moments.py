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


def _spread(scale: Tensor, columns: int) -> Tensor:
    """`[rows, columns]` of `[rows, blocks]`."""
    return scale.repeat_interleave(BLOCK, 1)[:, :columns]


def widened(moment: Tensor, scale: Tensor | None) -> Tensor:
    """The values in float32, or in the moment's own type where that is not narrow."""
    if moment.dtype not in LEVELS:
        return moment.float() if moment.dtype == torch.bfloat16 else moment
    q = moment.flatten(1).float()
    return (q * q.abs()).mul_(LEVELS[moment.dtype] ** -2).mul_(_spread(scale, q.shape[1])).view(moment.shape)


def narrow_(moment: Tensor, scale: Tensor | None, values: Tensor, bits: Tensor | None) -> None:
    """Write `values` (float32, of the moment's shape), rounded by 16 `bits` for each element, or to the nearest without."""
    if moment.dtype not in LEVELS:
        if moment is not values:
            moment.copy_(values if bits is None or moment.dtype != torch.bfloat16 else cut_to_bfloat16(values, bits))
        return
    values, levels = values.flatten(1), LEVELS[moment.dtype]
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values.abs(), (0, scale.shape[1] * BLOCK - columns))
    torch.amax(padded.view(rows, -1, BLOCK), 2, out=scale)
    square = padded[:, :columns] / _spread(scale, columns).clamp(min=torch.finfo(torch.float32).tiny) * levels**2
    low = square.sqrt().floor_()
    above = (square - low * low) / (2 * low + 1)  # 0 to 1: of the way from this level's value to the next one's
    q = low + (above >= 0.5 if bits is None else above * 65536 > bits.view(rows, columns))
    q = q.clamp_(max=levels)
    q = torch.maximum(q, (values > 0).float()) if moment.dtype == torch.uint8 else q.copysign_(values)
    moment.copy_(q.view(moment.shape))


def narrow_all_(moments: tuple[Tensor, ...], scales: tuple[Tensor, ...], values: list[Tensor], bits: Tensor | None) -> None:
    """`narrow_` of each, with its own part of the weight's 32 random `bits`."""
    own = (None, None) if bits is None else (bits >> 16, further_bits(bits) if len(moments) > 1 else None)
    for i, (moment, value) in enumerate(zip(moments, values, strict=True)):
        narrow_(moment, scales[i] if scales else None, value, own[i])
