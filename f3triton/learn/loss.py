"""The losses of a network's last output, by torch's own functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mean_loss(a: Tensor, target: Tensor, loss: str) -> Tensor:
    """torch's own mean loss of the last stage's output `a [M, C]`, under autograd where that is on."""
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(a, target)
    if loss == "cross-entropy":
        return functional.cross_entropy(a, target)
    return functional.mse_loss(a, target)


@torch.no_grad()
def losses_by_sample(a: Tensor, target: Tensor, loss: str) -> Tensor:
    """The loss of each sample, `[M]`: its mean over samples is the training loss."""
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(a, target, reduction="none").mean(-1)
    if loss == "cross-entropy":
        return functional.cross_entropy(a, target, reduction="none")
    return (a - target).square().mean(-1)


@torch.no_grad()
def error_sizes(losses: Tensor, loss: str, outputs: int, positions: int = 1) -> Tensor:
    """How large the errors of samples are, `[samples]`, by the losses of their predictions, `[samples * positions]`.

    For classes it is one minus the probability that the network gives to the whole target (`cross-entropy`: half of the sum
    of the error's sizes, `bce`: for one output the error's), for values (`mse`) the root of the mean square. Of several
    positions it is the mean.
    """
    sizes = losses.sqrt() if loss == "mse" else -torch.expm1(-losses * (outputs if loss == "bce" else 1))
    return sizes if positions == 1 else sizes.view(-1, positions).mean(1)


def hits(a: Tensor, target: Tensor) -> Tensor:
    """Whether each row's largest output stands where its target's largest entry stands, `[M]`."""
    return a.argmax(-1) == target.argmax(-1)
