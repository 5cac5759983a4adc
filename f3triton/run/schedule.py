"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..base.choices import check_word
from ..base.exceptions import InputError

SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(name: str, lr: float, total_steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """`lr_at(step)`, steps counted from 1: a linear rise over `warmup_steps`, then constant, or down to zero at the end.

    Raises InputError for an unknown word or a warmup that is negative or longer than the run.
    """
    name = check_word("lr schedule", name, SCHEDULES)
    if not 0 <= warmup_steps <= total_steps:
        raise InputError(f"warmup steps must be between 0 and the run's {total_steps} steps, got {warmup_steps}")

    def lr_at(step: int) -> float:
        if step <= warmup_steps:
            return lr * step / warmup_steps
        if name == "constant":
            return lr
        done = min((step - 1 - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)  # batches of one's own may be more
        return lr * (0.5 * (1 + math.cos(math.pi * done)) if name == "cosine" else 1 - done)

    return lr_at
