"""Text as windows of tokens: each position has its own prediction, the next token."""

from __future__ import annotations

from codecs import BOM_UTF8
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..base.exceptions import InputError
from ..base.files import read_bytes
from ..base.memory import available_memory
from .columns import listed
from .dataset import Dataset
from .preprocessing import TEXT, Preprocessing
from .sources import open_source, reading
from .splits import choose_splits, refuse_fraction
from .targets import LANGUAGE_MODELING, Target
from .tokens import BYTES, fit_tokenizer

if TYPE_CHECKING:
    import datasets

BYTES_OF_A_CHARACTER = 32  # of a text, in memory while it is encoded: itself, its code points, their places
TEST_FRACTION = 0.1  # of a text without a test split
SEPARATOR = "\n"  # between the rows of a column


class TextDataset(Dataset):
    """A stream of tokens `[tokens]`, cut into windows of `context` tokens that do not overlap.

    Sample i is window i: inputs are its tokens, targets the tokens one further, so that every token of the stream but the first
    is predicted once. Tokens after the last whole window are left out. Raises InputError for a stream shorter than a window
    and its last target.
    """

    def __init__(self, name: str, stream: Tensor, preprocessing: Preprocessing, windows: int | None = None) -> None:
        (context,) = preprocessing.shape
        whole = (len(stream) - 1) // context
        if whole < 1:
            raise InputError(
                f"{name} has {len(stream):,} tokens, and one window of the context {context} needs {context + 1:,}; "
                "use a smaller context (--context), or more text"
            )
        windows = whole if windows is None else min(whole, windows)
        self.stream = stream[: windows * context + 1]
        super().__init__(name, self.stream[:-1].view(windows, context), self.stream[1:].view(windows, context), preprocessing)
        self.positions = context

    @property
    def nbytes(self) -> int:
        return self.stream.nbytes

    def to(self, device: torch.device | str) -> TextDataset:
        return TextDataset(self.name, self.stream.to(device), self.preprocessing)

    def fetch(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Token ids int64 `[M, context]` of the windows `index`, whatever the dtype."""
        return self.inputs.index_select(0, index).long()

    def one_hot(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The next tokens of the windows `index`, one-hot `[M * context, C]`."""
        ids = self.targets.index_select(0, index).reshape(-1, 1).long()
        return torch.zeros(len(ids), self.outputs, dtype=dtype, device=ids.device).scatter_(1, ids, 1)


def load_text(
    text: str | Path,
    dataset: str | Path | datasets.Dataset | datasets.DatasetDict | None = None,
    *,
    context: int = 64,
    tokenizer: str = "characters",
    config: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    test_fraction: float | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> tuple[TextDataset, TextDataset]:
    """The training and the test set of a language model, on the CPU.

    Args:
        text: a file; or a column of `dataset`, whose rows are joined by line breaks, missing ones left out.
        dataset, config, revision, train_split, test_split: as for `load_dataset`.
        context: tokens of a window.
        tokenizer: `characters` (those of the training text, before a test part is cut from it), `bytes`, or the JSON file of
            a tokenizer.
        test_fraction: the share of the text kept for testing, at its end, where there is no test split; by default 0.1.
        max_train_samples, max_test_samples: keep the first so many windows.
        preprocessing: that of an earlier run, whose tokens these are then too.
    Raises:
        InputError: one line about what cannot be used.
    """
    if not isinstance(context, int) or context < 2:
        raise InputError(f"context (--context) must be a whole number of at least 2, got {context!r}")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise InputError(f"test_fraction (--test-fraction) is {test_fraction}; allowed: between 0 and 1, both excluded")
    for what, value in (("max_train_samples", max_train_samples), ("max_test_samples", max_test_samples)):
        if value is not None and value < 1:
            raise InputError(f"{what} (--{what.replace('_', '-')}) is {value}; allowed: 1 or more")
    if dataset is None:
        named = {"config": config, "revision": revision, "train_split": train_split, "test_split": test_split}
        for option, value in named.items():
            if value is not None:
                raise InputError(f"text file {str(text)!r} has no {option} {value!r}; leave {option} out")
        name, column, train, test = Path(text).name, "", read_file(text), None
    else:
        name, train, test = _read_column(str(text), dataset, config, revision, train_split, test_split)
        column = str(text)
    whole = f"text {str(text)!r}"
    notes = []
    refuse_fraction(test_fraction, test)
    if test is None:
        test_fraction = test_fraction or TEST_FRACTION
        at = max(1, min(len(train) - 1, round(len(train) * (1 - test_fraction))))
        if isinstance(train, bytes) and tokenizer != BYTES:
            while at < len(train) and train[at] & 0xC0 == 0x80:  # not within a character
                at += 1
        train, test = train[:at], train[at:]
        notes.append(f"split: the last {test_fraction:.0%} of the text kept for testing")
    if preprocessing is None:
        cut = bool(notes)  # then the characters are those of the whole text, as classes are those of all rows
        fitted = fit_tokenizer(tokenizer, [train, test] if cut else [train], whole if cut else f"the training part of {whole}")
        target = Target(LANGUAGE_MODELING, names=fitted.names)
        preprocessing = Preprocessing(TEXT, (context,), target, tokenizer=fitted, text=column, notes=tuple(notes))
    fitted = preprocessing.tokenizer
    parts = []
    for part, content, most in (("training", train, max_train_samples), ("test", test, max_test_samples)):
        ids = fitted.encode(content, f"the {part} part of {whole}")
        stream = torch.from_numpy(ids.astype(_narrowest(len(fitted.names))))
        try:
            parts.append(TextDataset(name, stream, preprocessing, most))
        except InputError as error:
            raise InputError(f"the {part} part of {error}") from None
    return parts[0], parts[1]


def read_file(path: str | Path) -> bytes:
    """A text file's bytes. Raises InputError where it is not there or empty."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"text {str(path)!r} is a folder; give a file, or a column of --dataset")
    content = read_bytes(path.resolve(), available_memory() // BYTES_OF_A_CHARACTER)
    content = content.removeprefix(BOM_UTF8)
    if not content:
        raise InputError(f"text {str(path)!r} is empty")
    return content


def _read_column(
    column: str, dataset: object, config: str | None, revision: str | None, train_split: str | None, test_split: str | None
) -> tuple[str, str, str | None]:
    """(name, training text, test text or None) of a column."""
    name, splits = open_source(dataset, config, revision)
    train_name, test_name = choose_splits(splits, train_split, test_split)
    texts: list[str | None] = []
    for split in (train_name, test_name):
        if split is None:
            texts.append(None)
            continue
        rows = splits[split]
        if column not in rows.column_names:
            raise InputError(
                f"text {column!r} is no file, and no column of split {split!r}; columns: {listed(rows.column_names)}"
            )
        with reading(name):
            values = list(rows[column])
        wrong = next((i for i, value in enumerate(values) if not isinstance(value, str | None)), None)
        if wrong is not None:
            raise InputError(
                f"column {column!r} of split {split!r} holds a {type(values[wrong]).__name__} in row {wrong}; needed is text"
            )
        texts.append(SEPARATOR.join(value for value in values if value is not None))
        if not texts[-1]:
            raise InputError(f"column {column!r} of split {split!r} has no text")
    return name, texts[0], texts[1]


def _narrowest(tokens: int) -> type[np.generic]:
    return np.uint8 if tokens <= 1 << 8 else np.int16 if tokens <= 1 << 15 else np.int32
