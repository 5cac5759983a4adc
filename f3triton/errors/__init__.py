"""Where the errors of the last visit are kept."""

from .memory import MemoryStore

__all__ = ["MemoryStore"]
