"""Numbers and values as people read them."""

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
