"""The reference operations against autograd and torch.optim in float64, and the torch backend against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from f3triton.kernels import SGD, Adam, AdamW, State, Update, eager, new_state, reference
from f3triton.kernels.rounding import parameter_seed

ACTIVATIONS = reference.ACTIVATIONS
TORCH_ACTIVATIONS = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu-tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "silu": functional.silu,
}
RULES = {
    "sgd": SGD(lr=0.1),
    "sgd-decay": SGD(lr=0.1, weight_decay=0.02),
    "momentum": SGD(lr=0.1, momentum=0.9, weight_decay=0.02),
    "nesterov": SGD(lr=0.1, momentum=0.9, nesterov=True),
    "adam": Adam(lr=0.03),
    "adam-decay": Adam(lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    "adamw": AdamW(lr=0.03, weight_decay=0.1),
}
SHAPES = [(1, 1, 1, 1), (7, 5, 3, 2), (50, 64, 33, 10)]  # M, K, N, C


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(m: int, k: int, n: int, c: int) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, error, feedback."""
    return random(m, k), random(n, k, seed=1), random(n, seed=2), random(m, c, seed=3), random(c, n, seed=4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_slope_are_those_of_autograd(activation: str) -> None:
    a = random(200).mul(3).requires_grad_()
    h = TORCH_ACTIVATIONS[activation](a)
    (slope,) = torch.autograd.grad(h.sum(), a)
    torch.testing.assert_close(reference.activate(a.detach(), activation), h.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(reference.activation_slope(a.detach(), activation), slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_gradient_is_autograd_seeded_with_e_b(activation: str, shape: tuple[int, ...]) -> None:
    x, weight, bias, error, feedback = case(*shape)
    leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    h = TORCH_ACTIVATIONS[activation](functional.linear(x, *leaves))
    expected = torch.autograd.grad(h, leaves, 0.5 * error @ feedback)
    ours, delta = reference.linear_forward(x, weight, bias, activation, error, feedback, scale=0.5)
    torch.testing.assert_close(ours, h.detach())
    for got, wanted in zip(reference.outer_product(delta, x), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ops", [reference, eager], ids=["reference", "eager"])
def test_rules_are_those_of_torch_optim(name: str, ops: object) -> None:
    rule = RULES[name]
    ours, theirs = random(6, 5), random(6, 5).requires_grad_()
    settings = {"lr": rule.lr, "weight_decay": rule.weight_decay}
    if isinstance(rule, SGD):
        optimizer = torch.optim.SGD([theirs], momentum=rule.momentum, nesterov=rule.nesterov, **settings)
    else:
        kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
        optimizer = kind([theirs], betas=rule.betas, eps=rule.eps, **settings)
    state = new_state(ours, rule)
    for step in range(1, 8):
        theirs.grad = random(6, 5, seed=10 + step)
        lr = rule.lr / step
        optimizer.param_groups[0]["lr"] = lr
        ops.update_(ours, theirs.grad.clone(), state, Update(rule, lr, step))
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_torch_without_its_private_optimizers_will_do(rule: object, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for missing in (False, True):
        if missing:
            for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
                monkeypatch.delattr(torch, name)
        x, weight, b, error, feedback = case(7, 5, 3, 2)
        states = new_state(weight, rule), new_state(b, rule)
        for step in (1, 2, 3):
            eager.linear_step_(x, weight, b, error, feedback, *states, Update(rule, rule.lr, step), "tanh", 0.1)
        found.append([weight, b, *states[0].moments, *states[1].moments])
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("bias", [True, False])
def test_eager_step_equals_reference(rule: object, bias: bool) -> None:
    x, weight, b, error, feedback = case(50, 64, 33, 10)
    b = b if bias else None
    states = []
    for ops in (reference, eager):
        w, own = weight.clone(), None if b is None else b.clone()
        kept = new_state(w, rule), None if own is None else new_state(own, rule)
        for step in (1, 2, 3):
            h = ops.linear_step_(x, w, own, error, feedback, *kept, Update(rule, rule.lr, step), "tanh", 0.1)
        states.append([h, w, *kept[0].moments, *([] if own is None else [own, *kept[1].moments])])
    for got, wanted in zip(states[1], states[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eager_forward_equals_reference(activation: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        arguments = case(*shape)
        wanted = reference.linear_forward(arguments[0], *arguments[1:3], activation, *arguments[3:], scale=2.0)
        x, weight, bias, error, feedback = (tensor.to(dtype) for tensor in arguments)
        got = eager.linear_forward(x, weight, bias, activation, error, feedback, scale=2.0)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
        torch.testing.assert_close(eager.linear_forward(x, weight, bias, activation), got[0])


def test_eager_products_are_torchs_own_at_every_size() -> None:
    """One way for all sizes, bit for bit that of plain torch: a choice by size or by processor would show in results."""
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((20, 30), (784, 500)):
        x, weight = torch.randn(50, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
        bias = torch.randn(outputs, generator=generator)
        assert torch.equal(eager.linear_forward(x, weight, bias, "tanh"), torch.addmm(bias, x, weight.t()).tanh())


def test_large_weight_is_updated_in_parts_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, error, feedback = case(50, 64, 33, 10)
    ends = []
    for scratch in (1 << 20, 64 * 7):  # all rows at once; seven rows at a time, with a ragged last part
        monkeypatch.setattr(eager, "SCRATCH", scratch)
        w, b, rule = weight.clone(), bias.clone(), Adam(lr=0.1)
        states = new_state(w, rule), new_state(b, rule)
        eager.linear_step_(x, w, b, error, feedback, *states, Update(rule, 0.1, 1), "relu")
        ends.append((w, b))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_backward_update_uses_the_old_weight() -> None:
    x, weight, bias, _, _ = case(9, 6, 5, 2)
    delta = random(9, 5, seed=8)
    for ops in (reference, eager):
        w, b = weight.clone(), bias.clone()
        dx = ops.linear_backward_update_(w, b, delta, x, State(()), State(()), Update(SGD(), 0.5, 1))
        torch.testing.assert_close(dx, delta @ weight)
        torch.testing.assert_close(w, weight - 0.5 * delta.T @ x)
        torch.testing.assert_close(b, bias - 0.5 * delta.sum(0))


# --- the last layer ---------------------------------------------------------------------------------------------------


def target_for(loss: str, m: int, c: int) -> torch.Tensor:
    return random(m, c, seed=6) if loss == "mse" else functional.one_hot(torch.arange(m) % c, c).double()


def autograd_loss(output: torch.Tensor, target: torch.Tensor, loss: str) -> torch.Tensor:
    """torch's loss of the network's output as the loss sees it."""
    if loss == "bce":
        return functional.binary_cross_entropy(output, target)
    return functional.cross_entropy(output, target) if loss == "cross-entropy" else functional.mse_loss(output, target)


@pytest.mark.parametrize("loss", reference.LOSSES)
def test_loss_and_gradient_are_those_of_autograd(loss: str) -> None:
    a, target = random(12, 5).requires_grad_(), target_for(loss, 12, 5)
    value = autograd_loss(reference.output_of(a, loss), target, loss)
    (gradient,) = torch.autograd.grad(value, a)
    torch.testing.assert_close(reference.loss_of(a.detach(), target, loss), value.detach())
    torch.testing.assert_close(reference.loss_gradient(a.detach(), target, loss), gradient)


@pytest.mark.parametrize("link", reference.LINKS)
@pytest.mark.parametrize("loss", reference.LOSSES)
def test_delayed_loss_is_the_gradient_at_the_output(loss: str, link: str) -> None:
    a, target = random(12, 5), target_for(loss, 12, 5)
    if loss == "bce" and link == "auto":
        link = "identity"
    output = reference.output_of(a, loss).requires_grad_()
    linked = {"sigmoid": torch.sigmoid, "softmax": lambda o: torch.softmax(o, -1)}.get(link, lambda o: o)(output)
    (gradient,) = torch.autograd.grad(autograd_loss(linked, target, loss), output)
    torch.testing.assert_close(reference.error_signal(a, target, loss, "delayed-loss", link), -gradient)


@pytest.mark.parametrize("loss", reference.LOSSES)
def test_auto_link_is_the_prediction(loss: str) -> None:
    a, target = random(12, 5), target_for(loss, 12, 5)
    prediction = {"bce": torch.sigmoid(a), "cross-entropy": torch.softmax(a, -1), "mse": a}[loss]
    torch.testing.assert_close(reference.error_signal(a, target, loss, "delayed-error"), target - prediction)
    torch.testing.assert_close(reference.error_signal(a, target, loss, "current-error-sign"), (target - prediction).sign())
    assert torch.equal(reference.error_signal(a, target, loss, "target"), target)
    assert not reference.error_signal(a, target, loss, "none").any()


def test_softmax_link_goes_on_top_of_the_sigmoid() -> None:
    a, target = random(12, 5), target_for("bce", 12, 5)
    expected = target - torch.softmax(torch.sigmoid(a), -1)
    torch.testing.assert_close(reference.error_signal(a, target, "bce", "delayed-error", "softmax"), expected)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("loss", reference.LOSSES)
def test_a_heads_visit_is_autograds_step(loss: str, norm: bool) -> None:
    """Of the loss of a linear reading of h, or of its layer normalisation: the head by torch.optim, and the gradient at h."""
    target = target_for(loss, 12, 5)
    h, weight, bias = random(12, 7).requires_grad_(), random(5, 7, seed=1), random(5, seed=2)
    head = torch.nn.Linear(7, 5).double()
    with torch.no_grad():
        head.weight.copy_(weight), head.bias.copy_(bias)
    a = head(functional.layer_norm(h, (7,)) if norm else h)
    autograd_loss(reference.output_of(a, loss), target, loss).backward()
    torch.optim.SGD(head.parameters(), lr=0.3).step()
    for ops in (reference, eager):
        w, b = weight.clone(), bias.clone()
        states = new_state(w, SGD()), new_state(b, SGD())
        back = ops.head_step_(h.detach(), w, b, target, loss, *states, Update(SGD(), 0.3, 1), norm)
        for got, wanted in ((back, h.grad), (w, head.weight), (b, head.bias)):
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("source", reference.SOURCES)
@pytest.mark.parametrize("link", reference.LINKS)
@pytest.mark.parametrize("loss", reference.LOSSES)
def test_eager_output_step_equals_reference(loss: str, link: str, source: str) -> None:
    for targets in (target_for(loss, 12, 5), random(12, 5, seed=9).sigmoid()):  # one-hot or real; soft
        a = random(12, 5) * 3
        got, wanted = (ops.output_step(a, targets, loss, source, link) for ops in (eager, reference))
        for ours, theirs in zip(got[:2], wanted[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert got[2] is None
        losses, hits = wanted[2]
        torch.testing.assert_close(losses.mean(), reference.loss_of(a, targets, loss))
        assert torch.equal(hits, a.argmax(-1) == targets.argmax(-1))


@pytest.mark.parametrize("loss", ["bce", "cross-entropy"])
def test_a_confident_output_keeps_loss_and_gradient_finite(loss: str) -> None:
    a = torch.tensor([[200.0, -200.0]])
    target = torch.tensor([[0.0, 1.0]])
    for ops in (eager, reference):
        gradient, error, figures = ops.output_step(a, target, loss, "delayed-error")
        assert torch.isfinite(torch.cat([gradient, error])).all()
    losses, hits = figures
    assert losses.tolist() == pytest.approx({"bce": [200], "cross-entropy": [400]}[loss])
    assert hits.tolist() == [False]


# --- what a long or a diverged run needs ------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", [reference, eager], ids=["reference", "eager"])
def test_rounding_still_draws_beyond_two_to_the_24_steps(ops: object) -> None:
    """A counter in float32 would stand still there, and with it the bits: the same few weights would be rounded up for ever."""
    step, rule = torch.tensor(2**24 - 1), SGD()
    weight = torch.ones(400, dtype=torch.bfloat16)
    state, gradient, ends = new_state(weight, rule, place=3), torch.full((400,), -(2.0**-11)), []
    for _ in range(64):  # by a sixteenth of the distance to the next bfloat16
        step.add_(1)
        ops.update_(weight, gradient, state, Update(rule, 1.0, step, seed=7))
        ends.append(weight.clone())
    assert int(step) > 2**24
    assert not torch.equal(ends[0], ends[1])
    moved = float((weight > 1).float().mean())
    assert moved > 0.9  # all but (15/16)^64 = 1.6 %
    again = torch.ones(400, dtype=torch.bfloat16)
    ops.update_(again, gradient, new_state(again, rule, place=3), Update(rule, 1.0, 2**24, seed=7))
    assert torch.equal(again, ends[0])  # the step as a number


@pytest.mark.parametrize("ops", [reference, eager], ids=["reference", "eager"])
def test_adam_counts_beyond_two_to_the_24_steps(ops: object) -> None:
    rule = Adam(betas=(0.9, 1 - 1e-9))  # whose correction is not over by then
    for step in (2**24, 2**24 + 1, 2**26):
        ends = []
        for dtype, count in ((torch.float64, step), (torch.float32, torch.tensor(step))):
            weight = torch.ones(3, dtype=dtype)
            ops.update_(weight, torch.full_like(weight, 0.25), new_state(weight, rule), Update(rule, 0.1, count))
            ends.append(weight.double())
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=0)


def test_parameters_and_seeds_draw_bits_of_their_own() -> None:
    seeds = {parameter_seed(seed, place) for seed in (0, 1, 2**32, 2**62 + 1) for place in range(1000)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**31 for seed in seeds)
    rule, ends = SGD(), []
    for seed, place in ((7, 0), (7, 1), (8, 0)):
        weight = torch.ones(400, dtype=torch.bfloat16)
        eager.update_(weight, torch.full((400,), -(2.0**-8)), new_state(weight, rule, place), Update(rule, 1.0, 1, seed))
        ends.append(weight)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(ends, 2))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_stays_so(activation: str) -> None:
    """Or a diverged run would look healthy."""
    x = torch.tensor([[float("nan")], [1.0]])
    for ops in (reference, eager):
        h, delta = ops.linear_forward(x, torch.ones(2, 1), None, activation, torch.ones(2, 1), torch.ones(1, 2))
        assert h[0].isnan().all()
        assert h[1].isfinite().all()
        assert delta[1].isfinite().all()
        # the slope of a step at NaN is torch's, 1
        assert torch.equal(delta[0], torch.ones(2)) if activation in ("identity", "relu") else delta[0].isnan().all()
