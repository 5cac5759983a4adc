"""Readings of hidden stages that do not look at everything: some positions, and some of the classes.

For a vocabulary of tens of thousands reading a stage costs more than the stage. Only what teaches hidden stages is narrowed:
the network's own output, and what it learns from, are whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.exceptions import InputError
from ..base.precision import autocast
from ..base.seeds import derived_seed
from ..network.block import Block
from ..network.linear import Linear
from ..network.stage import Stage
from ..network.updater import Step


class Narrow:
    """What a reading looks at: a share of the `positions`, without replacement, all of them by default; and with `candidates`
    so many classes, drawn evenly and shared by all positions, beside each one's target.

    Drawn anew for each step and stage, from the seed. The loss is the mean over the positions that are read, so its expectation
    is the whole mean. Of candidates the others' part in the softmax is weighted by (C - 1) / how many of them are not the
    target: the sum of exponentials has the whole one as its expectation (its logarithm, and so the gradient, is biased, by less
    the more candidates there are; Bengio and Senecal 2008, Jean et al., arXiv 1412.2007).
    """

    def __init__(self, positions: float = 1.0, candidates: int | None = None, seed: int = 0) -> None:
        self.share, self.candidates, self.seed = positions, candidates, seed

    @property
    def all(self) -> bool:
        """Whether it looks at everything."""
        return self.share == 1 and self.candidates is None

    def draw(self, rows: int, classes: int, device: torch.device, *place: object) -> tuple[Tensor, Tensor | None]:
        """`(which [P] of the rows, which [K] of the classes or None)`, at the `place` of a step and a stage."""
        generator = torch.Generator(device).manual_seed(derived_seed(self.seed, "reading", *place))
        which = torch.arange(rows, device=device)
        if self.share < 1:
            count = max(1, round(self.share * rows))
            which = torch.randperm(rows, generator=generator, device=device)[:count].sort().values
        if self.candidates is None:
            return which, None
        return which, torch.randperm(classes, generator=generator, device=device)[: self.candidates]


class Ending:
    """The end of a network as a reader that does not change: parts up to a last linear layer, of which some outputs suffice.

    `stage` is a `Linear`, or a `Block` of an `nn.Sequential` that ends with a linear layer. Raises InputError for others.
    """

    def __init__(self, stage: Stage) -> None:
        parts = list(stage.module) if isinstance(stage, Block) and isinstance(stage.module, nn.Sequential) else [stage]
        self.front, self.layer = parts[:-1], parts[-1]
        plain = isinstance(self.layer, nn.Linear) or (isinstance(self.layer, Linear) and self.layer.activation == "identity")
        if not plain:
            raise InputError(
                "readings of some positions or candidates need a last stage that ends with a linear layer, got "
                f"{type(self.layer).__name__}"
            )

    def gradient(self, h: Tensor, target: Tensor, chosen: Tensor | None, loss: str, step: Step) -> Tensor:
        """The gradient at `h [P, N]` of the mean loss against `target [P, C]` of the classes, or of the `chosen [K]`."""
        with torch.enable_grad(), autocast(h.device, step.compute_dtype):
            h = h.detach().requires_grad_()
            n = h
            for part in self.front:
                n = part(n)
            if chosen is None:
                z = functional.linear(n, self.layer.weight.detach(), _detached(self.layer.bias)).to(target.dtype)
            else:
                z = self._scores(n, target.argmax(-1), chosen, target.shape[-1])
        if chosen is None:
            return torch.autograd.grad(z, h, step.ops.output_step(z.detach(), target, loss, "none")[0])[0]
        with torch.enable_grad():
            total = (torch.logsumexp(z, -1) - z[:, 0]).mean()
        return torch.autograd.grad(total, h)[0]

    def _scores(self, n: Tensor, wanted: Tensor, chosen: Tensor, classes: int) -> Tensor:
        """`[P, 1 + K]`: that of each one's target, and those of the chosen, raised by the logarithm of what they stand for."""
        weight, bias = self.layer.weight.detach(), _detached(self.layer.bias)
        own = (n * weight[wanted].to(n.dtype)).sum(-1, keepdim=True)
        others = functional.linear(n, weight[chosen].to(n.dtype))
        if bias is not None:
            own, others = own + bias[wanted][:, None].to(n.dtype), others + bias[chosen].to(n.dtype)
        same = chosen == wanted[:, None]  # [P, K]
        stands_for = (classes - 1) / (len(chosen) - same.sum(-1, keepdim=True)).clamp_min(1).to(torch.float64)
        others = others.float() if n.dtype in (torch.float16, torch.bfloat16) else others
        others = others + stands_for.log().to(others.dtype)
        return torch.cat([own.to(others.dtype), others.masked_fill(same, -math.inf)], -1)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
