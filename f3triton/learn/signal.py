"""What the error is: its source, the link between output and target, and the mask; and the methods that are choices of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..kernels.reference import LINKS, LOSSES, SOURCES

METHODS = ("f3", "drtp", "dfa", "sdfa", "fa", "bp", "last-layer")

# The signal that each method stands for; `bp` and `fa`, which go backward, have none, and `f3` takes any.
METHOD_SIGNALS = {
    "f3": "delayed-error",
    "drtp": "target",
    "dfa": "current-error",
    "sdfa": "current-error-sign",
    "fa": None,
    "bp": None,
    "last-layer": "none",
}


@dataclass(frozen=True)
class Signal:
    """What teaches the hidden layers. Three independent choices, each a word.

    - `source`: `delayed-error` (`y* - y` of the sample's last visit), `delayed-loss` (`-dL/dy` of the last visit), `target`
      (DRTP), `current-error` (DFA), `current-error-sign` (sDFA), `none` (only the last layer learns)
    - `link`: what the network's output goes through before the error is taken. `auto` is the one that belongs to the loss
      (sigmoid for `bce`, softmax for `cross-entropy`, identity for `mse`). The others go on top of the output as the loss
      sees it, a probability for `bce`, as in the authors' code: `identity` with `bce` is `auto`, `softmax` with `bce` is
      the softmax of the sigmoid.
    - `mask`: multiply the error by the one-hot target (the authors' `*_one_hot`)

    Raises InputError for unknown words.
    """

    source: str = "delayed-error"
    link: str = "auto"
    mask: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", check_word("signal", self.source, SOURCES))
        object.__setattr__(self, "link", check_word("link", self.link, LINKS))

    @property
    def delayed(self) -> bool:
        """Whether an error row is kept for each sample between its visits."""
        return self.source.startswith("delayed-")

    @property
    def current(self) -> bool:
        """Whether the hidden layers have to wait for the output (DFA, sDFA)."""
        return self.source.startswith("current-")


def resolve_signal(method: str, source: str | None, link: str = "auto", mask: bool = False) -> Signal | None:
    """The signal of a method; None for backpropagation and feedback alignment.

    `f3` takes any source; every other method has one of its own, and naming another is an InputError.
    """
    method = check_word("method", method, METHODS)
    own = METHOD_SIGNALS[method]
    if source is not None:
        source = check_word("signal", source, SOURCES)
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
