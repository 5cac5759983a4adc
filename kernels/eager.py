"""The torch backend: the operations of `reference`, on any torch device, in as few passes over memory as torch allows.

Same names, arguments and results as `reference`. What is different: slopes are taken from `h` where it suffices, by the
operators that torch's own autograd would call (`tanh_backward` and its kin), the update of weight, moments and bias is
one fused pass, and a large layer's gradient is formed and consumed a few rows at a time, so that the gradient never
takes more than `SCRATCH` elements of memory.

Half precision: where `x` is of a narrower type than the weight, products are computed in `x`'s type and the weight,
its moments and its update stay in the weight's own. A weight in bfloat16 is updated in float32, a few rows at a time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from . import reference
from .generated import GeneratedFeedback
from .moments import is_narrow, narrow_all_, widened
from .rounding import bits_of, cut_to_bfloat16, parameter_seed
from .rules import SGD, Moments, State, Update

aten = torch.ops.aten

SCRATCH = 1 << 20  # elements of gradient alive at once: 4 MiB in float32, about a core's share of cache
NARROW_SCRATCH = 1 << 17  # the same of moments in bfloat16 or int8, whose rounding takes more buffers of that size
_here = sys.modules[__name__]
_scratch = threading.local()  # a thread's own gradient buffers, by dtype
READS_SHADOWS = False  # a copy of the weight in half precision would save nothing here
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # where torch has single-pass optimizer kernels


def _pre_activation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b  [M, N]`."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def activate(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`(h, kept)`: the activation, in place where the slope needs only `h`, and the tensor the slope will be taken from."""
    if activation == "identity":
        return a, a
    if activation == "tanh":
        a.tanh_()
        return a, a
    if activation == "sigmoid":
        a.sigmoid_()
        return a, a
    if activation == "relu":
        a.relu_()
        return a, a
    if activation == "gelu":
        return aten.gelu(a), a
    if activation == "gelu-tanh":
        return aten.gelu(a, approximate="tanh"), a
    if activation == "silu":
        return aten.silu(a), a
    raise ValueError(f"activation {activation!r} is unknown; allowed: {', '.join(reference.ACTIVATIONS)}")


def times_slope(gradient: Tensor, kept: Tensor, activation: str) -> Tensor:
    """`gradient * phi'(a)  [M, N]`, from what `linear_keep` kept."""
    if activation == "identity":
        return gradient
    if activation == "tanh":
        return aten.tanh_backward(gradient, kept)
    if activation == "sigmoid":
        return aten.sigmoid_backward(gradient, kept)
    if activation == "relu":
        return aten.threshold_backward(gradient, kept, 0)
    if activation == "silu":
        return aten.silu_backward(gradient, kept)
    return aten.gelu_backward(gradient, kept, approximate="tanh" if activation == "gelu-tanh" else "none")


def linear_keep(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """`(h [M, N], kept [M, N])`: the forward pass, and what `times_slope` needs later (often `h` itself)."""
    return activate(_pre_activation(x, weight, bias), activation)


def project(error: Tensor, feedback: Tensor | GeneratedFeedback, scale: float, dtype: torch.dtype) -> Tensor:
    """`scale e B  [M, N]` in the given type."""
    if error.dtype != dtype:
        error = error.to(dtype)
    if isinstance(feedback, GeneratedFeedback):
        return feedback.project(error).mul_(scale)
    signal = error @ (feedback if feedback.dtype == dtype else feedback.to(dtype))
    return signal if scale == 1.0 else signal.mul_(scale)


@reference.explained
def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "identity",
    error: Tensor | None = None,
    feedback: Tensor | GeneratedFeedback | None = None,
    scale: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Here: slopes are taken from `h` where it suffices."""
    h, kept = linear_keep(x, weight, bias, activation)
    if error is None:
        return h
    return h, times_slope(project(error, feedback, scale, x.dtype), kept, activation)


@reference.explained
def outer_product(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Here: both are of the operands' type."""
    return delta.t() @ x, delta.sum(0)


@reference.explained
def update_(parameter: Tensor, gradient: Tensor, state: State, update: Update) -> None:
    """Here: in one pass over the parameter and its moments, a few rows at a time where they are narrow."""
    if is_narrow(state.moments):
        columns = parameter[0].numel()
        for part in _parts(len(parameter), columns, NARROW_SCRATCH):
            _update_part_(parameter[part], gradient[part], _rows(state, part), update, part.start * columns)
    else:
        _update_part_(parameter, gradient, state, update)
    if state.shadow is not None:
        state.shadow.copy_(parameter)


def _parts(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """So many rows at a time as have at most that many elements, or one."""
    chunk = max(1, elements // columns)
    return (slice(start, start + chunk) for start in range(0, rows, chunk))


def _rows(state: State, part: slice) -> State:
    """The state of some rows of a parameter."""
    moments, scales = (tuple(tensor[part] for tensor in tensors) for tensors in (state.moments, state.scales))
    return State(moments, None, state.place, scales)


def _update_part_(parameter: Tensor, gradient: Tensor, state: State, update: Update, first: int = 0) -> None:
    """A parameter or some rows of it, of which the first element has the number `first`; without its shadow."""
    narrow, half = is_narrow(state.moments), parameter.dtype == torch.bfloat16
    wide, buffers = parameter, state.moments
    if half:
        wide, gradient = parameter.float(), gradient.float()
    if narrow:
        buffers = [widened(m, state.scales[i] if state.scales else None) for i, m in enumerate(state.moments)]
    _update_all_([wide], [gradient], [buffers], update)
    bits = None
    if update.seed is not None and (narrow or half):
        bits = bits_of(parameter, parameter_seed(update.seed, state.place), update.step, first)
    if narrow:
        narrow_all_(state.moments, state.scales, buffers, bits)
    if half:
        parameter.copy_(wide if bits is None else cut_to_bfloat16(wide, bits & 0xFFFF))


def _update_all_(parameters: list[Tensor], gradients: list[Tensor], moments: list[Moments], update: Update) -> None:
    rule, step, device = update.rule, update.step, parameters[0].device
    fused = getattr(
        torch, "_fused_sgd_" if isinstance(rule, SGD) else "_fused_adamw_" if rule.decoupled else "_fused_adam_", None
    )
    if device.type not in FUSED_DEVICES or fused is None:  # they are private to torch, and may go
        for parameter, gradient, buffers in zip(parameters, gradients, moments, strict=True):
            reference.update_(parameter, gradient, State(buffers), update)
        return
    if isinstance(rule, SGD):
        fused(
            parameters,
            gradients,
            [buffers[0] for buffers in moments] if rule.momentum else [],
            weight_decay=rule.weight_decay,
            momentum=rule.momentum,
            lr=update.lr,
            dampening=0.0,
            nesterov=rule.nesterov,
            maximize=False,
            is_first_step=False,
        )
        return
    if not isinstance(step, Tensor):
        step = torch.tensor(float(step), device=device)
    elif device.type != "cpu":  # these kernels read a float32, which is enough for `1 - beta^step`; the CPU's read any number
        step = step.to(torch.float32)
    fused(
        parameters,
        gradients,
        [buffers[0] for buffers in moments],
        [buffers[1] for buffers in moments],
        [],
        [step] * len(parameters),
        lr=update.lr,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
    )


def _weight_gradient(left: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`left [N, M] @ x [M, K]` in the given type; on CUDA a float32 one of half precision is not rounded on the way.

    On a CPU it goes into a buffer that is kept: fresh megabytes from the system cost more than the product's own writes
    (a page fault for every 4 KiB). Elsewhere torch's caching allocator sees to that.
    """
    if left.device.type == "cuda" and torch.version.hip is None and dtype == torch.float32 != x.dtype:
        return torch.mm(left, x, out_dtype=dtype)
    if left.device.type != "cpu" or dtype != x.dtype:
        return (left @ x).to(dtype)
    key = dtype, left.shape[0], x.shape[1]
    views = _scratch.__dict__
    if key not in views:
        base = views.get(dtype)
        if base is None or base.numel() < key[1] * key[2]:
            views.clear()
            base = views[dtype] = torch.empty(key[1] * key[2], dtype=dtype)
        views[key] = base[: key[1] * key[2]].view(key[1:])
    return torch.mm(left, x, out=views[key])


@reference.explained
def outer_product_update_(
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    x: Tensor,
    weight_state: State,
    bias_state: State | None,
    update: Update,
) -> None:
    """Here: a large weight is updated a few rows at a time."""
    rows, columns = weight.shape
    if delta.dtype != x.dtype:
        delta = delta.to(x.dtype)
    left = delta.t()  # [N, M]
    narrow = is_narrow(weight_state.moments)
    if (
        rows * columns <= max(SCRATCH, columns)
        and not narrow
        and weight.dtype != torch.bfloat16
        and weight_state.shadow is None
    ):
        parameters, gradients, moments = [weight], [_weight_gradient(left, x, weight.dtype)], [weight_state.moments]
        if bias is not None:
            parameters.append(bias)
            gradients.append(delta.sum(0, dtype=bias.dtype))
            moments.append(bias_state.moments)
        _update_all_(parameters, gradients, moments, update)
        return
    for part in _parts(rows, columns, NARROW_SCRATCH if narrow else SCRATCH):
        gradient = _weight_gradient(left[part], x, torch.promote_types(weight.dtype, torch.float32))
        _update_part_(weight[part], gradient, _rows(weight_state, part), update, part.start * columns)
    if weight_state.shadow is not None:
        weight_state.shadow.copy_(weight)
    if bias is not None:
        update_(bias, delta.sum(0, dtype=torch.promote_types(bias.dtype, torch.float32)), bias_state, update)


@reference.explained
def linear_step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    error: Tensor,
    feedback: Tensor | GeneratedFeedback,
    weight_state: State,
    bias_state: State | None,
    update: Update,
    activation: str = "identity",
    scale: float = 1.0,
) -> Tensor:
    """Here: `linear_forward`, then `outer_product_update_`."""
    source = weight if weight_state.shadow is None else weight_state.shadow
    h, delta = linear_forward(x, source, bias, activation, error, feedback, scale)
    outer_product_update_(weight, bias, delta, x, weight_state, bias_state, update)
    return h


@reference.explained
def linear_backward_update_(
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    x: Tensor,
    weight_state: State,
    bias_state: State | None,
    update: Update,
) -> Tensor:
    """Here: a product, then `outer_product_update_`."""
    source = weight if weight_state.shadow is None else weight_state.shadow
    input_gradient = delta @ source.to(delta.dtype)
    outer_product_update_(weight, bias, delta, x, weight_state, bias_state, update)
    return input_gradient


def normalise(h: Tensor) -> Tensor:
    """See `reference.normalise`."""
    return torch.layer_norm(h, h.shape[-1:], eps=reference.NORM_EPS)


def through_norm(gradient: Tensor, h: Tensor) -> Tensor:
    """See `reference.through_norm`."""
    h, shape = h.contiguous(), [h.shape[-1]]
    _, mean, deviation = aten.native_layer_norm(h, shape, None, None, reference.NORM_EPS)
    given = [True, False, False]
    return aten.native_layer_norm_backward(gradient.contiguous(), h, shape, mean, deviation, None, None, given)[0]


@reference.explained
def head_step_(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss: str,
    weight_state: State,
    bias_state: State | None,
    update: Update,
    norm: bool = True,
    *,
    ops: ModuleType | SimpleNamespace | None = None,
) -> Tensor:
    """Here: by the other operations of `ops`, these by default."""
    ops = ops or _here
    n = normalise(h) if norm else h
    source = weight if weight_state.shadow is None else weight_state.shadow
    z, _ = ops.linear_keep(n, source, bias, "identity")
    gradient = ops.output_step(z.to(target.dtype), target, loss, "none")[0]
    n = n.float() if n.dtype == torch.float16 else n  # a mean over batch and outputs falls below float16's smallest numbers
    back = ops.linear_backward_update_(weight, bias, gradient.to(n.dtype), n, weight_state, bias_state, update).to(h.dtype)
    return through_norm(back, h) if norm else back


@reference.explained
def output_step(
    a: Tensor, target: Tensor, loss: str, source: str, link: str = "auto"
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Here: the figures are None, for they are cheaper taken later, for the outputs of many steps.

    Where the error is the one that belongs to the loss, `y* - prediction` serves for gradient and error.
    """
    if loss == "cross-entropy":
        p = torch.softmax(a, -1)
        residual = target - p
        gradient = (p * target.sum(-1, keepdim=True) - target).mul_(1 / a.shape[0])
    elif loss == "bce":
        residual = target - torch.sigmoid(a)
        gradient = residual * (-1 / a.numel())
    elif loss == "mse":
        residual = target - a
        gradient = residual * (-2 / a.numel())
    else:
        raise ValueError(f"loss {loss!r} is unknown; allowed: {', '.join(reference.LOSSES)}")
    natural = link == "auto" or (link == "identity" and loss != "cross-entropy")
    if natural and source in ("delayed-error", "current-error"):
        return gradient, residual, None
    return gradient, reference.error_signal(a, target, loss, source, link), None
