"""Samples drawn by the size of their last errors: how often, in which order, and what goes with it."""

from __future__ import annotations

import math

import pytest
import torch
from test_checkpoints import problem, run
from torch.nn import functional

import f3triton as f3
from f3triton.learn.loss import error_sizes, losses_by_sample
from f3triton.visits.sampled import FLOOR, SampledOrder, draw

CPU = torch.device("cpu")


def test_samples_are_drawn_in_proportion_to_their_sizes() -> None:
    sizes = torch.rand(400, generator=torch.Generator().manual_seed(1)) ** 4
    share = (sizes + FLOOR * sizes.mean()).double()
    wanted = 200 * share / share.sum()
    counts = torch.stack([torch.bincount(draw(sizes, 20, 10, seed).flatten(), minlength=400) for seed in range(300)]).double()
    assert bool((counts >= wanted.floor()).all() and (counts <= wanted.ceil()).all())
    assert float((counts.mean(0) - wanted).abs().max()) < 5 * math.sqrt(0.25 / 300)


def test_no_sample_twice_in_a_batch_and_the_same_seed_the_same_draw() -> None:
    sizes = torch.full((100,), 0.05)
    sizes[7] = 1.0  # is drawn 13 or 14 times for 20 batches
    drawn = draw(sizes, 20, 5, 3)
    assert 13 <= int((drawn == 7).sum()) <= 14
    assert all(len(set(batch)) == 5 for batch in drawn.tolist())
    assert torch.equal(drawn, draw(sizes, 20, 5, 3))
    assert not torch.equal(drawn, draw(sizes, 20, 5, 4))
    assert draw(torch.zeros(100), 4, 5, 0).unique().numel() == 20  # no errors: as likely as each other


@pytest.mark.parametrize(("samples", "batch"), [(61, 7), (60, 8), (5, 3), (40, 40)])
def test_an_epoch_has_as_many_visits_as_there_are_samples(samples: int, batch: int) -> None:
    order = SampledOrder(samples, batch, 0, CPU, CPU)
    assert sorted(torch.cat([visit.index for visit in order.visits(0)]).tolist()) == list(range(samples))
    for epoch in (1, 2):
        indices = [visit.index for visit in order.visits(epoch)]
        assert len(indices) == order.steps_per_epoch
        assert sum(map(len, indices)) == samples
        for skip in range(len(indices) + 1):
            assert [visit.index.tolist() for visit in order.visits(epoch, skip)] == [i.tolist() for i in indices[skip:]]


def test_the_size_of_an_error_is_that_of_the_probability_that_was_missing() -> None:
    a = torch.randn(6, 4, dtype=torch.float64)
    target = functional.one_hot(torch.arange(6) % 4, 4).double()
    error = target - torch.softmax(a, -1)
    sizes = error_sizes(losses_by_sample(a, target, "cross-entropy"), "cross-entropy", 4)
    torch.testing.assert_close(sizes, error.abs().sum(-1) / 2)
    error = target - torch.sigmoid(a)
    torch.testing.assert_close(error_sizes(losses_by_sample(a, target, "bce"), "bce", 4), 1 - (1 - error.abs()).prod(-1))
    torch.testing.assert_close(
        error_sizes(losses_by_sample(a, target, "mse"), "mse", 4, 2), (a - target).square().mean(-1).sqrt().view(3, 2).mean(1)
    )


@pytest.mark.parametrize("method", ["f3", "dfa", "bp", "local", "fa", "last-layer", "drtp"])
def test_every_method_takes_it_and_notes_what_it_saw(method: str) -> None:
    seen = []
    for _ in range(2):
        trainer = run(None, method=method, sampling="error")
        seen.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    plain = run(None, method=method)
    assert trainer.result.steps == plain.result.steps
    assert not torch.equal(seen[0][-1], list(plain.model.parameters())[-1])


def test_what_is_refused() -> None:
    trainer = f3.Trainer(f3.models.MLP([16, 5, 3]), sampling="error", device="cpu")
    with pytest.raises(f3.InputError, match="batches of your own and sampling 'error' cannot go together"):
        trainer.fit(problem(), 1, batches=lambda epoch: [torch.arange(5)])
