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
def round_stochastic(value, first, offset, seed, step):
    """As `rounding.round_stochastic`; the result is float32 and fits bfloat16 exactly."""
    bits = value.to(tl.uint32, bitcast=True)
    up = (bits + (random_bits(first, offset, seed, step) & 0xFFFF)) & 0xFFFF0000
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, up.to(tl.float32, bitcast=True), value)


@triton.jit
def one_minus_power(log_beta, step):
    """`1 - beta^step` to full single precision: near zero by the series of `expm1`, where the difference would cancel."""
    z = log_beta * step.to(tl.float32)
    series = 1 + z * (1 / 2 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z * (1 / 720 + z * (1 / 5040 + z / 40320))))))
    return tl.where(z > -0.5, -z * series, 1 - tl.exp(z))


@triton.jit
def apply_rule(
    weight,
    gradient,
    first,  # pointers to the moments of these elements; not read where the rule keeps none
    second,
    mask,
    lr,
    step,
    log_beta1,
    log_beta2,
    KIND: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    DECAY: tl.constexpr,
):
    """The new weights of a tile, from its gradient; the moments are updated in memory. As `reference.update_`."""
    if KIND == 2:
        weight = weight * (1 - lr * DECAY)
    elif DECAY != 0:
        gradient = gradient + DECAY * weight
    if KIND == 0:
        if MOMENTUM != 0:
            buffer = tl.load(first, mask=mask, other=0.0) * MOMENTUM + gradient
            tl.store(first, buffer, mask=mask)
            gradient = gradient + MOMENTUM * buffer if NESTEROV else buffer
        weight = weight - lr * gradient
    else:
        m = tl.load(first, mask=mask, other=0.0) * BETA1 + (1 - BETA1) * gradient
        tl.store(first, m, mask=mask)
        v = tl.load(second, mask=mask, other=0.0) * BETA2 + (1 - BETA2) * gradient * gradient
        tl.store(second, v, mask=mask)
        denominator = tl.sqrt_rn(v / one_minus_power(log_beta2, step)) + EPS
        weight = weight - lr / one_minus_power(log_beta1, step) * m / denominator
    return weight
