"""The Triton backend: the operations of `reference`, same names, arguments and results, through the kernels beside this file.

Weights and biases are float32 or bfloat16, moments float32, bfloat16 or int8 with scales; all contiguous, and changed in
place. `x` is float32, float16 or bfloat16, and its type is that of the matrix products (sums are float32). float32 products
are exact (`ieee`) unless `precision="tf32"`. `lr` and `step` are numbers, or scalars in device memory, which are read there: no
launch waits for the host; they, betas, eps and decay are no constants of the compiled kernels. On a CPU the kernels run in
Triton's interpreter (`TRITON_INTERPRET=1`). Raises ValueError, naming the argument, for other types, shapes or devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial, wraps
from inspect import signature
from types import SimpleNamespace
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import eager, reference
from ..generated import KINDS, GeneratedFeedback
from ..moments import BLOCK, is_narrow
from ..rounding import parameter_seed
from ..rules import SGD, State, Update
from . import head as triton_head
from . import linear as kernels
from . import output as triton_output
from . import tiles
from .math import ACTIVATION, ADAM, ADAMW
from .math import SGD as PLAIN

P = ParamSpec("P")
R = TypeVar("R")

READS_SHADOWS = True  # a half-precision copy of the weight makes the forward product faster; torch's converts it anyway
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = {
    torch.float32: triton.language.float32,
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
}

_MOMENTS = {torch.float32}, {torch.bfloat16}, {torch.int8, torch.uint8}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _current(device: torch.device) -> AbstractContextManager:
    """The device as the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _entry(operation: Callable[P, R]) -> Callable[P, R]:
    """What every public operation goes through: its tensors are on one device, and the launch is on that one."""
    names = tuple(signature(operation).parameters)
    if hasattr(reference, operation.__name__):
        reference.explained(operation)
    words = {
        "activation": reference.ACTIVATIONS,
        "loss": reference.LOSSES,
        "source": reference.SOURCES,
        "link": reference.LINKS,
    }
    words = {name: allowed for name, allowed in words.items() if name in names}

    @wraps(operation)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        given = dict(zip(names, arguments, strict=False)) | named
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        first, *others = tensors
        device = tensors[first].device
        _check(_INTERPRETED or device.type != "cpu", f"{first} is on the CPU; the Triton kernels need a CUDA or ROCm device")
        for name in others:
            other = tensors[name].device
            _check(other == device, f"{name} is on {other} and {first} on {device}; the Triton kernels need them on one device")
        for name in words.keys() & given.keys():
            _check(given[name] in words[name], f"{name} {given[name]!r} is unknown; allowed: {', '.join(words[name])}")
        with _current(device):
            return operation(*arguments, **named)

    return run


def _check_state(name: str, parameter: Tensor | None, state: State | None, update: Update) -> None:
    if parameter is None:
        return
    rule, device, shape = update.rule, parameter.device, list(parameter.shape)
    fits = parameter.dtype in (torch.float32, torch.bfloat16) and parameter.is_contiguous()
    _check(fits, f"{name} must be float32 or bfloat16, and contiguous, for the Triton kernels, got {parameter.dtype}")
    _check(state is not None, f"{name} has no state: see new_state")
    buffers = state.moments if state.shadow is None else (*state.moments, state.shadow)
    kinds = {m.dtype for m in state.moments}
    fits = len(state.moments) >= rule.moments and any(kinds <= own for own in _MOMENTS)
    fits &= len(state.scales) == (0 if kinds <= {torch.float32, torch.bfloat16} else len(state.moments))
    fits &= all(s.is_contiguous() and s.device == device for s in state.scales)
    fits &= all(b.is_contiguous() and b.shape == parameter.shape and b.device == device for b in buffers)
    fits &= state.shadow is None or state.shadow.dtype in (torch.float16, torch.bfloat16)
    _check(
        fits,
        f"the state of {name} does not fit: {type(rule).__name__} needs {rule.moments} moments in float32, bfloat16 or int8 "
        f"with scales, and a shadow half precision; all contiguous, of shape {shape}, on {device}: see new_state",
    )
    for what, value in (("lr", update.lr), ("step", update.step)):
        _check(not isinstance(value, Tensor) or value.device == device, f"{what} is not on {device}, where {name} is")


def _check_bias(bias: Tensor | None, outputs: int) -> None:
    fits = bias is None or (bias.shape == (outputs,) and bias.is_contiguous())
    _check(fits, f"bias must be contiguous, of shape {[outputs]}, got {bias is not None and list(bias.shape)}")


@cache
def _roomy(device: torch.device) -> bool:
    """Whether a program on the device can have `tiles.ROOMY` bytes of shared memory."""
    if device.type != "cuda":
        return False
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= tiles.ROOMY


@cache
def _multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; in the interpreter so few that small operands have every tile."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 8 if device.type == "cpu" else 108  # tensors without memory: as an A100


def _descriptors(tile: tiles.Tile, delta: Tensor, x: Tensor) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Of an update's operands, where its tile wants them, the device has them, and rows begin at whole copies of 16 bytes."""
    if not tile.descriptors or any((t.data_ptr() | t.stride(0) * t.element_size()) % 16 for t in (delta, x)):
        return None, None
    if x.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(x.device)[0] < 9):
        return None, None
    outputs, inputs, rows = tile.blocks
    return TensorDescriptor.from_tensor(delta, [rows, outputs]), TensorDescriptor.from_tensor(x, [rows, inputs])


def _in_rows(name: str, tensor: Tensor) -> Tensor:
    """The matrix with contiguous rows, a copy where it has none."""
    _check(tensor.dim() == 2, f"{name} must have two dimensions, got shape {list(tensor.shape)}")
    _check(tensor.dtype in _DTYPES, f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}; use backend 'torch'")
    tensor = tensor if tensor.stride(1) == 1 else tensor.contiguous()
    _check_length(f"the distance of rows in {name}", max(tensor.shape[1], tensor.stride(0)))
    return tensor


def _check_length(name: str, length: int) -> None:
    """Within a tile offsets have 32 bits."""
    _check(length < tiles.STRIDE, f"{name} is {length}; the Triton kernels need less than {tiles.STRIDE}: use backend 'torch'")


def _product_dtype(x: Tensor) -> triton.language.dtype:
    """The interpreter does no arithmetic in bfloat16, so there the products are in float32."""
    return triton.language.float32 if _INTERPRETED else _DTYPES[x.dtype]


def _numbers(update: Update, *states: State | None) -> tuple[object, ...]:
    """What a kernel is not compiled for: learning rate, step, decay, what is left of the betas (or the momentum) to 1, eps, the
    betas' logarithms, and the seed of each state's rounding."""
    lr, step, rule = update.lr, update.step, update.rule
    plain = isinstance(rule, SGD)
    betas = (rule.momentum, 0.0) if plain else rule.betas
    rests = (1.0 - beta for beta in betas)  # taken here: in float32 it would be 1 - 0.999 with an error of 5e-5
    logarithms = (math.log(beta) if beta else -1e4 for beta in betas)  # beta 0: its powers vanish
    unread = update.seed is None
    seeds = (0 if unread or state is None else parameter_seed(update.seed, state.place) for state in states)
    lr, step = lr if isinstance(lr, Tensor) else float(lr), step if isinstance(step, Tensor) else int(step)
    return lr, step, float(rule.weight_decay), *rests, 0.0 if plain else float(rule.eps), *logarithms, *seeds


def _constants(update: Update, state: State, *parameters: Tensor) -> dict[str, object]:
    """What an update's kernel is compiled for: the rule, and how parameters and moments are written."""
    rule = update.rule
    plain = isinstance(rule, SGD)
    return {
        "KIND": PLAIN if plain else ADAMW if rule.decoupled else ADAM,
        "MOMENTUM": plain and rule.momentum != 0,
        "NESTEROV": plain and rule.nesterov,
        "INT8": bool(state.scales),
        "MOMENT_BLOCK": BLOCK,
        "LR_IN_MEMORY": isinstance(update.lr, Tensor),
        "STEP_IN_MEMORY": isinstance(update.step, Tensor),
        "SHADOW": state.shadow is not None,
        "STOCHASTIC": update.seed is not None
        and (is_narrow(state.moments) or any(p.dtype == torch.bfloat16 for p in parameters)),
    }


def _moments(parameter: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
    """Two pointers whatever the rule keeps; those that it does not keep are never followed."""
    return (*(() if state is None else state.moments), parameter, parameter)[:2]


def _scales(parameter: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Likewise."""
    return (*state.scales, parameter, parameter)[:2]


def unit(*lengths: int) -> int:
    """The largest of 16, 8, 4, 2 and 1 that divides all lengths (0 stands for none): see `linear`."""
    return math.gcd(16, *lengths)


class _Sent(NamedTuple):
    """An error and its feedback as a kernel takes them; `kind` is that of entries that the kernel makes, or 0."""

    error: Tensor
    feedback: Tensor
    scale: float
    kind: int = 0
    seed: int = 0
    width: int = 1
    unit: int = 1
    error_row: int = 1
    feedback_row: int = 0


def _sent(error: Tensor | None, feedback: Tensor | GeneratedFeedback | None, scale: float, x: Tensor, outputs: int) -> _Sent:
    if error is None:
        return _Sent(x, x, scale)  # not read
    error = _in_rows("error", error)
    width, shape = error.shape[1], [error.shape[1], outputs]
    _check(len(error) == len(x), f"error has {len(error)} rows and x {len(x)}")
    _check(list(feedback.shape) == shape, f"feedback has shape {list(feedback.shape)}; needed: {shape}")
    along = width, unit(width, error.stride(0)), error.stride(0)
    if isinstance(feedback, GeneratedFeedback):
        return _Sent(error, error, scale * feedback.amplitude, KINDS[feedback.kind], feedback.seed, *along)
    feedback = feedback if feedback.stride(1) == 1 else feedback.contiguous()
    _check_length("the distance of rows in feedback", feedback.stride(0))
    return _Sent(error, feedback, float(scale), 0, 0, *along, feedback.stride(0))


@_entry
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
    """Here: in one launch; the weight may be of a wider type than `x`."""
    x = _in_rows("x", x)
    _check(weight.dim() == 2, f"weight must have two dimensions, got shape {list(weight.shape)}")
    transposed = weight.stride(0) == 1 and weight.stride(1) != 1
    stored = _in_rows("weight", weight.t() if transposed else weight)
    rows, inputs = x.shape
    outputs = weight.shape[0]
    _check(weight.shape[1] == inputs, f"weight has {weight.shape[1]} inputs and x {inputs}")
    _check_length("the number of outputs", outputs)
    _check_bias(bias, outputs)
    h = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    delta = h if error is None else torch.empty_like(h)
    sent = _sent(error, feedback, scale, x, outputs)
    outputs_unit = unit(outputs, sent.feedback_row, stored.stride(0) if transposed else 0)
    inputs_unit = unit(inputs, x.stride(0), 0 if transposed else stored.stride(0))
    half = x.dtype != torch.float32
    curved = activation in tiles.CURVED
    tile = tiles.forward_tile(rows, outputs, half, _roomy(x.device), curved, _multiprocessors(x.device), transposed)
    many = half and not (curved and sent.kind)  # slopes and made entries at once would spill
    block_m, block_n, block_k = tile.blocks
    kernels.forward[(triton.cdiv(outputs, block_n) * triton.cdiv(rows, block_m),)](
        x, stored, stored if bias is None else bias, h, delta, sent.error, sent.feedback, sent.scale, sent.seed,
        rows, outputs // outputs_unit, inputs // inputs_unit, sent.width // sent.unit,
        x.stride(0) // inputs_unit, stored.stride(0) // (outputs_unit if transposed else inputs_unit),
        sent.error_row // sent.unit, sent.feedback_row // outputs_unit,
        ACTIVATION=ACTIVATION[activation], HAS_BIAS=bias is not None, HAS_ERROR=delta is not h, TRANSPOSED=transposed,
        OUTPUTS_UNIT=outputs_unit, INPUTS_UNIT=inputs_unit, WIDTH_UNIT=sent.unit,
        DTYPE=_product_dtype(x), PRECISION=precision,
        ROWS=block_m, OUTPUTS=block_n, INPUTS=block_k, GENERATED=sent.kind,
        WIDTH=tiles.error_columns(sent.width, many, max(block_m, block_n), sent.feedback.is_floating_point() and not sent.kind),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return h if delta is h else (h, delta)


@_entry
def linear_keep(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """See `eager.linear_keep`: the product by the kernel, the activation by torch."""
    return eager.activate(linear_forward(x, weight, bias, precision=precision), activation)


def _launch_update(
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    x: Tensor,
    weight_state: State,
    bias_state: State | None,
    update: Update,
    precision: str,
    keep_gradient: bool = False,
) -> None:
    """The update of weight and bias; with `keep_gradient` they get their gradients instead."""
    delta, x = _in_rows("delta", delta), _in_rows("x", x)
    rows, outputs = delta.shape
    inputs = x.shape[1]
    _check(x.shape[0] == rows, f"delta has {rows} rows and x {x.shape[0]}")
    _check(weight.shape == (outputs, inputs), f"weight has shape {list(weight.shape)}; needed: {[outputs, inputs]}")
    _check_bias(bias, outputs)
    constants = _constants(update, weight_state, weight, weight if bias is None else bias)
    more = 0 if keep_gradient else update.rule.moments + constants["STOCHASTIC"]
    half, room = x.dtype != torch.float32, (_roomy(x.device), _multiprocessors(x.device))
    tile = tiles.update_tile(rows, outputs, inputs, half, more, *room, bool(weight_state.scales))
    block_n, block_k, block_m = tile.blocks
    outputs_unit, inputs_unit = unit(outputs, delta.stride(0)), unit(inputs, x.stride(0))
    other = weight if bias is None else bias
    programs = triton.cdiv(inputs, block_k) * triton.cdiv(outputs, block_n)
    if tile.persistent:
        programs = min(programs, tile.persistent * _multiprocessors(x.device))
    kernels.update[(programs,)](
        weight, other, *_moments(weight, weight_state), *_scales(weight, weight_state), *_moments(other, bias_state), delta, x,
        weight if weight_state.shadow is None else weight_state.shadow,
        *_numbers(update, weight_state, bias_state),
        rows, outputs // outputs_unit, inputs // inputs_unit, delta.stride(0) // outputs_unit, x.stride(0) // inputs_unit,
        *_descriptors(tile, delta, x),
        HAS_BIAS=bias is not None, KEEP_GRADIENT=keep_gradient, **constants,
        OUTPUTS_UNIT=outputs_unit, INPUTS_UNIT=inputs_unit, DTYPE=_product_dtype(x), PRECISION=precision,
        OUTPUTS=block_n, INPUTS=block_k, ROWS=block_m, SLICES=tile.slices, PERSISTENT=tile.persistent > 0,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


@_entry
def outer_product(delta: Tensor, x: Tensor, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """Here: in one launch; the gradients are float32."""
    weight = torch.empty(delta.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    bias = torch.empty(delta.shape[1], dtype=torch.float32, device=x.device)
    nothing = State(())
    _launch_update(weight, bias, delta, x, nothing, nothing, Update(SGD(), 0.0, 1), precision, keep_gradient=True)
    return weight, bias


@_entry
def outer_product_update_(
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    x: Tensor,
    weight_state: State,
    bias_state: State | None,
    update: Update,
    precision: str = "ieee",
) -> None:
    """Here: in one launch; `delta` and `x` may have any strides."""
    _check_state("weight", weight, weight_state, update)
    _check_state("bias", bias, bias_state, update)
    _check(bias is None or bias_state.shadow is None, "a bias has a shadow; the Triton kernels read the bias itself")
    _launch_update(weight, bias, delta, x, weight_state, bias_state, update, precision)


@_entry
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
    *,
    precision: str = "ieee",
) -> Tensor:
    """Here: two launches."""
    shadow = weight if weight_state.shadow is None else weight_state.shadow
    h, delta = linear_forward(x, shadow, bias, activation, error, feedback, scale, precision)
    outer_product_update_(weight, bias, delta, x, weight_state, bias_state, update, precision)
    return h


@_entry
def linear_backward_update_(
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    x: Tensor,
    weight_state: State,
    bias_state: State | None,
    update: Update,
    precision: str = "ieee",
) -> Tensor:
    """Here: two launches, in stream order, so that `dx` sees the old weight."""
    source = weight if weight_state.shadow is None else weight_state.shadow
    input_gradient = linear_forward(delta, source.t(), precision=precision)
    outer_product_update_(weight, bias, delta, x, weight_state, bias_state, update, precision)
    return input_gradient


@_entry
def update_(parameter: Tensor, gradient: Tensor, state: State, update: Update) -> None:
    """Here: in one launch."""
    _check_state("parameter", parameter, state, update)
    _check(gradient.shape == parameter.shape, f"gradient has shape {list(gradient.shape)}; needed: {list(parameter.shape)}")
    rows, columns, block = 1, parameter.numel(), tiles.ELEMENTWISE
    if state.scales:  # by rows, for their blocks are
        rows, columns = len(parameter), parameter[0].numel()
        block = min(block, max(BLOCK, triton.next_power_of_2(columns)))
    kernels.update_elements[(rows * triton.cdiv(columns, block),)](
        parameter, gradient.contiguous(), *_moments(parameter, state), *_scales(parameter, state),
        parameter if state.shadow is None else state.shadow, *_numbers(update, state), columns // unit(columns),
        **_constants(update, state, parameter), UNIT=unit(columns), BLOCK=block, enable_fp_fusion=True,
    )  # fmt: skip


@_entry
def output_step(
    a: Tensor, target: Tensor, loss: str, source: str, link: str = "auto"
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Here: in one launch; losses are float32."""
    a, target = _in_rows("a", a).contiguous(), _in_rows("target", target).contiguous()
    samples, classes = a.shape
    _check(target.shape == a.shape, f"target has shape {list(target.shape)}; needed: {list(a.shape)}")
    gradient, error = torch.empty_like(a), torch.empty_like(a)
    losses = torch.empty(samples, dtype=torch.float32, device=a.device)
    hits = torch.empty(samples, dtype=torch.bool, device=a.device)
    tile = tiles.output_tile(classes)
    triton_output.output[(triton.cdiv(samples, tile.blocks[0]),)](
        a, target, gradient, error, losses, hits, samples, classes // unit(classes),
        LOSS=triton_output.LOSS[loss], LINK=triton_output.LINK[link], SOURCE=triton_output.SOURCE[source],
        UNIT=unit(classes), ROWS=tile.blocks[0], COLUMNS=tile.blocks[1],
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return gradient, error, (losses, hits)


@_entry
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
    precision: str = "ieee",
) -> Tensor:
    """Here: one launch to the gradients, and one for the update; more above `tiles.HEAD_CLASSES`."""
    h, target = _in_rows("h", h), _in_rows("target", target).contiguous()
    samples, units = h.shape
    classes = len(weight)
    _check(weight.shape == (classes, units), f"weight has shape {list(weight.shape)}; needed: {[classes, units]}")
    _check(target.shape == (samples, classes), f"target has shape {list(target.shape)}; needed: {[samples, classes]}")
    if classes > tiles.HEAD_CLASSES:
        own = with_precision(precision)
        return eager.head_step_(h, weight, bias, target, loss, weight_state, bias_state, update, norm, ops=own)
    _check_state("weight", weight, weight_state, update)
    _check_state("bias", bias, bias_state, update)
    _check_bias(bias, classes)
    source = weight if weight_state.shadow is None else weight_state.shadow
    wide = torch.float32 if h.dtype == torch.float16 else h.dtype  # a mean over batch and outputs is too small for float16
    back, gradient = torch.empty_like(h, memory_format=torch.contiguous_format), torch.empty_like(target, dtype=wide)
    normal = torch.empty_like(back, dtype=wide) if norm else h.to(wide)
    block, tile = tiles.head_tile(classes, h.dtype != torch.float32)
    units_unit = unit(units, h.stride(0))
    triton_head.head[(triton.cdiv(samples, tile.blocks[0]),)](
        h, source, source if bias is None else bias, target, normal, gradient, back,
        samples, units // units_unit, classes, h.stride(0) // units_unit,
        LOSS=triton_output.LOSS[loss], NORMALISE=norm, HAS_BIAS=bias is not None, EPS=reference.NORM_EPS, UNIT=units_unit,
        PRECISION=precision, ROWS=tile.blocks[0], CLASSES=block, UNITS=tile.blocks[1],
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    outer_product_update_(weight, bias, gradient, normal, weight_state, bias_state, update, precision)
    return back


def with_precision(precision: str) -> SimpleNamespace:
    """These operations with float32 products in another `input_precision`, such as `tf32`."""
    products = (linear_forward, linear_keep, outer_product, outer_product_update_, linear_step_, linear_backward_update_)
    products += (head_step_,)
    others = (update_, output_step)
    return SimpleNamespace(
        **{operation.__name__: partial(operation, precision=precision) for operation in products},
        **{operation.__name__: operation for operation in others},
        READS_SHADOWS=False,
    )
