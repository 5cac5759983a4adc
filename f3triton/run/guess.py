"""What a model has to be better than: one answer to everything, by the training targets alone."""

from __future__ import annotations

import torch

from ..data import Dataset
from ..data.targets import CLASSIFICATION, REGRESSION
from ..learn.loss import hits
from .records import test_record
from .tally import Figures


def guess_of(train: Dataset, test: Dataset) -> dict[str, object] | None:
    """The test figures of the commonest class of the training rows, of the mean of their targets, or of a text's tokens as
    often as the training text has them; `answer` says which. None of a stream, whose targets are not held.
    """
    if len(train.targets) < len(train):
        return None
    if train.task == REGRESSION:
        errors = (test.targets.double() - train.targets.double().mean(0)).square().mean(0)  # [T]
        record = test_record(test, Figures(len(test), float(errors.mean()), 0, errors.tolist()))
        return {"answer": "the mean", "test_mse": record["test_mse"], "test_mse_in_units": record["test_mse_in_units"]}
    if train.targets.is_floating_point():  # dense class targets [N, C]
        share, right = train.targets.double().mean(0), test.targets
    else:
        counts = torch.bincount(train.targets.flatten().long(), minlength=train.outputs) + 1  # none is impossible
        share, right = counts.double() / counts.sum(), test.targets.flatten().long()
    if train.task == CLASSIFICATION:
        best = share.argmax()
        correct = hits(share[None], right) if right.is_floating_point() else right == best
        record = test_record(test, Figures(len(test), 0.0, int(correct.sum())))
        return {"answer": f"always {train.preprocessing.target_names[int(best)]}", "test_error": record["test_error"]}
    record = test_record(test, Figures(len(right), float(-share.log()[right].mean()), 0))
    return {"answer": "by frequency", **record}
