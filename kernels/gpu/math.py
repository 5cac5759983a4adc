"""Pieces that the Triton kernels share: activations, their slopes, and the update rules, elementwise on tiles.

Written with `exp`, `sigmoid` and `erf` only, so that the interpreter runs them too. Which activation or rule it is, is a
compile-time constant: a number from the tables below.
"""

import triton
import triton.language as tl

ACTIVATION = {"identity": 0, "tanh": 1, "sigmoid": 2, "relu": 3, "gelu": 4, "gelu-tanh": 5, "silu": 6}

SGD, ADAM, ADAMW = 0, 1, 2


@triton.jit
def tanh(a):
    """`1 - 2 sigmoid(-2a)`; near zero, where that would cancel, the series to a^9."""
    square = a * a
    series = a * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.04, series, 1 - 2 * tl.sigmoid(-2 * a))


@triton.jit
def activate(a, KIND: tl.constexpr):
    """`phi(a)`."""
    if KIND == 1:
        h = tanh(a)
    elif KIND == 2:
        h = tl.sigmoid(a)
    elif KIND == 3:
        h = tl.where(a <= 0, 0.0, a)  # NaN stays NaN
    elif KIND == 4:
        h = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    elif KIND == 5:
        h = a * tl.sigmoid(a * (1.5957691216057308 + 0.07135481627260025 * a * a))  # (1 + tanh z) / 2 is sigmoid 2z
    elif KIND == 6:
        h = a * tl.sigmoid(a)
    else:
        h = a
    return h


@triton.jit
def slope(a, h, KIND: tl.constexpr):
    """`phi'(a)`, with `h = phi(a)` at hand."""
    if KIND == 1:
        out = 1 - h * h
    elif KIND == 2:
        out = h * (1 - h)
    elif KIND == 3:
        out = tl.where(a <= 0, 0.0, 1.0)
    elif KIND == 4:
        normal = 0.3989422804014327 * tl.exp(-0.5 * a * a)
        out = 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * normal
    elif KIND == 5:
        s = tl.sigmoid(a * (1.5957691216057308 + 0.07135481627260025 * a * a))
        out = s * (1 + a * (1 - s) * (1.5957691216057308 + 0.21406444881780073 * a * a))
    elif KIND == 6:
        s = tl.sigmoid(a)
        out = s * (1 + a * (1 - s))
    else:
        out = tl.full(a.shape, 1.0, tl.float32)
    return out


@triton.jit
def scalar(value, FROM_MEMORY: tl.constexpr):
    """A number that came as an argument, or lies in device memory (for CUDA graphs)."""
    return tl.load(value).to(tl.float32) if FROM_MEMORY else value


@triton.jit
def counter(value, FROM_MEMORY: tl.constexpr):
    """As `scalar`, for a whole number."""
    return tl.load(value).to(tl.int64) if FROM_MEMORY else value.to(tl.int64)


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def random_bits(first, offset, seed, step):
    """As `rounding.random_bits`, for the elements `first + offset`, of 64 and 32 bits; in 32 bits but for the carry."""
    low = first.to(tl.uint32) + offset.to(tl.uint32)
    high = (first >> 32).to(tl.uint32) + (low < offset.to(tl.uint32)).to(tl.uint32)
    return _mix(_mix(low ^ seed.to(tl.uint32)) ^ ((step * 0x9E3779B9).to(tl.uint32) + high))


@triton.jit
def cut_to_bfloat16(value, random):
    """As `rounding.cut_to_bfloat16`, by 16 random bits; the result is float32 and fits bfloat16 exactly."""
    bits = value.to(tl.uint32, bitcast=True)
    up = (bits + random) & 0xFFFF0000
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, up.to(tl.float32, bitcast=True), value)


@triton.jit
def one_minus_power(log_beta, step):
    """`1 - beta^step` to full single precision: near zero by the series of `expm1`, where the difference would cancel."""
    z = log_beta * step.to(tl.float32)
    series = 1 + z * (1 / 2 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z * (1 / 720 + z * (1 / 5040 + z / 40320))))))
    return tl.where(z > -0.5, -z * series, 1 - tl.exp(z))


@triton.jit
def _spread(scale, shape: tl.constexpr, BLOCK: tl.constexpr):
    """`[rows, columns]` of `[rows, blocks]`."""
    wide = tl.broadcast_to(tl.expand_dims(scale, 2), (shape[0], shape[1] // BLOCK, BLOCK))
    return tl.reshape(wide, (shape[0], shape[1]))


@triton.jit
def load_moment(moment, scale, mask, known, INT8: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """As `moments.widened`; `moment` and `scale` are pointers to a tile and to its blocks."""
    m = tl.load(moment, mask=mask, other=0).to(tl.float32)
    if INT8:
        m = m * tl.abs(m) * (1 / (LEVELS * LEVELS)) * _spread(tl.load(scale, mask=known, other=0.0), m.shape, BLOCK)
    return m


@triton.jit
def store_moment(moment, scale, mask, known, value, bits, INT8: tl.constexpr, STOCHASTIC: tl.constexpr, LEVELS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """As `moments.narrow_`, by 16 random bits for each element."""
    if INT8:
        size = tl.where(mask, tl.abs(value), 0.0)
        blocks = tl.reshape(size, (value.shape[0], value.shape[1] // BLOCK, BLOCK))
        largest = tl.max(blocks, 2)
        tl.store(scale, largest, mask=known)
        square = size / _spread(tl.maximum(largest, 1.1754943508222875e-38), value.shape, BLOCK) * (LEVELS * LEVELS)
        low = tl.floor(tl.sqrt_rn(square))
        above = (square - low * low) / (2 * low + 1)
        if STOCHASTIC:  # noqa: SIM108
            up = above * 65536 > bits.to(tl.float32)
        else:
            up = above >= 0.5
        q = tl.minimum(low + tl.where(up, 1.0, 0.0), LEVELS)
        if LEVELS == 255:  # noqa: SIM108
            q = tl.maximum(q, tl.where(size > 0, 1.0, 0.0))
        else:
            q = tl.where(value < 0, -q, q)
        tl.store(moment, q.to(tl.int32).to(moment.dtype.element_ty), mask=mask)
    else:
        if STOCHASTIC and moment.dtype.element_ty == tl.bfloat16:
            value = cut_to_bfloat16(value, bits)
        tl.store(moment, value.to(moment.dtype.element_ty), mask=mask)


@triton.jit
def apply_rule(
    weight,
    gradient,
    first,  # pointers to the moments of these elements; not read where the rule keeps none
    second,
    first_scale,  # pointers to the scales of these elements' blocks; not read but for INT8
    second_scale,
    mask,
    known,  # of the scales
    bits,  # 32 random ones for each element, where STOCHASTIC
    lr,
    step,
    decay,
    rest1,  # 1 - beta1, or 1 - momentum
    rest2,
    eps,
    log_beta1,
    log_beta2,
    KIND: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The new weights of a tile, from its gradient; the moments are updated in memory. As `reference.update_`."""
    if KIND == 2:
        weight = weight * (1 - lr * decay)
    else:
        gradient = gradient + decay * weight
    if KIND != 0 or MOMENTUM:
        m = load_moment(first, first_scale, mask, known, INT8, 127, BLOCK)
    if KIND != 0:
        v = load_moment(second, second_scale, mask, known, INT8, 255, BLOCK)
    if INT8:
        tl.debug_barrier()  # every thread has read a block's scale before any writes it
    if KIND == 0:
        if MOMENTUM:
            m = m * (1 - rest1) + gradient
            store_moment(first, first_scale, mask, known, m, bits >> 16, INT8, STOCHASTIC, 127, BLOCK)
            gradient = gradient + (1 - rest1) * m if NESTEROV else m
        weight = weight - lr * gradient
    else:
        m = m * (1 - rest1) + rest1 * gradient
        store_moment(first, first_scale, mask, known, m, bits >> 16, INT8, STOCHASTIC, 127, BLOCK)
        v = v * (1 - rest2) + rest2 * gradient * gradient
        further = _mix(bits ^ 0x5BD1E995) & 0xFFFF
        store_moment(second, second_scale, mask, known, v, further, INT8, STOCHASTIC, 255, BLOCK)
        denominator = tl.sqrt_rn(v / one_minus_power(log_beta2, step)) + eps
        weight = weight - lr / one_minus_power(log_beta1, step) * m / denominator
    return weight


@triton.jit
def learn(
    parameter, first_moment, second_moment, first_scale, second_scale, shadow,  # pointers to the parameter's, at its start
    first, offset, mask, blocks, known,  # the elements `first + offset` and the scales `blocks`, with their masks
    gradient, lr, step, decay, rest1, rest2, eps, log_beta1, log_beta2, seed,
    SHADOW: tl.constexpr, STOCHASTIC: tl.constexpr, KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    INT8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rule on a tile of a parameter, rounded to its type, and to its copy in half precision where there is one."""
    place = first + offset
    old = tl.load(parameter + place, mask=mask, other=0.0).to(tl.float32)
    bits = random_bits(first, offset, seed, step) if STOCHASTIC else offset.to(tl.uint32)
    new = apply_rule(old, gradient, first_moment + place, second_moment + place, first_scale + blocks, second_scale + blocks,
                     mask, known, bits, lr, step, decay, rest1, rest2, eps, log_beta1, log_beta2,
                     KIND, MOMENTUM, NESTEROV, STOCHASTIC, INT8, BLOCK)  # fmt: skip
    if STOCHASTIC and parameter.dtype.element_ty == tl.bfloat16:
        new = cut_to_bfloat16(new, bits & 0xFFFF)
    tl.store(parameter + place, new.to(parameter.dtype.element_ty), mask=mask)
    if SHADOW:
        tl.store(shadow + place, new.to(shadow.dtype.element_ty), mask=mask)
