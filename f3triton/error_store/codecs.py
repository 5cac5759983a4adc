"""How an error row is kept: whole, in half precision, or in a few bits. The same code for every home, on any device.

A codec turns errors `[M, C]` into rows `[M, columns]` of its storage type, and back; of errors in a rank, C is the rank.
Every codec gives a one-hot target back exactly, so that the first visit is the same with all of them.

| word                        | bytes of a row        | keeps                                                            |
| --------------------------- | --------------------- | ---------------------------------------------------------------- |
| `float64`, `float32`        | 8 C, 4 C              | the number                                                       |
| `float16`, `bfloat16`       | 2 C                   | the nearest one; float16 ends at 65504                           |
| `int8`                      | 4 + C                 | the largest magnitude s of the row, and round(127 e / s)         |
| `ternary`                   | 4 + ceil(C / 4)       | -s, 0 or s: 0 below half the largest magnitude, s the mean above |
| `top-K`                     | 4 K, 6 K if C > 32768 | the targets' entries, then the largest, K in all, in float16     |
| `sampled-K`                 | 2 K + 8, or 4 K + 8   | the target's entry, and K - 1 draws of the others: unbiased      |
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.words import ERROR_DTYPES
from ..base.words import FLOATS as FLOAT_WORDS
from ..kernels.rounding import random_bits

FLOATS = {word: getattr(torch, word) for word in FLOAT_WORDS}
HALF_MAX = torch.finfo(torch.float16).max


class Codec:
    """`encode` errors `[M, width]` into rows `[M, columns]` of type `storage`, and `decode` them to `dtype`.

    `needs_target`: whether `encode` asks for the targets `[M, width]`; `needs_index`: for the numbers of the rows, int64 `[M]`.
    """

    needs_target = needs_index = False
    positions = 1  # errors `[width]` of a sample, in one row: see `ByPosition`

    def __init__(self, word: str, width: int, dtype: torch.dtype, columns: int, storage: torch.dtype = torch.uint8) -> None:
        self.word, self.width, self.dtype, self.columns, self.storage = word, width, dtype, columns, storage
        self.row_bytes = columns * storage.itemsize

    def encode(self, errors: Tensor, target: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """From `[M, width]` to rows `[M, columns]`."""
        raise NotImplementedError

    def decode(self, rows: Tensor) -> Tensor:
        """From rows `[M, columns]` to `[M, width]`."""
        raise NotImplementedError


class ByPosition(Codec):
    """The rows of a sample's positions (the tokens of a text window), in order, as one row: `float32x64` of 64 positions."""

    def __init__(self, each: Codec, positions: int) -> None:
        word = f"{each.word}x{positions}"
        super().__init__(word, each.width, each.dtype, positions * each.columns, each.storage)
        self.each, self.positions = each, positions
        self.needs_target, self.needs_index = each.needs_target, each.needs_index

    def encode(self, errors: Tensor, target: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """From `[M * positions, width]` to `[M, columns]`; `index [M]` numbers the latter."""
        if index is not None:
            index = (index[:, None] * self.positions + torch.arange(self.positions, device=index.device)).flatten()
        return self.each.encode(errors, target, index).view(-1, self.columns)

    def decode(self, rows: Tensor) -> Tensor:
        """From `[M, columns]` to `[M * positions, width]`."""
        return self.each.decode(rows.reshape(-1, self.each.columns))


class Float(Codec):
    """The entries as floats of any width."""

    def __init__(self, word: str, width: int, dtype: torch.dtype) -> None:
        super().__init__(word, width, dtype, width, FLOATS[word])

    def encode(self, errors: Tensor, target: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        if self.storage == torch.float16:
            errors = errors.clamp(-HALF_MAX, HALF_MAX)
        return errors.to(self.storage)

    def decode(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype)


class Int8(Codec):
    """The row's largest magnitude as float32, then every entry as a 127th part of it, to the nearest."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__("int8", width, dtype, 4 + width)

    def encode(self, errors: Tensor, target: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        scale = errors.abs().amax(1, keepdim=True).float()  # [M, 1]
        parts = (errors / scale.clamp_min(torch.finfo(torch.float32).tiny) * 127).round().clamp(-127, 127)
        return torch.cat([_bytes(scale), _bytes(parts.to(torch.int8))], 1)

    def decode(self, rows: Tensor) -> Tensor:
        scale = _from_bytes(rows[:, :4], torch.float32).to(self.dtype)  # [M, 1]
        return rows[:, 4:].view(torch.int8).to(self.dtype) / 127 * scale


class Ternary(Codec):
    """One magnitude for the row as float32, then two bits an entry, four entries a byte, the first in the lowest bits.

    0, 1, 2 stand for 0, +s, -s. s is the mean magnitude of the entries that are at least half of the row's largest.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__("ternary", width, dtype, 4 + math.ceil(width / 4))

    def encode(self, errors: Tensor, target: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        size = errors.abs()
        large = size >= (0.5 * size.amax(1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)  # [M, C]
        scale = (size * large).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp_min(1)  # [M, 1]
        code = torch.where(errors > 0, 1, 2).to(torch.uint8) * large
        code = torch.nn.functional.pad(code, (0, -self.width % 4)).unflatten(1, (-1, 4))
        packed = code[..., 0] | code[..., 1] << 2 | code[..., 2] << 4 | code[..., 3] << 6  # [M, ceil(C / 4)]
        return torch.cat([_bytes(scale.float()), packed], 1)

    def decode(self, rows: Tensor) -> Tensor:
        scale = _from_bytes(rows[:, :4], torch.float32).to(self.dtype)  # [M, 1]
        packed = rows[:, 4:]
        code = torch.stack([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6], 2)  # [M, ceil(C / 4), 4]
        code = code.flatten(1)[:, : self.width]
        return ((code == 1).to(self.dtype) - (code == 2).to(self.dtype)) * scale


class TopK(Codec):
    """The K entries that matter most, as float16, after their places, in ascending order, as int16 (int32 if C > 32768)."""

    needs_target = True

    def __init__(self, k: int, width: int, dtype: torch.dtype) -> None:
        self.k, self.place = k, torch.int16 if width <= 1 << 15 else torch.int32
        super().__init__(f"top-{k}", width, dtype, k * (2 + self.place.itemsize))

    def encode(self, errors: Tensor, target: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        weight = errors.abs().masked_fill(target > 0, math.inf)
        places = weight.topk(self.k, 1, sorted=False).indices.sort(1).values  # [M, K]
        values = errors.gather(1, places).clamp(-HALF_MAX, HALF_MAX).to(torch.float16)
        return torch.cat([_bytes(places.to(self.place)), _bytes(values)], 1)

    def decode(self, rows: Tensor) -> Tensor:
        split = self.k * self.place.itemsize
        places = _from_bytes(rows[:, :split], self.place).long().clamp(0, self.width - 1)  # a damaged one is no crash
        values = _from_bytes(rows[:, split:], torch.float16).to(self.dtype)
        return torch.zeros(len(rows), self.width, dtype=self.dtype, device=rows.device).scatter_(1, places, values)


class Sampled(Codec):
    """The target's entry, and K - 1 draws of the others with probabilities in proportion to their magnitudes.

    A drawn entry counts as its sign times the others' summed magnitude over K - 1, so that the row's expectation is the
    error itself, whereas the largest entries alone are biased (importance sampling, as in arXiv 2503.16870). The draws are
    systematic: one random offset and K - 1 equal steps along the summed magnitudes, which leaves less to chance than
    independent ones. The offset is a hash of the seed, the row's number and the row's own entries, which are others at
    every visit: the same in a run that was interrupted.

    A row is K places, int16 (int32 if C > 32768), the target's first, `-1 - place` for negative entries; then, as float32, the
    target's entry and the magnitude of a draw.
    """

    needs_target = needs_index = True

    def __init__(self, k: int, width: int, dtype: torch.dtype, seed: int) -> None:
        self.k, self.place, self.seed = k, torch.int16 if width <= 1 << 15 else torch.int32, seed & 0x7FFFFFFF
        super().__init__(f"sampled-{k}", width, dtype, k * self.place.itemsize + 8)

    def encode(self, errors: Tensor, target: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        first = target.argmax(1, keepdim=True)  # [M, 1]
        draws = self.k - 1
        sums = errors.abs().scatter(1, first, 0).cumsum(1)  # [M, C]
        whole = sums[:, -1:]  # [M, 1]
        steps = self._offsets(errors, index)[:, None] + torch.arange(draws, device=errors.device)  # [M, K - 1], in 0..K - 1
        points = torch.minimum(steps * (whole / draws), torch.nextafter(whole, torch.zeros_like(whole)))
        drawn = torch.searchsorted(sums, points, right=True).clamp_(max=self.width - 1)  # [M, K - 1]
        signed = torch.where(errors.gather(1, drawn) < 0, -1 - drawn, drawn)
        places = torch.cat([first, signed], 1).to(self.place)
        values = torch.cat([errors.gather(1, first), whole / draws], 1).float()  # [M, 2]
        return torch.cat([_bytes(places), _bytes(values)], 1)

    def _offsets(self, errors: Tensor, index: Tensor) -> Tensor:
        """A number in 0..1 for each row, `[M]`."""
        bits = errors.float().contiguous().view(torch.int32).to(torch.int64)
        odd = 2 * torch.arange(self.width, device=errors.device) + 1
        content = ((bits * odd) & 0xFFFFFFFF).sum(1)  # [M]
        return (random_bits(index.to(errors.device), self.seed, content) >> 8).to(errors.dtype) / (1 << 24)

    def decode(self, rows: Tensor) -> Tensor:
        split = self.k * self.place.itemsize
        places = _from_bytes(rows[:, :split], self.place).long()  # [M, K]
        values = _from_bytes(rows[:, split:], torch.float32).to(self.dtype)  # [M, 2]
        signs = torch.where(places[:, 1:] < 0, -1, 1)
        entries = torch.cat([values[:, :1], signs * values[:, 1:]], 1)  # [M, K]
        places = torch.where(places < 0, -1 - places, places).clamp(0, self.width - 1)  # a damaged one is no crash
        return torch.zeros(len(rows), self.width, dtype=self.dtype, device=rows.device).scatter_add_(1, places, entries)


def make_codec(word: str, width: int, dtype: torch.dtype, classification: bool = True, seed: int = 0) -> Codec:
    """The codec of `word` for rows of `width` entries that are worked with in `dtype`; `auto` keeps them exactly.

    The word of a store's header may end in the number of positions (see `ByPosition`). `classification`: whether the entries
    are classes; `seed` is that of `sampled-K`. Raises InputError for an unknown word, or one that the rows have no use for.
    """
    if isinstance(word, str) and (found := re.fullmatch(r"(.+)x([1-9]\d{0,6})", word)):
        return ByPosition(make_codec(found[1], width, dtype, classification, seed), int(found[2]))
    word = check_error_dtype(word)
    if word == "auto":
        word = "float64" if dtype == torch.float64 else "float32"
    if word in FLOATS:
        return Float(word, width, dtype)
    if word == "int8":
        return Int8(width, dtype)
    if word == "ternary":
        return Ternary(width, dtype)
    kind, number = word.split("-")
    if not classification:
        raise InputError(f"error dtype {word!r} keeps the target class's entry, and these rows have no classes; use another")
    if int(number) >= width:
        raise InputError(f"error dtype {word!r} must keep fewer entries than the {width} that a row has")
    return TopK(int(number), width, dtype) if kind == "top" else Sampled(int(number), width, dtype, seed)


def check_error_dtype(word: str) -> str:
    """The word, if it names a codec. Raises InputError."""
    if isinstance(word, str) and re.fullmatch(r"top[-_][1-9]\d{0,6}|sampled[-_]([2-9]|[1-9]\d{1,6})", word):
        return word.replace("_", "-")
    return check_word("error dtype", word, ("auto", *ERROR_DTYPES), "and top-K or sampled-K, for example top-8")


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _from_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)  # contiguous() keeps the stride of a single row
