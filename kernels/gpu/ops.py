"""The Triton backend: the operations of `reference`, same names, arguments and results, through the kernels beside this file.

Weights and biases are float32 or bfloat16, moments float32; all contiguous, and changed in place. `x` is float32, float16 or
bfloat16, and its type is that of the matrix products (sums are float32). float32 products are exact (`ieee`) unless
`precision="tf32"`. `lr` and `step` are numbers, or scalars in device memory, which are read there: no launch waits for the
host. On a CPU the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`). Raises ValueError, naming the argument, for other
types, shapes or devices.
"""

from __future__ import annotations

import math
import os
from functools import cache, partial
from types import SimpleNamespace

import torch
import triton
from torch import Tensor

from .. import eager
from ..generated import KINDS, GeneratedFeedback
from ..rounding import BIAS_SEED
from ..rules import SGD, Moments, Rule
from . import linear as kernels
from . import output as triton_output
from . import tiles
from .math import ACTIVATION, ADAM, ADAMW
from .math import SGD as PLAIN

READS_SHADOWS = True  # a half-precision copy of the weight makes the forward product faster; torch's converts it anyway
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = {
    torch.float32: triton.language.float32,
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_state(moments: Moments, rule: Rule, shadow: Tensor | None = None, **parameters: Tensor | None) -> None:
    for name, tensor in parameters.items():
        if tensor is not None:
            fits = tensor.dtype in (torch.float32, torch.bfloat16) and tensor.is_contiguous()
            _check(fits, f"{name} must be float32 or bfloat16, and contiguous, for the Triton kernels, got {tensor.dtype}")
    fit = len(moments) >= rule.moments and all(m.dtype == torch.float32 and m.is_contiguous() for m in moments)
    _check(fit, f"{type(rule).__name__} needs {rule.moments} moments a parameter, float32 and contiguous: see new_moments")
    if shadow is not None:
        weight = parameters["weight"]
        fits = shadow.shape == weight.shape and shadow.is_contiguous() and shadow.dtype in (torch.float16, torch.bfloat16)
        _check(fits, f"shadow must be contiguous, in half precision, of shape {list(weight.shape)}, got {list(shadow.shape)}")


@cache
def _roomy(device: torch.device) -> bool:
    """Whether a program on the device can have `tiles.ROOMY` bytes of shared memory."""
    if device.type != "cuda":
        return False
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= tiles.ROOMY


def _seeds(seed: int | None) -> tuple[int, int]:
    """The seeds of a weight's and a bias's rounding; they are not read where rounding is to nearest."""
    return (0, 0) if seed is None else (seed, seed ^ BIAS_SEED)


def _check_product(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        near = all(abs(stride) < tiles.STRIDE for stride in tensor.stride())  # within a tile offsets have 32 bits
        _check(near, f"{name} has strides {tensor.stride()}; the Triton kernels need strides below {tiles.STRIDE}")
        _check(tensor.dim() == 2, f"{name} must have two dimensions, got shape {list(tensor.shape)}")
        _check(tensor.dtype in _DTYPES, f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}; use backend 'torch'")


def _product_dtype(x: Tensor) -> triton.language.dtype:
    """The interpreter does no arithmetic in bfloat16, so there the products are in float32."""
    return triton.language.float32 if _INTERPRETED else _DTYPES[x.dtype]


def _rule_arguments(rule: Rule, lr: float | Tensor, step: int | Tensor) -> dict[str, object]:
    """What the kernels' rule needs, from settings and numbers or device scalars."""
    plain = isinstance(rule, SGD)
    beta1, beta2 = (0.0, 0.0) if plain else rule.betas
    return {
        "lr": lr if isinstance(lr, Tensor) else float(lr),
        "step": step if isinstance(step, Tensor) else float(step),
        "log_beta1": math.log(beta1) if beta1 else -1e4,  # beta 0: its powers vanish
        "log_beta2": math.log(beta2) if beta2 else -1e4,
        "KIND": PLAIN if plain else ADAMW if rule.decoupled else ADAM,
        "MOMENTUM": rule.momentum if plain else 0.0,
        "NESTEROV": plain and rule.nesterov,
        "BETA1": beta1,
        "BETA2": beta2,
        "EPS": 0.0 if plain else rule.eps,
        "DECAY": rule.weight_decay,
        "LR_IN_MEMORY": isinstance(lr, Tensor),
        "STEP_IN_MEMORY": isinstance(step, Tensor),
    }


def _two(moments: Moments, instead: Tensor) -> tuple[Tensor, Tensor]:
    """Two pointers whatever the rule keeps; those that it does not keep are never followed."""
    return (*moments, instead, instead)[:2]


def _feedback(feedback: Tensor | GeneratedFeedback, error: Tensor, scale: float) -> tuple[Tensor, float, int, int]:
    """(a pointer, the scale, the kind of entries or 0, the seed) for a matrix that is stored, or that the kernel makes."""
    if isinstance(feedback, GeneratedFeedback):
        return error, scale * feedback.amplitude, KINDS[feedback.kind], feedback.seed
    return feedback, scale, 0, 0


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "identity",
    error: Tensor | None = None,
    feedback: Tensor | GeneratedFeedback | None = None,
    scale: float = 1.0,
    precision: str = "ieee",
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.linear_forward`. Any strides; the weight may be of a wider type than `x`. Results are of `x`'s type."""
    _check_product(x=x, weight=weight)
    rows, inputs = x.shape
    outputs = weight.shape[0]
    _check(weight.shape[1] == inputs, f"weight has {weight.shape[1]} inputs and x {inputs}")
    h = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    delta = h if error is None else torch.empty_like(h)
    if error is None:
        error = feedback = x  # not read
    feedback, scale, kind, feedback_seed = _feedback(feedback, error, scale)
    tile = tiles.forward_tile(rows, outputs, x.dtype != torch.float32, _roomy(x.device))
    block_m, block_n, block_k = tile.blocks
    kernels.forward[(triton.cdiv(outputs, block_n) * triton.cdiv(rows, block_m),)](
        x, weight, weight if bias is None else bias, h, delta, error, feedback, float(scale), feedback_seed,
        rows, outputs, inputs, error.shape[1],
        *x.stride(), *weight.stride(), *error.stride(), *feedback.stride(),
        ACTIVATION=ACTIVATION[activation], HAS_BIAS=bias is not None, HAS_ERROR=delta is not h,
        DTYPE=_product_dtype(x), PRECISION=precision,
        ROWS=block_m, OUTPUTS=block_n, INPUTS=block_k, WIDTH=16, GENERATED=kind,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return h if delta is h else (h, delta)


def linear_keep(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """See `eager.linear_keep`: the product by the kernel, the activation by torch."""
    return eager.activate(linear_forward(x, weight, bias, precision=precision), activation)


def _launch_update(
    delta: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_moments: tuple[Tensor, Tensor],
    bias_moments: tuple[Tensor, Tensor],
    rule: dict[str, object],
    gradients: tuple[Tensor, Tensor] | None,
    precision: str,
    seed: int | None = None,
    shadow: Tensor | None = None,
) -> None:
    _check_product(delta=delta, x=x)
    rows, outputs = delta.shape
    inputs = x.shape[1]
    _check(x.shape[0] == rows, f"delta has {rows} rows and x {x.shape[0]}")
    _check(weight.shape == (outputs, inputs), f"weight has shape {list(weight.shape)}; needed: {[outputs, inputs]}")
    moments = 0 if gradients is not None or weight_moments[0] is weight else 1 if weight_moments[1] is weight else 2
    tile = tiles.update_tile(outputs, inputs, x.dtype != torch.float32, moments, _roomy(x.device))
    block_n, block_k, block_m = tile.blocks
    kept = gradients if gradients is not None else (weight, weight)
    kernels.update[(triton.cdiv(inputs, block_k) * triton.cdiv(outputs, block_n),)](
        weight, weight if bias is None else bias, *weight_moments, *bias_moments, delta, x, *kept,
        weight if shadow is None else shadow,
        rule["lr"], rule["step"], rule["log_beta1"], rule["log_beta2"], *_seeds(seed),
        rows, outputs, inputs, *delta.stride(), *x.stride(),
        HAS_BIAS=bias is not None, KEEP_GRADIENT=gradients is not None, **_constants(rule),
        SHADOW=shadow is not None, STOCHASTIC=seed is not None and weight.dtype != torch.float32,
        DTYPE=_product_dtype(x), PRECISION=precision,
        OUTPUTS=block_n, INPUTS=block_k, ROWS=block_m, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _constants(rule: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in rule.items() if name.isupper()}


def outer_product(delta: Tensor, x: Tensor, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """See `reference.outer_product`; the gradients are float32."""
    weight = torch.empty(delta.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    bias = torch.empty(delta.shape[1], dtype=torch.float32, device=x.device)
    rule = _rule_arguments(SGD(), 0.0, 1)
    _launch_update(delta, x, weight, bias, (weight, weight), (bias, bias), rule, (weight, bias), precision)
    return weight, bias


def outer_product_update_(
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    x: Tensor,
    rule: Rule,
    weight_moments: Moments,
    bias_moments: Moments,
    lr: float | Tensor,
    step: int | Tensor,
    precision: str = "ieee",
    *,
    seed: int | None = None,
    shadow: Tensor | None = None,
) -> None:
    """See `reference.outer_product_update_`; `delta` and `x` may have any strides."""
    _check_state(weight_moments, rule, shadow, weight=weight, bias=bias)
    other = weight if bias is None else bias
    moments = _two(weight_moments, weight), _two(bias_moments, other)
    _launch_update(delta, x, weight, bias, *moments, _rule_arguments(rule, lr, step), None, precision, seed, shadow)


def linear_step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    error: Tensor,
    feedback: Tensor | GeneratedFeedback,
    rule: Rule,
    weight_moments: Moments,
    bias_moments: Moments,
    lr: float | Tensor,
    step: int | Tensor,
    activation: str = "identity",
    scale: float = 1.0,
    precision: str = "ieee",
    *,
    seed: int | None = None,
    shadow: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_step_`: one launch for batches of up to `tiles.STEP_ROWS`, two for larger ones.

    One launch has to read the weight itself for the update, and so makes `h` from it, rounded as the shadow is.
    """
    rows, inputs = x.shape
    if rows > tiles.STEP_ROWS:
        source = weight if shadow is None else shadow
        h, delta = linear_forward(x, source, bias, activation, error, feedback, scale, precision)
        outer_product_update_(
            weight, bias, delta, x, rule, weight_moments, bias_moments, lr, step, precision, seed=seed, shadow=shadow
        )
        return h
    _check_product(x=x, error=error)
    _check_state(weight_moments, rule, shadow, weight=weight, bias=bias)
    outputs = weight.shape[0]
    _check(weight.shape[1] == inputs, f"weight has {weight.shape[1]} inputs and x {inputs}")
    h = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    own = _rule_arguments(rule, lr, step)
    feedback, scale, kind, feedback_seed = _feedback(feedback, error, scale)
    block_m, tile = tiles.step_tile(rows)
    block_n, block_k = tile.blocks
    other = weight if bias is None else bias
    kernels.step_small[(triton.cdiv(outputs, block_n),)](
        x, weight, other, *_two(weight_moments, weight), *_two(bias_moments, other), h, error, feedback,
        weight if shadow is None else shadow, float(scale), feedback_seed,
        own["lr"], own["step"], own["log_beta1"], own["log_beta2"], *_seeds(seed),
        rows, outputs, inputs, error.shape[1], *x.stride(), *error.stride(), *feedback.stride(),
        ACTIVATION=ACTIVATION[activation], HAS_BIAS=bias is not None, **_constants(own),
        SHADOW=shadow is not None, STOCHASTIC=seed is not None and weight.dtype != torch.float32,
        DTYPE=_product_dtype(x), PRECISION=precision,
        ROWS=block_m, OUTPUTS=block_n, INPUTS=block_k, WIDTH=16, GENERATED=kind,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return h


def linear_backward_update_(
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    x: Tensor,
    rule: Rule,
    weight_moments: Moments,
    bias_moments: Moments,
    lr: float | Tensor,
    step: int | Tensor,
    precision: str = "ieee",
    *,
    seed: int | None = None,
    shadow: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_backward_update_`: two launches, in stream order, so that `dx` sees the old weight."""
    input_gradient = linear_forward(delta, (weight if shadow is None else shadow).t(), precision=precision)
    outer_product_update_(
        weight, bias, delta, x, rule, weight_moments, bias_moments, lr, step, precision, seed=seed, shadow=shadow
    )
    return input_gradient


def update_(
    parameter: Tensor,
    gradient: Tensor,
    moments: Moments,
    rule: Rule,
    lr: float | Tensor,
    step: int | Tensor,
    seed: int | None = None,
) -> None:
    """See `reference.update_`, for a parameter of any shape."""
    _check_state(moments, rule, parameter=parameter)
    own, block = _rule_arguments(rule, lr, step), tiles.ELEMENTWISE
    kernels.update_elements[(triton.cdiv(parameter.numel(), block),)](
        parameter, gradient.contiguous(), *_two(moments, parameter),
        own["lr"], own["step"], own["log_beta1"], own["log_beta2"], _seeds(seed)[0], parameter.numel(), **_constants(own),
        STOCHASTIC=seed is not None and parameter.dtype != torch.float32, BLOCK=block,
        enable_fp_fusion=True,
    )  # fmt: skip


def _output(
    a: Tensor, target: Tensor, loss: str, source: str, link: str, rows: Tensor | None = None, index: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`(losses [M], correct [M], gradient [M, C], error [M, C])`; the error is in `rows` instead where those are given."""
    _check_product(a=a, target=target)
    a, target = a.contiguous(), target.contiguous()
    samples, classes = a.shape
    _check(target.shape == a.shape, f"target has shape {list(target.shape)}; needed: {list(a.shape)}")
    _check(classes <= tiles.OUTPUTS, f"a has {classes} columns; at most {tiles.OUTPUTS} fit: use backend 'torch'")
    gradient, error = torch.empty_like(a), torch.empty_like(a) if rows is None else rows
    if rows is not None:
        fits = rows.dim() == 2 and rows.shape[1] == classes and rows.is_contiguous() and index.dtype == torch.int64
        _check(fits, f"rows must be contiguous, of {classes} columns, and index int64; got {list(rows.shape)}, {index.dtype}")
    losses = torch.empty(samples, dtype=torch.float32, device=a.device)
    correct = torch.empty(samples, dtype=torch.int32, device=a.device)
    columns = triton.next_power_of_2(max(classes, 2))
    block = max(1, 1024 // columns)
    triton_output.output[(triton.cdiv(samples, block),)](
        a, target, gradient, error, losses, correct, losses if rows is None else index.contiguous(), samples, classes,
        LOSS=triton_output.LOSS[loss], LINK=triton_output.LINK[link], SOURCE=triton_output.SOURCE[source],
        SCATTER=rows is not None, ROWS=block, COLUMNS=columns, num_warps=4 if columns <= 2048 else 16, enable_fp_fusion=True,
    )  # fmt: skip
    return losses, correct, gradient, error


def output_step(
    a: Tensor,
    target: Tensor,
    loss: str,
    source: str,
    link: str = "auto",
    *,
    rows: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `reference.output_step`; with `rows` the error goes there and nowhere else, and None is returned for it."""
    losses, correct, gradient, error = _output(a, target, loss, source, link, rows, index)
    return losses.mean(), correct.sum(), gradient, error if rows is None else None


def output_error(a: Tensor, target: Tensor, loss: str, source: str, link: str = "auto") -> tuple[Tensor, Tensor]:
    """See `reference.output_error`."""
    return _output(a, target, loss, source, link)[2:]


def with_precision(precision: str) -> SimpleNamespace:
    """These operations with float32 products in another `input_precision`, such as `tf32`."""
    products = (linear_forward, linear_keep, outer_product, outer_product_update_, linear_step_, linear_backward_update_)
    others = (update_, output_step, output_error)
    return SimpleNamespace(
        **{operation.__name__: partial(operation, precision=precision) for operation in products},
        **{operation.__name__: operation for operation in others},
        READS_SHADOWS=False,
    )
