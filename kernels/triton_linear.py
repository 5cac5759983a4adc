"""A linear layer's kernels: forward with the error signal, weight gradient with the rule, and both in one launch.

What is particular: the rule runs where the gradient tile is formed, in registers, so that no gradient reaches memory; and
in the one-launch step a program owns a block of rows of the weight, reads them, makes `h` and `delta` for the whole batch,
and then updates the rows, which nobody else reads. Weights, moments and feedback are read once and written once: with Adam in
float32 24 bytes a weight, where backpropagation moves 40.

Sizes may be anything; offsets are 64-bit. Rows and columns outside are masked on both sides of every product, for what
lies outside may be NaN. Nothing here is tuned by running it: see `tiles`.
"""

import triton
import triton.language as tl

from .triton_math import activate, apply_rule, round_stochastic, scalar, times_slope


@triton.jit
def _load(pointer, mask, dtype: tl.constexpr):
    return tl.load(pointer, mask=mask, other=0.0).to(dtype)


@triton.jit
def _store(parameter, shadow, place, inside, new, seed, step, SHADOW: tl.constexpr, STOCHASTIC: tl.constexpr):
    """New values to a parameter, rounded to its type, and to its copy in half precision where there is one."""
    if STOCHASTIC:
        new = round_stochastic(new, place, seed, step)
    tl.store(parameter + place, new.to(parameter.dtype.element_ty), mask=inside)
    if SHADOW:
        tl.store(shadow + place, new.to(shadow.dtype.element_ty), mask=inside)


@triton.jit
def _project(error, feedback, row, column, rows, outputs, width, error_m, error_c, feedback_c, feedback_n,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """`e B` of a tile `[ROWS, COLUMNS]`; the error's columns are gone through `WIDTH` at a time."""
    signal = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, WIDTH):
        c = start + tl.arange(0, WIDTH).to(tl.int64)
        e_inside = (row < rows)[:, None] & (c < width)[None, :]
        b_inside = (c < width)[:, None] & (column < outputs)[None, :]
        e = _load(error + row[:, None] * error_m + c[None, :] * error_c, e_inside, DTYPE)
        b = _load(feedback + c[:, None] * feedback_c + column[None, :] * feedback_n, b_inside, DTYPE)
        signal = tl.dot(e, b, signal, input_precision=PRECISION)
    return signal


@triton.jit
def forward(
    x, weight, bias, h, delta, error, feedback, scale,
    rows, outputs, inputs, width,
    x_m, x_k, weight_n, weight_k, error_m, error_c, feedback_c, feedback_n,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ERROR: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`h = phi(x W^T + b)  [rows, outputs]` and, with an error, `delta = scale (e B) * phi'(a)`, both contiguous."""
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    a = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        k = start + tl.arange(0, INPUTS).to(tl.int64)
        left = _load(x + m[:, None] * x_m + k[None, :] * x_k, (m < rows)[:, None] & (k < inputs)[None, :], DTYPE)
        within = (k < inputs)[:, None] & (n < outputs)[None, :]
        right = _load(weight + k[:, None] * weight_k + n[None, :] * weight_n, within, DTYPE)
        a = tl.dot(left, right, a, input_precision=PRECISION)
    if HAS_BIAS:
        a += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (m < rows)[:, None] & (n < outputs)[None, :]
    place = m[:, None] * outputs + n[None, :]
    out = activate(a, ACTIVATION)
    tl.store(h + place, out.to(h.dtype.element_ty), mask=inside)
    if HAS_ERROR:
        signal = _project(error, feedback, m, n, rows, outputs, width, error_m, error_c, feedback_c, feedback_n,
                          ROWS, OUTPUTS, WIDTH, DTYPE, PRECISION)  # fmt: skip
        signal = times_slope(scale * signal, a, out, ACTIVATION)
        tl.store(delta + place, signal.to(delta.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "bias_seed"])
def update(
    weight, bias, weight_m1, weight_m2, bias_m1, bias_m2, delta, x, gradient, bias_gradient, shadow,
    lr, step, log_beta1, log_beta2, seed, bias_seed,
    rows, outputs, inputs, delta_m, delta_n, x_m, x_k,
    HAS_BIAS: tl.constexpr, KEEP_GRADIENT: tl.constexpr, SHADOW: tl.constexpr, STOCHASTIC: tl.constexpr,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, DECAY: tl.constexpr, LR_IN_MEMORY: tl.constexpr, STEP_IN_MEMORY: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`W <- rule(W, delta^T x)` and `b <- rule(b, sum delta)`; or, with KEEP_GRADIENT, the two gradients are written.

    The first column of programs also sums `delta` for the bias: it reads those tiles anyway.
    """
    n = tl.program_id(1).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.program_id(0).to(tl.int64) * INPUTS + tl.arange(0, INPUTS)
    gradient_tile = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    total = tl.zeros((OUTPUTS,), tl.float32)
    for start in range(0, rows, ROWS):
        m = start + tl.arange(0, ROWS).to(tl.int64)
        left = _load(delta + n[:, None] * delta_n + m[None, :] * delta_m, (n < outputs)[:, None] & (m < rows)[None, :], DTYPE)
        right = _load(x + m[:, None] * x_m + k[None, :] * x_k, (m < rows)[:, None] & (k < inputs)[None, :], DTYPE)
        gradient_tile = tl.dot(left, right, gradient_tile, input_precision=PRECISION)
        if HAS_BIAS:
            total += tl.sum(left.to(tl.float32), 1)
    inside = (n < outputs)[:, None] & (k < inputs)[None, :]
    place = n[:, None] * inputs + k[None, :]
    own = n + tl.program_id(0).to(tl.int64) * outputs < outputs  # the bias belongs to the first column of programs
    if KEEP_GRADIENT:
        tl.store(gradient + place, gradient_tile.to(gradient.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            tl.store(bias_gradient + n, total.to(bias_gradient.dtype.element_ty), mask=own)
    else:
        rate, count = scalar(lr, LR_IN_MEMORY), scalar(step, STEP_IN_MEMORY)
        old = _load(weight + place, inside, tl.float32)
        new = apply_rule(old, gradient_tile, weight_m1 + place, weight_m2 + place, inside, rate, count, log_beta1, log_beta2,
                         KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
        _store(weight, shadow, place, inside, new, seed, count, SHADOW, STOCHASTIC)
        if HAS_BIAS:
            old_bias = _load(bias + n, own, tl.float32)
            new_bias = apply_rule(old_bias, total, bias_m1 + n, bias_m2 + n, own, rate, count, log_beta1, log_beta2,
                                  KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
            _store(bias, bias, n, own, new_bias, bias_seed, count, False, STOCHASTIC)


@triton.jit(do_not_specialize=["seed", "bias_seed"])
def step_small(
    x, weight, bias, weight_m1, weight_m2, bias_m1, bias_m2, h, error, feedback, shadow, scale,
    lr, step, log_beta1, log_beta2, seed, bias_seed,
    rows, outputs, inputs, width, x_m, x_k, error_m, error_c, feedback_c, feedback_n,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SHADOW: tl.constexpr, STOCHASTIC: tl.constexpr,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, DECAY: tl.constexpr, LR_IN_MEMORY: tl.constexpr, STEP_IN_MEMORY: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A hidden layer's whole visit for a batch of at most ROWS: this program's rows of W are read, used, updated.

    No barrier is needed: `h` and `delta` of a row of W need only that row, and the first loop is over before the second
    one writes.
    """
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.arange(0, ROWS).to(tl.int64)
    a = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        k = start + tl.arange(0, INPUTS).to(tl.int64)
        left = _load(x + m[:, None] * x_m + k[None, :] * x_k, (m < rows)[:, None] & (k < inputs)[None, :], DTYPE)
        right = _load(weight + n[None, :] * inputs + k[:, None], (k < inputs)[:, None] & (n < outputs)[None, :], DTYPE)
        a = tl.dot(left, right, a, input_precision=PRECISION)
    if HAS_BIAS:
        old_bias = _load(bias + n, n < outputs, tl.float32)
        a += old_bias[None, :]
    out = activate(a, ACTIVATION)
    inside_h = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(h + m[:, None] * outputs + n[None, :], out.to(h.dtype.element_ty), mask=inside_h)
    signal = _project(error, feedback, m, n, rows, outputs, width, error_m, error_c, feedback_c, feedback_n,
                      ROWS, OUTPUTS, WIDTH, DTYPE, PRECISION)  # fmt: skip
    # Rows beyond the batch have no error, and so no part in the gradient.
    delta = tl.where(inside_h, times_slope(scale * signal, a, out, ACTIVATION), 0.0).to(DTYPE)
    rate, count = scalar(lr, LR_IN_MEMORY), scalar(step, STEP_IN_MEMORY)
    left = tl.trans(delta)
    tl.debug_barrier()  # every warp has read its part of W before any warp writes
    for start in range(0, inputs, INPUTS):
        k = start + tl.arange(0, INPUTS).to(tl.int64)
        right = _load(x + m[:, None] * x_m + k[None, :] * x_k, (m < rows)[:, None] & (k < inputs)[None, :], DTYPE)
        gradient = tl.dot(left, right, input_precision=PRECISION)
        inside = (n < outputs)[:, None] & (k < inputs)[None, :]
        place = n[:, None] * inputs + k[None, :]
        old = _load(weight + place, inside, tl.float32)
        new = apply_rule(old, gradient, weight_m1 + place, weight_m2 + place, inside, rate, count, log_beta1, log_beta2,
                         KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
        _store(weight, shadow, place, inside, new, seed, count, SHADOW, STOCHASTIC)
    if HAS_BIAS:
        total = tl.sum(delta.to(tl.float32), 0)
        new_bias = apply_rule(old_bias, total, bias_m1 + n, bias_m2 + n, n < outputs, rate, count, log_beta1, log_beta2,
                              KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
        _store(bias, bias, n, n < outputs, new_bias, bias_seed, count, False, STOCHASTIC)


@triton.jit(do_not_specialize=["seed"])
def update_elements(
    parameter, gradient, first, second, lr, step, log_beta1, log_beta2, seed, count_elements, STOCHASTIC: tl.constexpr,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, DECAY: tl.constexpr, LR_IN_MEMORY: tl.constexpr, STEP_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rule on any contiguous parameter, from a gradient in memory."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count_elements
    rate, count = scalar(lr, LR_IN_MEMORY), scalar(step, STEP_IN_MEMORY)
    old = _load(parameter + i, inside, tl.float32)
    own = _load(gradient + i, inside, tl.float32)
    new = apply_rule(old, own, first + i, second + i, inside, rate, count, log_beta1, log_beta2,
                     KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
    _store(parameter, parameter, i, inside, new, seed, count, False, STOCHASTIC)
