"""Every operation in a few lines of plain PyTorch: the specification that the fast paths are tested against.

Shapes throughout: batch `M`, inputs `K`, outputs `N` of a layer, error width `C` (classes or targets). Nothing here
enters autograd, nothing is in a hurry, and everything works in float64. The mathematics is that of F3 (arXiv
2304.13372): the error that reaches a hidden layer is `e B`, with `B [C, N]` fixed and random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .generated import GeneratedFeedback
from .rounding import BIAS_SEED, round_stochastic
from .rules import SGD, Moments, Rule

ACTIVATIONS = ("identity", "tanh", "sigmoid", "relu", "gelu", "gelu-tanh", "silu")
LOSSES = ("bce", "cross-entropy", "mse")
LINKS = ("auto", "identity", "sigmoid", "softmax")
SOURCES = ("delayed-error", "delayed-loss", "target", "current-error", "current-error-sign", "none")


def activate(a: Tensor, activation: str) -> Tensor:
    """`phi(a)`, elementwise; `activation` is one of `ACTIVATIONS` (`gelu` is the exact, erf-based one)."""
    if activation == "identity":
        return a
    if activation == "tanh":
        return torch.tanh(a)
    if activation == "sigmoid":
        return torch.sigmoid(a)
    if activation == "relu":
        return torch.where(a > 0, a, torch.zeros_like(a))
    if activation == "gelu":
        return 0.5 * a * (1 + torch.erf(a / math.sqrt(2)))
    if activation == "gelu-tanh":
        return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    if activation == "silu":
        return a * torch.sigmoid(a)
    raise ValueError(f"activation {activation!r} is unknown; allowed: {', '.join(ACTIVATIONS)}")


def activation_slope(a: Tensor, activation: str) -> Tensor:
    """`phi'(a)`, elementwise, from the pre-activation `a`."""
    if activation == "identity":
        return torch.ones_like(a)
    if activation == "tanh":
        return 1 - torch.tanh(a) ** 2
    if activation == "sigmoid":
        return torch.sigmoid(a) * (1 - torch.sigmoid(a))
    if activation == "relu":
        return (a > 0).to(a.dtype)
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    if activation == "gelu-tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))
        return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a * a)
    if activation == "silu":
        s = torch.sigmoid(a)
        return s * (1 + a * (1 - s))
    raise ValueError(f"activation {activation!r} is unknown; allowed: {', '.join(ACTIVATIONS)}")


def linear_forward(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    activation: str = "identity",
    error: Tensor | None = None,  # [M, C]
    feedback: Tensor | GeneratedFeedback | None = None,  # [C, N]
    scale: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`h = phi(x W^T + b)  [M, N]`; with an error and its feedback also `delta = scale (e B) * phi'(a)  [M, N]`.

    `delta` is handed to the update rule as it is: the sign is the authors', `+ e B` with `e = y* - y`. For a feedback
    matrix from a symmetric law the sign makes no difference; for others it does.
    """
    product = x @ weight.T.to(x.dtype)
    a = product if bias is None else product + bias.to(x.dtype)  # [M, N]
    h = activate(a, activation)
    if error is None:
        return h
    if isinstance(feedback, GeneratedFeedback):
        feedback = feedback.dense(error.device)
    delta = scale * (error @ feedback.to(error.dtype)) * activation_slope(a, activation)
    return h, delta


def outer_product(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a linear layer, `gW = delta^T x  [N, K]` and `gb = sum_m delta  [N]`, summed over the batch."""
    return delta.T @ x, delta.sum(0)


def update_(
    parameter: Tensor,
    gradient: Tensor,
    moments: Moments,
    rule: Rule,
    lr: float | Tensor,
    step: int | Tensor,
    seed: int | None = None,
) -> None:
    """`parameter <- rule(parameter, gradient)`, in place; `step` counts from 1; `moments` are changed in place too.

    Equal to `torch.optim`'s SGD, Adam and AdamW to rounding. A bfloat16 parameter is updated in float32 (its moments are
    float32) and rounded to nearest, or with a `seed` (31 bits) stochastically: see `rounding`.
    """
    if parameter.dtype == torch.bfloat16:
        wide = parameter.float()
        update_(wide, gradient.float(), moments, rule, lr, step)
        parameter.copy_(wide if seed is None else round_stochastic(wide, seed, step))
        return
    if isinstance(rule, SGD):
        gradient = gradient + rule.weight_decay * parameter
        if rule.momentum:
            (buffer,) = moments
            buffer.mul_(rule.momentum).add_(gradient)
            gradient = gradient + rule.momentum * buffer if rule.nesterov else buffer
        parameter.sub_(lr * gradient)
        return
    m, v = moments
    beta1, beta2 = rule.betas
    if rule.decoupled:
        parameter.mul_(1 - lr * rule.weight_decay)
    else:
        gradient = gradient + rule.weight_decay * parameter
    m.mul_(beta1).add_((1 - beta1) * gradient)
    v.mul_(beta2).add_((1 - beta2) * gradient * gradient)
    denominator = (v / (1 - beta2**step)).sqrt() + rule.eps
    parameter.sub_(lr * (m / (1 - beta1**step)) / denominator)


def outer_product_update_(
    weight: Tensor,  # [N, K], changed
    bias: Tensor | None,  # [N], changed
    delta: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    rule: Rule,
    weight_moments: Moments,  # changed
    bias_moments: Moments,  # changed
    lr: float | Tensor,
    step: int | Tensor,
    *,
    seed: int | None = None,
    shadow: Tensor | None = None,  # [N, K], changed
) -> None:
    """`W <- rule(W, delta^T x)` and `b <- rule(b, sum_m delta)`, in place.

    `seed`: see `update_`. `shadow` is a copy of the weight in half precision for the products; it gets the new weight too.
    """
    weight_gradient, bias_gradient = outer_product(delta, x)
    update_(weight, weight_gradient, weight_moments, rule, lr, step, seed)
    if shadow is not None:
        shadow.copy_(weight)
    if bias is not None:
        update_(bias, bias_gradient, bias_moments, rule, lr, step, None if seed is None else seed ^ BIAS_SEED)


def linear_step_(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K], changed
    bias: Tensor | None,  # [N], changed
    error: Tensor,  # [M, C]
    feedback: Tensor | GeneratedFeedback,  # [C, N]
    rule: Rule,
    weight_moments: Moments,  # changed
    bias_moments: Moments,  # changed
    lr: float | Tensor,
    step: int | Tensor,
    activation: str = "identity",
    scale: float = 1.0,
    *,
    seed: int | None = None,
    shadow: Tensor | None = None,  # [N, K], changed
) -> Tensor:
    """A hidden layer's whole visit: `h [M, N]` from the old weight, then the update. Returns `h` (arXiv 2304.13372, alg. 1).

    `h` is made from the `shadow` where there is one.
    """
    h, delta = linear_forward(x, weight if shadow is None else shadow, bias, activation, error, feedback, scale)
    outer_product_update_(weight, bias, delta, x, rule, weight_moments, bias_moments, lr, step, seed=seed, shadow=shadow)
    return h


def linear_backward_update_(
    weight: Tensor,  # [N, K], changed
    bias: Tensor | None,  # [N], changed
    delta: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    rule: Rule,
    weight_moments: Moments,  # changed
    bias_moments: Moments,  # changed
    lr: float | Tensor,
    step: int | Tensor,
    *,
    seed: int | None = None,
    shadow: Tensor | None = None,  # [N, K], changed
) -> Tensor:
    """For layers inside a block with an exact gradient: returns `dx = delta W  [M, K]` from the *old* weight, then updates."""
    input_gradient = delta @ (weight if shadow is None else shadow).to(delta.dtype)
    outer_product_update_(weight, bias, delta, x, rule, weight_moments, bias_moments, lr, step, seed=seed, shadow=shadow)
    return input_gradient


# --- the last layer: output, loss, its gradient, and the error that is kept -------------------------------------------


def output_of(a: Tensor, loss: str) -> Tensor:
    """The network's output as the loss sees it: `sigmoid(a)` for `bce`, `a` itself for `cross-entropy` and `mse`.  [M, C]

    The authors' classifiers end in a sigmoid that belongs to the network; here it belongs to the loss, so that the last
    layer stays a plain linear one. Cross-entropy has its softmax inside, as torch's has.
    """
    return torch.sigmoid(a) if loss == "bce" else a


def prediction_of(a: Tensor, loss: str) -> Tensor:
    """What the network predicts: probabilities for `bce` (sigmoid) and `cross-entropy` (softmax), values for `mse`.  [M, C]"""
    return torch.softmax(a, -1) if loss == "cross-entropy" else output_of(a, loss)


def loss_of(a: Tensor, target: Tensor, loss: str) -> Tensor:
    """The mean loss, a scalar: over all M*C elements for `bce` and `mse`, over the M samples for `cross-entropy`.

    `a [M, C]` is the last layer's pre-activation, `target [M, C]` one-hot or real. `bce` is computed from the
    logarithms of sigmoid, so it is finite for any finite `a`.
    """
    if loss == "bce":
        log_p, log_q = torch.nn.functional.logsigmoid(a), torch.nn.functional.logsigmoid(-a)
        return -(target * log_p + (1 - target) * log_q).mean()
    if loss == "cross-entropy":
        return -(target * torch.log_softmax(a, -1)).sum(-1).mean()
    if loss == "mse":
        return ((a - target) ** 2).mean()
    raise ValueError(f"loss {loss!r} is unknown; allowed: {', '.join(LOSSES)}")


def loss_gradient(a: Tensor, target: Tensor, loss: str) -> Tensor:
    """`dL/da [M, C]` of `loss_of`, exact and local to the last layer."""
    if loss == "bce":
        return (torch.sigmoid(a) - target) / a.numel()
    if loss == "cross-entropy":
        return (torch.softmax(a, -1) * target.sum(-1, keepdim=True) - target) / a.shape[0]
    if loss == "mse":
        return 2 * (a - target) / a.numel()
    raise ValueError(f"loss {loss!r} is unknown; allowed: {', '.join(LOSSES)}")


def _apply_link(output: Tensor, link: str) -> Tensor:
    if link in ("auto", "identity"):
        return output
    if link == "sigmoid":
        return torch.sigmoid(output)
    if link == "softmax":
        return torch.softmax(output, -1)
    raise ValueError(f"link {link!r} is unknown; allowed: {', '.join(LINKS)}")


def _loss_gradient_at_output(z: Tensor, target: Tensor, loss: str) -> Tensor:
    """`dL/dz [M, C]` where `z` is what the loss function proper is given (a probability for `bce`)."""
    if loss == "bce":  # torch's BCELoss guards its denominator in the same way
        return (z - target) / (z * (1 - z)).clamp_min(1e-12) / z.numel()
    return loss_gradient(z, target, loss)


def error_signal(a: Tensor, target: Tensor, loss: str, source: str, link: str = "auto") -> Tensor:
    """The error row of each sample, `e [M, C]`, from the last layer's pre-activation `a` and the target.

    With `o = output_of(a, loss)` and `z = link(o)`:

    - `delayed-error`, `current-error`: `y* - z`; `current-error-sign`: its sign
    - `delayed-loss`: `-dL(z, y*)/do`, the gradient of the mean loss with respect to the network's output
    - `target`: `y*`; `none`: zeros

    `link="auto"` is the one that belongs to the loss: the error is `y* - prediction`. Any other link goes on top of `o`,
    so that `identity` and `softmax` are the authors' `delayed_error` and `delayed_error_softmax`. Their `*_one_hot` mask
    (times the target) is applied where an error is used, not here: the row that is kept is the whole one.
    """
    if source == "none":
        return torch.zeros_like(a)
    if source == "target":
        return target.clone()
    if source == "delayed-loss":
        output = output_of(a, loss)
        z = _apply_link(output, link)
        gradient = _loss_gradient_at_output(z, target, loss)
        if link == "sigmoid":
            gradient = gradient * z * (1 - z)
        elif link == "softmax":
            gradient = z * (gradient - (gradient * z).sum(-1, keepdim=True))
        return -gradient
    if source in ("delayed-error", "current-error", "current-error-sign"):
        z = prediction_of(a, loss) if link == "auto" else _apply_link(output_of(a, loss), link)
        return torch.sign(target - z) if source == "current-error-sign" else target - z
    raise ValueError(f"signal {source!r} is unknown; allowed: {', '.join(SOURCES)}")


def output_error(a: Tensor, target: Tensor, loss: str, source: str, link: str = "auto") -> tuple[Tensor, Tensor]:
    """`(dL/da, error)`, each `[M, C]`: what teaches the last layer, and what these samples leave behind."""
    return loss_gradient(a, target, loss), error_signal(a, target, loss, source, link)


def correct_of(a: Tensor, target: Tensor) -> Tensor:
    """The number of rows whose largest output stands where the target's largest entry stands (int64 scalar)."""
    return (a.argmax(-1) == target.argmax(-1)).sum()


def output_step(
    a: Tensor,  # [M, C]
    target: Tensor,  # [M, C]
    loss: str,
    source: str,
    link: str = "auto",
    *,
    rows: Tensor | None = None,  # [samples, C], changed
    index: Tensor | None = None,  # [M]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole end of the forward pass: `(loss, correct, dL/da, error)`, by `loss_of`, `correct_of`, `output_error`.

    With the `rows` of an error store, and the batch's sample indices, the error is written there at once.
    """
    gradient, error = output_error(a, target, loss, source, link)
    if rows is not None:
        rows[index] = error.to(rows.dtype)
    return loss_of(a, target, loss), correct_of(a, target), gradient, error
