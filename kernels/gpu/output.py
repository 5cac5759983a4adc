"""The last layer's end in one launch: loss, correct answers, the gradient at its pre-activation, and the error row.

A program takes a few samples with all their outputs, so that a softmax needs nobody else. Losses and hits are written a sample
each and summed by torch, in a fixed order.
"""

import triton
import triton.language as tl

LOSS = {"bce": 0, "cross-entropy": 1, "mse": 2}
LINK = {"auto": 0, "identity": 1, "sigmoid": 2, "softmax": 3}
SOURCE = {"delayed-error": 0, "current-error": 0, "current-error-sign": 1, "delayed-loss": 2, "target": 3, "none": 4}


@triton.jit
def _softmax(z, inside):
    z = tl.where(inside, z, float("-inf"))
    e = tl.exp(z - tl.max(z, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def output(
    a, target, gradient, error, loss, correct, index, samples, classes,
    LOSS: tl.constexpr, LINK: tl.constexpr, SOURCE: tl.constexpr, SCATTER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All tensors contiguous: `a`, `target`, `gradient`, `error` `[samples, classes]`; `loss`, `correct` `[samples]`.

    With SCATTER, `error` is the error store's tensor, and sample `m` has its row `index[m]`.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS).to(tl.int64)
    inside = (m < samples)[:, None] & (c < classes)[None, :]
    place = m[:, None] * classes + c[None, :]
    pre = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(target + place, mask=inside, other=0.0).to(tl.float32)
    elements = 1.0 * samples * classes  # not `samples.to`: the compiler makes a plain number of a 1

    # The loss, its gradient at the pre-activation, and the prediction that belongs to the loss.
    if LOSS == 0:
        prediction = tl.sigmoid(pre)
        rest = tl.sigmoid(-pre)  # 1 - prediction, without its cancellation
        residual = y * rest - (1 - y) * prediction  # y - prediction, likewise
        # softplus(a) - y a, without overflow; the series of log(1 + e) where 1 + e would lose e
        e = tl.exp(-tl.abs(pre))
        log_one_plus = tl.where(e < 0.01, e * (1 - e * (1 / 2 - e * (1 / 3 - e / 4))), tl.log(1 + e))
        by_element = tl.maximum(pre, 0.0) + log_one_plus - y * pre
        by_sample = tl.sum(tl.where(inside, by_element, 0.0), 1) / classes
        own = -residual / elements
    elif LOSS == 1:
        prediction = _softmax(pre, inside)
        residual = y - prediction
        shifted = tl.where(inside, pre, float("-inf"))
        top = tl.max(shifted, 1)
        log_sum = top + tl.log(tl.sum(tl.exp(shifted - top[:, None]), 1))
        weight = tl.sum(y, 1)
        by_sample = weight * log_sum - tl.sum(y * pre, 1)
        own = (prediction * weight[:, None] - y) / samples
    else:
        prediction = pre
        residual = y - pre
        by_sample = tl.sum(tl.where(inside, (pre - y) * (pre - y), 0.0), 1) / classes
        own = 2 * (pre - y) / elements

    # What the signal is taken from: the prediction, or a link on top of the output as the loss sees it.
    seen = prediction if LOSS == 0 else pre
    if LINK == 2:
        z = tl.sigmoid(seen)
    elif LINK == 3:
        z = _softmax(seen, inside)
    elif LINK == 0 and SOURCE != 2:
        z = prediction
    else:
        z = seen
    if SOURCE == 0:
        e = residual if LINK == 0 else y - z
    elif SOURCE == 1:
        e = tl.where(y > z, 1.0, 0.0) - tl.where(y < z, 1.0, 0.0)
    elif SOURCE == 2:
        if LOSS == 0 and LINK < 2:
            at_z = -residual / tl.maximum(prediction * rest, 1e-12) / elements
        elif LOSS == 0:
            at_z = (z - y) / tl.maximum(z * (1 - z), 1e-12) / elements
        elif LOSS == 1:
            at_z = (_softmax(z, inside) * tl.sum(y, 1)[:, None] - y) / samples
        else:
            at_z = 2 * (z - y) / elements
        if LINK == 2:
            at_z = at_z * z * (1 - z)
        elif LINK == 3:
            at_z = z * (at_z - tl.sum(tl.where(inside, at_z * z, 0.0), 1)[:, None])
        e = -at_z
    elif SOURCE == 3:
        e = y
    else:
        e = tl.zeros_like(y)

    tl.store(gradient + place, own.to(gradient.dtype.element_ty), mask=inside)
    if SCATTER:
        row = tl.load(index + m, mask=m < samples, other=0)
        place = row[:, None] * classes + c[None, :]
    tl.store(error + place, e.to(error.dtype.element_ty), mask=inside)
    tl.store(loss + m, by_sample, mask=m < samples)
    guess = tl.argmax(tl.where(inside, pre, float("-inf")), 1)
    answer = tl.argmax(tl.where(inside, y, float("-inf")), 1)
    tl.store(correct + m, (guess == answer).to(tl.int32), mask=m < samples)
