"""A table of arrow columns: what each column is, and how numbers, words and messages are got out of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..base.exceptions import InputError

# What a column can be used as.
IMAGE = "image"  # encoded images: PNG, JPEG, ...
PIXELS = "pixels"  # nested lists of integers in 0..255, [H, W], [H, W, C] or [C, H, W] a row
VECTOR = "vector"  # a list of numbers, of one length
NUMBER, BOOLEAN, CATEGORY = "number", "boolean", "category"
DATE = "date"  # a date or timestamp; text that holds nothing else becomes one when it is fitted
HASHED = "hashed"  # words, too many to list: what a column of them becomes when it is fitted
UNUSABLE = "unusable"
JOINED = 1 << 29  # bytes of a column that is held whole where some of its rows are needed


@dataclass
class Table:
    """The rows of one split. `picked` (int64 `[n]`, ascending) are those of `table` that count; None stands for all of them."""

    table: Any  # pyarrow.Table
    where: str  # for messages: "split 'train'"
    class_names: Mapping[str, list[str]] = field(default_factory=dict)  # of ClassLabel columns
    features: Mapping[str, str] = field(default_factory=dict)  # what `datasets` calls each column: Image, Value, ...
    picked: np.ndarray | None = None
    folders: tuple[Path, ...] | None = None  # where files are that rows may name; None: anywhere

    @classmethod
    def from_dataset(cls, dataset: Any, where: str, folders: tuple[Path, ...] | None = None) -> Table:
        """The rows of a `datasets.Dataset`; memory-mapped columns stay so."""
        features = dataset.features
        return cls(
            table=dataset.with_format("arrow")[:],
            where=where,
            class_names={name: list(f.names) for name, f in features.items() if type(f).__name__ == "ClassLabel"},
            features={name: type(f).__name__ for name, f in features.items()},
            folders=folders,
        )

    @cached_property
    def names(self) -> list[str]:
        return self.table.column_names

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def __len__(self) -> int:
        return self.table.num_rows if self.picked is None else len(self.picked)

    def select(self, picked: np.ndarray) -> Table:
        """The rows of the numbers `picked` (ascending, counted from the start of the split)."""
        return replace(self, picked=picked)

    def row(self, index: int) -> str:
        """How a message names a row: its number in the split as it was read, from 0."""
        return f"row {index if self.picked is None else self.picked[index]} of {self.where}"

    def require(self, name: str) -> None:
        if name not in self._known:
            raise InputError(f"no column {name!r} in {self.where}; columns: {listed(self.names)}")

    def type(self, name: str) -> Any:
        """The arrow type of a column, extension types (Array2D, ...) replaced by what they are stored as."""
        import pyarrow as pa

        kind = self.table.schema.field(name).type
        return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind

    def column(self, name: str) -> Any:
        """One column as a single arrow array of n values."""
        import pyarrow as pa

        short = self.table.column(name).nbytes < JOINED  # many small chunks are joined first, which is quicker
        pieces = replace(self, picked=None).pieces(name, 1 << 20) if short else self.pieces(name, 1 << 20)
        arrays = [p.dictionary_decode() if pa.types.is_dictionary(p.type) else p for _, p in pieces]
        whole = pa.concat_arrays(arrays) if arrays else pa.array([], self.type(name))
        whole = whole if self.picked is None or not short else whole.take(pa.array(self.picked))
        try:
            whole.validate(full=True)  # readers take text for what it says that it is
        except pa.ArrowInvalid as error:
            raise InputError(f"column {name!r} of {self.where} is damaged: {one_line(error)}") from None
        return whole

    def pieces(self, name: str, size: int = 1024) -> Iterator[tuple[int, Any]]:
        """(index of its first row, arrow array of at most `size` values) until the column is through."""
        import pyarrow as pa

        done = begin = 0
        for chunk in self.table.column(name).chunks:
            values = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
            end = begin + len(values)
            if self.picked is None:
                for start in range(0, len(values), size):
                    piece = values.slice(start, size)
                    yield done, piece
                    done += len(piece)
            else:
                first, last = np.searchsorted(self.picked, (begin, end))
                for start in range(first, last, size):
                    piece = values.take(pa.array(self.picked[start : min(start + size, last)] - begin))
                    yield done, piece
                    done += len(piece)
            begin = end


def rows_from(raw: Any, names: list[str], where: str = "the rows given") -> Table:
    """The columns `names` of a `Table`, list of dicts, dict of columns, `pandas.DataFrame` or `datasets.Dataset`."""
    import pyarrow as pa

    if isinstance(raw, Table) or hasattr(raw, "with_format"):
        rows = raw if isinstance(raw, Table) else Table.from_dataset(raw, where)
        for name in names:
            rows.require(name)
        return rows
    columns = {}
    for name in names:
        values = raw_column(raw, name, where)
        if any(isinstance(value, np.datetime64) for value in values):  # arrow takes some units only
            values = [v.astype("datetime64[us]").item() if isinstance(v, np.datetime64) else v for v in values]
        try:
            columns[name] = pa.array(values, from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"column {name!r} of {where} mixes kinds of values: {one_line(error)}") from error
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"columns of {where} differ in length: {lengths}")
    return Table(pa.table(columns), where)


def read_numbers(rows: Table, names: list[str]) -> Table:
    """The rows with columns of text read as numbers, an empty one as missing. Raises InputError for a word among them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = rows.table
    for name in (name for name in names if is_text(rows.type(name))):
        text = pc.utf8_trim_whitespace(table.column(name).cast(pa.string()))
        text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        for word, digit in (("true", "1"), ("false", "0")):  # of booleans
            text = pc.if_else(pc.equal(pc.utf8_lower(text), word), digit, text)
        try:
            table = table.set_column(table.column_names.index(name), name, text.cast(pa.float64()))
        except pa.ArrowInvalid as error:
            where = f"column {name!r} of {rows.where}"
            raise InputError(f"{where} holds words, where numbers are needed: {one_line(error)}") from None
    return replace(rows, table=table)


def raw_column(raw: Any, name: str, where: str) -> list:
    """The values of one column of a list of dicts, a dict of columns or a `pandas.DataFrame`, as a list."""
    if isinstance(raw, (list, tuple)) and all(isinstance(row, Mapping) for row in raw):
        if raw and not any(name in row for row in raw):
            known = dict.fromkeys(key for row in raw for key in row)
            raise InputError(f"no column {name!r} in {where}; columns: {listed(known)}")
        return [row.get(name) for row in raw]
    if not isinstance(raw, Mapping) and not hasattr(raw, "columns"):
        raise InputError(
            f"{where} are a {type(raw).__name__}: give a list of dicts, a dict of columns, a pandas DataFrame "
            "or a datasets.Dataset"
        )
    known = list(raw) if isinstance(raw, Mapping) else list(raw.columns)
    if name not in known:
        raise InputError(f"no column {name!r} in {where}; columns: {listed(known)}")
    values = raw[name]
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise InputError(
            f"column {name!r} of {where} is a single {type(values).__name__}; give a list of dicts for single rows"
        )
    moments = isinstance(values, np.ndarray) and values.dtype.kind == "M"  # `tolist` would make integers of nanoseconds
    return values.tolist() if hasattr(values, "tolist") and not moments else list(values)


def kind_of(rows: Table, name: str) -> tuple[str, str]:
    """What a column can be used as, and, when that is nothing, why."""
    import pyarrow as pa

    kind = rows.type(name)
    feature = rows.features.get(name, "dict")
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}:
        # Audio and video are stored alike.
        return (IMAGE, "") if feature in ("Image", "dict") else (UNUSABLE, feature.lower())
    if name in rows.class_names or is_text(kind):
        return CATEGORY, ""
    if pa.types.is_boolean(kind):
        return BOOLEAN, ""
    if is_numeric(kind):
        return NUMBER, ""
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return DATE, ""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return (IMAGE, "") if feature == "Image" else (UNUSABLE, "raw bytes")
    depth, leaf = 0, kind
    while is_list(leaf):
        depth, leaf = depth + 1, leaf.value_type
    if depth and (is_numeric(leaf) or pa.types.is_boolean(leaf)):
        shapes, low, high = _extent(rows, name)
        if len(shapes) > 1:
            return UNUSABLE, f"lists of differing shapes, such as {' and '.join(map(str, sorted(shapes)[:2]))}"
        if not shapes or 0 in next(iter(shapes)):
            return UNUSABLE, "no values"
        whole = pa.types.is_integer(leaf) and low >= 0 and high <= 255
        return (PIXELS if whole and image_layout(next(iter(shapes))) else VECTOR), ""
    if pa.types.is_null(kind):
        return UNUSABLE, "no values"
    return UNUSABLE, f"type {kind}"


def image_layout(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(channels, height, width) of an array that can be an image, [H, W], [C, H, W] or [H, W, C] with C 1 or 3."""
    if len(shape) == 2:
        return (1, *shape)
    if len(shape) == 3 and shape[0] in (1, 3):
        return shape
    if len(shape) == 3 and shape[2] in (1, 3):
        return (shape[2], shape[0], shape[1])
    return None


def _extent(rows: Table, name: str) -> tuple[set[tuple[int, ...]], float, float]:
    """The shapes that the rows of a list column have (two at most, then it stops), and the least and largest value."""
    shapes: set[tuple[int, ...]] = set()
    low, high = np.inf, -np.inf
    for _, piece in rows.pieces(name, size=4096):
        try:
            values = dense(piece.drop_null())
        except RaggedError as error:
            return shapes | set(error.shapes), low, high
        if values.size:
            shapes.add(values.shape[1:])
            low, high = min(low, np.nanmin(values)), max(high, np.nanmax(values))
        if len(shapes) > 1:
            break
    return shapes, low, high


class RaggedError(ValueError):
    """Lists that should have one length have several."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(f"lists of {lengths[0]} and of {lengths[1]} values")
        self.shapes = [(length,) for length in lengths]


def dense(array: Any) -> np.ndarray:
    """Numbers, or lists of numbers of one shape, as float64 `[n, ...]`; a missing value is NaN, a missing list all NaN.

    Raises `RaggedError` when lists differ in length.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not is_list(array.type):
        values = array.cast(pa.float64(), safe=False)  # unsafe: integers beyond 2**53 are rounded
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)  # nulls become NaN
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    present = array.drop_null()
    lengths = pc.unique(pc.list_value_length(present)).to_pylist() if len(present) else [0]
    if pa.types.is_fixed_size_list(array.type):
        lengths = [array.type.list_size]
    if len(lengths) > 1:
        raise RaggedError(sorted(lengths))
    values = dense(present.flatten())  # [n_valid * length, ...]
    values = values.reshape(len(present), lengths[0], *values.shape[1:])
    if valid.all():
        return values
    out = np.full((len(array), *values.shape[1:]), np.nan)
    out[valid] = values
    return out


def numbers(rows: Table, name: str) -> np.ndarray:
    """A column of numbers, booleans or lists of them as float64 `[n, width]`; NaN where a value is missing.

    Raises InputError when it holds anything else, or lists of differing lengths.
    """
    import pyarrow as pa

    leaf = kind = rows.type(name)
    while is_list(leaf):
        leaf = leaf.value_type
    if not (is_numeric(leaf) or pa.types.is_boolean(leaf) or pa.types.is_null(leaf)):
        raise InputError(f"column {name!r} of {rows.where} holds {kind}, where numbers are needed")
    try:
        values = dense(rows.column(name))
    except RaggedError as error:
        raise InputError(f"column {name!r} of {rows.where} holds {error}: they must have one length") from error
    return values.reshape(len(rows), int(np.prod(values.shape[1:], dtype=np.int64)))


def words(rows: Table, name: str, codes: tuple[str, ...] = ()) -> Any:
    """A column of words as an arrow array of n strings, null where missing.

    Integers are looked up in the column's ClassLabel names, or in `codes`, where there are such (-1: missing);
    integers and booleans without names become the words that spell them, as a CSV file would have them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column, kind = rows.column(name), rows.type(name)
    if column.null_count == len(column):  # of any type: a reader does not know that of a column without values
        return pa.nulls(len(column), pa.string())
    names = rows.class_names.get(name) or codes
    if pa.types.is_integer(kind) and names:
        ids = column.cast(pa.int64())
        ids = pc.if_else(pc.equal(ids, -1), pa.scalar(None, pa.int64()), ids)
        outside = pc.or_(pc.less(ids, 0), pc.greater_equal(ids, len(names))).fill_null(False).to_numpy(zero_copy_only=False)
        if outside.any():
            at = int(outside.argmax())
            raise InputError(
                f"column {name!r} holds {column[at].as_py()} in {rows.row(at)}: allowed are 0 to {len(names) - 1}, "
                f"for {len(names)} names"
            )
        return pa.array(list(names), pa.string()).take(ids)
    if is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return column.cast(pa.string())
    raise InputError(f"column {name!r} of {rows.where} holds {kind}, where words are needed")


def is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_numeric(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def listed(names: Any, most: int = 30) -> str:
    """Names for a message, cut short after `most`."""
    names = [str(name) for name in names]
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest


def quoted(names: Iterable[str]) -> list[str]:
    """The names, those that hold a comma in quotes, so that a list of them shows which is which."""
    return [repr(name) if "," in name else name for name in names]


def one_line(error: object, most: int = 300) -> str:
    """What an error says, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."
