"""Where the errors of the last visit are kept."""

from .codecs import ERROR_DTYPES, Codec, make_codec
from .disk.file import FileStore
from .disk.folder import remove_store
from .homes import HOMES, check_home, is_folder, make_store, pick_home
from .memory import MemoryStore
from .store import ErrorStore, Rows

__all__ = [
    "ERROR_DTYPES", "HOMES", "Codec", "ErrorStore", "FileStore", "MemoryStore", "Rows", "check_home", "is_folder",
    "make_codec", "make_store", "pick_home", "remove_store",
]  # fmt: skip
