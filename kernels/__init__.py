"""F3's operations as pure functions on tensors; needs torch, and triton where the Triton backend is asked for."""

from . import dispatch, eager, reference
from .generated import GeneratedFeedback
from .rules import SGD, Adam, AdamW, Moments, Rule, new_moments

__all__ = ["SGD", "Adam", "AdamW", "GeneratedFeedback", "Moments", "Rule", "dispatch", "eager", "new_moments", "reference"]
