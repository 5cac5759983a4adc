"""This folder is imported as `f3triton.kernels`: F3's operations as pure functions on tensors.

It needs torch, and triton where the Triton backend is asked for; it imports nothing of the rest of f3triton.
"""

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
