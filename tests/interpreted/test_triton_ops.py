"""Every Triton operation in Triton's interpreter against the reference in float64. Run by `tests/test_triton.py`, in a process
of its own that sets TRITON_INTERPRET=1 before triton is imported; on a GPU by `pytest -m gpu`.
"""

from __future__ import annotations

import itertools
import os
from contextlib import nullcontext

import pytest
import torch

from f3triton.kernels import SGD, Adam, AdamW, GeneratedFeedback, State, Update, eager, new_state, reference
from f3triton.kernels.gpu import ops, tiles
from f3triton.kernels.moments import widened
from f3triton.kernels.rounding import bits_of, cut_to_bfloat16, parameter_seed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu

RULES = {
    "sgd": SGD(lr=0.02),
    "sgd-decay": SGD(lr=0.02, weight_decay=0.02),
    "momentum": SGD(lr=0.02, momentum=0.9, weight_decay=0.02),
    "nesterov": SGD(lr=0.02, momentum=0.9, nesterov=True),
    "adam": Adam(lr=0.03),
    "adam-decay": Adam(lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    "adam-no-memory": Adam(lr=0.03, betas=(0.0, 0.0)),
    "adamw": AdamW(lr=0.03, weight_decay=0.1),
}
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 2), (17, 31, 33, 10), (50, 70, 40, 23), (70, 33, 65, 3)]  # M, K, N, C


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(m: int, k: int, n: int, c: int) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, error, feedback in float64."""
    return random(m, k), random(n, k, seed=1), random(n, seed=2), random(m, c, seed=3), random(c, n, seed=4)


def on_device(*tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [tensor.to(DEVICE, dtype) for tensor in tensors]


def close(name: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """To within `tolerance` of the largest entry."""
    difference = (got.double().cpu() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    assert float(difference) < tolerance, f"{name}: off by {float(difference):.2e} of its largest entry"


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_forward(activation: str) -> None:
    for shape, bias in itertools.product(SHAPES[:4], (True, False)):
        arguments = case(*shape)
        x, weight, b, error, feedback = on_device(*arguments)
        h, delta = ops.linear_forward(x, weight, b if bias else None, activation, error, feedback, scale=0.7)
        wanted = reference.linear_forward(
            arguments[0], arguments[1], arguments[2] if bias else None, activation, *arguments[3:], scale=0.7
        )
        close(f"h {shape}", h, wanted[0])
        close(f"delta {shape}", delta, wanted[1], 1e-5)
        assert torch.equal(ops.linear_forward(x, weight, b if bias else None, activation), h)


def test_strides_and_int8_feedback() -> None:
    arguments = case(6, 9, 8, 4)
    x, weight, bias, error, _ = on_device(*arguments)
    feedback = torch.randint(-1, 2, (4, 8), generator=torch.Generator().manual_seed(0))
    wanted = reference.linear_forward(*arguments[:3], "tanh", arguments[3], feedback.double())
    x, error = x.t().contiguous().t(), torch.stack([error, error], -1)[..., 0]  # other strides, same values
    h, delta = ops.linear_forward(x, weight.t().contiguous().t(), bias, "tanh", error, feedback.to(DEVICE, torch.int8))
    close("h", h, wanted[0])
    close("delta", delta, wanted[1])


@pytest.mark.parametrize("kind", ["trinomial", "binomial", "uniform"])
def test_feedback_made_in_the_kernel(kind: str) -> None:
    for shape in SHAPES:
        x, weight, bias, error, _ = case(*shape)
        generated = GeneratedFeedback(kind, shape[3], shape[2], seed=12345, amplitude=0.3)
        dense = generated.dense(torch.device("cpu")).double()
        wanted = reference.linear_forward(x, weight, bias, "tanh", error, dense, 0.7)
        arguments, single = on_device(x, weight, bias), error.to(DEVICE, torch.float32)
        h, delta = ops.linear_forward(*arguments, "tanh", single, generated, 0.7)
        close(f"h {shape}", h, wanted[0], 1e-5)
        close(f"delta {shape}", delta, wanted[1], 1e-5)
        rest = State(()), State(()), Update(SGD(), 0.02, 1), "tanh", 0.7
        h = ops.linear_step_(*arguments, single, generated, *rest)
        reference.linear_step_(x, weight, bias, error, dense, *rest)
        close(f"h of the step {shape}", h, wanted[0], 1e-5)
        close(f"weight {shape}", arguments[1], weight, 1e-5)


def test_rows_outside_do_not_leak() -> None:
    """What lies around a tensor in memory may be NaN."""
    padded = torch.full((20, 40), float("nan"), device=DEVICE)
    x, weight, bias, error, feedback = on_device(*case(5, 7, 6, 3))
    padded[:5, :7] = x
    h, delta = ops.linear_forward(padded[:5, :7], weight, bias, "relu", error, feedback)
    gradient, _ = ops.outer_product(delta, padded[:5, :7])
    for tensor in (h, delta, gradient):
        assert torch.isfinite(tensor).all()


def test_integers_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (37, 65), (41, 65), (37, 41)
    x, weight, delta = (torch.randint(-8, 9, size, generator=generator).float().to(DEVICE) for size in sizes)
    assert torch.equal(ops.linear_forward(x, weight), x @ weight.T)
    gradient, bias = ops.outer_product(delta, x)
    assert torch.equal(gradient, delta.T @ x)
    assert torch.equal(bias, delta.sum(0))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_steps(rule: object, shape: tuple[int, ...]) -> None:
    """The whole visit, in one launch (M up to 64) or two; weights, moments and bias at the end."""
    arguments = case(*shape)
    x, w, b, error, feedback = arguments[0], arguments[1].clone(), arguments[2].clone(), *arguments[3:]
    states = new_state(w, rule), new_state(b, rule)
    x32, w32, b32, error32, feedback32 = on_device(*arguments)
    states32 = new_state(w32, rule), new_state(b32, rule)
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for step in (1, 2, 3):
        update = Update(rule, rule.lr, step)
        wanted = reference.linear_step_(x, w, b, error, feedback, *states, update, "tanh", 0.3)
        count += 1
        if step > 1:  # once with numbers, then with device scalars
            update = Update(rule, torch.tensor(rule.lr, device=DEVICE), count)
        h = ops.linear_step_(x32, w32, b32, error32, feedback32, *states32, update, "tanh", 0.3)
        close(f"h at step {step}", h, wanted, 2e-5)
    close("weight", w32, w, 2e-5)
    close("bias", b32, b, 2e-5)
    for name, ours, theirs in zip(("m", "v"), states32[0].moments, states[0].moments, strict=False):
        close(name, ours, theirs, 2e-5)
    for name, ours, theirs in zip(("bias m", "bias v"), states32[1].moments, states[1].moments, strict=False):
        close(name, ours, theirs, 2e-5)


def test_no_bias() -> None:
    for rows in (5, 70):
        x, weight, _, error, feedback = case(rows, 9, 8, 4)
        w, rule = weight.clone(), Adam(lr=0.03)
        reference.linear_step_(x, w, None, error, feedback, new_state(w, rule), None, Update(rule, 0.03, 1), "gelu")
        x32, w32, error32, feedback32 = on_device(x, weight, error, feedback)
        ops.linear_step_(x32, w32, None, error32, feedback32, new_state(w32, rule), None, Update(rule, 0.03, 1), "gelu")
        close("weight", w32, w, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_classes(dtype: torch.dtype) -> None:
    """More columns of the error at a time, and some left over."""
    half = dtype != torch.float32
    assert tiles.error_columns(100, half, 64) == (64 if half else 16)
    assert tiles.error_columns(100, half, 32) == 64
    assert tiles.error_columns(100, half, 128) == 16
    for rows in (9, 70):
        x, w, b, error, feedback = case(rows, 20, 33, 100)
        for matrix in (feedback, feedback.sign().to(torch.int8), GeneratedFeedback("uniform", 100, 33, seed=5)):
            wanted = reference.linear_forward(x, w, b, "tanh", error, matrix)
            given = on_device(x, w, b, dtype=dtype)
            sent = matrix.to(DEVICE, dtype) if matrix is feedback else matrix
            sent = sent.to(DEVICE) if isinstance(sent, torch.Tensor) else sent
            got = ops.linear_forward(*given, "tanh", error.to(DEVICE, dtype), sent)
            for name, ours, theirs in zip(("h", "delta"), got, wanted, strict=True):
                close(name, ours, theirs, 4e-3 if half else 1e-5)


def test_late_adam_steps_keep_their_correction() -> None:
    for step in (1, 7, 693, 5000, 200_000, 2**24 + 1):
        p, g = random(33), random(33, seed=1)
        rule = Adam(betas=(0.9, 1 - 1e-7))
        p32, g32 = on_device(p, g)
        state, state32 = new_state(p, rule), new_state(p32, rule)
        reference.update_(p, g, state, Update(rule, 0.1, step))
        ops.update_(p32, g32, state32, Update(rule, 0.1, torch.tensor(step, device=DEVICE)))
        close(f"parameter at step {step}", p32, p, 2e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_elementwise_update(rule: object) -> None:
    p, g = random(7, 5, 3), random(7, 5, 3, seed=1)
    p32, g32 = on_device(p, g)
    state, state32 = new_state(p, rule), new_state(p32, rule, shadow=torch.float16)
    for step in (1, 2):
        reference.update_(p, g, state, Update(rule, rule.lr, step))
        ops.update_(p32, g32, state32, Update(rule, rule.lr, step))
    assert torch.equal(state32.shadow, p32.half())
    close("parameter", p32, p, 1e-5)


def test_backward_update_uses_the_old_weight() -> None:
    x, weight, bias, _, _ = case(9, 17, 5, 2)
    delta = random(9, 5, seed=8)
    x32, w32, b32, delta32 = on_device(x, weight, bias, delta)
    dx = ops.linear_backward_update_(w32, b32, delta32, x32, State(()), State(()), Update(SGD(), 0.5, 1))
    close("dx", dx, delta @ weight)
    close("weight", w32, weight - 0.5 * delta.T @ x)
    close("bias", b32, bias - 0.5 * delta.sum(0))


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_an_update_goes_over_slices_of_its_tile(slices: int, moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = ops.tiles.Tile((32, 32 * slices, 32), 4, 3, slices)
    monkeypatch.setattr(ops.tiles, "update_tile", lambda *about: tile)
    generator = torch.Generator().manual_seed(0)
    delta, x, weight = (torch.randn(*shape, generator=generator) for shape in ((20, 50), (20, 300), (50, 300)))
    found = []
    for path, device in ((ops, DEVICE), (reference, "cpu")):
        w, b = weight.clone().to(device), torch.zeros(50, device=device)
        states = new_state(w, Adam(), moments=moments), new_state(b, Adam(), 1)
        path_update = getattr(path, "outer_product_update_", None) or eager.outer_product_update_
        path_update(w, b, delta.to(device), x.to(device), *states, Update(Adam(), 0.1, 1, seed=3))
        found.append([w, b, *states[0].moments, *states[0].scales])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got.cpu().float(), wanted.float(), rtol=1e-5, atol=1e-5 if got.is_floating_point() else 1)


@pytest.mark.parametrize(
    ("rule", "moments"), [("", ""), ("sgd-decay", ""), ("nesterov", "bfloat16"), ("adam", "float32"), ("adamw", "int8")]
)
@pytest.mark.parametrize("shape", [(5, 9, 7), (40, 72, 36)])
def test_how_tiles_are_shared_and_fetched_changes_nothing(
    rule: str, moments: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with fewer tiles than programs and with more, of which one program has two; by descriptors where rows begin
    at whole copies of 16 bytes, which those of 9 and 7 numbers do not."""
    (rows, inputs, outputs), ends, fetched = shape, [], []
    x, delta, weight, bias = on_device(random(rows, inputs), random(rows, outputs), random(outputs, inputs), random(outputs))
    made = ops._descriptors
    monkeypatch.setattr(ops, "_multiprocessors", lambda device: 3)
    monkeypatch.setattr(ops, "_descriptors", lambda *about: fetched.append(made(*about)) or fetched[-1])
    for how in ((0, False), (1, False), (0, True), (1, True)):
        monkeypatch.setattr(tiles, "update_tile", lambda *about, how=how: tiles.Tile((32, 64, 32), 4, 3, 2, *how))
        if not rule:
            ends.append(ops.outer_product(delta, x))
            continue
        own, w, b = RULES[rule], weight.clone(), bias.clone()
        states = new_state(w, own, 0, torch.float16, moments or "float32"), new_state(b, own, 1)
        for step in (1, 2):
            ops.outer_product_update_(w, b, delta, x, *states, Update(own, own.lr, torch.tensor(step, device=DEVICE), seed=3))
        ends.append([w, b, states[0].shadow, *states[0].moments, *states[0].scales, *states[1].moments])
    for others in zip(*ends, strict=True):
        assert all(torch.equal(others[0], other) for other in others[1:])
    calls, able = len(fetched) // 4, INTERPRETED or torch.cuda.get_device_capability()[0] >= 9
    assert [found is not None for found, _ in fetched] == [False] * 2 * calls + [able and inputs == 72] * 2 * calls


def test_half_precision_products_with_float32_weights() -> None:
    x, weight, bias, error, feedback = case(20, 40, 24, 10)
    for dtype, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 3e-2)):
        if INTERPRETED and dtype == torch.bfloat16:
            continue  # the interpreter holds bfloat16 as integers
        w32, b32, error32, feedback32 = on_device(weight, bias, error, feedback)
        rest = State(()), State(()), Update(SGD(), 0.01, 1), "tanh"
        w, b = weight.clone(), bias.clone()
        wanted = reference.linear_step_(x, w, b, error, feedback, *rest)
        h = ops.linear_step_(*on_device(x, dtype=dtype), w32, b32, error32, feedback32, *rest)
        assert h.dtype == dtype
        assert w32.dtype == torch.float32
        close(f"h {dtype}", h, wanted, tolerance)
        close(f"weight {dtype}", w32, w, tolerance)


def test_the_shadow_follows_the_weight() -> None:
    for rows in (20, 70):  # one launch, two launches
        x, weight, bias, error, feedback = case(rows, 40, 24, 10)
        (x16,) = on_device(x, dtype=torch.float16)
        w32, b32, error32, feedback32 = on_device(weight, bias, error, feedback)
        rule = Adam(lr=0.03)
        states = new_state(w32, rule, shadow=torch.float16), new_state(b32, rule)
        shadow = states[0].shadow
        wanted = reference.linear_forward(x16.double().cpu(), shadow.double().cpu(), bias, "tanh")
        h = ops.linear_step_(x16, w32, b32, error32, feedback32, *states, Update(rule, 0.03, 1), "tanh")
        close("h", h, wanted, 5e-3)  # the interpreter sums in half precision
        assert torch.equal(shadow, w32.half())
        dx = ops.linear_backward_update_(w32, b32, h, x16, *states, Update(rule, 0.03, 2))
        assert dx.dtype == torch.float16
        assert torch.equal(shadow, w32.half())


def test_random_bits_and_stochastic_rounding_equal_the_torch_ones() -> None:
    """Weights in bfloat16: the kernel's rounding of an update is that of `rounding`, bit for bit, and fair on average."""

    def rounded(values: torch.Tensor, seed: int, step: int, first: int = 0) -> torch.Tensor:
        return cut_to_bfloat16(values, bits_of(values, seed, step, first) & 0xFFFF)

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(61, 43, generator=generator)
    values[0, :3] = torch.tensor([float("inf"), float("-inf"), 0.0])
    for seed, step in ((12345, 1), (2**31 - 1, 77), (16, 123_456), (16, 2**24), (16, 2**24 + 1), (16, 2**40 + 1)):
        # one SGD step with learning rate 1 from zero to -gradient: exact in float32, so only the rounding is left
        weight = torch.zeros(61, 43, dtype=torch.bfloat16, device=DEVICE)
        gradient = -values.to(DEVICE)
        wanted = rounded(values, parameter_seed(seed, 5), step)
        for count in (step, torch.tensor(step, device=DEVICE)):
            ops.update_(weight.zero_(), gradient, State((), place=5), Update(SGD(), 1.0, count, seed))
            assert torch.equal(weight.cpu(), wanted)
    many = torch.full((20_000,), 1.001)
    drawn = rounded(many, 5, 1).float()
    assert set(drawn.tolist()) == {1.0, 1.0078125}
    assert abs(float(drawn.mean()) - 1.001) < 3e-4
    later = rounded(many, 5, 1, first=2**32).float()
    assert not torch.equal(drawn, later)
    assert torch.equal(rounded(many[7:9], 5, 1, first=7).float(), drawn[7:9])


@pytest.mark.parametrize("rows", [5, 70])
def test_weights_in_bfloat16(rows: int) -> None:
    """Equal to the torch backend's where products are exact: small integers, powers of two."""
    generator = torch.Generator().manual_seed(0)
    x, error = (torch.randint(-2, 3, (rows, k), generator=generator).float() for k in (9, 3))
    weight = torch.randint(-4, 5, (8, 9), generator=generator).to(torch.bfloat16)
    bias, feedback = torch.zeros(8, dtype=torch.bfloat16), torch.randint(-1, 2, (3, 8), generator=generator).float()
    for rule, seed in ((SGD(lr=2**-11), 7), (Adam(lr=0.01), 7), (SGD(lr=2**-11), None)):
        if seed is None and INTERPRETED:
            continue  # the interpreter cuts to bfloat16 instead of rounding
        ends = []
        for backend, device in ((ops, DEVICE), (eager, "cpu")):
            w, b = weight.to(device, copy=True), bias.to(device, copy=True)
            states = new_state(w, rule, place=4), new_state(b, rule, place=5)
            assert all(m.dtype == torch.float32 for m in states[0].moments)
            arguments = [tensor.to(device) for tensor in (error, feedback)]
            h = backend.linear_step_(x.to(device), w, b, *arguments, *states, Update(rule, rule.lr, 3, seed), "relu")
            ends.append((h.cpu(), w.cpu(), b.cpu(), *(m.cpu() for m in states[0].moments)))
        for got, wanted in zip(*ends, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6 if rule.moments else 0, atol=0)
        assert not torch.equal(ends[0][1], weight)


@pytest.mark.parametrize("word", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(5, 70, 9, 3), (70, 33, 40, 3), (3, 1, 1, 1)])
@pytest.mark.parametrize("rule", ["nesterov", "adam", "adamw"])
def test_narrow_moments(rule: str, shape: tuple[int, ...], word: str) -> None:
    """A visit, then the rule alone, from moments that are not zero; a level may differ where a sum's last bit does."""
    x, weight, bias, error, feedback = on_device(*case(*shape))
    own, ends = RULES[rule], []
    for backend, device in ((ops, DEVICE), (reference, "cpu")):
        w, b = weight.to(device, copy=True), bias.to(device, copy=True)
        states = new_state(w, own, 4, moments=word), new_state(b, own, 5, moments=word)
        assert all(moment.dtype == torch.float32 for moment in states[1].moments)
        given = [tensor.to(device) for tensor in (error, feedback)]
        for step in (1, 2):
            backend.linear_step_(x.to(device), w, b, *given, *states, Update(own, own.lr, step, seed=7), "tanh", 0.3)
        backend.update_(w, weight.to(device), states[0], Update(own, own.lr, 3, seed=7))
        found = [w, b, *(widened(m, s) for m, s in itertools.zip_longest(states[0].moments, states[0].scales))]
        ends.append([tensor.cpu().double() for tensor in found])
    for name, got, wanted in zip(("weight", "bias", "m", "v"), *ends, strict=False):
        off = (got - wanted).abs() > 1e-5 * wanted.abs().max()
        assert off.double().mean() <= 0.03, f"{name}: {int(off.sum())} of {off.numel()} differ"
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()))


@pytest.mark.parametrize("loss", reference.LOSSES)
@pytest.mark.parametrize("link", reference.LINKS)
def test_output_step(loss: str, link: str) -> None:
    for source, (m, c) in itertools.product(reference.SOURCES, ((1, 2), (13, 5), (5, 33))):
        one_hot = torch.nn.functional.one_hot(torch.arange(m) % c, c).double()
        target = random(m, c, seed=6) if loss == "mse" else one_hot
        a = random(m, c) * 3
        got = ops.output_step(*on_device(a, target), loss, source, link)
        wanted = reference.output_step(a, target, loss, source, link)
        close(f"gradient {source}", got[0], wanted[0], 1e-5)
        if source == "none":
            assert not got[1].any()
        else:
            close(f"error {source}", got[1], wanted[1], 2e-5)
        torch.testing.assert_close(got[2][0].double().cpu(), wanted[2][0], rtol=1e-6, atol=1e-6)
        assert torch.equal(got[2][1].cpu(), wanted[2][1])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("loss", reference.LOSSES)
def test_head(loss: str, norm: bool) -> None:
    for (m, n, c), bias in itertools.product(((1, 3, 2), (21, 33, 10), (17, 70, 50), (5, 40, 130)), (True, False)):
        one_hot = torch.nn.functional.one_hot(torch.arange(m) % c, c).double()
        target = random(m, c, seed=6) if loss == "mse" else one_hot
        h, weight, b = random(m, n) + 2, random(c, n, seed=1), random(c, seed=2)
        ends = []
        for ops_, operands in ((reference, (h, weight, b, target)), (ops, on_device(h, weight, b, target))):
            x, w, v, y = (tensor.clone() for tensor in operands)
            v = v if bias else None
            states = new_state(w, RULES["momentum"]), None if v is None else new_state(v, RULES["momentum"])
            ends.append([ops_.head_step_(x, w, v, y, loss, *states, Update(RULES["momentum"], 0.5, 1), norm), w, v])
        for name, wanted, got in zip(("gradient", "weight", "bias"), *ends, strict=True):
            if wanted is not None:
                close(f"{name} {m} {n} {c}", got, wanted, 1e-5)


def test_head_of_strided_rows_and_in_half_precision() -> None:
    h, weight, bias = random(20, 48), random(10, 24, seed=1), random(10, seed=2)
    target = torch.nn.functional.one_hot(torch.arange(20) % 10, 10).double()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        x, w, b, y = *on_device(h[:, ::2], dtype=dtype), *on_device(weight, bias, target)
        x = on_device(h, dtype=dtype)[0][:, :24] if dtype == torch.float32 else x
        wanted = [x.double().cpu(), weight.clone(), bias.clone()]
        states = [new_state(tensor, SGD()) for tensor in (w, b)]
        got = ops.head_step_(x, w, b, y, "cross-entropy", *states, Update(SGD(), 1.0, 1))
        back = reference.head_step_(*wanted, target, "cross-entropy", *states, Update(SGD(), 1.0, 1))
        assert got.dtype == dtype
        close("gradient", got, back, tolerance)
        close("weight", w, wanted[1], tolerance)
        close("bias", b, wanted[2], tolerance)


def test_a_head_keeps_what_is_not_a_number() -> None:
    h, weight, target = random(3, 5), random(4, 5, seed=1), torch.eye(4, dtype=torch.float64)[:3]
    h[1, 2] = float("nan")
    x, w, y = on_device(h, weight, target)
    back = ops.head_step_(x, w, None, y, "bce", new_state(w, SGD()), None, Update(SGD(), 0.1, 1))
    assert back.isnan().all(1).tolist() == [False, True, False]
    assert w.isnan().all()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_what_is_not_a_number_stays_so(activation: str) -> None:
    for x in (torch.full((2, 3), float("nan"), device=DEVICE), torch.tensor([[float("nan")] * 3, [1.0] * 3], device=DEVICE)):
        error, weight = torch.ones(2, 1, device=DEVICE), torch.ones(4, 3, device=DEVICE)
        h, delta = ops.linear_forward(x, weight, None, activation, error, torch.ones(1, 4, device=DEVICE))
        wanted = reference.linear_forward(x, weight, None, activation, error, torch.ones(1, 4, device=DEVICE))
        assert torch.equal(h.isnan(), x.isnan().any(1, keepdim=True).expand(2, 4))
        torch.testing.assert_close(delta, wanted[1], equal_nan=True)


@pytest.mark.parametrize("source", [source for source in reference.SOURCES if source not in ("target", "none")])
@pytest.mark.parametrize("loss", reference.LOSSES)
def test_what_is_not_a_number_at_the_output_stays_so(loss: str, source: str) -> None:
    a, target = random(3, 4), torch.eye(4, dtype=torch.float64)[:3]
    a[1, 2] = float("nan")
    gradient, error, (losses, _) = ops.output_step(*on_device(a, target), loss, source)
    wanted = reference.output_step(a, target, loss, source)
    assert torch.equal(gradient.isnan().cpu(), wanted[0].isnan())
    assert torch.equal(error.isnan().cpu(), wanted[1].isnan())
    assert losses.isnan().tolist() == [False, True, False]


def test_repeated_runs_are_identical() -> None:
    ends = []
    for _ in range(2):
        x, w, b, error, feedback = on_device(*case(50, 70, 40, 23))
        states = new_state(w, Adam()), new_state(b, Adam())
        h = ops.linear_step_(x, w, b, error, feedback, *states, Update(Adam(), 0.01, 1), "tanh")
        ends.append([h, w, b, *states[0].moments, *states[1].moments])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "x must be float32, float16 or bfloat16"),
        ({"x": torch.zeros(12)}, "x must have two dimensions"),
        ({"x": torch.zeros(3, 5)}, "weight has 4 inputs and x 5"),
        ({"weight": torch.zeros(4, 6).t()}, "weight must be float32 or bfloat16, and contiguous"),
        ({"weight": torch.zeros(6, 4, dtype=torch.float16)}, "weight must be float32 or bfloat16, and contiguous"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "bias": torch.zeros(6), "error": torch.zeros(3, 2),
                 "feedback": torch.zeros(2, 6), **change}  # fmt: skip
    arguments = {name: tensor.to(DEVICE) for name, tensor in arguments.items()}
    if arguments["x"].dim() == 1:
        with pytest.raises(ValueError, match=message):
            ops.linear_forward(arguments["x"], arguments["weight"])
        return
    with pytest.raises(ValueError, match=message):
        ops.linear_step_(*arguments.values(), State(()), State(()), Update(SGD(), 0.1, 1))


def test_every_operation_launches_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not on the current one."""
    made: list[torch.device] = []
    monkeypatch.setattr(ops, "_current", lambda device: made.append(device) or nullcontext())
    x, w, b, error, feedback = on_device(*case(5, 6, 7, 3))
    states, update = (new_state(w, SGD()), new_state(b, SGD())), Update(SGD(), 0.1, 1)
    delta = ops.linear_forward(x, w, b, "tanh", error, feedback)[1]
    ops.linear_keep(x, w, b, "tanh")
    ops.outer_product(delta, x)
    ops.outer_product_update_(w, b, delta, x, *states, update)
    ops.linear_step_(x, w, b, error, feedback, *states, update)
    ops.linear_backward_update_(w, b, delta, x, *states, update)
    ops.update_(b, b.clone(), states[1], update)
    ops.output_step(error, error, "mse", "delayed-error")
    assert len(made) >= 8
    assert {device.type for device in made} == {torch.device(DEVICE).type}


def test_tensors_on_two_devices_and_more_outputs_than_offsets_are_refused() -> None:
    x, w, b, *_ = on_device(*case(5, 6, 7, 3))
    with pytest.raises(ValueError, match="weight is on meta and x on"):
        ops.linear_forward(x, w.to("meta"), b)
    wide = torch.empty(1, 1, device="meta").expand(1 << 24, 6)
    with pytest.raises(ValueError, match="the number of outputs is 16777216"):
        ops.linear_forward(x.to("meta"), wide)


def test_unknown_words_are_refused_by_name() -> None:
    x, w, b, error, _ = on_device(*case(5, 6, 7, 3))
    with pytest.raises(ValueError, match="activation 'softplus' is unknown; allowed: identity, tanh"):
        ops.linear_forward(x, w, b, "softplus")
    for word, given in (("loss", ("hinge", "none")), ("source", ("mse", "later")), ("link", ("mse", "none", "exp"))):
        with pytest.raises(ValueError, match=f"{word} '{given[-1] if word != 'loss' else given[0]}' is unknown; allowed"):
            ops.output_step(error, error, *given)
