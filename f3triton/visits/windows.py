"""Windows: the samples of a pass in parts, each visited several times in a row, so that a stored error is never old.

Most of what F3 loses to a current error (DFA) is the staleness of the delayed one: with one visit an epoch, every weight has
been updated thousands of times since it was left. In a window of N samples visited K times, an error is at most N samples
old. A pass over the data set is then K epochs long: epochs, steps and schedules count sample visits, as without windows.

Two windows can be visited in turn, A B A B: then no batch follows another within so few steps that the errors it left are still
on their way through a pipeline, and an error is up to 2 N samples old.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..base.choices import check_word
from ..base.data import Visit
from ..base.exceptions import InputError
from ..base.seeds import derived_seed, sample_order
from ..base.text import typed
from ..base.words import AUTO_BATCHES, DEFAULT_VISITS, FIRST_VISITS, ORDERS
from .order import Order

TEACHES = {"skip": "nothing", "target": "target", "stale": "signal"}  # a window's first visit: see `Visit`


@dataclass(frozen=True)
class Windows:
    """`size` samples visited `visits` times in a row, in a new order each time.

    On a window's first visit the hidden layers are not updated (`first_visit` skip), learn from the target, or from the
    error of the last pass (stale). Only the last needs a row of the error store for every sample of the data set, and not
    for those of one window. `order`: `one` after the other, or two at a time, in `turns`.
    """

    size: int
    visits: int = DEFAULT_VISITS
    first_visit: str = "skip"
    order: str = "one"

    @property
    def together(self) -> int:
        """How many windows are visited in turn."""
        return 2 if self.order == "turns" else 1

    def rows(self, samples: int) -> int:
        """How many of so many samples have a row in the error store at a time."""
        return min(self.together * self.size, samples) if self.local else samples

    @property
    def local(self) -> bool:
        """Whether the error store holds the rows of one window only."""
        return self.first_visit != "stale"

    def __str__(self) -> str:
        turns = ", two in turn" * (self.together > 1)
        return f"windows of {self.size} visited {self.visits} times{turns}, first visit {self.first_visit}"


def resolve_windows(
    window: int | str,
    visits: int | None,
    first_visit: str | None,
    batch_size: int,
    delayed: bool,
    order: str | None = None,
) -> Windows | None:
    """The windows of these settings, None where `window` is off; `auto` is 10 batches.

    Raises InputError for values out of range, and for settings that would have no effect.
    """
    if window == "off":
        for name, value in (("visits", visits), ("first visit", first_visit), ("window order", order)):
            if value is not None:
                raise InputError(f"{name} {value!r} has no effect without windows; choose a window, or leave it out")
        return None
    if isinstance(window, str):
        check_word("window", window, ("auto", "off"), "or a number of samples")
        window = AUTO_BATCHES * batch_size
    if not isinstance(window, int) or window < batch_size:
        raise InputError(
            f"window must be a whole number of at least the batch size {batch_size}, auto or off, got {typed(window)}"
        )
    visits = DEFAULT_VISITS if visits is None else visits
    if not isinstance(visits, int) or visits < 2:
        raise InputError(f"visits must be a whole number of at least 2, got {typed(visits)}")
    if first_visit is not None and not delayed:
        raise InputError(f"first visit {first_visit!r} has no effect where no error is kept between visits; leave it out")
    order = check_word("window order", order or "one", ORDERS)
    return Windows(window, visits, check_word("first visit", first_visit or "skip", FIRST_VISITS), order)


def check_epochs(epochs: int, windows: Windows | None) -> None:
    """Raise InputError where the epochs are no whole number of passes: some samples would have fewer visits than others."""
    if not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"epochs must be a whole number of at least 1, got {typed(epochs)}")
    if windows is not None and epochs % windows.visits:
        raise InputError(
            f"epochs count sample visits, and in a pass over the data set every sample has {windows.visits}; "
            f"epochs must be a multiple of {windows.visits}, got {epochs}"
        )


def steps_per_epoch(samples: int, batch_size: int, windows: Windows | None) -> int:
    """Steps in which as many samples are visited as the data set has."""
    if windows is None:
        return math.ceil(samples / batch_size)
    full, rest = divmod(samples, windows.size)
    return full * math.ceil(windows.size / batch_size) + math.ceil(rest / batch_size)


class WindowOrder(Order):
    """The visits of a run in windows.

    A pass of `visits` epochs goes through a new permutation of the data set; every epoch has the same number of steps,
    wherever in a window it ends. `delayed`: whether the signal is an error that an earlier visit left, which a window's first
    visit has not. Sample indices are on `device`.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        windows: Windows,
        seed: int,
        delayed: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        self.samples, self.batch_size, self.windows, self.seed, self.device = samples, batch_size, windows, seed, device
        self.first = TEACHES[windows.first_visit] if delayed else "signal"
        self.steps_per_epoch = steps_per_epoch(samples, batch_size, windows)
        self._order: tuple[int, Tensor] | None = None  # of a pass

    def visits(self, epoch: int, skip: int = 0) -> Iterator[Visit]:
        """An epoch's visits after the first `skip`; rows of errors are places in a window, if it keeps its own (`local`)."""
        number, part = divmod(epoch, self.windows.visits)
        from_there = self._pass(number, part * self.steps_per_epoch + skip)
        return islice(from_there, self.steps_per_epoch - skip)

    def _pass(self, number: int, skip: int) -> Iterator[Visit]:
        """The visits of pass `number` after the first `skip`."""
        windows = self.windows
        count = math.ceil(self.samples / windows.size)
        for first in range(0, count, windows.together):
            positions = range(first, min(first + windows.together, count))
            lengths = [min(windows.size, self.samples - position * windows.size) for position in positions]
            steps = [math.ceil(length / self.batch_size) for length in lengths]
            if skip >= sum(steps) * windows.visits:
                skip -= sum(steps) * windows.visits
                continue
            for visit, which in itertools.product(range(windows.visits), range(len(positions))):
                if skip >= steps[which]:
                    skip -= steps[which]
                    continue
                seed = derived_seed(self.seed, "visit", number, positions[which], visit)
                places = torch.randperm(lengths[which], generator=torch.Generator().manual_seed(seed))  # in the window
                teach = self.first if visit == 0 else "signal"
                yield from self._visit(number, positions[which], places, teach, skip)
                skip = 0

    def _visit(self, number: int, position: int, places: Tensor, teach: str, skip: int) -> Iterator[Visit]:
        """One visit of every sample of a window of pass `number`, in the order of their `places`."""
        if self._order is None or self._order[0] != number:
            self._order = number, sample_order(self.samples, self.seed, number)
        samples = self._order[1][position * self.windows.size :][: len(places)]
        index = samples[places].to(self.device)
        own = position % self.windows.together * self.windows.size  # the first of the window's rows
        rows = (own + places).to(self.device) if self.windows.local else index
        for batch, row in islice(zip(index.split(self.batch_size), rows.split(self.batch_size), strict=True), skip, None):
            yield Visit(batch, row, teach)
