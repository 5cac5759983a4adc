"""Windows: the samples of a pass in parts, each visited several times in a row, so that a stored error is never old.

Most of what F3 loses to a current error (DFA) is the staleness of the delayed one: with one visit an epoch, every weight has
been updated thousands of times since it was left. In a window of N samples visited K times, an error is at most N samples
old. A pass over the data set is then K epochs long: epochs, steps and schedules count sample visits, as without windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..base.choices import check_word
from ..base.data import Data
from ..base.exceptions import InputError
from ..base.seeds import derived_seed, sample_order
from ..learn.step import F3Learner

FIRST_VISITS = ("skip", "target", "stale")
DEFAULT_VISITS = 5
AUTO_BATCHES = 10  # a window's size in batches, for `auto`


@dataclass(frozen=True)
class Windows:
    """`size` samples visited `visits` times in a row, in a new order each time.

    On a window's first visit the hidden layers are not updated (`first_visit` skip), learn from the target, or from the
    error of the last pass (stale). Only the last needs a row of the error store for every sample of the data set, and not
    for those of one window.
    """

    size: int
    visits: int = DEFAULT_VISITS
    first_visit: str = "skip"

    @property
    def local(self) -> bool:
        """Whether the error store holds the rows of one window only."""
        return self.first_visit != "stale"

    def __str__(self) -> str:
        return f"windows of {self.size} visited {self.visits} times, first visit {self.first_visit}"


def resolve_windows(
    window: int | str, visits: int | None, first_visit: str | None, batch_size: int, delayed: bool
) -> Windows | None:
    """The windows of these settings, None where `window` is off; `auto` is 10 batches.

    Raises InputError for values out of range, and for settings that would have no effect.
    """
    if window == "off":
        for name, value in (("visits", visits), ("first visit", first_visit)):
            if value is not None:
                raise InputError(f"{name} {value!r} has no effect without windows; choose a window, or leave it out")
        return None
    if isinstance(window, str):
        check_word("window", window, ("auto", "off"), "or a number of samples")
        window = AUTO_BATCHES * batch_size
    if not isinstance(window, int) or window < batch_size:
        raise InputError(f"window must be a whole number of at least the batch size {batch_size}, auto or off, got {window!r}")
    visits = DEFAULT_VISITS if visits is None else visits
    if not isinstance(visits, int) or visits < 2:
        raise InputError(f"visits must be a whole number of at least 2, got {visits!r}")
    if first_visit is not None and not delayed:
        raise InputError(f"first visit {first_visit!r} has no effect where no error is kept between visits; leave it out")
    return Windows(window, visits, check_word("first visit", first_visit or "skip", FIRST_VISITS))


def check_epochs(epochs: int, windows: Windows | None) -> None:
    """Raise InputError where the epochs are no whole number of passes: some samples would have fewer visits than others."""
    if not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"epochs must be a whole number of at least 1, got {epochs!r}")
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


class WindowView:
    """The samples of one window, known by their places in it, 0 to size - 1."""

    def __init__(self, data: Data, size: int) -> None:
        self.data, self.device, self.positions = data, data.device, data.positions
        self.order = torch.arange(size, device=data.device)  # [size] sample indices in `data`

    def __len__(self) -> int:
        return len(self.order)

    def fetch(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.data.fetch(self.order.index_select(0, index), dtype)

    def one_hot(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.data.one_hot(self.order.index_select(0, index), dtype)

    def enter(self, samples: Tensor) -> None:
        """Show the window of these sample indices, `[<= size]`."""
        self.order[: len(samples)].copy_(samples)


class WindowOrder:
    """The batches of a run in windows. All of it follows from the seed and the place in the run.

    A pass of `visits` epochs goes through a new permutation of the data set; every epoch has the same number of steps,
    wherever in a window it ends.
    """

    def __init__(self, samples: int, batch_size: int, windows: Windows, seed: int, device: str | torch.device = "cpu") -> None:
        self.samples, self.batch_size, self.windows, self.seed, self.device = samples, batch_size, windows, seed, device
        self.steps_per_epoch = steps_per_epoch(samples, batch_size, windows)
        self._order: tuple[int, Tensor] | None = None  # of a pass

    def batches(self, epoch: int, learner: object, view: WindowView | None, skip: int = 0) -> Iterator[Tensor]:
        """An epoch's batches `[batch]` after the first `skip`, as sample indices, or as places in `view`.

        An F3 learner is told when a window begins, and on which visits its hidden layers learn.
        """
        number, part = divmod(epoch, self.windows.visits)
        from_there = self._pass(number, learner, view, part * self.steps_per_epoch + skip)
        return islice(from_there, self.steps_per_epoch - skip)

    def _pass(self, number: int, learner: object, view: WindowView | None, skip: int) -> Iterator[Tensor]:
        windows = self.windows
        for position in range(math.ceil(self.samples / windows.size)):
            length = min(windows.size, self.samples - position * windows.size)
            steps = math.ceil(length / self.batch_size)
            if skip >= steps * windows.visits:
                skip -= steps * windows.visits
                continue
            samples = self._enter(number, position, length, view)
            for visit in range(windows.visits):
                if skip >= steps:
                    skip -= steps
                    continue
                if isinstance(learner, F3Learner):
                    self._begin(learner, visit, length, fresh=skip == 0)
                seed = derived_seed(self.seed, "visit", number, position, visit)
                places = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
                index = (samples[places] if view is None else places).to(self.device)
                yield from index.split(self.batch_size)[skip:]
                skip = 0

    def _enter(self, number: int, position: int, length: int, view: WindowView | None) -> Tensor:
        """The sample indices `[length]` of a window of pass `number`, which the view is shown."""
        if self._order is None or self._order[0] != number:
            self._order = number, sample_order(self.samples, self.seed, number)
        samples = self._order[1][position * self.windows.size :][:length]
        if view is not None:
            view.enter(samples)
        return samples

    def _begin(self, learner: F3Learner, visit: int, samples: int, fresh: bool) -> None:
        delayed = learner.store is not None
        learner.hidden_learn = not (delayed and visit == 0 and self.windows.first_visit == "skip")
        if delayed and visit == 0 and fresh and self.windows.first_visit == "target":
            places = torch.arange(samples, device=learner.data.device)
            targets = learner.data.one_hot(places, learner.dtype)
            targets = targets.to(learner.device)
            learner.store.write(places.to(learner.device), learner.reduce(targets, targets))
