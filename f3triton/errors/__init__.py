"""Where the errors of the last visit are kept."""

from .codecs import ERROR_DTYPES, Codec, make_codec
from .homes import HOMES, make_store, pick_home
from .memory import MemoryStore
from .store import ErrorStore, Rows

__all__ = ["ERROR_DTYPES", "HOMES", "Codec", "ErrorStore", "MemoryStore", "Rows", "make_codec", "make_store", "pick_home"]
