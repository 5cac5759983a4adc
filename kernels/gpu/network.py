"""Many steps of a whole network in one launch, for networks so small that launches, graph nodes and barriers are what a step
costs.

No hidden layer waits for a later one where its error row is known before the step (F3, DRTP). So a program owns a few rows of
one layer's weight for all steps of the launch, and nobody else writes them. It makes its columns of `h` for a step, counts that
for the layer above, which waits for the count of all of that layer's programs, and updates its rows while the layer above is
still at that step or at an earlier one. `h` has room for every step of the launch, so nobody ever waits for a later layer. The
last layer's programs are the same, but for a softmax, for which they wait for each other. All programs must be on the device at
once (a cooperative launch says so), and they are numbered by layer: one after another, as in the interpreter, they do not wait
at all. A wait ends after `patience` looks in any case: then the outputs are NaN, and `failed` is 1.

What bounds a step of 784-500-10 at batch 50, Adam, float32, on 132 multiprocessors: 78 MFLOP in the first layer, over 125
programs of 4 rows 1568 cycles of FMA a product with all lanes at work (64 rows of which 50 count); `x`, 157 KB, goes to every
multiprocessor, 2450 cycles at 64 bytes each, and comes back from its first-level cache for the update; weights and moments,
38 KB a program, are in that cache or the second-level one. With latencies about 9000 cycles, 5 microseconds, by estimate; an
H100 takes 15 (`bench/results/step-gpu.json`). The last layer's three programs have less to do.

Products are sums of elementwise ones, exact in float32, and not `tl.dot`, whose tiles would be three quarters empty. A thread
holds a few samples, all of the tile's rows of the weight, and 4 inputs: 32 numbers that it adds to, for 6 reads of 16 bytes.
That layout is the load's of `x`, as the one of `W` has fewer elements than there are threads (see `tiles.NetworkTile`).
"""

import triton
import triton.language as tl

from .math import activate, learn, slope

# what the launch says of a layer, in numbers of 64 bits: addresses, inputs / UNIT, outputs, programs of the layer below and own
FIELDS = ("weight", "bias", "weight_m1", "weight_m2", "bias_m1", "bias_m2", "feedback", "below", "out",
          "inputs", "outputs", "needed", "peers")  # fmt: skip


@triton.jit
def _pointer(place):
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _wait(counter, needed, patience, failed):
    """Until all programs of the layer below have counted a step; returns how many more looks this launch may take."""
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while (seen < needed) & (patience > 0):
        seen = tl.atomic_add(counter, 0, sem="acquire")
        patience -= 1
    tl.debug_barrier()
    if seen < needed:
        tl.store(failed, 1)
    return patience


@triton.jit
def _product(x, weight, own, inputs, BATCH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
             UNROLL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`x W^T` `[ROWS, OUTPUTS]` of contiguous `x [BATCH, inputs]` and the first `own` rows of `weight`."""
    m, n, k = tl.arange(0, ROWS)[:, None, None], tl.arange(0, OUTPUTS)[None, :, None], tl.arange(0, INPUTS)[None, None, :]
    x_offset, weight_offset = m * inputs + k, n * inputs + k
    total = tl.zeros((ROWS, OUTPUTS, INPUTS), tl.float32)
    for start in tl.range(0, inputs, INPUTS, loop_unroll_factor=UNROLL, num_stages=STAGES):
        left = tl.load(x + start + x_offset, mask=(m < BATCH) & (k < inputs - start), other=0.0)
        right = tl.load(weight + start + weight_offset, mask=(n < own) & (k < inputs - start), other=0.0)
        total += left * right
    return tl.sum(total, 2)


@triton.jit
def _errors(error, feedback, start, own, width, units, BATCH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    """WIDTH columns of `error [BATCH, width]` and as many rows of `feedback`, its first `own` columns, not multiplied yet."""
    m, n, c = tl.arange(0, ROWS)[:, None, None], tl.arange(0, OUTPUTS)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    e = tl.load(error + start + m * width + c, mask=(m < BATCH) & (c < width - start), other=0.0)
    return e, tl.load(feedback + start * units + c * units + n, mask=(c < width - start) & (n < own), other=0.0)


@triton.jit
def _teach(x, delta, weight, bias, weight_m1, weight_m2, bias_m1, bias_m2, first, own, inputs, delta_row, rate, number,
           decay, rest1, rest2, eps, log_beta1, log_beta2,
           HAS_BIAS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
           UNROLL: tl.constexpr, KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):  # fmt: skip
    """The rule on `own` rows of the weight, and on their bias, from row `first` on: by `delta^T x`, both in memory."""
    n, k = tl.arange(0, OUTPUTS)[:, None], tl.arange(0, INPUTS)[None, :]
    for start in range(0, inputs, INPUTS):
        inside = k < inputs - start
        gradient = tl.zeros((OUTPUTS, INPUTS), tl.float32)
        for m in tl.range(0, BATCH, loop_unroll_factor=UNROLL):
            d = tl.load(delta + m * delta_row + n)
            gradient += d * tl.load(x + start + m * inputs + k, mask=inside, other=0.0)
        learn(weight, weight_m1, weight_m2, weight_m1, weight_m2, weight, first * inputs + start, n * inputs + k,
              (n < own) & inside, n, n < own, gradient, rate, number, decay, rest1, rest2, eps, log_beta1, log_beta2, 0,
              False, False, KIND, MOMENTUM, NESTEROV, False, 32)  # fmt: skip
    if HAS_BIAS:
        n, m = tl.arange(0, OUTPUTS), tl.arange(0, ROWS)[:, None]
        total = tl.sum(tl.load(delta + m * delta_row + n[None, :], mask=m < BATCH, other=0.0), 0)
        learn(bias, bias_m1, bias_m2, bias_m1, bias_m2, bias, first, n, n < own, n, n < own, total,
              rate, number, decay, rest1, rest2, eps, log_beta1, log_beta2, 0,
              False, False, KIND, MOMENTUM, NESTEROV, False, 32)  # fmt: skip


@triton.jit
def _softmax(a, y, classes, ROWS: tl.constexpr, BATCH: tl.constexpr, CLASSES: tl.constexpr):
    """Of each row of `a [BATCH, classes]` in memory: the largest entry, the sum of exponentials below it, and that of `y`."""
    m, c = tl.arange(0, ROWS)[:, None], tl.arange(0, CLASSES)[None, :]
    real = (m < BATCH) & (c < classes)
    all_a = tl.load(a + m * classes + c, mask=real, other=0.0)
    top = tl.max(tl.where(c < classes, all_a, float("-inf")), 1)
    total = tl.sum(tl.where(c < classes, tl.exp(all_a - top[:, None]), 0.0), 1)
    return top[:, None], total[:, None], tl.sum(tl.load(y + m * classes + c, mask=real, other=0.0), 1)[:, None]


@triton.jit(do_not_specialize=["steps", "width", "classes", "patience"])
def network(
    layers, programs, row, target, scratch, counters, failed, lr, step,
    decay, rest1, rest2, eps, log_beta1, log_beta2, scale, steps, last, width, classes, delta_row, patience,
    ACTIVATION: tl.constexpr, LOSS: tl.constexpr, HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIELDS: tl.constexpr, UNIT: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CLASSES: tl.constexpr,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, TAUGHT: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr, UNROLL_ROWS: tl.constexpr,
):  # fmt: skip
    """See `reference.network_steps_`. `layers [layers, FIELDS]`, `programs [programs, 3]`: layer, first row, end, all int64.

    `row [steps, BATCH, width]`, `target [steps, BATCH, classes]`, `lr [steps]`; `step`: the number of the first one.
    `scratch [programs, BATCH, delta_row]`, `counters [layers, steps]` (int32, zero).
    """
    program = tl.program_id(0)
    layer = tl.load(programs + program * 3)
    begin, end = tl.load(programs + program * 3 + 1).to(tl.int32), tl.load(programs + program * 3 + 2).to(tl.int32)
    about = layers + layer * FIELDS
    weight, bias = _pointer(about), _pointer(about + 1)
    weight_m1, weight_m2, bias_m1, bias_m2 = _pointer(about + 2), _pointer(about + 3), _pointer(about + 4), _pointer(about + 5)
    feedback, below, out = _pointer(about + 6), _pointer(about + 7), _pointer(about + 8)
    inputs, outputs = tl.load(about + 9).to(tl.int32) * UNIT, tl.load(about + 10).to(tl.int32)
    needed, peers = tl.load(about + 11).to(tl.int32), tl.load(about + 12).to(tl.int32)
    scratch += program * BATCH * delta_row
    done = counters + layer * steps
    number = tl.load(step).to(tl.int64) - 1  # of the step before
    m, n = tl.arange(0, ROWS)[:, None], tl.arange(0, OUTPUTS)[None, :]
    taught_width = tl.where(layer < last, width, 0)
    elements = BATCH * classes.to(tl.float32)
    for t in range(0, steps):
        if needed > 0:
            patience = _wait(done - steps + t, needed, patience, failed)
        rate, number = tl.load(lr + t), number + 1
        lost = tl.where(patience > 0, 0.0, float("nan"))
        for first in range(begin, end, OUTPUTS):
            own = outputs - first
            inside = (m < BATCH) & (n < own)
            # asked for before the product, so that it is there after it; the last layer has none
            e, b = _errors(row, feedback + first, 0, own, taught_width, outputs, BATCH, ROWS, OUTPUTS, WIDTH)
            a = _product(below, weight + first * inputs, own, inputs, BATCH, ROWS, OUTPUTS, INPUTS, UNROLL, STAGES) + lost
            if HAS_BIAS:
                a += tl.load(bias + first + n, mask=n < own, other=0.0)
            if layer < last:
                h = activate(a, ACTIVATION)
                tl.store(out + first + m * outputs + n, h, mask=inside)
                total = e * b
                for start in range(WIDTH, width, WIDTH):
                    e, b = _errors(row, feedback + first, start, own, width, outputs, BATCH, ROWS, OUTPUTS, WIDTH)
                    total += e * b
                signal = tl.sum(total, 2)
                delta = tl.where(inside, scale * signal * slope(a, h, ACTIVATION), 0.0)
                tl.store(scratch + first - begin + m * delta_row + n, delta, mask=m < BATCH)
            else:
                tl.store(out + first + m * outputs + n, a, mask=inside)
        if layer < last and t > 0:
            tl.atomic_add(done + t - 1, 1, sem="release")  # of the step before: its h has arrived long ago, and nothing stalls
        tl.debug_barrier()  # h and delta, or a, are there, and every thread has read weight and bias
        if layer == last:
            if LOSS == 1:
                tl.atomic_add(done + t, 1, sem="release")
                patience = _wait(done + t, peers, patience, failed)
                top, total, weights = _softmax(out, target, outputs, ROWS, BATCH, CLASSES)
            for first in range(begin, end, OUTPUTS):
                inside = (m < BATCH) & (n < outputs - first)
                a = tl.load(out + first + m * outputs + n, mask=inside, other=0.0)
                y = tl.load(target + first + m * outputs + n, mask=inside, other=0.0)
                if LOSS == 0:
                    gradient = ((1 - y) * tl.sigmoid(a) - y * tl.sigmoid(-a)) / elements  # without the cancellation in p - y
                elif LOSS == 1:
                    gradient = (tl.exp(a - top) / total * weights - y) / BATCH
                else:
                    gradient = 2 * (a - y) / elements
                tl.store(scratch + first - begin + m * delta_row + n, tl.where(inside, gradient, 0.0), mask=m < BATCH)
            tl.debug_barrier()
        for first in range(begin, end, OUTPUTS):
            _teach(below, scratch + first - begin, weight, bias, weight_m1, weight_m2, bias_m1, bias_m2, first, outputs - first,
                   inputs, delta_row, rate, number, decay, rest1, rest2, eps, log_beta1, log_beta2,
                   HAS_BIAS, BATCH, ROWS, OUTPUTS, TAUGHT, UNROLL_ROWS, KIND, MOMENTUM, NESTEROV)  # fmt: skip
        tl.debug_barrier()  # the new weight is there, and every thread has read delta
        below += BATCH * inputs
        out += BATCH * outputs
        row += BATCH * width
        target += BATCH * classes
    if layer < last:
        tl.atomic_add(done + steps - 1, 1, sem="release")
