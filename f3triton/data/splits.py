"""Which rows train and which test: named splits, seeded splits and seeded subsets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..base.exceptions import InputError
from .columns import listed

TEST_FRACTION = 0.2  # of rows without a test split
TEST_NAMES = ("test", "validation", "valid", "dev")  # tried in this order

# Separate streams of random numbers out of one seed.
CUT, TRAIN_SUBSET, TEST_SUBSET = 0, 1, 2


def choose_splits(splits: Mapping[str, Any], train: str | None, test: str | None) -> tuple[str, str | None]:
    """Names of the training and the test split; None for the latter where it has to be cut from training."""
    for role, name in (("train", train), ("test", test)):
        if name is not None and name not in splits:
            raise InputError(f"{role} split {name!r} does not exist; splits: {listed(splits)}")
    if train is None:
        others = [name for name in splits if name != test]
        if "train" in splits:
            train = "train"
        elif len(others) == 1:
            train = others[0]
        else:
            raise InputError(f"there is no split 'train'; name one with train_split (--train-split); splits: {listed(splits)}")
    if test == train:
        raise InputError(f"train split and test split are both {train!r}: a test on rows that were learned tells nothing")
    if test is None:
        test = next((name for name in TEST_NAMES if name in splits and name != train), None)
    return train, test


def refuse_fraction(fraction: float | None, test: object) -> None:
    """Raise InputError for a share of rows to cut off for testing where there are test rows already."""
    if fraction is not None and test is not None:
        raise InputError(f"test_fraction (--test-fraction) {fraction} has no effect where there is a test split; leave it out")


def cut(rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the test rows, each ascending: a pure function of its arguments."""
    if rows < 2:
        raise InputError(f"{rows} row(s) cannot be split into training and test rows")
    order = shuffled(rows, seed, CUT)
    size = min(max(round(rows * fraction), 1), rows - 1)
    return np.sort(order[size:]), np.sort(order[:size])


def subset(rows: int, most: int | None, seed: int, stream: int) -> np.ndarray | None:
    """Positions, ascending, of the first `most` rows after a seeded shuffle; None for all rows.

    Sorted data sets do not lose classes that way, and a smaller subset is part of a larger one.
    """
    if most is None or most >= rows:
        return None
    return np.sort(shuffled(rows, seed, stream)[:most])


def shuffled(rows: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of 0..rows-1, the same in every version of NumPy (raw bits are; `permutation` need not be)."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, stream))).random_raw(rows)
    return np.argsort(bits, kind="stable")
