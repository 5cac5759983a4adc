"""The step as a function of tensors, what it draws, and what is told of its outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from test_trainer import mlp, problem, train, weights
from torch import nn

import f3triton as f3
from f3triton.base.data import Visit
from f3triton.kernels import eager, reference
from f3triton.learn.peers import make_learner
from f3triton.learn.signal import Signal
from f3triton.learn.step import F3Learner, Output
from f3triton.network.updater import Arithmetic, Updater
from f3triton.run.tally import Tally, slots

CPU = torch.device("cpu")
HOW = Arithmetic(f3.Adam(lr=0.01), eager, CPU)


def learner(model: f3.Sequential, signal: Signal, **more: object) -> F3Learner:
    data = f3.Dataset.from_tensors(*problem())
    model.prepare(data.inputs[:1], data.outputs, seed=0)
    return F3Learner(model, data, Updater(model, HOW), "cross-entropy", signal, **more)


def test_learn_is_a_function_of_tensors() -> None:
    """Rows in, rows out: with the same ones it does what a run with a store does, and it touches no store."""
    trainer = f3.Trainer(mlp(), "cross-entropy", f3.Adam(lr=0.01), device="cpu", lr_schedule="constant")
    index = torch.arange(8)
    twin = copy.deepcopy(trainer.model)
    trainer.fit(problem(), 1, batches=lambda epoch: [index, index, index])
    pure = learner(twin, Signal(), store=trainer.learner.store)
    x, target = pure.data.fetch(index), pure.data.one_hot(index)
    pure.store, row = None, target
    pure.hidden[0].feedback_matrix = trainer.model[0].feedback_matrix
    for _ in range(3):
        output, left = pure.learn(x, target, row, True, 0.01)
        row = target - torch.softmax(output.a, -1)
        assert torch.equal(left, row)
    assert torch.equal(weights(twin), weights(trainer.model))


def test_a_delayed_signal_without_a_store_is_refused() -> None:
    data = f3.Dataset.from_tensors(*problem())
    with pytest.raises(ValueError, match="signal 'delayed-error' needs an error store, got none"):
        make_learner("f3", mlp(), data, "cross-entropy", HOW, Signal())


def with_dropout() -> f3.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5))
    again = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.5))
    return f3.Sequential(f3.Block(block), f3.Block(again), f3.Linear(16, 3))


@pytest.mark.parametrize("method", ["f3", "dfa", "bp"])
def test_dropout_depends_on_seed_step_and_stage_only(method: str) -> None:
    def run(noise: bool, seed: int = 1) -> torch.Tensor:
        trainer = f3.Trainer(with_dropout(), "cross-entropy", method=method, device="cpu", batch_size=8, seed=seed)
        before = torch.get_rng_state()
        trainer.fit(problem(), 2, on_step=lambda samples: torch.rand(3) if noise else None)
        assert noise or torch.equal(torch.get_rng_state(), before)  # and it draws nothing from the user's generator
        return weights(trainer.model)

    assert torch.equal(run(False), run(True))
    assert not torch.equal(run(False), run(False, seed=2))


def test_stages_draw_other_masks_and_so_do_steps() -> None:
    made = learner(with_dropout(), Signal("target"))
    masks = []
    dropouts = [stage.module[2] for stage in made.hidden]
    for dropout in dropouts:
        dropout.register_forward_hook(lambda module, given, out: masks.append(out == 0))
    made.model.train()
    for _ in range(2):
        made.visit(Visit(torch.arange(8), torch.arange(8)), 0.01)
    assert len(masks) == 4
    assert all(not torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))


def test_random_bits_belong_to_a_parameters_place_in_the_whole_model() -> None:
    """The last stage alone rounds as it does beside the others."""
    model = mlp().bfloat16()
    whole, last = Updater(model, HOW), Updater(model, HOW, model.stages[-1].parameters())
    for parameter in model.stages[-1].parameters():
        assert whole.states[parameter].place == last.states[parameter].place
    assert [state.place for state in whole.states.values()] == list(range(6))


def outputs(loss: str, count: int = 7) -> list[Output]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        rows = 5 if number < count - 1 else 3
        a = torch.randn(rows, 4, generator=generator)
        found.append(Output(a, torch.eye(4)[torch.randint(0, 4, (rows,), generator=generator)]))
    return found


@pytest.mark.parametrize("loss", ["bce", "cross-entropy", "mse"])
@pytest.mark.parametrize("given", [False, True], ids=["outputs", "losses and hits"])
def test_a_tally_sums_batch_after_batch(loss: str, given: bool) -> None:
    """By slices, whose order is fixed on every device; from outputs, or from losses and hits that the operations gave."""
    tally, total, hits, samples = Tally(loss, 4, CPU), 0.0, 0, 0
    for step, output in enumerate(outputs(loss), 1):
        rows = zip(output.a.split(1), output.target.split(1), strict=True)
        by_sample = torch.stack([reference.loss_of(a, target, loss) for a, target in rows])
        right = output.a.argmax(-1) == output.target.argmax(-1)
        tally.add(Output(None, None, by_sample, right) if given else output, step)
        if step == 4:  # saved and restored in the middle
            tensors, numbers = tally.state()
            tally = Tally(loss, 4, CPU)
            tally.restore(tensors, numbers)
        total, hits, samples = total + float(by_sample.double().sum()), hits + int(right.sum()), samples + len(right)
    figures = tally.figures(7)
    assert figures.loss == pytest.approx(total / samples, rel=1e-6)
    assert (figures.correct, figures.samples) == (hits, samples)
    assert tally.state() == ({}, {})


def test_outputs_in_a_ring_are_looked_at_before_they_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f3triton.run.tally.KEPT_OUTPUTS", 60)
    ring = [torch.zeros(5) for _ in range(slots(5, 4))]
    tally = Tally("bce", 4, CPU)
    for step in range(1, 40):
        place = ring[step % len(ring)]
        place.fill_(float(step))
        tally.add(Output(None, None, place, place > 20), step)
    figures = tally.figures(39)
    assert figures.loss == pytest.approx(sum(range(1, 40)) / 39)
    assert figures.correct == 5 * 19


def test_a_run_with_losses_from_the_operations_is_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Triton operations do it: what is told of a run does not depend on who computed its losses."""
    plain = train(mlp())
    original = eager.output_step

    def with_figures(a: torch.Tensor, target: torch.Tensor, *words: str) -> tuple:
        gradient, error, _ = original(a, target, *words)
        return gradient, error, reference.output_step(a, target, *words)[2]

    monkeypatch.setattr(eager, "output_step", with_figures)
    told = train(mlp())
    assert torch.equal(weights(told.model), weights(plain.model))
    for one, other in zip(told.result.history, plain.result.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert one["train_error"] == other["train_error"]
