"""Many steps of a network in one launch against the same steps one by one, in float64."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from f3triton.kernels import SGD, Adam, AdamW, Rule, Update, new_state, reference
from f3triton.kernels.gpu import steps
from f3triton.kernels.gpu.tiles import NetworkTile
from f3triton.kernels.rules import Layer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else pytest.mark.gpu
SMALL = NetworkTile(outputs=4, inputs=8, taught=16, unroll=2, unroll_rows=3)


def network(sizes: list[int], width: int, rule: Rule, bias: bool, dtype: torch.dtype = torch.float32) -> list[Layer]:
    generator, layers = torch.Generator().manual_seed(0), []
    for place, (k, n) in enumerate(itertools.pairwise(sizes)):
        weight = (torch.randn(n, k, generator=generator) / k**0.5).to(DEVICE, dtype)
        b = (torch.randn(n, generator=generator) / 10).to(DEVICE, dtype) if bias else None
        feedback = torch.randint(-1, 2, (width, n), generator=generator).to(DEVICE, dtype)
        last = place == len(sizes) - 2
        states = new_state(weight, rule), new_state(b, rule, 1) if bias else None
        layers.append(Layer(weight, b, *states, None if last else feedback))
    return layers


def batches(sizes: list[int], batch: int, count: int, width: int) -> tuple[torch.Tensor, ...]:
    """x, the rows that teach, targets, and learning rates."""
    generator = torch.Generator().manual_seed(1)
    x, row = (torch.randn(count, batch, n, generator=generator) for n in (sizes[0], width))
    classes = torch.randint(0, sizes[-1], (count, batch), generator=generator)
    target = torch.eye(sizes[-1])[classes]
    return tuple(tensor.to(DEVICE) for tensor in (x, row / 10, target, torch.linspace(0.01, 0.005, count)))


def tensors(layers: list[Layer]) -> list[torch.Tensor]:
    """All that a step changes."""
    states = [state for layer in layers for state in (layer.weight_state, layer.bias_state) if state is not None]
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    return [*parameters, *(moment for state in states for moment in state.moments)]


@pytest.mark.parametrize(
    ("sizes", "batch", "rule", "loss", "activation", "width", "programs"),
    [
        ([9, 20, 4], 5, SGD(), "bce", "tanh", 4, None),
        ([9, 20, 4], 5, Adam(), "bce", "sigmoid", 4, 3),
        ([8, 20, 13, 7, 3], 5, Adam(weight_decay=0.1), "cross-entropy", "relu", 3, 8),
        ([9, 20, 13, 3], 6, AdamW(), "mse", "gelu", 2, 5),
        ([9, 5, 3], 1, SGD(momentum=0.9, nesterov=True, weight_decay=0.01), "mse", "silu", 20, 4),
        ([40, 33, 17], 50, SGD(momentum=0.9), "cross-entropy", "gelu-tanh", 17, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_steps_one_by_one(
    sizes: list[int], batch: int, rule: Rule, loss: str, activation: str, width: int, programs: int | None, bias: bool
) -> None:
    x, row, target, lr = batches(sizes, batch, 3, width)
    ours, theirs = network(sizes, width, rule, bias), network(sizes, width, rule, bias, torch.float64)
    got = steps.network_steps_(x, row, target, ours, loss, Update(rule, lr, 4), activation, 0.5, tile=SMALL, programs=programs)
    x, row, target, lr = (tensor.double() for tensor in (x, row, target, lr))
    wanted = reference.network_steps_(x, row, target, theirs, loss, Update(rule, lr, 4), activation, 0.5)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6)
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6)


def test_the_tile_of_a_run() -> None:
    sizes, rule = [40, 33, 10], Adam()
    x, row, target, lr = batches(sizes, 50, 2, 10)
    ours, theirs = network(sizes, 10, rule, True), network(sizes, 10, rule, True)
    got = steps.network_steps_(x, row, target, ours, "bce", Update(rule, lr, 1))
    wanted = reference.network_steps_(x, row, target, theirs, "bce", Update(rule, lr, 1))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_where_launches_are_cut_and_who_does_what_changes_no_bit() -> None:
    sizes, rule = [9, 20, 13, 3], Adam()
    x, row, target, lr = batches(sizes, 6, 4, 3)
    whole, cut = network(sizes, 3, rule, True), network(sizes, 3, rule, True)
    step = torch.tensor(7, device=DEVICE)
    together = steps.network_steps_(x, row, target, whole, "bce", Update(rule, lr, step), tile=SMALL, programs=4)
    apart = [
        steps.network_steps_(x[part], row[part], target[part], cut, "bce", Update(rule, lr[part], step + part.start),
                             tile=SMALL, programs=9)
        for part in (slice(0, 1), slice(1, 4))
    ]  # fmt: skip
    assert torch.equal(together, torch.cat(apart))
    for one, other in zip(tensors(whole), tensors(cut), strict=True):
        assert torch.equal(one, other)


def test_what_is_not_a_number_stays_so() -> None:
    sizes, rule = [9, 20, 13, 3], SGD()
    x, row, target, lr = batches(sizes, 6, 2, 3)
    x[0, 2, 4] = float("nan")
    a = steps.network_steps_(x, row, target, network(sizes, 3, rule, True), "bce", Update(rule, lr, 1), tile=SMALL)
    assert a[0, 2].isnan().all()
    assert a[0, :2].isfinite().all()
    assert a[1].isnan().all()


def test_a_wait_in_vain_ends_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer waits for one program more than there are."""
    sizes, rule = [9, 20, 3], SGD()
    x, row, target, lr = batches(sizes, 6, 2, 3)
    sent = steps._sent
    monkeypatch.setattr(steps, "_sent", lambda values, device: sent([*values[:-2], values[-2] + 1, values[-1]], device))
    monkeypatch.setattr(steps, "PATIENCE", 5)
    failed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    layers = network(sizes, 3, rule, True)
    a = steps.network_steps_(x, row, target, layers, "bce", Update(rule, lr, 1), tile=SMALL, failed=failed)
    assert int(failed) == 1
    assert a.isnan().all()


def test_rows_are_shared_by_what_they_cost() -> None:
    assert [len(own) for own in steps.shares([(784, 500)], 131, 4)] == [125]
    each = steps.shares([(784, 500), (500, 500), (500, 500)], 131, 4)
    assert [len(own) for own in each] == [63, 32, 32]
    assert all(own[0][0] == 0 and own[-1][1] == 500 and all(a[1] == b[0] for a, b in itertools.pairwise(own)) for own in each)
    assert steps.shares([(9, 5), (5, 3)], 2, 4) == [[(0, 5)], [(0, 3)]]


def test_what_it_cannot_do_is_refused_by_name() -> None:
    sizes, rule = [9, 20, 3], SGD()
    x, row, target, lr = batches(sizes, 70, 1, 3)
    with pytest.raises(ValueError, match="batches of 70 are more than the 64 that a program holds"):
        steps.network_steps_(x, row, target, network(sizes, 3, rule, True), "bce", Update(rule, lr, 1))
    x, row, target, lr = batches(sizes, 6, 1, 3)
    with pytest.raises(ValueError, match=r"target must be contiguous, float32, of shape \[1, 6, 3\]"):
        steps.network_steps_(x, row, target.double(), network(sizes, 3, rule, True), "bce", Update(rule, lr, 1))
