"""Dates: read from arrow dates, timestamps and text, and turned into numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..base.exceptions import InputError
from ..base.text import short
from .columns import Table, is_text, one_line

SECONDS = 86_400  # of a day
PARTS = ("year", "month (sin, cos)", "weekday (sin, cos)", "elapsed days")
WIDTH = 6
# A date with `-`, perhaps with a time and an offset from UTC, which is passed over: the clock is the one in the text.
_FORM = (
    r"^(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"
    r"(?:[T ](?P<hour>[01]?\d|2[0-3]):(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d)(?:\.\d+)?)?"
    r"(?: ?(?:Z|[+-]\d{2}(?::?\d{2})?))?)?$"
)
# What is rewritten into it: year/month/day, and with dots day.month.year.
_OTHERS = ((r"^(\d{4})/(\d{1,2})/(\d{1,2})", r"\1-\2-\3"), (r"^(\d{1,2})\.(\d{1,2})\.(\d{4})", r"\3-\2-\1"))


def are_dates(text: Any) -> bool:
    """Whether all words of an arrow array are dates or empty, and one is a date."""
    import pyarrow.compute as pc

    filled = text.filter(pc.not_equal(pc.utf8_trim_whitespace(text), ""))
    # The first one alone spares most columns of words the rest.
    return len(filled) > 0 and all(not np.isnat(_parse(part)[0]).any() for part in (filled.slice(0, 1), filled))


def dates(rows: Table, name: str) -> np.ndarray:
    """A column of dates, timestamps or text as datetime64[s] `[n]`, by the clock of its own time zone; NaT where missing.

    Text is YYYY-MM-DD, YYYY/MM/DD or DD.MM.YYYY, perhaps with a time. Raises InputError for anything else.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.column(name)
    if column.null_count == len(column):
        return np.full(len(column), "NaT", "datetime64[s]")
    if is_text(column.type):
        coded = column.cast(pa.string()).dictionary_encode()
        values, empty = _parse(coded.dictionary)
        places = np.asarray(coded.indices.cast(pa.int64()).fill_null(len(values)))
        wrong = np.append(np.isnat(values) & ~empty, False)[places]
        if wrong.any():
            at = int(wrong.argmax())
            raise InputError(
                f"column {name!r} holds {short(column[at].as_py(), 100)} in {rows.row(at)}, where a date is needed, such as "
                "2024-03-31, 2024/03/31 or 31.03.2024, perhaps with a time"
            )
        return np.append(values, np.datetime64("NaT", "s"))[places]
    if not (pa.types.is_date(column.type) or pa.types.is_timestamp(column.type)):
        raise InputError(f"column {name!r} of {rows.where} holds {column.type}, where dates are needed")
    zone, ahead = getattr(column.type, "tz", None), np.timedelta64(0, "m")
    if zone and (offset := re.fullmatch(r"([+-])(\d\d):(\d\d)", zone)):  # of which older arrows know no local time
        ahead = np.timedelta64(int(offset[1] + "1") * (60 * int(offset[2]) + int(offset[3])), "m")
        column = column.cast(pa.timestamp(column.type.unit))
    elif zone:
        try:
            column = pc.local_timestamp(column)
        except pa.ArrowInvalid as error:
            raise InputError(f"column {name!r} of {rows.where} cannot be read as dates: {one_line(error)}") from None
    return column.to_numpy(zero_copy_only=False).astype("datetime64[s]") + ahead


def calendar(values: np.ndarray) -> np.ndarray:
    """Year, month and weekday (each as sine and cosine of its place in the round) and days since 1970 with their fraction, of
    datetime64[s] `[n]` as float64 `[n, 6]`; NaN where missing."""
    year, month = np.divmod(values.astype("datetime64[M]").astype(np.int64), 12)
    days = values.astype(np.int64) / SECONDS
    weekday = (np.floor(days) + 3) % 7  # 1970 began on a Thursday; Monday is 0
    rounds = [of(2 * np.pi * place) for place in (month / 12, weekday / 7) for of in (np.sin, np.cos)]
    out = np.stack([year + 1970.0, *rounds, days], axis=1)
    out[np.isnat(values)] = np.nan
    return out


def _parse(text: Any) -> tuple[np.ndarray, np.ndarray]:
    """The dates in an arrow array of strings, datetime64[s] `[n]`, NaT for what is none; and which of the strings are empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    text = pc.utf8_trim_whitespace(text)
    empty = np.asarray(pc.equal(text, "").fill_null(True))
    for form, other in _OTHERS:
        text = pc.replace_substring_regex(text, pattern=form, replacement=other)
    found = pc.extract_regex(text, pattern=_FORM)
    matched = found.is_valid().to_numpy(zero_copy_only=False)
    numbers = []
    for part in ("year", "month", "day", "hour", "minute", "second"):
        digits = pc.struct_field(found, part).fill_null("")
        numbers.append(np.asarray(pc.if_else(pc.equal(digits, ""), "0", digits).cast(pa.int64())))
    year, month, day, hour, minute, second = numbers
    months = (12 * (year - 1970) + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    real = matched & (month >= 1) & (month <= 12) & (day >= 1) & (days.astype("datetime64[M]") == months)  # no February 30
    values = days.astype("datetime64[s]") + (3600 * hour + 60 * minute + second)
    values[~real] = np.datetime64("NaT")
    return values, empty
