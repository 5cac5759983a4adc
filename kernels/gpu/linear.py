"""A linear layer's kernels: forward with the error signal, and weight gradient with the rule.

What is particular: the rule runs where the gradient tile is formed, in registers, so that no gradient reaches memory. With Adam
in float32 a step moves 28 bytes a weight (read once for `h`; weight and moments read and written once for the update), where
backpropagation moves 40. A step in one launch, whose programs each own some rows of the weight, would move 24; on an H100 it
took longer at the sizes that were compared, for it has fewer programs, and each of them waits for memory more often.

The update goes over its tile a slice of columns at a time, so that weight and moments of a slice, and not of the tile, are in
registers beside the gradient: tiles can be as large as the product wants them (Triton's tutorial on persistent products does
so with its stores).

Rows of every matrix are contiguous; `x_row` is the distance from one row of `x` to the next. Sizes may be anything. Those along
which memory is read come divided by a unit that divides them (16, 8, 4, 2 or 1), and are multiplied by it here: so the compiler
knows that a row of 500 float32 numbers has whole copies of 16 bytes, which it cannot know of a 500. A tile's corner is a 64-bit
offset, what lies in the tile 32-bit ones (64-bit ones everywhere would take the registers that the products need). Rows and
columns outside are masked on both sides of every product, for what lies outside may be NaN. Nothing here is tuned by running
it: see `tiles`.
"""

import triton
import triton.language as tl

from .math import activate, counter, learn, random_bits, scalar, slope

SIZES = ["rows", "outputs", "inputs", "width", "x_row", "weight_row", "delta_row", "error_row", "feedback_row"]
NUMBERS = ["step", "seed", "bias_seed", "feedback_seed"]


@triton.jit
def _load(pointer, mask, dtype: tl.constexpr):
    return tl.load(pointer, mask=mask, other=0.0).to(dtype)


@triton.jit
def _generated(c, first, n, units, seed, KIND: tl.constexpr):
    """Entries `[len(c), len(n)]` of a matrix that is not stored, from column `first` on: see `generated.GeneratedFeedback`."""
    bits = random_bits(c[:, None].to(tl.int64) * units + first, n[None, :], seed, tl.zeros((1, 1), tl.int64))
    if KIND == 1:
        b = (bits % 3).to(tl.float32) - 1.0
    elif KIND == 2:
        b = (bits & 1).to(tl.float32)
    else:
        b = (bits >> 8).to(tl.float32) / 8388608.0 - 1.0
    return b


@triton.jit
def _project(error, feedback, rows, columns, width, error_row, feedback_row, first_column, units, seed,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, GENERATED: tl.constexpr, DTYPE: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """`e B` of a tile `[ROWS, COLUMNS]`, of which `rows` and `columns` are left; both pointers are at its corner.

    The error's columns are gone through `WIDTH` at a time. With GENERATED, the kind of its entries, `B` is not read but made.
    """
    signal = tl.zeros((ROWS, COLUMNS), tl.float32)
    m, n, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    e_offset = m[:, None] * error_row + c[None, :]
    b_offset = c[:, None] * feedback_row + n[None, :]
    for start in range(0, width, WIDTH):
        e = _load(error + e_offset, (m < rows)[:, None] & (c < width - start)[None, :], DTYPE)
        if GENERATED != 0:
            b = _generated(start + c, first_column, n, units, seed, GENERATED).to(DTYPE)  # outside, e is zero
        else:
            b = _load(feedback + b_offset, (c < width - start)[:, None] & (n < columns)[None, :], DTYPE)
            feedback += WIDTH * feedback_row
        signal = tl.dot(e, b, signal, input_precision=PRECISION)
        error += WIDTH
    return signal


@triton.jit
def _place(blocks_a, blocks_b, GROUP: tl.constexpr, program):
    """A program's tile `(a, b)`: runs of GROUP along a for each b, so that what neighbours read is still in the cache."""
    first = program // (GROUP * blocks_b) * GROUP
    size = tl.minimum(blocks_a - first, GROUP)
    within = program % (GROUP * blocks_b)
    return first + within % size, within // size


@triton.jit(do_not_specialize=SIZES + NUMBERS)
def forward(
    x, weight, bias, h, delta, error, feedback, scale, feedback_seed,
    rows, outputs, inputs, width, x_row, weight_row, error_row, feedback_row,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ERROR: tl.constexpr, TRANSPOSED: tl.constexpr,
    OUTPUTS_UNIT: tl.constexpr, INPUTS_UNIT: tl.constexpr, WIDTH_UNIT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, GENERATED: tl.constexpr,
):  # fmt: skip
    """`h = phi(x W^T + b)  [rows, outputs]` and, with an error, `delta = scale (e B) * phi'(a)`, both contiguous.

    With TRANSPOSED the rows in memory, `weight_row` apart, are the columns of `W`.
    """
    outputs, feedback_row = outputs * OUTPUTS_UNIT, feedback_row * OUTPUTS_UNIT
    inputs, x_row = inputs * INPUTS_UNIT, x_row * INPUTS_UNIT
    width, error_row = width * WIDTH_UNIT, error_row * WIDTH_UNIT
    block_m, block_n = _place(tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS), 8, tl.program_id(0))
    m0, n0 = block_m.to(tl.int64) * ROWS, block_n.to(tl.int64) * OUTPUTS
    rows, columns = rows - block_m * ROWS, outputs - block_n * OUTPUTS  # what is left from this corner on
    m, n, k = tl.arange(0, ROWS), tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    x += m0 * x_row
    x_offset = m[:, None] * x_row + k[None, :]
    if TRANSPOSED:
        weight_row = weight_row * OUTPUTS_UNIT
        weight += n0
        weight_offset, weight_step = k[:, None] * weight_row + n[None, :], INPUTS * weight_row
    else:
        weight_row = weight_row * INPUTS_UNIT
        weight += n0 * weight_row
        weight_offset, weight_step = k[:, None] + n[None, :] * weight_row, INPUTS
    a = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        left = _load(x + x_offset, (m < rows)[:, None] & (k < inputs - start)[None, :], DTYPE)
        right = _load(weight + weight_offset, (k < inputs - start)[:, None] & (n < columns)[None, :], DTYPE)
        a = tl.dot(left, right, a, input_precision=PRECISION)
        x += INPUTS
        weight += weight_step
    if HAS_BIAS:
        a += _load(bias + n0 + n, n < columns, tl.float32)[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    first, offset = m0 * outputs + n0, m[:, None] * outputs + n[None, :]
    out = activate(a, ACTIVATION)
    tl.store(h + first + offset, out.to(h.dtype.element_ty), mask=inside)
    if HAS_ERROR:
        of_slope = slope(a, out, ACTIVATION)  # before the product, which then shares the registers with this alone
        signal = _project(error + m0 * error_row, feedback + n0, rows, columns, width, error_row, feedback_row, n0, outputs,
                          feedback_seed, ROWS, OUTPUTS, WIDTH, GENERATED, DTYPE, PRECISION)  # fmt: skip
        tl.store(delta + first + offset, (scale * signal * of_slope).to(delta.dtype.element_ty), mask=inside)


@triton.jit
def _halves(tile):
    """`[rows, columns]` as its left and its right half; what a thread holds of it stays in its registers."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=SIZES + NUMBERS)
def update(
    weight, bias, weight_m1, weight_m2, weight_s1, weight_s2, bias_m1, bias_m2, delta, x, shadow,
    lr, step, decay, rest1, rest2, eps, log_beta1, log_beta2, seed, bias_seed,
    rows, outputs, inputs, delta_row, x_row, delta_tiles, x_tiles,
    HAS_BIAS: tl.constexpr, KEEP_GRADIENT: tl.constexpr, SHADOW: tl.constexpr, STOCHASTIC: tl.constexpr,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, INT8: tl.constexpr, MOMENT_BLOCK: tl.constexpr,
    LR_IN_MEMORY: tl.constexpr, STEP_IN_MEMORY: tl.constexpr,
    OUTPUTS_UNIT: tl.constexpr, INPUTS_UNIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """`W <- rule(W, delta^T x)` and `b <- rule(b, sum delta)`; or, with KEEP_GRADIENT, the two gradients take their places.

    A program has one tile; with PERSISTENT every `programs`-th, in one loop with their products: the operands of the next tile
    are on their way while the rule goes over this one. Without, the loops over tiles have one turn, and leave no trace. The
    operands are fetched by address, or by the descriptors `delta_tiles` and `x_tiles`, tile by tile, where there are any.

    Whoever has a tile of the first column also sums `delta` for the bias, in a loop of its own: in the products' loop the sum
    would hold those tiles in registers, which only the tensor cores should see. Tiles are added up and summed once at the end:
    a sum in the loop is more work, and Triton before 3.9 does not compile it.
    """
    outputs, delta_row = outputs * OUTPUTS_UNIT, delta_row * OUTPUTS_UNIT
    inputs, x_row = inputs * INPUTS_UNIT, x_row * INPUTS_UNIT
    blocks_n, blocks_k = tl.cdiv(outputs, OUTPUTS), tl.cdiv(inputs, INPUTS)
    program, programs = tl.program_id(0), tl.num_programs(0)
    turns = tl.cdiv(blocks_n * blocks_k - program, programs) if PERSISTENT else 1
    if PERSISTENT:
        rate, count = scalar(lr, LR_IN_MEMORY), counter(step, STEP_IN_MEMORY)
    else:
        rate, count = 0.0, tl.full((), 0, tl.int64)  # what a loop sets is known after it only if it was before
    for turn in tl.range(0, turns, flatten=PERSISTENT):
        block_n, block_k = _place(blocks_n, blocks_k, 8, program + turn * programs)
        n0, k0 = block_n.to(tl.int64) * OUTPUTS, block_k.to(tl.int64) * INPUTS
        n, k, m = tl.arange(0, OUTPUTS), tl.arange(0, INPUTS), tl.arange(0, ROWS)
        own, columns = n < outputs - block_n * OUTPUTS, k < inputs - block_k * INPUTS
        corner, x_here = delta + n0, x + k0
        delta_offset = n[:, None] + m[None, :] * delta_row
        x_offset = m[:, None] * x_row + k[None, :]
        tile = tl.zeros((OUTPUTS, INPUTS), tl.float32)
        delta_here = corner
        if x_tiles is None:
            for start in range(0, rows, ROWS):
                left = _load(delta_here + delta_offset, own[:, None] & (m < rows - start)[None, :], DTYPE)
                right = _load(x_here + x_offset, (m < rows - start)[:, None] & columns[None, :], DTYPE)
                tile = tl.dot(left, right, tile, input_precision=PRECISION)
                delta_here += ROWS * delta_row
                x_here += ROWS * x_row
        else:
            for start in range(0, rows, ROWS):  # what lies outside is read as zero
                left = tl.trans(delta_tiles.load([start, block_n * OUTPUTS])).to(DTYPE)
                right = x_tiles.load([start, block_k * INPUTS]).to(DTYPE)
                tile = tl.dot(left, right, tile, input_precision=PRECISION)
        if not PERSISTENT:
            rate, count = scalar(lr, LR_IN_MEMORY), counter(step, STEP_IN_MEMORY)
        if KEEP_GRADIENT:
            inside = own[:, None] & columns[None, :]
            gradient = weight + n0 * inputs + k0 + n[:, None] * inputs + k[None, :]
            tl.store(gradient, tile.to(weight.dtype.element_ty), mask=inside)
        else:
            WIDE: tl.constexpr = INPUTS // SLICES
            parts = (tile,)
            if SLICES > 1:
                parts = _halves(tile)
            if SLICES > 2:
                parts = _halves(parts[0]) + _halves(parts[1])
            if SLICES > 4:
                parts = _halves(parts[0]) + _halves(parts[1]) + _halves(parts[2]) + _halves(parts[3])
            row_blocks, block = tl.cdiv(inputs, MOMENT_BLOCK), tl.arange(0, WIDE // MOMENT_BLOCK if WIDE > MOMENT_BLOCK else 1)
            j = tl.arange(0, WIDE)
            for part in tl.static_range(SLICES):
                column = block_k * INPUTS + part * WIDE
                first = n0 * inputs + column
                block_0 = column // MOMENT_BLOCK
                learn(weight, weight_m1, weight_m2, weight_s1, weight_s2, shadow,
                      first, n[:, None] * inputs + j[None, :], own[:, None] & (j < inputs - column)[None, :],
                      (n0 + n)[:, None] * row_blocks + block_0 + block[None, :],
                      own[:, None] & (block < row_blocks - block_0)[None, :],
                      parts[part], rate, count, decay, rest1, rest2, eps, log_beta1, log_beta2, seed,
                      SHADOW, STOCHASTIC, KIND, MOMENTUM, NESTEROV, INT8, MOMENT_BLOCK)  # fmt: skip
    if HAS_BIAS:
        for turn in tl.range(0, turns):
            block_n, block_k = _place(blocks_n, blocks_k, 8, program + turn * programs)
            if block_k == 0:
                n0 = block_n.to(tl.int64) * OUTPUTS
                n, m = tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
                own, delta_here = n < outputs - block_n * OUTPUTS, delta + n0
                delta_offset = n[:, None] + m[None, :] * delta_row
                sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
                for start in range(0, rows, ROWS):
                    sums += _load(delta_here + delta_offset, own[:, None] & (m < rows - start)[None, :], tl.float32)
                    delta_here += ROWS * delta_row
                total = tl.sum(sums, 1)
                if KEEP_GRADIENT:
                    tl.store(bias + n0 + n, total.to(bias.dtype.element_ty), mask=own)
                else:
                    learn(bias, bias_m1, bias_m2, bias_m1, bias_m2, bias, n0, n, own, n, own, total,
                          rate, count, decay, rest1, rest2, eps, log_beta1, log_beta2, bias_seed,
                          False, STOCHASTIC, KIND, MOMENTUM, NESTEROV, False, MOMENT_BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["columns", *NUMBERS])
def update_elements(
    parameter, gradient, first_moment, second_moment, first_scale, second_scale, shadow,
    lr, step, decay, rest1, rest2, eps, log_beta1, log_beta2, seed, columns,
    SHADOW: tl.constexpr, STOCHASTIC: tl.constexpr,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, INT8: tl.constexpr, MOMENT_BLOCK: tl.constexpr,
    LR_IN_MEMORY: tl.constexpr, STEP_IN_MEMORY: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rule on any contiguous parameter `[rows, columns]`, from a gradient in memory; a program has a part of a row."""
    columns = columns * UNIT
    parts = tl.cdiv(columns, BLOCK)
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    offset, block = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK // MOMENT_BLOCK)[None, :]
    corner = row.to(tl.int64) * columns + part.to(tl.int64) * BLOCK
    inside = offset < columns.to(tl.int64) - part.to(tl.int64) * BLOCK
    row_blocks, block_0 = tl.cdiv(columns, MOMENT_BLOCK), part * (BLOCK // MOMENT_BLOCK)
    blocks, known = row.to(tl.int64) * row_blocks + block_0 + block, block < row_blocks - block_0
    learn(parameter, first_moment, second_moment, first_scale, second_scale, shadow, corner, offset, inside, blocks, known,
          _load(gradient + corner + offset, inside, tl.float32), scalar(lr, LR_IN_MEMORY), counter(step, STEP_IN_MEMORY),
          decay, rest1, rest2, eps, log_beta1, log_beta2, seed,
          SHADOW, STOCHASTIC, KIND, MOMENTUM, NESTEROV, INT8, MOMENT_BLOCK)  # fmt: skip
