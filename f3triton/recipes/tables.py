"""The data sets that recipes describe: tables in any form that `load_dataset` takes, with the columns of the recipe."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..base.exceptions import InputError
from ..data.sources import READERS, open_source, reading
from . import Recipe

TYPED = {ending for ending, reader in READERS.items() if reader != "csv"}  # of files that know their columns


def open_data(recipe: Recipe, dataset: str | None, streaming: bool = False) -> object:
    """What `load_dataset` (or `stream_dataset`) takes: the data set of the recipe, or `dataset` in any form that they take.

    Of a table that the recipe describes (`names` or `mean`) these are its splits, with the columns of the recipe's schema, of
    which some are averaged. Such a table may be a text file too, packed or not, with a header or without.

    Raises InputError where the recipe's data has to be given and is not, or does not have its columns.
    """
    source = dataset or recipe.data.get("dataset")
    if source is None:
        raise InputError(f"recipe {recipe.name!r} needs its data: {recipe.data['get']}")
    names, mean = recipe.data.get("names"), recipe.data.get("mean", {})
    if names is None and not mean:
        return source
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() not in TYPED:
        splits = {"train": _read_table(path, names)}
    else:
        splits = open_source(source, streaming=streaming)[1]
    return {split: _columns(recipe, rows, source, mean) for split, rows in splits.items()}


def _columns(recipe: Recipe, rows: Any, source: str, mean: dict[str, list[str]]) -> Any:
    """The columns of a recipe's schema, some of them replaced by their mean. Raises InputError where one is missing."""
    found = rows.column_names or list(next(iter(rows), {}))  # a stream may not say
    missing = [name for name in recipe.schema if name not in found]
    if missing:
        raise InputError(f"data set {source!r} has no column {missing[0]!r}, which recipe {recipe.name!r} needs")
    rows = rows.select_columns(list(recipe.schema))
    for column, parts in mean.items():
        with reading(source):
            rows = rows.map(_mean, batched=True, remove_columns=parts, fn_kwargs={"column": column, "parts": parts})
    return rows


def _mean(rows: dict[str, list], column: str, parts: list[str]) -> dict[str, list]:
    """The mean of columns; NaN, which is a missing value, where one of them is missing. Raises InputError for words."""
    try:
        return {column: np.mean([np.asarray(rows[part], np.float64) for part in parts], axis=0).tolist()}
    except (TypeError, ValueError) as error:
        raise InputError(f"column {column!r} is the mean of {', '.join(parts)}, which are no numbers: {error}") from None


def _read_table(path: Path, names: list[str] | None) -> Any:
    """Rows of a comma-separated file. Its first line is a header, unless columns are named and it does not name them so."""
    import datasets
    import pandas
    import pyarrow

    options = {"skipinitialspace": True, "comment": "|", "sep": "\t" if ".tsv" in path.suffixes else ","}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pandas.errors.DtypeWarning)
            first = pandas.read_csv(path, header=None, nrows=1, dtype=str, **options).iloc[0].tolist()
            headed = names is None or first == names
            frame = pandas.read_csv(path, header=0 if headed else None, **options)
        if names is not None and frame.shape[1] != len(names):
            raise InputError(f"file {str(path)!r} has {frame.shape[1]} columns, the recipe names {len(names)}")
        frame.columns = names or frame.columns
        return datasets.Dataset.from_pandas(frame, preserve_index=False)
    except (OSError, ValueError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise InputError(f"file {str(path)!r} cannot be read as a table: {str(error).splitlines()[0]}") from None
