"""Rows held as tensors, each known by its number."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..base.exceptions import InputError
from .columns import one_line
from .preprocessing import TENSORS, Preprocessing
from .targets import CLASSIFICATION, REGRESSION, Target


class Dataset:
    """N rows of inputs and targets on one device. A row's number, 0 to N - 1, is its stable sample index.

    Attributes:
        name: of the data set, for reports.
        inputs: `[N, K]`, uint8 pixels (channels first, flattened) or float32 columns; from tensors, `[N, ...]` as given.
        targets: class ids int64 `[N]`, dense class targets or standardised numbers float `[N, C]`.
        preprocessing: how the inputs came about; the training and the test set share it.
        task: `classification` or `regression`.
        outputs: C, classes or numbers to predict.
        shape: of a row's input, before it was flattened: `(C, H, W)` for images, `(K,)` for tables.
        in_features: inputs of a row, K.
        revision, split: of the source that the rows are from, where it has such.
        positions: predictions of a row: 1, or as many as a text window has tokens, T.
    """

    positions = 1

    def __init__(
        self,
        name: str,
        inputs: Tensor,
        targets: Tensor,
        preprocessing: Preprocessing,
        revision: str | None = None,
        split: str | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise InputError(f"data set {name!r} has {len(inputs)} rows of inputs and {len(targets)} of targets")
        if not len(inputs):
            raise InputError(f"data set {name!r} has no rows")
        self.name = name
        self.inputs = inputs
        self.targets = targets
        self.preprocessing = preprocessing
        self.revision, self.split = revision, split
        self._eye: dict[torch.dtype, Tensor] = {}  # [C, C] by dtype

    @classmethod
    def from_tensors(
        cls, inputs: Tensor, targets: Tensor, name: str = "tensors", classes: int | None = None, task: str | None = None
    ) -> Dataset:
        """A data set of tensors, used as they are: any float dtype, any shape `[N, ...]`. Arrays are taken too.

        Args:
            inputs: floating point, `[N, ...]`.
            targets: integers `[N]` are class ids. Floats `[N, C]` of zeros and ones only, C > 1, are class targets
                (one-hot or multi-hot); other floats `[N, T]` or `[N]` are numbers to predict.
            name: for reports.
            classes: number of classes, where more than the class ids show.
            task: `classification` or `regression`, where the rule for floats would guess wrong.
        Raises:
            InputError: wrong dtypes or shapes, values that are not finite, class ids outside 0..classes-1.
        """
        inputs, targets = as_tensor("inputs", inputs), as_tensor("targets", targets)
        if not inputs.is_floating_point() or inputs.ndim < 2:
            raise InputError(f"inputs are {inputs.dtype} of shape {list(inputs.shape)}; needed: floating point [N, ...]")
        if task not in (None, CLASSIFICATION, REGRESSION):
            raise InputError(f"task {task!r} is unknown; allowed: {CLASSIFICATION}, {REGRESSION}")
        for what, values in (("inputs", inputs), ("targets", targets)):
            if not torch.isfinite(values).all():
                raise InputError(f"{what} of {name!r} hold NaN or infinity")
        if not len(inputs) or targets.ndim not in (1, 2) or not targets.numel():
            raise InputError(
                f"inputs {list(inputs.shape)} and targets {list(targets.shape)}: needed are [N, ...] and [N] or [N, C]"
            )
        if not targets.is_floating_point():
            if task == REGRESSION:
                raise InputError("integer targets are class ids; for regression give them as floats [N, T]")
            if targets.ndim != 1:
                raise InputError(f"class ids have shape {list(targets.shape)}; needed: [N], or floats [N, C]")
            targets = targets.long()
            outputs, task = int(targets.max()) + 1 if classes is None else classes, CLASSIFICATION
            if int(targets.min()) < 0 or int(targets.max()) >= outputs:
                raise InputError(f"class ids run from {targets.min()} to {targets.max()}; allowed: 0 to {outputs - 1}")
        else:
            targets = targets[:, None] if targets.ndim == 1 else targets
            outputs = targets.shape[1]
            if task is None:
                hot = outputs > 1 and bool(((targets == 0) | (targets == 1)).all())
                task = CLASSIFICATION if hot else REGRESSION
            if classes not in (None, outputs):
                raise InputError(f"targets have {outputs} columns, and classes is {classes}")
        if task == CLASSIFICATION and outputs < 2:
            raise InputError(f"classification needs two classes or more; {name!r} has {outputs}")
        target = Target(task, names=tuple(str(i) for i in range(outputs)))
        return cls(name, inputs, targets, Preprocessing(TENSORS, tuple(inputs.shape[1:]), target))

    @property
    def task(self) -> str:
        return self.preprocessing.target.task

    @property
    def outputs(self) -> int:
        return self.preprocessing.target.outputs

    @property
    def shape(self) -> tuple[int, ...]:
        return self.preprocessing.shape

    @property
    def in_features(self) -> int:
        return math.prod(self.inputs.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take, in bytes."""
        return self.inputs.nbytes + self.targets.nbytes

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} rows, {self.in_features} inputs, {self.task}, {self.outputs} outputs)"

    def to(self, device: torch.device | str) -> Dataset:
        """The same rows on `device`; tensors already there are shared."""
        inputs, targets = self.inputs.to(device), self.targets.to(device)
        return Dataset(self.name, inputs, targets, self.preprocessing, self.revision, self.split)

    def fetch(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Inputs `[M, K]` of the rows `index` (int64 `[M]`, on this device), normalised; the host does not wait."""
        return self.preprocessing.normalise(self.inputs.index_select(0, index), dtype)

    def one_hot(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense targets of the rows `index [M]`: one-hot classes, or the numbers to predict, `[M, C]`."""
        rows = self.targets.index_select(0, index)
        if rows.ndim == 2:
            return rows.to(dtype)
        if dtype not in self._eye:
            self._eye[dtype] = torch.eye(self.outputs, dtype=dtype, device=self.device)
        return self._eye[dtype].index_select(0, rows)


def as_tensor(what: str, values: Tensor) -> Tensor:
    """A tensor, of one or of anything that NumPy can make an array of numbers of. Raises InputError for anything else."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.array(values, order="C")  # a copy: not all arrays can be shared
        if array.dtype.kind in "OUS":
            raise TypeError("they are words, or of several types; f3triton.load_dataset takes a data frame of such")
        return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what} are a {type(values).__name__}, and no tensor or array of numbers: {one_line(error)}"
        ) from None
