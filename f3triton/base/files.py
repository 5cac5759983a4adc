"""The one reader of files that somebody else may have made: what they are and how large is known before a byte is read."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

from .exceptions import InputError
from .memory import available_memory
from .text import readable_bytes, short

LARGEST_JSON = 1 << 28  # bytes; a tokenizer's definition, or the records of a very long run, have a few million
LARGEST_HEADER = 1 << 24  # bytes, of safetensors: some hundred for each tensor
SPARSE_FROM = 1 << 28  # bytes: larger files must be on disk, not only in name
LARGEST_COUNT = 1 << 22  # values in it, which take some hundred bytes each


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file that is one: no link, no folder, no pipe, no device. Raises InputError."""
    extra = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # not every system has all of them
    try:
        descriptor = os.open(path, flags | sum(getattr(os, name, 0) for name in extra))
    except (OSError, ValueError) as error:
        link = getattr(error, "errno", None) in (errno.ELOOP, errno.EMLINK)
        reason = "it is a link" if link else getattr(error, "strerror", None) or error
        raise InputError(f"cannot open {str(path)!r}: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{str(path)!r} is not a regular file")
    return descriptor


def check_written(descriptor: int, path: str | Path) -> int:
    """Bytes of an open file. Raises InputError for a large one of which next to nothing was ever written."""
    found = os.fstat(descriptor)
    there = getattr(found, "st_blocks", found.st_size) * 512
    if found.st_size > SPARSE_FROM and found.st_size > 100 * there:
        raise InputError(f"{str(path)!r} has {found.st_size:,} bytes, of which only {there:,} were ever written")
    return found.st_size


def check_tensors(path: str | Path) -> int:
    """Bytes of a regular file that may be one of safetensors. Raises InputError for anything else, for a header that is too
    large, and where there is no memory for it."""
    with open(open_regular(path), "rb") as file:
        size, free = check_written(file.fileno(), path), available_memory()
        if size > free:
            raise InputError(f"{str(path)!r} has {size:,} bytes, and {readable_bytes(free)} of memory are free")
        header = int.from_bytes(file.read(8), "little")
    if header > LARGEST_HEADER:
        raise InputError(f"{str(path)!r} has a header of {header:,} bytes; allowed are {LARGEST_HEADER:,}")
    return size


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises InputError for anything else."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise InputError(f"{str(path)!r} has {size:,} bytes; allowed are {most:,}")
        try:
            return file.read(most)
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error


def read_object(path: str | Path, most: int = LARGEST_JSON, nan: bool = False) -> dict:
    """The JSON object in a regular file, see `parse_object`. Raises InputError for anything else."""
    return parse_object(read_bytes(path, most), path, nan)


def parse_object(text: bytes, path: str | Path, nan: bool = False) -> dict:
    """A JSON object in UTF-8: no name twice in it, and no NaN or infinity unless `nan`.

    Raises InputError, which names the file `path`, for anything else.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError("a name comes twice")
        return names

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed")

    try:
        if sum(text.count(mark) for mark in (b",", b"[", b"{")) > LARGEST_COUNT:
            raise ValueError(f"it has more than {LARGEST_COUNT:,} values")
        content = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=None if nan else refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} holds no valid JSON: {short(' '.join(str(error).split()))}") from None
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds no JSON object")
    return content
