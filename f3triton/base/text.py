"""Numbers, names and values as people read them."""

from __future__ import annotations

import math


def readable_bytes(count: float) -> str:
    """`1536` as `1.5 KiB`."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), 5)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power - 1]}"


def short(value: object, most: int = 60) -> str:
    """A value as text for a message: printable, and not long."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def typed(value: object) -> str:
    """A value with its type, for where 2.0 is asked to be 2."""
    return f"{value!r} ({type(value).__name__})"


def printable(text: str, most: int = 1000) -> str:
    """A line that a terminal shows as it is: what else a name may hold (escapes, line breaks, halves of characters) as Python
    spells it; of a longer line the beginning and the end."""
    text = "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[: most - most // 8]} ... {text[5 - most // 8 :]}"
