"""An evaluation's figures under their names."""

from __future__ import annotations

import math

from ..data import Dataset
from ..data.targets import LANGUAGE_MODELING
from .tally import Figures

Record = dict[str, float | int | str]


def figure_of(record: Record) -> str | None:
    """The name of the figure that says which evaluation is best; None where nothing was tested."""
    return next((name for name in ("test_error", "test_mse", "test_loss") if name in record), None)


def train_record(data: Dataset, figures: Figures) -> Record:
    if data.task == LANGUAGE_MODELING:
        return text_record("train", data, figures)
    record: Record = {"train_loss": figures.loss}
    if data.task == "classification":
        record["train_error"] = 100 * (figures.samples - figures.correct) / figures.samples
    return record


def test_record(data: Dataset, figures: Figures) -> Record:
    """The test figures under their names: percent wrong for classes, mean squared errors for values, or a `text_record`."""
    if data.task == LANGUAGE_MODELING:
        return text_record("test", data, figures)
    if data.task == "classification":
        return {"test_loss": figures.loss, "test_error": 100 * (figures.samples - figures.correct) / figures.samples}
    names, scales = data.preprocessing.target_names, data.preprocessing.target.std or [1.0] * data.outputs
    in_units = {name: mse * scale**2 for name, mse, scale in zip(names, figures.mse, scales, strict=True)}
    return {"test_loss": figures.loss, "test_mse": figures.loss, "test_mse_in_units": in_units}


def text_record(part: str, data: Dataset, figures: Figures) -> Record:
    """A language model's loss in nats a token, in bits a character (byte, token), and as perplexity of a token."""
    return {
        f"{part}_loss": figures.loss,
        f"{part}_bits_per_{data.preprocessing.tokenizer.unit}": figures.loss / math.log(2),
        f"{part}_perplexity": math.exp(min(figures.loss, 700.0)),
    }
