"""A linear layer's kernels: forward with the error signal, weight gradient with the rule, and both in one launch.

What is particular: the rule runs where the gradient tile is formed, in registers, so that no gradient reaches memory; and
in the one-launch step a program owns a block of rows of the weight, reads them, makes `h` and `delta` for the whole batch,
and then updates the rows, which nobody else reads. Weights, moments and feedback are read once and written once: with Adam in
float32 24 bytes a weight, where backpropagation moves 40.

Sizes may be anything: a tile's corner is a 64-bit offset, what lies in the tile 32-bit ones (64-bit ones everywhere would take
the registers that the products need). Rows and columns outside are masked on both sides of every product, for what
lies outside may be NaN. Nothing here is tuned by running it: see `tiles`.
"""

import triton
import triton.language as tl

from .math import activate, apply_rule, random_bits, round_stochastic, scalar, times_slope


@triton.jit
def _load(pointer, mask, dtype: tl.constexpr):
    return tl.load(pointer, mask=mask, other=0.0).to(dtype)


@triton.jit
def _store(parameter, shadow, first, offset, inside, new, seed, step, SHADOW: tl.constexpr, STOCHASTIC: tl.constexpr):
    """New values to a parameter, rounded to its type, and to its copy in half precision where there is one."""
    if STOCHASTIC:
        new = round_stochastic(new, first + offset.to(tl.int64), seed, step)
    tl.store(parameter + first + offset, new.to(parameter.dtype.element_ty), mask=inside)
    if SHADOW:
        tl.store(shadow + first + offset, new.to(shadow.dtype.element_ty), mask=inside)


@triton.jit
def _generated(c, n, units, seed, KIND: tl.constexpr):
    """Entries `[len(c), len(n)]` of a feedback matrix that is not stored: as `generated.GeneratedFeedback.columns`."""
    bits = random_bits(c[:, None].to(tl.int64) * units + n[None, :], seed, 0.0)
    if KIND == 1:
        b = (bits % 3).to(tl.float32) - 1.0
    elif KIND == 2:
        b = (bits & 1).to(tl.float32)
    else:
        b = (bits >> 8).to(tl.float32) / 8388608.0 - 1.0
    return b


@triton.jit
def _project(error, feedback, rows, columns, width, error_m, error_c, feedback_c, feedback_n, first_column, units, seed,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, GENERATED: tl.constexpr, DTYPE: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """`e B` of a tile `[ROWS, COLUMNS]`, of which `rows` and `columns` are left; both pointers are at its corner.

    The error's columns are gone through `WIDTH` at a time. With GENERATED, the kind of its entries, `B` is not read but made.
    """
    signal = tl.zeros((ROWS, COLUMNS), tl.float32)
    m, n, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    e_offset = m[:, None] * error_m + c[None, :] * error_c
    b_offset = c[:, None] * feedback_c + n[None, :] * feedback_n
    for start in range(0, width, WIDTH):
        e = _load(error + e_offset, (m < rows)[:, None] & (c < width - start)[None, :], DTYPE)
        if GENERATED != 0:
            b = _generated(start + c, first_column + n, units, seed, GENERATED).to(DTYPE)  # outside, e is zero
        else:
            b = _load(feedback + b_offset, (c < width - start)[:, None] & (n < columns)[None, :], DTYPE)
            feedback += WIDTH * feedback_c
        signal = tl.dot(e, b, signal, input_precision=PRECISION)
        error += WIDTH * error_c
    return signal


@triton.jit
def _place(blocks_a, blocks_b, GROUP: tl.constexpr):
    """This program's tile `(a, b)`: runs of GROUP along a for each b, so that what neighbours read is still in the cache."""
    program = tl.program_id(0)
    first = program // (GROUP * blocks_b) * GROUP
    size = tl.minimum(blocks_a - first, GROUP)
    within = program % (GROUP * blocks_b)
    return (first + within % size).to(tl.int64), (within // size).to(tl.int64)


@triton.jit(do_not_specialize=["feedback_seed"])
def forward(
    x, weight, bias, h, delta, error, feedback, scale, feedback_seed,
    rows, outputs, inputs, width,
    x_m, x_k, weight_n, weight_k, error_m, error_c, feedback_c, feedback_n,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ERROR: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, GENERATED: tl.constexpr,
):  # fmt: skip
    """`h = phi(x W^T + b)  [rows, outputs]` and, with an error, `delta = scale (e B) * phi'(a)`, both contiguous."""
    block_m, block_n = _place(tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS), 8)
    m0, n0 = block_m * ROWS, block_n * OUTPUTS
    m, n, k = tl.arange(0, ROWS), tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    x += m0 * x_m
    weight += n0 * weight_n
    x_offset = m[:, None] * x_m + k[None, :] * x_k
    weight_offset = k[:, None] * weight_k + n[None, :] * weight_n
    a = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        left = _load(x + x_offset, (m < rows - m0)[:, None] & (k < inputs - start)[None, :], DTYPE)
        right = _load(weight + weight_offset, (k < inputs - start)[:, None] & (n < outputs - n0)[None, :], DTYPE)
        a = tl.dot(left, right, a, input_precision=PRECISION)
        x += INPUTS * x_k
        weight += INPUTS * weight_k
    if HAS_BIAS:
        a += _load(bias + n0 + n, n < outputs - n0, tl.float32)[None, :]
    inside = (m < rows - m0)[:, None] & (n < outputs - n0)[None, :]
    first, offset = m0 * outputs + n0, m[:, None] * outputs + n[None, :]
    out = activate(a, ACTIVATION)
    tl.store(h + first + offset, out.to(h.dtype.element_ty), mask=inside)
    if HAS_ERROR:
        signal = _project(error + m0 * error_m, feedback + n0 * feedback_n, rows - m0, outputs - n0, width,
                          error_m, error_c, feedback_c, feedback_n, n0, outputs, feedback_seed,
                          ROWS, OUTPUTS, WIDTH, GENERATED, DTYPE, PRECISION)  # fmt: skip
        signal = times_slope(scale * signal, a, out, ACTIVATION)
        tl.store(delta + first + offset, signal.to(delta.dtype.element_ty), mask=inside)


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

    The first column of programs also sums `delta` for the bias, in a loop of its own: in the products' loop the sum would
    hold those tiles in registers, which only the tensor cores should see.
    """
    block_n, block_k = _place(tl.cdiv(outputs, OUTPUTS), tl.cdiv(inputs, INPUTS), 8)
    n0, k0 = block_n * OUTPUTS, block_k * INPUTS
    n, k, m = tl.arange(0, OUTPUTS), tl.arange(0, INPUTS), tl.arange(0, ROWS)
    delta += n0 * delta_n
    x += k0 * x_k
    delta_offset = n[:, None] * delta_n + m[None, :] * delta_m
    x_offset = m[:, None] * x_m + k[None, :] * x_k
    tile = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    delta_here = delta
    for start in range(0, rows, ROWS):
        left = _load(delta_here + delta_offset, (n < outputs - n0)[:, None] & (m < rows - start)[None, :], DTYPE)
        right = _load(x + x_offset, (m < rows - start)[:, None] & (k < inputs - k0)[None, :], DTYPE)
        tile = tl.dot(left, right, tile, input_precision=PRECISION)
        delta_here += ROWS * delta_m
        x += ROWS * x_m
    rate, count = scalar(lr, LR_IN_MEMORY), scalar(step, STEP_IN_MEMORY)
    inside = (n < outputs - n0)[:, None] & (k < inputs - k0)[None, :]
    first, offset = n0 * inputs + k0, n[:, None] * inputs + k[None, :]
    if KEEP_GRADIENT:
        tl.store(gradient + first + offset, tile.to(gradient.dtype.element_ty), mask=inside)
    else:
        old = _load(weight + first + offset, inside, tl.float32)
        new = apply_rule(old, tile, weight_m1 + first + offset, weight_m2 + first + offset, inside, rate, count,
                         log_beta1, log_beta2, KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
        _store(weight, shadow, first, offset, inside, new, seed, count, SHADOW, STOCHASTIC)
    if HAS_BIAS and block_k == 0:
        total = tl.zeros((OUTPUTS,), tl.float32)
        for start in range(0, rows, ROWS):
            within = (n < outputs - n0)[:, None] & (m < rows - start)[None, :]
            total += tl.sum(_load(delta + delta_offset, within, tl.float32), 1)
            delta += ROWS * delta_m
        own = n < outputs - n0
        if KEEP_GRADIENT:
            tl.store(bias_gradient + n0 + n, total.to(bias_gradient.dtype.element_ty), mask=own)
        else:
            old_bias = _load(bias + n0 + n, own, tl.float32)
            new_bias = apply_rule(old_bias, total, bias_m1 + n0 + n, bias_m2 + n0 + n, own, rate, count, log_beta1, log_beta2,
                                  KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
            _store(bias, bias, n0, n, own, new_bias, bias_seed, count, False, STOCHASTIC)


@triton.jit(do_not_specialize=["seed", "bias_seed", "feedback_seed"])
def step_small(
    x, weight, bias, weight_m1, weight_m2, bias_m1, bias_m2, h, error, feedback, shadow, scale, feedback_seed,
    lr, step, log_beta1, log_beta2, seed, bias_seed,
    rows, outputs, inputs, width, x_m, x_k, error_m, error_c, feedback_c, feedback_n,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SHADOW: tl.constexpr, STOCHASTIC: tl.constexpr,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, DECAY: tl.constexpr, LR_IN_MEMORY: tl.constexpr, STEP_IN_MEMORY: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, GENERATED: tl.constexpr,
):  # fmt: skip
    """A hidden layer's whole visit for a batch of at most ROWS: this program's rows of W are read, used, updated.

    No barrier is needed: `h` and `delta` of a row of W need only that row, and the first loop is over before the second
    one writes.
    """
    n0 = tl.program_id(0).to(tl.int64) * OUTPUTS
    m, n, k = tl.arange(0, ROWS), tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    first = n0 * inputs
    x_offset = m[:, None] * x_m + k[None, :] * x_k
    weight_offset = k[:, None] + n[None, :] * inputs
    own = n < outputs - n0
    x_here, weight_here = x, weight + first
    a = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        left = _load(x_here + x_offset, (m < rows)[:, None] & (k < inputs - start)[None, :], DTYPE)
        right = _load(weight_here + weight_offset, (k < inputs - start)[:, None] & own[None, :], DTYPE)
        a = tl.dot(left, right, a, input_precision=PRECISION)
        x_here += INPUTS * x_k
        weight_here += INPUTS
    if HAS_BIAS:
        old_bias = _load(bias + n0 + n, own, tl.float32)
        a += old_bias[None, :]
    out = activate(a, ACTIVATION)
    inside_h = (m < rows)[:, None] & own[None, :]
    tl.store(h + n0 + m[:, None] * outputs + n[None, :], out.to(h.dtype.element_ty), mask=inside_h)
    signal = _project(error, feedback + n0 * feedback_n, rows, outputs - n0, width, error_m, error_c, feedback_c, feedback_n,
                      n0, outputs, feedback_seed, ROWS, OUTPUTS, WIDTH, GENERATED, DTYPE, PRECISION)  # fmt: skip
    # Rows beyond the batch have no error, and so no part in the gradient.
    delta = tl.where(inside_h, times_slope(scale * signal, a, out, ACTIVATION), 0.0).to(DTYPE)
    rate, count = scalar(lr, LR_IN_MEMORY), scalar(step, STEP_IN_MEMORY)
    left = tl.trans(delta)
    offset = n[:, None] * inputs + k[None, :]
    tl.debug_barrier()  # every warp has read its part of W before any warp writes
    for start in range(0, inputs, INPUTS):
        right = _load(x + x_offset, (m < rows)[:, None] & (k < inputs - start)[None, :], DTYPE)
        gradient = tl.dot(left, right, input_precision=PRECISION)
        inside = own[:, None] & (k < inputs - start)[None, :]
        old = _load(weight + first + offset, inside, tl.float32)
        new = apply_rule(old, gradient, weight_m1 + first + offset, weight_m2 + first + offset, inside, rate, count,
                         log_beta1, log_beta2, KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
        _store(weight, shadow, first, offset, inside, new, seed, count, SHADOW, STOCHASTIC)
        x += INPUTS * x_k
        first += INPUTS
    if HAS_BIAS:
        total = tl.sum(delta.to(tl.float32), 0)
        new_bias = apply_rule(old_bias, total, bias_m1 + n0 + n, bias_m2 + n0 + n, own, rate, count, log_beta1, log_beta2,
                              KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
        _store(bias, bias, n0, n, own, new_bias, bias_seed, count, False, STOCHASTIC)


@triton.jit(do_not_specialize=["seed"])
def update_elements(
    parameter, gradient, first, second, lr, step, log_beta1, log_beta2, seed, count_elements, STOCHASTIC: tl.constexpr,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, DECAY: tl.constexpr, LR_IN_MEMORY: tl.constexpr, STEP_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rule on any contiguous parameter, from a gradient in memory."""
    corner, offset = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    i = corner + offset
    inside = i < count_elements
    rate, count = scalar(lr, LR_IN_MEMORY), scalar(step, STEP_IN_MEMORY)
    old = _load(parameter + i, inside, tl.float32)
    own = _load(gradient + i, inside, tl.float32)
    new = apply_rule(old, own, first + i, second + i, inside, rate, count, log_beta1, log_beta2,
                     KIND, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECAY)  # fmt: skip
    _store(parameter, parameter, corner, offset, inside, new, seed, count, False, STOCHASTIC)
