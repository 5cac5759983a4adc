"""From a name to two `Dataset`s."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..base.exceptions import InputError
from ..base.seeds import check_seed
from .choose import choose_inputs, choose_target, reject
from .columns import CATEGORY, DATE, Table, listed
from .dataset import Dataset
from .images import RESIZE, channel_moments, check_size, load_images, match_channels
from .preprocessing import IMAGE, TABLE, Preprocessing
from .sources import folders_of, open_source
from .splits import TEST_FRACTION, TEST_SUBSET, TRAIN_SUBSET, choose_splits, cut, refuse_fraction, subset
from .tables import Column, UnusableColumnError, encode_table, fit_column, odd_numbers
from .targets import Target, choose_task, encode_target, fit_target, target_notes

if TYPE_CHECKING:
    import datasets
    import pandas


def load_dataset(
    name: str | Path | datasets.Dataset | datasets.DatasetDict | pandas.DataFrame = "digits",
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
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> tuple[Dataset, Dataset]:
    """The training and the test set, on the CPU, with one `Preprocessing` fitted on the training rows.

    Args:
        name: `"digits"` (bundled); a folder that `datasets.load_dataset` or `load_from_disk` reads; a `.parquet`, `.csv`,
            `.tsv`, `.json` or `.jsonl` file (the fields of a csv are separated by commas, or by the semicolons or tabs of a
            first line without commas); a data set on the Hugging Face hub; or one that is loaded already, as a
            `pandas.DataFrame` too, or a dict of such by split.
        config, revision: of a data set that has several.
        train_split: by default `train`, or the only split there is.
        test_split: by default the first of `test`, `validation`, `valid`, `dev` that exists; without one, test rows are
            cut from the training split.
        test_fraction: the share of rows to cut, by default 0.2; which ones is a function of `seed` and the number of rows only.
        target: the column to predict, or several numbers (a list, or separated by commas). By default the only ClassLabel
            column; else a column called label, labels, target, targets, y or class; else the only one left to choose.
        features: table columns to use; by default all that can be used, the others being reported by
            `preprocessing.describe()`.
        image: the image column, where there are several; or one of text, which is the images' paths.
        image_size: images are stretched to that height and width (bilinear, antialiased), those of rows to predict as well.
        task: `classification`, `regression` or `auto`: class labels, words, booleans and integers with at most 100
            distinct values are classes, other numbers are regression.
        max_train_samples, max_test_samples: keep the first so many rows after a seeded shuffle, in their original order.
        seed: of the cut and of the subsets.
        preprocessing: that of an earlier run (`f3.load(...).preprocessing`), by which these rows are prepared too.
    Raises:
        InputError: one line about what cannot be used; of a `preprocessing` where columns, types or classes are not its own.
    """
    for what, value in (("max_train_samples", max_train_samples), ("max_test_samples", max_test_samples)):
        if value is not None and value < 1:
            raise InputError(f"{what} (--{what.replace('_', '-')}) is {value}; allowed: 1 or more")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise InputError(f"test_fraction (--test-fraction) is {test_fraction}; allowed: between 0 and 1, both excluded")
    check_seed(seed)
    label, splits = open_source(name, config, revision)
    every, train, test, notes = _split_rows(splits, train_split, test_split, test_fraction, seed, folders_of(name))
    train = _keep(train, subset(len(train), max_train_samples, seed, TRAIN_SUBSET))
    test = _keep(test, subset(len(test), max_test_samples, seed, TEST_SUBSET))

    return encode(label, revision, every, train, test, notes, target, features, image, task, preprocessing, image_size)


def encode(
    label: str,
    revision: str | None,
    every: Table,
    train: Table,
    test: Table,
    notes: list[str],
    target: str | Sequence[str] | None,
    features: str | Sequence[str] | None,
    image: str | None,
    task: str,
    given: Preprocessing | None = None,
    image_size: int | None = None,
) -> tuple[Dataset, Dataset]:
    """The two data sets of these rows, by a preprocessing fitted on `train`, classes taken from `every`; or by the `given` one,
    where what would be fitted differs from it in statistics only."""
    check_size(image_size)
    targets = choose_target(every, target)
    for column in targets:
        test.require(column)
    fitted = fit_target(every, train, targets, choose_task(every, targets, task))
    train_targets, test_targets = encode_target(fitted, train), encode_target(fitted, test)
    notes = notes + target_notes(fitted, train, train_targets, test_targets, task)
    column, table, left_out = choose_inputs(every, targets, features, image)
    if column is not None:
        test.require(column)
        size = given.resized_to if given is not None and image_size is None else image_size
        preprocessing, train_inputs, test_inputs = _images(train, test, column, fitted, notes + left_out, size)
    elif image_size is not None:
        raise InputError(f"image_size (--image-size) {image_size} has no effect: {label!r} is used as a table; leave it out")
    else:
        fitted_as = None if given is None else {column.name: column.kind for column in given.columns}
        named = features is not None
        preprocessing, train_inputs, test_inputs = _table(train, test, table, fitted, notes + left_out, named, fitted_as)
    if given is not None:
        given.require_like(preprocessing, label)
        preprocessing = given
        train_targets, test_targets = given.encode_targets(train), given.encode_targets(test)
        if given.kind == TABLE:  # pixels have no statistics in them
            train_inputs, test_inputs = given.encode(train), given.encode(test)
    return (
        Dataset(label, train_inputs, train_targets, preprocessing, revision, _split_name(train)),
        Dataset(label, test_inputs, test_targets, preprocessing, revision, _split_name(test)),
    )


def _split_name(rows: Table) -> str:
    return rows.where.removeprefix("split ").strip("'")


def _split_rows(
    splits: dict[str, datasets.Dataset],
    train_split: str | None,
    test_split: str | None,
    fraction: float | None,
    seed: int,
    folders: tuple[Path, ...] | None,
) -> tuple[Table, Table, Table, list[str]]:
    """All rows of the training split, the training and test rows, and notes."""
    train_name, test_name = choose_splits(splits, train_split, test_split)
    refuse_fraction(fraction, test_name)
    every = Table.from_dataset(splits[train_name], f"split {train_name!r}", folders)
    if not len(every):
        raise InputError(f"split {train_name!r} is empty")
    if test_name is None:
        if len(every) < 2:
            raise InputError(f"split {train_name!r} has 1 row, which cannot be split; columns: {listed(every.names)}")
        train, test = (every.select(picked) for picked in cut(len(every), fraction or TEST_FRACTION, seed))
        others = f"; splits not used: {listed(name for name in splits if name != train_name)}" if len(splits) > 1 else ""
        note = f"split: {len(test)} of the {len(every)} rows of {train_name!r} kept for testing (seed {seed}){others}"
        return every, train, test, [note]
    test = Table.from_dataset(splits[test_name], f"split {test_name!r}", folders)
    if not len(test):
        raise InputError(f"split {test_name!r} is empty")
    return every, every, test, []


def _keep(rows: Table, chosen: np.ndarray | None) -> Table:
    """The chosen ones (counted among these rows, not from the start of the split)."""
    if chosen is None:
        return rows
    return rows.select(chosen if rows.picked is None else rows.picked[chosen])


def _images(
    train: Table, test: Table, column: str, target: Target, notes: list[str], size: int | None
) -> tuple[Preprocessing, Tensor, Tensor]:
    pixels = load_images(train, column, size)  # [n, C, H, W]
    test_pixels = load_images(test, column, size)
    if pixels.shape[2:] != test_pixels.shape[2:]:
        (height, width), (test_height, test_width) = pixels.shape[2:], test_pixels.shape[2:]
        raise InputError(
            f"column {column!r} holds images of mixed sizes, {width}x{height} in {train.row(0)} and "
            f"{test_width}x{test_height} in {test.row(0)}; {RESIZE}"
        )
    test_pixels = match_channels(test_pixels, pixels.shape[1], test.where)
    mean, std = channel_moments(pixels)
    shape = tuple(pixels.shape[1:])
    preprocessing = Preprocessing(IMAGE, shape, target, column, mean, std, notes=tuple(notes), resized=size is not None)
    return preprocessing, pixels.flatten(1), test_pixels.flatten(1)


def _table(
    train: Table,
    test: Table,
    kinds: dict[str, str],
    target: Target,
    notes: list[str],
    named: bool,
    fitted_as: dict[str, str] | None,
) -> tuple[Preprocessing, Tensor, Tensor]:
    columns: list[Column] = []
    left_out = {}
    if fitted_as is not None:  # a run from before there were dates and hashed words left such columns out
        kinds = {name: kind for name, kind in kinds.items() if name in fitted_as or kind not in (CATEGORY, DATE)}
    for name, kind in kinds.items():
        try:
            columns.append(fit_column(train, name, kind, (fitted_as or {}).get(name, "")))
        except UnusableColumnError as error:
            left_out[name] = str(error)
    notes = notes + reject(left_out, named, train)
    if not columns:
        reasons = "".join(f"; {note}" for note in notes if note.startswith("left out"))
        raise InputError(
            f"no column of {train.where} can be a feature beside the target {listed(target.columns)}; "
            f"columns: {listed(train.names)}{reasons}"
        )
    inputs, train_missing, _ = encode_table(tuple(columns), train)  # [N, K]
    test_inputs, test_missing, test_unseen = encode_table(tuple(columns), test)
    for column in columns:
        if odd := odd_numbers(column.categories):
            notes.append(f"taken for words: column {column.name!r} ({odd})")
    notes += _counts("missing values filled in training rows", train_missing)
    notes += _counts("missing values filled in test rows", test_missing)
    notes += _counts("values in test rows that training did not have", test_unseen)
    preprocessing = Preprocessing(TABLE, (inputs.shape[1],), target, columns=tuple(columns), notes=tuple(notes))
    return preprocessing, inputs, test_inputs


def _counts(what: str, counts: Counter) -> list[str]:
    return [f"{what}: " + listed(f"{name} {count}" for name, count in counts.items())] if counts else []
