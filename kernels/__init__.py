"""This folder is imported as `f3triton.kernels`: F3's operations as pure functions on tensors.

It needs torch, and triton where the Triton backend is asked for; it imports nothing of the rest of f3triton. Names are imported
when they are first asked for (PEP 562), so that its `words` are known without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import dispatch, eager, library, reference
    from .generated import GeneratedFeedback
    from .rules import SGD, Adam, AdamW, Rule, State, Update, new_state

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "GeneratedFeedback",
    "Rule",
    "State",
    "Update",
    "dispatch",
    "eager",
    "library",
    "new_state",
    "reference",
]


def __getattr__(name: str) -> object:
    if name in ("dispatch", "eager", "library", "reference"):
        return import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(import_module(".generated" if name == "GeneratedFeedback" else ".rules", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
