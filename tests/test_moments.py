"""Moments in bfloat16 and int8: what they keep, the torch backend against the reference, and how networks learn by them."""

from __future__ import annotations

import pytest
import torch

import f3triton as f3
from f3triton.kernels import SGD, Adam, AdamW, Update, eager, new_state, reference
from f3triton.kernels.moments import BLOCK, moment_bytes, narrow_, new_moments, widened
from f3triton.kernels.rounding import bits_of, cut_to_bfloat16, random_bits

SHAPES = [(1, 1), (7, 5), (33, 70), (6, 3, 3, 3), (5,)]


@pytest.mark.parametrize("word", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_they_are_and_take(shape: tuple[int, ...], word: str) -> None:
    moments, scales = new_moments(torch.zeros(shape), 2, word)
    types = {"float32": [torch.float32] * 2, "bfloat16": [torch.bfloat16] * 2, "int8": [torch.int8, torch.uint8]}[word]
    assert [m.dtype for m in moments] == (types if len(shape) > 1 else [torch.float32] * 2)
    assert moment_bytes(torch.Size(shape), 2, word) == sum(t.nbytes for t in (*moments, *scales))
    with pytest.raises(ValueError, match="moments 'int4' are unknown; allowed: float32, bfloat16, int8"):
        new_moments(torch.zeros(2, 2), 1, "int4")


@pytest.mark.parametrize("which", [0, 1])
def test_levels_are_squares_and_rounding_is_right_in_the_mean(which: int) -> None:
    moments, scales = new_moments(torch.zeros(400, 50), 2, "int8")
    moment, scale = moments[which], scales[which]
    values = torch.linspace(-1, 1, 50).pow(3).expand(400, 50) * 1e-3
    values = values.abs() if which else values
    narrow_(moment, scale, values, (bits_of(values, 3, 1) >> 16) & 0xFFFF)
    assert torch.equal(scale, torch.stack([values[:, :BLOCK].abs().amax(1), values[:, BLOCK:].abs().amax(1)], 1))
    got = widened(moment, scale)
    spacing = 2 * (values.abs() * 1e-3).sqrt() / (255 if which else 127) + 1e-3 / 127**2
    assert ((got - values).abs() <= 1.01 * spacing).all()
    if not which:  # v's smallest level is a floor
        torch.testing.assert_close(got.mean(0), values[0], rtol=0, atol=1.2e-6)
    exact = got.clone()
    narrow_(moment, scale, exact, None)
    torch.testing.assert_close(widened(moment, scale), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [1, 2**33 + 5, torch.tensor(123456789)], ids=str)
@pytest.mark.parametrize("first", [0, 2**31 - 50, 2**32 - 50, 3 * 2**32 + 7])
def test_the_bits_are_those_of_the_hash(first: int, step: int | torch.Tensor) -> None:
    """In 32 bits with a sign, where the specification has 64."""
    values = torch.randn(10, 13, generator=torch.Generator().manual_seed(0))
    values[0, :2] = torch.tensor([3.39e38, -torch.inf])
    wanted = random_bits(torch.arange(first, first + 130).view(10, 13), 12345, step)
    bits = bits_of(values, 12345, step, first)
    assert torch.equal(bits.long() & 0xFFFFFFFF, wanted)
    rounded = ((values.view(torch.int32).long() + (wanted & 0xFFFF)) >> 16 << 16).to(torch.int32).view(torch.float32)
    wanted = torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
    assert torch.equal(cut_to_bfloat16(values, bits & 0xFFFF), wanted)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (33, 70), (5, 64)])
def test_levels_are_those_of_the_formula(shape: tuple[int, int], drawn: bool) -> None:
    """Bit for bit, written out with the comparisons that `narrow_` does without."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(shape, generator=generator) * torch.logspace(-12, 2, shape[1])
    moments, scales = new_moments(m, 2, "int8")
    bits = bits_of(m, 3, 1) & 0xFFFF if drawn else None
    for moment, scale, value, levels in zip(moments, scales, (m, m.square()), (127, 255), strict=True):
        narrow_(moment, scale, value, bits)
        square = value.abs() / scale.repeat_interleave(BLOCK, 1)[:, : shape[1]] * levels**2
        low = square.sqrt().floor()
        above = (square - low * low) / (2 * low + 1)
        q = (low + (above * 65536 > bits if drawn else above >= 0.5)).clamp(max=levels)
        q = torch.maximum(q, (value > 0).float()) if levels == 255 else q.copysign(value)
        assert torch.equal(moment.float(), q)


def test_zeros_stay_zero_and_small_v_stays_above() -> None:
    (m, v), (m_scale, v_scale) = new_moments(torch.zeros(1, 4), 2, "int8")
    values = torch.tensor([[0.0, 1e-12, 1.0, 1e-30]])
    narrow_(v, v_scale, values, torch.full((1, 4), 65535))
    assert v.tolist() == [[0, 1, 255, 1]]
    for nothing in (torch.zeros(1, 4), torch.full((1, 4), 1e-42)):
        narrow_(m, m_scale, nothing, torch.zeros(1, 4, dtype=torch.int64))
        assert widened(m, m_scale).abs().max() <= 1e-41
    narrow_(m, m_scale, torch.tensor([[float("nan"), 1.0, 2.0, 3.0]]), None)
    assert widened(m, m_scale).isnan().any()  # an update that broke is seen


@pytest.mark.parametrize("word", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.9), Adam(lr=0.01), AdamW(lr=0.01)], ids=["sgd", "adam", "adamw"])
def test_eager_is_the_reference(rule: object, dtype: torch.dtype, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time; where the fused rule's last bit is another, now and then a level is."""
    monkeypatch.setattr(eager, "NARROW_SCRATCH", 100)
    generator = torch.Generator().manual_seed(0)
    weight, x, delta = (torch.randn(*shape, generator=generator) for shape in ((23, 41), (9, 41), (9, 23)))
    ends = []
    for backend in (reference, eager):
        own = weight.to(dtype, copy=True)
        state = new_state(own, rule, 3, moments=word)
        for step in (1, 2, 3):
            backend.outer_product_update_(own, None, delta, x * step, state, None, Update(rule, rule.lr, step, seed=5))
        backend.update_(own, weight, state, Update(rule, rule.lr, 4, seed=5))
        scales = state.scales or (None,) * 2
        ends.append([own.float(), *(widened(*pair) for pair in zip(state.moments, scales, strict=False))])
    for got, wanted in zip(*ends, strict=True):
        assert ((got - wanted).abs() > 1e-5 * wanted.abs().max()).float().mean() < 0.02


def test_the_whole_is_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bits belong to elements, not to how many rows are done at once."""
    ends = []
    for scratch in (1, 100, 1 << 20):
        monkeypatch.setattr(eager, "NARROW_SCRATCH", scratch)
        generator = torch.Generator().manual_seed(0)
        weight, gradient = (torch.randn(23, 41, generator=generator) for _ in range(2))
        state = new_state(weight, Adam(), 3, moments="int8")
        for step in (1, 2):
            eager.update_(weight, gradient, state, Update(Adam(), 0.01, step, seed=5))
        ends.append((weight, *state.moments, *state.scales))
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))


@pytest.mark.parametrize("changes", [{}, {"optimizer": f3.SGD(lr=0.01, momentum=0.9)}, {"method": "local"}], ids=str)
def test_they_learn_digits_as_well(changes: dict) -> None:
    train, test = f3.load_dataset("digits")
    errors = []
    for moments in ("float32", "int8"):
        torch.manual_seed(0)
        trainer = f3.Trainer(
            f3.models.MLP([64, 50, 10]), **{"optimizer": f3.Adam(lr=2e-3), "batch_size": 10, **changes, "moments": moments}
        )
        errors.append(trainer.fit(train, 6, test).history[-1]["test_error"])
    assert errors[1] < min(15, errors[0] + 2)
