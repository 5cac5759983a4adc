"""Numbers as people read them."""

from __future__ import annotations

import math


def readable_bytes(count: float) -> str:
    """`1536` as `1.5 KiB`."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
