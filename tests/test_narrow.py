"""Readings of some positions and some classes: what they are in expectation, and that they are drawn anew and again."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from test_train_script import fails, run
from torch import Tensor, nn
from torch.nn import functional

import f3triton as f3
from f3triton.kernels import eager
from f3triton.learn.local import Local
from f3triton.learn.narrow import Ending, Narrow
from f3triton.network.updater import Arithmetic, Updater
from f3triton.run.checkpoint import Checkpoints, newest

CPU = torch.device("cpu")
CLASSES = 7


def stages() -> list[f3.network.stage.Stage]:
    """The ends that a network can have."""
    torch.manual_seed(0)
    ends = [f3.Linear(6, CLASSES), f3.Block(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, CLASSES, bias=False)))]
    return [end.double() for end in [*ends, f3.models.GPT(CLASSES, 5, 1, 2, 6).stages[-1]]]


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    return h, functional.one_hot(torch.tensor([0, 3, 6, 3]), CLASSES).double()


def whole(stage: nn.Module, h: Tensor, target: Tensor) -> Tensor:
    h = h.clone().requires_grad_()
    return torch.autograd.grad(functional.cross_entropy(stage(h), target), h)[0]


def step() -> f3.network.updater.Step:
    return Updater(nn.Linear(1, 1), Arithmetic(f3.SGD(lr=0.1), eager, CPU)).begin(0.1)


@pytest.mark.parametrize("number", range(3))
def test_all_classes_and_positions_are_the_whole_reading(number: int) -> None:
    stage, (h, target) = stages()[number], problem()
    for chosen in (None, torch.randperm(CLASSES)):
        got = Ending(stage).gradient(h, target, chosen, "cross-entropy", step())
        torch.testing.assert_close(got, whole(stage, h, target), rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in stage.parameters())


def test_positions_are_unbiased_and_so_is_the_softmax_sum() -> None:
    stage, (h, target) = stages()[1], problem()
    ending, wanted = Ending(stage), whole(stage, h, target)
    read = torch.zeros_like(h)
    for row in range(len(h)):
        one = torch.tensor([row])
        read[row] = ending.gradient(h[one], target[one], None, "cross-entropy", step())[0] / len(h)
    torch.testing.assert_close(read, wanted, rtol=1e-10, atol=1e-12)
    n, ids = stage.module[0](h), target.argmax(-1)
    scores = stage(h).exp().detach()
    subsets = list(itertools.combinations(range(CLASSES), 3))
    sums = [ending._scores(n, ids, torch.tensor(subset), CLASSES).exp().sum(-1).detach() for subset in subsets]
    torch.testing.assert_close(torch.stack(sums).mean(0), scores.sum(-1), rtol=1e-10, atol=1e-12)


def test_more_candidates_less_bias() -> None:
    stage, (h, target) = stages()[1], problem()
    with torch.no_grad():
        stage.module[1].weight *= 3  # a softmax that is far from even
    wanted, bias = whole(stage, h, target), []
    for count in (1, 3, 6):
        found = [
            Ending(stage).gradient(h, target, torch.tensor(subset), "cross-entropy", step())
            for subset in itertools.combinations(range(CLASSES), count)
        ]
        bias.append(float((torch.stack(found).mean(0) - wanted).norm() / wanted.norm()))
    assert bias[0] > bias[1] > bias[2]


def test_draws() -> None:
    narrow = Narrow(0.5, 3, seed=4)
    which, chosen = narrow.draw(10, CLASSES, CPU, 5, 1)
    again = narrow.draw(10, CLASSES, CPU, 5, 1)
    assert torch.equal(which, again[0])
    assert torch.equal(chosen, again[1])
    assert len(set(which.tolist())) == 5
    assert len(set(chosen.tolist())) == 3
    others = [
        narrow.draw(10, CLASSES, CPU, 6, 1),
        narrow.draw(10, CLASSES, CPU, 5, 2),
        Narrow(0.5, 3, 6).draw(10, CLASSES, CPU, 5, 1),
    ]
    assert all(not torch.equal(which, other) for other, _ in others)
    counts = torch.zeros(10)
    for number in range(400):
        counts[narrow.draw(10, CLASSES, CPU, number)[0]] += 1
    assert (counts - 200).abs().max() < 50
    assert len(Narrow(0.01).draw(10, CLASSES, CPU)[0]) == 1


@pytest.mark.parametrize("reading", [0, 1, 2])
def test_a_stage_hears_of_the_positions_that_are_read_only(reading: int) -> None:
    torch.manual_seed(0)
    model = f3.models.GPT(CLASSES, 5, 3, 2, 8).double()
    model.prepare(torch.zeros(1, 5, dtype=torch.int64), CLASSES, None, 5)
    if reading:
        model.read_by(reading)
    else:
        model.add_heads([[5, 8]] * 4, CLASSES, 5)
    local = Local("cross-entropy", model, 1, Narrow(0.2))
    with torch.no_grad():
        h = torch.randn(4, 5, 8, dtype=torch.float64)
        target = functional.one_hot(torch.arange(20) % CLASSES, CLASSES).double()
        heard = local.gradient(1, h, target, Updater(model, Arithmetic(f3.SGD(lr=0.1), eager, CPU)).begin(0.1))
    which, _ = local.narrow.draw(20, CLASSES, CPU, 1, 1)
    told = heard.abs().sum(-1).flatten().nonzero().flatten()
    assert heard.shape == h.shape
    assert set(which.tolist()) <= set(told.tolist())
    if reading < 2:  # with a block in front of the reading a position hears of those behind it
        assert told.tolist() == which.tolist()


SMALL = ["--context", 8, "--dim", 16, "--depth", 3, "--heads", 2, "--batch-size", 16, "--method", "local"]


def test_a_run_learns_by_them_and_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    narrow = {"local_positions": 0.5, "local_candidates": 5}

    def trained(stop: int | None = None, **more: object) -> f3.Trainer:
        torch.manual_seed(0)
        train = f3.load_text(text, context=8)[0]
        model = f3.models.GPT(train.outputs, 8, 3, 2, 16)
        trainer = f3.Trainer(model, "cross-entropy", f3.Adam(lr=1e-2), method="local", device="cpu", **narrow)

        def halt(count: int) -> None:
            if trainer.result.steps == stop:
                raise KeyboardInterrupt

        trainer.fit(train, 4, train, on_step=halt, **more)
        return trainer

    one = trained()
    assert one.result.history[-1]["test_loss"] < 0.7 * one.result.history[0]["test_loss"]
    trained(9, checkpoints=Checkpoints(tmp_path / "kept", 100))
    two = trained(resume=newest(tmp_path / "kept", print))
    for (name, ours), theirs in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    capsys.readouterr()
    told = []
    for options in (
        [],
        ["--local-positions", 0.5],
        ["--local-candidates", 5],
        ["--local-positions", 0.5, "--local-candidates", 5],
    ):
        assert run("--text", text, *SMALL, "--dry-run", *options) == 0
        told.append(int(re.search(r"FLOPs a step ([\d,]+)", capsys.readouterr().out)[1].replace(",", "")))
    classes = len(set(text.read_text()))
    reading = 2 * 2 * 2 * 16 * 8 * 16 * classes  # two blocks read by the last one, forward and back
    assert [told[0] - other for other in told[1:]] == [
        round(reading * (1 - share)) for share in (0.5, 6 / classes, 0.5 * 6 / classes)
    ]


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    assert "needs a model that predicts something at each token" in fails(capsys, "--method", "local", "--local-positions", 0.5)
    assert "needs shared heads" in fails(capsys, "--method", "local", "--local-candidates", 5)
    assert "more classes than that" in fails(capsys, "--text", text, *SMALL, "--local-candidates", 500)
    assert "a share above 0 and up to 1, got 1.5" in fails(capsys, "--method", "local", "--local-positions", 1.5)
    assert "at least 1, got 0" in fails(capsys, "--method", "local", "--local-candidates", 0)
    own = ["--local-head", "own", "--local-head-depth", 1, "--local-positions", 0.5]
    assert "does not go with own heads behind stages" in fails(capsys, "--text", text, *SMALL, *own)
