"""How raw rows become inputs and outputs become predictions: fitted on training rows, stored with the model as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.exceptions import InputError
from ..base.schema import FINITE, FLAG, STRING, Either, Fields, Many, Variant, Whole, Word, check
from .columns import BOOLEAN, CATEGORY, DATE, HASHED, NUMBER, VECTOR, Table, listed, quoted, raw_column, read_numbers, rows_from
from .dates import PARTS, WIDTH
from .images import LARGEST_SIDE, convert_images, load_images, match_channels
from .tables import MAX_CATEGORIES, Column, encode_table
from .targets import CLASSIFICATION, LANGUAGE_MODELING, REGRESSION, Target, encode_target
from .tokens import TOKENIZER, Tokenizer

IMAGE, TABLE, TENSORS, TEXT = "image", "table", "tensors", "text"
FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Preprocessing:
    """Everything between raw rows and a model's inputs, and between its outputs and predictions.

    Of kind `image` (uint8 pixels, normalised by the mean and standard deviation of each channel over the training
    images), `table` (columns, standardised and one-hot), `tensors` (inputs as they were given) or `text` (token ids).
    """

    kind: str
    shape: tuple[int, ...]  # of one row of inputs: (C, H, W), (K,), (tokens,) or whatever the tensors have
    target: Target
    image: str = ""  # image: the column, and the statistics of its C channels, in units of 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resized: bool = False  # image: whether images of any size are made those of `shape`
    columns: tuple[Column, ...] = ()  # table
    text: str = ""  # text: the column, if it comes from one
    tokenizer: Tokenizer | None = None  # text
    notes: tuple[str, ...] = ()  # what was found while the data was read: columns left out, values filled
    _vectors: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def in_features(self) -> int:
        """Inputs of one row."""
        return math.prod(self.shape)

    @property
    def resized_to(self) -> int | None:
        """The height and width that images are resized to, if they are."""
        return self.shape[1] if self.resized else None

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the outputs: of the classes, or of the numbers predicted."""
        return self.target.names

    def encode(self, rows: Any) -> Tensor:
        """Raw rows as inputs [M, K]: uint8 pixels (channels first, flattened) or float32 columns; then see `normalise`.

        `rows` is a list of dicts, a dict of columns, a `pandas.DataFrame` or a `datasets.Dataset` with the columns of
        training (others are ignored); numbers and dates may be text. Images may also come as a list of paths, PIL images or
        arrays, or as one array or tensor `[M, H, W]`, `[M, C, H, W]`, `[M, H, W, C]` or `[M, K]` of whole numbers from 0 to
        255. Images of any size are resized where those of training were.
        Raises InputError: a column missing or of another kind; images of another size; infinity.
        """
        if self.kind == TENSORS:
            return self._encode_tensors(rows)
        if self.kind == TEXT:
            return self._encode_texts(rows)
        if self.kind == TABLE:
            found = rows_from(rows, [column.name for column in self.columns])
            numeric = [column.name for column in self.columns if column.kind in (NUMBER, BOOLEAN)]
            return encode_table(self.columns, read_numbers(found, numeric))[0]
        where = "the rows given"
        if isinstance(rows, Table):  # of a stream, which may have no end
            where = rows.where
            pixels = load_images(rows_from(rows, [self.image]), self.image, self.resized_to, cached=False)
        elif hasattr(rows, "with_format"):
            pixels = load_images(rows_from(rows, [self.image]), self.image, self.resized_to)
        else:
            pixels = convert_images(self._image_values(rows), self.image, self.resized_to)
        if not len(pixels):
            return pixels.new_empty(0, self.in_features)
        if tuple(pixels.shape[2:]) != self.shape[1:]:
            (height, width), (trained_height, trained_width) = pixels.shape[2:], self.shape[1:]
            raise InputError(f"{where} hold images of {width}x{height}; training had {trained_width}x{trained_height}")
        return match_channels(pixels, self.shape[0], where).flatten(1)

    def encode_targets(self, rows: Any) -> Tensor:
        """Targets of raw rows (as for `encode`): class ids int64 [M], or standardised numbers float32 [M, T].

        Raises InputError: the column missing; a target missing, infinite or of a class that training did not have.
        """
        if self.kind in (TENSORS, TEXT):
            raise InputError(f"this model was trained on {self.kind}, so its targets have no columns to be read from")
        return encode_target(self.target, rows_from(rows, list(self.target.columns)))

    def normalise(self, inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Encoded inputs `[M, K]` as the model takes them: pixels `(u8 / 255 - mean) / std`; others change dtype only."""
        if self.kind == TEXT:
            return inputs.long()
        if self.kind != IMAGE:
            return inputs.to(dtype)
        # Half precision would lose what the mean and the scale need: there the arithmetic is in float32.
        working = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        scale, shift = self._scale_and_shift(inputs.device, working)
        if inputs.device.type not in ("cpu", "cuda"):  # those two read uint8 in the same pass, which saves one
            inputs = inputs.to(working)
        return torch.addcmul(shift, inputs, scale).to(dtype)  # [M, K]

    def unstandardise(self, outputs: Tensor) -> Tensor:
        """Predictions [..., T] in the target's own units; class scores are returned as they are."""
        if self.target.task != REGRESSION or not self.target.mean:
            return outputs
        mean, std = (torch.tensor(v, dtype=outputs.dtype, device=outputs.device) for v in (self.target.mean, self.target.std))
        return outputs * std + mean

    def describe(self) -> list[str]:
        """What was found in the data and what is done with it, in lines for people."""
        lines = []
        if self.kind == IMAGE:
            channels, height, width = self.shape
            colour = "grey" if channels == 1 else "colour"
            statistics = f"mean {_numbers(self.mean)}, std {_numbers(self.std)}"
            how = "resized to " * self.resized
            lines.append(f"images: {how}{width}x{height} {colour}, column {self.image!r}, {statistics}")
        elif self.kind == TABLE:
            lines.append(
                f"features: {len(self.columns)} columns as {self.in_features} inputs: {listed(map(_column, self.columns))}"
            )
            for kind in (DATE, HASHED):
                if found := [column for column in self.columns if column.kind == kind]:
                    what = f"dates, as {', '.join(PARTS)}" if kind == DATE else f"more than {MAX_CATEGORIES} words each, hashed"
                    lines.append(f"{what}: {listed(f'{c.name} ({c.width} inputs)' for c in found)}")
        elif self.kind == TENSORS:
            lines.append(f"inputs: tensors of shape {list(self.shape)}")
        if self.kind == TEXT:
            column = f"column {self.text!r}, " * bool(self.text)
            known = listed([repr(name)[1:-1] for name in self.target.names], 12)
            unit = self.tokenizer.unit
            return [f"text: {column}{self.target.outputs} {unit}s: {known}; windows of {self.shape[0]}", *self.notes]
        name = f"column {', '.join(map(repr, self.target.columns))}, " if self.target.columns else ""
        if self.target.task == CLASSIFICATION:
            lines.append(f"target: {name}{self.target.outputs} classes: {listed(quoted(self.target.names), 10)}")
        else:
            statistics = (
                f"mean {_numbers(self.target.mean)}, std {_numbers(self.target.std)}" if self.target.mean else "as given"
            )
            lines.append(f"target: {name}{self.target.outputs} number{'s' * (self.target.outputs > 1)}, {statistics}")
        return lines + list(self.notes)

    def require_like(self, found: Preprocessing, name: str) -> None:
        """Raise InputError where `found`, fitted on the rows of the data set `name`, differs in more than statistics."""
        then, now = self._form(), found._form()
        other = [f"{what} is new" for what in now if what not in then] + [f"{what} is gone" for what in then if what not in now]
        other += [f"{k}: {_words(then[k])}; now: {_words(now[k])}" for k in then if k in now and then[k] != now[k]]
        if other:
            raise InputError(f"data set {name!r} is not as it was when the model was trained: {listed(other, 5)}")

    def _form(self) -> dict[str, object]:
        """Everything but statistics and notes: what it is, and of what."""
        target = self.target
        form = {
            "the task": target.task,
            "the target": target.columns,
            "the kind of inputs": self.kind,
            "the image": self.image,
            "whether images are resized": self.resized,
            "their shape": () if self.kind == TABLE else self.shape,
            "the classes": target.classes,
            "the number of outputs": target.outputs,
        }
        for column in self.columns:
            own = column.categories or ((column.width,) if column.kind in (VECTOR, HASHED) else ())
            form[f"column {column.name!r}"] = (column.kind, *own)
        return form

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, which `from_json` turns into an equal object."""
        content = {"format": FORMAT, **{k: v for k, v in vars(self).items() if k not in ("_vectors", "resized", *_OF_TEXT)}}
        content["target"] = asdict(self.target)
        content["columns"] = [
            {k: v for k, v in asdict(column).items() if k != "buckets" or column.buckets} for column in self.columns
        ]
        if self.resized:
            content["resized"] = True
        if self.kind == TEXT:
            content |= {"text": self.text, "tokenizer": self.tokenizer.to_json()}
        return {k: _as_lists(v) for k, v in content.items()}

    @classmethod
    def from_json(cls, content: Any) -> Preprocessing:
        """The preprocessing that `to_json` described; InputError says what is wrong with any other content."""
        check(PREPROCESSING, content, "stored preprocessing is broken: it")
        content = {name: value for name, value in _tuples(content).items() if name != "format"}
        content["target"] = Target(**_tuples(content["target"]))
        content["columns"] = tuple(Column(**_tuples(column)) for column in content["columns"])
        if content["kind"] == TEXT:
            content["tokenizer"] = Tokenizer.from_json(content["tokenizer"])
        self = cls(**content)
        self._validate()
        return self

    def _validate(self) -> None:
        target = self.target
        _require((self.kind == TEXT) == (target.task == LANGUAGE_MODELING), "task and kind disagree")
        _require(target.outputs > 0, "target has no names")
        _statistics(target.mean, target.std, (0, target.outputs) if target.task == REGRESSION else (0,), "target")
        _require(not target.columns or len(target.classes or target.mean) == target.outputs, "target has no classes or mean")
        if self.kind == TEXT:
            _require(len(self.shape) == 1 and self.tokenizer.names == target.names, "tokenizer and tokens disagree")
        if self.kind == IMAGE:
            _require(len(self.shape) == 3 and self.shape[0] in (1, 3), f"shape {list(self.shape)} is not [1 or 3, H, W]")
            _statistics(self.mean, self.std, (self.shape[0],), "image")
            _require(not self.resized or self.shape[1] == self.shape[2] <= LARGEST_SIDE, "no size to resize to")
        if self.kind == TABLE:
            for column in self.columns:
                wide = {NUMBER: (1,), BOOLEAN: (1,), DATE: (WIDTH,), HASHED: (0,)}.get(column.kind)
                hashed = column.kind == HASHED
                _require((column.buckets > 0) == hashed, f"column {column.name!r}: buckets")
                _require(not (hashed and column.categories), f"column {column.name!r}: categories")
                if column.kind == CATEGORY:
                    wide = (1,) if len(column.categories) == 2 else (0,)
                _statistics(column.mean, column.std, wide, f"column {column.name!r}")
                _require(column.width > 0, f"column {column.name!r} gives no inputs")
            _require(self.shape == (sum(column.width for column in self.columns),), "shape and columns disagree")

    def _scale_and_shift(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`1 / (255 std)` and `-mean / std` of every pixel, each [K]; made once a device and dtype."""
        if (device, dtype) not in self._vectors:
            area = self.shape[1] * self.shape[2]
            mean, std = (torch.tensor(v, dtype=torch.float64).repeat_interleave(area) for v in (self.mean, self.std))
            self._vectors[device, dtype] = tuple(v.to(device, dtype) for v in (1 / (255 * std), -mean / std))
        return self._vectors[device, dtype]

    def _image_values(self, rows: Any) -> Any:
        """The images in raw rows, one by one."""
        if isinstance(rows, Mapping) or hasattr(rows, "columns") or (isinstance(rows, list) and _all_rows(rows)):
            return raw_column(rows, self.image, "the rows given")
        if isinstance(rows, (Tensor, np.ndarray)) and rows.ndim == 2 and rows.shape[1] == self.in_features:
            return rows.reshape(-1, *self.shape)
        if (isinstance(rows, (Tensor, np.ndarray)) and rows.ndim in (3, 4)) or isinstance(rows, (list, tuple)):
            return rows
        shape = f" of shape {list(rows.shape)}" if hasattr(rows, "shape") else ""
        raise InputError(f"the rows given are a {type(rows).__name__}{shape}; give rows, a list of images or an array [M, ...]")

    def _encode_tensors(self, rows: Any) -> Tensor:
        try:
            inputs = torch.as_tensor(rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"the rows given are a {type(rows).__name__}; this model takes a tensor [M, ...]") from error
        if tuple(inputs.shape[1:]) != self.shape:
            raise InputError(
                f"the rows given have shape {list(inputs.shape)}; this model takes [M, {', '.join(map(str, self.shape))}]"
            )
        return inputs if inputs.is_floating_point() else inputs.to(torch.float32)

    def _encode_texts(self, rows: Any) -> Tensor:
        """Token ids `[M, tokens]` of texts that have the same number of them."""
        texts = [rows] if isinstance(rows, str) else list(rows)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError("this model takes texts: a string, or a list of strings")
        ids = [self.tokenizer.encode(text, f"text {number}") for number, text in enumerate(texts)]
        lengths = {len(row) for row in ids}
        if len(lengths) > 1 or not 1 <= max(lengths) <= self.shape[0]:
            raise InputError(
                f"texts must have the same number of tokens, from 1 to the context {self.shape[0]}, got {sorted(lengths)}"
            )
        return torch.from_numpy(np.stack(ids))


def _all_rows(values: list) -> bool:
    """Whether these are dicts of columns, and not of one image each."""
    return all(isinstance(value, Mapping) and not {"bytes", "path"} >= set(value) for value in values)


def _column(column: Column) -> str:
    if column.kind == CATEGORY:
        return f"{column.name} ({listed(column.categories, 5)})"
    return column.name if column.kind == NUMBER else f"{column.name} ({column.kind})"


def _numbers(values: tuple[float, ...]) -> str:
    return listed([f"{value:.6g}" for value in values], 5)


def _words(value: object) -> str:
    return listed(value, 10) if isinstance(value, tuple) else str(value)


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object's lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def _as_lists(value: Any) -> Any:
    """Tuples as lists, as JSON would have them."""
    if isinstance(value, dict):
        return {k: _as_lists(v) for k, v in value.items()}
    return [_as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


# The JSON: `to_json` gives it, and `from_json` takes nothing else.
_STATISTICS, _STRINGS = Many(FINITE), Many(STRING)
_TARGET = Fields({"task": Word((CLASSIFICATION, REGRESSION, LANGUAGE_MODELING)), "columns": _STRINGS, "names": _STRINGS,
                  "classes": Many(Either((STRING, Whole(-(1 << 63), 1 << 63), FLAG))), "mean": _STATISTICS, "std": _STATISTICS,
                  "coded": FLAG})  # fmt: skip
_KINDS = Word((NUMBER, BOOLEAN, VECTOR, DATE, CATEGORY, HASHED))
_COLUMN = Fields({"name": STRING, "kind": _KINDS, "mean": _STATISTICS, "std": _STATISTICS, "categories": _STRINGS,
                  "coded": FLAG}, {"buckets": Whole(1, 1 << 16)})  # fmt: skip
_ALWAYS = {"format": Whole(FORMAT, FORMAT), "kind": Word((IMAGE, TABLE, TENSORS, TEXT)), "shape": Many(Whole(1), 1, 8),
           "target": _TARGET, "image": STRING, "mean": _STATISTICS, "std": _STATISTICS, "columns": Many(_COLUMN),
           "notes": _STRINGS}  # fmt: skip
_OF_TEXT = {"text": STRING, "tokenizer": TOKENIZER}
PREPROCESSING = Variant(
    "kind",
    {
        IMAGE: Fields(_ALWAYS, {"resized": FLAG}),
        TABLE: Fields(_ALWAYS),
        TENSORS: Fields(_ALWAYS),
        TEXT: Fields({**_ALWAYS, **_OF_TEXT}),
    },
)


def _statistics(mean: tuple, std: tuple, lengths: tuple[int, ...] | None, what: str) -> None:
    _require(len(mean) == len(std), f"{what}: mean and std differ in length")
    _require(lengths is None or len(mean) in lengths, f"{what}: {len(mean)} statistics")
    _require(all(s > 0 for s in std), f"{what}: a deviation is not positive")


def _require(right: bool, problem: str) -> None:
    if not right:
        raise InputError(f"stored preprocessing is broken: {problem}")
