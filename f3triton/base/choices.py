"""A choice is a word: the same in the command line, Python, JSON and the documentation, and checked where it is read."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from .exceptions import InputError


def check_word(thing: str, word: object, allowed: Iterable[str], also: str = "") -> str:
    """`word`, if it is one of `allowed`; underscores may stand for hyphens. Raises InputError that lists what is allowed."""
    allowed = tuple(allowed)
    if isinstance(word, str):
        if word in allowed:
            return word
        if word.replace("_", "-") in allowed:
            return word.replace("_", "-")
    raise InputError(f"{thing} {word!r} is unknown; allowed: {', '.join(allowed)}{' ' + also if also else ''}")


def plain(value: object) -> object:
    """A number of NumPy's as Python's, which JSON can hold; anything else as it is."""
    numpy = sys.modules.get("numpy")  # where nothing has imported it, nothing is NumPy's
    return value.item() if numpy is not None and isinstance(value, numpy.number) else value
