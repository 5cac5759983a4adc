"""The reading of a stage's output in one launch: a normalisation, a small linear layer, its loss, and the gradient back.

A program takes a few rows with all their units, some columns at a time, and all classes at once. It goes over the rows once for
the products, after two passes for mean and deviation where it normalises, and once more to write the gradient: what a layer
normalisation needs of whole rows there, sums of the gradient along ones and along the normalised row, follows from products
of `[rows, classes]` that are known by then.
"""

import triton
import triton.language as tl


@triton.jit
def _gradient(z, y, known, samples, elements, LOSS: tl.constexpr):
    """The mean loss's gradient at `z`, as `reference.loss_gradient`; `known`: columns that are classes."""
    if LOSS == 0:
        g = ((1 - y) * tl.sigmoid(z) - y * tl.sigmoid(-z)) / elements  # without the cancellation of `sigmoid(z) - y`
    elif LOSS == 1:
        seen = tl.where(known, z, float("-inf"))
        shifted = tl.exp(seen - tl.max(seen, 1)[:, None])
        g = (shifted / tl.sum(shifted, 1)[:, None] * tl.sum(y, 1)[:, None] - y) / samples
    else:
        g = 2 * (z - y) / elements
    return g


@triton.jit(do_not_specialize=["samples", "units", "classes", "h_row"])
def head(
    h, weight, bias, target, normal, gradient, back, samples, units, classes, h_row,
    LOSS: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr, EPS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`h [samples, units]` has rows `h_row` apart; `weight [classes, units]`, `target` and `gradient [samples, classes]`, and
    `normal` and `back [samples, units]` are contiguous. `normal` is written where it normalises only.

    `units` and `h_row` come divided by UNIT, as in `linear`. All arithmetic is in float32.
    """
    units, h_row = units * UNIT, h_row * UNIT
    m, c, k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, CLASSES), tl.arange(0, UNITS)
    own, known = m < samples, c < classes
    rows, written = h + m[:, None] * h_row + k[None, :], m[:, None] * units + k[None, :]
    columns = weight + c[:, None] * units + k[None, :]

    mean, scale = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    if NORMALISE:
        sums = tl.zeros((ROWS, UNITS), tl.float32)
        for start in range(0, units, UNITS):
            inside = own[:, None] & (k < units - start)[None, :]
            sums += tl.load(rows + start, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(sums, 1) / units
        sums = tl.zeros((ROWS, UNITS), tl.float32)
        for start in range(0, units, UNITS):
            inside = own[:, None] & (k < units - start)[None, :]
            distance = tl.load(rows + start, mask=inside, other=0.0).to(tl.float32) - mean[:, None]
            sums += tl.where(inside, distance * distance, 0.0)
        scale = tl.rsqrt(tl.sum(sums, 1) / units + EPS)

    z, ones = tl.zeros((ROWS, CLASSES), tl.float32), tl.zeros((CLASSES,), tl.float32)
    for start in range(0, units, UNITS):
        there = (k < units - start)[None, :]
        inside = own[:, None] & there
        n = tl.load(rows + start, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(columns + start, mask=known[:, None] & there, other=0.0).to(tl.float32)
        if NORMALISE:
            n = tl.where(inside, (n - mean[:, None]) * scale[:, None], 0.0)
            tl.store(normal + written + start, n.to(normal.dtype.element_ty), mask=inside)
            ones += tl.sum(w, 1)
        z = tl.dot(n, tl.trans(w), z, input_precision=PRECISION)
    product = z
    if HAS_BIAS:
        z += tl.load(bias + c, mask=known, other=0.0).to(tl.float32)[None, :]
    place, real = m[:, None] * classes + c[None, :], own[:, None] & known[None, :]
    y = tl.load(target + place, mask=real, other=0.0).to(tl.float32)
    g = _gradient(z, y, known[None, :], samples.to(tl.float32), samples.to(tl.float32) * classes, LOSS)
    g = tl.where(real, g, 0.0)
    tl.store(gradient + place, g.to(gradient.dtype.element_ty), mask=real)

    along_ones, along_normal = tl.sum(g * ones[None, :], 1) / units, tl.sum(g * product, 1) / units
    for start in range(0, units, UNITS):
        there = (k < units - start)[None, :]
        inside = own[:, None] & there
        w = tl.load(columns + start, mask=known[:, None] & there, other=0.0).to(tl.float32)
        d = tl.dot(g, w, input_precision=PRECISION)
        if NORMALISE:
            n = (tl.load(rows + start, mask=inside, other=0.0).to(tl.float32) - mean[:, None]) * scale[:, None]
            d = (d - along_ones[:, None] - n * along_normal[:, None]) * scale[:, None]
        tl.store(back + written + start, d.to(back.dtype.element_ty), mask=inside)
