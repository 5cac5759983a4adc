"""Models: thin compositions of stages."""

from .mlp import MLP

__all__ = ["MLP"]
