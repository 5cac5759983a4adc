"""Every operation in a few lines of plain PyTorch: the specification that the fast paths are tested against.

Shapes throughout: batch `M`, inputs `K`, outputs `N` of a layer, error width `C` (classes or targets). Nothing here
enters autograd, nothing is in a hurry, and everything works in float64. The mathematics is that of F3 (arXiv
2304.13372): the error that reaches a hidden layer is `e B`, with `B [C, N]` fixed and random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import cleandoc
from typing import TypeVar

import torch
from torch import Tensor

from .generated import GeneratedFeedback
from .moments import is_narrow, narrow_all_, widened
from .rounding import bits_of, cut_to_bfloat16, parameter_seed
from .rules import SGD, Layer, Moments, State, Update
from .words import ACTIVATIONS, LINKS, LOSSES, SOURCES

NORM_EPS = 1e-5


Operation = TypeVar("Operation", bound=Callable[..., object])


def explained(operation: Operation) -> Operation:
    """For `help`: what is written here of the operation of the same name comes before what is particular to this one."""
    own, particular = (cleandoc(f.__doc__ or "") for f in (globals()[operation.__name__], operation))
    operation.__doc__ = f"{own}\n\n{particular}".rstrip()
    return operation


def activate(a: Tensor, activation: str) -> Tensor:
    """`phi(a)`, elementwise; `activation` is one of `ACTIVATIONS` (`gelu` is the exact, erf-based one)."""
    if activation == "identity":
        return a
    if activation == "tanh":
        return torch.tanh(a)
    if activation == "sigmoid":
        return torch.sigmoid(a)
    if activation == "relu":
        return torch.where(a <= 0, torch.zeros_like(a), a)  # NaN stays NaN
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
        return torch.where(a <= 0, torch.zeros_like(a), torch.ones_like(a))
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

    `x [M, K]`, `weight [N, K]`, `bias [N]`, `error [M, C]`, and `feedback [C, N]`, which may also be of int8, or generated.
    Products and results are of `x`'s type. `activation` is one of `ACTIVATIONS`. Raises ValueError for another one, and where
    shapes do not fit (torch: RuntimeError).
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
    """The gradients of a linear layer, `gW = delta^T x  [N, K]` and `gb = sum_m delta  [N]`, summed over the batch.

    `delta [M, N]` and `x [M, K]`, of one type. Raises ValueError where shapes do not fit (torch: RuntimeError).
    """
    return delta.T @ x, delta.sum(0)


def update_(parameter: Tensor, gradient: Tensor, state: State, update: Update) -> None:
    """`parameter <- rule(parameter, gradient)`, in place, and with it the moments and the shadow of its `state`.

    Parameter and gradient have any shape. Equal to `torch.optim`'s SGD, Adam and AdamW to rounding. A bfloat16 parameter is
    updated in float32 and rounded as `Update` says. Moments in bfloat16 or int8 are widened before and rounded after: with
    blocks of 32 of a row, `s` the largest magnitude of a block, and q of L levels, value = s sign(q) (q / L)^2; see `moments`.

    `gradient` has the parameter's shape, `state` comes from `new_state(parameter, update.rule)`. SGD: `buf <- momentum buf +
    g`, `w <- w - lr buf`. Adam: `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`, `w <- w - lr m / (1 - b1^t) / (sqrt(v /
    (1 - b2^t)) + eps)`; see the rules' own docstrings for decay and Nesterov. Returns None. Raises ValueError where the state
    is not one of this parameter and rule (torch: RuntimeError, or an IndexError).
    """
    narrow, half = is_narrow(state.moments), parameter.dtype == torch.bfloat16
    wide, buffers = parameter, state.moments
    if half:
        wide, gradient = parameter.float(), gradient.float()
    if narrow:
        buffers = [widened(m, state.scales[i] if state.scales else None) for i, m in enumerate(state.moments)]
    _apply_rule_(wide, gradient, buffers, update)
    bits = None
    if update.seed is not None and (narrow or half):
        bits = bits_of(parameter, parameter_seed(update.seed, state.place), update.step)
    if narrow:
        narrow_all_(state.moments, state.scales, buffers, bits)
    if half:
        parameter.copy_(wide if bits is None else cut_to_bfloat16(wide, bits & 0xFFFF))
    if state.shadow is not None:
        state.shadow.copy_(parameter)


def _apply_rule_(parameter: Tensor, gradient: Tensor, moments: Moments, update: Update) -> None:
    rule, lr, step = update.rule, update.lr, update.step
    if isinstance(rule, SGD):
        gradient = gradient + rule.weight_decay * parameter
        if rule.momentum:
            (buffer,) = moments
            buffer.mul_(rule.momentum).add_(gradient)
            gradient = gradient + rule.momentum * buffer if rule.nesterov else buffer
        parameter.sub_(lr * gradient)
        return
    if isinstance(step, Tensor):
        step = step.double()
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
    weight_state: State,  # changed
    bias_state: State | None,  # changed; None where there is no bias
    update: Update,
) -> None:
    """`W <- rule(W, delta^T x)` and `b <- rule(b, sum_m delta)`, in place; see `update_`.

    `weight [N, K]` and `bias [N]` or None are changed, with their states; `delta [M, N]` and `x [M, K]` may be of a narrower
    type. The gradient is that of a sum over the batch: whoever wants a mean divides `delta`. Returns None. Raises ValueError
    where shapes or states do not fit (torch: RuntimeError).
    """
    weight_gradient, bias_gradient = outer_product(delta, x)
    update_(weight, weight_gradient, weight_state, update)
    if bias is not None:
        update_(bias, bias_gradient, bias_state, update)


def linear_step_(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K], changed
    bias: Tensor | None,  # [N], changed
    error: Tensor,  # [M, C]
    feedback: Tensor | GeneratedFeedback,  # [C, N]
    weight_state: State,  # changed
    bias_state: State | None,  # changed; None where there is no bias
    update: Update,
    activation: str = "identity",
    scale: float = 1.0,
) -> Tensor:
    """A hidden layer's whole visit: `h [M, N]` from the old weight, then the update. Returns `h` (arXiv 2304.13372, alg. 1).

    `h` is made from the weight's shadow where it has one.

    With `a = x W^T + b`: `h = phi(a)`, `delta = scale (e B) * phi'(a)`, `W <- rule(W, delta^T x)`, `b <- rule(b, sum_m delta)`.
    `x [M, K]`, `weight [N, K]` and `bias [N]` or None, which are changed with their states, `error [M, C]`, and `feedback [C,
    N]`, a float or int8 matrix or a `GeneratedFeedback`. `h` is of `x`'s type. `update` says rule, learning rate and step.
    Raises ValueError for an unknown activation, and where shapes or states do not fit (torch: RuntimeError).
    """
    source = weight if weight_state.shadow is None else weight_state.shadow
    h, delta = linear_forward(x, source, bias, activation, error, feedback, scale)
    outer_product_update_(weight, bias, delta, x, weight_state, bias_state, update)
    return h


def linear_backward_update_(
    weight: Tensor,  # [N, K], changed
    bias: Tensor | None,  # [N], changed
    delta: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    weight_state: State,  # changed
    bias_state: State | None,  # changed; None where there is no bias
    update: Update,
) -> Tensor:
    """For layers inside a block with an exact gradient: returns `dx = delta W  [M, K]` from the *old* weight, then updates.

    `weight [N, K]` and `bias [N]` or None are changed, with their states, by `W <- rule(W, delta^T x)`, `b <- rule(b, sum_m
    delta)`; `delta [M, N]` is the loss's gradient at the layer's pre-activation, `x [M, K]` what the layer was given. `dx` is
    of `delta`'s type. Raises ValueError where shapes or states do not fit (torch: RuntimeError).
    """
    source = weight if weight_state.shadow is None else weight_state.shadow
    input_gradient = delta @ source.to(delta.dtype)
    outer_product_update_(weight, bias, delta, x, weight_state, bias_state, update)
    return input_gradient


def normalise(h: Tensor) -> Tensor:
    """Layer normalisation over the last dimension, without scale and shift: `(h - mean) / sqrt(variance + NORM_EPS)`."""
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()


def through_norm(gradient: Tensor, h: Tensor) -> Tensor:
    """The gradient at `h [..., N]` for one at `n = normalise(h)`: `(g - mean(g) - n mean(g n)) / sqrt(variance + NORM_EPS)`."""
    n, deviation = normalise(h), (h.var(-1, keepdim=True, correction=0) + NORM_EPS).sqrt()
    return (gradient - gradient.mean(-1, keepdim=True) - n * (gradient * n).mean(-1, keepdim=True)) / deviation


def head_step_(
    h: Tensor,  # [M, N], a stage's output
    weight: Tensor,  # [C, N], changed
    bias: Tensor | None,  # [C], changed
    target: Tensor,  # [M, C]
    loss: str,
    weight_state: State,  # changed
    bias_state: State | None,  # changed; None where there is no bias
    update: Update,
    norm: bool = True,
) -> Tensor:
    """The whole visit of a stage's own head (local errors: Nokland and Eidnes, arXiv 1901.06656).

    With `n = normalise(h)` (without `norm` `h` itself), `z = n W^T + b` and `g = loss_gradient(z)`: returns the gradient at
    `h [M, N]`, `g W` through the normalisation, from the old weight; then `W <- rule(W, g^T n)` and `b` likewise.

    `h [M, N]` is the stage's output, `weight [C, N]` and `bias [C]` or None are changed with their states, `target [M, C]` is
    one-hot or real, `loss` one of `LOSSES`. The result is of `h`'s type. Raises ValueError for an unknown loss, and where
    shapes or states do not fit (torch: RuntimeError).
    """
    source = weight if weight_state.shadow is None else weight_state.shadow
    n = normalise(h) if norm else h
    z = linear_forward(n, source, bias)
    gradient = loss_gradient(z, target.to(z.dtype), loss)
    back = linear_backward_update_(weight, bias, gradient, n, weight_state, bias_state, update)
    return through_norm(back, h) if norm else back


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


def losses_of(a: Tensor, target: Tensor, loss: str) -> Tensor:
    """The loss of each sample, `[M]`: a mean over its C elements for `bce` and `mse`, a sum for `cross-entropy`.

    `a [M, C]` is the last layer's pre-activation, `target [M, C]` one-hot or real. `bce` is computed from the
    logarithms of sigmoid, so it is finite for any finite `a`.
    """
    if loss == "bce":
        log_p, log_q = torch.nn.functional.logsigmoid(a), torch.nn.functional.logsigmoid(-a)
        return -(target * log_p + (1 - target) * log_q).mean(-1)
    if loss == "cross-entropy":
        return -(target * torch.log_softmax(a, -1)).sum(-1)
    if loss == "mse":
        return ((a - target) ** 2).mean(-1)
    raise ValueError(f"loss {loss!r} is unknown; allowed: {', '.join(LOSSES)}")


def loss_of(a: Tensor, target: Tensor, loss: str) -> Tensor:
    """The training loss, a scalar: the mean over samples of `losses_of`."""
    return losses_of(a, target, loss).mean()


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


def hits_of(a: Tensor, target: Tensor) -> Tensor:
    """Whether a sample's largest output stands where its target's largest entry stands, `[M]` bool."""
    return a.argmax(-1) == target.argmax(-1)


def output_step(
    a: Tensor,  # [M, C]
    target: Tensor,  # [M, C]
    loss: str,
    source: str,
    link: str = "auto",
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """The end of the forward pass: `(gradient [M, C], error [M, C], figures)`, by `loss_gradient` and `error_signal`.

    `gradient` teaches the last layer, `error` is what these samples leave behind. `figures` are `losses_of` and `hits_of`, each
    `[M]`; a backend that would have to take them separately gives None.

    `a [M, C]` is the last layer's pre-activation, `target [M, C]` one-hot or real. `loss` is one of `LOSSES`, `source` of
    `SOURCES`, `link` of `LINKS`. Gradient and error are of `a`'s type. Raises ValueError for other words, and where shapes do
    not fit (torch: RuntimeError).
    """
    figures = losses_of(a, target, loss), hits_of(a, target)
    return loss_gradient(a, target, loss), error_signal(a, target, loss, source, link), figures


def network_steps_(
    x: Tensor,  # [S, M, K]
    row: Tensor,  # [S, M, R]
    target: Tensor,  # [S, M, C]
    layers: Sequence[Layer],  # changed
    loss: str,
    update: Update,
    activation: str = "identity",
    scale: float = 1.0,
) -> Tensor:
    """S steps of a whole network, each from its own batch, where the rows that teach its hidden layers are known before.

    A step is `linear_step_` of each hidden layer, then the last layer by its exact gradient. Returns the outputs `a [S, M, C]`,
    each from before its own update. `x [S, M, K]`, `row [S, M, R]`, `target [S, M, C]`; the last of `layers` has no feedback,
    the others' is `[R, N]`; `update.lr [S]` holds a rate for each step, and `update.step` is the number of the first. Raises
    ValueError for unknown words, and where shapes or states do not fit (torch: RuntimeError).
    """
    *hidden, last = layers
    outputs = []
    for t, h in enumerate(x):
        now = replace(update, lr=update.lr[t], step=update.step + t)
        for weight, bias, weight_state, bias_state, feedback in hidden:
            h = linear_step_(h, weight, bias, row[t], feedback, weight_state, bias_state, now, activation, scale)
        a = linear_forward(h, last.weight, last.bias)
        gradient = loss_gradient(a, target[t], loss)
        outer_product_update_(last.weight, last.bias, gradient, h, last.weight_state, last.bias_state, now)
        outputs.append(a)
    return torch.stack(outputs)
