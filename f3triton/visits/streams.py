"""Streams in windows: each sample is visited a number of times in a row, and in this pass never again.

A stream is read a buffer at a time, while the one before is trained on. A buffer is shuffled, then cut into windows. The order
is a function of seed, pass and place, so that a run can go on anywhere: the buffer that it is in is read again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..base.data import Visit
from ..base.exceptions import InputError
from ..base.seeds import derived_seed, sample_order
from ..base.text import short
from ..data import Dataset
from ..data.streams import StreamDataset, StreamReader
from .windows import WindowOrder, Windows


@dataclass
class Buffer:
    """Rows of a stream that are mixed with one another, in the order in which they came: number `number` of pass `pass_`."""

    pass_: int
    number: int
    inputs: Tensor  # [rows, K]
    targets: Tensor  # [rows] or [rows, C]
    order: Tensor  # [rows], in which they are cut into windows
    reader: StreamReader  # behind it
    begin: dict[str, Any]  # the reader's state in front of it

    @cached_property
    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.inputs, self.targets):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class StreamWindows:
    """A stream as the rows of one window, known by their places in it, 0 to size - 1, on `device`; whoever wants a visit's rows
    loads its window first. Their tensors stay where they are, so that a CUDA graph may read them."""

    def __init__(
        self, data: StreamDataset, windows: Windows, seed: int, device: torch.device, passes: int | None = None
    ) -> None:
        self.passes = passes  # after which nothing more is read ahead
        self.data, self.seed, self.device, self.positions = data, seed, device, data.positions
        self.size = min(windows.size, len(data))
        whole = data.shuffle_buffer >= len(data)
        self.windows = math.ceil(len(data) / self.size) if whole else data.shuffle_buffer // self.size  # in a buffer
        self.buffers = math.ceil(len(data) / (self.windows * self.size))  # in a pass
        inputs, targets = (t.new_zeros(self.size, *t.shape[1:], device=device) for t in (data.inputs, data.targets))
        self.rows = Dataset(data.name, inputs, targets, data.preprocessing)
        self.buffer: Buffer | None = None
        self.window: tuple[int, int] | None = None  # that is loaded
        self._pool = ThreadPoolExecutor(1, "f3triton-stream")
        self._next: Future[Buffer] | None = None
        self._restored: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.size

    def fetch(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.rows.fetch(index, dtype)

    def one_hot(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.rows.one_hot(index, dtype)

    def load(self, window: tuple[int, int]) -> None:
        """Hold the rows of a window (of pass, window). Raises InputError where the stream cannot be read, or ends before."""
        if window == self.window:
            return
        pass_, place = self.window = window
        number, within = divmod(place, self.windows)
        buffer = self.buffer = self._buffer(pass_, number)
        samples = buffer.order[within * self.size :][: self.size]  # [<= size]
        for kept, rows in ((self.rows.inputs, buffer.inputs), (self.rows.targets, buffer.targets)):
            kept[: len(samples)].copy_(rows.index_select(0, samples))

    def state(self) -> dict[str, Any] | None:
        """The place of the buffer that is in use, as JSON; for `restore`."""
        buffer = self.buffer
        return buffer and {"pass": buffer.pass_, "block": buffer.number, "reader": buffer.begin, "hash": buffer.digest}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from there when that buffer is next asked for, without reading all that came before it."""
        self._restored = state

    def close(self) -> None:
        """Stop reading, and let go of the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.buffer = self.window = self._next = None

    def _buffer(self, pass_: int, number: int) -> Buffer:
        """That buffer; the one after it is read meanwhile."""
        buffer = self.buffer
        if buffer is not None and (buffer.pass_, buffer.number) == (pass_, number):
            return buffer
        ahead, self._next = self._next, None
        buffer = ahead.result() if ahead is not None else None
        if buffer is None or (buffer.pass_, buffer.number) != (pass_, number):
            buffer = self._find(pass_, number)
        follows = divmod(pass_ * self.buffers + number + 1, self.buffers)
        if follows[0] != self.passes:
            self._next = self._pool.submit(self._read, *follows, buffer.reader if follows[1] else None)
        return buffer

    def _find(self, pass_: int, number: int) -> Buffer:
        """A buffer that is not the next one: from the place that was saved, if that is before it, or from the start."""
        saved, self._restored = self._restored, None
        rows = self.windows * self.size
        if saved is None or saved["pass"] != pass_ or saved["block"] > number:
            reader = self.data.reader()
            reader.skip(number * rows)
            return self._read(pass_, number, reader)
        try:
            reader = self.data.reader(saved["reader"])
            buffer = self._read(pass_, saved["block"], reader)
        except Exception as error:  # the library takes what it is given for its own
            reason = short(f"{type(error).__name__} {error}", 200)[1:-1]
            raise InputError(f"the checkpoint's place in the stream is not one ({reason})") from None
        if buffer.digest != saved["hash"]:
            raise InputError(
                f"the stream {self.data.name!r} does not hold the rows any more that it held from training row "
                f"{saved['block'] * rows:,} on when the checkpoint was made; resume with the same data"
            )
        if saved["block"] == number:
            return buffer
        reader.skip((number - saved["block"] - 1) * rows)
        return self._read(pass_, number, reader)

    def _read(self, pass_: int, number: int, reader: StreamReader | None) -> Buffer:
        reader = reader or self.data.reader()
        begin, first = reader.state(), number * self.windows * self.size
        rows = min(self.windows * self.size, len(self.data) - first)
        inputs, targets = self.data.read(reader, rows)
        # The first one's order is that of a data set which is loaded whole: a buffer that holds everything is one.
        order = sample_order(rows, derived_seed(self.seed, "block", number) if number else self.seed, pass_)
        return Buffer(pass_, number, inputs, targets, order, reader, begin)


def check_stream(data: StreamDataset, windows: Windows | None) -> None:
    """Raise InputError where a stream cannot be trained with these windows."""
    if windows is None:
        raise InputError("a stream's samples come once a pass, and are trained in windows; choose a window (--window auto)")
    if windows.together > 1:
        raise InputError("a stream holds one window at a time; window order 'turns' needs data that is loaded whole")
    if not windows.local:
        raise InputError("first visit 'stale' needs errors of the last pass, which a stream does not keep; use skip or target")
    if min(windows.size, len(data)) > data.shuffle_buffer:
        raise InputError(
            f"a window of {windows.size:,} samples does not fit into a shuffle buffer of {data.shuffle_buffer:,}; raise "
            "shuffle_buffer (--shuffle-buffer), or take a smaller window"
        )


class StreamOrder(WindowOrder):
    """The visits of a run in windows of a stream; samples are known by their places in a window."""

    def _visit(self, number: int, position: int, places: Tensor, teach: str, skip: int) -> Iterator[Visit]:
        for row in islice(places.to(self.device).split(self.batch_size), skip, None):
            yield Visit(row, row, teach, (number, position))
