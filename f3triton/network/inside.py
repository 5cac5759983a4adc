"""What a stage inside another stage's module does when it is called: nothing special, unless it was told how.

`Block` and `Layers` run a module of somebody else's making, and the `Linear`s and norms in it have to learn on the way, with no
word about it in the module's own `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn


class Inside:
    """How the parts of a module run while it is a part of a stage that learns."""

    def run(self, part: Part, x: Tensor) -> Tensor:
        """The output of a part for `x [..., features]`."""
        raise NotImplementedError

    def run_linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The output of one of torch's own linear layers."""
        return nn.Linear.forward(layer, x)


class Part(nn.Module):
    """A module whose `forward` is its `compute`, unless it was told otherwise by an `Inside`."""

    inside: Inside | None = None  # set while it is a part of a stage that learns

    def compute(self, x: Tensor) -> Tensor:
        """The output for `x [M, ...]`, and nothing else."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x) if self.inside is None else self.inside.run(self, x)


@contextmanager
def active(inside: Inside, module: nn.Module) -> Iterator[None]:
    """Tell every `Part` and every `nn.Linear` in `module` how to run, and take it back again.

    It stands at the part and not in a variable of the thread, because autograd runs activation checkpoints in its own threads.
    """
    before = [(part, part.inside) for part in module.modules() if isinstance(part, Part)]
    linears = [part for part in module.modules() if type(part) is nn.Linear and "forward" not in vars(part)]
    for part, _ in before:
        part.inside = inside
    for layer in linears:
        layer.forward = partial(inside.run_linear, layer)
    try:
        yield
    finally:
        for part, its in before:
            part.inside = its
        for layer in linears:
            del layer.forward
