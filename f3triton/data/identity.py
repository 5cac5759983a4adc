"""Which data set it is: as far as that can be told without reading all of it, or to the last row."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..base.data import Data
    from .dataset import Dataset

SAMPLED = 64  # rows that are hashed


def identity(data: Data, whole: bool = False) -> dict[str, str | int | None]:
    """Name, revision, split and rows of a data set, and a hash of the inputs and targets of 64 rows spread over it.

    With `whole` also a hash of all rows that it holds.

    Of a stream, these are the first 64.
    """
    inputs = getattr(data, "inputs", None)  # raw ones do not depend on the device's arithmetic
    held = len(data) if inputs is None else len(inputs)  # a stream holds its first rows only
    index = torch.linspace(0, held - 1, min(SAMPLED, held), dtype=torch.float64).long().to(data.device)
    inputs = data.fetch(index, torch.float32) if inputs is None else inputs.index_select(0, index)
    return {
        "name": getattr(data, "name", "data"),
        "revision": getattr(data, "revision", None),
        "split": getattr(data, "split", None),
        "rows": len(data),
        "hash": _hash(inputs, data.one_hot(index, torch.float64)),
        **({"content": digest(data)} if whole and hasattr(data, "inputs") else {}),
        **getattr(data, "reading", {}),
    }


def digest(data: Dataset) -> str:
    """A hash of all rows that a data set holds."""
    return _hash(data.inputs, data.targets)


def _hash(*tensors: Tensor) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
