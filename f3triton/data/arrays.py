"""What people train on with torch: pairs of tensors or arrays, and its map-style data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ..base.exceptions import InputError
from .dataset import Dataset, as_tensor
from .targets import CLASSIFICATION

NEEDED = (
    "a pair (inputs, targets) of tensors or arrays, a map-style data set of such pairs, or what f3triton.load_dataset gives, "
    "which takes data frames"
)


class MapStyle(Protocol):
    """A data set as torch has them, whose samples are pairs (input, target)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


Arrays = tuple[Tensor, Tensor] | MapStyle


def as_dataset(data: Dataset | Arrays, like: Dataset | None = None) -> Dataset:
    """A `Dataset` of these; class ids have the classes of the data set `like` where it is given. A map-style one is read once.

    Raises InputError, which says what to pass instead, for anything else.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, DataLoader):
        raise InputError("a DataLoader is no data set: pass loader.dataset; batches are made by the Trainer (batch_size, seed)")
    if isinstance(data, IterableDataset):
        raise InputError(f"a {type(data).__name__} has no samples by number; f3triton.stream_dataset reads streams of datasets")
    if isinstance(data, TensorDataset):
        pair = data.tensors
    elif isinstance(data, tuple | list):
        pair = data
    else:
        pair = _read(data)
    if len(pair) != 2:
        raise InputError(f"data to train or test on is a {type(data).__name__} of {len(pair)} parts; needed: {NEEDED}")
    inputs, targets = as_tensor("inputs", pair[0]), as_tensor("targets", pair[1])
    ids = like is not None and like.task == CLASSIFICATION and not targets.is_floating_point()
    return Dataset.from_tensors(inputs, targets, classes=like.outputs if ids else None)


def _read(data: object) -> tuple[Tensor, Tensor]:
    """All samples of a map-style data set, `[N, ...]` each. Raises InputError for one that has none, or none of one shape."""
    kind = type(data).__name__
    table = isinstance(data, Mapping) or hasattr(data, "columns") or hasattr(data, "column_names")
    if table or isinstance(data, str | bytes | Tensor) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise InputError(f"data to train or test on is a {kind}; needed: {NEEDED}")
    samples = [data[index] for index in range(len(data))]
    wrong = next((i for i, sample in enumerate(samples) if not isinstance(sample, tuple | list) or len(sample) != 2), None)
    if wrong is not None or not samples:
        raise InputError(f"sample {wrong or 0} of a {kind} is no pair (input, target), or not there; needed: {NEEDED}")
    parts = [[as_tensor(f"{what} of a {kind}", value) for value in values]
             for what, values in zip(("inputs", "targets"), zip(*samples, strict=True), strict=True)]  # fmt: skip
    try:
        return torch.stack(parts[0]), torch.stack(parts[1])
    except RuntimeError:
        raise InputError(f"the samples of a {kind} differ in shape; give them one shape, by a transform") from None
