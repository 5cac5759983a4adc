"""What the error is: its source, the link between output and target, and the mask; and the methods that are choices of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..base.choices import check_word
from ..base.data import Visit
from ..base.exceptions import InputError
from ..base.words import METHODS, SIGNALS
from ..error_store.store import ErrorStore
from ..kernels.words import LINKS, LOSSES

# The signal that each method stands for; `bp` and `fa`, which go backward, have none, and `f3` takes any.
METHOD_SIGNALS = {
    "f3": "delayed-error",
    "drtp": "target",
    "dfa": "current-error",
    "sdfa": "current-error-sign",
    "local": "local-error",
    "fa": None,
    "bp": None,
    "last-layer": "none",
}


@dataclass(frozen=True)
class Signal:
    """What teaches the hidden stages: independent choices, each a word, and when the row that each sample needs is known.

    - `source`: `delayed-error` (`y* - y` of the sample's last visit), `delayed-loss` (`-dL/dy` of the last visit), `target`
      (DRTP), `current-error` (DFA), `current-error-sign` (sDFA), `local-error` (a reading of each stage's own output: see
      `local`), `none` (only the last stage learns)
    - `link`: what the network's output goes through before the error is taken. `auto` is the one that belongs to the loss
      (sigmoid for `bce`, softmax for `cross-entropy`, identity for `mse`). The others go on top of the output as the loss
      sees it, a probability for `bce`, as in the authors' code: `identity` with `bce` is `auto`, `softmax` with `bce` is
      the softmax of the sigmoid.
    - `mask`: multiply the error by the one-hot target (the authors' `*_one_hot`)
    - `projection`: `[C, rank]`, see `feedback.error_projection`: what is kept of an error is its product with it. Without one
      an error is kept whole, its mask is left for when it teaches, and R, the width of a row, is C

    Raises InputError for unknown words.
    """

    source: str = "delayed-error"
    link: str = "auto"
    mask: bool = False
    projection: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", check_word("signal", self.source, SIGNALS))
        object.__setattr__(self, "link", check_word("link", self.link, LINKS))

    @property
    def delayed(self) -> bool:
        """Whether an error row is kept for each sample between its visits."""
        return self.source.startswith("delayed-")

    @property
    def current(self) -> bool:
        """Whether the hidden stages have to wait for the output (DFA, sDFA)."""
        return self.source.startswith("current-")

    @property
    def local(self) -> bool:
        """Whether each hidden stage has an error of its own, known at the stage itself."""
        return self.source == "local-error"

    @property
    def through_feedback(self) -> bool:
        """Whether errors reach hidden stages through feedback matrices."""
        return self.source not in ("none", "local-error")

    def before(self, visit: Visit, target: Tensor, store: ErrorStore | None) -> Tensor | None:
        """The rows `[M, R]` that teach in a visit with `target [M, C]`, where they are known before it; else None."""
        if visit.teach == "nothing" or not (self.delayed or self.source == "target"):
            return None
        if self.delayed and visit.teach == "signal":
            row = store.read(visit.row)
        else:
            row = self.kept(target, target)
            if self.delayed:
                row = store.as_kept(visit.row, row, target)
        return self.taught(row, target)

    def after(self, visit: Visit, left: Tensor | None, target: Tensor, store: ErrorStore | None) -> None:
        """Keep the rows `left [M, R]` of a visit's samples for their next one."""
        if store is not None:
            store.write(visit.row, left, target)

    def kept(self, error: Tensor, target: Tensor) -> Tensor:
        """What is kept `[M, R]` of `error [M, C]`."""
        if self.projection is None:
            return error
        return (error * target if self.mask else error) @ self.projection

    def taught(self, row: Tensor, target: Tensor) -> Tensor:
        """What teaches `[M, R]` of kept rows `[M, R]`."""
        return row * target if self.mask and self.projection is None else row


def resolve_signal(method: str, source: str | None, link: str = "auto", mask: bool = False) -> Signal | None:
    """The signal of a method; None for backpropagation and feedback alignment.

    `f3` takes any source; every other method has one of its own, and naming another is an InputError.
    """
    method = check_word("method", method, METHODS)
    own = METHOD_SIGNALS[method]
    if source is not None:
        source = check_word("signal", source, SIGNALS)
        if method != "f3" and source != own:
            has = "no signal (its error goes backward)" if own is None else f"the signal {own!r}"
            raise InputError(f"method {method!r} has {has}, got signal {source!r}; use method 'f3' to choose the signal")
    if own is None:
        return None
    return Signal(source or own, link, mask)


def resolve_loss(loss: str, task: str) -> str:
    """`auto` is `bce` for classification, as in the authors' experiments, `cross-entropy` for text, `mse` for regression.

    Raises InputError for an unknown loss, or one that does not belong to the task.
    """
    loss = check_word("loss", loss, ("auto", *LOSSES))
    if task == "language-modeling":
        if loss not in ("auto", "cross-entropy"):
            raise InputError(f"loss {loss!r} does not go with language-modeling; allowed: cross-entropy, auto")
        return "cross-entropy"
    if loss == "auto":
        return "bce" if task == "classification" else "mse"
    if task == "regression" and loss != "mse":
        raise InputError(f"loss {loss!r} needs classes, but the task is regression; allowed: mse, auto")
    return loss
