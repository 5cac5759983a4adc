"""What a stage inside another stage's module does when it is called: nothing special, unless it was given a mode.

`Block` and `Layers` run a module of somebody else's making, and the `Linear`s and norms in it have to learn on the way, with no
word about it in the module's own `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from .stage import Stage


class Mode:
    """How a stage runs when it is called inside a module."""

    def run(self, stage: Stage, x: Tensor) -> Tensor:
        """The output of `stage` for `x [..., features]`."""
        raise NotImplementedError

    def run_linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The output of one of torch's own linear layers."""
        return nn.Linear.forward(layer, x)


@contextmanager
def active(mode: Mode, module: nn.Module) -> Iterator[None]:
    """Give `mode` to every stage and every `nn.Linear` in `module`, and take it away again.

    It stands at the layer and not in a variable of the thread, because autograd runs activation checkpoints in its own threads.
    """
    before = [(part, part.mode) for part in module.modules() if hasattr(part, "mode")]
    linears = [part for part in module.modules() if type(part) is nn.Linear and "forward" not in vars(part)]
    for stage, _ in before:
        stage.mode = mode
    for layer in linears:
        layer.forward = partial(mode.run_linear, layer)
    try:
        yield
    finally:
        for stage, its in before:
            stage.mode = its
        for layer in linears:
            del layer.forward
