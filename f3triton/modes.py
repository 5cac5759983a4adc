"""What a stage inside another stage's module does when it is called: nothing special, unless a mode is active.

`Block` and `Layers` run a module of somebody else's making, and the `Linear`s and `LayerNorm`s in it have to learn on the way,
with no word about it in the module's own `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .layers import Stage


class Mode:
    """How a stage runs when it is called inside a module."""

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        """The output of `stage` for `x [..., features]`."""
        raise NotImplementedError


_active: list[Mode] = []


@contextmanager
def active(mode: Mode) -> Iterator[None]:
    """Make `mode` the one that stages run in."""
    _active.append(mode)
    try:
        yield
    finally:
        _active.pop()


def current() -> Mode | None:
    """The mode that stages run in, if there is one."""
    return _active[-1] if _active else None
