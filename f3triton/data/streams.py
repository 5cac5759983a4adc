"""Data sets that are read as they come, from the first row to the last, and never held whole.

Rows have no random access, so a stream is trained in windows (see `f3triton.visits.streams`). Its preprocessing is fitted on
the first training rows, a number that is bounded; its test rows are held in memory, a bounded number too.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..base.exceptions import InputError
from ..base.seeds import check_seed
from ..base.words import BUFFER, STATISTICS
from .columns import Table
from .dataset import Dataset
from .load import encode
from .preprocessing import Preprocessing
from .sources import folders_of, open_source, reading
from .splits import TEST_FRACTION, choose_splits, refuse_fraction
from .targets import CLASSIFICATION, encode_target

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

CHUNK = 1000  # rows that are read at a time; a saved place in a stream is one between chunks
EXAMPLES = 64  # rows that a `StreamDataset` itself holds
TEST_ROWS = 10_000


@dataclass(frozen=True)
class Source:
    """One split as a stream. Where `every` is given, each `every`-th row is held out for testing, and no training row."""

    rows: datasets.IterableDataset
    name: str
    split: str
    every: int | None = None
    folders: tuple[Path, ...] | None = None  # see `Table`

    def read(self, state: dict[str, Any] | None = None) -> Iterator[tuple[pa.Table, dict[str, Any] | None]]:
        """(chunk, where the stream was before it) from the start, or from a place that was given so; None: not known."""
        rows = self.rows.with_format("arrow")
        if state is not None:
            rows.load_state_dict(state)
        chunks = iter(rows.iter(batch_size=CHUNK))
        before = state
        while True:
            with reading(self.name):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk, before
            before = _state_of(rows)

    def count(self) -> int:
        """Training rows, by reading all of them once."""
        read = sum(chunk.num_rows for chunk, _ in self.read())
        return read if self.every is None else read - read // self.every

    def stated(self) -> int | None:
        """Training rows, where the data set's own description says how many there are."""
        info = (self.rows.info.splits or {}).get(self.split)
        total = getattr(info, "num_examples", None)
        if not total:  # some say 0 where they do not know
            return None
        return total if self.every is None else total - total // self.every


def _state_of(rows: datasets.IterableDataset) -> dict[str, Any] | None:
    """The library's own note of where a stream is, if it has one that JSON can hold."""
    try:
        return json.loads(json.dumps(rows.state_dict()))
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None


@dataclass
class _Piece:
    """Rows of a chunk whose first row is number `first` of the split; `state` is where the stream was before it."""

    table: pa.Table
    first: int
    state: dict[str, Any] | None
    taken: int = 0


class StreamReader:
    """The training rows of a `Source` in order (or, for `held_out`, the others), from the start or a `state`."""

    def __init__(self, source: Source, state: dict[str, Any] | None = None, held_out: bool = False) -> None:
        state = state or {"rows": 0, "stream": None, "chunk": 0, "taken": 0}
        inner = state["stream"]
        self.source, self.held_out = source, held_out
        self.pieces: deque[_Piece] = deque()  # read and not taken
        self.passed = state["chunk"] if inner else 0  # rows of the split that were read, of either kind
        self.read = 0  # training rows taken
        self._chunks = source.read(inner)
        self.skip(state["taken"] if inner else state["rows"])
        self.read = state["rows"]

    def _more(self) -> bool:
        found = next(self._chunks, None)
        if found is None:
            return False
        table, state = found
        first = self.passed
        self.passed += table.num_rows
        if self.source.every is not None:
            last = (np.arange(first, self.passed) + 1) % self.source.every == 0
            table = table.filter(last if self.held_out else ~last)
        self.pieces.append(_Piece(table, first, state))
        return True

    def _next(self, rows: int) -> list[pa.Table]:
        out = []
        while rows and (self.pieces or self._more()):
            piece = self.pieces[0]
            part = piece.table.slice(piece.taken, rows)
            piece.taken += part.num_rows
            if piece.taken == piece.table.num_rows:
                self.pieces.popleft()
            out.append(part)
            rows -= part.num_rows
            self.read += part.num_rows
        return out

    def take(self, rows: int) -> Table:
        """The next training rows, fewer than `rows` only where the stream ends."""
        import pyarrow as pa

        begin = self.read
        tables = self._next(rows)
        with reading(self.source.name):  # the types of later rows of a text file may differ from those of its first ones
            table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
        features = self.source.rows.features or {}
        kind = "held-out row" if self.held_out else "row"
        where = f"split {self.source.split!r}" + (f" from {kind} {begin:,} on" if begin else "")
        return Table(
            table,
            where,
            {name: list(f.names) for name, f in features.items() if type(f).__name__ == "ClassLabel"},
            {name: type(f).__name__ for name, f in features.items()},
            folders=self.source.folders,
        )

    def skip(self, rows: int) -> None:
        """Pass over training rows."""
        while rows > 0:
            passed = sum(table.num_rows for table in self._next(min(rows, CHUNK)))
            if not passed:
                return
            rows -= passed

    def state(self) -> dict[str, Any]:
        """Where this reader is, as JSON: training rows taken, and the library's own note of the chunk that the next is in."""
        if not self.pieces and not self._more():
            return {"rows": self.read, "stream": None, "chunk": self.passed, "taken": 0}
        piece = self.pieces[0]
        return {"rows": self.read, "stream": piece.state, "chunk": piece.first, "taken": piece.taken}


class StreamDataset(Dataset):
    """A stream of `samples` training rows. It holds the first few of them; `read` gives all, encoded, in order.

    `shuffle_buffer`: rows that are mixed with one another before they are cut into windows.
    """

    def __init__(
        self,
        source: Source,
        samples: int,
        shuffle_buffer: int,
        inputs: Tensor,
        targets: Tensor,
        preprocessing: Preprocessing,
        revision: str | None = None,
    ) -> None:
        first = inputs[:EXAMPLES].clone(), targets[:EXAMPLES].clone()
        super().__init__(source.name, *first, preprocessing, revision, source.split)
        self.source, self.samples, self.shuffle_buffer = source, samples, shuffle_buffer

    def __len__(self) -> int:
        return self.samples

    @property
    def reading(self) -> dict[str, int | str]:
        """What else the rows of a run depend on, for `identity`: the buffer, and a hash of the preprocessing."""
        fitted = {key: value for key, value in self.preprocessing.to_json().items() if key != "notes"}
        digest = hashlib.blake2b(json.dumps(fitted, sort_keys=True).encode(), digest_size=8).hexdigest()
        return {"shuffle_buffer": self.shuffle_buffer, "preprocessing": digest}

    def to(self, device: torch.device | str) -> StreamDataset:
        first = self.inputs.to(device), self.targets.to(device)
        return StreamDataset(self.source, self.samples, self.shuffle_buffer, *first, self.preprocessing, self.revision)

    @property
    def nbytes(self) -> int:
        """Memory that two buffers of rows take, the one in use and the next, in bytes."""
        row = (self.inputs.nbytes + self.targets.nbytes) // len(self.inputs)
        return 2 * min(self.shuffle_buffer, self.samples) * row

    def reader(self, state: dict[str, Any] | None = None) -> StreamReader:
        return StreamReader(self.source, state)

    def read(self, reader: StreamReader, rows: int) -> tuple[Tensor, Tensor]:
        """The next rows' inputs `[rows, K]` and targets, encoded. Raises InputError where the stream ends before."""
        before = reader.read
        table = reader.take(rows)
        if len(table) < rows:
            raise InputError(
                f"{self.name!r} ended after {before + len(table):,} training rows, and the run was to read {self.samples:,}; "
                f"max_train_samples (--max-train-samples) {before + len(table)} would fit"
            )
        try:
            return self.preprocessing.encode(table), encode_target(self.preprocessing.target, table)
        except InputError as error:
            if "which no training row has" not in str(error):
                raise
            raise InputError(
                f"{error}; the classes of a stream are those of its first rows: raise statistics_rows (--statistics-rows)"
            ) from None


def stream_dataset(
    name: str | Path | datasets.IterableDataset | datasets.IterableDatasetDict = "digits",
    *,
    config: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    test_fraction: float | None = None,
    target: str | Sequence[str] | None = None,
    features: str | Sequence[str] | None = None,
    image: str | None = None,
    image_size: int | None = None,
    task: str = "auto",
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    shuffle_buffer: int = BUFFER,
    statistics_rows: int = STATISTICS,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> tuple[StreamDataset, Dataset]:
    """The training rows as a stream, and the test set in memory. What is not listed is as for `load_dataset`.

    Args:
        name: as for `load_dataset`, or a `datasets.IterableDataset`, one or several splits in a dict.
        test_fraction: without a test split, every n-th row is held out, n = 1 / test_fraction to the nearest, by default 5.
        max_train_samples: a pass ends after so many rows. Needed where the stream neither says its length nor is local,
            where it is counted by reading it once.
        max_test_samples: the first so many test rows; 10,000 where it is None.
        shuffle_buffer: rows that are read at once and mixed before they are cut into windows.
        statistics_rows: means, deviations, categories and classes come from the first so many training rows.
    Raises:
        InputError: one line about what cannot be used.
    """
    numbers = {
        "max_train_samples": max_train_samples,
        "max_test_samples": max_test_samples,
        "shuffle_buffer": shuffle_buffer,
        "statistics_rows": statistics_rows,
    }
    for what, value in numbers.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{what} (--{what.replace('_', '-')}) is {value!r}; allowed: a whole number of 1 or more")
    if test_fraction is not None and not 0 < test_fraction <= 0.5:
        raise InputError(f"test_fraction (--test-fraction) is {test_fraction}; allowed for a stream: above 0, at most 0.5")
    check_seed(seed)
    label, splits = open_source(name, config, revision, streaming=True)
    train_name, test_name = choose_splits(splits, train_split, test_split)
    refuse_fraction(test_fraction, test_name)
    every = round(1 / (test_fraction or TEST_FRACTION)) if test_name is None else None
    folders = folders_of(name)
    source = Source(splits[train_name], label, train_name, every, folders)
    first = StreamReader(source).take(statistics_rows)
    most = TEST_ROWS if max_test_samples is None else max_test_samples
    if test_name is None:
        test = StreamReader(source, held_out=True).take(most)
        notes = [f"split: every {every}th row of {train_name!r} kept for testing, {len(test):,} of them used"]
    else:
        test, notes = StreamReader(Source(splits[test_name], label, test_name, folders=folders)).take(most), []
    for rows, split in ((first, train_name), (test, test_name or train_name)):
        if not len(rows):
            raise InputError(f"split {split!r} has no rows{' left to hold out' * (rows is test and test_name is None)}")
    if len(first) < statistics_rows:  # that was all
        samples = min(len(first), max_train_samples or len(first))
    else:
        samples = _samples(source, max_train_samples, local=isinstance(name, (str, Path)) and _is_local(name))
    if samples > len(first):
        notes = [*notes, f"statistics: of the first {len(first):,} training rows, of {samples:,}"]
    try:
        used = target, features, image, task, preprocessing, image_size
        fitted, test_set = encode(label, revision, first, first, test, notes, *used)
    except InputError as error:
        if "one class only" not in str(error):
            raise
        raise InputError(f"{error}; shuffle the files, or raise statistics_rows (--statistics-rows)") from None
    _refuse_one_class(fitted, test_set, samples)
    notes = [*fitted.preprocessing.notes, *_sorted_note(fitted, test_set, min(shuffle_buffer, samples))]
    fitted.preprocessing = test_set.preprocessing = replace(fitted.preprocessing, notes=tuple(notes))
    train = StreamDataset(source, samples, shuffle_buffer, fitted.inputs, fitted.targets, fitted.preprocessing, revision)
    return train, test_set


def _refuse_one_class(train: Dataset, test: Dataset, samples: int) -> None:
    """Raise InputError where all rows to train on, or to test on, are of one class: in sorted rows the first ones are."""
    if train.task != CLASSIFICATION:
        return
    limits = {"training": "max_train_samples (--max-train-samples)", "test": "max_test_samples (--max-test-samples)"}
    for (part, limit), ids in zip(limits.items(), (train.targets[:samples], test.targets), strict=True):
        if len(ids.unique()) == 1:
            raise InputError(
                f"the {len(ids):,} {part} rows are all of the class {train.preprocessing.target_names[int(ids[0])]!r}, as if "
                f"{train.name!r} were sorted; shuffle the files, or raise {limit}"
            )


def _sorted_note(train: Dataset, test: Dataset, buffer: int) -> list[str]:
    """A warning where the first buffer has no sample of a class of which, going by the test set, it should have ten or more; or
    where each row's target tells much of the next one's, as in rows that are sorted, or follow one another in time."""
    seen, missing = train.targets[:buffer], 0  # [rows] or [rows, T]
    if train.task == CLASSIFICATION:
        there, expected = (torch.bincount(t, minlength=train.outputs) for t in (seen, test.targets))  # [C]
        missing = int(((there == 0) & (expected / len(test) * len(seen) >= 10)).sum())
        differ, by_chance = (seen[1:] != seen[:-1]).float().mean(), 1 - (there / len(seen)).square().sum()
    else:
        differ, by_chance = (seen[1:] - seen[:-1]).square().sum(1).mean(), 2 * seen.var(0, correction=0).sum()
    if missing:
        found = f"lack {missing} of the {train.outputs} classes"
    elif len(seen) >= 20 and differ < by_chance / 2:
        found = "come in runs, each with much the same target as the one before"
    else:
        return []
    return [
        f"WARNING: the first {len(seen):,} training rows {found}, as if they were sorted; a stream in such an order teaches "
        "a network to forget. Shuffle the files, or raise shuffle_buffer (--shuffle-buffer)"
    ]


def _samples(source: Source, most: int | None, local: bool) -> int:
    stated = source.stated()
    if most is not None or stated is not None:
        return min(number for number in (most, stated) if number is not None)
    if not local:
        raise InputError(
            f"{source.name!r} does not say how many rows its split {source.split!r} has; say how many to train on: "
            "max_train_samples (--max-train-samples)"
        )
    return source.count()


def _is_local(name: str | Path) -> bool:
    return str(name) == "digits" or Path(name).expanduser().exists()
