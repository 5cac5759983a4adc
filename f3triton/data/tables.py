"""Columns of a table as inputs: numbers and dates standardised by training statistics, words one-hot or hashed."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..base.exceptions import InputError
from .columns import CATEGORY, DATE, HASHED, Table, listed, numbers, words
from .dates import are_dates, calendar, dates

MAX_CATEGORIES = 1000  # a column of words with more distinct ones is hashed
BUCKETS = 256  # into so many inputs


class UnusableColumnError(ValueError):
    """A column that cannot be an input; says why."""


@dataclass(frozen=True)
class Column:
    """How one column becomes inputs.

    A number, a boolean (0/1) and each entry of a vector are standardised, `(x - mean) / std`; a missing one becomes the
    training mean, that is 0. A date is six numbers, standardised likewise: see `dates.calendar`. A category is one-hot, all
    zeros where missing or not seen in training; one of just two categories is a single number, 0 or 1 in the order of
    `categories`, standardised like other numbers. A hashed word is one-hot too, at its `bucket`, whatever the word.
    """

    name: str
    kind: str  # number, boolean, vector, date, category, hashed
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()
    coded: bool = False  # categories from a ClassLabel: raw rows may hold their integer ids
    buckets: int = 0  # of hashed words

    @property
    def width(self) -> int:
        """How many inputs the column gives."""
        return len(self.mean) or len(self.categories) or self.buckets


def fit_column(rows: Table, name: str, kind: str, was: str = "") -> Column:
    """Statistics or categories of a training column. Words that are dates become those, unless the column `was` fitted before
    as another kind, and more than `MAX_CATEGORIES` of them are hashed.

    Raises `UnusableColumnError` (no values; free text) or InputError (infinity).
    """
    if kind == CATEGORY:
        return _fit_words(rows, name, was)
    mean, std = moments(_values(rows, name, kind), rows, name)
    return Column(name, kind, mean, std)


def _values(rows: Table, name: str, kind: str) -> np.ndarray:
    """A column of numbers, or a date's numbers, float64 [n, width]; NaN where missing. InputError where one is infinite."""
    return _finite(calendar(dates(rows, name)) if kind == DATE else numbers(rows, name), rows, name)


def moments(values: np.ndarray, rows: Table, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation (1 for a constant) of each column of `[n, width]`, leaving out NaN."""
    present = ~np.isnan(values)
    if not present.any(axis=0).all():
        raise UnusableColumnError("no values")
    # Arithmetic on large values may overflow; it is caught just below, with a message that names the column.
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise InputError(f"column {name!r} of {rows.where} holds values too large to standardise; scale them down")
    # Rounding leaves a constant column a tiny spread that would blow up differences from it.
    constant = np.nanmax(values, axis=0) == np.nanmin(values, axis=0)
    mean = np.where(constant, np.nanmax(values, axis=0), mean)
    std = np.where(constant | (std == 0), 1.0, std)
    return tuple(mean.tolist()), tuple(std.tolist())


def encode_table(columns: tuple[Column, ...], rows: Table) -> tuple[Tensor, Counter, Counter]:
    """Inputs [n, K] float32, and for each column how many missing values were filled and how many words were unseen."""
    out = np.empty((len(rows), sum(column.width for column in columns)), dtype=np.float32)
    missing: Counter = Counter()
    unseen: Counter = Counter()
    at = 0
    for column in columns:
        rows.require(column.name)
        part = out[:, at : at + column.width]
        at += column.width
        if column.kind in (CATEGORY, HASHED):
            codes, missing[column.name], unseen[column.name] = _encode_words(column, rows)
            if not column.mean:
                known = np.flatnonzero(~np.isnan(codes))
                part.fill(0)
                part[known, codes[known].astype(np.int64)] = 1
                continue
            values = codes[:, None]
        else:
            values = _values(rows, column.name, column.kind)  # [n, width]
            if values.shape[1] != column.width and not np.isnan(values).all():
                raise InputError(
                    f"column {column.name!r} of {rows.where} holds {values.shape[1]} values a row; training had {column.width}"
                )
            missing[column.name] = int(np.isnan(values).sum()) // (column.width if column.kind == DATE else 1)
        with np.errstate(over="ignore"):
            part[:] = standardise(values, column.mean, column.std)
        part[np.isnan(part)] = 0
        _finite(part, rows, column.name)
    return torch.from_numpy(out), +missing, +unseen


def standardise(values: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """`(values - mean) / std` in float64."""
    return (values - np.asarray(mean)) / np.asarray(std)


def _fit_words(rows: Table, name: str, was: str) -> Column:
    import pyarrow.compute as pc

    column = words(rows, name)
    present = column.drop_null()
    if not len(present):
        raise UnusableColumnError("no values")
    names, distinct = rows.class_names.get(name), pc.unique(present)
    if not names and was in ("", DATE) and are_dates(distinct):
        return fit_column(rows, name, DATE)
    categories = tuple(names) if names else tuple(sorted(distinct.to_pylist()))
    if not names and len(categories) > 10 and 2 * len(categories) > len(present):
        odd = odd_numbers(categories)
        what, why = ("words", f"; {odd}") if odd else ("free text", "")
        raise UnusableColumnError(f"{what}, {len(categories)} distinct values in {len(present)} rows{why}")
    if names and len(categories) > MAX_CATEGORIES:  # raw rows may hold ids, whose names would all have to be kept
        raise UnusableColumnError(f"{len(categories)} classes")
    if len(categories) > MAX_CATEGORIES:
        return Column(name, HASHED, buckets=BUCKETS)
    fitted = Column(name, CATEGORY, categories=categories, coded=bool(names))
    if len(categories) != 2:
        return fitted
    mean, std = moments(places_of(categories, column)[:, None], rows, name)
    return Column(name, CATEGORY, mean, std, categories, bool(names))


def odd_numbers(categories: tuple[str, ...]) -> str:
    """What keeps more than ten words from being numbers, for a message: commas, or a few other words; empty for plain words."""
    others = [word for word in categories if not _is_number(word)]
    if not others or len(categories) <= 10:
        return ""
    if all(_is_number(word.replace(",", "")) for word in others):
        return f"numbers with commas, such as {others[0]!r}: decimals need a point, thousands nothing"
    few = 10 * len(others) <= len(categories)
    return f"numbers but for {listed(map(repr, others), 3)}: leave missing ones empty" if few else ""


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _encode_words(column: Column, rows: Table) -> tuple[np.ndarray, int, int]:
    """The place of each row's category or hash [n] (NaN where there is none), missing, unseen."""
    text = words(rows, column.name, column.categories if column.coded else ())
    codes = hashes_of(column.buckets, text) if column.kind == HASHED else places_of(column.categories, text)  # [n]
    missing = text.null_count
    return codes, missing, int(np.isnan(codes).sum()) - missing


def places_of(categories: tuple[str, ...], text: object) -> np.ndarray:
    """The place of each word among the categories, [n] float64; NaN where it is missing or not among them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.index_in(text, value_set=pa.array(categories, pa.string()), skip_nulls=True)
    return np.asarray(found.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def hashes_of(buckets: int, text: object) -> np.ndarray:
    """The bucket of each word, [n] float64: BLAKE2b of its UTF-8, 8 bytes, little-endian, modulo `buckets`; NaN if missing."""
    coded = text.dictionary_encode()
    digests = (hashlib.blake2b(word.encode(), digest_size=8).digest() for word in coded.dictionary.to_pylist())
    of = np.array([*(int.from_bytes(digest, "little") % buckets for digest in digests), np.nan])
    return of[np.asarray(coded.indices.fill_null(len(of) - 1))]


def _finite(values: np.ndarray, rows: Table, name: str) -> np.ndarray:
    """The values; InputError that names the row where one is infinite. NaN passes: it stands for a missing value."""
    if np.isinf(values).any():
        at = int(np.isinf(values).any(axis=1).argmax())
        raise InputError(
            f"column {name!r} holds infinity (or a value beyond float32) in {rows.row(at)}; features must be finite"
        )
    return values
