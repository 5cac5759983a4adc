"""The last layer's end in one launch: the gradient at its pre-activation, the error row, and a loss and a hit for each sample.

A program takes a few samples with all their outputs, some columns at a time, so that a softmax needs nobody else and any number
of outputs fits. It goes over them once for what has to be known of a whole row (for a softmax the largest entry and the sum of
exponentials, corrected whenever a larger one comes: arXiv 1805.02867), and once more to write.
"""

import triton
import triton.language as tl

LOSS = {"bce": 0, "cross-entropy": 1, "mse": 2}
LINK = {"auto": 0, "identity": 1, "sigmoid": 2, "softmax": 3}
SOURCE = {"delayed-error": 0, "current-error": 0, "current-error-sign": 1, "delayed-loss": 2, "target": 3, "none": 4}


@triton.jit
def _both(a, target, place, inside):
    pre = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
    return pre, tl.load(target + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _linked(pre, top, total, LOSS: tl.constexpr, LINK: tl.constexpr):
    """`z = link(output)`, the output as the loss sees it; `top` and `total` are those of the output's softmax."""
    seen = tl.sigmoid(pre) if LOSS == 0 else pre
    if LINK == 2:
        z = tl.sigmoid(seen)
    elif LINK == 3:
        z = tl.exp(seen - top[:, None]) / total[:, None]
    else:
        z = seen
    return z


@triton.jit
def _gradient_at_link(z, y, total, weight, samples, elements, LOSS: tl.constexpr):
    """The loss's gradient at `z` in the place of the output, where there is a link; `total` is of the exponentials of `z`."""
    if LOSS == 0:
        gradient = (z - y) / tl.maximum(z * (1 - z), 1e-12) / elements
    elif LOSS == 1:
        gradient = (tl.exp(z) / total[:, None] * weight[:, None] - y) / samples
    else:
        gradient = 2 * (z - y) / elements
    return gradient


@triton.jit(do_not_specialize=["samples", "classes"])
def output(
    a, target, gradient, error, loss, hit, samples, classes,
    LOSS: tl.constexpr, LINK: tl.constexpr, SOURCE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All tensors contiguous: `a`, `target`, `gradient`, `error` `[samples, classes]`; `loss`, `hit` `[samples]`.

    `classes` comes divided by UNIT, as in `linear`. Sums over columns are sums of tiles, summed once after the loop.
    """
    classes = classes * UNIT
    m, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    own = m < samples
    row = m[:, None] * classes + c[None, :]
    elements = samples.to(tl.float32) * classes
    SOFTMAX: tl.constexpr = LOSS == 1 or LINK == 3

    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    best, guess = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.int32)
    best_answer, answer = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.int32)
    losses, weights = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, classes, COLUMNS):
        inside = own[:, None] & (c < classes - start)[None, :]
        pre, y = _both(a, target, row + start, inside)
        if SOFTMAX:
            seen = tl.where(inside, tl.sigmoid(pre) if LOSS == 0 else pre, float("-inf"))
            higher = tl.maximum(top, tl.max(seen, 1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(seen - higher[:, None]), 1)
            top = higher
        if LOSS == 0:
            # softplus(a) - y a, without overflow; the series of log(1 + e) where 1 + e would lose e
            e = tl.exp(-tl.abs(pre))
            log_one_plus = tl.where(e < 0.01, e * (1 - e * (1 / 2 - e * (1 / 3 - e / 4))), tl.log(1 + e))
            losses += tl.where(inside, tl.maximum(pre, 0.0) + log_one_plus - y * pre, 0.0)
        elif LOSS == 1:
            weights += y
        else:
            losses += (pre - y) * (pre - y)
        largest, place = tl.max(tl.where(inside, pre, float("-inf")), 1, return_indices=True)
        guess, best = tl.where(largest > best, start + place, guess), tl.maximum(best, largest)
        largest, place = tl.max(tl.where(inside, y, float("-inf")), 1, return_indices=True)
        answer, best_answer = tl.where(largest > best_answer, start + place, answer), tl.maximum(best_answer, largest)
    weight = tl.sum(weights, 1)
    tl.store(hit + m, guess == answer, mask=own)

    # Only for the loss of a linked output: the softmax of `z` in [0, 1], and the part of a softmax's derivative along `z`.
    link_total, along = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if SOURCE == 2 and LOSS == 1 and LINK >= 2:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, classes, COLUMNS):
            inside = own[:, None] & (c < classes - start)[None, :]
            pre, y = _both(a, target, row + start, inside)
            sums += tl.where(inside, tl.exp(_linked(pre, top, total, LOSS, LINK)), 0.0)
        link_total = tl.sum(sums, 1)
    if SOURCE == 2 and LINK == 3:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, classes, COLUMNS):
            inside = own[:, None] & (c < classes - start)[None, :]
            pre, y = _both(a, target, row + start, inside)
            z = _linked(pre, top, total, LOSS, LINK)
            sums += tl.where(inside, z * _gradient_at_link(z, y, link_total, weight, samples, elements, LOSS), 0.0)
        along = tl.sum(sums, 1)

    for start in range(0, classes, COLUMNS):
        inside = own[:, None] & (c < classes - start)[None, :]
        pre, y = _both(a, target, row + start, inside)
        if LOSS == 0:
            prediction, rest = tl.sigmoid(pre), tl.sigmoid(-pre)  # rest: 1 - prediction, without its cancellation
            residual = y * rest - (1 - y) * prediction  # y - prediction, likewise
            slope = -residual / elements
        elif LOSS == 1:
            shifted = pre - top[:, None]
            prediction = tl.exp(shifted) / total[:, None]
            residual = y - prediction
            slope = (prediction * weight[:, None] - y) / samples
            losses += y * (tl.log(total)[:, None] - shifted)
        else:
            residual = y - pre
            slope = -2 * residual / elements
        tl.store(gradient + row + start, slope.to(gradient.dtype.element_ty), mask=inside)
        if SOURCE == 0 or SOURCE == 1:
            e = residual if LINK == 0 else y - _linked(pre, top, total, LOSS, LINK)
            if SOURCE == 1:
                e = tl.where(e > 0, 1.0, 0.0) - tl.where(e < 0, 1.0, 0.0)
        elif SOURCE == 2:
            if LINK < 2:
                e = residual / tl.maximum(prediction * rest, 1e-12) / elements if LOSS == 0 else -slope
            else:
                z = _linked(pre, top, total, LOSS, LINK)
                e = -_gradient_at_link(z, y, link_total, weight, samples, elements, LOSS)
                e = e * z * (1 - z) if LINK == 2 else z * (e + along[:, None])
        elif SOURCE == 3:
            e = y
        else:
            e = tl.zeros_like(y)
        tl.store(error + row + start, e.to(error.dtype.element_ty), mask=inside)
    by_sample = tl.sum(losses, 1)
    tl.store(loss + m, by_sample if LOSS == 1 else by_sample / classes, mask=own)
