"""What is predicted: classes or standardised numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..base.exceptions import InputError
from ..base.words import CLASSIFICATION, LANGUAGE_MODELING, REGRESSION  # noqa: F401
from .columns import BOOLEAN, CATEGORY, DATE, NUMBER, VECTOR, Table, kind_of, listed, numbers, quoted, words
from .tables import UnusableColumnError, moments, places_of, standardise

TASKS = ("auto", CLASSIFICATION, REGRESSION)
MAX_INTEGER_CLASSES = 100  # under task "auto", an integer column with more distinct values is a regression target
FEW_VALUES = 20  # whole numbers of a regression target, up to which they look like classes


@dataclass(frozen=True)
class Target:
    """How target columns become targets. `classes` (strings, integers or booleans) or `mean` and `std`, by the task."""

    task: str
    columns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # of the outputs: [C] class names or [T] names of numbers
    classes: tuple[str | int | bool, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    coded: bool = False  # classes from a ClassLabel: raw rows may hold their integer ids

    @property
    def outputs(self) -> int:
        """Classes, or numbers predicted."""
        return len(self.names)


def choose_task(rows: Table, columns: list[str], task: str) -> str:
    """The task that target columns set, where `task` is "auto"; InputError where they do not allow the one asked for.

    Auto: ClassLabel, words and booleans are classes; integers are classes up to 100 distinct training values; other
    numbers, lists of numbers, and several columns are regression.
    """
    if task not in TASKS:
        raise InputError(f"task {task!r} is unknown; allowed: {', '.join(TASKS)}")
    kinds = {}
    for name in columns:
        kinds[name], reason = kind_of(rows, name)
        if kinds[name] == "pixels":  # a small matrix of integers is numbers here
            kinds[name] = VECTOR
        if kinds[name] not in (CATEGORY, BOOLEAN, NUMBER, VECTOR):
            what = "dates" if kinds[name] == DATE else "images"
            raise InputError(f"target column {name!r} cannot be predicted: {reason or f'it holds {what}'}")
    if task == REGRESSION or (task == "auto" and len(columns) > 1):
        for name, kind in kinds.items():
            if kind == CATEGORY:
                raise InputError(
                    f"target column {name!r} holds class names, and regression needs numbers; use task classification"
                )
        return REGRESSION
    if task == CLASSIFICATION and (len(columns) > 1 or kinds[columns[0]] == VECTOR):
        raise InputError(f"classification needs one target column with one class a row; got {listed(columns)}")
    kind = kinds[columns[0]]
    if task == CLASSIFICATION or kind in (CATEGORY, BOOLEAN):
        return CLASSIFICATION
    import pyarrow as pa
    import pyarrow.compute as pc

    few = (
        pa.types.is_integer(rows.type(columns[0])) and pc.count_distinct(rows.column(columns[0])).as_py() <= MAX_INTEGER_CLASSES
    )
    return CLASSIFICATION if few else REGRESSION


def fit_target(every: Table, train: Table, columns: list[str], task: str) -> Target:
    """The target's classes, from `every` row that training could have had, or its statistics, from the rows it has.

    Taking classes from `every` row keeps a subset or a random split from changing the width of the model.
    Raises InputError: a target missing, infinite or of the wrong kind; a single class.
    """
    if task == REGRESSION:
        values = _target_numbers(train, columns)  # [n, T]
        names: list[str] = []
        for name in columns:
            width = numbers(train, name).shape[1] if len(columns) > 1 else values.shape[1]
            names += [name] if width == 1 else [f"{name}[{i}]" for i in range(width)]
        if len(values) > 1 and (values == values[0]).all():
            raise InputError(
                f"target {listed(columns)} of {train.where} is the same in every row; training needs two values or more"
            )
        try:
            mean, std = moments(values, train, columns[0])
        except UnusableColumnError as error:
            raise InputError(f"target {listed(columns)} of {train.where} has {error}") from error
        return Target(task, tuple(columns), tuple(names), mean=mean, std=std)
    import pyarrow.compute as pc

    name = columns[0]
    classes: tuple = tuple(every.class_names.get(name, ()))
    coded = bool(classes)
    if not classes:
        kind, _ = kind_of(every, name)
        if kind == CATEGORY:
            text = words(every, name)
            _require_all(np.asarray(text.is_null()), every, name)
            classes = tuple(sorted(pc.unique(text).to_pylist()))
        else:
            distinct = np.unique(_class_numbers(every, name))
            classes = tuple(bool(v) if kind == BOOLEAN else int(v) for v in distinct)
    target = Target(task, (name,), tuple(str(c) for c in classes), classes=classes, coded=coded)
    ids = encode_target(target, train).unique()
    if len(ids) < 2:
        raise InputError(
            f"target column {name!r} of {train.where} holds one class only ({target.names[int(ids[0])]}); training needs two "
            "or more"
        )
    return target


def encode_target(target: Target, rows: Table) -> Tensor:
    """Targets of rows: class ids int64 [n], or standardised numbers float32 [n, T].

    Raises InputError: a target missing or infinite; a class that training did not have.
    """
    for name in target.columns:
        rows.require(name)
    if target.task == REGRESSION:
        values = _target_numbers(rows, list(target.columns))
        if values.shape[1] != target.outputs:
            raise InputError(f"target of {rows.where} has {values.shape[1]} numbers a row; training had {target.outputs}")
        with np.errstate(over="ignore"):
            scaled = standardise(values, target.mean, target.std).astype(np.float32)
        if not np.isfinite(scaled).all():
            raise InputError(
                f"target {listed(target.columns)} of {rows.where} holds values too large for its training rows' scale"
            )
        return torch.from_numpy(scaled)
    name = target.columns[0]
    if isinstance(target.classes[0], str):
        text = words(rows, name, target.classes if target.coded else ())
        _require_all(np.asarray(text.is_null()), rows, name)
        places = places_of(target.classes, text)  # [n]
        ids = np.where(np.isnan(places), -1, places).astype(np.int64)
    else:
        values = _class_numbers(rows, name)
        known = np.asarray(target.classes, np.float64)
        order = np.argsort(known, kind="stable")
        ids = order[np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)]
        ids = np.where(known[ids] == values, ids, -1)
    if len(ids) and ids.min() < 0:
        at = int(ids.argmin())
        value = text[at].as_py() if isinstance(target.classes[0], str) else int(values[at])
        raise InputError(
            f"target column {name!r} holds class {value!r} in {rows.row(at)}, which no training row has; "
            f"classes in training: {listed(quoted(target.names))}"
        )
    return torch.from_numpy(ids)


def target_notes(target: Target, train: Table, ids: Tensor, test_ids: Tensor, asked: str) -> list[str]:
    """What is odd about the targets: classes that are tested and never trained on; numbers that look like classes, where no
    task was `asked` for."""
    if target.task == CLASSIFICATION:
        new = int((~torch.isin(test_ids, ids)).sum())
        return [f"target: {new} of {len(test_ids)} test rows are of classes that no training row has"] if new else []
    if asked != "auto" or target.outputs > 1:
        return []
    values = np.unique(_target_numbers(train, list(target.columns)))
    if len(values) > FEW_VALUES or (values % 1).any():
        return []
    return [f"target: only {len(values)} different numbers, all whole; --task classification would make classes of them"]


def _target_numbers(rows: Table, columns: list[str]) -> np.ndarray:
    """Target columns side by side, float64 [n, T], all finite."""
    parts = []
    for name in columns:
        values = numbers(rows, name)
        _require_all(np.isnan(values).any(axis=1), rows, name)
        infinite = np.isinf(values).any(axis=1)
        if infinite.any():
            raise InputError(f"target column {name!r} is infinite in {rows.row(int(infinite.argmax()))}; drop such rows first")
        parts.append(values)
    return np.concatenate(parts, axis=1)


def _class_numbers(rows: Table, name: str) -> np.ndarray:
    """A column of whole numbers (or booleans) as float64 [n]; InputError where one is not whole."""
    values = _target_numbers(rows, [name])[:, 0]
    broken = values != np.floor(values)
    if broken.any():
        at = int(broken.argmax())
        raise InputError(
            f"target column {name!r} holds {values[at]:g} in {rows.row(at)}, which is no class (classes are whole numbers or "
            "words); use task regression"
        )
    return values


def _require_all(missing: np.ndarray, rows: Table, name: str) -> None:
    if missing.any():
        hint = " (label -1 stands for none; choose a split that has labels)" if name in rows.class_names else ""
        more = f" and {missing.sum() - 1:,} more" if missing.sum() > 1 else ""
        raise InputError(
            f"target column {name!r} is missing in {rows.row(int(missing.argmax()))}{more}; drop such rows first{hint}"
        )
